"""Where the pictures that rows name are found: a folder, or a .zip that is never unpacked."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import BadSampleError, UserError
from common.files import MAX_IMAGE_BYTES, hash_to_int
from dataset.index_cache import open_cached, save_cached

CACHED_FROM = 10_000  # entries of an archive; fewer are listed in a moment
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
STORED, DEFLATED = 0, 8  # the methods that archives of pictures use


def split_names(value: object) -> list[str]:
    """The names in a row's "image": "a.jpg", "a.jpg, b.jpg" or a list of names; none where it is missing."""
    if not isinstance(value, (str, list, type(None))):
        raise BadSampleError("image is no name", repr(value)[:200])
    names = value.split(",") if isinstance(value, str) else value or []
    names = [str(name).strip() for name in names if str(name).strip()]
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:  # half a character, which no file's name has
        raise BadSampleError("image is no name", repr(value)[:200]) from error
    return names


class ImageFolder:
    """Pictures as files below a folder."""

    def __init__(self, path: Path):
        self.path = path.resolve()

    def list_names(self) -> set[str]:
        """Names of the files, read once: faster than asking for half a million one by one."""
        return {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()

    def find(self, name: str, listed: set[str] | None = None) -> Path:
        """The file of that name; BadSampleError for a name that leaves the folder or, with the names `listed`, is not there."""
        path = self.path / name
        try:
            is_inside = path.resolve().is_relative_to(self.path)
            is_there = listed is None or name in listed or path.is_file()
        except (
            OSError,
            ValueError,
        ) as error:  # longer than a file's name can be, or with a zero byte
            raise BadSampleError("image is no name", repr(name)[:200]) from error
        if not is_inside:
            raise BadSampleError("image path leaves its folder", name)
        if not is_there:
            raise BadSampleError("image missing", name)
        return path


class ImageZip:
    """Pictures as entries of a .zip, found by name in 30 bytes of memory-mapped index each; names may leave out a folder that
    all entries share. Nothing is unpacked to disk, and no entry to more than MAX_IMAGE_BYTES."""

    def __init__(self, path: Path):
        self.path = path
        found = open_cached(path, "entries", ENTRY)
        if found is None:
            self.entries = list_entries(path)
            if len(self.entries) >= CACHED_FROM:
                save_cached(self.entries, {}, path, "entries")
        else:
            self.entries, _ = found
        self.names = np.ascontiguousarray(
            self.entries["name"]
        )  # a search in a field would copy it each time

    def __reduce__(self) -> tuple:  # another process opens the archive itself
        return ImageZip, (self.path,)

    def list_names(self) -> None:
        """Not needed: `find` is fast."""

    def find(self, name: str, listed: None = None) -> io.BytesIO:
        """The bytes of that picture's file, or BadSampleError."""
        entry = self._entry(name)
        with open(self.path, "rb") as file:
            return io.BytesIO(read_entry(file, entry, name))

    def __contains__(self, name: str) -> bool:
        return self._entry(name, required=False) is not None

    def _entry(self, name: str, required: bool = True) -> np.void | None:
        key = np.uint64(hash_to_int(name.encode()))
        at = int(np.searchsorted(self.names, key))
        if at < len(self.names) and self.names[at] == key:
            return self.entries[at]
        if required:
            raise BadSampleError("image missing", f"{name} in {self.path}")
        return None


def open_images(path: str | Path | None) -> ImageFolder | ImageZip | None:
    """The folder or .zip at `path`; where the folder is missing, the archive of the same name beside it."""
    if path is None:
        return None
    path = Path(path)
    archive = path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")
    if archive.is_file() and not path.is_dir():
        return ImageZip(archive)
    return ImageFolder(path)


def list_entries(path: Path) -> np.ndarray:
    """ENTRY[n] of an archive's files, sorted by name. (The standard library's zipfile keeps half a kilobyte for each of them.)
    UserError where it is no whole .zip. Layout: APPNOTE 6.3, sections 4.3.12 to 4.3.16."""
    try:
        with open(path, "rb") as file:
            directory, count = _read_directory(file)
        found = [
            (name, fields) for name, *fields in _parse_directory(directory, count) if _is_file(name)
        ]
    except (OSError, struct.error, ValueError) as error:
        raise UserError(f"{path} is no whole .zip ({error}): fetch it again") from error
    folders = {name.split(b"/", 1)[0] for name, _ in found if b"/" in name}
    shared = (
        folders.pop() + b"/"
        if len(folders) == 1 and all(b"/" in name for name, _ in found)
        else b""
    )
    entries = np.array(
        [(hash_to_int(name[len(shared) :]), *fields) for name, fields in found], ENTRY
    )
    return np.sort(entries, order="name")


def _is_file(name: bytes) -> bool:
    return not name.endswith(b"/") and not name.startswith(b"__MACOSX/")


def _read_directory(file: BinaryIO) -> tuple[bytes, int]:
    """(the central directory, number of its entries)"""
    end = file.seek(0, io.SEEK_END)
    tail_start = max(0, end - 22 - 65535)  # the end record, and the longest comment behind it
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise ValueError("it has no end record")
    count, size, offset = struct.unpack_from("<HII", tail, at + 10)
    locator = at - 20
    if (
        locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07"
    ):  # ZIP64: over 65,535 entries or 4 GB
        file.seek(struct.unpack_from("<Q", tail, locator + 8)[0])
        count, size, offset = struct.unpack("<32xQQQ", file.read(56))
    if offset + size > end:
        raise ValueError("its directory is cut off")
    file.seek(offset)
    return file.read(size), count


def _parse_directory(
    directory: bytes, count: int
) -> Iterator[tuple[bytes, int, int, int, int, int]]:
    """(name, offset, packed bytes, bytes, checksum, method) of every entry."""
    at = 0
    for _ in range(count):
        magic, flags, method, checksum, packed, size, n_name, n_extra, n_comment, offset = (
            struct.unpack_from("<4s4xHH4xIIIHHH8xI", directory, at)
        )
        if magic != b"PK\x01\x02":
            raise ValueError("its directory is damaged")
        name = directory[at + 46 : at + 46 + n_name]
        if 0xFFFFFFFF in (offset, packed, size):
            extra = directory[at + 46 + n_name : at + 46 + n_name + n_extra]
            size, packed, offset = _read_zip64(extra, size, packed, offset)
        if flags & 1:
            method = 99  # encrypted
        limit = 0xFFFFFFFF  # beyond it no picture is read in any case
        yield name, offset, min(packed, limit), min(size, limit), checksum, method
        at += 46 + n_name + n_extra + n_comment


def _read_zip64(extra: bytes, size: int, packed: int, offset: int) -> list[int]:
    """[size, packed, offset], those that did not fit into 32 bits taken from the extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = [
                struct.unpack_from("<Q", extra, at + 4 + 8 * k)[0] for k in range(length // 8)
            ]
            return [
                values.pop(0) if known == 0xFFFFFFFF and values else known
                for known in (size, packed, offset)
            ]
        at += 4 + length
    raise ValueError("its directory is damaged")


def read_entry(file: BinaryIO, entry: np.void, name: str) -> bytes:
    """The bytes of an entry; BadSampleError where it is too large or damaged."""
    size, packed, method = int(entry["size"]), int(entry["packed"]), int(entry["method"])
    if max(size, packed) > MAX_IMAGE_BYTES:
        raise BadSampleError(
            "image too large", f"{name}: its file has over {MAX_IMAGE_BYTES // 2**20} MB"
        )
    if method not in (STORED, DEFLATED):
        raise BadSampleError("image damaged", f"{name}: packed by method {method} or encrypted")
    file.seek(int(entry["offset"]))
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise BadSampleError(
            "image damaged", f"{name}: the archive has no entry where its directory says"
        )
    file.seek(sum(struct.unpack_from("<HH", header, 26)), io.SEEK_CUR)
    content = file.read(packed)
    try:
        if method == DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    except zlib.error as error:
        raise BadSampleError("image damaged", f"{name} ({error})") from error
    if len(content) != size or zlib.crc32(content) != int(entry["checksum"]):
        raise BadSampleError(
            "image damaged", f"{name}: its bytes do not match the archive's checksum"
        )
    return content
