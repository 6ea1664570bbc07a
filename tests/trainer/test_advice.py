"""What a run says about its chances, and what it prints to go on with."""

import io
import random
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset.mixture import open_data
from dataset.scenes.scene import draw_scene, sample_scene
from scripts.processes import as_flags
from tests.helpers import ROOT, SHARED, needs_shared, picture, run_script
from trainer.advice import (
    check_pictures,
    check_rate,
    check_start,
    is_demo_encoder,
    measure_ground,
    measure_size,
    write_ask_command,
)

# Sizes of weights: as drawn at random, as in the demo.
SMALL, LARGE = 0.02, 0.2


def count_steps(n_rows: int, epochs: int, batch_size: int) -> int:
    return epochs * -(-n_rows // batch_size)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_rate_that_moves_nothing_is_named(size):
    said = check_rate(1e-6, count_steps(60, 6, 8), size)
    assert said and "48 steps at --learning_rate 1e-06" in said and "\n" not in said
    # what it suggests would not be complained about
    better = float(said.split("try --learning_rate ")[1].split()[0])
    assert 1e-6 < better <= 1e-3 and check_rate(better, count_steps(60, 6, 8), size) is None


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    ("learning_rate", "n_rows", "epochs", "batch_size"),
    [
        (1e-6, 300_000, 6, 8),  # published: SFT
        (4e-4, 590_000, 4, 16),  # published: pretraining
        (2e-3, 3200, 1, 16),  # the demo
        (6e-4, 7200, 1, 16),
        (4e-4, 2400, 1, 16),
        (1e-3, 50, 10, 8),  # docs/data.md
    ],
)
def test_a_rate_that_moves_something_is_not(size, learning_rate, n_rows, epochs, batch_size):
    assert check_rate(learning_rate, count_steps(n_rows, epochs, batch_size), size) is None


def test_the_size_of_weights_is_that_of_matrices():
    torch.manual_seed(0)
    layer, norm = torch.nn.Linear(100, 200, bias=False), torch.nn.LayerNorm(100)
    torch.nn.init.normal_(layer.weight, std=0.3)
    assert measure_size([layer.weight, norm.weight]) == pytest.approx(0.3, rel=0.02)
    assert measure_size([]) == 0 and check_rate(1e-6, 48, 0.0) is None


def test_a_model_without_eyes_needs_more_than_a_few_rows():
    assert "lm_512.pth has never seen a picture" in check_start(Path("out/lm_512.pth"), 60)
    assert check_start(Path("out/lm_512.pth"), 100_000) is None
    assert check_start(Path("out/demo/sft_vlm_128.pth"), 60) is None
    assert check_start(None, 60) is None  # the model as it is


def draw_scenes(n: int, size: int, quality: int) -> list[Image.Image]:
    """Scenes as a cleaned set has them."""
    rng, scenes = random.Random(size), []
    for number in range(n):
        file = io.BytesIO()
        scene = draw_scene(sample_scene(rng, held_out=number % 2 == 0))
        scene.resize((size, size), Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
        scenes.append(Image.open(file))
    return scenes


@pytest.mark.parametrize(("size", "quality"), [(224, 92), (128, 92), (64, 50)])
def test_scenes_are_never_taken_for_photographs(size, quality):
    scenes = draw_scenes(40, size, quality)
    assert min(map(measure_ground, scenes)) > 0.5 and check_pictures(scenes) is None
    assert check_pictures([]) is None
    assert "photographs" in check_pictures([picture(seed) for seed in range(5)])


@needs_shared
def test_photographs_are():
    with zipfile.ZipFile(SHARED / "flickr8k/val_images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:240]
        photographs = [Image.open(io.BytesIO(archive.read(name))) for name in names]
    for start in range(0, len(photographs), 12):
        assert check_pictures(photographs[start : start + 12])


def test_the_demos_encoder_is_known_by_its_folder(tmp_path):
    assert is_demo_encoder(str(ROOT / "model/demo/vision_model"))
    assert not is_demo_encoder(str(ROOT / "model/vision_model")) and not is_demo_encoder("")


def test_the_next_question_is_one_of_the_data(rows_dir, processor):
    data = open_data([str(rows_dir / "rows.jsonl")], [str(rows_dir / "images")], processor, 200)
    words = shlex.split(write_ask_command(Path("my out/x_64.pth"), data))
    assert words == [
        *("python", "eval_vlm.py", "--weights", "my out/x_64.pth", "--image"),
        *(str(rows_dir / "images/1-0.png"), "--prompt", "What color is the circle?" * 2),
        *("--temperature", "0"),
    ]


def test_a_run_says_it_and_goes_on(options, tmp_path):
    flags = as_flags(**options | dict(learning_rate=1e-9, out_dir=tmp_path))
    finished = run_script("train_sft_vlm.py", *flags)
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("warning: 6 steps at --learning_rate 1e-09 move no weight") == 1
    # at a good rate nothing is said, nor if it is tried out
    for others in (dict(learning_rate=1e-3), dict(learning_rate=1e-9, max_steps=2)):
        flags = as_flags(**options | others | dict(out_dir=tmp_path))
        assert "warning" not in run_script("train_sft_vlm.py", *flags).stdout
