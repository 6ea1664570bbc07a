"""The pictures of a record: names or encoded files, whatever the key and the shape they come in."""

import ast
import base64
import binascii
import json
import re
import reprlib
from collections.abc import Iterator
from urllib.parse import unquote

from common.errors import BadSampleError
from common.files import MAX_IMAGE_BYTES, check_size
from dataset.image_names import SUFFIX

# Keys that hold pictures, as `simplify_key` writes them; the first one with a value is read.
IMAGE_KEYS = (
    *("image", "images", "imagebytes", "imagepath", "imagepaths", "imagefile", "imagefiles"),
    *("imagename", "imagenames", "imagefilename", "img", "imgs", "imgpath", "imgpaths"),
    *("imgfile", "imgname", "picture", "pictures", "picturepath", "photo", "photos", "photopath"),
    *("pic", "pics", "filename", "filenames", "file", "filepath", "path"),
    *("jpg", "jpeg", "png", "webp", "gif", "bmp"),
    *("imagebase64", "imageb64", "base64", "b64", "imagedata"),
    *("imageurl", "imageurls", "imgurl", "url", "urls"),
)
# They may as well be about something else: a row of text has the URL of its page.
UNSURE_KEYS = {"url", "urls", "path", "filepath", "file"}
_RANK = {key: rank for rank, key in enumerate(IMAGE_KEYS)}
# Keys of a picture that is an object, in the order in which they are tried.
INNER_KEYS = (
    *("bytes", "path", "image_url", "url", "image", "file_name", "filename", "file", "source"),
    *("data", "base64", "b64", "src", "name", "value", "content"),
)
_URL = re.compile(r"\s*(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# How the files of pictures begin when they are written as base64: JPEG, PNG, WebP, GIF, BMP.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk0")
SHORTEST_BASE64 = 64
# No part of a name is longer: a text of these characters alone is a file of any kind.
LONGEST_PART = 255
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")
# base64 for URLs has other signs.
_URL_SIGNS = str.maketrans("-_", "+/")
# No name of a file is longer.
LONGEST_NAME = 4096
# Lists in lists, objects in objects.
DEEPEST = 4


def simplify_key(key: str) -> str:
    """ "imagepath" of "image_path", "Image Path" and "imagePath"."""
    return "".join(filter(str.isalnum, key)).casefold()


def find_image_key(record: dict, is_shown: bool = True) -> str | None:
    """The key of a record that holds its pictures; None where none has a value.

    A file itself goes before a name. Where the row has none of the known keys, or text that shows a
    picture, another one is taken if it alone holds the name of a picture file, or its base64.

    Args:
        record: what is not the row's text.
        is_shown: whether this says that there is a picture, by `<image>` or as a caption does.
    """
    # the key of nearly all rows first
    if type(record.get("image")) is str and record["image"] and "image_bytes" not in record:
        return "image"
    keys = [key for key in record if simplify_key(key) in _RANK]
    known = [key for key in keys if _has_picture(record[key])]
    named = find_named_keys(record)
    if not is_shown:
        known = [key for key in known if simplify_key(key) not in UNSURE_KEYS or key in named]
    if known:
        is_name = {key: not isinstance(record[key], bytes) for key in known}
        return min(known, key=lambda key: (is_name[key], _RANK[simplify_key(key)]))
    is_unsure = UNSURE_KEYS.issuperset(map(simplify_key, keys))
    return named[0] if len(named) == 1 and (is_shown or is_unsure) else None


def _has_picture(value: object) -> bool:
    """Whether a value is more than nothing: None, "", NaN, or an object or list of these."""
    if isinstance(value, dict):
        return any(value.values())
    if isinstance(value, list):
        return any(one not in (None, "") for one in value)
    return bool(value) and value == value


def find_named_keys(record: dict) -> list[str]:
    """The keys of a record whose text ends as the name of a picture does, or is base64 of one."""
    texts = {key: value for key, value in record.items() if isinstance(value, str)}
    return [key for key, text in texts.items() if is_name(text) or _is_base64_picture(text)]


def is_name(text: str) -> bool:
    """Whether a text may be the name of a picture file: "a.jpg"."""
    return len(text) <= LONGEST_NAME and "\n" not in text and bool(SUFFIX.search(text))


