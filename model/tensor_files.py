"""Files of tensors: written whole, read without running code, and as they were written.

A .pth is a zip archive, whose entries have checksums; a .safetensors file may have its SHA-256
beside it.
"""

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.digest import check_digest
from common.errors import UserError
from common.file_kinds import HEAD, name_kind
from common.files import atomic_write

CHUNK = 2**20  # bytes that are read at a time
MAX_REPEATED = 2**30  # bytes of a tensor of repeated numbers


def save_atomically(payload: object, path: Path) -> None:
    """torch.save that leaves the old file or the whole new one, whenever the process stops."""
    with atomic_write(path) as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:
            # The death of a loader worker is raised wherever the main process happens to be.
            if "DataLoader worker" in str(error):
                raise
            # PyTorch reports a full disk as RuntimeError.
            raise OSError(str(error)) from error


def read_tensors(path: Path, only_shapes: bool = False) -> dict:
    """What a .pth or .safetensors file holds: tensors, numbers, text. No code of it is run.

    Args:
        path: of the file.
        only_shapes: leave the numbers on disk, where they are read if they are looked at; only
            that the file is whole is checked, not its bits.

    UserError where it is cut off, a bit of it is not as it was written (a .pth carries checksums,
    other files may have a digest beside them, see `check_digest`), or it holds anything else.
    """
    with refusing_damage(path):
        if path.suffix == ".safetensors":
            if not only_shapes:
                check_digest(path)
            return load_file(path)
        # Files of before 2020 are no archives.
        is_archive = zipfile.is_zipfile(path)
        if is_archive and not only_shapes:
            check_archive(path)
        is_mapped = is_archive and only_shapes
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)


@contextmanager
def refusing_damage(path: str | Path) -> Iterator[None]:
    """Turn the errors of reading a weights file into a UserError."""
    try:
        with warnings.catch_warnings():
            # What PyTorch says of odd files is said here.
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Any bytes can be read as a pickle, which then raises errors of any kind.
        damage = (
            f"is damaged or not a weights file ({type(error).__name__}): fetch or train it again"
        )
        raise UserError(f"{path} {_name_other_kind(Path(path)) or damage}") from error


def _name_other_kind(path: Path) -> str | None:
    """What a file is that holds no weights, see `name_kind`; whole ones are .zip archives."""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(HEAD)
        return None if head.startswith(b"PK") else name_kind(path, head)
    return None


def check_archive(path: Path) -> None:
    """zipfile.BadZipFile unless each entry has the checksum it was written with; torch has none."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # PyTorch reads them as they are; what is packed could be of any size.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is packed")
            # 0: written without one (torch.serialization.set_crc32_options).
            if entry.CRC:
                with archive.open(entry) as stream:
                    while stream.read(CHUNK):
                        pass


def check_numbers(weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """UserError that names a tensor with nan or infinity, or of another kind than weights have."""
    for name, weight in weights.items():
        # Strides of 0 make any size out of one number.
        n_bytes = weight.numel() * weight.element_size()
        most = max(MAX_REPEATED, weight.untyped_storage().nbytes())
        if weight.layout != torch.strided or n_bytes > most:
            raise UserError(f"{name:.200} in {path} is no plain tensor: fetch or train it again")
        if not torch.isfinite(weight).all():
            raise UserError(
                f"{name:.200} in {path} holds nan or infinity: training has failed there, take "
                "earlier weights"
            )
