"""Rows of a .parquet file: text and pictures in one file, as the newer published sets have them.

A Parquet file gives a row only together with its row group, thousands of rows. So it is copied
once, into two files beside it (or in the user's cache), from which any row is read by its number:

    .rows.parquet.rows.arrow        each row as JSON, in which a picture is {"\\0picture": 7}
    .rows.parquet.pictures.arrow    each distinct picture once: its file, and the hash of it

Rows that share a picture are what makes a copy small: `load_dataset` writes it for each of them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import BadSampleError, UserError
from common.files import atomic_write, hash_bytes
from dataset.block_file import BlockFile, BlockWriter, import_pyarrow
from dataset.formats import CAPTION_KEYS, CHAT_KEYS, QUESTION_KEYS, Row
from dataset.images import ImageFolder, ImageZip
from dataset.index_cache import cache_paths, choose_cache_path, stamp
from dataset.record_rows import RecordRows
from dataset.row_images import IMAGE_KEYS, read_images, simplify_key
from model.image import load_image

KINDS = ("rows.arrow", "pictures.arrow")
# Rows that are read from a Parquet file, and pictures that are written, together: the largest
# are of 64 MB. Rows of text in the copy are packed together, because they resemble each other.
BLOCK, TEXT_BLOCK = 16, 64
# Bytes of the disk that a copy leaves free.
RESERVED_BYTES = 10**9
# The key of a picture in a row's JSON; no column is called so.
PICTURE = "\0picture"
# How a picture that is not read yet begins, among the images of a row; no picture's file does.
MARK = b"\0picture"
# A picture of one color that is smaller than a patch of the vision encoder stands for none.
PATCH = 16
PLACEHOLDER_BYTES = 4096  # most that its file has
# What Parquet files turn out to be, by how they begin.
BEGINNINGS = {
    b"version https://git-lfs": "is a Git LFS pointer: fetch the file with `git lfs pull`",
    b"PARE": "is encrypted: write it anew without encryption",
    b"PK": "is a .zip: unpack it",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"<": "is a web page: fetch the file again",
    b"{": "holds JSON, not Parquet: name it .jsonl",
    b"[": "holds JSON, not Parquet: name it .json",
}


class ParquetRows(RecordRows):
    """Rows of a .parquet file. The key of a row is its number.

    A row whose only picture is a placeholder, without `<image>`, is a row of text. UserError where
    the file cannot be read, or has no room for its copy.
    """

    container = "Parquet"

    def __init__(self, path: Path, images: ImageFolder | ImageZip | None = None):
        super().__init__(path, images)
        self._rows, self._pictures = open_copy(path)

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(number, bytes of text, record) of every row.

        No picture is read: what a row has in its place is for `images` and `check_images` alone.
        """
        title, records = f"check {self.path.name}", self._rows.iterate("record")
        with tqdm(records, title, len(self._rows), unit="row", leave=False, delay=1) as progress:
            for number, text in enumerate(progress):
                try:
                    yield number, len(text), _parse(text, _mark)
                except BadSampleError as error:
                    yield number, len(text), error

    def keys(self) -> np.ndarray:
        """int64[n]: the number of every row."""
        return np.arange(len(self._rows))

    def read_record(self, key: int) -> dict:
        return _parse(self._read_text(key), self._read_picture)

    def read_raw(self, key: int) -> dict:
        """The text of a row as it came, and the files of its pictures; neither of a damaged row."""
        numbers = []
        try:
            record = _parse(self._read_text(key), numbers.append, keeps_placeholders=True)
        except BadSampleError:
            return {"conversations": None, "image_bytes": []}
        text = record.get("conversations")
        if not isinstance(text, str):
            text = json.dumps(record, ensure_ascii=False)
        return {"conversations": text, "image_bytes": [*map(self._read_picture, numbers)]}

    def name_places(self, keys: list[int]) -> list[str]:
        """ "row 7" for each of the keys, counted from 1."""
        return [f"row {key + 1}" for key in keys]

    def images(self, row: Row) -> list[Path | io.BytesIO]:
        return super().images(replace(row, images=[*map(self._unmark, row.images)]))

    def _check_image(self, image: str | bytes) -> int:
        if isinstance(image, str):
            return super()._check_image(image)
        number = _read_mark(image)
        return _shorten(hash_bytes(image)) if number is None else int(self._identities[number])

    def _unmark(self, image: str | bytes) -> str | bytes:
        """A picture's file in place of the mark that stands for it."""
        number = _read_mark(image) if isinstance(image, bytes) else None
        return image if number is None else self._read_picture(number)

    def _read_text(self, number: int) -> bytes:
        with _name_damage(self._rows.path):
            return self._rows.read(number, "record")

    def _read_picture(self, number: int) -> bytes:
        with _name_damage(self._pictures.path):
            return self._pictures.read(number, "content")

    @cached_property
    def _identities(self) -> np.ndarray:
        """uint64[n] of all pictures: 8 bytes of memory each, while rows are checked."""
        return np.fromiter(map(_shorten, self._pictures.iterate("hash")), np.uint64)


