"""A run cannot be lost: killed at any moment, it continues as if nothing had happened."""

import io
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from model.weights import read_weights
from scripts.processes import as_flags, free_port
from tests.helpers import (
    SHARED,
    WarmScript,
    needs_shared,
    read_log,
    run_cold,
    run_script,
    start_script,
    wait_for_steps,
)
from trainer.sampler import StepSampler

NAME = "sft_vlm_64"


@pytest.fixture(scope="module")
def long_options(options) -> dict:
    """12 optimizer steps over 4 epochs, a run state and a validation after each."""
    return options | dict(epochs=4, save_interval=1, val_data=options["data_path"])


@pytest.fixture
def command(long_options, tmp_path):
    """The command of a run in tmp_path, with some options changed."""
    return lambda **changes: [
        "train_sft_vlm.py",
        *as_flags(**(long_options | {"out_dir": tmp_path} | changes)),
    ]


@pytest.fixture(scope="module")
def undisturbed(long_options, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed")
    finished = run_script("train_sft_vlm.py", *as_flags(**long_options, out_dir=out_dir))
    assert finished.returncode == 0, finished.stdout
    return out_dir


def assert_same_end(out_dir, undisturbed):
    for name in (NAME, "sft_vlm_best_64"):
        weights, expected = (read_weights(f / f"{name}.pth") for f in (out_dir, undisturbed))
        assert weights.keys() == expected.keys()
        different = [
            key for key, weight in weights.items() if not torch.equal(weight, expected[key])
        ]
        assert not different, f"{name}: {different}"
    for event, value in (("train", "loss"), ("validation", "val_loss")):
        ours, theirs = (read_log(folder, event) for folder in (out_dir, undisturbed))
        assert [(line["step"], line[value]) for line in ours] == [
            (line["step"], line[value]) for line in theirs
        ]


def test_kills_at_random_moments_change_no_bit(command, undisturbed, tmp_path):
    """SIGKILL, during steps, saves and writes of cached features; what is left can be used."""
    rng = random.Random(5)
    log, kills, seen = tmp_path / f"{NAME}.log.jsonl", 0, 0
    for _ in range(8):
        process = WarmScript(*command(resume="auto"))
        # Until it has done a step more than the last time, and then some milliseconds.
        while process.poll() is None:
            n_lines = log.read_text().count('"train"') if log.is_file() else 0
            if n_lines > seen:
                time.sleep(rng.uniform(0, 0.06))
                kills += process.kill() == -signal.SIGKILL
                seen = n_lines
                break
            time.sleep(0.002)
        if process.poll() == 0:
            break
    finished = run_script(*command(resume="auto"))
    assert finished.returncode == 0, finished.stdout
    assert kills >= 4, f"{kills} kills: the test has to kill to mean something"
    assert_same_end(tmp_path, undisturbed)
    states = sorted(path.name for path in (tmp_path / f"{NAME}.resume").iterdir())
    assert states == ["step-00000011.pth", "step-00000012.pth"]


def cut(content: bytes) -> bytes:
    return content[:20_000]


def flip(content: bytes) -> bytes:
    """One bit of a tensor in the middle."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def of_weights(content: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, file)
    return file.getvalue()


def change(content: bytes, change_state: Callable[[dict], object]) -> bytes:
    """A run state whose parts are whole, and are not what was saved."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    change_state(state)
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def with_nan(content: bytes) -> bytes:
    return change(content, lambda state: state["weights"]["norm.weight"].fill_(math.nan))


def with_nan_averages(content: bytes) -> bytes:
    """What the optimizer remembers: the next step would make weights of nan."""
    return change(content, lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(math.nan))


def with_other_progress(content: bytes) -> bytes:
    return change(content, lambda state: state["progress"].update(stage=1))


def with_weights_in_a_list(content: bytes) -> bytes:
    return change(content, lambda state: state.update(weights=[1]))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        of_weights,
        with_nan,
        with_nan_averages,
        with_other_progress,
        with_weights_in_a_list,
    ],
)
def test_a_damaged_run_state_is_passed_over(command, tmp_path, damage):
    """By a disk or by hand, not by us: the one before it takes its place."""
    run_script(*command(max_steps=5))
    newest = tmp_path / f"{NAME}.resume" / "step-00000005.pth"
    newest.write_bytes(damage(newest.read_bytes()))
    (newest.parent / "step-00000099.pth").mkdir()
    printed = run_script(*command(max_steps=5, resume=True)).stdout
    assert re.search(f"passed over: .*{newest} .*\n(.*\n)*resumed: ", printed), printed
    assert "step-00000004.pth, 4 steps and 32 samples are done" in printed
    printed = run_script(*command(max_steps=5, resume=True)).stdout
    assert "5 steps and 40 samples are done" in printed
    assert len(read_log(tmp_path, "train")) == 5
    for path in newest.parent.glob("step-0000000*.pth"):
        path.write_bytes(b"torn")
    finished = run_script(*command(resume="auto"))
    assert finished.returncode == 2
    assert "is whole: leave out --resume to start a new run" in finished.stdout


