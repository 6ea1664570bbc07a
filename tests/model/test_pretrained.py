"""Folders in the format of transformers: nothing of theirs runs, what is broken is one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.digest import write_digest
from common.errors import UserError
from model import chat_template
from model.llava import load_transformers_directory, to_llava
from model.processing import load_tokenizer
from model.vision import load_vision_encoder
from tests.helpers import ROOT, TOKENIZER, small_image_processor, small_model

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    to_llava(small_model()).save_pretrained(folder)
    small_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folders(vision_dir, llava_dir, tmp_path) -> dict[str, Path]:
    """A copy of each kind of folder, to be broken."""
    sources = {"vision": vision_dir, "tokenizer": TOKENIZER, "llava": llava_dir}
    return {kind: shutil.copytree(path, tmp_path / kind) for kind, path in sources.items()}


def load(kind: str, folder: Path) -> object:
    if kind == "vision":
        return load_vision_encoder(folder)
    if kind == "tokenizer":
        return load_tokenizer(folder)
    return load_transformers_directory(folder, None)


def edit(*keys_and_value) -> object:
    """A change of a JSON file: the value at the end of these keys."""
    *keys, last, value = keys_and_value

    def change(path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        place = content
        for key in keys:
            place = place[key]
        place[last] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


def fill(content: bytes) -> object:
    """A change of any file: other content."""
    return lambda path: path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def with_weight(value: object):
    """A change of a weights file: its first tensor."""

    def change(path: Path) -> None:
        weights = load_file(path)
        name = next(name for name in weights if "layers.0" in name)
        if value is None:
            del weights[name]
        else:
            weights[name] = torch.as_tensor(value)
        save_file(weights, path)

    return change


def flip_after_digest(path: Path) -> None:
    write_digest(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


TEXT = "text_config"
ANY_JSON = [cut, fill(b""), fill(b"[1, 2]"), fill(b"null"), fill(b"\xff\xfe\x00"), to_folder]
ANY_JSON += [fill(b"[" * 100_000), fill(b'{"a": ' * 50_000), Path.unlink]
VISION_SIZES = [
    ("hidden_size", -1),
    ("hidden_size", 10**9),
    ("hidden_size", "32"),
    ("hidden_size", [32]),
    ("hidden_size", 33),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 200),
    ("num_hidden_layers", 1.5),
    ("num_attention_heads", 7),
    ("image_size", 10**9),
    ("image_size", [48, 48]),
    ("image_size", 8),
    ("image_size", 96),
    ("patch_size", 0),
    ("patch_size", True),
    ("intermediate_size", 2**60),
    ("layer_norm_eps", float("nan")),
    ("hidden_act", "no such"),
    ("hidden_act", ["gelu"]),
    ("num_channels", 4),
    ("vision_config", 3),
]
PICTURES = [
    ("size", {"shortest_edge": "48"}),
    ("size", {"shortest_edge": 10**9}),
    ("size", {"longest_edge": 48}),
    ("size", [48]),
    ("size", 16),
    ("crop_size", {"height": 48, "width": -48}),
    ("crop_size", 224),
    ("do_resize", False),
    ("do_normalize", "yes"),
    ("image_mean", [0.5, 0.5]),
    ("image_mean", 0.5),
    ("image_mean", [0.5, 0.5, float("nan")]),
    ("image_std", [0, 0, 0]),
    ("rescale_factor", 1),
    ("resample", 99),
]
TEXT_SIZES = [
    ("hidden_size", 2**40),
    ("hidden_size", None),
    ("num_hidden_layers", 250),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 3),
    ("vocab_size", -5),
    ("vocab_size", 900_000),
    ("intermediate_size", "192"),
    ("max_position_embeddings", 10**12),
    ("rms_norm_eps", [1]),
    ("rope_parameters", "default"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
    ("rope_parameters", {"rope_theta": float("nan")}),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
]
TEMPLATES = [
    b"{% for",
    b"{{ raise_exception('no\\nsuch role') }}",
    b"{{ messages.nothing.at.all }}",
    b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    b"{% if bos_token and documents is none %}{% for a in range(99999) %}"
    b"{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
    b"{{ 'x' * 10 ** 11 }}",
    b"{{ ''.__class__.__mro__ }}",
    b"{% include 'x' %}",
]
BROKEN = [
    *[("vision", CONFIG, change) for change in ANY_JSON if change is not Path.unlink],
    *[("vision", CONFIG, edit(*change)) for change in VISION_SIZES],
    *[("vision", PREPROCESSOR, change) for change in ANY_JSON],
    *[("vision", PREPROCESSOR, edit(*change)) for change in PICTURES],
    *[("vision", WEIGHTS, change) for change in [cut, fill(b""), to_folder, Path.unlink]],
    *[("vision", WEIGHTS, with_weight(value)) for value in (None, [1.0], [[float("nan")] * 32])],
    ("vision", WEIGHTS, flip_after_digest),
    ("vision", WEIGHTS, fill(b"version https://git-lfs.github.com/spec/v1\n")),
    *[("tokenizer", "tokenizer.json", change) for change in ANY_JSON],
    ("tokenizer", "tokenizer.json", edit("model", "vocab", {})),
    ("tokenizer", "tokenizer.json", edit("model", "vocab", "<s>", -1)),
    ("tokenizer", "tokenizer.json", edit("model", "merges", [["no", "such"]])),
    ("tokenizer", "tokenizer.json", edit("added_tokens", "none")),
    ("tokenizer", "tokenizer.json", edit("version", 9)),
    *[("tokenizer", TOKENIZER_CONFIG, change) for change in [cut, fill(b"[1]"), fill(b"\xff")]],
    ("tokenizer", TOKENIZER_CONFIG, edit("bos_token", ["<s>"])),
    ("tokenizer", TOKENIZER_CONFIG, edit("model_max_length", "long")),
    ("tokenizer", TOKENIZER_CONFIG, edit("added_tokens_decoder", {"x": {"content": 3}})),
    *[("tokenizer", "chat_template.jinja", fill(template)) for template in TEMPLATES],
    ("tokenizer", "chat_template.jinja", Path.unlink),
    *[("llava", CONFIG, change) for change in ANY_JSON if change is not Path.unlink],
    *[("llava", CONFIG, edit(TEXT, *change)) for change in TEXT_SIZES],
    *[("llava", CONFIG, edit("vision_config", *change)) for change in VISION_SIZES[:-1]],
    ("llava", CONFIG, edit(TEXT, [])),
    ("llava", CONFIG, edit("projector_hidden_act", "gelu")),
    ("llava", CONFIG, edit("vision_feature_layer", [-1])),
    *[("llava", WEIGHTS, change) for change in [cut, to_folder, with_weight(None)]],
    ("llava", PREPROCESSOR, edit("crop_size", 10**9)),
]


@pytest.mark.parametrize(("kind", "name", "change"), BROKEN)
def test_what_is_broken_is_one_line_that_names_the_folder(
    folders, monkeypatch, capfd, kind, name, change
):
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    folder = folders[kind]
    change(folder / name)
    with pytest.raises(UserError) as raised:
        load(kind, folder)
    message = str(raised.value)
    assert str(folder) in message and "\n" not in message and len(message) < 600, message
    assert not capfd.readouterr().out


def test_a_folder_with_the_name_of_a_word_is_named(folders, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["vision"], "model")
    Path("model", WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot load the vision encoder in model "):
        load("vision", Path("model"))


@pytest.mark.parametrize("kind", ["vision", "tokenizer", "llava"])
def test_the_unbroken_folder_loads_in_silence(folders, capfd, kind):
    load(kind, folders[kind])
    assert capfd.readouterr() == ("", "")


def test_code_that_a_folder_brings_along_is_neither_run_nor_asked_about(folders, tmp_path):
    """In a process with "y" on its input: nothing asks for it."""
    mark = tmp_path / "was run"
    code = f"open({str(mark)!r}, 'w')\nclass Mine: pass\ndef generate(*args, **options): pass\n"
    classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor")
    own = {"auto_map": dict.fromkeys(classes, "mine.Mine"), "_attn_implementation": "some/kernel"}
    for folder in folders.values():
        (folder / "custom_generate").mkdir()
        for name in ("mine.py", "custom_generate/generate.py"):
            (folder / name).write_text(code)
        for path in folder.glob("*config.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(content | own))
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')

    lines = [f"load({kind!r}, Path({str(folder)!r}))" for kind, folder in folders.items()]
    program = "\n".join(["from tests.model.test_pretrained import load, Path", *lines])
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, input="y\n" * 9, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert not mark.exists() and finished.stdout + finished.stderr == ""


def test_a_tokenizer_that_would_cut_texts_does_not(folders):
    path = folders["tokenizer"] / "tokenizer.json"
    limits = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    edit("truncation", limits)(path)
    assert len(load_tokenizer(path.parent)("red blue red blue red blue")["input_ids"]) > 5


def test_weights_in_parts_are_put_together(folders):
    folder = folders["vision"]
    expected = load_vision_encoder(folder)[0].state_dict()
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for part in set(places.values()):
        save_file({n: w for n, w in weights.items() if places[n] == part}, folder / part)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    read = load_vision_encoder(folder)[0].state_dict()
    assert all(torch.equal(read[name], expected[name]) for name in expected)

    # a part lies in the folder itself, and is there
    name = next(iter(places))
    for place, reason in (
        ("../x.safetensors", "its part"),
        ("none.bin", "its part"),
        (3, "no wei"),
    ):
        index.write_text(json.dumps({"weight_map": places | {name: place}}))
        with pytest.raises(UserError, match=reason):
            load_vision_encoder(folder)


def test_a_whole_clip_of_older_transformers_loads(folders):
    """Both halves, `vision_model.` before the names, sizes as plain numbers, a pickle."""
    folder = folders["vision"]
    expected = load_vision_encoder(folder)[0].state_dict()
    weights = {f"vision_model.{name}": w for name, w in load_file(folder / WEIGHTS).items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(10)
    weights["text_model.embeddings.token_embedding.weight"] = torch.ones(3, 3)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    content = json.loads((folder / CONFIG).read_text())
    content = {"model_type": "clip", "vision_config": content, "text_config": {"hidden_size": 9}}
    (folder / CONFIG).write_text(json.dumps(content))
    edit("size", 48)(folder / PREPROCESSOR)
    edit("crop_size", 48)(folder / PREPROCESSOR)
    read, image_processor = load_vision_encoder(folder)
    assert all(torch.equal(read.state_dict()[name], expected[name]) for name in expected)
    assert image_processor.crop_size["height"] == 48
