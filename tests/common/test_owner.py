"""One owner for the files of a run; processes that end with the one that started them."""

import os
import subprocess
import sys

import pytest

from common.errors import UserError
from common.owner import Owner, sweep_partials
from tests.helpers import ROOT

HOLD = "import sys, time\nfrom pathlib import Path\nfrom common.owner import Owner\n"
HOLD += "owner = Owner(Path(sys.argv[1]), 'it')\nprint(owner.is_held, flush=True)\n"
HOLD += "time.sleep(600)\n"


@pytest.fixture
def other(tmp_path):
    """Another process that owns the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("common.owner.LOCK_SECONDS", 0.2)


def test_a_second_owner_is_refused_until_the_first_is_dead(other, tmp_path):
    path = tmp_path / "run.lock"
    with pytest.raises(UserError, match=rf"process {other.pid} on \S+ writes out/x: wait"):
        Owner(path, "out/x: wait")
    other.kill()
    other.wait()
    owner = Owner(path, "out/x: wait")
    assert owner.is_held and f"process {os.getpid()} " in path.read_text()
    # an error in a notebook leaves one behind
    again = Owner(path, "out/x: wait")
    again.release()
    assert not owner.is_held and not path.exists()


def test_a_folder_that_takes_no_lock_refuses_nobody(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert not Owner(tmp_path / "file/run.lock", "it").is_held

    def unknown(*_):
        raise OSError(38, "no locks on this drive")

    monkeypatch.setattr("fcntl.flock", unknown)
    owner = Owner(tmp_path / "run.lock", "it")
    owner.release()
    assert not owner.is_held


def test_only_halves_of_the_owners_files_are_swept(tmp_path):
    names = [".run_64.pth.17.partial", ".run_64.log.jsonl.1.partial", ".run_64.pth"]
    names += [".run_64_b.pth.17.partial", "run_64.pth", ".other_64.pth.17.partial"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".run_64.folder.1.partial").mkdir()
    sweep_partials(tmp_path, "run_64.")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[2:], ".run_64.folder.1.partial"}
    sweep_partials(tmp_path / "nowhere", "run_64.")


def test_a_process_follows_its_parent(tmp_path):
    """The child of a process that is killed."""
    child = "from common.owner import follow_parent\nimport time\nfollow_parent()\n"
    child += "print('follows', flush=True)\ntime.sleep(600)\n"
    parent = "import subprocess, sys, time\n"
    parent += "subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
    parent += "time.sleep(600)\n"
    command = [sys.executable, "-c", parent, child]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "follows\n"
    process.kill()
    process.wait()
    # The child holds the other end of the pipe; the test would wait for it forever.
    assert process.stdout.read() == ""
