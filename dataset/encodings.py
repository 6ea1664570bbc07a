"""Files that are not UTF-8: said once, on the file, with the command that converts it."""

import codecs
import shlex
from pathlib import Path

from common.errors import UserError

# Names as iconv has them. Longer marks first: that of UTF-16 begins the one of UTF-32.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Without a mark: where the first four bytes, all of them ASCII signs, have zeros.
ZEROS = {
    (True, True, True, False): "UTF-32BE",
    (False, True, True, True): "UTF-32LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, False, True): "UTF-16LE",
}
# What files of these parts of the world are in, as iconv and Python call it.
OTHERS = {"GBK": "gb18030", "BIG5": "big5", "SHIFT_JIS": "shift_jis", "WINDOWS-1252": "cp1252"}
GZIP = b"\x1f\x8b"


def check_text(path: Path, head: bytes) -> None:
    """UserError unless a file, of which `head` is the beginning, is UTF-8 in lines."""
    quoted, new = shlex.quote(str(path)), shlex.quote(f"new{path.suffix}")
    if head.startswith(GZIP):
        raise UserError(f"{path} is packed by gzip: unpack it with `gunzip -k {quoted}`")
    encoding = guess_encoding(head)
    if encoding:
        raise UserError(
            f"{path} is not UTF-8 (it looks like {encoding}): convert it with "
            f"`iconv -f {encoding} -t UTF-8 {quoted} > {new}`"
        )
    if b"\r" in head and b"\n" not in head and b"\r" in head.rstrip():
        raise UserError(
            f"{path} ends its lines by CR alone: convert it with "
            f"`tr '\\r' '\\n' < {quoted} > {new}`"
        )


def guess_encoding(head: bytes) -> str | None:
    """The encoding of a text that is not UTF-8, as iconv names it; None where it is."""
    # marks and zeros
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    encoding = ZEROS.get(tuple(byte == 0 for byte in head[:4]))
    if encoding:
        return encoding

    # one damaged line among good ones is only that
    lines = [line for line in head.split(b"\n") if line.strip()]
    n_damaged = sum(not is_utf8(line) for line in lines)
    text = head.decode("utf-8", "replace")
    n_lost = text.count("\ufffd") - head.count("\ufffd".encode())
    n_letters = sum(not letter.isascii() for letter in text) - text.count("\ufffd")
    # Bytes of another encoding may look like a letter of UTF-8, but not most of them.
    if 2 * n_damaged <= len(lines) or 4 * n_lost <= n_letters:
        return None
    return next((name for name, codec in OTHERS.items() if fits(head, codec)), "another encoding")


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
        return True
    except UnicodeDecodeError as error:
        # Or it goes on after the end of what was read.
        return error.end == len(line) and error.reason == "unexpected end of data"


def fits(head: bytes, codec: str) -> bool:
    """Whether a text may be in an encoding: it decodes, to letters in use."""
    try:
        text = codecs.getincrementaldecoder(codec)().decode(head)
    except UnicodeDecodeError:
        return False
    if codec != "gb18030":
        return True
    # Nearly any bytes are GB 18030, but those of Chinese texts are its oldest part.
    letters = [letter for letter in text if not letter.isascii()]
    n_common = len("".join(letters).encode("gb2312", "ignore")) // 2
    return n_common >= 0.9 * len(letters)
