"""Rows of a table: .csv, .tsv or .txt with a line of column names, such as `image,caption`."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import BadSampleError, UserError
from dataset.formats import name_format
from dataset.images import ImageFolder, ImageZip
from dataset.record_rows import RecordRows, byte_bar
from dataset.row_images import is_name

DELIMITERS = ",\t;|"
SUFFIXES = (".csv", ".tsv")
# Of one field, such as a picture in base64; longer ones are not read.
LARGEST_FIELD = 2**27


class TableRows(RecordRows):
    """Rows of a table. The key of a row is the byte offset of its line.

    Args:
        path: the file.
        images: see RecordRows.
        columns: their names.
        delimiter: what stands between fields.
        start: byte offset of the first row.
    """

    container = "a table"

    def __init__(
        self,
        path: Path,
        images: ImageFolder | ImageZip | None,
        columns: list[str],
        delimiter: str,
        start: int,
    ):
        super().__init__(path, images)
        self.columns, self.delimiter, self.start = columns, delimiter, start

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(offset, bytes, record) of every row; a field in quotes may go over several lines."""
        with byte_bar(self.path) as bar, open(self.path, "rb") as file:
            for offset, end, fields in read_fields(file, self.start, self.delimiter):
                try:
                    yield offset, end - offset, self._name_fields(fields)
                except BadSampleError as error:
                    yield offset, end - offset, error
                bar.update(end - offset)

    def read_record(self, key: int) -> dict:
        return self._name_fields(self._read(key)[2])

    def read_raw(self, key: int) -> dict:
        _, end, _ = self._read(key)
        with open(self.path, "rb") as file:
            file.seek(key)
            line = file.read(end - key)
        return {"line": line.decode("utf-8", "backslashreplace").rstrip("\r\n")}

    def name_places(self, keys: list[int]) -> list[str]:
        n_lines, position, names = 1, 0, {}
        with open(self.path, "rb") as file:
            for offset in sorted(keys):
                n_lines += count_lines(file, position, offset)
                position, names[offset] = offset, f"line {n_lines}"
        return [names[offset] for offset in keys]

    def _read(self, key: int) -> tuple[int, int, list[str] | BadSampleError]:
        with open(self.path, "rb") as file:
            return next(read_fields(file, key, self.delimiter))

    def _name_fields(self, fields: list[str] | BadSampleError) -> dict:
        if isinstance(fields, BadSampleError):
            raise fields
        if len(fields) != len(self.columns):
            counts = f"{len(fields)} fields under {len(self.columns)} columns"
            raise BadSampleError("wrong number of fields", f"{counts}: {fields}"[:200])
        return {name: field for name, field in zip(self.columns, fields) if field.strip()}


def count_lines(file: BinaryIO, start: int, end: int) -> int:
    """Line breaks between two places of a file, counted a megabyte at a time."""
    file.seek(start)
    n_lines = 0
    while start < end:
        part = file.read(min(end - start, 2**20))
        n_lines += part.count(b"\n")
        start += len(part)
    return n_lines


def read_fields(
    file: BinaryIO, start: int, delimiter: str
) -> Iterator[tuple[int, int, list[str] | BadSampleError]]:
    """(byte offset, offset of its end, fields) of the rows from byte `start` on, blank ones not."""
    csv.field_size_limit(LARGEST_FIELD)
    file.seek(start)
    end = start

    def lines() -> Iterator[str]:
        # `csv` asks for one line after the other, and for no more than a row has.
        nonlocal end
        for line in file:
            end += len(line)
            yield line.decode("utf-8-sig", "surrogateescape")

    reader = csv.reader(lines(), delimiter=delimiter)
    while True:
        offset = end
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield offset, end, BadSampleError("row damaged", str(error))
            continue
        if any(field.strip() for field in fields):
            yield offset, end, fields


def open_table(path: Path, images: ImageFolder | ImageZip | None, head: bytes) -> TableRows | None:
    """The rows of a table; None where a file of another suffix than SUFFIXES is none.

    Args:
        path: the file.
        images: see RecordRows.
        head: its first bytes, more than its first line.

    UserError where a .csv or .tsv has no columns that can be read.
    """
    # the delimiter that leaves names which are known
    for delimiter in DELIMITERS:
        rows = read_fields(io.BytesIO(head), 0, delimiter)
        offset, end, names = next(rows, (0, 0, []))
        if isinstance(names, BadSampleError) or len(names) < 2:
            continue
        names = [name.strip() for name in names]
        if is_name(names[0]) and len(names) == 2:
            # no line of names, as of lists that only have pictures and captions
            return TableRows(path, images, ["image", "caption"], delimiter, offset)
        if name_format(dict.fromkeys(names, "a.jpg")) != "unknown":
            return TableRows(path, images, names, delimiter, end)

    # what it has in their place
    if path.suffix.lower() in SUFFIXES:
        first = head.split(b"\n")[0].decode("utf-8", "replace").strip()
        raise UserError(
            f"{path} begins with {first[:80]!r}: its first line has to name its columns, "
            "such as image,caption or image,question,answer"
        )
    return None
