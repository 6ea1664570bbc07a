"""Files that are not UTF-8: said once, on the file, with the command that converts it."""

import codecs
import re
import shlex
from pathlib import Path

from common.errors import UserError
from common.file_kinds import name_kind

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
# What files of these parts of the world are in, as iconv calls it: how Python calls it, and the
# letters that most texts there have most of.
CHINESE = "的一是在不了有和人中大上我以到他生地出就分成可主年工也能下子而方多行之等部"
KANA = "いうかがきくけこさしすせそただちってでとなにのはまみもよらりるれわをんイストラリルンー"
CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэф"
OTHERS = {
    "WINDOWS-1252": ("cp1252", "éèàêçôîûùâïëœüöäßñáíóúãõåæø’‘“”…–—«»°€£"),
    "WINDOWS-1251": ("cp1251", CYRILLIC),
    "KOI8-R": ("koi8_r", CYRILLIC),
    "GBK": ("gb18030", CHINESE + "这为个国们来时对发动说种面后学过还没图片红猫，。、！？：；“”"),
    "BIG5": ("big5", CHINESE + "這為個國們來時對發動說種面後學過還沒圖片紅貓，。、！？：；「」"),
    "SHIFT_JIS": ("shift_jis", KANA + "、。"),
    "EUC-JP": ("euc_jp", KANA + "、。"),
    "CP949": ("cp949", "이다는의을에가를은고하지한기로도서사리해인있어나과대들수자그"),
}
# Letters of another alphabet that follow each other, as they never do in Western Europe.
THREE_LETTERS = re.compile(r"[^\W\d_a-zA-Z]{3}")
UNKNOWN = "unknown"
# Share of those letters below which a guess is none: of alphabets, of thousands of signs.
LEAST_SHARES = {"cp1252": 0.8, "cp1251": 0.8, "koi8_r": 0.8}
LEAST_SHARE = 0.15


def check_text(path: Path, head: bytes) -> None:
    """UserError unless a file, of which `head` is the beginning, is UTF-8 in lines."""
    quoted, new = shlex.quote(str(path)), shlex.quote(f"new{path.suffix}")
    if kind := name_kind(path, head):
        raise UserError(f"{path} {kind}")
    encoding = guess_encoding(head)
    if encoding == UNKNOWN:
        raise UserError(f"{path} is no text in UTF-8, nor in another encoding that is known here")
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
    shares = {name: find_share(head, *other) for name, other in OTHERS.items()}
    best = max(shares, key=shares.get)
    return best if shares[best] else UNKNOWN


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
        return True
    except UnicodeDecodeError as error:
        # Or it goes on after the end of what was read.
        return error.end == len(line) and error.reason == "unexpected end of data"


def find_share(head: bytes, codec: str, frequent: str) -> float:
    """The share of a text's letters beyond ASCII that are frequent ones; 0 for one too small."""
    try:
        text = codecs.getincrementaldecoder(codec)().decode(head)
    except UnicodeDecodeError:
        return 0
    if codec == "cp1252" and THREE_LETTERS.search(text):
        return 0
    letters = [letter for letter in text if not letter.isascii()]
    share = sum(letter in frequent for letter in letters) / max(1, len(letters))
    return share if share > LEAST_SHARES.get(codec, LEAST_SHARE) else 0