def _mark(number: int) -> bytes:
    """What stands for a picture among the images of a row that `scan` gives."""
    return MARK + number.to_bytes(8, "little")


def _read_mark(image: bytes) -> int | None:
    """The number that `_mark` was given; None where `image` is a picture's file."""
    return int.from_bytes(image[len(MARK) :], "little") if image.startswith(MARK) else None


def _shorten(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


def _parse(text: bytes, picture: Callable[[int], object], keeps_placeholders: bool = False) -> dict:
    """The record in a row's JSON; `picture(number)` gives what it has for each picture.

    A placeholder is None if nothing in the record says `<image>`. BadSampleError for a row that
    could not be copied.
    """
    keeps_placeholders |= b"<image>" in text

    def revive(value: dict) -> object:
        if PICTURE not in value:
            return value
        number = value[PICTURE]
        if number >= 0:
            return picture(number)
        return picture(~number) if keeps_placeholders else None

    try:
        record = json.loads(text, object_hook=revive)
    except BadSampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise BadSampleError("row damaged", f"{error}: {text[:60]!r}") from error
    if not isinstance(record, dict):
        raise BadSampleError("row damaged", record)
    return record


@contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Make what pyarrow raises for a damaged copy an error of that row."""
    try:
        yield
    except (OSError, ValueError, IndexError) as error:
        raise BadSampleError("row damaged", f"{path} ({_first_line(error)}): delete it") from error


def open_copy(path: Path) -> tuple[BlockFile, BlockFile]:
    """(rows, pictures) of a Parquet file, copied if there is no copy of this very file.

    Several processes may ask at once: one copies, the others wait. UserError for a file that
    cannot be read, or a full disk.
    """
    from filelock import FileLock

    stamped = json.dumps(stamp(path))
    copy = _find_copy(path, stamped)
    if copy is None:
        targets = [choose_cache_path(path, kind) for kind in KINDS]
        with FileLock(choose_cache_path(path, "lock")):
            # Perhaps another process has made it in the meantime.
            copy = _find_copy(path, stamped)
            if copy is None:
                _write_copy(path, targets, stamped)
                copy = tuple(map(BlockFile, targets))
    return copy


def _find_copy(path: Path, stamped: str) -> tuple[BlockFile, BlockFile] | None:
    """The copy beside `path`, or in the user's cache; None where neither is whole and current."""
    for files in zip(*(cache_paths(path, kind) for kind in KINDS)):
        opened = []
        # one that is missing, or damaged
        with suppress(OSError, ValueError):
            opened += map(BlockFile, files)
        if [file.stamp for file in opened] == [stamped] * len(KINDS):
            return tuple(opened)
        # Windows replaces no file that is open.
        for file in opened:
            file.close()
    return None


def _write_copy(path: Path, targets: list[Path], stamped: str) -> None:
    """Copy a Parquet file; the copy appears whole or not at all."""
    from common.owner import sweep_partials

    for target in targets:
        sweep_partials(target.parent, target.name)

    # row by row, so that memory does not grow with the file
    with ExitStack() as stack:
        rows_file, pictures_file = (stack.enter_context(atomic_write(one)) for one in targets)
        rows = BlockWriter(rows_file, {"record": "large_binary"}, stamped, TEXT_BLOCK, "zstd")
        pictures = PictureWriter(pictures_file, stamped)
        encoder = json.JSONEncoder(ensure_ascii=False, default=pictures.replace)
        for record in read_records(path):
            if isinstance(record, dict):
                record = {key: _decode_images(value, key) for key, value in record.items()}
            rows.add(encoder.encode(record).encode())
            if len(rows) % BLOCK == 0:
                _check_disk(path, targets[0].parent)
        rows.close()
        pictures.close()


def _decode_images(value: object, key: str) -> object:
    """Pictures that are written as base64, as bytes; anything else as it is."""
    if isinstance(value, list):
        return [_decode_images(one, key) for one in value]
    # No name of a file is that long.
    if not isinstance(value, str) or len(value) < 256 or simplify_key(key) not in IMAGE_KEYS:
        return value
    try:
        images = read_images(value, key)
    except BadSampleError:
        return value
    return images[0] if len(images) == 1 else value


class PictureWriter:
    """Writes each distinct picture once.

    Args:
        file, stamp: see BlockWriter.
    """

    def __init__(self, file, stamp: str):
        columns = {"content": "large_binary", "hash": "binary"}
        self._file = BlockWriter(file, columns, stamp, BLOCK)
        self._numbers: dict[bytes, int] = {}
        self.close = self._file.close

    def replace(self, value: object) -> dict | str | None:
        """What a row's JSON has for a value that JSON does not know."""
        if not isinstance(value, bytes):
            return str(value)
        return {PICTURE: self.add(value)} if value else None

    def add(self, content: bytes) -> int:
        """The number of a picture; of a placeholder it is negative, -1 for 0."""
        key = hash_bytes(content)
        number = self._numbers.get(key)
        if number is None:
            number = self._file.add(content, key)
            number = self._numbers[key] = ~number if is_placeholder(content) else number
        return number


def is_placeholder(content: bytes) -> bool:
    """Whether a picture stands for none: smaller than a patch, and of one color."""
    if len(content) > PLACEHOLDER_BYTES:
        return False
    try:
        image = load_image(io.BytesIO(content))
    except BadSampleError:
        return False
    return max(image.size) < PATCH and all(low == high for low, high in image.getextrema())


def _check_disk(path: Path, folder: Path) -> None:
    """UserError where the copy has filled the disk."""
    if shutil.disk_usage(folder).free < RESERVED_BYTES:
        raise UserError(
            f"the copy from which {path} is read needs more room: less than "
            f"{RESERVED_BYTES / 1e9:.0f} GB of the disk are free in {folder}: free some space"
        )


def read_records(path: Path) -> Iterator[dict | str]:
    """Every row of a Parquet file, in memory that does not grow with it.

    A text comes in place of a row that cannot be read. UserError for a file that cannot be.
    """
    source = _open_parquet(path)
    names = source.schema_arrow.names
    _check_columns(path, names)
    # Not `read_dictionary`: it makes the dictionary of a row group anew for every batch.
    batches = source.iter_batches(BLOCK, use_threads=False)
    title = f"unpack {path.name}"
    total = source.metadata.num_rows
    with tqdm(total=total, desc=title, unit="row", leave=False, delay=1) as progress:
        while True:
            try:
                batch = next(batches, None)
            # pyarrow's own errors are among them
            except (OSError, ValueError, NotImplementedError) as error:
                # What pyarrow does not know is no fault of the file.
                hint = "" if isinstance(error, NotImplementedError) else ": fetch it again"
                raise UserError(
                    f"{path} cannot be read beyond row {progress.n} ({_first_line(error)}){hint}"
                ) from error
            if batch is None:
                return
            yield from _list_records(batch)
            progress.update(batch.num_rows)


def _list_records(batch) -> Iterator[dict | str]:
    """The rows of a batch; a text in place of one that holds no valid values."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield str(error)


def _open_parquet(path: Path):
    """pyarrow's ParquetFile. UserError that says what the file is instead."""
    pa = import_pyarrow()
    try:
        _check_ends(path)
        # Mapped: read as a stream, a row group would be in memory as a whole.
        return pa.parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except UserError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)})") from error


def _check_ends(path: Path) -> None:
    """UserError for what is no Parquet file, or only a part of one."""
    with open(path, "rb") as file:
        head = file.read(64)
        n_bytes = file.seek(0, os.SEEK_END)
        file.seek(-min(4, n_bytes), os.SEEK_END)
        tail = file.read()
    if not head.startswith(b"PAR1"):
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        named = (name for beginning, name in BEGINNINGS.items() if start.startswith(beginning))
        raise UserError(
            f"{path} {next(named, 'is no Parquet file' if head else 'is empty: fetch it again')}"
        )
    if tail != b"PAR1":
        raise UserError(f"{path} is cut off after {n_bytes:,} bytes: fetch it again")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check_columns(path: Path, names: list[str]) -> None:
    """UserError for a file without a column of text."""
    known = {*CHAT_KEYS, *QUESTION_KEYS, *CAPTION_KEYS}
    if known.isdisjoint(map(simplify_key, names)):
        raise UserError(
            f"{path} has columns {', '.join(names)[:200]}, needs conversations, messages, texts or "
            "caption, and image_bytes, image or images for its pictures: rename them"
        )
