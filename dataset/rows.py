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
from dataset.encodings import check_text
from dataset.images import open_images
from dataset.json_rows import open_json
from dataset.parquet_rows import ParquetRows
from dataset.record_rows import RecordRows

# Bytes of a file that are looked at to tell what it is.
HEAD = 2**20
# What reads rows: all have the methods of `RecordRows`.
Rows = RecordRows | ParquetRows


def open_rows(data_path: str | Path, images_path: str | Path | None) -> Rows:
    """The rows of a data file.

    Args:
        data_path: a file of JSON or Parquet.
        images_path: folder or .zip of the pictures that a .jsonl names; None if there is none.

    MissingFileError where there is no such file, UserError where it cannot be read.
    """
    path = check_data_file(data_path)
    if path.suffix == ".parquet":
        return ParquetRows(path)

    # text: what it begins with says what it is
    with open(path, "rb") as file:
        head = file.read(HEAD)
    check_text(path, head)
    return open_json(path, open_images(images_path), head)


def check_data_file(path: str | Path) -> Path:
    """The data file `path`; MissingFileError, which says how to get it, where it does not exist."""
    if not Path(path).is_file():
        raise MissingFileError(
            f"no data at {path}: fetch the published sets with "
            "`python -m scripts.download pretrain-data sft-data`, or name another file"
        )
    return Path(path)
