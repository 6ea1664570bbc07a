"""Rows of a data file, any of them by its key, in memory that does not grow with the file.

A row is a conversation and its pictures. In a published .jsonl file it is one JSON object a line:

    {"image": "a.jpg",      or "a.jpg, b.jpg", or ["a.jpg", "b.jpg"]; left out in text-only rows
     "conversations": [{"role": "user", "content": "<image>\\nWhat is this?"},
                       {"role": "assistant", "content": "A cat."}]}

Other formats are read as they are: dataset/formats.py lists them. The way of a row and a picture:

    record ── formats.convert ──> Row(conversations, images, other, repairs)

    "a.jpg"  ── ImageFolder.find ──> Path ──────┐
    "a.jpg"  ── ImageZip.find ─────> BytesIO ───┼── load_image ──> RGB ── CLIP's processor
    bytes    ──────────────────────> BytesIO ───┘   (model/image.py)      (model/processing.py)

Nothing is opened before `load_image`: rows are checked and cut to length without their pixels.
"""

from pathlib import Path

from common.errors import MissingFileError
from dataset.images import open_images
from dataset.json_rows import JsonLinesRows
from dataset.parquet_rows import ParquetRows
from dataset.record_rows import RecordRows

# What reads rows: all have the methods of `RecordRows`.
Rows = RecordRows | ParquetRows


def open_rows(data_path: str | Path, images_path: str | Path | None) -> Rows:
    """The rows of a data file.

    Args:
        data_path: a .jsonl or .parquet file.
        images_path: folder or .zip of the pictures that a .jsonl names; None if there is none.

    MissingFileError where there is no such file, UserError where it cannot be read.
    """
    path = check_data_file(data_path)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    return JsonLinesRows(path, open_images(images_path))


def check_data_file(path: str | Path) -> Path:
    """The data file `path`; MissingFileError, which says how to get it, where it does not exist."""
    if not Path(path).is_file():
        raise MissingFileError(
            f"no data at {path}: fetch the published sets with "
            "`python -m scripts.download pretrain-data sft-data`, or name another file"
        )
    return Path(path)
