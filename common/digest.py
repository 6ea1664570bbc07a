"""The SHA-256 beside a file that has no checksum of its own, as `sha256sum` writes it."""

import hashlib
from pathlib import Path

from common.errors import UserError
from common.files import write_text

CHUNK = 2**20  # bytes that are read at a time


def check_digest(path: Path) -> None:
    """UserError where a file differs from its checksum in PATH.sha256, if that is beside it."""
    beside = digest_path(path)
    if not beside.is_file():
        return
    expected = beside.read_text(encoding="utf-8", errors="replace").lower().split()[:1]
    if expected != [hash_file(path)]:
        raise UserError(
            f"{path} differs from its checksum in {beside.name}: fetch it again; if you have "
            f"replaced it, remove {beside.name}"
        )


def write_digest(path: Path) -> None:
    """Write PATH.sha256."""
    write_text(digest_path(path), f"{hash_file(path)}  {path.name}\n")


def digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal: what hubs publish."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
