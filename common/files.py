"""The one way to write a file whole, the one hash, and the one way to read a file of others."""

import errno
import hashlib
import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import BadSampleError, UserError

# Of one picture's file, and of a text beside it.
MAX_IMAGE_BYTES = 2**26
MAX_TEXT_BYTES = 2**24
# Names that pictures have; HEIC is refused when it is opened, with the reason.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".dds", ".psd", ".qoi"),
    *(".sgi", ".pcx", ".tga"),
)
# What a system says where there is no file of a name, or cannot be.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to, which takes the place of `path` when it is whole and on disk.

    Whenever the process or the machine stops, `path` is the old file or the new one, never a part
    of it. Missing folders are made. UserError where the disk is full or the folder is read-only.
    """
    with _partial(path, "; an older file is intact") as partial:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextmanager
def folder_in_one_go(path: Path) -> Iterator[Path]:
    """A folder to write files into, which becomes `path` when all are written.

    Where something fails or the process is told to end, nothing of it stays. UserError where `path`
    exists, where the disk is full or the place is read-only.
    """
    with _partial(path) as partial, exiting_when_terminated():
        partial.mkdir()
        yield partial
        os.rename(partial, path)


@contextmanager
def _partial(path: Path, consolation: str = "") -> Iterator[Path]:
    """A name beside `path`, to write to before it is renamed; nothing of it stays.

    What the system refuses is a UserError, which ends with `consolation`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot write {path} ({error}): free some space or choose another folder{consolation}"
        ) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        elif partial.is_file():
            partial.unlink()


@contextmanager
def exiting_when_terminated() -> Iterator[None]:
    """Let `kill` and a closed terminal end the process as `sys.exit` does, not on the spot."""
    is_main = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGHUP") if is_main else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # Who has other plans for a signal, such as nohup, keeps them.
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one go, see `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _sync_folder(folder: Path) -> None:
    """Make the file's new name survive a power failure. Only POSIX systems can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def hash_bytes(content: bytes | Iterable[bytes], size: int = 16) -> bytes:
    """`size` bytes (BLAKE2b) that identify `content`, given whole or in parts."""
    digest = hashlib.blake2b(digest_size=size)
    for part in [content] if isinstance(content, bytes) else content:
        digest.update(part)
    return digest.digest()


def hash_to_int(content: bytes) -> int:
    """The same, shortened."""
    # `hash_bytes`, without what it does for content in parts: a million names are hashed at a start
    return shorten_hash(hashlib.blake2b(content, digest_size=16).digest())


def shorten_hash(digest: bytes) -> int:
    """64 bits of what `hash_bytes` gives, as a number that fits into a NumPy array."""
    return int.from_bytes(digest[:8], "little")


def read_image_bytes(source: str | Path | BinaryIO) -> bytes:
    """The bytes of a picture's file, still encoded: `read_small_file` up to MAX_IMAGE_BYTES."""
    return read_small_file(source, "image", MAX_IMAGE_BYTES)


def read_small_file(source: str | Path | BinaryIO, what: str, limit: int) -> bytes:
    """The bytes of a file that may be anything.

    Args:
        source: a path, whose symbolic links are followed, or an open file, read from its start.
        what: it is, "image" for example.
        limit: most bytes of it.

    BadSampleError where it is missing, no regular file or larger.
    """
    is_path = isinstance(source, str | os.PathLike)
    try:
        if is_path:
            content = _read_regular_file(source, what, limit)
        else:
            source.seek(0)
            content = source.read(limit + 1)
    except BadSampleError:
        raise
    # ValueError: a name that no file can have
    except (OSError, ValueError) as error:
        is_missing = getattr(error, "errno", errno.ENOENT) in MISSING
        reason = f"{what} missing" if is_missing else f"{what} cannot be read"
        raise BadSampleError(
            reason, f"{source} ({getattr(error, 'strerror', None) or error})"
        ) from error
    check_size(len(content), what, limit, source if is_path else "")
    return content


def check_size(n_bytes: int, what: str, limit: int, name: str | Path = "") -> None:
    """BadSampleError where something has more bytes than `limit`."""
    if n_bytes > limit:
        detail = f"it has over {limit // 2**20} MB"
        raise BadSampleError(f"{what} too large", f"{name}: {detail}" if name else detail)


def _read_regular_file(path: str | Path, what: str, limit: int) -> bytes:
    """Its bytes, at most `limit` + 1."""
    # Asked before it is opened: a FIFO would wait for a writer, and a device may do anything.
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadSampleError(f"{what} is no file", f"{path} is a folder, a pipe or a device")
    with open(path, "rb", opener=_open_at_once) as file:
        return file.read(min(status.st_size, limit) + 1)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file that may have become a FIFO since."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
