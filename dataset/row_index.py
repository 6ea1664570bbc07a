"""Which rows of a data file are usable, found once and kept beside it, so that a large set opens at once the next time."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FORMAT = 1  # of the index; another number makes old ones be built anew
KEPT_FROM = 50_000  # rows; fewer are checked in a second or two
ROW = np.dtype([("key", "<i8"), ("length", "<i4")])


@dataclass
class RowIndex:
    """`rows` has each usable row's place in the file and its estimated tokens: 12 bytes a row, in memory or mapped."""

    rows: np.ndarray  # ROW[n]
    skipped: Counter[str] = field(default_factory=Counter)  # rows that cannot be used, by reason
    repaired: int = 0  # rows with `<image>` tags to spare
    n_images: int = 0

    @property
    def n_read(self) -> int:
        """Rows of the file, usable or not."""
        return len(self.rows) + sum(self.skipped.values())


def _files(data_path: Path) -> tuple[Path, Path]:
    return tuple(data_path.with_name(f".{data_path.name}.index.{ending}") for ending in ("npy", "json"))


def _stamp(data_path: Path, **settings) -> dict:
    """What an index depends on. Images are not part of it: one that is gone is noticed when it is read."""
    status = data_path.stat()
    return {"format": FORMAT, "bytes": status.st_size, "modified": status.st_mtime_ns, **settings}


def open_index(data_path: Path, **settings) -> RowIndex | None:
    """The index that was kept for this very file and these settings, memory-mapped; None where there is none or it is damaged."""
    rows_path, summary_path = _files(data_path)
    try:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        rows = np.load(rows_path, mmap_mode="r", allow_pickle=False)
        if summary["stamp"] != _stamp(data_path, **settings) or rows.dtype != ROW or len(rows) != summary["rows"]:
            return None
        return RowIndex(rows, Counter(summary["skipped"]), summary["repaired"], summary["n_images"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_index(index: RowIndex, data_path: Path, **settings) -> None:
    """Write a large index beside its file. Not where images were missing: it would hide those that arrive later. Where the
    folder cannot be written, rows are checked at each start."""
    if index.n_read < KEPT_FROM or index.skipped["image missing"]:
        return
    rows_path, summary_path = _files(data_path)
    summary = {"stamp": _stamp(data_path, **settings), "rows": len(index.rows), "skipped": index.skipped}
    summary |= {"repaired": index.repaired, "n_images": index.n_images}
    partial = rows_path.with_name(f"{rows_path.name}.{os.getpid()}.partial")
    try:
        summary_path.unlink(missing_ok=True)  # no summary of other rows, whenever the process stops
        with open(partial, "wb") as file:
            np.save(file, index.rows)
        os.replace(partial, rows_path)
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(summary, file)
        os.replace(partial, summary_path)
    except OSError:
        partial.unlink(missing_ok=True)
