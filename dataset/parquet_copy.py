"""The copy of a Parquet file from which any row is read by its number.

A Parquet file gives a row only together with its row group, thousands of rows. So it is copied
once, into two files beside it (or in the user's cache):

    .data.parquet.rows.arrow        each row as JSON, in which a picture is {"\\0picture": 7}
    .data.parquet.pictures.arrow    each distinct picture once: its file, and the hash of it

Rows that share a picture are what keeps a copy small: `load_dataset` writes it for each of them.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import BadSampleError, UserError
from common.files import atomic_write, hash_bytes
from common.text import IMAGE_TAG
from dataset.block_file import BlockFile, BlockWriter, import_pyarrow
from dataset.index_cache import cache_paths, choose_cache_path, stamp
from dataset.parquet_file import first_line, read_records
from dataset.row_images import IMAGE_KEYS, read_images, simplify_key

KINDS = ("rows.arrow", "pictures.arrow")
# Items of a block: texts shrink more with more of them, pictures do not, and may have 64 MB each.
TEXTS, PICTURES = 64, 16
# The key of a picture in a row's JSON. Its value is a number; of a placeholder -1 - number.
PICTURE_KEY = "\0picture"
# A picture of one color that is smaller than a patch of the vision encoder stands for none.
PATCH = 16
PLACEHOLDER_BYTES = 4096  # most that its file has
# Characters of a picture that is written as base64; what is shorter is a name.
SHORTEST_BASE64 = 256
# Bytes of the disk that a copy leaves free.
RESERVED_BYTES = 10**9


@dataclass
class ParquetCopy:
    """Rows, and the pictures that they share.

    Args:
        rows: `record` is a row's JSON.
        pictures: `content` is a picture's file, `hash` what the feature cache knows it by.
    """

    rows: BlockFile
    pictures: BlockFile

    def read_row(self, number: int) -> bytes:
        """The JSON of a row. BadSampleError where the copy is damaged."""
        with _name_damage(self.rows.path):
            return self.rows.read(number, "record")

    def read_picture(self, number: int) -> bytes:
        """The file of a picture. BadSampleError where the copy is damaged."""
        with _name_damage(self.pictures.path):
            return self.pictures.read(number, "content")


@contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Make what pyarrow raises for a damaged file an error of that row."""
    try:
        yield
    except (OSError, ValueError, IndexError) as error:
        raise BadSampleError("row damaged", f"{path} ({first_line(error)}): delete it") from error


def parse_row(
    text: bytes, picture: Callable[[int], object], keeps_placeholders: bool = False
) -> dict:
    """The record in a row's JSON.

    Args:
        text: the JSON.
        picture: called with the number of each picture; what it gives stands in the record.
        keeps_placeholders: keep placeholders even if nothing in the record says `<image>`, where
            they are None otherwise.

    BadSampleError for a row that could not be copied.
    """
    keeps_placeholders |= IMAGE_TAG.encode() in text

    def revive(value: dict) -> object:
        number = value.get(PICTURE_KEY)
        if not isinstance(number, int):
            return value
        if number >= 0:
            return picture(number)
        return picture(-1 - number) if keeps_placeholders else None

    try:
        record = json.loads(text, object_hook=revive)
    except BadSampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadSampleError("row damaged", f"{error}: {text[:60]!r}") from error
    if not isinstance(record, dict):
        raise BadSampleError("row damaged", str(record))
    return record


def open_copy(path: Path) -> ParquetCopy:
    """The copy of a Parquet file, made if there is none of this very file.

    Several processes may ask at once: one copies, the others wait. UserError for a file that
    cannot be read, or a full disk.
    """
    from filelock import FileLock

    stamped = json.dumps(stamp(path))
    copy = _find_copy(path, stamped)
    if copy is None:
        files = [choose_cache_path(path, kind) for kind in KINDS]
        with FileLock(choose_cache_path(path, "lock")):
            # Perhaps another process has made it in the meantime.
            copy = _find_copy(path, stamped)
            if copy is None:
                _write_copy(path, files, stamped)
                # What a row group took, hundreds of MB, would stay with this process.
                import_pyarrow().default_memory_pool().release_unused()
                copy = ParquetCopy(*map(BlockFile, files))
    return copy


