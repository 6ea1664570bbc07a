"""The pictures of a record: names or encoded files, whatever the key and the shape they come in."""

import base64
import binascii
import re
import reprlib
from collections.abc import Iterator

from common.errors import BadSampleError
from common.files import MAX_IMAGE_BYTES, check_size

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
    *("data", "base64", "b64", "src", "name"),
)
_SUFFIX = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|jfif|dds)\s*$", re.IGNORECASE)
_URL = re.compile(r"\s*(https?|ftp|s3|gs|oss|hf)://", re.IGNORECASE)
# How the files of pictures begin when they are written as base64: JPEG, PNG, WebP, GIF, BMP.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk0")
# No name of a file is longer.
LONGEST_NAME = 4096
# Lists in lists, objects in objects.
DEEPEST = 4


def simplify_key(key: str) -> str:
    """ "imagepath" of "image_path", "Image Path" and "imagePath"."""
    return "".join(filter(str.isalnum, key)).casefold()


def find_image_key(record: dict, is_shown: bool = True) -> str | None:
    """The key of a record that holds its pictures; None where none has a value.

    A key of another name is taken if it alone holds the name of a picture file.

    Args:
        record: what is not the row's text.
        is_shown: whether this says that there is a picture, by `<image>` or as a caption does.
    """
    # the key of nearly all rows first
    if record.get("image"):
        return "image"
    known = [key for key, value in record.items() if simplify_key(key) in _RANK and value]
    if not is_shown:
        named = set(find_named_keys(record))
        known = [key for key in known if simplify_key(key) not in UNSURE_KEYS or key in named]
    if known:
        return min(known, key=lambda key: _RANK[simplify_key(key)])
    named = find_named_keys(record)
    return named[0] if len(named) == 1 else None


def find_named_keys(record: dict) -> list[str]:
    """The keys of a record whose text ends as the name of a picture does."""
    return [key for key, value in record.items() if isinstance(value, str) and is_name(value)]


def is_name(text: str) -> bool:
    """Whether a text may be the name of a picture file: "a.jpg"."""
    return len(text) <= LONGEST_NAME and "\n" not in text and bool(_SUFFIX.search(text))


def read_images(value: object, key: str) -> list[str | bytes]:
    """The pictures that a value holds: a name to look up each, or its encoded file.

    Args:
        value: a name, names with commas between them, bytes, base64, a data: URL, an object such
            as {"path": ..., "bytes": ...}, a list of these, or nothing.
        key: where the record has it; "image_base64" says what a text is.

    BadSampleError where it is none of these, a URL of another machine, or over MAX_IMAGE_BYTES.
    """
    if isinstance(value, str):
        return [] if not value.strip() else _read_text(value, key, split_names(value))
    return list(_read_value(value, key, 0))


def split_names(text: str) -> list[str]:
    """["a.jpg", "b.jpg"] of "a.jpg, b.jpg"; "red, green.jpg" is one name."""
    parts = text.split(",")
    if len(parts) == 1:
        return [text]
    # A part without the suffix of a picture goes on behind the comma, if others have one.
    if any(map(_SUFFIX.search, parts)):
        names, name = [], ""
        for part in parts:
            name += part
            if _SUFFIX.search(part):
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
    if value is None or value == "":
        return
    if isinstance(value, str):
        yield from _read_text(value, key, [value])
    elif isinstance(value, bytes | bytearray | memoryview):
        check_size(len(value), "image", MAX_IMAGE_BYTES)
        yield bytes(value)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _read_value(one, key, depth + 1)
    elif isinstance(value, dict):
        inner = next((name for name in INNER_KEYS if value.get(name)), None)
        if inner is not None:
            yield from _read_value(value[inner], inner, depth + 1)
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
    is_said = any(word in key.casefold() for word in ("bytes", "base64", "b64", "data"))
    if len(text) > 64 and start.startswith(_BASE64_STARTS):
        is_said = not is_name(text)
    if is_said and not is_name(text):
        return [decode_base64(text)]
    if _URL.match(start):
        raise BadSampleError("image is a URL", f"{text.strip()[:200]}: download it first")
    return [_check_name(name.removeprefix("file://")) for name in names]


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
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSampleError("image damaged", f"{text[:40]}… is no base64 ({error})") from error
