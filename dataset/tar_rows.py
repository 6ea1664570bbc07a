"""Rows of a .tar shard as WebDataset writes it: `0001.jpg`, `0001.json`, `0002.jpg`, ..."""

import json
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from common.errors import BadSampleError, UserError
from common.file_kinds import HEAD, name_kind
from common.files import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, check_size
from dataset.image_names import SUFFIX
from dataset.images import ImageFolder, ImageZip
from dataset.record_rows import RecordRows, byte_bar

TEXTS = {"txt": "caption", "text": "caption", "caption": "caption"}


class TarRows(RecordRows):
    """Rows of a .tar: files that follow each other and have one name up to the first dot.

    The key of a row is the byte offset of its first file: one seek to read it. Nothing is unpacked
    to disk. UserError for a file that is no .tar.
    """

    container = "WebDataset"

    def __init__(self, path: Path, images: ImageFolder | ImageZip | None = None):
        super().__init__(path, images)
        try:
            tarfile.open(path, "r:").close()
        except (tarfile.TarError, OSError, ValueError) as error:
            with open(path, "rb") as file:
                kind = name_kind(path, file.read(HEAD))
            kind = kind or f"is no whole .tar ({error}): unpack or fetch it again"
            raise UserError(f"{path} {kind}") from error

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(offset, bytes, record) of every row."""
        position = 0
        with byte_bar(self.path) as bar:
            for key, record in self._read_groups(0):
                yield key, len(json.dumps(self._leave_out_images(record))), record
                bar.update(key - position)
                position = key

    def read_record(self, key: int) -> dict:
        _, record = next(self._read_groups(key))
        if isinstance(record, BadSampleError):
            raise record
        return record

    def read_raw(self, key: int) -> dict:
        """The text of a row; its pictures stay in the .tar, at the offset that is the key."""
        record = self._leave_out_images(next(self._read_groups(key))[1])
        return {"offset": key, "line": json.dumps(record, ensure_ascii=False)}

    @staticmethod
    def _leave_out_images(record: dict | BadSampleError) -> dict:
        if isinstance(record, BadSampleError):
            return {}
        return {name: value for name, value in record.items() if name != "images"}

    def name_places(self, keys: list[int]) -> list[str]:
        names = []
        for key in keys:
            with open(self.path, "rb") as file:
                _, member, _ = next(list_members(file, key))
            names.append(member.name if member else f"byte {key:,}")
        return names

    def _read_groups(self, start: int) -> Iterator[tuple[int, dict | BadSampleError]]:
        """(offset, record) of the rows from byte `start` on."""
        with open(self.path, "rb") as file:
            for _, group in groupby(list_members(file, start), key=name_row):
                # the offset of the first, and all of them while the file is at their place
                key, record, images = None, {}, {}
                try:
                    for offset, member, archive in group:
                        key = offset if key is None else key
                        read = read_member(archive, member)
                        if isinstance(read, bytes):
                            images[member.name] = read
                        else:
                            record |= read
                    record = join_files(record, images)
                except BadSampleError as error:
                    record = error
                yield key, record


def join_files(record: dict, images: dict[str, bytes]) -> dict:
    """The record of a row: its text, and its pictures by their names in the archive."""
    hint = "pack the files of a row one after the other, as `tar --sort=name` does"
    if images and not record:
        raise BadSampleError("image without a text behind it", f"{min(images)}: {hint}")
    if not images and record.keys() == {"caption"}:
        raise BadSampleError("text without an image behind it", hint)
    # beside "1.jpg", "1.mask.png" is something about it
    plain = [name for name in images if "." not in split_name(name)[1]]
    shown = [images[name] for name in plain or images]
    return {"images": shown} | record if shown else record


def list_members(
    file: BinaryIO, start: int
) -> Iterator[tuple[int, tarfile.TarInfo | None, tarfile.TarFile]]:
    """(byte offset, file, archive) of the files of a .tar from byte `start` on.

    A cut or damaged archive ends with None for a file, at the damage.
    """
    n_bytes = file.seek(0, os.SEEK_END)
    file.seek(start)
    offset, archive = start, None
    while True:
        try:
            archive = archive or tarfile.TarFile(fileobj=file)
            member = archive.next()
        except (tarfile.TarError, OSError, ValueError, OverflowError):
            member = None
        # A damaged size leads back, or behind the end.
        if member is None or archive.offset <= offset:
            if not _is_end(file, offset):
                yield offset, None, archive
            return
        # Otherwise the archive would remember each of a million files.
        archive.members = []
        if member.isfile() and not Path(member.name).name.startswith("."):
            yield offset, member, archive
        offset = min(archive.offset, n_bytes + 1)


def _is_end(file: BinaryIO, offset: int) -> bool:
    """Whether an archive may end at this byte: with the file, or with a blank block."""
    file.seek(max(0, offset - 1))
    part = file.read(1 + tarfile.BLOCKSIZE)
    return bool(part) and not part[1:].strip(b"\0")


def name_row(place: tuple[int, tarfile.TarInfo | None, tarfile.TarFile]) -> str | None:
    """What the files of a row have in common; None for the damage of an archive."""
    _, member, _ = place
    return split_name(member.name)[0] if member else None


def split_name(name: str) -> tuple[str, str]:
    """("sub/0001", "seg.png") of "sub/0001.seg.png", as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo | None) -> dict | bytes:
    """A picture, or what a text adds to its row's record: nothing if it is of no known kind."""
    if member is None:
        raise BadSampleError("archive damaged", "the rest is not read")
    _, suffix = split_name(member.name)
    is_image, last = bool(SUFFIX.search(f".{suffix}")), suffix.rpartition(".")[2]
    if not is_image and last not in ("json", *TEXTS):
        return {}
    what, limit = ("image", MAX_IMAGE_BYTES) if is_image else ("text", MAX_TEXT_BYTES)
    check_size(member.size, what, limit, member.name)
    try:
        content = archive.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        reason = "image damaged" if is_image else "text missing"
        raise BadSampleError(reason, f"{member.name}: {error}") from error
    if is_image:
        return content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("text is not UTF-8", f"{member.name}: {error}") from error
    try:
        value = json.loads(text) if last == "json" else {TEXTS[last]: text.strip()}
    except (ValueError, RecursionError) as error:
        raise BadSampleError("not a JSON object", f"{member.name}: {error}") from error
    if isinstance(value, list):
        value = {"conversations": value}
    if not isinstance(value, dict):
        raise BadSampleError("not a JSON object", f"{member.name} is {value!r:.60}")
    # The picture is in the archive, whatever the text says of its name.
    return {key: one for key, one in value.items() if key not in ("image", "images")}
