"""Where the pictures that rows name are found: a folder, or a .zip that is never unpacked.

Both classes have the same methods: `find(name)` gives what `load_image` takes, `check(name)` asks
whether it is there without reading it, `count()` says how many there are.
"""

import io
import os
import posixpath
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import BadSampleError, UserError
from common.files import MAX_IMAGE_BYTES, hash_to_int
from dataset.index_cache import open_cached, save_cached

# Entries of an archive from which on its index is cached; fewer are listed in a moment.
CACHED_FROM = 10_000
# One entry of an archive: a hash of its name, and what is needed to read it.
ENTRY = np.dtype(
    [
        ("name", "<u8"),
        ("offset", "<u8"),
        ("packed", "<u4"),
        ("size", "<u4"),
        ("checksum", "<u4"),
        ("method", "<u2"),
    ]
)
# A method that no archive has.
ENCRYPTED = 99
# What `zipfile` raises for an archive that is cut off or changed.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, OSError, ValueError, OverflowError, NotImplementedError, struct.error
)  # fmt: skip


def split_names(value: object) -> list[str]:
    """The names in a row's "image": "a.jpg", "a.jpg, b.jpg", a list of names, or None.

    BadSampleError where it is anything else.
    """
    if not isinstance(value, (str, list, type(None))):
        raise BadSampleError("image is no name", repr(value)[:200])
    names = value.split(",") if isinstance(value, str) else value or []
    names = [str(name).strip() for name in names if str(name).strip()]
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        # Half a character, which no file's name has.
        raise BadSampleError("image is no name", repr(value)[:200]) from error
    return names


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


class ImageFolder:
    """Pictures as files below a folder."""

    def __init__(self, path: Path):
        self.path = path.resolve()

    def __getstate__(self) -> dict:
        # The names stay in the process that checks the rows: a loader worker only opens pictures.
        return {"path": self.path}

    @cached_property
    def _names(self) -> set[str]:
        """Names in the folder, listed once: faster than asking for half a million one by one."""
        return set(os.listdir(self.path)) if self.path.is_dir() else set()

    def count(self) -> int:
        return len(self._names)

    def find(self, name: str) -> Path:
        """Where a file of that name would be. BadSampleError for a name that leaves the folder."""
        return self.path / normalize_name(name)

    def check(self, name: str) -> None:
        """BadSampleError unless there is a file of that name."""
        inner = normalize_name(name)
        # In a folder below this one, or newer than the list of names.
        if inner not in self._names and not os.path.isfile(self.path / inner):
            raise BadSampleError("image missing", name)


class ImageZip:
    """Pictures as entries of a .zip, found by name in 30 bytes of memory-mapped index each.

    Names may leave out a folder that all entries share. Nothing is unpacked to disk, and no entry
    to more than MAX_IMAGE_BYTES.
    """

    def __init__(self, path: Path):
        self.path = path
        cached = open_cached(path, "entries", ENTRY)
        if cached is None:
            self.entries = list_entries(path)
            if len(self.entries) >= CACHED_FROM:
                save_cached(self.entries, {}, path, "entries")
        else:
            self.entries, _ = cached
        # A search in one field of the entries would copy that field each time.
        self.names = np.ascontiguousarray(self.entries["name"])

    def __reduce__(self) -> tuple:
        # A loader worker opens the archive itself.
        return ImageZip, (self.path,)

    def count(self) -> int:
        return len(self.entries)

    def find(self, name: str) -> io.BytesIO:
        """The bytes of that picture's file. BadSampleError where it is missing or damaged."""
        entry = self._find_entry(name)
        if entry is None:
            raise BadSampleError("image missing", f"{name} in {self.path}")
        with open(self.path, "rb") as file:
            return io.BytesIO(read_entry(file, entry, name))

    def check(self, name: str) -> None:
        """BadSampleError unless there is an entry of that name."""
        if self._find_entry(name) is None:
            raise BadSampleError("image missing", name)

    def _find_entry(self, name: str) -> np.void | None:
        key = np.uint64(hash_to_int(normalize_name(name).encode()))
        at = int(np.searchsorted(self.names, key))
        is_there = at < len(self.names) and self.names[at] == key
        return self.entries[at] if is_there else None


