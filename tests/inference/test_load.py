"""`load_vlm`: a path is enough, and what does not fit together is named."""

import doctest
import json
import os

import pytest
import torch

from common.device import choose_device
from common.errors import BadSampleError, MissingFileError, UserError
from inference import load_vlm
from model.files import read_json
from model.model_lm import MiniMindLM
from model.weights import save_atomically, save_weights, select_weights
from tests.helpers import TOKENIZER, picture, run_cold, small_model


def save_described(model, path, vision_dir):
    """Save weights as training does, with the JSON that says what they are."""
    save_weights(model, path, tokenizer=str(TOKENIZER), vision_model=str(vision_dir))
    return path


@pytest.fixture(scope="module")
def described(vision_dir, tmp_path_factory):
    """A weights file of sizes that no default guesses, and the JSON beside it."""
    model = small_model(n_heads=4, n_kv_heads=1, rope_theta=5000.0)
    path = tmp_path_factory.mktemp("described") / "mine_64.pth"
    return model, save_described(model, path, vision_dir)


@pytest.fixture
def parts(vision_dir):
    """What a published file does not bring along."""
    return {"tokenizer": TOKENIZER, "vision_model": vision_dir, "device": "cpu"}


def test_the_example_of_the_docstring_runs(described, tmp_path, monkeypatch, capsys, vision_dir):
    save_described(small_model(), tmp_path / "out/demo/sft_vlm_64.pth", vision_dir)
    picture().save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    lines = [example.source for example in doctest.DocTestParser().get_examples(load_vlm.__doc__)]
    assert len(lines) == 3
    scope = {}
    exec("".join(lines), scope)
    assert len(capsys.readouterr().out) > 1
    assert isinstance(scope["vlm"].ask("cat.jpg", "What is this?", max_new_tokens=3), str)


def test_importing_the_package_does_not_import_pytorch():
    finished = run_cold("-c", "import sys, inference\nprint('torch' in sys.modules)")
    assert finished.stdout == "False\n"


@torch.no_grad()
def test_a_file_of_training_needs_its_path_only(described, processor):
    model, path = described
    vlm = load_vlm(path, device="cpu")
    input_ids = processor.encode_prompt([{"role": "user", "content": "<image>\nWhat?"}], 1)
    pixels = processor.preprocess([picture()])
    assert torch.equal(vlm.model(input_ids, pixels).logits, model(input_ids, pixels).logits)
    assert not vlm.model.training and vlm.weights == path


def test_ask_takes_paths_pictures_lists_and_text(described, tmp_path):
    vlm = load_vlm(described[1], device="cpu")
    picture(1).save(tmp_path / "a.png")
    options = {"temperature": 0, "max_new_tokens": 12}
    answer = vlm.ask(tmp_path / "a.png", "What is this?", **options)
    assert answer == vlm.ask(str(tmp_path / "a.png"), "What is this?", **options)
    assert answer == vlm.ask(picture(1), "What is this?", **options)
    assert answer == vlm.ask([picture(1)], "<image>\nWhat is this?", **options)
    assert answer == "".join(vlm.ask(picture(1), "What is this?", stream=True, **options))
    assert answer != vlm.ask([picture(1), picture(2)], "What is this?", **options)
    assert answer != vlm.ask(None, "What is this?", **options)
    with pytest.raises(BadSampleError, match="image missing"):
        vlm.ask("nothing.png", "What is this?")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_sizes_of_a_published_file_are_read_off_it(tmp_path, parts, dtype):
    model = small_model(dim=128, n_layers=3)
    save_atomically(select_weights(model), tmp_path / "sft_vlm_128.pth")
    vlm = load_vlm(tmp_path / "sft_vlm_128.pth", dtype=dtype, **parts)
    assert vlm.model.config.n_layers == 3 and vlm.model.config.max_seq_len == 8192
    options = {"temperature": 0, "max_new_tokens": 1}
    assert isinstance(vlm.ask(picture(), "What is this?", **options), str)


def test_a_folder_gives_its_best_model(tmp_path, parts):
    weights = select_weights(small_model(n_heads=2))
    names = ["lm_64", "mine_64", "pretrain_vlm_64", "sft_vlm_multi_64", "sft_vlm_64", "sft_vlm_512"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="has no weights of a model that sees"):
        load_vlm(tmp_path / "empty", **parts)
    save_atomically(weights, tmp_path / "lm_64.pth")
    with pytest.raises(MissingFileError, match="has no weights of a model that sees"):
        load_vlm(tmp_path, **parts)
    for name in names[1:]:
        save_atomically(weights, tmp_path / f"{name}.pth")
        assert load_vlm(tmp_path, **parts).weights.stem == name
    assert load_vlm(tmp_path, dim=64, **parts).weights.stem == "sft_vlm_64"


def test_the_newest_of_other_names_is_taken_and_several_widths_are_asked_about(tmp_path, parts):
    weights = select_weights(small_model(n_heads=2))
    for age, name in enumerate(["new_64", "old_64"]):
        save_atomically(weights, tmp_path / f"{name}.pth")
        os.utime(tmp_path / f"{name}.pth", (1000 - age, 1000 - age))
    assert load_vlm(tmp_path, **parts).weights.stem == "new_64"
    for name in ("sft_vlm_64", "sft_vlm_128"):
        save_atomically(weights, tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match=r"sft_vlm_128.pth, sft_vlm_64.pth: pass --dim"):
        load_vlm(tmp_path, **parts)


