"""Rows of JSON files: one object a line, as the published sets have it, or one list of objects."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import BadSampleError, UserError
from common.files import check_size
from dataset.formats import CHAT_KEYS, name_format
from dataset.images import ImageFolder, ImageZip
from dataset.json_objects import CHUNK, LARGEST_VALUE, Value, find_list, read_values
from dataset.lines import name_lines, read_line, read_lines
from dataset.record_rows import RecordRows, byte_bar

ARRAY = "one JSON array"
NO_OBJECT = "not a JSON object"
SPACE = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLinesRows(RecordRows):
    """Rows of a .jsonl file. The key of a row is its byte offset: one seek to read it."""

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(offset, bytes, record) of every line that is not blank."""
        with byte_bar(self.path) as bar:
            for offset, line in self._read_lines():
                if line.strip():
                    try:
                        yield offset, len(line), parse_object(line)
                    except BadSampleError as error:
                        yield offset, len(line), error
                bar.update(len(line))

    def keys(self) -> np.ndarray:
        """int64[n]: the offset of every line that is not blank; none is parsed."""
        offsets = array("q", (offset for offset, line in self._read_lines() if line.strip()))
        return np.array(offsets, np.int64)

    def read_record(self, key: int) -> dict:
        return parse_object(self._read_line(key))

    def read_raw(self, key: int) -> dict:
        return {"line": self._read_line(key).decode("utf-8", "backslashreplace").rstrip("\r\n")}

    def name_places(self, keys: list[int]) -> list[str]:
        return name_lines(self.path, keys)

    def _read_line(self, offset: int) -> bytes:
        # Opened each time: an open file could not be sent to the workers of a loader.
        with open(self.path, "rb") as file:
            file.seek(offset)
            return read_line(file)

    def _read_lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of every line, blank ones too."""
        offset = 0
        with open(self.path, "rb") as file:
            for n_bytes, line in read_lines(file):
                yield offset, line
                offset += n_bytes


class JsonObjectsRows(RecordRows):
    """Rows of a file of JSON objects that are not one a line. Their keys are byte offsets.

    Args:
        path: the file.
        images: see RecordRows.
        start: byte offset of the first object.
        container: what they are in: "one JSON array".
    """

    def __init__(
        self, path: Path, images: ImageFolder | ImageZip | None, start: int, container: str
    ):
        super().__init__(path, images)
        self.start, self.container = start, container

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(offset, bytes, record) of every value of the list."""
        with byte_bar(self.path) as bar:
            for value in self._read_values(self.start):
                try:
                    yield value.offset, len(value.text), parse_value(value)
                except BadSampleError as error:
                    yield value.offset, len(value.text), error
                bar.update(len(value.text))

    def read_record(self, key: int) -> dict:
        return parse_value(next(self._read_values(key)))

    def read_raw(self, key: int) -> dict:
        return {"line": next(self._read_values(key)).text.decode("utf-8", "backslashreplace")}

    def name_places(self, keys: list[int]) -> list[str]:
        """ "row 7" for each of the keys, counted from 1."""
        numbers = {}
        for number, value in enumerate(self._read_values(self.start), start=1):
            if value.offset in keys:
                numbers[value.offset] = f"row {number}"
            if len(numbers) == len(set(keys)):
                break
        return [numbers[key] for key in keys]

    def _read_values(self, start: int) -> Iterator[Value]:
        with open(self.path, "rb") as file:
            yield from read_values(file, start, in_lists=self.container == ARRAY)


def parse_value(value: Value) -> dict:
    """The object that a value is; BadSampleError where it is another one or damaged."""
    if value.problem:
        raise BadSampleError(NO_OBJECT, value.problem)
    return parse_object(value.text)


def parse_object(text: bytes) -> dict:
    """The object that a text holds; BadSampleError where it holds something else."""
    check_size(len(text), "row", LARGEST_VALUE)
    # Some editors put a mark before the first line that is no part of it.
    try:
        record = json.loads(text.removeprefix(BYTE_ORDER_MARK).decode())
    except (ValueError, RecursionError) as error:
        raise BadSampleError(NO_OBJECT, str(error)) from error
    if not isinstance(record, dict):
        raise BadSampleError(NO_OBJECT, f"it is {record!r:.60}")
    return record


def open_json(
    path: Path, images: ImageFolder | ImageZip | None, head: bytes
) -> JsonLinesRows | JsonObjectsRows:
    """The rows of a JSON file, whether its objects are one a line, in a list, or indented.

    Args:
        path: the file.
        images: see RecordRows.
        head: its first bytes, enough to tell.

    UserError where it is one object that holds no rows.
    """
    # what a file of one object a line begins with
    lines = JsonLinesRows(path, images)
    start = len(head) - len(head.removeprefix(BYTE_ORDER_MARK).lstrip(SPACE))
    first, _, rest = head[start:].partition(b"\n")
    is_alone = not rest.strip()
    if head[start : start + 1] not in (b"{", b"["):
        return lines
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and (not is_alone or name_format(record) != "unknown"):
        return lines

    # one list or several, of which the first value may begin on the next line
    if head[start : start + 1] == b"[":
        return JsonObjectsRows(path, images, start + 1, ARRAY)
    # an object that has the list
    offset = find_list(head, is_row)
    if offset is not None:
        return JsonObjectsRows(path, images, offset, "a list in a JSON object")
    # objects that are indented, or follow each other; a line may be longer than the head
    with open(path, "rb") as file:
        value = next(read_values(file, start))
        file.seek(start + len(value.text))
        rest = file.read(CHUNK)
    try:
        record = parse_value(value)
    except BadSampleError:
        return lines
    if not rest.strip() and name_format(record) == "unknown":
        keys = ", ".join(record)
        raise UserError(
            f"{path} is one JSON object with the keys {keys:.80}, not rows: write one object a line"
        )
    if b"\n" in value.text:
        return JsonObjectsRows(path, images, start, "indented JSON")
    if rest.lstrip(b" \t\r")[:1] not in (b"\n", b""):
        return JsonObjectsRows(path, images, start, "JSON without line breaks")
    return lines


def is_row(key: str, value: dict) -> bool:
    """Whether a list under this key, which begins with this object, is a list of rows."""
    return key not in CHAT_KEYS and name_format(value) != "unknown"
