"""`python -m scripts.bench photos`: its vision encoder against the package's own; its steps."""

import io
import json
from argparse import Namespace

import pytest
import torch

from scripts.bench import photos
from scripts.bench.photos_encoder import IMAGE_SIZE, convert, read_package
from tests.helpers import TOKENIZER, assistant, picture, run_script, user, write_rows, write_zip

oracle = pytest.importorskip("efficientnet_lite_pytorch", reason="requirements-dev.txt has it")


def test_the_converted_network_equals_the_package_s_own():
    weights = read_package()
    network = oracle.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(weights)
    pixels = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    with torch.no_grad():
        expected = network.extract_features(pixels)
        found = convert(weights)(pixels).last_hidden_state
    assert found.shape == (2, 1280, 7, 7)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def make_row(image: str, caption: str) -> dict:
    return {"conversations": [user("What is it?\n<image>"), assistant(caption)], "image": image}


def test_where_a_picture_stood_are_words_of_its_captions():
    rows = [
        make_row("a.jpg", "A black dog runs."),
        make_row("b.jpg", "The sea."),
        make_row("a.jpg", "A puppy on the grass."),
    ]
    text_rows = photos.make_text_rows(rows, "en")
    assert len(text_rows) == photos.READINGS * len(rows)
    words = {"A black dog runs.": set(), "The sea.": set(), "A puppy on the grass.": set()}
    for row in text_rows:
        assert "image" not in row
        question, answer = row["conversations"]
        words[answer["content"]] |= set(question["content"].removeprefix("What is it?").split())
    both = {"black", "dog", "runs", "puppy", "grass"}
    assert words["A black dog runs."] <= both and words["A puppy on the grass."] <= both
    assert words["The sea."] <= {"sea"}
    # another seed may take away all words of a caption, but not of all captions
    assert set().union(*words.values())


def test_chinese_words_are_characters():
    text_rows = photos.make_text_rows([make_row("a.jpg", "两只狗在水里。")] * 3, "zh")
    shown = {word for row in text_rows for word in row["conversations"][0]["content"].split()[3:]}
    assert shown and shown <= set("两只狗水里")


def test_the_whole_way_on_a_few_photographs(tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="requirements-metrics.txt has it")
    # four photographs of each kind, two captions in each language
    captions = {
        "en": ["A red thing on a table.", "One more of it."],
        "zh": ["桌上有红色的东西。"] * 2,
    }
    pictures = {}
    for n in range(8):
        file = io.BytesIO()
        picture(n).save(file, "JPEG")
        pictures[f"{n}.jpg"] = file.getvalue()
    write_zip(
        tmp_path / photos.TRAIN_IMAGES,
        {f"pretrain_images/{n}.jpg": pictures[f"{n}.jpg"] for n in range(4)},
    )
    write_zip(tmp_path / photos.VAL_IMAGES, {f"{n}.jpg": pictures[f"{n}.jpg"] for n in range(4, 8)})
    texts = [text for language in captions.values() for text in language]
    write_rows(
        tmp_path / photos.TRAIN, [make_row(f"{n}.jpg", text) for n in range(4) for text in texts]
    )
    write_rows(tmp_path / photos.VAL, [{"image": f"{n}.jpg"} | captions for n in range(4, 8)])

    # everything as it is, but small, and without the seconds that a fresh Python takes
    monkeypatch.setattr(photos, "WORK", tmp_path / "work")
    monkeypatch.setattr(photos, "SIZES", {"dim": 64, "n_layers": 1})

    def run_python(*command, **options):
        finished = run_script(*command)
        assert finished.returncode == 0, finished.stdout

    monkeypatch.setattr(photos, "run_python", run_python)
    args = Namespace(
        flickr8k=tmp_path,
        languages=["zh"],
        tokenizer=TOKENIZER,
        device="cpu",
        dtype="float32",
        flags=[],
    )
    table = photos.measure(args)
    assert [(row["language"], row["images"]) for row in table] == [
        ("zh", "right"),
        ("zh", "wrong"),
        ("zh", "none"),
    ]
    for row in table:
        assert row["CIDEr-D"]["low"] <= row["CIDEr-D"]["value"] <= row["CIDEr-D"]["high"]
    # It read each of 2 x 8 rows of words once, and saw each of 8 photographs' rows twice.
    for name, n_epochs in (("lm", 1), ("sft_vlm", 2)):
        log = (tmp_path / f"work/zh/{name}_64.log.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(log[0])["epochs"] == n_epochs
        assert json.loads(log[-1])["event"] == "end"
