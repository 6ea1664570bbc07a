"""Pictures in a .zip that is never unpacked."""

import io
import os
import posixpath
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import BadSampleError, UserError
from common.file_kinds import HEAD, name_kind
from common.files import MAX_IMAGE_BYTES, check_size, hash_to_int
from dataset.image_names import JUNK, SUFFIX, NearMisses, normalize_name, spell
from dataset.index_cache import open_cached, save_cached

# Entries of an archive from which on its index is cached; fewer are listed in a moment.
CACHED_FROM = 10_000
# Of that index. Count it up when the content changes.
LAYOUT = 3
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
# A method that no archive has, and names of those that are not read.
ENCRYPTED = 99
METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstandard", 95: "xz"}
# Alphabets of names that do not say theirs: what systems of several countries wrote.
ENCODINGS = ("utf-8", "gb18030", "cp437", "shift_jis", "cp949", "big5")
# What `zipfile` raises for an archive that is cut off or changed.
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, OSError, ValueError, OverflowError, NotImplementedError, struct.error
)  # fmt: skip


class ImageZip:
    """Pictures as entries of a .zip, found by name in 30 bytes of memory-mapped index each.

    Names may leave out folders that all pictures share. Nothing is unpacked to disk, and no entry
    to more than MAX_IMAGE_BYTES.
    """

    def __init__(self, path: Path):
        self.path = path
        cached = open_cached(path, "entries", ENTRY, layout=LAYOUT)
        if cached is None:
            self.entries, shared = list_entries(path)
            if len(self.entries) >= CACHED_FROM:
                save_cached(self.entries, {"shared": shared}, path, "entries", layout=LAYOUT)
        else:
            self.entries, shared = cached[0], cached[1]["shared"]
        self._place = os.fsencode(path.resolve())
        # A search in one field of the entries would copy that field each time.
        self.names = np.ascontiguousarray(self.entries["name"])
        # "", "sft/", "sft/images/": what a row's name may have left out
        parts = bytes.fromhex(shared).split(b"/")
        self.folders = [b"".join(part + b"/" for part in parts[:n]) for n in range(len(parts))]

    def __reduce__(self) -> tuple:
        # A loader worker opens the archive itself.
        return ImageZip, (self.path,)

    def count(self) -> int:
        return len(self.entries)

    def find(self, name: str) -> io.BytesIO:
        """The bytes of that picture's file. BadSampleError where it is missing or damaged."""
        entry = self._find_entry(name)
        try:
            with open(self.path, "rb") as file:
                return io.BytesIO(read_entry(file, entry, name))
        except OSError as error:
            raise BadSampleError("image cannot be read", f"{self.path} ({error})") from error

    def identify(self, name: str) -> int:
        """64 bits that tell an entry from others. BadSampleError unless it is there."""
        return hash_to_int(self._place + self._find_entry(name)["name"].tobytes())

    @cached_property
    def _near_misses(self) -> NearMisses:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return NearMisses(_show(name) for name, _ in _list_files(archive))
        except ARCHIVE_ERRORS:
            # changed or taken away since
            return NearMisses([])

    def _find_entry(self, name: str) -> np.void:
        """The entry of a name: in full first, then without the folders that all share."""
        for encoded in self._encode(normalize_name(name)):
            for folder in self.folders:
                key = np.uint64(hash_to_int(folder + encoded))
                at = int(np.searchsorted(self.names, key))
                if at < len(self.names) and self.names[at] == key:
                    return self.entries[at]
        missing = self._near_misses.explain(name)
        raise BadSampleError("image missing", f"{missing} in {self.path}")

    def _encode(self, name: str) -> Iterator[bytes]:
        """The bytes that may stand for a name in the archive."""
        for spelling in spell(name, self.path.stem):
            for encoding in ENCODINGS[:1] if spelling.isascii() else ENCODINGS:
                try:
                    yield spelling.encode(encoding).replace(b"\\", b"/")
                except UnicodeEncodeError:
                    continue


def list_entries(path: Path) -> tuple[np.ndarray, str]:
    """(ENTRY[n] of an archive's files, sorted by (hash of the) name; the folder they share in hex).

    `zipfile` takes half a kilobyte for each entry while it reads the directory: once, because the
    array is cached. UserError where the archive is damaged or nothing in it can be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = list(_list_files(archive))
    except ARCHIVE_ERRORS as error:
        raise UserError(f"{path} {_explain(path, error)}") from error
    names = [name for name, _ in files]
    if not names:
        raise UserError(f"{path} holds no files")
    if all(name.endswith((b".zip", b".tar", b".gz", b".rar", b".7z")) for name in names):
        raise UserError(f"{path} holds other archives ({_show(names[0])}): unpack it first")
    entries = np.fromiter((_make_entry(name, info) for name, info in files), ENTRY)
    _check_methods(path, entries["method"])
    return entries[np.argsort(entries["name"], kind="stable")], _shared_folder(names).hex()


def _explain(path: Path, error: Exception) -> str:
    """What a file is that is no .zip, and what to do."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        head = b""
    kind = None if head.startswith(b"PK") else name_kind(path, head)
    return kind or f"is no whole .zip ({error}): fetch it again"


def _check_methods(path: Path, methods: np.ndarray) -> None:
    """UserError if no entry can be read."""
    if np.isin(methods, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)).any():
        return
    if methods[0] == ENCRYPTED:
        raise UserError(f"{path} is encrypted: unpack it to a folder")
    raise UserError(f"{path} is {_packed(int(methods[0]))}")


def _packed(method: int) -> str:
    return f"packed by {METHODS.get(method, f'method {method}')}: repack with deflate, or unpack it"


def _list_files(archive: zipfile.ZipFile) -> Iterator[tuple[bytes, zipfile.ZipInfo]]:
    """(name, entry) of every file, named as `normalize_name` has it; no folders and no junk.

    Many archives hold UTF-8 without saying so, which `zipfile` then reads as MS-DOS letters.
    """
    for info in archive.infolist():
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        name = info.orig_filename.encode(encoding).replace(b"\\", b"/")
        if name.endswith(b"/") or JUNK.search(name):
            continue
        name = posixpath.normpath(name.lstrip(b"/"))
        if info.header_offset < 0:
            raise zipfile.BadZipFile("it is the last part of an archive in parts")
        # Another alphabet is left as it is, see ENCODINGS.
        with suppress(UnicodeDecodeError):
            name = name if name.isascii() else unicodedata.normalize("NFC", name.decode()).encode()
        yield name, info


def _show(name: bytes) -> str:
    """An entry's name as text, to be read by people."""
    for encoding in ENCODINGS[:2]:
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name.decode("cp437")


def _shared_folder(names: list[bytes]) -> bytes:
    """b"sft/images/" where all pictures are below that folder; b"" where there is none.

    Only files with the suffix of a picture count, unless there are none.
    """
    pictures = [name for name in names if SUFFIX.search(name.decode("latin-1"))]
    folders = {name[: name.rfind(b"/") + 1] for name in pictures or names}
    # what the first and the last have in common, all between them have too
    shared = posixpath.commonprefix([min(folders), max(folders)])
    return shared[: shared.rfind(b"/") + 1]


def _make_entry(name: bytes, info: zipfile.ZipInfo) -> tuple[int, ...]:
    """The fields of ENTRY. Sizes are cut to 32 bits: no picture that large is read anyway."""
    return (
        hash_to_int(name),
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
    check_size(max(size, packed), "image", MAX_IMAGE_BYTES, name)
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        reason = "image encrypted" if method == ENCRYPTED else f"image {_packed(method)}"
        raise BadSampleError(reason, name)

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
