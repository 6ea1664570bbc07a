"""The sizes in model/LMConfig.py, which people edit, are the defaults of every script."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from common.errors import MissingFileError, UserError
from common.flags import parse_flags
from model import files
from model.LMConfig import LMConfig
from model.model_lm import MiniMindLM
from model.weights import read_weights, save_weights
from tests.helpers import ROOT, TOKENIZER, small_model
from trainer.build import build_model, choose_sizes, describe_sizes
from trainer.config import TrainConfig
from trainer.paths import find_init_weights
from trainer.runtime import start_runtime

ROOMS = ("common", "model", "dataset", "inference", "trainer")
SCRIPTS = ("train_pretrain_vlm.py", "eval_vlm.py")


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A copy of the repository whose sizes somebody has edited."""
    root = tmp_path_factory.mktemp("edited")
    for room in ROOMS:
        ignored = shutil.ignore_patterns("demo", "__pycache__")
        shutil.copytree(ROOT / room, root / room, ignore=ignored)
    for script in SCRIPTS:
        shutil.copy(ROOT / script, root)
    path = root / "model" / "LMConfig.py"
    text = path.read_text(encoding="utf-8")
    for before, after in (
        ("dim: int = 512", "dim: int = 64"),
        ("layers: int = 8", "layers: int = 3"),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")
    return root


def run_there(root, *command) -> str:
    """What a script in `root` prints, in a process of its own that knows no other code."""
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *map(str, command)], cwd=root, env=env, capture_output=True, text=True
    )
    return finished.stdout + finished.stderr


def test_what_is_edited_is_what_is_trained_and_asked(edited, vision_dir, rows_dir):
    parts = ["--tokenizer", TOKENIZER, "--vision_model", vision_dir, "--device", "cpu"]
    data = ["--data", rows_dir / "rows.jsonl", "--images", rows_dir / "images"]
    printed = run_there(edited, "train_pretrain_vlm.py", *parts, *data)
    assert "error: no weights at out/lm_64.pth: train them first, or pass --init_weights none" in (
        printed.replace(os.sep, "/")
    )

    steps = ["--init_weights", "none", "--max_steps", "2", "--max_seq_len", "300"]
    printed = run_there(edited, "train_pretrain_vlm.py", *steps, *parts, *data)
    assert "sizes: dim 64, n_layers 3\n" in printed, printed
    weights = edited / "out" / "pretrain_vlm_64.pth"
    config = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))["config"]
    assert (config["dim"], config["n_layers"]) == (64, 3)

    # There are two; the width in the file decides.
    shutil.copy(weights, weights.with_name("pretrain_vlm_48.pth"))
    printed = run_there(edited, "eval_vlm.py", "--model_mode", "0", "--device", "cpu", *data)
    assert f"model: {weights.relative_to(edited)}, 0.2" in printed, printed


@pytest.mark.parametrize("default", ["96", "2 * 48"])
def test_the_default_width_is_read_without_an_import(tmp_path, monkeypatch, default):
    (tmp_path / "model").mkdir()
    text = (ROOT / "model/LMConfig.py").read_text(encoding="utf-8")
    text = text.replace("dim: int = 512", f"dim: int = {default}")
    (tmp_path / "model/LMConfig.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(
        LMConfig.__init__, "__defaults__", (96, *LMConfig.__init__.__defaults__[1:])
    )
    assert files.read_default_dim() == 96
    monkeypatch.undo()
    assert files.DEFAULT_DIM == LMConfig().dim == 512


