"""Rows of a .parquet file, as the newer published sets have them: text and pictures in one file."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from dataset.index_cache import stamp

if TYPE_CHECKING:
    from types import ModuleType

    import pyarrow as pa

COLUMNS = ["conversations", "image_bytes"]
# Rows that are copied together: pictures of about 100 MB.
ROWS_A_BATCH = 1024
# Bytes of the disk that a copy leaves free.
RESERVED_BYTES = 10**9


def import_pyarrow() -> ModuleType:
    """pyarrow, which nothing else of training needs. UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install -r requirements.txt") from error
    return pyarrow


class ParquetRows:
    """Rows of a .parquet file with `conversations` (JSON text) and `image_bytes`.

    The key of a row is its number. A Parquet file gives a row only together with its row group,
    thousands of rows. So the file is copied once, row by row as it is, into an Arrow file beside
    it, which is memory-mapped from then on.
    """

    def __init__(self, path: Path):
        self.path, self.arrow_path = path, copy_to_arrow(path)
        self._open()

    def _open(self) -> None:
        pa = import_pyarrow()
        batches = pa.ipc.open_file(pa.memory_map(str(self.arrow_path))).read_all().to_batches()
        self.batches = [[batch.column(name) for name in COLUMNS] for batch in batches]
        # Number of the first row of each batch, and of all rows.
        self.starts = np.cumsum([0] + [batch.num_rows for batch in batches])

    def __getstate__(self) -> dict:
        # A loader worker that is not forked opens the file itself.
        return {"path": self.path, "arrow_path": self.arrow_path}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def scan(self) -> Iterator[tuple[int, int, dict | None]]:
        """(key, bytes of text, row) of every row; None where its conversations are no JSON."""
        title = f"check {self.path.name}"
        for number in tqdm(self.keys().tolist(), desc=title, unit="row", leave=False, delay=1):
            text, images = self.values(number)
            yield number, len(str(text).encode()), _make_row(text, images)

    def keys(self) -> np.ndarray:
        """int64[n]: the key of every row."""
        return np.arange(self.starts[-1])

    def read(self, number: int) -> dict | None:
        """One row; None where its conversations are no JSON."""
        return _make_row(*self.values(number))

    def values(self, number: int) -> list:
        """[conversations, image_bytes] of one row, as they are in the file."""
        batch = int(np.searchsorted(self.starts, number, side="right")) - 1
        return [column[number - int(self.starts[batch])].as_py() for column in self.batches[batch]]

    def explain(self, number: int) -> str:
        """Why `read` gives None."""
        try:
            return f"it is {json.loads(self.values(number)[0])!r:.60}"
        except (ValueError, RecursionError, TypeError) as error:
            return str(error)

    def name_places(self, numbers: list[int]) -> list[str]:
        """ "row 7" for each of the keys, counted from 1."""
        return [f"row {number + 1}" for number in numbers]

    def images(self, row: dict) -> list[io.BytesIO]:
        """What `load_image` takes for each picture of a row."""
        return [io.BytesIO(image or b"") for image in row["image_bytes"]]

    def check_images(self, row: dict) -> int:
        """How many pictures a row has; none is opened."""
        return len(row["image_bytes"])


def _make_row(text: object, images: bytes | list[bytes] | None) -> dict | None:
    try:
        conversations = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return None
    images = [images] if isinstance(images, bytes) else images or []
    return {"conversations": conversations, "image_bytes": images}


def copy_to_arrow(path: Path) -> Path:
    """The Arrow file with the rows of `path`, made if there is none for this very file.

    Several processes may ask at once: one makes it, the others wait. UserError for a damaged file
    or a full disk.
    """
    from filelock import FileLock

    folder = path.parent if os.access(path.parent, os.W_OK) else Path(tempfile.gettempdir())
    copy = folder / f".{path.name}.arrow"
    expected = json.dumps(stamp(path, file=str(path.resolve())))
    with FileLock(copy.with_suffix(".lock")):
        if _read_stamp(copy) != expected:
            _write_arrow(path, copy, expected)
    return copy


def _read_stamp(copy: Path) -> str | None:
    """The stamp of the file that was copied; None where there is no copy or it is damaged."""
    pa = import_pyarrow()
    try:
        # Closed again, because Windows does not replace a file that is open.
        with pa.memory_map(str(copy)) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
        return metadata.get(b"copied", b"").decode()
    except (OSError, pa.ArrowInvalid):
        return None


def _write_arrow(path: Path, copy: Path, stamped: str) -> None:
    """Copy the rows of a Parquet file; the copy appears whole or not at all."""
    pa = import_pyarrow()
    partial = copy.with_name(f"{copy.name}.partial")
    try:
        # what is copied, and whether there is room for it
        source = pa.parquet.ParquetFile(path)
        _check_disk(source, path, copy.parent)
        fields = [source.schema_arrow.field(name) for name in COLUMNS]
        schema = pa.schema(fields, metadata={"copied": stamped})

        # batch by batch, so that memory does not grow with the file
        with (
            pa.ipc.new_file(str(partial), schema) as file,
            tqdm(
                total=source.metadata.num_rows,
                desc=f"unpack {path.name}",
                unit="row",
                leave=False,
                delay=1,
            ) as progress,
        ):
            for batch in source.iter_batches(ROWS_A_BATCH, columns=COLUMNS):
                file.write_batch(batch.select(COLUMNS).replace_schema_metadata(schema.metadata))
                progress.update(batch.num_rows)
        os.replace(partial, copy)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged or lacks conversations and image_bytes: fetch it again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_disk(source: pa.parquet.ParquetFile, path: Path, folder: Path) -> None:
    """UserError unless the unpacked rows fit into `folder`."""
    groups = map(source.metadata.row_group, range(source.num_row_groups))
    size = sum(group.total_byte_size for group in groups)
    if shutil.disk_usage(folder).free < size + RESERVED_BYTES:
        raise UserError(
            f"{path} needs {size / 1e9:.1f} GB in {folder} for a copy it can be read from: "
            "free some space"
        )