def _find_copy(path: Path, stamped: str) -> ParquetCopy | None:
    """The copy beside `path`, or in the user's cache; None where neither is whole and current."""
    for files in zip(*(cache_paths(path, kind) for kind in KINDS)):
        opened = []
        # one that is missing, or damaged
        with suppress(OSError, ValueError):
            opened += map(BlockFile, files)
        if [file.stamp for file in opened] == [stamped] * len(KINDS):
            return ParquetCopy(*opened)
        # Windows replaces no file that is open.
        for file in opened:
            file.close()
    return None


def _write_copy(path: Path, files: list[Path], stamped: str) -> None:
    """Copy a Parquet file; the copy appears whole or not at all."""
    from common.owner import sweep_partials

    folder = files[0].parent
    for file in files:
        sweep_partials(folder, file.name)

    # row by row, so that memory does not grow with the file
    with ExitStack() as stack:
        rows_file, pictures_file = (stack.enter_context(atomic_write(file)) for file in files)
        rows = BlockWriter(rows_file, {"record": "large_binary"}, stamped, TEXTS, "zstd")
        pictures = PictureWriter(pictures_file, stamped)
        encoder = json.JSONEncoder(ensure_ascii=False, default=pictures.replace)
        for record in read_records(path):
            if isinstance(record, dict):
                record = {key: _decode(value, key) for key, value in record.items()}
            rows.add(encoder.encode(record).encode())
            if len(rows) % PICTURES == 0:
                _check_disk(path, folder)
        rows.close()
        pictures.close()


def _decode(value: object, key: str) -> object:
    """Pictures that are written as base64 or numbers, as bytes; bytes that are text, as text."""
    is_image = simplify_key(key) in IMAGE_KEYS
    if isinstance(value, bytes) and not is_image:
        with suppress(UnicodeDecodeError):
            return value.decode()
    is_long = isinstance(value, str | list) and len(value) >= SHORTEST_BASE64
    if is_long and is_image:
        with suppress(BadSampleError):
            images = read_images(value, key)
            return images[0] if len(images) == 1 else images
    return [_decode(one, key) for one in value] if isinstance(value, list) else value


def _check_disk(path: Path, folder: Path) -> None:
    """UserError where the copy has filled the disk."""
    if shutil.disk_usage(folder).free < RESERVED_BYTES:
        raise UserError(
            f"the copy from which {path} is read needs more room: less than "
            f"{RESERVED_BYTES / 1e9:.0f} GB of the disk are free in {folder}: free some space"
        )


class PictureWriter:
    """Writes each distinct picture once.

    Args:
        file, stamp: see BlockWriter.
    """

    def __init__(self, file: BinaryIO, stamp: str):
        columns = {"content": "large_binary", "hash": "binary"}
        self._file = BlockWriter(file, columns, stamp, PICTURES)
        self._numbers: dict[bytes, int] = {}

    def replace(self, value: object) -> dict | str | None:
        """What a row's JSON has for a value that JSON does not know."""
        if not isinstance(value, bytes):
            return str(value)
        return {PICTURE_KEY: self._add(value)} if value else None

    def _add(self, content: bytes) -> int:
        """The number of a picture, written if it is new; of a placeholder -1 - number."""
        key = hash_bytes(content)
        number = self._numbers.get(key)
        if number is None:
            number = self._file.add(content, key)
            number = self._numbers[key] = -1 - number if is_placeholder(content) else number
        return number

    def close(self) -> None:
        self._file.close()


def is_placeholder(content: bytes) -> bool:
    """Whether a picture stands for none: smaller than a patch, and of one color."""
    if len(content) > PLACEHOLDER_BYTES:
        return False
    # Flags and files are checked before Pillow is imported.
    from model.image import load_image

    try:
        image = load_image(io.BytesIO(content))
    except BadSampleError:
        return False
    return max(image.size) < PATCH and all(low == high for low, high in image.getextrema())