def read_images(value: object, key: str) -> list[str | bytes]:
    """The pictures that a value holds: a name to look up each, or its encoded file.

    Args:
        value: a name, names with commas between them, bytes, base64, a data: URL, an object such
            as {"path": ..., "bytes": ...}, a list of these, also as text, or nothing.
        key: where the record has it; "image_base64" says what a text is.

    BadSampleError where it is none of these, a URL of another machine, or over MAX_IMAGE_BYTES.
    """
    if isinstance(value, str):
        listed = read_list(value)
        if listed is None:
            return [] if not value.strip() else _read_text(value, key, split_names(value))
        value = listed
    return list(_read_value(value, key, 0))


def read_list(text: str) -> list | None:
    """The list that a text is, as JSON or as Python prints it; None where it is none.

    Tables have lists as text.
    """
    if not (text.lstrip().startswith("[") and text.rstrip().endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
            return value if isinstance(value, list) else None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def split_names(text: str) -> list[str]:
    """["a.jpg", "b.jpg"] of "a.jpg, b.jpg"; "red, green.jpg" is one name."""
    parts = text.split(",")
    if len(parts) == 1:
        return [text]
    # A part without the suffix of a picture goes on behind the comma, if others have one.
    if any(map(SUFFIX.search, parts)):
        names, name = [], ""
        for part in parts:
            name += part
            if SUFFIX.search(part):
                names.append(name)
                name = ""
            else:
                name += ","
        parts = [*names, name.rstrip(",")]
    return [part.strip() for part in parts if part.strip()]


def _read_value(value: object, key: str, depth: int) -> Iterator[str | bytes]:
    """The pictures of a value inside a list or an object, where a comma is part of a name."""
    if depth > DEEPEST:
        raise BadSampleError("image is no name", reprlib.repr(value))
    if value is None or value == "" or value != value:
        return
    if isinstance(value, str):
        yield from _read_text(value, key, [value])
    elif isinstance(value, bytes | bytearray | memoryview):
        check_size(len(value), "image", MAX_IMAGE_BYTES)
        yield bytes(value)
    elif _is_bytes(value):
        yield bytes(value)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _read_value(one, key, depth + 1)
    elif isinstance(value, dict):
        inner = next((name for name in INNER_KEYS if value.get(name)), None)
        if inner is not None:
            yield from _read_value(value[inner], inner, depth + 1)
        elif value and all("image" in name.casefold() for name in value):
            # one for each tag of the text: {"<image_00>": "a.jpg"}
            yield from _read_value([*value.values()], key, depth + 1)
        elif not value or any(value.values()):
            raise BadSampleError("image is no name", reprlib.repr(value))
    else:
        raise BadSampleError("image is no name", reprlib.repr(value))


def _read_text(text: str, key: str, names: list[str]) -> list[str | bytes]:
    """What a text stands for: the file itself if it is written as base64, else `names`."""
    start = text[:64].lstrip()
    if start.startswith("data:"):
        head, _, content = text.partition(",")
        if not head.rstrip().endswith(";base64"):
            raise BadSampleError("image is no name", f"{head[:60]}: a data: URL without base64")
        return [decode_base64(content)]
    if _URL.match(start):
        raise BadSampleError("image is a URL", f"{text.strip()[:200]}: download it first")
    if start.startswith("file://"):
        return [_check_name(unquote(text.strip().removeprefix("file://")))]
    is_said = any(word in key.casefold() for word in ("bytes", "base64", "b64", "data"))
    is_long = len(text) > LONGEST_PART and bool(_BASE64.fullmatch(text))
    if (is_said or is_long or _is_base64_picture(text)) and not is_name(text):
        return [decode_base64(text)]
    return [*map(_check_name, names)]


def _is_base64_picture(text: str) -> bool:
    return len(text) > SHORTEST_BASE64 and text[:64].lstrip().startswith(_BASE64_STARTS)


def _is_bytes(value: object) -> bool:
    """Whether a list has the bytes of a file, each as a number."""
    return (
        isinstance(value, list)
        and len(value) > SHORTEST_BASE64
        and all(type(one) is int and 0 <= one < 256 for one in value)
    )


def _check_name(name: str) -> str:
    """A name; BadSampleError for one that no file can have."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        # Half a character.
        raise BadSampleError("image is no name", reprlib.repr(name)) from error
    if len(name) > LONGEST_NAME:
        raise BadSampleError("image is no name", f"{name[:60]}… has {len(name):,} characters")
    return name


def decode_base64(text: str) -> bytes:
    """The bytes that a text stands for. BadSampleError where it is cut off or too large."""
    # Four letters are three bytes.
    check_size(len(text) * 3 // 4, "image", MAX_IMAGE_BYTES)
    try:
        text = "".join(text.split()).rstrip("=").translate(_URL_SIGNS)
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSampleError("image damaged", f"{text[:40]}… is no base64 ({error})") from error
