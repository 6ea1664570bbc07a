"""Rows of a data file, any of them by its key, in memory that does not grow with the file.

A row is a conversation and its pictures. In a .jsonl file it is one JSON object a line:

    {"image": "a.jpg",      or "a.jpg, b.jpg", or ["a.jpg", "b.jpg"]; left out in text-only rows
     "conversations": [{"role": "user", "content": "<image>\\nWhat is this?"},
                       {"role": "assistant", "content": "A cat."}]}

In a .parquet file it has two columns, see dataset/parquet_rows.py:

    conversations           the same list, as JSON text
    image_bytes             the files of its pictures: bytes, or a list of bytes

The way of a picture, up to its pixels:

    "a.jpg"      ── ImageFolder.find ──> Path ──────┐
    "a.jpg"      ── ImageZip.find ─────> BytesIO ───┼── load_image ──> RGB ── CLIP's processor
    image_bytes  ──────────────────────> BytesIO ───┘   (model/image.py)      (model/processing.py)

Nothing is opened before `load_image`: rows are checked and cut to length without their pixels.
"""

import io
import json
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import BadSampleError, MissingFileError
from dataset.images import ImageFolder, ImageZip, open_images, split_names
from dataset.parquet_rows import ParquetRows


class JsonLinesRows:
    """Rows of a .jsonl file. The key of a row is its byte offset: one seek to read it.

    Args:
        path: the .jsonl file.
        images: where its pictures are, see `open_images`; None if there is no such place.
    """

    def __init__(self, path: Path, images: ImageFolder | ImageZip | None):
        self.path, self.image_source = path, images

    def scan(self) -> Iterator[tuple[int, int, dict | None]]:
        """(key, bytes, row) of every line; the row is None where the line is no JSON object."""
        # The bar counts bytes: how many lines there are is known at the end only.
        progress = tqdm(
            total=self.path.stat().st_size,
            desc=f"check {self.path.name}",
            unit="B",
            unit_scale=True,
            leave=False,
            delay=1,
        )
        with progress:
            for offset, line in self._read_lines():
                if line.strip():
                    yield offset, len(line), self._parse(line)
                progress.update(len(line))

    def keys(self) -> np.ndarray:
        """int64[n]: the key of every line that is not blank."""
        offsets = array("q", (offset for offset, line in self._read_lines() if line.strip()))
        return np.array(offsets, np.int64)

    def read(self, offset: int) -> dict | None:
        """One row; None where the line is no JSON object."""
        return self._parse(self.read_line(offset))

    def read_line(self, offset: int) -> bytes:
        """One row as it is in the file."""
        # Opened each time: an open file could not be sent to the workers of a loader.
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.readline()

    def explain(self, offset: int) -> str:
        """Why `read` gives None."""
        try:
            return f"it is {json.loads(self.read_line(offset).decode('utf-8-sig'))!r:.60}"
        except (ValueError, RecursionError) as error:
            return str(error)

    def name_places(self, offsets: list[int]) -> list[str]:
        """ "line 7" for each of the keys, as an editor counts."""
        # Line breaks are counted once, from the first row to the last, a megabyte at a time.
        n_lines, position, names = 1, 0, {}
        with open(self.path, "rb") as file:
            for offset in sorted(offsets):
                while position < offset:
                    part = file.read(min(offset - position, 2**20))
                    n_lines += part.count(b"\n")
                    position += len(part)
                names[offset] = f"line {n_lines}"
        return [names[offset] for offset in offsets]

    def images(self, row: dict) -> list[Path | io.BytesIO]:
        """What `load_image` takes for each picture of a row. BadSampleError where it cannot be."""
        return [self.image_source.find(name) for name in self._image_names(row)]

    def check_images(self, row: dict) -> int:
        """How many pictures a row has. BadSampleError unless all are there; none is opened."""
        names = self._image_names(row)
        for name in names:
            self.image_source.check(name)
        return len(names)

    def _image_names(self, row: dict) -> list[str]:
        names = split_names(row.get("image"))
        if names and self.image_source is None:
            raise BadSampleError("image missing", f"{names[0]}: no image folder is given")
        return names

    def _read_lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of every line, blank ones too."""
        offset = 0
        with open(self.path, "rb") as file:
            for line in file:
                yield offset, line
                offset += len(line)

    @staticmethod
    def _parse(line: bytes) -> dict | None:
        # Some editors put three bytes before the first line ("-sig") that are no part of it.
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        return row if isinstance(row, dict) else None


# What reads rows: both classes have the same methods, but for `read_line` and `values`.
Rows = JsonLinesRows | ParquetRows


def open_rows(data_path: str | Path, images_path: str | Path | None) -> Rows:
    """The rows of a data file.

    Args:
        data_path: a .jsonl or .parquet file.
        images_path: folder or .zip of the pictures that a .jsonl names; None if there is none.

    MissingFileError where there is no such file, UserError where it cannot be read.
    """
    path = check_data_file(data_path)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    return JsonLinesRows(path, open_images(images_path))


def check_data_file(path: str | Path) -> Path:
    """The data file `path`; MissingFileError, which says how to get it, where it does not exist."""
    if not Path(path).is_file():
        raise MissingFileError(
            f"no data at {path}: fetch the published sets with "
            "`python -m scripts.download pretrain-data sft-data`, or name another file"
        )
    return Path(path)
