"""Scripts that are started from another folder: they find their own files, and yours from there."""

import os
import subprocess
import sys
import time
import urllib.request

import pytest

from inference.config import AskConfig
from inference.paths import choose_weights, find_model_files
from model import files
from model.files import find_own, name_places
from scripts.processes import free_port
from tests.helpers import ROOT, TOKENIZER
from trainer.config import TrainConfig
from trainer.paths import find_init_weights


@pytest.fixture
def run(tmp_path):
    """Runs a script of the repository from tmp_path."""

    def run(script: str, *flags) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, flags)],
            cwd=tmp_path,
            env={name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    return run


def test_the_demo_is_asked_about_the_pictures_of_the_repository(run):
    flags = ["--prompt", "What is this?", "--max_new_tokens", 3, "--device", "cpu"]
    finished = run("eval_vlm.py", "--out_dir", ROOT / "model/demo", *flags)
    assert finished.returncode == 0 and "[scene-3.png]" in finished.stdout, finished.stdout


@pytest.mark.parametrize("weights", ["model/demo", "model/demo/sft_vlm_128.pth"])
def test_weights_of_the_repository_are_found_by_its_own_names(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_model_files(weights)
    assert found.weights == ROOT / "model/demo/sft_vlm_128.pth" and found.info["config"]
    assert choose_weights(AskConfig(out_dir="model/demo")) == found.weights
    config = TrainConfig(init_weights="model/demo/sft_vlm_128.pth")
    assert find_init_weights(config) == found.weights


def test_a_run_reads_and_writes_where_it_was_started(run, tmp_path, rows_dir, vision_dir):
    for name in ("rows.jsonl", "images"):
        (tmp_path / name).symlink_to(rows_dir / name)
    (tmp_path / "eyes").symlink_to(vision_dir)
    flags = ["--data", "rows.jsonl", "--images", "images", "--vision_model", "eyes", "--dim", 64]
    flags += ["--tokenizer", "model/demo/tokenizer", "--init_weights", "none", "--max_steps", 1]
    finished = run("train_sft_vlm.py", *flags, "--n_layers", 1, "--device", "cpu")
    assert finished.returncode == 0, finished.stdout
    assert (tmp_path / "out/sft_vlm_64.pth").is_file()

    # what it has left is found from there
    flags = ["--image", "images/1-0.png", "--prompt", "x", "--max_new_tokens", 3]
    finished = run("eval_vlm.py", "--dim", 64, *flags, "--device", "cpu")
    assert "model: out/sft_vlm_64.pth" in finished.stdout.replace(os.sep, "/"), finished.stdout


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("eval_vlm.py --dim 48", "no weights at {ROOT}/out/sft_vlm_48.pth"),
        ("web_demo_vlm.py --dim 48", "no weights at {ROOT}/out/sft_vlm_48.pth"),
        (
            "eval_vlm.py --load 1",
            "no transformers directory at MiniMind2-V, as seen from {cwd} and",
        ),
        ("eval_vlm.py --weights mine.pth", "no weights at mine.pth, as seen from {cwd} and"),
        ("eval_vlm.py --out_dir mine", "no weights at mine/sft_vlm_"),
        ("train_sft_vlm.py --dim 48", "no weights at {ROOT}/out/pretrain_vlm_48.pth"),
        ("train_sft_vlm.py --init_weights none --tokenizer no", "no tokenizer in no, as seen from"),
    ],
)
def test_what_is_not_there_is_said_with_the_place(run, tmp_path, command, place):
    finished = run(*command.split())
    assert finished.returncode == 2 and finished.stdout.count("\n") == 1
    assert place.format(ROOT=ROOT, cwd=tmp_path) in finished.stdout.replace(os.sep, "/")


def test_the_page_is_served(tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, ROOT / "web_demo_vlm.py", "--out_dir", ROOT / "model/demo"]
        + ["--port", str(port)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline, answer = time.monotonic() + 120, b""
    try:
        while time.monotonic() < deadline and not answer and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health") as response:
                    answer = response.read()
            except OSError:
                time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert answer == b"ok"
    # It does not outlive the script.
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://localhost:{port}/_stcore/health")


def test_a_file_of_here_comes_before_one_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_own("README.md") == ROOT / "README.md"
    assert name_places("none") == f"none, as seen from {tmp_path} and from {ROOT}"
    (tmp_path / "README.md").write_text("")
    assert str(find_own("README.md")) == "README.md"
    monkeypatch.chdir(files.ROOT)
    assert str(find_own("none")) == name_places("none") == "none" and TOKENIZER.is_dir()
