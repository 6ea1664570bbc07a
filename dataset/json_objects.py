"""Values of a JSON file one after the other, in memory that does not grow with the file."""

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from typing import BinaryIO, NamedTuple

CHUNK = 2**20
# Of one value; a row with several pictures in base64 has less.
LARGEST_VALUE = 2**28
# Spaces before a value that its line begins with.
DEEPEST_INDENT = 2**10
# What may stand between two values of a list, or of a file: also byte order marks and zero bytes.
_BETWEEN = re.compile("[ \t\r\n,\0\xef\xbb\xbf]*")
_BETWEEN_LISTS = re.compile("[ \t\r\n,\0\xef\xbb\xbf\\[\\]]*")
_DECODER = json.JSONDecoder()


class Value(NamedTuple):
    """One value of a file."""

    offset: int  # bytes from the start of the file
    text: bytes
    # Why it is no value, else "".
    problem: str


def read_values(file: BinaryIO, start: int, in_lists: bool = False) -> Iterator[Value]:
    """The values from byte `start` on, up to the end of the file or of the list they are in.

    Args:
        file: the file.
        start: where the first value is, or what stands before it.
        in_lists: the file is a list, or several after each other: what is in all of them.

    After a damaged one comes the next that begins a line with as many spaces before it.
    """
    # Each byte is read as one character: what JSON is made of is ASCII, and a place in the text is
    # a place in the file.
    between = _BETWEEN_LISTS if in_lists else _BETWEEN
    file.seek(start)
    text, base, position, is_end = "", start, 0, False
    while True:
        # the start of a value
        position = between.match(text, position).end()
        if position == len(text) and not is_end:
            base, text, position, is_end = _read_on(file, text, base, position, CHUNK)
            continue
        if position == len(text) or text[position] in "]}":
            return

        # its end, if that has been read
        problem = ""
        try:
            _, end = _DECODER.raw_decode(text, position)
            # a number may go on: "1.5" | "e+10"
            is_cut = end + 3 > len(text)
        except (JSONDecodeError, RecursionError) as error:
            problem, end = str(error), len(text)
            is_cut = isinstance(error, JSONDecodeError) and _is_cut(error, len(text))
        if is_cut and not is_end and len(text) - position < LARGEST_VALUE:
            size = max(CHUNK, len(text) - position)
            base, text, position, is_end = _read_on(file, text, base, position, size)
            continue
        if not problem:
            yield Value(base + position, text[position:end].encode("latin-1"), "")
            position = end
            continue

        # where the next one begins
        damaged, after = base + position, _find_next(file, text, position, base, is_end)
        shown = text[position : position + 200].encode("latin-1")
        yield Value(damaged, shown, problem if after else f"{problem}; the rest is not read")
        if after is None:
            return
        file.seek(after)
        text, base, position, is_end = "", after, 0, False


def _read(file: BinaryIO, size: int) -> str:
    return file.read(size).decode("latin-1")


def _read_on(
    file: BinaryIO, text: str, base: int, position: int, size: int
) -> tuple[int, str, int, bool]:
    """(base, text, position, is_end) with more of the file, without what is before the value."""
    kept = position - len(_find_indent(text, position))
    more = _read(file, size)
    return base + kept, text[kept:] + more, position - kept, not more


def _find_indent(text: str, position: int) -> str:
    """The line break and the spaces before a value that begins a line; "" before others."""
    line = text.rfind("\n", max(0, position - DEEPEST_INDENT), position)
    indent = text[max(line, 0) : position]
    return indent if line >= 0 and indent.isspace() else ""


def _is_cut(error: JSONDecodeError, length: int) -> bool:
    """Whether a value may be whole once more of the file is read."""
    # A string without its end is reported at its start, other parts have few characters.
    return error.msg.startswith("Unterminated string") or error.pos >= length - 12


def _find_next(file: BinaryIO, text: str, position: int, base: int, is_end: bool) -> int | None:
    """Byte offset of the next object that begins a line as the damaged one at `position` does."""
    indent = _find_indent(text, position) or "\n"
    begin = re.compile(rf"{indent}\[?(?=\{{)")
    while True:
        found = begin.search(text, position + 1)
        if found:
            return base + found.start()
        if is_end:
            return None
        # A part of the pattern may be at the end of what was read.
        kept = text[-len(indent) - 1 :]
        more = _read(file, CHUNK)
        base, text, position, is_end = base + len(text) - len(kept), kept + more, -1, not more


def find_list(head: bytes, is_row_list) -> int | None:
    """Byte offset of the first value in the list of rows that a file's object has.

    Args:
        head: the first bytes of the file.
        is_row_list: whether a key with this first value holds rows.

    None where there is no such list.
    """
    text = head.decode("latin-1")
    position = _BETWEEN.match(text).end() + 1
    while position < len(text):
        # a key
        position = _BETWEEN.match(text, position).end()
        try:
            key, position = _DECODER.raw_decode(text, position)
            position = _BETWEEN.match(text, position).end()
            if not isinstance(key, str) or text[position : position + 1] != ":":
                return None
            position = _BETWEEN.match(text, position + 1).end()
        except (JSONDecodeError, RecursionError):
            return None
        # the first value of a list
        if text[position : position + 1] == "[":
            first = _BETWEEN.match(text, position + 1).end()
            try:
                value, _ = _DECODER.raw_decode(text, first)
            except (JSONDecodeError, RecursionError):
                value = None
            if isinstance(value, dict) and is_row_list(key, value):
                return position + 1
        # or what comes behind the value
        try:
            _, position = _DECODER.raw_decode(text, position)
        except (JSONDecodeError, RecursionError):
            return None
    return None
