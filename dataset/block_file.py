"""Items in one file, any of them by its number, in memory that does not grow with the file.

It is an Arrow file: items in blocks of an equal number, memory-mapped, so that any number of
processes share what one of them has read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError


def import_pyarrow():
    """pyarrow, which nothing else of training needs. UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install -r requirements.txt") from error
    return pyarrow


class BlockWriter:
    """Writes items one after the other; `close` ends the file.

    Args:
        file: open for writing.
        columns: Arrow type of each value of an item, by its name.
        stamp: a text that says what the file was made from.
        block: items that are written and read together: more are smaller, fewer are read faster.
        compression: "zstd", or None for what does not shrink.
    """

    def __init__(
        self,
        file: BinaryIO,
        columns: dict[str, str],
        stamp: str,
        block: int,
        compression: str | None = None,
    ):
        self._pa = pa = import_pyarrow()
        fields = [(name, getattr(pa, kind)()) for name, kind in columns.items()]
        self._schema = pa.schema(fields, {"stamp": stamp, "block": str(block)})
        # Blocks are small: threads would wait for each other.
        options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
        self._writer = pa.ipc.new_file(file, self._schema, options=options)
        self._size, self._block = block, []
        self._n_items = 0

    def __len__(self) -> int:
        return self._n_items

    def add(self, *values) -> int:
        """Append an item; returns its number."""
        self._block.append(values)
        self._n_items += 1
        if len(self._block) == self._size:
            self._flush()
        return self._n_items - 1

    def _flush(self) -> None:
        types = [field.type for field in self._schema]
        columns = [self._pa.array(one, kind) for one, kind in zip(zip(*self._block), types)]
        self._writer.write_batch(self._pa.record_batch(columns, schema=self._schema))
        self._block = []

    def close(self) -> None:
        if self._block:
            self._flush()
        self._writer.close()


class BlockFile:
    """What BlockWriter wrote.

    Args:
        path: of the file. OSError or ValueError where it is missing or damaged.
    """

    def __init__(self, path: Path):
        pa = import_pyarrow()
        self.path = path
        self._file = pa.memory_map(str(path))
        # Threads would not survive the fork of a loader's workers.
        options = pa.ipc.IpcReadOptions(use_threads=False)
        self._blocks = pa.ipc.open_file(self._file, options=options)
        metadata = self._blocks.schema.metadata or {}
        self.stamp = metadata.get(b"stamp", b"").decode()
        self._size = int(metadata.get(b"block", 1))
        last = self._blocks.num_record_batches - 1
        n_last = 0 if last < 0 else self._blocks.get_batch(last).num_rows
        self._n_items = max(0, last) * self._size + n_last

    def __reduce__(self) -> tuple:
        # A loader worker that is not forked opens the file itself.
        return BlockFile, (self.path,)

    def __len__(self) -> int:
        return self._n_items

    def read(self, number: int, column: str):
        """One value of the item of that number."""
        block, place = divmod(number, self._size)
        return self._blocks.get_batch(block).column(column)[place].as_py()

    def iterate(self, column: str) -> Iterator:
        """That value of every item."""
        for block in range(self._blocks.num_record_batches):
            yield from self._blocks.get_batch(block).column(column).to_pylist()

    def close(self) -> None:
        """Windows replaces no file that is open."""
        self._file.close()
