"""A run ends when it is told to, whatever it waits for, and none trains on unseen."""

import os
import signal
import threading
import time

import psutil
import pytest

from scripts.processes import as_flags, free_port
from tests.helpers import ROOT, run_script, start_script, wait_for_steps
from trainer.stop import StopSignal

# A run whose pictures lie on a drive that stops to answer after so many of them.
STUCK = """
import os, runpy, sys
import trainer.collate, trainer.stop
trainer.stop.PATIENCE = float(sys.argv[1])
path, read = sys.argv[2], trainer.collate.read_image_bytes
def read_or_hang(image):
    if os.path.exists(path):
        open(path, "rb").read()
    return read(image)
trainer.collate.read_image_bytes = read_or_hang
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def flags(options, tmp_path) -> list[str]:
    changes = dict(epochs=100_000, out_dir=tmp_path, feature_cache_gb=0, save_interval=1)
    return as_flags(**(options | changes))


def start_stuck(flags, tmp_path, patience: float, *more):
    """A run that hangs in reading a FIFO after its first steps; its process."""
    fifo, command = tmp_path / "fifo", ("train_sft_vlm.py", *flags, *more)
    process = start_script("-c", STUCK, patience, fifo, *command, env={"PYTHONPATH": str(ROOT)})
    wait_for_steps(tmp_path, 2)
    os.mkfifo(fifo)
    time.sleep(0.5)
    return process


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_hanging_read_ends_when_patience_does(flags, tmp_path, workers, number):
    process = start_stuck(flags, tmp_path, 1, "--num_workers", str(workers))
    children = psutil.Process(process.pid).children()
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    last = printed.splitlines()[-1]
    assert f"stopped by {number.name} in the middle of a step; the last run state is" in last
    assert "sft_vlm_64.resume/step-0000" in last and "Traceback" not in printed
    assert len(children) == workers
    assert psutil.wait_procs(children, timeout=20)[1] == [], "workers live on"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(flags, tmp_path, number):
    process = start_stuck(flags, tmp_path, 1000)
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert f"stopped by {number.name} in the middle of a step; the last run state" in printed


def test_nothing_watches_after_a_run():
    """A thread that is still there when Python ends can abort the process."""
    before = set(threading.enumerate())
    with StopSignal().listening(str):
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before


def test_a_second_run_of_the_same_name_is_refused(options, flags, tmp_path):
    process = start_script("train_sft_vlm.py", *flags)
    wait_for_steps(tmp_path, 1)
    second = run_script("train_sft_vlm.py", *flags)
    assert second.returncode == 2
    last = second.stdout.splitlines()[-1]
    assert last.startswith(f"error: process {process.pid} on ") and "another --save_name" in last
    assert f"writes {tmp_path}/sft_vlm_64.*" in last
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    half = tmp_path / "sft_vlm_64.resume/.step-00000009.pth.17.partial"
    half.touch()
    changes = as_flags(**(options | dict(out_dir=tmp_path, max_steps=1)))
    assert run_script("train_sft_vlm.py", *changes).returncode == 0
    assert not half.exists() and not (tmp_path / "sft_vlm_64.lock").exists()


def test_ranks_end_with_their_launcher(flags, tmp_path):
    """They save before, and a new run takes over."""
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    command = ("train_sft_vlm.py", *flags, "--num_workers", "1")
    process = start_script(*launch, *command)
    wait_for_steps(tmp_path, 2)
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) >= 4
    process.kill()
    assert psutil.wait_procs(descendants, timeout=60)[1] == []
    printed = process.stdout.read()
    process.wait()
    assert "stopped by SIGTERM after step" in printed and "Traceback" not in printed, printed
