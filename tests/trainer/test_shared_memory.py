"""Loader processes where /dev/shm is as small as Docker makes it, and where they hang."""

import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.vlm_dataset import VLMDataset
from scripts.processes import as_flags
from tests.helpers import ROOT, run_cold
from trainer import shared_memory
from trainer.collate import Batch, Parcel, make_loader
from trainer.runtime import Runtime
from trainer.sampler import StepSampler
from trainer.shared_memory import estimate_bytes, is_too_small

RUNTIME = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture
def data(rows_dir, processor) -> VLMDataset:
    return VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", processor, 300)


def test_what_comes_through_a_pipe_is_the_same_batch(data):
    sampler = StepSampler(data.lengths, 8)
    through_pipes = make_loader(data, sampler, 2, through_pipes=True)
    for shared, piped in zip(make_loader(data, sampler, 0), through_pipes):
        assert type(piped) is type(shared) and piped.keys == shared.keys
        for name in ("input_ids", "labels", "pixels", "is_cached", "label_indices"):
            assert torch.equal(getattr(piped, name), getattr(shared, name)), name


def test_features_keep_their_dtype_in_a_pipe():
    blank, features = torch.zeros(1, 2), torch.randn(2, 3, 4).bfloat16()
    batch = pickle.loads(pickle.dumps(Parcel(Batch(blank, blank, [7], cached_features=features))))
    assert torch.equal(batch.cached_features, features) and batch.indices == [7]
    assert batch.pixels is None


class Rows:
    """100 rows of one picture."""

    n_images, lengths = 100, np.full(100, 300)

    def __init__(self, processor):
        self.processor = processor

    def __len__(self):
        return 100


@pytest.mark.parametrize(
    ("free_mb", "n_workers", "is_small"), [(64, 8, True), (64, 0, False), (1500, 8, False)]
)
def test_a_small_dev_shm_is_named(monkeypatch, capsys, free_mb, n_workers, is_small):
    """Docker's 64 MB against 8 processes and batches of 64 pictures of CLIP's size."""
    usage = SimpleNamespace(free=free_mb * 10**6)
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", ROOT)
    config = SimpleNamespace(n_image_tokens=196, vision_dim=768)
    image_processor = SimpleNamespace(crop_size={"height": 224, "width": 224})
    data = Rows(SimpleNamespace(config=config, image_processor=image_processor))
    sampler = StepSampler(data.lengths, 64)
    assert estimate_bytes(data, 64) == 64 * (2 * 196 * 768 + 32 * 300)
    assert is_too_small(data, sampler, n_workers, RUNTIME) == is_small
    printed = capsys.readouterr().out
    named = [word in printed for word in ("64 MB free", "--shm-size 1g", "--num_workers")]
    assert named == [is_small] * 3


def can_mount() -> bool:
    """Whether this process may give another one a /dev/shm of its own."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_a_run_with_a_tiny_dev_shm_works(options, tmp_path):
    changes = dict(num_workers=8, batch_size=24, out_dir=tmp_path, device="cpu")
    flags = [sys.executable, "train_sft_vlm.py", *as_flags(**(options | changes))]
    # A batch takes 0.2 MB, the queues of 8 processes take 1 MB.
    mount = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "/dev/shm has 2 MB free and 8 processes" in finished.stdout
    assert "Traceback" not in finished.stderr and "Warning" not in finished.stderr


HANG = """
import os, runpy, sys
import trainer.collate, trainer.stop
trainer.stop.HANGING_SECONDS = 3
sys.argv = sys.argv[1:]
fifo = os.environ["FIFO"]
trainer.collate.read_image_bytes = lambda image: open(fifo, "rb").read()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("n_workers", [0, 1])
def test_data_that_never_come_are_an_error(options, tmp_path, n_workers):
    os.mkfifo(tmp_path / "fifo")
    flags = as_flags(**(options | dict(num_workers=n_workers, out_dir=tmp_path)))
    env = {"PYTHONPATH": str(ROOT), "FIFO": str(tmp_path / "fifo")}
    finished = run_cold("-c", HANG, "train_sft_vlm.py", *flags, env=env)
    last = finished.stdout.splitlines()[-1]
    assert finished.returncode == 2, finished.stdout
    assert last.startswith("error: no data came for 3 seconds: look whether the drive")
    assert "--num_workers 0" in last and "--shm-size" in last
