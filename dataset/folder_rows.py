"""Rows of a folder of pictures, each with a .txt of the same name beside it: its caption."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import BadSampleError
from common.files import MAX_TEXT_BYTES, read_small_file
from dataset.image_names import SUFFIX
from dataset.images import ImageFolder
from dataset.record_rows import RecordRows

TEXT_SUFFIXES = ".txt", ".TXT"


class FolderRows(RecordRows):
    """Rows of a folder: its pictures that have a text, in the order of their names.

    The key of a row is its number.
    """

    container = "one .txt for each picture"

    def __init__(self, path: Path):
        super().__init__(path, ImageFolder(path))
        # An array of bytes: a list of names would be copied to every worker of a loader.
        self.names = np.array(sorted(list_captioned(path)), np.bytes_)

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(number, bytes of text, record) of every picture."""
        for number in range(len(self.names)):
            try:
                record = self.read_record(number)
                yield number, len(record["caption"].encode()), record
            except BadSampleError as error:
                yield number, 0, error

    def keys(self) -> np.ndarray:
        """int64[n]: the number of every picture."""
        return np.arange(len(self.names))

    def read_record(self, key: int) -> dict:
        name = self._name(key)
        texts = [(self.path / name).with_suffix(suffix) for suffix in TEXT_SUFFIXES]
        path = next(filter(os.path.lexists, texts), texts[0])
        try:
            caption = read_small_file(path, "text", MAX_TEXT_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError("text is not UTF-8", f"{name}: {error}") from error
        return {"image": [name], "caption": caption.strip()}

    def read_raw(self, key: int) -> dict:
        return {"line": self._name(key)}

    def name_places(self, keys: list[int]) -> list[str]:
        return [self._name(key) for key in keys]

    def _name(self, key: int) -> str:
        return os.fsdecode(bytes(self.names[key]))


def list_captioned(folder: Path) -> list[bytes]:
    """Names of the pictures in a folder and below it that have a .txt beside them."""
    found = []
    for place, _, files in os.walk(folder):
        below = os.path.relpath(place, folder)
        texts = {file[:-4] for file in files if file.endswith(TEXT_SUFFIXES)}
        pictures = [file for file in files if SUFFIX.search(file) and SUFFIX.sub("", file) in texts]
        found += [os.fsencode(os.path.normpath(os.path.join(below, file))) for file in pictures]
    return found
