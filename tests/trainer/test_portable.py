"""A training run on a system without what only POSIX has, and on a bare image of packages."""

import pytest

from tests.helpers import TOKENIZER, run_cold

# What Windows lacks is taken away before anything of ours is imported. Libraries come first: on
# Linux they take what Linux has.
WITHOUT_POSIX = """
import os, signal, sys
import tests.preload

for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
del os.fork, os.forkpty, os.sysconf
allowed = signal.signal

def refuse_sigterm(number, handler):
    if number == signal.SIGTERM:
        raise ValueError("no such handler here")
    return allowed(number, handler)

signal.signal = refuse_sigterm
"""
# A rented GPU image has these packages and no package index.
BARE_IMAGE = """
import sys

for name in ("pyarrow", "wandb", "streamlit", "scipy", "faiss", "ftfy", "imagehash", "modelscope",
             "py3langid", "modelscope_hub", "psutil", "mplfonts", "tensorboard"):
    sys.modules[name] = None
"""
RUN = """
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("system", [WITHOUT_POSIX, BARE_IMAGE], ids=["no posix", "bare image"])
def test_a_small_training_runs(system, vision_dir, rows_dir, tmp_path):
    finished = run_cold(
        *("-c", system + RUN, "train_sft_vlm.py", "--init_weights", "none", "--dim", "64"),
        *("--n_layers", "2", "--device", "cpu", "--tokenizer", TOKENIZER),
        *("--vision_model", vision_dir, "--data", rows_dir / "rows.jsonl"),
        *("--images", rows_dir / "images", "--max_steps", "2", "--out_dir", tmp_path),
    )
    assert finished.returncode == 0, finished.stdout
    assert (tmp_path / "sft_vlm_64.pth").is_file() and (tmp_path / "sft_vlm_64.png").is_file()


@pytest.mark.parametrize("module", ["inference", "inference.load", "dataset.vlm_dataset"])
def test_imports_need_no_posix(module):
    finished = run_cold("-c", f"{WITHOUT_POSIX}\nimport {module}")
    assert finished.returncode == 0, finished.stdout


def test_rows_with_backslashes_on_a_console_of_ascii(vision_dir, rows_dir, tmp_path):
    """It shows what it can; pictures named as Windows writes paths are found."""
    text = (rows_dir / "rows.jsonl").read_text(encoding="utf-8")
    named = text.replace('"image": "', '"image": "images\\\\').replace(", ", ", ")
    (tmp_path / "文字.jsonl").write_text(named.replace("images\\\\", ".\\\\"), encoding="utf-8")
    finished = run_cold(
        *("train_sft_vlm.py", "--init_weights", "none", "--dim", "64", "--n_layers", "2"),
        *("--device", "cpu", "--tokenizer", TOKENIZER, "--vision_model", vision_dir),
        *("--data", tmp_path / "文字.jsonl", "--images", rows_dir / "images"),
        *("--max_steps", "1", "--out_dir", tmp_path / "输出"),
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert finished.returncode == 0, finished.stdout
    assert "data: 24 rows of" in finished.stdout and "??.jsonl" in finished.stdout
