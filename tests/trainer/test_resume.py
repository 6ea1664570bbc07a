"""A run cannot be lost: killed at any moment, it goes on as if nothing had happened."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.weights import read_weights
from tests.helpers import TOKENIZER, free_port, run_script, start_script
from trainer.sampler import StepSampler

NAME = "sft_vlm_64"


@pytest.fixture(scope="module")
def flags(vision_dir, rows_dir):
    """12 optimizer steps over 4 epochs of 24 rows, a checkpoint after each, features cached."""
    return [
        "--dim", "64", "--n_layers", "2", "--device", "cpu", "--dtype", "float32", "--num_workers", "0",
        "--tokenizer", str(TOKENIZER), "--vision_model", str(vision_dir), "--data_path", str(rows_dir / "rows.jsonl"),
        "--images_path", str(rows_dir / "images"), "--epochs", "4", "--batch_size", "8", "--learning_rate", "1e-3",
        "--log_interval", "1", "--save_interval", "1", "--init_weights", "none", "--val_data", str(rows_dir / "rows.jsonl"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed")
    finished = run_script("train_sft_vlm.py", *flags, "--out_dir", out_dir)
    assert finished.returncode == 0, finished.stdout
    return out_dir


def read_log(out_dir, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (out_dir / f"{NAME}.log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def assert_same_end(out_dir, undisturbed):
    for name in (NAME, "sft_vlm_best_64"):
        weights, expected = (
            read_weights(out_dir / f"{name}.pth"),
            read_weights(undisturbed / f"{name}.pth"),
        )
        assert weights.keys() == expected.keys()
        different = [
            key for key, weight in weights.items() if not torch.equal(weight, expected[key])
        ]
        assert not different, f"{name}: {different}"
    for event, value in (("train", "loss"), ("validation", "val_loss")):
        runs = [
            [(line["step"], line[value]) for line in read_log(folder, event)]
            for folder in (out_dir, undisturbed)
        ]
        assert runs[0] == runs[1]


def test_kills_at_random_moments_change_no_bit(flags, undisturbed, tmp_path):
    """SIGKILL, during steps, saves and the writing of cached features alike; what is left in the folder is always usable."""
    rng = random.Random(5)
    command = ["train_sft_vlm.py", *flags, "--resume", "auto", "--out_dir", str(tmp_path)]
    log, kills, seen = tmp_path / f"{NAME}.log.jsonl", 0, 0
    for _ in range(8):
        process = start_script(*command)
        while (
            process.poll() is None
        ):  # until it has done a step more than the last time, and then some milliseconds
            n_lines = log.read_text().count('"train"') if log.is_file() else 0
            if n_lines > seen:
                time.sleep(rng.uniform(0, 0.06))
                process.kill()
                kills += process.wait() == -signal.SIGKILL
                seen = n_lines
                break
            time.sleep(0.002)
        process.stdout.close()
        if process.returncode == 0:
            break
    finished = run_script(*command)
    assert finished.returncode == 0, finished.stdout
    assert kills >= 4, f"{kills} kills: the test has to kill to mean something"
    assert_same_end(tmp_path, undisturbed)
    assert [path.name for path in (tmp_path / f"{NAME}.resume").iterdir()] == ["step-00000012.pth"]


def test_a_damaged_checkpoint_is_passed_over(flags, undisturbed, tmp_path):
    """Torn by a disk, not by us: the one before it takes its place."""
    run_script(
        "train_sft_vlm.py",
        *flags,
        "--out_dir",
        tmp_path,
        "--max_steps",
        "5",
        "--keep_run_states",
        "2",
    )
    newest = tmp_path / f"{NAME}.resume" / "step-00000005.pth"
    newest.write_bytes(newest.read_bytes()[:20_000])
    finished = run_script(
        "train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--max_steps", "5", "--resume"
    )
    assert (
        f"passed over: {newest} is damaged" in finished.stdout and "resumed: " in finished.stdout
    ), finished.stdout
    assert "step-00000004.pth, 4 steps and 32 samples are done" in finished.stdout
    done = run_script(
        "train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--max_steps", "5", "--resume"
    )
    assert (
        "5 steps and 40 samples are done" in done.stdout and len(read_log(tmp_path, "train")) == 5
    )
    for checkpoint in newest.parent.iterdir():
        checkpoint.write_bytes(b"torn")
    finished = run_script("train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--resume", "auto")
    assert (
        finished.returncode == 2
        and "is whole: leave out --resume to start a new run" in finished.stdout
    )


def test_a_resumed_run_needs_no_starting_weights(flags, undisturbed, tmp_path):
    start = tmp_path / "start.pth"
    shutil.copy(undisturbed / f"{NAME}.pth", start)
    command = ["train_sft_vlm.py", *flags, "--init_weights", str(start), "--out_dir", str(tmp_path)]
    assert run_script(*command, "--max_steps", "2").returncode == 0
    start.unlink()
    finished = run_script(*command, "--max_steps", "3", "--resume")
    assert finished.returncode == 0 and "2 steps and 16 samples are done" in finished.stdout, (
        finished.stdout
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_first(flags, undisturbed, tmp_path, number):
    command = ["train_sft_vlm.py", *flags, "--save_interval", "1000", "--out_dir", str(tmp_path)]
    process = start_script(*command)
    log = tmp_path / f"{NAME}.log.jsonl"
    while process.poll() is None and not (log.is_file() and '"train"' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert "the same command with --resume continues" in printed
    finished = run_script(*command, "--resume")
    assert finished.returncode == 0, finished.stdout
    assert_same_end(tmp_path, undisturbed)


def wait_for_steps(out_dir, n_steps: int) -> None:
    log, deadline = out_dir / f"{NAME}.log.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline and not (
        log.is_file() and log.read_text().count('"train"') >= n_steps
    ):
        time.sleep(0.01)


def children_of(process: subprocess.Popen) -> list[int]:
    printed = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout
    return [int(number) for number in printed.split()]


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux can limit the files of a running process"
)
def test_a_full_disk_leaves_the_last_checkpoint(flags, undisturbed, tmp_path):
    """From the second step on no file may grow beyond 20 kB, so the next save breaks off in its middle."""
    command = ["train_sft_vlm.py", *flags, "--epochs", "4000", "--out_dir", str(tmp_path)]
    process = start_script(*command)
    wait_for_steps(tmp_path, 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert (
        "error: cannot write" in printed
        and "the last run state is intact, --resume continues from it" in printed
    )
    assert printed.rstrip().endswith(str(max((tmp_path / f"{NAME}.resume").glob("step-*"))))
    finished = run_script("train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--resume")
    assert finished.returncode == 0, finished.stdout


def test_a_dead_worker_is_named_and_nothing_is_lost(flags, undisturbed, tmp_path):
    command = ["train_sft_vlm.py", *flags, "--out_dir", str(tmp_path)]
    process = start_script(
        *command, "--num_workers", "2", "--epochs", "4000", "--feature_cache_gb", "0"
    )
    wait_for_steps(tmp_path, 2)
    for worker in children_of(process):
        os.kill(worker, signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "a process that reads data died" in printed and "--resume continues from it" in printed


def test_resume_says_what_does_not_fit(flags, undisturbed, tmp_path):
    missing = run_script("train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--resume")
    assert missing.returncode == 2 and "error: --resume finds no run state in" in missing.stdout
    other = run_script(
        "train_sft_vlm.py", *flags, "--out_dir", undisturbed, "--resume", "--seed", "3"
    )
    assert other.returncode == 2 and "is of a run with seed 1337, now it is 3" in other.stdout
    done = run_script("train_sft_vlm.py", *flags, "--out_dir", undisturbed, "--resume")
    assert done.returncode == 0 and "12 steps and 96 samples are done" in done.stdout
    assert "nothing is left to do: all 12 steps were done before" in done.stdout


LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=300).map(
    lambda values: np.array(values, dtype=np.int32)
)
CUTS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5)),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, CUTS, st.integers(1, 6))
def test_no_sample_is_repeated_or_skipped_when_the_step_changes_its_size(
    lengths, cuts, last_batch_size
):
    """An epoch taken in pieces, each with its own batch size, accumulation and ranks, as resumed runs do."""
    seen, taken = [], 0
    for batch_size, accumulation_steps, world_size, n_steps in [
        *cuts,
        (last_batch_size, 1, 1, None),
    ]:
        ranks = [
            StepSampler(lengths, batch_size, accumulation_steps, rank, world_size, seed=7)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.epoch, rank.samples_taken = 2, taken
        n_steps = ranks[0].steps_left if n_steps is None else min(n_steps, ranks[0].steps_left)
        batches = [list(rank)[: n_steps * accumulation_steps] for rank in ranks]
        seen += [index for rank in batches for batch in rank for index in batch]
        for _ in range(n_steps):
            ranks[0].advance()
        taken = ranks[0].samples_taken
    assert sorted(seen) == list(range(len(lengths)))


def test_the_rank_count_may_change(flags, tmp_path):
    """Half an epoch by one process, the rest by two with half the batch: the same steps, so the same curve."""
    first = run_script("train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--max_steps", "2")
    assert first.returncode == 0, first.stdout
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    finished = run_script(
        *launch, "train_sft_vlm.py", *flags, "--batch_size", "4", "--out_dir", tmp_path, "--resume"
    )
    assert finished.returncode == 0, finished.stdout
    assert [line["step"] for line in read_log(tmp_path, "train")] == list(range(1, 13))


def test_two_nodes_survive_the_death_of_a_rank(flags, undisturbed, tmp_path):
    """Two torchrun agents of two processes each over loopback; one process is killed, all four start again by themselves."""
    port = str(free_port())
    command = [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", "--max-restarts", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{port}", "train_sft_vlm.py", *flags, "--batch_size", "2", "--resume", "auto",
        "--out_dir", str(tmp_path), "--epochs", "8",
    ]  # fmt: skip
    # Without it, the store that agents share still has the addresses of dead processes, and restarts fail.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [start_script(*command, env=env) for _ in range(2)]
    wait_for_steps(tmp_path, 3)
    os.kill(children_of(agents[1])[-1], signal.SIGKILL)
    printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert "resumed: " in printed[0] + printed[1]
    steps = [line["step"] for line in read_log(tmp_path, "train")]
    assert steps == list(range(1, 25))
    losses = [line["loss"] for line in read_log(tmp_path, "train")]
    one = tmp_path / "one"
    run_script("train_sft_vlm.py", *flags, "--out_dir", one, "--epochs", "8")
    assert losses == pytest.approx([line["loss"] for line in read_log(one, "train")], abs=2e-4)