def test_flags_then_weights_then_the_file(tmp_path):
    """What the weights decide against the file is said."""
    path = tmp_path / "lm_64.pth"
    save_weights(small_model(n_heads=2, rope_theta=1e4, dropout=0.5), path)
    flags = TrainConfig()
    assert choose_sizes(flags, None) == {}
    assert choose_sizes(replace(flags, dim=32), None) == {"dim": 32}
    sizes = choose_sizes(replace(flags, n_layers=2), path)
    assert (sizes["dim"], sizes["n_heads"], sizes["rope_theta"]) == (64, 2, 1e4)
    assert "dropout" not in sizes and "max_seq_len" not in sizes
    assert choose_sizes(replace(flags, n_layers=3), path) == {"dim": 64, "n_layers": 3}

    assert describe_sizes(sizes, LMConfig(**sizes)) == (
        "dim 64, n_layers 2, rope_theta 10000.0 (model/LMConfig.py: dim 512, n_layers 8, "
        "rope_theta 1000000.0; flags and weights come first)"
    )
    assert describe_sizes({}, LMConfig()) == "dim 512, n_layers 8"


def test_sizes_of_published_weights_are_read_off_the_tensors(tmp_path):
    path = tmp_path / "lm_64.pth"
    save_weights(MiniMindLM(LMConfig(dim=64, n_layers=2, hidden_dim=100, vocab_size=672)), path)
    path.with_suffix(".json").unlink()
    sizes = choose_sizes(TrainConfig(), path)
    assert sizes == {"dim": 64, "n_layers": 2, "hidden_dim": 100}
    assert read_weights(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--dim 16384 --n_layers 256",
            "the weights take .* GB and this machine has .* GB of memory",
        ),
        ("--dim 130", "dim 130 does not split into 4 heads of an even size"),
        ("--dim 0", "--dim is 0: it has to be from 2 to 16,384"),
        ("--dim 1000000000", "--dim is 1000000000: it has to be from 2 to 16,384"),
        ("--n_layers 1000000000", "--n_layers is 1000000000: it has to be from 1 to 256"),
    ],
)
def test_sizes_that_cannot_be_cost_one_line_and_no_memory(tmp_path, vision_dir, flags, message):
    fixed = ["--init_weights", "none", "--device", "cpu", "--out_dir", str(tmp_path)]
    parts = ["--tokenizer", str(TOKENIZER), "--vision_model", str(vision_dir), "--dtype", "float32"]
    with pytest.raises(UserError, match=message):
        config = parse_flags(TrainConfig(), "-", [*fixed, *parts, *flags.split()])
        build_model(config, start_runtime(config))


def test_a_disk_without_room_for_one_save_is_told_before_training(
    tmp_path, vision_dir, monkeypatch
):
    config = TrainConfig(
        tokenizer=str(TOKENIZER),
        vision_model=str(vision_dir),
        device="cpu",
        dtype="float32",
        dim=64,
        out_dir=str(tmp_path),
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match=r"a save takes .* GB or more and .* has 0.00 GB left"):
        build_model(config, start_runtime(config))


def test_weights_of_another_size_are_named(tmp_path):
    config = TrainConfig(init_weights="lm", out_dir=str(tmp_path))
    with pytest.raises(MissingFileError, match=r"lm_512.pth: train them first, or fetch the"):
        find_init_weights(config)
    (tmp_path / "lm_768.pth").touch()
    with pytest.raises(UserError, match=r"lm_512.pth, but lm_768.pth: pass --init_weights .*/lm_7"):
        find_init_weights(config)
    assert find_init_weights(replace(config, dim=768)) == tmp_path / "lm_768.pth"


def test_dropout_is_that_of_the_flag_and_no_size_of_the_weights(tmp_path, vision_dir):
    weights = tmp_path / "lm_64.pth"
    save_weights(small_model(dropout=0.5), weights)
    parts = {"tokenizer": str(TOKENIZER), "vision_model": str(vision_dir), "device": "cpu"}
    config = TrainConfig(init_weights=str(weights), out_dir=str(tmp_path), dtype="float32", **parts)
    for flag, dropout in ((None, LMConfig().dropout), (0.2, 0.2)):
        config = replace(config, dropout=flag)
        model, _ = build_model(config, start_runtime(config))
        assert model.config.dropout == model.layers[0].attention.dropout == dropout
