"""What worker processes do of a cleaning: look at a chunk of rows, or of pictures, and leave what they found in a work folder.

Chunks are the same whatever the number of processes, and each file appears whole or not at all, so a cleaning that was stopped
goes on with the chunks that are missing.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import BadSampleError
from common.files import atomic_write, hash_to_int
from dataset.clean.pictures import THUMBNAIL, Examined, examine_image
from dataset.clean.repair import Limits, check_answers, repair_conversation
from dataset.images import split_names
from dataset.rows import JsonLinesRows, ParquetRows
from dataset.vlm_dataset import open_rows

ROWS_A_CHUNK, IMAGES_A_CHUNK = 2000, 500


@dataclass(frozen=True)
class Settings:
    """All that the result depends on."""

    data: str
    images: str | None
    out: str
    form: str = "jsonl"  # of the output: jsonl or parquet
    size: int = 128  # pixels a side; 0: as they are
    limits: Limits = field(default_factory=Limits)
    keep_duplicates: bool = False
    keep_repeats: bool = False
    max_repeats: int = 100
    val_share: float = 0.01
    seed: int = 0

    @property
    def work(self) -> Path:
        return Path(self.out) / ".work"

    def describe(self) -> dict:
        """What has to be the same for a stopped cleaning to go on."""
        status = Path(self.data).stat()
        return json.loads(
            json.dumps(asdict(self) | {"bytes": status.st_size, "modified": status.st_mtime_ns})
        )


@lru_cache(maxsize=1)
def open_source(data: str, images: str | None) -> JsonLinesRows | ParquetRows:
    """The rows to clean, opened once in each process."""
    return open_rows(data, images)


def chunk_path(work: Path, kind: str, chunk: int, ending: str) -> Path:
    return work / f"{kind}-{chunk:06d}.{ending}"


def write_whole(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def save_arrays(path: Path, **arrays) -> None:
    """An .npz that appears whole; the last file of a chunk, it says that the chunk is done."""
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def examine_rows(settings: Settings, chunk: int) -> int:
    """Repair and check the rows of a chunk; returns how many there are.

    rows-N.jsonl: a line a row, {"row", "images"} as it is after repair (names of the pictures in the output) or {"reason",
    "detail"}. rows-N.npz: n_images int32[n], ids uint64[all pictures], caption uint64[n] hash of the answers, n_answers int32[n],
    answers uint64[all answers], length int32[n] characters of the answers, is_rejected bool[n], repairs (JSON).
    """
    rows = open_source(settings.data, settings.images)
    keys = np.load(settings.work / "keys.npy", mmap_mode="r")[chunk * ROWS_A_CHUNK :][:ROWS_A_CHUNK]
    lines, ids, answers, repairs = [], [], [], Counter()
    counts = np.zeros(
        len(keys),
        [
            ("n_images", "<i4"),
            ("caption", "<u8"),
            ("n_answers", "<i4"),
            ("length", "<i4"),
            ("is_rejected", "?"),
        ],
    )
    for number, key in enumerate(keys.tolist()):
        try:
            row = rows.read(key)
            if row is None:
                raise BadSampleError("not a JSON object")
            row_ids, names = identify_images(row)
            turns, repaired = repair_conversation(row.get("conversations"), len(row_ids))
            said = check_answers(turns, settings.limits)
        except BadSampleError as error:
            counts["is_rejected"][number] = True
            lines.append({"reason": error.args[0], "detail": error.detail})
            continue
        repairs.update(repaired)
        kept = {
            name: value
            for name, value in row.items()
            if name not in ("image", "image_bytes", "conversations")
        }
        lines.append({"row": kept | {"conversations": turns}, "images": names})
        ids += row_ids
        answers += [hash_text(answer) for answer in said]
        counts[number] = (
            len(row_ids),
            hash_text("\n".join(said)),
            len(said),
            sum(map(len, said)),
            False,
        )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(
        chunk_path(settings.work, "rows", chunk, "jsonl"), text.encode("utf-8", "backslashreplace")
    )
    save_arrays(
        chunk_path(settings.work, "rows", chunk, "npz"), ids=np.array(ids, np.uint64), answers=np.array(answers, np.uint64),
        repairs=np.array(json.dumps(repairs)), **{name: counts[name] for name in counts.dtype.names},
    )  # fmt: skip
    return len(keys)


def identify_images(row: dict) -> tuple[list[int], list[str]]:
    """(64 bits that tell each picture of a row from others, its file's name in the output). Pictures inside a Parquet file have
    no name: they are known by their bytes."""
    if "image_bytes" in row:
        ids = [hash_to_int(image or b"") for image in row["image_bytes"]]
        return ids, [f"{one:016x}.jpg" for one in ids]
    names = split_names(row.get("image"))
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise BadSampleError("image path leaves its folder", name)
    return [hash_to_int(name.encode("utf-8", "surrogatepass")) for name in names], [
        name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg" for name in names
    ]


def hash_text(text: str) -> int:
    """64 bits that are the same for texts that differ in case, spaces and final punctuation only."""
    return hash_to_int(
        " ".join(text.casefold().split()).rstrip(".。!！ ").encode("utf-8", "surrogatepass")
    )


def examine_images(settings: Settings, chunk: int) -> int:
    """Decode, measure and shrink the pictures of a chunk of images.npy; returns how many there are.

    images-N.bin: their JPEGs one after the other. images-N.npz: offset int64[n + 1], reason and detail (text, "" where good),
    digest and hash uint64[n], thumbnail uint8[n, 8, 8, 3], size int32[n, 2].
    """
    rows = open_source(settings.data, settings.images)
    keys = np.load(settings.work / "keys.npy", mmap_mode="r")
    places = np.load(settings.work / "images.npy", mmap_mode="r")[chunk * IMAGES_A_CHUNK :][
        :IMAGES_A_CHUNK
    ]
    found: list[Examined] = []
    for row_number, which in places.tolist():
        row = rows.read(int(keys[row_number]))
        try:
            found.append(examine_image(rows.images(row)[which], settings.limits, settings.size))
        except BadSampleError as error:  # the archive or folder cannot give it
            found.append(Examined(error.args[0], error.detail))
    blank = np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    write_whole(
        chunk_path(settings.work, "images", chunk, "bin"), b"".join(one.encoded for one in found)
    )
    save_arrays(
        chunk_path(settings.work, "images", chunk, "npz"),
        offset=np.cumsum([0] + [len(one.encoded) for one in found]),
        reason=np.array([one.reason for one in found], np.str_),
        detail=np.array([one.detail[:200] for one in found], np.str_),
        digest=np.array([one.digest for one in found], np.uint64),
        hash=np.array([one.hash for one in found], np.uint64),
        thumbnail=np.array([blank if one.thumbnail is None else one.thumbnail for one in found]),
        size=np.array([one.size for one in found], np.int32),
    )
    return len(found)
