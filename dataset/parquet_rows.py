"""Rows of a .parquet file: text and pictures in one file, as the newer published sets have them."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import BadSampleError
from common.files import shorten_hash
from dataset.formats import Row
from dataset.images import ImageFolder, ImageZip
from dataset.parquet_copy import open_copy, parse_row
from dataset.record_rows import RecordRows

# How a picture that is not read yet begins among the images of a row, before 8 bytes of its number.
MARK = b"\0picture"


class ParquetRows(RecordRows):
    """Rows of a .parquet file. The key of a row is its number.

    A row whose only picture is a placeholder, without `<image>`, is a row of text. UserError where
    the file cannot be read, or has no room for its copy.
    """

    container = "Parquet"

    def __init__(self, path: Path, images: ImageFolder | ImageZip | None = None):
        super().__init__(path, images)
        self._copy = open_copy(path)

    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(number, bytes of text, record) of every row.

        No picture is read: what a row has in its place is for `images` and `check_images` alone.
        """
        title, rows = f"check {self.path.name}", self._copy.rows
        texts = tqdm(rows.iterate("record"), title, len(rows), unit="row", leave=False, delay=1)
        with texts:
            for number, text in enumerate(texts):
                try:
                    yield number, len(text), parse_row(text, _mark)
                except BadSampleError as error:
                    yield number, len(text), error

    def keys(self) -> np.ndarray:
        """int64[n]: the number of every row."""
        return np.arange(len(self._copy.rows))

    def read_record(self, key: int) -> dict:
        return parse_row(self._copy.read_row(key), self._copy.read_picture)

    def read_raw(self, key: int) -> dict:
        """The text of a row as it came, and the files of its pictures; neither of a damaged row."""
        numbers = []
        try:
            record = parse_row(self._copy.read_row(key), numbers.append, keeps_placeholders=True)
            images = [*map(self._copy.read_picture, numbers)]
        except BadSampleError:
            return {"conversations": None, "image_bytes": []}
        text = record.get("conversations")
        if not isinstance(text, str):
            text = json.dumps(record, ensure_ascii=False)
        return {"conversations": text, "image_bytes": images}

    def name_places(self, keys: list[int]) -> list[str]:
        """ "row 7" for each of the keys, counted from 1."""
        return [f"row {key + 1}" for key in keys]

    def images(self, row: Row) -> list[Path | io.BytesIO]:
        return super().images(replace(row, images=[*map(self._read_marked, row.images)]))

    def _check_image(self, image: str | bytes) -> int:
        number = self._find_number(image)
        return super()._check_image(image) if number is None else int(self._identities[number])

    def _read_marked(self, image: str | bytes) -> str | bytes:
        """A picture's file in place of the mark that stands for it."""
        number = self._find_number(image)
        return image if number is None else self._copy.read_picture(number)

    def _find_number(self, image: str | bytes) -> int | None:
        """The number of the picture that a mark stands for; None for a picture itself."""
        if isinstance(image, str) or len(image) != len(MARK) + 8 or not image.startswith(MARK):
            return None
        number = int.from_bytes(image[len(MARK) :], "little")
        return number if number < len(self._copy.pictures) else None

    @cached_property
    def _identities(self) -> np.ndarray:
        """uint64[n] of all pictures: 8 bytes of memory each, while rows are checked."""
        return np.fromiter(map(shorten_hash, self._copy.pictures.iterate("hash")), np.uint64)


def _mark(number: int) -> bytes:
    return MARK + number.to_bytes(8, "little")
