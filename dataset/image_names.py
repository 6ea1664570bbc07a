"""Names of pictures: what a row may name, and which file it may have meant."""

import posixpath
import re
import unicodedata
from collections.abc import Iterable
from itertools import islice
from urllib.parse import unquote

from common.errors import BadSampleError
from common.files import IMAGE_SUFFIXES

SUFFIX = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})\s*$", re.IGNORECASE)
# What systems put beside pictures.
JUNK = re.compile(
    rb"(^|/)(__MACOSX/.*|\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)$", re.IGNORECASE | re.DOTALL
)
# Files among which the meant one is sought at most: a few seconds, some 200 MB.
MOST_NAMES = 1_000_000


def normalize_name(name: str) -> str:
    """A name in a row as "sub/a.jpg" on any system, also of "sub\\\\a.jpg" or "./sub/a.jpg".

    BadSampleError for one that leaves its folder: by "..", or absolute such as "C:\\\\a.jpg".
    """
    path = posixpath.normpath(name.replace("\\", "/"))
    if path == ".." or path.startswith(("../", "/")) or re.match("[A-Za-z]:", path):
        raise BadSampleError("image path leaves its folder", name)
    if "\0" in path:
        raise BadSampleError("image is no name", repr(name)[:200])
    return path


def spell(name: str, folder: str) -> list[str]:
    """The ways in which one name may be written, the name itself first.

    Spaces around it may be there by mistake; it may begin with the name of the very folder that it
    is in; and an accent is a part of its letter or, on a Mac, a character behind it.
    """
    spellings = [name]
    if name != name.strip():
        spellings.append(name.strip())
    if name.startswith(f"{folder}/"):
        spellings.append(name[len(folder) + 1 :])
    if name.isascii():
        return spellings
    forms = (unicodedata.normalize(form, one) for one in spellings for form in ("NFC", "NFD"))
    return list(dict.fromkeys([*spellings, *forms]))


class NearMisses:
    """Files by a name without case, spaces, suffix and folders: what a missing one was meant to be.

    Args:
        names: of the files that there are, such as "sub/a.jpg".
    """

    def __init__(self, names: Iterable[str]):
        self.names: dict[str, str] = {}
        for name in islice(names, MOST_NAMES):
            key = _loosen(name)
            self.names.setdefault(key, name)
            self.names.setdefault(key.rpartition("/")[2], name)

    def explain(self, name: str) -> str:
        """ "a.jpg: there is A.JPG", or only the name."""
        key = _loosen(name)
        near = self.names.get(key) or self.names.get(key.rpartition("/")[2])
        if near == name:
            return f"{name} is a link to a file that is not there"
        return f"{name}: there is {near}" if near else name


def _loosen(name: str) -> str:
    if "%" in name:
        name = unquote(name)
    if not name.isascii():
        name = unicodedata.normalize("NFKC", name)
    name = SUFFIX.sub("", name.strip()).casefold().replace("\\", "/")
    return "".join(name.split())
