"""Lines of a file by their place in bytes, in memory that does not grow with their length."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataset.json_objects import CHUNK, LARGEST_VALUE


def read_line(file: BinaryIO) -> bytes:
    """The next line, up to LARGEST_VALUE + 1 bytes of it."""
    return file.readline(LARGEST_VALUE + 1)


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(how long it is, the line as `read_line` gives it) of every line that is left."""
    while line := read_line(file):
        n_bytes = len(line)
        if n_bytes > LARGEST_VALUE:
            while line[-1:] != b"\n" and (part := file.readline(CHUNK)):
                n_bytes += len(part)
                if part[-1:] == b"\n":
                    break
        yield n_bytes, line


def name_lines(path: Path, offsets: list[int]) -> list[str]:
    """ "line 7" for each of these places, as an editor counts."""
    # Line breaks are counted once, up to the last place, a megabyte at a time.
    n_lines, position, names = 1, 0, {}
    with open(path, "rb") as file:
        for offset in sorted(offsets):
            while position < offset:
                part = file.read(min(offset - position, CHUNK))
                n_lines += part.count(b"\n")
                position += len(part)
            names[offset] = f"line {n_lines}"
    return [names[offset] for offset in offsets]
