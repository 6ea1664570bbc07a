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

from common.errors import MissingFileError, UserError
from dataset.encodings import check_text
from dataset.folder_rows import FolderRows, list_captioned
from dataset.images import open_images
from dataset.json_rows import BYTE_ORDER_MARK, open_json
from dataset.parquet_rows import ParquetRows
from dataset.record_rows import RecordRows
from dataset.table_rows import open_table
from dataset.tar_rows import TarRows

# Bytes of a file that are looked at to tell what it is.
HEAD = 2**17
# Data files, as they are looked for in a folder; files of these suffixes that are none.
DATA_SUFFIXES = ".parquet", ".jsonl", ".json", ".csv", ".tsv", ".tar"
NO_DATA = "dataset_infos.json", "dataset_info.json", "state.json", "README.json"
METADATA = "metadata"


def open_rows(data_path: str | Path, images_path: str | Path | None) -> RecordRows:
    """The rows of a data file.

    Args:
        data_path: a file of JSON, a table, Parquet or a .tar, or a folder, see `find_data_files`.
        images_path: folder or .zip of the pictures that its rows name; None if there is none. A
            metadata.csv or .jsonl names those of its own folder.

    MissingFileError where there is no such file, UserError where it cannot be read.
    """
    # one file, or a folder that is one set
    paths = find_data_files(data_path)
    if len(paths) > 1:
        raise UserError(f"{data_path} holds {len(paths)} data files: name one, such as {paths[0]}")
    path = paths[0]
    if path.is_dir():
        return FolderRows(path)
    if path.stem == METADATA:
        # Its names are those of its own folder, whatever folder the published set has.
        images_path = path.parent
    images = open_images(images_path)

    # pictures among the rows
    with open(path, "rb") as file:
        head = file.read(HEAD)
    suffix = path.suffix.lower()
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return ParquetRows(path, images)
    if suffix == ".tar":
        return TarRows(path, images)

    # text: what it begins with says what it is
    check_text(path, head)
    is_json = head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith((b"{", b"["))
    table = None if is_json else open_table(path, images, head)
    return table or open_json(path, images, head)


def find_data_files(path: str | Path) -> list[Path]:
    """The data files that a path stands for: itself, or those of a folder.

    A folder has data files as `load_dataset` reads them (those for training if there are others),
    metadata.jsonl or .csv beside its pictures, or a .txt beside each: then it is its own data file.

    MissingFileError, which says how to get the published sets, where there is nothing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingFileError(
            f"no data at {path}: fetch the published sets with "
            "`python -m scripts.download pretrain-data sft-data`, or name another file"
        )
    for folder in (path, path / "data", path / "train"):
        files = [file for file in sorted(folder.glob("[!.]*")) if file.is_file()]
        for stem in (METADATA, "*"):
            for suffix in DATA_SUFFIXES:
                found = [file for file in files if file.match(f"{stem}{suffix}")]
                found = [file for file in found if file.name not in NO_DATA]
                if found:
                    return [file for file in found if "train" in file.name.lower()] or found
    if list_captioned(path):
        return [path]
    raise MissingFileError(
        f"{path} holds no rows: no {', '.join(DATA_SUFFIXES)}, and no pictures with a .txt of the "
        "same name beside them"
    )