def test_a_resumed_run_needs_no_starting_weights(long_options, command, undisturbed, tmp_path):
    """Nor sizes, tokenizer and vision encoder, which lie beside its own weights."""
    start = tmp_path / "start.pth"
    shutil.copy(undisturbed / f"{NAME}.pth", start)
    first = run_script(*command(init_weights=start, max_steps=2))
    assert first.returncode == 0, first.stdout
    start.unlink()
    names = ("data_path", "images_path", "device", "dtype", "epochs", "batch_size", "learning_rate")
    known = {name: long_options[name] for name in names}
    flags = as_flags(**known, init_weights=start, max_steps=3, resume=True, out_dir=tmp_path)
    finished = run_script("train_sft_vlm.py", *flags)
    assert finished.returncode == 0, finished.stdout
    assert "2 steps and 16 samples are done" in finished.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_first(command, undisturbed, tmp_path, number):
    process = WarmScript(*command(save_interval=1000))
    wait_for_steps(tmp_path, 1)
    process.send_signal(number)
    stopped = process.finish()
    assert stopped.returncode == 128 + number
    assert "the same command with --resume continues" in stopped.stdout
    finished = run_script(*command(save_interval=1000, resume=True))
    assert finished.returncode == 0, finished.stdout
    assert_same_end(tmp_path, undisturbed)


def children_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def test_a_full_disk_leaves_the_last_run_state(command, tmp_path):
    """From the second step on no file may grow beyond 20 kB, so the next save breaks off."""
    if not hasattr(psutil, "RLIMIT_FSIZE"):
        pytest.skip("only Linux can limit the files of a running process")
    process = start_script(*command(epochs=4000))
    wait_for_steps(tmp_path, 2)
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "error: cannot write" in printed
    assert "the last run state is intact, --resume continues from it" in printed
    assert printed.rstrip().endswith(str(max((tmp_path / f"{NAME}.resume").glob("step-*"))))
    finished = run_script(*command(resume=True))
    assert finished.returncode == 0, finished.stdout


def test_a_dead_worker_is_named_and_nothing_is_lost(command, tmp_path):
    process = WarmScript(*command(num_workers=2, epochs=4000, feature_cache_gb=0))
    wait_for_steps(tmp_path, 2)
    for worker in children_of(process.pid):
        os.kill(worker, signal.SIGKILL)
    finished = process.finish()
    assert finished.returncode == 2 and "Traceback" not in finished.stdout, finished.stdout
    assert "a process that reads data died" in finished.stdout
    assert "--resume continues from it" in finished.stdout


def test_resume_says_what_does_not_fit(command, undisturbed):
    missing = run_script(*command(resume=True))
    assert missing.returncode == 2
    assert "error: --resume finds no run state in" in missing.stdout
    other = run_script(*command(out_dir=undisturbed, resume=True, seed=3))
    assert other.returncode == 2
    assert "is of a run with --seed 1337, now it is 3" in other.stdout
    changes = dict(learning_rate=2e-3, warmup_iters=2, grad_clip=0.5, max_seq_len=300)
    for name, value in changes.items():
        other = run_script(*command(out_dir=undisturbed, resume=True, **{name: value}))
        assert other.returncode == 2
        assert re.search(rf"a run with --{name} [\d.]+, now it is {value}[,:]", other.stdout), name
    done = run_script(*command(out_dir=undisturbed, resume=True))
    assert done.returncode == 0 and "12 steps and 96 samples are done" in done.stdout
    assert "nothing is left to do: all 12 steps were done before" in done.stdout


def test_resume_says_what_is_another_option_now(command, tmp_path):
    """The files may lie elsewhere: what is in them counts."""
    run_script(*command(max_steps=2))
    finished = run_script(*command(max_steps=3, save_interval=2, num_workers=1, resume=True))
    assert finished.returncode == 0, finished.stdout
    changed = "changed since: num_workers 1 (was 0), max_steps 3 (was 2), save_interval 2 (was 1)"
    assert changed in finished.stdout