def test_contradictions_name_both_values(described, tmp_path, parts):
    _, path = described
    with pytest.raises(UserError, match=r"--dim is 512 but .*_64.pth has dim 64: leave --dim out"):
        load_vlm(path, dim=512)
    with pytest.raises(UserError, match=r"--n_layers is 3 but .* has n_layers 2: leave --n_layers"):
        load_vlm(path, n_layers=3)
    with pytest.raises(UserError, match="--dtype is int4: with --backend torch choose from"):
        load_vlm(path, dtype="int4")
    with pytest.raises(UserError, match="--device gpu is no device: pass cpu, cuda"):
        load_vlm(path, device="gpu")
    for device in ("meta", "mps:7", "cpu:3"):
        with pytest.raises(UserError, match=f"--device {device} but PyTorch sees|there are only"):
            load_vlm(path, device=device)
    assert choose_device(None).type in ("cpu", "cuda", "mps", "xpu")
    language_model = MiniMindLM(small_model().config)
    save_atomically(language_model.state_dict(), tmp_path / "lm_64.pth")
    with pytest.raises(UserError, match="a language model that has not learned to see"):
        load_vlm(tmp_path / "lm_64.pth", **parts)
    save_atomically({"conv1.weight": torch.zeros(2)}, tmp_path / "other_64.pth")
    with pytest.raises(UserError, match="holds no MiniMind language model: its keys are conv1"):
        load_vlm(tmp_path / "other_64.pth", **parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 2}, "has n_kv_heads 1, but the model here has n_kv_heads 2"),
        ({"n_image_tokens": 196}, "was trained with n_image_tokens 196, .* has n_image_tokens 9"),
        ({"dim": "64"}, r"is damaged \(dim is '64': it has to be a whole number"),
        ({"n_heads": "4"}, "is damaged .*: remove it, and pass --dim and --n_layers instead"),
        ({"n_kv_head": 2}, "has no n_kv_head"),
        ({"n_layers": 200}, "is of dim 64 with 2 layers, not of dim 64 with 200"),
        ({"n_layers": 10**9}, r"is damaged \(n_layers is 1000000000: it has to be from 1 to 256\)"),
        ({"hidden_dim": 100_000}, "has hidden_dim 192, but the model here has hidden_dim 100000"),
        ({"rope_theta": float("nan")}, r"is damaged \(rope_theta is nan: it has to be from 1"),
        ({"max_seq_len": -1}, r"is damaged \(max_seq_len is -1"),
        ({"dropout": [0]}, r"is damaged \(dropout is \[0\]: it has to be a number"),
        ({"dim": True}, r"is damaged \(dim is True"),
    ],
)
def test_an_edited_description_is_found_out(described, tmp_path, changes, message):
    _, path = described
    (tmp_path / "x_64.pth").write_bytes(path.read_bytes())
    info = json.loads(path.with_suffix(".json").read_text())
    info["config"] |= changes
    (tmp_path / "x_64.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=message):
        load_vlm(tmp_path / "x_64.pth", device="cpu")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"config": 3}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_description_that_is_none_is_one_line(described, tmp_path, content):
    _, path = described
    (tmp_path / "x_64.pth").write_bytes(path.read_bytes())
    (tmp_path / "x_64.json").write_bytes(content)
    with pytest.raises(
        UserError, match="x_64.json is damaged .*: remove it, and pass --dim"
    ) as error:
        load_vlm(tmp_path / "x_64.pth", device="cpu")
    assert "\n" not in str(error.value)


def test_a_description_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"JSON is no file: .*config\.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["tokenizer", "vision_model", "question"])
@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}])
def test_a_part_that_is_no_path_is_one_line(described, tmp_path, name, value):
    _, path = described
    (tmp_path / "x_64.pth").write_bytes(path.read_bytes())
    info = json.loads(path.with_suffix(".json").read_text()) | {name: value}
    (tmp_path / "x_64.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=rf"x_64.json is damaged \({name} is no text\)"):
        load_vlm(tmp_path / "x_64.pth", device="cpu")


@pytest.mark.parametrize("layer", [1, 255])
def test_a_file_of_many_layers_and_few_numbers_takes_no_memory(described, tmp_path, layer, parts):
    """The name of one tensor says how many layers there are; that many are not made for it."""
    weights = {"tok_embeddings.weight": torch.zeros(1).expand(672, 16_384)}
    weights["vision_proj.vision_proj.0.weight"] = torch.zeros(1)
    weights[f"layers.{layer}.attention.wq.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "x_16384.pth")
    with pytest.raises(UserError, match="does not fit the model, missing: layers.0.*and .* more"):
        load_vlm(tmp_path / "x_16384.pth", **parts)


def test_a_prompt_beyond_max_seq_len_is_one_line(described):
    vlm = load_vlm(described[1], max_seq_len=24, device="cpu")
    with pytest.raises(UserError, match="tokens but the model takes 24") as error:
        vlm.ask(picture(), "What is this? " * 5)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="30 tokens but max_seq_len is 24: shorten the prompt"):
        vlm.model.generate(torch.full((1, 30), 50))
    with pytest.raises(UserError, match="30 tokens are more than the model's max_seq_len of 24"):
        vlm.model(torch.full((1, 30), 50))
