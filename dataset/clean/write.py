"""Writes the cleaned set: the rows that stay with their pictures, the others with the reason."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dataset.block_file import import_pyarrow
from dataset.clean.decide import REJECTED, Decision
from dataset.clean.examine import open_source
from dataset.clean.settings import Settings
from dataset.parquet_rows import ParquetRows

SHARD_BYTES = 256 * 2**20  # of a Parquet file
# Rows; small, because readers unpack a whole group for one of them.
ROW_GROUP = 256
EXAMPLES = 6  # of each reason, and of what stays
PARTS = ("train", "val", "rejects")
# Half a character, which UTF-8 cannot hold, becomes its JSON escape.
UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}


class JsonLines:
    """NAME.jsonl."""

    def __init__(self, folder: Path, name: str):
        self.file = open(folder / f"{name}.jsonl", "w", **UTF8)
        self.close = self.file.close

    def add(self, row: dict) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Shards:
    """NAME-00000.parquet and so on, of about SHARD_BYTES each."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.file, self.rows, self.number, self.bytes = None, [], 0, 0

    def add(self, row: dict) -> None:
        """Add a row with conversations (text), image_bytes and, in rejects, what is wrong."""
        self.rows.append(row)
        self.bytes += len(row["conversations"] or "") + sum(
            map(len, filter(None, row["image_bytes"]))
        )
        if len(self.rows) == ROW_GROUP or self.bytes >= SHARD_BYTES:
            self._write_rows()
        if self.bytes >= SHARD_BYTES:
            self.close()

    def _write_rows(self) -> None:
        pa = import_pyarrow()
        types = {"row": pa.int64(), "image_bytes": pa.list_(pa.binary())}
        schema = pa.schema([(name, types.get(name, pa.string())) for name in self.rows[0]])
        if self.file is None:
            path = self.folder / f"{self.name}-{self.number:05d}.parquet"
            self.file = pa.parquet.ParquetWriter(path, schema)
        self.file.write_table(pa.Table.from_pylist(self.rows, schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._write_rows()
        if self.file:
            self.file.close()
            self.file, self.number, self.bytes = None, self.number + 1, 0


class Pictures:
    """The JPEGs that the workers left in the folder `work`, and those that are in images/ now."""

    def __init__(self, folder: Path, work: Path, n_pictures: int):
        self.folder, self.work = folder / "images", work
        self.is_moved = bytearray(n_pictures)
        self.renamed: dict[int, str] = {}

    def read(self, number: int) -> bytes:
        """A picture; of one that cannot be used, the detail of the reason."""
        return (self.work / str(number)).read_bytes()

    def move(self, number: int, name: str) -> str:
        """Move a picture to images/NAME unless it is there; returns the name that it has."""
        if not self.is_moved[number]:
            self.is_moved[number] = True
            # "a.png" and "a.png.jpg" would both be "a.png.jpg".
            if (self.folder / name).exists():
                name = self.renamed[number] = f"{name}.{number}.jpg"
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / str(number)).rename(self.folder / name)
        return self.renamed.get(number, name)


class Written(NamedTuple):
    """The account of what was written."""

    counts: Counter[str]  # rows of each of PARTS
    reasons: Counter[str]  # of rejected rows
    examples: dict[str, list[dict]]  # of each reason, and of rows that stay


def write_set(settings: Settings, folder: Path, work: Path, decision: Decision) -> Written:
    """Write every row to the part it belongs to, and its pictures.

    Args:
        settings: the format among them.
        folder: gets the set.
        work: has rows.jsonl and the pictures.
        decision: what becomes of the rows.
    """
    source, found = open_source(settings.data, settings.images), decision.found
    pictures = Pictures(folder, work, len(found.pictures))
    written = Written(Counter(), Counter(), defaultdict(list))
    kinds = [Shards if settings.format == "parquet" else JsonLines] * 2
    kinds.append(Shards if isinstance(source, ParquetRows) else JsonLines)
    files = [kind(folder, name) for kind, name in zip(kinds, PARTS)]
    with open(work / "rows.jsonl", **UTF8) as lines:
        for number, line in enumerate(tqdm(lines, "write", len(found.keys), unit="row", delay=1)):
            line, shown, part = json.loads(line), found.pictures_of(number), decision.part[number]
            turns = line["row"]["conversations"] if "row" in line else []
            reason, detail = explain(decision, number, line, pictures)
            # the row, as it came if it is rejected
            if part == REJECTED:
                row = {"row": number + 1, "reason": reason, "detail": detail}
                row |= source.read_raw(int(found.keys[number]))
                written.reasons[reason] += 1
            elif settings.format == "parquet":
                text = json.dumps(turns, ensure_ascii=False)
                row = {"conversations": text, "image_bytes": list(map(pictures.read, shown))}
            else:
                names = list(map(pictures.move, shown, line["images"]))
                row = line["row"] | join_names(names)
            files[part].add(row)
            written.counts[PARTS[part]] += 1
            # an example for the report
            examples = written.examples[reason or f"goes to {PARTS[part]}"]
            if len(examples) < EXAMPLES:
                examples.append({"row": number, "detail": detail, "turns": turns, "shown": shown})
    for file in files:
        file.close()
    if not written.counts["val"]:
        (folder / "val.jsonl").unlink(missing_ok=True)
    return written


def join_names(names: list[str]) -> dict:
    """ "image" of a row as the published sets have it; a list where a name has a comma."""
    if not names:
        return {}
    return {"image": names if any("," in name for name in names) else ", ".join(names)}


def explain(decision: Decision, number: int, line: dict, pictures: Pictures) -> tuple[str, str]:
    """(reason, detail) why a row is rejected; ("", "") if it stays."""
    if "reason" in line:
        return line["reason"], line["detail"]
    reason, cause = decision.reasons[decision.reason[number]], int(decision.cause[number])
    if cause < 0:
        return reason, ""
    if decision.repeats[cause] >= 0:
        return reason, f"of one in row {decision.found.places[decision.repeats[cause], 0] + 1}"
    return reason, pictures.read(cause).decode("utf-8", "surrogatepass")
