"""Where arrays that are slow to make are cached, and when they are used again."""

import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from dataset.index_cache import cache_paths, choose_cache_path, open_cached, save_cached

NUMBERS = np.dtype("<i8")


def make_files(folder: Path) -> list[Path]:
    paths = [folder / name / "data.jsonl" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name, encoding="utf-8")
    return paths


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """Every folder of data, also for root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def find(path: Path, **settings) -> list[int] | None:
    found = open_cached(path, "rows", NUMBERS, **settings)
    return found and found[0].tolist()


def test_an_array_is_found_for_its_file_and_settings_only(tmp_path):
    path, _ = make_files(tmp_path)
    assert find(path) is None
    save_cached(np.arange(3), {"n": 1}, path, "rows", length=5)
    assert find(path, length=5) == [0, 1, 2] and find(path, length=6) is None
    assert open_cached(path, "rows", NUMBERS, length=5)[1] == {"n": 1}
    assert open_cached(path, "rows", np.dtype("<i4"), length=5) is None
    path.write_text("changed", encoding="utf-8")
    assert find(path, length=5) is None


def test_files_of_one_name_in_read_only_folders_have_a_cache_each(tmp_path, read_only):
    first, second = make_files(tmp_path)
    save_cached(np.arange(3), {}, first, "rows")
    assert find(first) == [0, 1, 2] and find(second) is None
    save_cached(np.arange(4), {}, second, "rows")
    assert find(first) == [0, 1, 2] and find(second) == [0, 1, 2, 3]
    assert [*first.parent.iterdir()] == [first]
    own = cache_paths(first, "rows.npy")[1].parent
    assert os.name != "posix" or own.stat().st_mode & 0o777 == 0o700


def test_without_any_folder_nothing_is_cached_and_nothing_ends(tmp_path, read_only):
    path, _ = make_files(tmp_path)
    (tmp_path / "cache").write_text("no folder", encoding="utf-8")
    save_cached(np.arange(3), {}, path, "rows")
    assert find(path) is None
    with pytest.raises(UserError, match=r"neither .*a nor .*minimind-v can be written"):
        choose_cache_path(path, "rows.arrow")
