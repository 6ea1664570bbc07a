"""Rows that cannot be used: the same count in any number of processes, and no late surprise."""

import shutil
from collections import Counter

import pytest
import torch

from common.errors import UserError
from scripts.processes import as_flags, free_port
from tests.helpers import (
    SHARED,
    needs_shared,
    read_log,
    rows_with_damaged_pictures,
    run_cold,
    run_script,
    start_script,
    wait_for_steps,
    write_rows,
)
from trainer.collate import Batch
from trainer.runtime import Runtime
from trainer.skipped import SkippedRows

NOTHING = torch.zeros(1, 2)


def batches(used: int, **skipped: int) -> list[Batch]:
    return [Batch(NOTHING, NOTHING, list(range(used)), skipped=Counter(skipped))]


@pytest.fixture
def rows() -> SkippedRows:
    """Of an epoch of 1,000 rows, in one process."""
    return SkippedRows(Runtime(torch.device("cpu"), torch.float32), 1000)


def test_what_is_much_is_said_once_an_epoch(rows):
    rows.add(0, batches(95, missing=5))
    assert rows.share() == []
    rows.add(0, batches(90, missing=9, damaged=1))
    (line,) = rows.share()
    assert line == (
        "warning: 15 of 200 rows of epoch 1 could not be used "
        "(in all epochs: 14 missing, 1 damaged)"
    )
    rows.add(0, batches(90, missing=10))
    rows.add(1, batches(90, missing=10))
    (line,) = rows.share()
    assert line.startswith("warning: 10 of 100 rows of epoch 2")
    assert rows.reasons == {"missing": 34, "damaged": 1} and rows.share() == []


def test_most_of_an_epoch_ends_the_run(rows):
    rows.add(0, batches(500))
    rows.add(1, batches(30, missing=31))
    assert len(rows.share()) == 1, "31 rows may be an accident"
    rows.add(1, batches(0, missing=1))
    with pytest.raises(UserError, match=r"32 of 62 rows of epoch 2 could not be used .*32 missing"):
        rows.share()


@pytest.fixture
def bad_rows(tmp_path) -> dict:
    """Options: 24 rows, of which 21 have a damaged picture; two epochs."""
    rows = rows_with_damaged_pictures(tmp_path / "images", 24, damaged=range(3, 24))
    data = write_rows(tmp_path / "rows.jsonl", rows)
    return dict(data_path=data, images_path=tmp_path / "images", out_dir=tmp_path / "out")


@pytest.mark.parametrize("n_processes", [1, 2])
def test_counts_are_of_all_processes(options, bad_rows, n_processes):
    """Also where a log line is of steps of two epochs, and a batch is empty."""
    command = ("train_sft_vlm.py", *as_flags(**(options | bad_rows | dict(log_interval=5))))
    if n_processes > 1:
        launch = ("--nproc_per_node", n_processes, "--master_port", free_port())
        finished = run_cold("-m", "torch.distributed.run", *launch, *command)
    else:
        finished = run_script(*command)
    assert finished.returncode == 0, finished.stdout
    assert "skipped while training: 42 image damaged" in finished.stdout
    (end,) = read_log(bad_rows["out_dir"], "end")
    assert end["skipped"] == {"image damaged": 42}
    assert read_log(bad_rows["out_dir"], "train")[-1]["skipped"] == 42


def test_pictures_that_go_away_end_the_run(options, tmp_path):
    rows = rows_with_damaged_pictures(tmp_path / "images", 64, damaged=())
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = dict(data_path=data, images_path=tmp_path / "images", out_dir=tmp_path)
    changes |= dict(epochs=10_000, feature_cache_gb=0, save_interval=1)
    process = start_script("train_sft_vlm.py", *as_flags(**(options | changes)))
    wait_for_steps(tmp_path, 2)
    shutil.rmtree(tmp_path / "images")
    printed, _ = process.communicate(timeout=60)
    last = printed.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "rows of epoch" in last and "image missing)" in last
    assert f"--resume continues from it: {tmp_path}/sft_vlm_64.resume/step-" in last
    assert "warning: " in printed
    skipped = [line["skipped"] for line in read_log(tmp_path, "train")]
    assert skipped[0] == 0 and skipped[-1] > 0 and f"skipped={skipped[-1]}" in printed


def test_a_validation_without_a_row_is_no_loss_of_zero(options, bad_rows, tmp_path):
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("".join(rows[3:]), encoding="utf-8")
    changes = dict(val_data=damaged, val_images=tmp_path / "images")
    finished = run_script("train_sft_vlm.py", *as_flags(**(options | bad_rows | changes)))
    last = finished.stdout.splitlines()[-1]
    assert finished.returncode == 2
    assert last == "error: no row of the validation set could be used (21 image damaged)"


@needs_shared
def test_shared_sets_of_bad_pictures(options, tmp_path):
    """../shared/trouble/18, where the reasons are of several kinds."""

    def run(rows: str):
        folder = SHARED / "trouble/18"
        changes = dict(data_path=folder / f"{rows}.jsonl", images_path=folder / "set")
        return run_script("train_sft_vlm.py", *as_flags(**options, **changes, out_dir=tmp_path))

    options = {n: value for n, value in options.items() if n not in ("data_path", "images_path")}
    assert run("mostly_bad").returncode == 0
    (end,) = read_log(tmp_path, "end")
    assert sum(end["skipped"].values()) == 42
    finished = run("all_bad")
    assert finished.returncode == 2
    last = finished.stdout.splitlines()[-1]
    assert last.startswith("error: no row of all 4 steps could be used (32 "), last
