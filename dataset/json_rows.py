"""Rows of JSON files: one object a line, as the published sets have it."""

import json
from array import array
from collections.abc import Iterator

import numpy as np

from common.errors import BadSampleError
from dataset.record_rows import RecordRows

NO_OBJECT = "not a JSON object"


class JsonLinesRows(RecordRows):
    """Rows of a .jsonl file. The key of a row is its byte offset: one seek to read it."""

    unit = "line"

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(offset, bytes, record) of every line that is not blank."""
        for offset, line in self._read_lines():
            if line.strip():
                try:
                    yield offset, len(line), parse_line(line)
                except BadSampleError as error:
                    yield offset, len(line), error

    def keys(self) -> np.ndarray:
        """int64[n]: the offset of every line that is not blank; none is parsed."""
        offsets = array("q", (offset for offset, line in self._read_lines() if line.strip()))
        return np.array(offsets, np.int64)

    def read_record(self, key: int) -> dict:
        return parse_line(self._read_line(key))

    def read_raw(self, key: int) -> dict:
        return {"line": self._read_line(key).decode("utf-8", "backslashreplace").rstrip("\r\n")}

    def name_places(self, keys: list[int]) -> list[str]:
        # Line breaks are counted once, from the first row to the last, a megabyte at a time.
        n_lines, position, names = 1, 0, {}
        with open(self.path, "rb") as file:
            for offset in sorted(keys):
                while position < offset:
                    part = file.read(min(offset - position, 2**20))
                    n_lines += part.count(b"\n")
                    position += len(part)
                names[offset] = f"line {n_lines}"
        return [names[offset] for offset in keys]

    def _read_line(self, offset: int) -> bytes:
        # Opened each time: an open file could not be sent to the workers of a loader.
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.readline()

    def _read_lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of every line, blank ones too."""
        offset = 0
        with open(self.path, "rb") as file:
            for line in file:
                yield offset, line
                offset += len(line)


def parse_line(line: bytes) -> dict:
    """The object that a line holds; BadSampleError where it holds something else."""
    # Some editors put three bytes before the first line ("-sig") that are no part of it.
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSampleError(NO_OBJECT, str(error)) from error
    if not isinstance(record, dict):
        raise BadSampleError(NO_OBJECT, f"it is {record!r:.60}")
    return record
