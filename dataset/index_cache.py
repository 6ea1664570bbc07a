"""Arrays that are slow to make, kept beside the file they are about and memory-mapped the next time."""

import json
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_write

FORMAT = 2  # of what is kept; another number makes old ones be made anew


def cache_files(source: Path, kind: str) -> tuple[Path, Path]:
    return tuple(source.with_name(f".{source.name}.{kind}.{ending}") for ending in ("npy", "json"))


def stamp(source: Path, **settings) -> dict:
    """What a kept array depends on: the file as it is now, and `settings` (numbers and text)."""
    status = source.stat()
    return {"format": FORMAT, "bytes": status.st_size, "modified": status.st_mtime_ns, **settings}


def open_cached(
    source: Path, kind: str, dtype: np.dtype, **settings
) -> tuple[np.ndarray, dict] | None:
    """(array, summary) kept for this very file and these settings; None where there is none or it is damaged."""
    array_path, summary_path = cache_files(source, kind)
    try:
        kept = json.loads(summary_path.read_text(encoding="utf-8"))
        array = np.load(array_path, mmap_mode="r", allow_pickle=False)
        if (
            kept["stamp"] != stamp(source, **settings)
            or array.dtype != dtype
            or len(array) != kept["rows"]
        ):
            return None
        return array, kept["summary"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_cached(array: np.ndarray, summary: dict, source: Path, kind: str, **settings) -> None:
    """Write `array` and `summary` (JSON) beside `source`; nothing happens where its folder cannot be written."""
    array_path, summary_path = cache_files(source, kind)
    kept = {"stamp": stamp(source, **settings), "rows": len(array), "summary": summary}
    try:
        summary_path.unlink(
            missing_ok=True
        )  # no summary of another array, whenever the process stops
        with atomic_write(array_path) as file:
            np.save(file, array)
        with atomic_write(summary_path) as file:
            file.write(json.dumps(kept).encode())
    except (OSError, UserError):
        pass
