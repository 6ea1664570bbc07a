"""Rows of a table: .csv, .tsv or .txt with a line of column names, such as `image,caption`."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import BadSampleError, UserError
from common.files import check_size
from dataset.formats import has_text
from dataset.images import ImageFolder, ImageZip
from dataset.json_objects import LARGEST_VALUE
from dataset.lines import name_lines, read_lines
from dataset.record_rows import RecordRows, byte_bar
from dataset.row_images import is_name

DELIMITERS = ",\t;|"
SUFFIXES = (".csv", ".tsv")
# Of one field, such as a picture in base64; longer ones are not read.
LARGEST_FIELD = 2**27
# Lines of one row. Where a quotation mark is not closed, all that follows would be one field.
MOST_LINES = 10_000
# What Excel writes before the names of columns: "sep=;".
SEPARATOR = re.compile(rb"(?:\xef\xbb\xbf)?sep=(.)\r?\n", re.IGNORECASE)


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
            line = file.read(min(end - key, LARGEST_VALUE))
        return {"line": line.decode("utf-8", "backslashreplace").rstrip("\r\n")}

    def name_places(self, keys: list[int]) -> list[str]:
        return name_lines(self.path, keys)

    def _read(self, key: int) -> tuple[int, int, list[str] | BadSampleError]:
        with open(self.path, "rb") as file:
            return next(read_fields(file, key, self.delimiter))

    def _name_fields(self, fields: list[str] | BadSampleError) -> dict:
        if isinstance(fields, BadSampleError):
            raise fields
        while len(fields) > len(self.columns) and not fields[-1].strip():
            fields = fields[:-1]
        if len(fields) != len(self.columns):
            counts = f"{len(fields)} fields under {len(self.columns)} columns"
            raise BadSampleError("wrong number of fields", f"{counts}: {fields}"[:200])
        return {name: field for name, field in zip(self.columns, fields) if field.strip()}


def read_fields(
    file: BinaryIO, start: int, delimiter: str
) -> Iterator[tuple[int, int, list[str] | BadSampleError]]:
    """(byte offset, offset of its end, fields) of the rows from byte `start` on, blank ones not.

    Of a damaged one only its first line is left out: a quotation mark that is not closed would
    swallow the rows behind it.
    """
    csv.field_size_limit(LARGEST_FIELD)
    ends = [start]

    def lines() -> Iterator[str]:
        # `csv` asks for one line after the other, and for no more than a row has.
        for n_bytes, line in read_lines(file):
            ends.append(ends[-1] + n_bytes)
            if len(ends) > MOST_LINES:
                return
            check_size(len(line), "row", LARGEST_VALUE)
            yield line.decode("utf-8-sig", "surrogateescape")

    while True:
        # a reader that begins at the end of the last good row, or of the damaged line
        file.seek(ends[-1])
        reader = csv.reader(lines(), delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            while True:
                ends = ends[-1:]
                fields = next(reader)
                if any(field.strip() for field in fields):
                    yield ends[0], ends[-1], fields
        except StopIteration:
            return
        except (csv.Error, BadSampleError) as error:
            ends = ends[:2]
            is_known = isinstance(error, BadSampleError)
            yield *ends, error if is_known else BadSampleError("row damaged", str(error))


def open_table(path: Path, images: ImageFolder | ImageZip | None, head: bytes) -> TableRows | None:
    """The rows of a table; None where a file of another suffix than SUFFIXES is none.

    Args:
        path: the file.
        images: see RecordRows.
        head: its first bytes, more than its first line.

    UserError where a .csv or .tsv has no columns that can be read.
    """
    # the delimiter that leaves names which are known
    said = SEPARATOR.match(head)
    start, delimiters = (said.end(), said[1].decode("latin-1")) if said else (0, DELIMITERS)
    for delimiter in delimiters:
        rows = read_fields(io.BytesIO(head), start, delimiter)
        offset, end, names = next(rows, (0, 0, []))
        if isinstance(names, BadSampleError) or len(names) < 2:
            continue
        names = [name.strip() for name in names]
        if has_text(names):
            return TableRows(path, images, names, delimiter, end)
        # no line of names, as of lists that only have pictures and captions
        is_picture = [is_name(name) for name in names]
        if is_picture in ([True, False], [False, True]):
            names = ["image", "caption"] if is_picture[0] else ["caption", "image"]
            return TableRows(path, images, names, delimiter, offset)

    # what it has in their place
    if path.suffix.lower() in SUFFIXES and head.strip():
        first = head.split(b"\n")[0].decode("utf-8", "replace").strip()
        raise UserError(
            f"{path} begins with {first[:80]!r}: its first line has to name its columns, "
            "such as image,caption or image,question,answer"
        )
    return None
