"""What is slow to make is cached beside the file it was made from, and memory-mapped next time.

`data.jsonl` gets `.data.jsonl.rows.npy`, an array, and `.data.jsonl.rows.json`, a summary and the
stamp of the file it was made from. Where its folder is read-only, both go to the user's own cache.
"""

import json
import os
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_write, hash_bytes

# Of what is cached. Count it up when the content changes: older caches are then made anew.
FORMAT = 2


def cache_paths(source: Path, kind: str) -> list[Path]:
    """Where a cached file of this kind may be: beside `source`, or in the user's own cache.

    The second name tells files of one name in several folders apart.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = Path(cache) / "minimind-v"
    place = hash_bytes(os.fsencode(source.resolve()), size=8).hex()
    return [source.with_name(f".{source.name}.{kind}"), own / f"{place}.{source.name}.{kind}"]


def choose_cache_path(source: Path, kind: str) -> Path:
    """Where to cache a file of this kind: beside `source` if its folder can be written.

    UserError where the user's own cache cannot be written either.
    """
    beside, own = cache_paths(source, kind)
    if os.access(source.parent, os.W_OK):
        return beside
    try:
        # For this user alone: what is read from it is trusted.
        own.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"neither {source.parent} nor {own.parent} can be written ({error.strerror}): name "
            "another folder in XDG_CACHE_HOME"
        ) from error
    return own


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
    for array_path in cache_paths(source, f"{kind}.npy"):
        try:
            cached = json.loads(array_path.with_suffix(".json").read_text(encoding="utf-8"))
            array = np.load(array_path, mmap_mode="r", allow_pickle=False)
            is_current = cached["stamp"] == stamp(source, **settings)
            if is_current and array.dtype == dtype and len(array) == cached["rows"]:
                return array, cached["summary"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def save_cached(array: np.ndarray, summary: dict, source: Path, kind: str, **settings) -> None:
    """Cache an array for the file it describes, if there is a folder that can be written.

    Args:
        array: what is cached, of any dtype without objects.
        summary: counts that belong to it, as JSON has them.
        source, kind, settings: see `open_cached`.
    """
    content = {"stamp": stamp(source, **settings), "rows": len(array), "summary": summary}
    try:
        array_path = choose_cache_path(source, f"{kind}.npy")
        summary_path = array_path.with_suffix(".json")
        # In this order no summary stands beside another array, whenever the process stops.
        summary_path.unlink(missing_ok=True)
        with atomic_write(array_path) as file:
            np.save(file, array)
        with atomic_write(summary_path) as file:
            file.write(json.dumps(content).encode())
    except (OSError, UserError):
        # A disk that is full, or no folder at all: the array is made anew next time.
        pass
