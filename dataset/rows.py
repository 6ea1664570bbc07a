"""Rows of a data file, any of them by its key, in memory that does not grow with the file."""

import io
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from filelock import FileLock
from tqdm import tqdm

from common.errors import BadSampleError, UserError
from dataset.images import ImageFolder, ImageZip, split_names
from dataset.index_cache import stamp

COLUMNS = ["conversations", "image_bytes"]  # of the published Parquet files
ROWS_A_BATCH = 1024  # that are copied together
KEEP_FREE = 10**9  # bytes of the disk that a copy leaves alone


class JsonLinesRows:
    """Rows of a .jsonl file by their byte offsets: one seek to read one. Their pictures are in a folder or .zip."""

    def __init__(self, path: Path, images: ImageFolder | ImageZip | None):
        self.path, self.image_source = path, images

    def scan(self) -> Iterator[tuple[int, int, dict | None]]:
        """(offset, bytes, row) of every line; the row is None where the line is no JSON object."""
        size = self.path.stat().st_size
        title = f"check {self.path.name}"
        with (
            open(self.path, "rb") as file,
            tqdm(
                total=size, desc=title, unit="B", unit_scale=True, leave=False, delay=1
            ) as progress,
        ):
            offset = 0
            for line in file:
                if line.strip():
                    yield offset, len(line), self._parse(line)
                offset += len(line)
                progress.update(len(line))

    def read(self, offset: int) -> dict | None:
        return self._parse(self.read_line(offset))

    def read_line(self, offset: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.readline()

    def keys(self) -> np.ndarray:
        """int64[n]: the offset of every line that is not blank."""
        offsets, offset = array("q"), 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(offset)
                offset += len(line)
        return np.frombuffer(offsets, np.int64) if offsets else np.empty(0, np.int64)

    def explain(self, offset: int) -> str:
        """Why `read` gives None."""
        try:
            return f"it is {json.loads(self.read_line(offset).decode('utf-8-sig'))!r:.60}"
        except (ValueError, RecursionError) as error:
            return str(error)

    def name_places(self, offsets: list[int]) -> list[str]:
        """ "line 7" for each of the offsets, as an editor counts."""
        n_lines, counted, names = 1, 0, {}
        with open(self.path, "rb") as file:
            for offset in sorted(offsets):
                while counted < offset:
                    part = file.read(min(offset - counted, 2**20))
                    n_lines, counted = n_lines + part.count(b"\n"), counted + len(part)
                names[offset] = f"line {n_lines}"
        return [names[offset] for offset in offsets]

    @staticmethod
    def _parse(line: bytes) -> dict | None:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        return row if isinstance(row, dict) else None

    def images(self, row: dict) -> list[Path | io.BytesIO]:
        """What `load_image` takes for each image of the row; BadSampleError where one cannot be had."""
        names = split_names(row.get("image"))
        if names and self.image_source is None:
            raise BadSampleError("image missing", f"{names[0]}: no image folder is given")
        return [self.image_source.find(name) for name in names]

    def check_images(self, row: dict, listed: set[str] | None) -> int:
        """How many images the row has, all of which are there; BadSampleError otherwise. `listed`: what `list_names` gave."""
        names = split_names(row.get("image"))
        if names and self.image_source is None:
            raise BadSampleError("image missing", f"{names[0]}: no image folder is given")
        for name in names:
            if isinstance(self.image_source, ImageFolder):
                self.image_source.find(name, listed)
            elif name not in self.image_source:
                raise BadSampleError("image missing", name)
        return len(names)


class ParquetRows:
    """Rows of a .parquet file with `conversations` (JSON text) and `image_bytes` (bytes or a list of bytes).

    A row of a Parquet file cannot be had without unpacking its row group, thousands of rows. So the file is copied once, row by
    row as it is, into an Arrow file beside it, which is memory-mapped from then on.
    """

    def __init__(self, path: Path):
        self.path, self.arrow_path = path, copy_to_arrow(path)
        self._open()

    def _open(self) -> None:
        batches = pa.ipc.open_file(pa.memory_map(str(self.arrow_path))).read_all().to_batches()
        self.batches = [[batch.column(name) for name in COLUMNS] for batch in batches]
        self.starts = np.cumsum([0] + [batch.num_rows for batch in batches])

    def __getstate__(self) -> dict:  # a loader worker that is not forked opens the file itself
        return {"path": self.path, "arrow_path": self.arrow_path}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def scan(self) -> Iterator[tuple[int, int, dict | None]]:
        """(number, bytes of text, row) of every row; the row is None where its conversations are no JSON."""
        for number in tqdm(
            range(self.starts[-1]), desc=f"check {self.path.name}", unit="row", leave=False, delay=1
        ):
            text, _ = self.values(number)
            yield number, len(str(text).encode()), self.read(number)

    def keys(self) -> np.ndarray:
        """int64[n]: the number of every row."""
        return np.arange(self.starts[-1])

    def read(self, number: int) -> dict | None:
        text, images = self.values(number)
        try:
            conversations = json.loads(text) if isinstance(text, str) else text
        except (ValueError, RecursionError):
            return None
        return {
            "conversations": conversations,
            "image_bytes": [images] if isinstance(images, bytes) else images or [],
        }

    def explain(self, number: int) -> str:
        """Why `read` gives None."""
        try:
            return f"it is {json.loads(self.values(number)[0])!r:.60}"
        except (ValueError, RecursionError, TypeError) as error:
            return str(error)

    def name_places(self, numbers: list[int]) -> list[str]:
        """ "row 7" for each of the numbers, counted from 1."""
        return [f"row {number + 1}" for number in numbers]

    def values(self, number: int) -> list:
        """[conversations, image_bytes] as they are in the file."""
        batch = int(np.searchsorted(self.starts, number, side="right")) - 1
        return [column[number - int(self.starts[batch])].as_py() for column in self.batches[batch]]

    def images(self, row: dict) -> list[io.BytesIO]:
        """What `load_image` takes for each image of the row."""
        return [io.BytesIO(image or b"") for image in row["image_bytes"]]

    def check_images(self, row: dict, listed: None) -> int:
        return len(row["image_bytes"])


def copy_to_arrow(path: Path) -> Path:
    """The Arrow file with the rows of `path`, made where there is none for this very file. UserError for a damaged file or a full
    disk. Several processes may ask at once: one makes it."""
    folder = path.parent if os.access(path.parent, os.W_OK) else Path(tempfile.gettempdir())
    copy = folder / f".{path.name}.arrow"
    expected = json.dumps(stamp(path, file=str(path.resolve())))
    with FileLock(copy.with_suffix(".lock")):
        if _read_stamp(copy) != expected:
            _write_arrow(path, copy, expected)
    return copy


def _read_stamp(copy: Path) -> str | None:
    try:
        schema = pa.ipc.open_file(pa.memory_map(str(copy))).schema
        return (schema.metadata or {}).get(b"copied", b"").decode()
    except (OSError, pa.ArrowInvalid):
        return None


def _write_arrow(path: Path, copy: Path, stamped: str) -> None:
    partial = copy.with_name(f"{copy.name}.partial")
    try:
        source = parquet.ParquetFile(path)
        n_rows, schema = source.metadata.num_rows, source.schema_arrow
        size = sum(
            source.metadata.row_group(group).total_byte_size
            for group in range(source.num_row_groups)
        )
        if shutil.disk_usage(copy.parent).free < size + KEEP_FREE:
            raise UserError(
                f"{path} needs {size / 1e9:.1f} GB in {copy.parent} for a copy it can be read from: free some space"
            )
        schema = pa.schema([schema.field(name) for name in COLUMNS], metadata={"copied": stamped})
        with (
            pa.ipc.new_file(str(partial), schema) as file,
            tqdm(
                total=n_rows, desc=f"unpack {path.name}", unit="row", leave=False, delay=1
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