def test_resume_refuses_another_stage(command, tmp_path):
    _, *flags = command(max_steps=2, save_name="one")
    first = run_script("train_pretrain_vlm.py", *flags)
    assert first.returncode == 0, first.stdout
    other = run_script(*command(resume=True, save_name="one"))
    assert other.returncode == 2 and "Traceback" not in other.stdout
    last = other.stdout.splitlines()[-1]
    assert "step-00000002.pth is of a run with " in last
    assert "stage pretrain, now it is sft" in last and "rows" not in last


def test_resume_refuses_other_rows_of_the_same_length(command, rows_dir, tmp_path):
    """A copy of the same rows is no other set."""
    copy = tmp_path / "copy.jsonl"
    text = (rows_dir / "rows.jsonl").read_text(encoding="utf-8")
    copy.write_text(text, encoding="utf-8")
    run_script(*command(max_steps=2))
    finished = run_script(*command(max_steps=3, data_path=copy, resume=True))
    assert finished.returncode == 0, finished.stdout
    assert f"changed since: data_path {copy} (was " in finished.stdout
    copy.write_text(text.replace("red", "der"), encoding="utf-8")
    other = run_script(*command(max_steps=4, data_path=copy, resume=True))
    assert other.returncode == 2
    assert "with content of the rows checksum " in other.stdout.splitlines()[-1]


def test_resume_refuses_a_vision_encoder_of_another_family(command, tmp_path):
    """A SigLIP with as many patches of the same width as the CLIP before it."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = SiglipVisionConfig(**sizes, image_size=48, patch_size=16)
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    processor = SiglipImageProcessorPil(size={"height": 48, "width": 48})
    processor.save_pretrained(tmp_path / "siglip")
    run_script(*command(max_steps=2))
    other = run_script(*command(max_steps=3, vision_model=tmp_path / "siglip", resume=True))
    assert other.returncode == 2
    assert "vision encoder CLIP, now it is SigLIP" in other.stdout.splitlines()[-1]


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
    """An epoch in pieces, each with its own batch size, accumulation and ranks: resumed runs."""
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


def test_the_rank_count_may_change(command, tmp_path):
    """Half an epoch by one process, the rest by two with half the batch: the same steps."""
    first = run_script(*command(max_steps=2))
    assert first.returncode == 0, first.stdout
    finished = run_cold(
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()),
        *command(batch_size=4, resume=True),
    )
    assert finished.returncode == 0, finished.stdout
    assert [line["step"] for line in read_log(tmp_path, "train")] == list(range(1, 13))
    # One process answers; the other does not wait for it forever.
    answered = [(line["step"], line["row"]) for line in read_log(tmp_path, "sample")]
    assert answered == [(step, row) for step in (0, 2, 3, 6, 9, 12) for row in (0, 8, 16)]


def test_two_nodes_survive_the_death_of_a_rank(command, tmp_path):
    """Two torchrun agents of two processes each; one process is killed, all four restart."""
    launch = [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"),
        *("--max-restarts", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"localhost:{free_port()}"),
    ]
    flags = command(batch_size=2, resume="auto", epochs=8)
    # Without it, the store that agents share keeps addresses of the dead, and restarts fail.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [start_script(*launch, *flags, env=env) for _ in range(2)]
    wait_for_steps(tmp_path, 3)
    os.kill(children_of(agents[1].pid)[-1], signal.SIGKILL)
    printed = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert "resumed: " in printed[0] + printed[1]
    lines = read_log(tmp_path, "train")
    assert [line["step"] for line in lines] == list(range(1, 25))
    run_script(*command(epochs=8, out_dir=tmp_path / "one"))
    expected = [line["loss"] for line in read_log(tmp_path / "one", "train")]
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=2e-4)


@needs_shared
def test_data_that_changed_before_a_resume_is_refused(options, tmp_path):
    """../shared/trouble/20: rows that were added, and the old ones again."""
    trouble = SHARED / "trouble"
    changes = dict(images_path=trouble / "18/set", out_dir=tmp_path, batch_size=2, resume="auto")

    def run(data, max_steps):
        values = options | changes | dict(data_path=trouble / "20" / data, max_steps=max_steps)
        return run_script("train_sft_vlm.py", *as_flags(**values))

    first = run("a.jsonl", 2)
    assert first.returncode == 0, first.stdout
    more = run("a_more.jsonl", 4)
    assert more.returncode == 2
    assert re.search(r"a run with rows 6, checksum \w+, now it is 8, checksum", more.stdout)
    same = run("a.jsonl", 3)
    assert same.returncode == 0 and "step-00000002.pth, 2 steps" in same.stdout
