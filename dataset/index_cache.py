"""Arrays that are slow to make, cached beside the file they describe and memory-mapped next time.

`data.jsonl` gets `.data.jsonl.rows.npy`, the array, and `.data.jsonl.rows.json`, a summary and the
stamp of the file it was made from.
"""

import json
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_write

# Of what is cached. Count it up when the content changes: older caches are then made anew.
FORMAT = 2


def cache_paths(source: Path, kind: str) -> tuple[Path, Path]:
    """Where the array and the summary of this `kind` are cached."""
    name = f".{source.name}.{kind}"
    return source.with_name(f"{name}.npy"), source.with_name(f"{name}.json")


def stamp(source: Path, **settings) -> dict:
    """What a cached array depends on: the file as it is now, and `settings` (numbers, text)."""
    status = source.stat()
    return {"format": FORMAT, "bytes": status.st_size, "modified": status.st_mtime_ns, **settings}


def open_cached(
    source: Path, kind: str, dtype: np.dtype, **settings
) -> tuple[np.ndarray, dict] | None:
    """Open what `save_cached` wrote.

    Args:
        source: the file that the array describes.
        kind: a word for what the array holds, part of its file name.
        dtype: of the array.
        settings: what the array depends on besides the file.

    Returns:
        (array, summary), or None where there is none for this very file and these settings, or it
        is damaged.
    """
    array_path, summary_path = cache_paths(source, kind)
    try:
        cached = json.loads(summary_path.read_text(encoding="utf-8"))
        array = np.load(array_path, mmap_mode="r", allow_pickle=False)
        is_current = cached["stamp"] == stamp(source, **settings)
        is_whole = array.dtype == dtype and len(array) == cached["rows"]
        return (array, cached["summary"]) if is_current and is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_cached(array: np.ndarray, summary: dict, source: Path, kind: str, **settings) -> None:
    """Cache an array beside the file it describes, if that folder can be written.

    Args:
        array: what is cached, of any dtype without objects.
        summary: counts that belong to it, as JSON has them.
        source, kind, settings: see `open_cached`.
    """
    array_path, summary_path = cache_paths(source, kind)
    content = {"stamp": stamp(source, **settings), "rows": len(array), "summary": summary}
    try:
        # In this order no summary stands beside another array, whenever the process stops.
        summary_path.unlink(missing_ok=True)
        with atomic_write(array_path) as file:
            np.save(file, array)
        with atomic_write(summary_path) as file:
            file.write(json.dumps(content).encode())
    except (OSError, UserError):
        # A folder that is full or read-only: the array is made anew next time.
        pass
