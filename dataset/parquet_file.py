"""Every row of a Parquet file in turn, or what the file is instead, in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.file_kinds import HEAD, name_kind
from dataset.block_file import import_pyarrow
from dataset.formats import has_text

# Rows that are in memory together: their pictures may have 64 MB each.
BLOCK = 16
# What pyarrow raises; its own errors are among them.
ERRORS = (OSError, ValueError, OverflowError, NotImplementedError)


def read_records(path: Path) -> Iterator[dict | str]:
    """Every row of a Parquet file, in memory that does not grow with it.

    A text comes in place of a row whose values are not valid. UserError for a file that cannot be
    read, or has no column of text.
    """
    file = open_parquet(path)
    _check_columns(path, file.schema_arrow.names)
    # Not with `read_dictionary`, which makes the dictionary of a row group anew for each batch.
    batches = file.iter_batches(BLOCK, use_threads=False)
    title, n_rows = f"unpack {path.name}", file.metadata.num_rows
    with tqdm(total=n_rows, desc=title, unit="row", leave=False, delay=1) as progress:
        while batch := _read_batch(path, batches, progress.n):
            yield from _list_records(batch)
            progress.update(batch.num_rows)


def _read_batch(path: Path, batches: Iterator, n_read: int):
    """The next rows; None at the end."""
    try:
        return next(batches, None)
    except ERRORS as error:
        # What pyarrow does not know is no fault of the file.
        hint = "" if isinstance(error, NotImplementedError) else ": fetch it again"
        place = f"beyond row {n_read:,} of {path}"
        raise UserError(f"nothing can be read {place} ({first_line(error)}){hint}") from error


def _list_records(batch) -> list[dict | str]:
    """The rows of a batch; a text in place of one that holds no valid values."""
    try:
        return batch.to_pylist()
    except ERRORS as error:
        if batch.num_rows > 1:
            return [row for n in range(batch.num_rows) for row in _list_records(batch.slice(n, 1))]
        # a date that Python does not have, of which no row is made
        types = import_pyarrow().types
        others = [field.name for field in batch.schema if not types.is_temporal(field.type)]
        is_left = has_text(others) and len(others) < batch.num_columns
        return _list_records(batch.select(others)) if is_left else [first_line(error)]


def open_parquet(path: Path):
    """pyarrow's ParquetFile. UserError that says what the file is instead."""
    pa = import_pyarrow()
    try:
        _check_ends(path)
        # Mapped: read as a stream, a row group would be in memory as a whole.
        return pa.parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except UserError:
        raise
    except ERRORS as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from error


def _check_ends(path: Path) -> None:
    """UserError for what is no Parquet file, or only a part of one."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
        n_bytes = file.seek(0, os.SEEK_END)
        file.seek(-min(4, n_bytes), os.SEEK_END)
        tail = file.read()
    if not head.startswith(b"PAR1"):
        is_json = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
        unknown = "holds JSON, not Parquet: name it .json" if is_json else "is no Parquet file"
        unknown = unknown if head else "is empty: fetch it again"
        raise UserError(f"{path} {name_kind(path, head) or unknown}")
    # The smallest one has both ends and a length between them.
    if tail != b"PAR1" or n_bytes < 12:
        raise UserError(f"{path} is cut off after {n_bytes:,} bytes: fetch it again")


def _check_columns(path: Path, names: list[str]) -> None:
    """UserError for a file without a column of text."""
    if not has_text(names):
        raise UserError(
            f"{path} has columns {', '.join(names)[:200]}, needs conversations, messages, texts or "
            "caption, and image_bytes, image or images for its pictures: rename them"
        )


def first_line(error: Exception) -> str:
    """The message of an error, which pyarrow continues on more lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]