def open_images(path: str | Path | None) -> ImageFolder | ImageZip | None:
    """The folder or .zip at `path`; if there is no such folder, the .zip of that name beside it."""
    if path is None:
        return None
    path = Path(path)
    archive = path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")
    if archive.is_file() and not path.is_dir():
        return ImageZip(archive)
    return ImageFolder(path)


def list_entries(path: Path) -> np.ndarray:
    """ENTRY[n] of an archive's files, sorted by (hash of the) name.

    `zipfile` takes half a kilobyte for each entry while it reads the directory: once, because the
    array is cached. UserError where the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            prefix = _shared_folder(name for name, _ in _list_files(archive))
            found = (_make_entry(name, info, prefix) for name, info in _list_files(archive))
            entries = np.fromiter(found, ENTRY)
    except ARCHIVE_ERRORS as error:
        raise UserError(f"{path} is no whole .zip ({error}): fetch it again") from error
    return entries[np.argsort(entries["name"], kind="stable")]


def _list_files(archive: zipfile.ZipFile) -> Iterator[tuple[bytes, zipfile.ZipInfo]]:
    """(name, entry) of every file, named as `normalize_name` has it; no folders.

    Many archives hold UTF-8 without saying so, which `zipfile` then reads as MS-DOS letters.
    """
    for info in archive.infolist():
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        name = info.orig_filename.encode(encoding).replace(b"\\", b"/")
        if not name.endswith(b"/") and not name.startswith(b"__MACOSX/"):
            yield posixpath.normpath(name), info


def _shared_folder(names: Iterator[bytes]) -> bytes:
    """b"images/" where all names begin with that one folder; b"" otherwise."""
    folders = set()
    for name in names:
        folder, slash, _ = name.partition(b"/")
        folders.add(folder + slash)
        if len(folders) > 1:
            return b""
    shared = folders.pop() if folders else b""
    return shared if shared.endswith(b"/") else b""


def _make_entry(name: bytes, info: zipfile.ZipInfo, prefix: bytes) -> tuple[int, ...]:
    """The fields of ENTRY. Sizes are cut to 32 bits: no picture that large is read anyway."""
    return (
        hash_to_int(name.removeprefix(prefix)),
        info.header_offset,
        min(info.compress_size, 2**32 - 1),
        min(info.file_size, 2**32 - 1),
        info.CRC,
        ENCRYPTED if info.flag_bits & 1 else info.compress_type,
    )


def read_entry(file: BinaryIO, entry: np.void, name: str) -> bytes:
    """The bytes of an entry. BadSampleError where it is too large or damaged.

    `zipfile` would have to read the whole directory before it opens one entry.
    """
    # what the directory says
    size, packed, method = int(entry["size"]), int(entry["packed"]), int(entry["method"])
    if max(size, packed) > MAX_IMAGE_BYTES:
        limit = f"its file has over {MAX_IMAGE_BYTES // 2**20} MB"
        raise BadSampleError("image too large", f"{name}: {limit}")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadSampleError("image damaged", f"{name}: packed by method {method} or encrypted")

    # the entry's own header: 30 bytes, the last 4 are the lengths of the two fields behind it
    file.seek(int(entry["offset"]))
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        problem = "the archive has no entry where its directory says"
        raise BadSampleError("image damaged", f"{name}: {problem}")
    file.seek(sum(struct.unpack_from("<HH", header, 26)), io.SEEK_CUR)

    # the content: a lying directory cannot make it longer than `size` + 1
    content = file.read(packed)
    try:
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    except zlib.error as error:
        raise BadSampleError("image damaged", f"{name} ({error})") from error
    if len(content) != size or zlib.crc32(content) != int(entry["checksum"]):
        problem = "its bytes do not match the archive's checksum"
        raise BadSampleError("image damaged", f"{name}: {problem}")
    return content
