"""Where a run writes is looked at before anything is loaded."""

import errno
import os
import tempfile
from dataclasses import replace

import pytest

from common.errors import UserError
from trainer.config import TrainConfig
from trainer.paths import check_output, check_space, run_paths


@pytest.fixture
def config(tmp_path):
    return TrainConfig(out_dir=str(tmp_path / "new" / "out"), save_name="mine", dim=64)


def refuse(config: TrainConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_output(config)
    assert "\n" not in str(raised.value)


def test_a_folder_is_made_and_stays_empty(config):
    check_output(config)
    assert os.listdir(config.out_dir) == []


def test_a_folder_that_cannot_be_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(
        replace(config, out_dir=str(tmp_path / "file")), r"cannot write in .*/file \(it is a file"
    )
    refuse(replace(config, out_dir=str(tmp_path / "file/x")), r"file/x \(Not a directory\)")
    refuse(replace(config, out_dir=str(tmp_path / ("x" * 300))), r"\(File name too long\)")


def test_a_full_disk_is_told_at_the_start(config, monkeypatch):
    class FullFile:
        def __init__(self, dir):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", FullFile)
    refuse(config, r"\(No space left on device\): free some space, or choose another --out_dir")
    monkeypatch.undo()
    check_output(config)
    check_space(config, 1000)
    with pytest.raises(
        UserError, match=r"a save takes 10000000.00 GB or more and .* GB left: free"
    ):
        check_space(config, 10**16)


@pytest.mark.parametrize("name", ["a/b", "a\\b", "/a", "..\\a", "", "a\nb", "a\0"])
def test_a_name_is_no_path(config, name):
    refuse(replace(config, save_name=name), "--save_name is .*: give a name, the folder is")


@pytest.mark.parametrize("letter", ["x", "é", "名"])
def test_a_name_is_as_long_as_the_longest_file_allows(config, letter):
    """Every file of the run, and what it is called while it is written."""
    size = len(letter.encode())
    refuse(replace(config, save_name=letter * (250 // size)), "a file's name has at most .* left")
    longest = replace(config, save_name=letter * (220 // size))
    check_output(longest)
    for path in run_paths(longest, 64):
        partial = path.with_name(f".{path.name}.{2**22}.partial")
        partial.write_text("")
        partial.rename(path)


def test_a_folder_in_the_place_of_a_file_is_named(config):
    check_output(config)
    run_paths(config, 64).weights.mkdir()
    refuse(config, "mine_64.pth is a folder: move it away, or choose another --save_name")
