"""What a cleaning leaves: the rows that stay with their pictures, and every row that does not with its reason."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from tqdm import tqdm

from dataset.clean.decide import REJECTED, Decision
from dataset.clean.stages import IMAGES_A_CHUNK, Settings, chunk_path, open_source
from dataset.rows import ParquetRows

SHARD_BYTES = 256 * 2**20  # of pictures and text in a Parquet file
ROW_GROUP = 256  # rows; small, so that readers need not unpack many for one
SCHEMA = pa.schema([("conversations", pa.string()), ("image_bytes", pa.list_(pa.binary()))])
REJECTS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string()), *SCHEMA]
)


def open_text(path: Path) -> TextIO:
    """A file for JSON lines; half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape."""
    return open(path, "w", encoding="utf-8", errors="backslashreplace")


class StoredImages:
    """The pictures that the work folder keeps, by number."""

    def __init__(self, work: Path):
        self.work, self.chunk = work, -1

    def read(self, number: int) -> bytes:
        chunk, at = divmod(number, IMAGES_A_CHUNK)
        if chunk != self.chunk:
            self.chunk = chunk
            self.offsets = np.load(chunk_path(self.work, "images", chunk, "npz"))["offset"]
        with open(chunk_path(self.work, "images", chunk, "bin"), "rb") as file:
            file.seek(int(self.offsets[at]))
            return file.read(int(self.offsets[at + 1] - self.offsets[at]))


class JsonLinesWriter:
    """train.jsonl, val.jsonl and images/."""

    def __init__(self, out: Path, stored: StoredImages):
        self.out, self.stored = out, stored
        self.files = {part: open_text(out / f"{part}.jsonl") for part in ("train", "val")}
        self.written: set[int] = set()  # pictures

    def add(self, part: str, row: dict, names: list[str], pictures: list[int]) -> None:
        for name, picture in zip(names, pictures):
            if picture not in self.written:
                path = self.out / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.stored.read(picture))
                self.written.add(picture)
        row |= {"image": ", ".join(names)} if names else {}
        self.files[part].write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class ParquetWriter:
    """train-00000.parquet … and val-00000.parquet …, with the pictures inside."""

    def __init__(self, out: Path, stored: StoredImages):
        self.stored = stored
        self.shards = {part: Shards(out, part, SCHEMA) for part in ("train", "val")}

    def add(self, part: str, row: dict, names: list[str], pictures: list[int]) -> None:
        text = json.dumps(row["conversations"], ensure_ascii=False)
        images = [self.stored.read(picture) for picture in pictures]
        self.shards[part].add(
            {"conversations": text, "image_bytes": images}, len(text) + sum(map(len, images))
        )

    def close(self) -> None:
        for shards in self.shards.values():
            shards.close()


class Shards:
    """Rows in Parquet files of about SHARD_BYTES."""

    def __init__(self, out: Path, name: str, schema: pa.Schema):
        self.out, self.name, self.schema = out, name, schema
        self.rows: list[dict] = []
        self.file, self.number, self.bytes = None, 0, 0

    def add(self, row: dict, n_bytes: int) -> None:
        self.rows.append(row)
        self.bytes += n_bytes
        if len(self.rows) == ROW_GROUP or self.bytes >= SHARD_BYTES:
            self._write_rows()
        if self.bytes >= SHARD_BYTES:
            self.close()

    def _write_rows(self) -> None:
        if self.file is None:
            self.file = parquet.ParquetWriter(
                self.out / f"{self.name}-{self.number:05d}.parquet", self.schema
            )
        self.file.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._write_rows()
        if self.file is not None:
            self.file.close()
            self.file, self.number, self.bytes = None, self.number + 1, 0


class RejectsWriter:
    """rejects.jsonl with the line as it was, or rejects-00000.parquet … with the row as it was."""

    def __init__(self, settings: Settings):
        self.source = open_source(settings.data, settings.images)
        self.is_parquet = isinstance(self.source, ParquetRows)
        out = Path(settings.out)
        self.file = (
            Shards(out, "rejects", REJECTS_SCHEMA)
            if self.is_parquet
            else open_text(out / "rejects.jsonl")
        )

    def add(self, number: int, key: int, reason: str, detail: str) -> None:
        record = {"row": number + 1, "reason": reason, "detail": detail}
        if self.is_parquet:
            text, images = self.source.values(key)
            images = [images] if isinstance(images, bytes) else images or []
            text = (
                text
                if isinstance(text, str) or text is None
                else json.dumps(text, ensure_ascii=False)
            )
            self.file.add(
                record | {"conversations": text, "image_bytes": images},
                sum(len(image or b"") for image in images),
            )
        else:
            line = self.source.read_line(key).decode("utf-8", "backslashreplace").rstrip("\r\n")
            self.file.write(json.dumps(record | {"line": line}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.file.close()


def read_lines(settings: Settings, n_chunks: int) -> Iterator[dict]:
    """What the first stage left of every row, in order."""
    for chunk in range(n_chunks):
        with open(chunk_path(settings.work, "rows", chunk, "jsonl"), encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def write_set(settings: Settings, decision: Decision, n_chunks: int, watch) -> dict[str, int]:
    """Write every row to the part it belongs to; returns rows of "train", "val" and "rejected". `watch(number, part, line,
    reason, detail, pictures)` sees each of them too."""
    out, stored = Path(settings.out), StoredImages(settings.work)
    keys = np.load(settings.work / "keys.npy", mmap_mode="r")
    writer = (ParquetWriter if settings.form == "parquet" else JsonLinesWriter)(out, stored)
    rejects = RejectsWriter(settings)
    counts = {"train": 0, "val": 0, "rejected": 0}
    end = 0
    lines = tqdm(read_lines(settings, n_chunks), total=len(keys), desc="write", unit="row", delay=1)
    for number, line in enumerate(lines):
        start, end = end, end + int(decision.rows["n_images"][number])
        pictures = decision.picture_of[start:end].tolist()
        part = ("train", "val", "rejected")[decision.part[number]]
        reason, detail = explain(decision, number, line)
        if part == "rejected":
            rejects.add(number, int(keys[number]), reason, detail)
        else:
            writer.add(part, line["row"], line["images"], pictures)
        watch(number, part, line, reason, detail, pictures)
        counts[part] += 1
    writer.close()
    rejects.close()
    if not counts["val"]:
        (out / "val.jsonl").unlink(missing_ok=True)
    return counts


def explain(decision: Decision, number: int, line: dict) -> tuple[str, str]:
    """(reason, detail) of a rejected row; blank for others."""
    if decision.part[number] != REJECTED:
        return "", ""
    if "reason" in line:
        return line["reason"], line["detail"]
    reason, cause = decision.reasons[decision.reason[number]], int(decision.cause[number])
    if cause < 0:
        return reason, ""
    if decision.repeats[cause] >= 0:
        row, _ = decision.pictures.places[decision.repeats[cause]]
        return reason, f"of one in row {row + 1}"
    return reason, str(decision.images["detail"][cause])
