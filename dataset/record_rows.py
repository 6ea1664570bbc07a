"""What all readers of records share: a record becomes a `Row`, its pictures files that exist."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import BadSampleError
from common.files import hash_to_int
from dataset.formats import Row, convert, name_format
from dataset.images import ImageFolder, ImageZip

# Rows that are looked at for the name of a file's format.
LOOKED_AT = 100


class RecordRows(ABC):
    """Rows of a file, any of them by its key, in memory that does not grow with the file.

    Args:
        path: the file.
        images: where the pictures are that its rows name, see `open_images`; None if there is no
            such place.
    """

    # What the file is, if not one row a line.
    container = ""

    def __init__(self, path: Path, images: ImageFolder | ImageZip | None):
        self.path, self.image_source = path, images

    @abstractmethod
    def read_records(self) -> Iterator[tuple[int, int, dict | BadSampleError]]:
        """(key, bytes, record) of every row; why where there is none."""

    @abstractmethod
    def read_record(self, key: int) -> dict:
        """One record as it came. BadSampleError where there is none."""

    @abstractmethod
    def read_raw(self, key: int) -> dict:
        """A row as it came, whatever it is, for a file of rejects."""

    @abstractmethod
    def name_places(self, keys: list[int]) -> list[str]:
        """ "line 7" for each of the keys, as an editor counts."""

    @cached_property
    def format(self) -> str:
        """What its first row looks like: "LLaVA", "captions (a table)", ..."""
        records = (record for _, _, record in islice(self.read_records(), LOOKED_AT))
        names = (name_format(record) for record in records if isinstance(record, dict))
        name = next((name for name in names if name != "unknown"), "unknown")
        return f"{name} ({self.container})" if self.container else name

    def scan(self) -> Iterator[tuple[int, int, Row | BadSampleError]]:
        """(key, bytes, row) of every row; why where it cannot be read."""
        for key, n_bytes, record in self.read_records():
            row = record
            if not isinstance(record, BadSampleError):
                try:
                    row = convert(record)
                except BadSampleError as error:
                    row = error
            yield key, n_bytes, row

    def keys(self) -> np.ndarray:
        """int64[n]: the key of every row."""
        return np.fromiter((key for key, _, _ in self.read_records()), np.int64)

    def read(self, key: int) -> Row:
        """One row. BadSampleError where it cannot be read."""
        return convert(self.read_record(key))

    def images(self, row: Row) -> list[Path | io.BytesIO]:
        """What `load_image` takes for each picture of a row. BadSampleError where it cannot be."""
        return [
            io.BytesIO(image) if isinstance(image, bytes) else self._source(image).find(image)
            for image in row.images
        ]

    def check_images(self, row: Row) -> list[int]:
        """64 bits that tell each picture of a row from others; none is opened.

        BadSampleError unless all are there.
        """
        return [self._check_image(image) for image in row.images]

    def _check_image(self, image: str | bytes) -> int:
        if isinstance(image, bytes):
            return hash_to_int(image)
        return self._source(image).identify(image)

    def _source(self, name: str) -> ImageFolder | ImageZip:
        if self.image_source is None:
            raise BadSampleError("image missing", f"{name}: no image folder is given")
        return self.image_source


def byte_bar(path: Path) -> tqdm:
    """A progress bar of a file's bytes: how many rows it has is known at the end only."""
    size, title = path.stat().st_size, f"check {path.name}"
    return tqdm(total=size, desc=title, unit="B", unit_scale=True, leave=False, delay=1)
