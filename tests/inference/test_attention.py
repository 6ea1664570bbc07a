"""What a model looks at: against transformers' attention, slow loops, and rendered scenes."""

import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from inference import attention_page, occlusion
from inference.answer_tokens import encode_answer, split_words
from inference.attention import AttentionWatch, draw_map, occlude, watch_answer
from inference.attention_page import LookedAt, describe_fall, look_at_answer, write_page
from inference.config import EvalConfig
from inference.load import VLM, load_vlm
from inference.quantize import quantize
from model.llava import to_llava, to_llava_ids
from model.processing import VLMProcessor, load_tokenizer
from scripts.bench.attention import (
    REPORTED,
    attend,
    collect,
    find_ratio,
    grey_out,
    make_cases,
    select,
)
from tests.helpers import (
    N_PATCHES,
    ROOT,
    SHARED,
    TOKENIZER,
    needs_shared,
    picture,
    run_script,
    small_image_processor,
    small_model,
    user,
)

SHIPPED = ROOT / "model/demo/sft_vlm_128.pth"
SIDE = 3  # patches
TURNS = [user("<image>\nAnd <image>\nWhat changes?")]
ANSWER = "The red star 变成红色圆形 at C5."


@pytest.fixture(scope="module")
def vlm():
    model = small_model()
    # Random weights are the same everywhere; ten times as large, attention is not flat.
    for layer in model.layers:
        layer.attention.wq.weight.data *= 10
    processor = VLMProcessor(load_tokenizer(TOKENIZER), small_image_processor(), model.config)
    return VLM(model, processor, Path("weights"))


@pytest.fixture(scope="module")
def pixel_values(vlm):
    return vlm.processor.preprocess([picture(1), picture(2)])


@torch.no_grad()
def test_weights_are_those_of_transformers(vlm, pixel_values):
    model = vlm.model
    looks = watch_answer(vlm, TURNS, ANSWER, model.encode_images(pixel_values))
    assert looks.weights.shape == (2, 4, len(looks.words), 2, SIDE, SIDE)

    llava = to_llava(model)
    llava.set_attn_implementation("eager")
    input_ids, patches, n_prompt, words = encode_answer(vlm, TURNS, ANSWER, 2)
    llava_ids = to_llava_ids(input_ids, patches, model.config)
    theirs = llava(input_ids=llava_ids, pixel_values=pixel_values, output_attentions=True)
    for layer, attention in enumerate(theirs.attentions):  # each (1, n_heads, T, T)
        for number, word in enumerate(words):
            # the token before each token of the word
            rows = [n_prompt + token - 1 for token in word.tokens]
            expected = attention[0, :, rows][:, :, patches].mean(dim=1)  # (n_heads, 2 * patches)
            ours = torch.tensor(looks.weights[layer, :, number]).flatten(1)
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    peak = looks.map(1, 0).max() / looks.map(1, 0).mean()
    assert peak > 1.2, "attention too flat to compare anything"


