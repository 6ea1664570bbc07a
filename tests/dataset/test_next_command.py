"""Look -> clean -> train -> ask: each command prints the next one, which works as it is printed."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import MissingFileError
from dataset.next_command import (
    DEMO_TOKENIZER,
    RECIPES,
    choose_recipe,
    choose_tokenizer,
    find_new_folder,
    find_start,
    write_clean_command,
    write_train_command,
)
from dataset.scenes.scene import draw_scene, sample_scene
from dataset.scenes.text import caption
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from model.vision import load_vision_encoder
from model.weights import load_weights, read_weights, save_weights
from tests.helpers import ROOT, assistant, user, write_rows

N_ROWS = 24


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, and a repository with nothing downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("model.files.ROOT", tmp_path)
    return tmp_path


def add_tokenizer(folder: str, content: str) -> str:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "tokenizer.json").write_text(content)
    return folder


def add_vision_model(folder: str) -> str:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text("{}")
    return folder


def add_weights(path: str, **info: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()
    if info:
        Path(path).with_suffix(".json").write_text(json.dumps({"config": {}, **info}))


def add_demo() -> None:
    tokenizer = add_tokenizer(DEMO_TOKENIZER, "demo")
    vision_model = add_vision_model("model/demo/vision_model")
    add_weights("model/demo/sft_vlm_128.pth", tokenizer=tokenizer, vision_model=vision_model)


def test_training_starts_from_the_best_that_is_whole(place):
    assert find_start() is None
    # published weights without their tokenizer and CLIP cannot be used
    add_weights("out/sft_vlm_512.pth")
    assert find_start() is None
    add_demo()
    assert find_start() == "model/demo/sft_vlm_128.pth"
    add_weights("out/demo/sft_vlm_128.pth", tokenizer=DEMO_TOKENIZER, vision_model="model/demo")
    assert find_start() == "model/demo/sft_vlm_128.pth"
    add_vision_model("model/vision_model/clip-vit-base-patch16")
    published = add_tokenizer("model/minimind_tokenizer", "published")
    assert find_start() == find_start(published) == "out/sft_vlm_512.pth"
    # who looked with the demo's tokenizer trains with it, wherever the folder is
    copy = add_tokenizer("elsewhere", "demo")
    assert find_start(DEMO_TOKENIZER) == find_start(copy) == "model/demo/sft_vlm_128.pth"


def test_looking_needs_no_download(place):
    with pytest.raises(MissingFileError, match="no tokenizer in model/minimind_tokenizer"):
        choose_tokenizer(None)
    add_demo()
    assert choose_tokenizer(None) == DEMO_TOKENIZER
    with pytest.raises(MissingFileError, match="no tokenizer in elsewhere"):
        choose_tokenizer("elsewhere")
    published = add_tokenizer("model/minimind_tokenizer", "published")
    assert choose_tokenizer(None) == published


def test_commands_carry_over_what_was_given_and_are_quoted(place):
    words = shlex.split(write_clean_command("my set/a.jsonl", "it's here", None, 800))
    assert words == [
        *("python", "-m", "dataset.clean", "my set/a.jsonl", "my set/a_clean"),
        *("--images", "it's here", "--max_seq_len", "800"),
    ]
    add_demo()
    data, images = "my set/train-*.parquet", "my set/images"
    command = write_train_command(data, images, "v", 40, "mein Satz!", "model/demo/tokenizer", 800)
    words = shlex.split(command)
    flags = dict(zip(words[2::2], words[3::2]))
    assert words[:2] == ["python", "train_sft_vlm.py"] and "--tokenizer" not in flags
    assert flags["--data"] == data and flags["--images"] == images
    assert flags["--init_weights"] == "model/demo/sft_vlm_128.pth"
    assert flags["--max_seq_len"] == "800" and flags["--save_name"] == "mein_Satz_"
    # a tokenizer that no weights have is handed on
    other = add_tokenizer("other one", "other")
    lines = write_train_command(data, None, None, 40, "x", other).splitlines()
    assert lines[0].startswith("python -m scripts.download")
    assert "--tokenizer 'other one'" in lines[1] and "--images" not in lines[1]


def test_a_folder_with_something_in_it_is_left_alone(place):
    wanted = Path("a_clean")
    assert find_new_folder(wanted) == wanted
    wanted.mkdir()
    assert find_new_folder(wanted) == wanted
    (wanted / "file").touch()
    assert find_new_folder(wanted) == Path("a_clean_2")


def test_every_size_has_a_recipe():
    assert choose_recipe(1) == RECIPES[0] and choose_recipe(10**7) == RECIPES[-1]
    least = [recipe.least_rows for recipe in RECIPES]
    assert least[0] == 0 and least == sorted(least)
    assert [choose_recipe(n) for n in least] == list(RECIPES)


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A folder with untrained weights as the demo's are, and rows with pictures of scenes."""
    folder = tmp_path_factory.mktemp("walk")
    # scripts, as seen from there
    for script in ("train_sft_vlm.py", "eval_vlm.py"):
        (folder / script).symlink_to(ROOT / script)
    # weights
    vision_model, tokenizer = (ROOT / "model/demo" / name for name in ("vision_model", "tokenizer"))
    base = read_weights(ROOT / "model/demo/lm_128.pth")
    sizes = json.loads((ROOT / "model/demo/lm_128.json").read_text())["config"]
    encoder, _ = load_vision_encoder(vision_model)
    sizes = {name: sizes[name] for name in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    config = VLMConfig.for_vision_encoder(encoder.config, vocab_size=672, **sizes)
    model = MiniMindVLM(config, encoder)
    load_weights(model, base, ROOT / "model/demo/lm_128.pth", language_only=True)
    weights = folder / "out/demo/sft_vlm_128.pth"
    weights.parent.mkdir(parents=True)
    save_weights(model, weights, tokenizer=str(tokenizer), vision_model=str(vision_model))
    # rows
    rng, rows = random.Random(0), []
    (folder / "my pictures").mkdir()
    for number in range(N_ROWS):
        scene = sample_scene(rng, held_out=False)
        draw_scene(scene).save(folder / "my pictures" / f"{number}.png")
        question, answer = caption(scene, "en")
        turns = [user(f"<image>\n{question}"), assistant(answer)]
        rows.append({"image": f"{number}.png", "conversations": turns})
    write_rows(folder / "my rows.jsonl", rows)
    return folder


def run_printed(folder: Path, command: str) -> str:
    """What a command prints that is run in the folder, as a shell would run it."""
    words = shlex.split(command)
    assert words[0] == "python"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, *words[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=env,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def find_line(printed: str, start: str) -> str:
    return re.search(rf"^{start}: (.*)$", printed, re.MULTILINE)[1]


def test_from_own_pictures_to_an_own_answer(started):
    """With real processes, nothing but what is printed, and a space in each name."""
    command = "python -m dataset.preview 'my rows.jsonl' --images 'my pictures'"
    command = find_line(run_printed(started, command), "next")
    assert "dataset.clean" in command

    printed = run_printed(started, command + " --keep_duplicates")
    command = find_line(printed, "next")
    assert f"{N_ROWS} rows read = {N_ROWS - 4} for training + 4 for validation" in printed
    assert "--init_weights out/demo/sft_vlm_128.pth" in command

    printed = run_printed(started, command + " --dtype float32 --device cpu")
    losses = [float(loss) for loss in re.findall(r"validation loss (\d+\.\d+)", printed)]
    assert losses[-1] < losses[0]
    assert (started / "out/my_rows_clean_128.pth").is_file()

    command = find_line(printed, "ask it")
    assert "Describe the picture." in command and "my rows_clean/images/" in command
    printed = run_printed(started, command)
    answer = re.search(r"^\[\d+\.png\.jpg\]\n(.+)\n\(", printed, re.MULTILINE)
    assert answer and answer[1].strip(), printed