def test_a_map_is_the_mean_of_what_is_not_chosen(vlm, pixel_values):
    looks = watch_answer(vlm, TURNS, ANSWER, vlm.model.encode_images(pixel_values))
    every = [
        [looks.map(2, 1, layer, head) for head in range(looks.n_heads)]
        for layer in range(looks.n_layers)
    ]
    np.testing.assert_allclose(looks.map(2, 1), np.mean(every, axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(looks.map(2, 1, layer=1), np.mean(every[1], axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        looks.map(2, 1, head=3), np.mean([e[3] for e in every], 0), rtol=1e-5
    )
    assert looks.map(2, 1).dtype == np.float32
    assert 0 < looks.map(2, 0).sum() + looks.map(2, 1).sum() < 1


def test_what_other_threads_do_is_not_watched(vlm, pixel_values):
    prompt = vlm.processor.encode_prompt([user("Hello")], 0)
    with AttentionWatch(torch.tensor([0]), torch.tensor([0])) as watch:
        other = threading.Thread(target=vlm.model, args=(prompt,))
        other.start()
        other.join()
        assert not watch.weights
        vlm.model(prompt)
    assert len(watch.weights) == 2
    vlm.model(prompt)
    assert len(watch.weights) == 2


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@torch.no_grad()
def test_occlusion_is_what_a_loop_over_patches_finds(pixel_values, dtype, monkeypatch):
    # some batches of a few pictures; the last one is not full
    monkeypatch.setattr(occlusion, "choose_batch_size", lambda *_: 4)
    model = small_model()
    quantize(model, dtype)
    vlm = VLM(
        model,
        VLMProcessor(load_tokenizer(TOKENIZER), small_image_processor(), model.config),
        Path("weights"),
    )
    input_ids, _, n_prompt, words = encode_answer(vlm, TURNS, ANSWER, 2)

    def log_probabilities(pixels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids, pixels).logits[0, n_prompt - 1 : -1].double()
        return logits.log_softmax(-1).gather(-1, input_ids[0, n_prompt:, None])[:, 0]

    clean = log_probabilities(pixel_values)
    for image in range(2):
        calls: list[tuple[int, int]] = []
        note = partial(lambda noted, *numbers: noted.append(numbers), calls)
        falls = occlude(vlm, TURNS, ANSWER, pixel_values, image, None, note)
        assert falls.shape == (len(words), SIDE, SIDE) and falls.dtype == np.float32
        assert calls == [(3, 9), (7, 9), (9, 9)]
        for patch in range(N_PATCHES):
            row, col = divmod(patch, SIDE)
            grey = pixel_values.clone()
            grey[image, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 0
            fall = clean - log_probabilities(grey)
            for number, word in enumerate(words):
                expected = fall[word.tokens].sum().item()
                # int8 has another kernel for a few rows than for many
                tolerance = 1e-4 if dtype == "float32" else 0.03
                assert falls[number, row, col] == pytest.approx(expected, abs=tolerance)
        assert np.abs(falls).max() > 0.05, "no patch matters"
        # one word alone: nothing behind it is read
        alone = occlude(vlm, TURNS, ANSWER, pixel_values, image, 2)
        assert alone == pytest.approx(falls[2], abs=1e-4 if dtype == "float32" else 0.03)


def test_batches_fit_memory_and_divide_evenly(vlm, monkeypatch):
    monkeypatch.setattr(occlusion, "CPU_BYTES", 1)
    assert occlusion.choose_batch_size(vlm.model, 100, 5) == 1
    monkeypatch.setattr(occlusion, "CPU_BYTES", 2**40)
    assert occlusion.choose_batch_size(vlm.model, 100, 5) == N_PATCHES + 1


TOKENIZERS = [TOKENIZER, pytest.param(SHARED / "minimind_tokenizer", marks=needs_shared)]
SPECIAL = st.sampled_from(
    ["</s>", "<s>", "@", "<image>", "红", "é", "😀", "👨‍👩‍👧", "है", "\n", " ", "�"]
)
TEXTS = st.lists(st.text(max_size=8) | SPECIAL, max_size=8).map("".join)


@pytest.mark.parametrize("folder", TOKENIZERS, ids=["demo", "published"])
def test_words_joined_are_the_answer(folder):
    tokenizer = load_tokenizer(folder)

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    @example("@" * 200)
    @example("  \n ")
    @example("")
    def check(text: str) -> None:
        ids, words = split_words(tokenizer, text)
        assert "".join(word.text for word in words) == text
        # each token is of one word, and there is none without
        assert [token for word in words for token in word.tokens] == list(range(len(ids)))
        assert all(word.text.strip() for word in words) or len(words) == 1
        # bytes of a character are not torn apart
        for word in words:
            decoded = tokenizer.decode([ids[token] for token in word.tokens])
            assert decoded.strip() == word.text.strip()

    check()


@pytest.mark.parametrize(
    "answer, words",
    [
        ("The star is red.", ["The", " star", " is", " red", "."]),
        ("C5 isn't left, I’m sure", ["C5", " isn't", " left", ",", " I’m", " sure"]),
        ("红色圆形在C3。", ["红色", "圆形", "在", "C3", "。"]),
        ("猫坐在xyz上", ["猫", "坐", "在", "xyz", "上"]),
        ("とても赤いねこ", ["と", "て", "も", "赤", "い", "ね", "こ"]),
        ("\n\nhi  you \n", ["\n\nhi", "  you \n"]),
        ("né 👨‍👩‍👧😀", ["né", " 👨‍👩‍👧", "😀"]),
        ("हिन्दी भाषा", ["हिन्दी", " भाषा"]),
        (" \n", [" \n"]),
    ],
)
def test_words(answer, words):
    tokenizer = load_tokenizer(TOKENIZER)
    assert [word.text for word in split_words(tokenizer, answer)[1]] == words


def test_what_cannot_be_looked_at_is_one_line(vlm, pixel_values):
    features = vlm.model.encode_images(pixel_values)
    for answer in ("", " \n"):
        with pytest.raises(UserError, match="the answer is empty"):
            watch_answer(vlm, TURNS, answer, features)
        with pytest.raises(UserError, match="the answer is empty"):
            occlude(vlm, TURNS, answer, pixel_values, 0, 0)
    for none in (None, features[:0]):
        with pytest.raises(UserError, match="no picture"):
            watch_answer(vlm, [user("What?")], ANSWER, none)
    with pytest.raises(UserError, match="fewer <image> than images: 0 for 2"):
        watch_answer(vlm, [user("What?")], ANSWER, features)
    with pytest.raises(UserError, match="max_seq_len of 512"):
        watch_answer(vlm, TURNS, 400 * "red star ", features)


def test_an_answer_of_image_tokens_is_text(vlm, pixel_values):
    answer = "@" * 2 * N_PATCHES
    looks = watch_answer(vlm, TURNS, answer, vlm.model.encode_images(pixel_values))
    assert "".join(looks.words) == answer
    assert occlude(vlm, TURNS, answer, pixel_values, 1, 0).shape == (SIDE, SIDE)


def test_a_map_is_bright_where_it_is_large():
    heat = np.zeros((2, 4), np.float32)
    heat[1, 2], heat[0, 0] = 0.5, -3  # below 0 counts as 0
    gray = torch.full((3, 48, 96), 128, dtype=torch.uint8)
    drawn = np.asarray(draw_map(gray, heat)).astype(int)
    assert drawn.shape == (48, 96, 3)
    bright = drawn[24:, 48:72]
    assert (bright == bright[0, 0]).all() and bright[0, 0, 0] > 220
    drawn[24:, 48:72] = drawn[0, 0]
    assert (drawn == drawn[0, 0]).all(), "only that patch has a color"
    assert drawn[0, 0].max() < 80, "and the picture is dim"


def test_a_map_of_equal_numbers_has_no_bright_patch_and_a_scale_can_be_given():
    gray = torch.full((3, 48, 48), 128, dtype=torch.uint8)

    def brightest(heat: np.ndarray, top: float | None = None) -> int:
        return int(np.asarray(draw_map(gray, heat, top)).max())

    assert brightest(np.zeros((8, 8))) < brightest(np.full((8, 8), 0.1)) < 120
    assert brightest(np.diag([1] + [0] * 7)) > 220
    assert brightest(np.diag([1] + [0] * 7), top=10) < 120


def test_page_of_two_pictures_and_many_words(vlm, pixel_values, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_page, "MOST_WORDS", 10)
    features = vlm.model.encode_images(pixel_values)
    looked = look_at_answer(vlm, TURNS, ANSWER, pixel_values, features)
    assert looked.attention.shape == looked.falls.shape == (len(looked.words), 2, SIDE, SIDE)
    # formulas, line breaks, and what no font has
    odd = ["$x_1$", "\n", "<b>", "\\frac", "W" * 100, *map(str, range(10))]
    maps = np.random.default_rng(0).random((len(odd), 1, SIDE, SIDE))
    long = LookedAt("<image>\n$a$?", odd, looked.pixels[:1], maps, 1e-7 * maps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_page(tmp_path / "new/out.png", [looked, long])
    with Image.open(tmp_path / "new/out.png") as page:
        assert page.format == "PNG" and page.width == 1116
        # 2 bands of 5 words with 2 pictures, 2 bands with one
        assert 6 * 400 < page.height < 6 * 480
        assert len(page.getcolors(2**24)) > 100


def test_a_system_without_chinese_fonts_gets_boxes_and_one_line(
    vlm, pixel_values, tmp_path, monkeypatch, capsys
):
    maps = np.ones((1, 1, SIDE, SIDE))
    pixels = vlm.processor.denormalize(pixel_values[:1])
    looked = LookedAt("<image>\n?", ["红色"], pixels, maps, maps)
    monkeypatch.setattr(attention_page, "CJK_FONTS", ("None Such",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_page(tmp_path / "out.png", [looked])
    assert "no font here has Chinese characters, such as None Such" in capsys.readouterr().out


@pytest.mark.parametrize(
    "nats, text",
    [
        (3.0, "−95 % at most"),
        (0.0123, "−1 % at most"),
        (1e-4, "−0.01 % at most"),
        (1e-6, "none matters"),
        (-1.0, "none matters"),
    ],
)
def test_falls_are_probabilities(nats, text):
    assert describe_fall(nats) == text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention": "out.jpg"}, "out.jpg: it becomes a .png file"),
        ({"attention": ""}, "so name it NAME.png"),
        ({"attention": "./a.png", "image": ["a.png"]}, "a.png, which is read too"),
        ({"attention": "out.png", "chat": True}, "leave it or --chat out"),
        ({"attention": "out.png", "data": ["rows.jsonl"]}, "leave it or --data out"),
    ],
)
def test_a_page_that_cannot_be_is_refused_first(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        EvalConfig(**options)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="which is a folder"):
        EvalConfig(attention=str(tmp_path / "folder.png"))


def test_eval_vlm_draws_a_page(tmp_path):
    case = make_cases(REPORTED, 1)[0]
    case.picture.save(tmp_path / "scene.png")
    command = ["eval_vlm.py", "--weights", SHIPPED, "--image", tmp_path / "scene.png"]
    command += ["--temperature", 0, "--max_new_tokens", 3]
    command += ["--prompt", case.turns[0]["content"].removeprefix("<image>\n")]
    finished = run_script(*map(str, command), "--attention", str(tmp_path / "out.png"))
    assert finished.returncode == 0, finished.stdout
    assert f"attention: {tmp_path / 'out.png'}" in finished.stdout
    assert "196/196" in finished.stdout, "a progress bar"
    with Image.open(tmp_path / "out.png") as page:
        assert page.format == "PNG"
    finished = run_script(*map(str, command), "--attention", str(tmp_path / "out.pdf"))
    assert finished.returncode == 2 and "Traceback" not in finished.stdout
    assert "so name it NAME.png" in finished.stdout and "model:" not in finished.stdout


def find_ratios(watch, n: int) -> dict[str, float]:
    """A smaller version of `python -m scripts.bench attention`."""
    masses = collect(watch, load_vlm(SHIPPED, device="cpu"), make_cases(REPORTED, n))
    return {kind: find_ratio(select(some))[-1, -1] for kind, some in masses.items()}


def test_the_shipped_model_looks_at_what_it_speaks_about():
    ratios = find_ratios(attend, 60)
    assert ratios["right"] >= 3
    assert ratios["wrong"] < 1.5
    assert 0.7 < ratios["chance"] < 1.5


def test_the_words_of_the_shipped_model_depend_on_what_they_speak_about():
    ratios = find_ratios(grey_out, 2)
    assert ratios["right"] >= 3
    assert ratios["wrong"] < ratios["right"] / 2
