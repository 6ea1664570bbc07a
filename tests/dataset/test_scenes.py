"""The rendered set: held-out combinations stay unseen, answers are true, files as published."""

import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.scenes.scene import (
    COLORS,
    IMAGE_SIZE,
    MAX_THINGS,
    RADII,
    SHAPES,
    change_one,
    combinations,
    draw_scene,
    is_held_out,
    sample_scene,
)
from dataset.scenes.text import (
    ALL_LANGUAGES,
    LANGUAGES,
    MORE_LANGUAGES,
    PAIR_TYPES,
    QUESTION_TYPES,
    TEMPLATES,
    WORDS,
    ask,
    caption,
    describe,
    word,
)
from dataset.scenes.write import (
    EVAL_TYPES,
    FILES,
    N_ROWS,
    OTHER_REQUESTS,
    make_row,
    pretrain_row,
    sample_scenes,
    text_row,
    vary_request,
    write_scene_set,
)
from model.processing import load_tokenizer
from tests.helpers import ROOT, TOKENIZER, run_script


def test_training_and_held_out_combinations_are_disjoint_and_both_complete():
    train, held_out = set(combinations(False)), set(combinations(True))
    assert not train & held_out and len(train) == 108 and len(held_out) == 36
    for side in (train, held_out):
        assert (
            {c for c, _, _ in side} == set(COLORS)
            and {s for _, s, _ in side} == set(SHAPES)
            and {z for *_, z in side} == set(RADII)
        )
    pairs = Counter((color, shape) for color, shape, _ in train)
    assert len(pairs) == 48 and min(pairs.values()) >= 2, (
        "every color-shape pair keeps two sizes in training"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_no_row_for_training_shows_a_held_out_combination(seed):
    for part in ("pretrain", "sft", "multi"):
        for scene in make_row(part, seed, LANGUAGES, seed)[1]:
            assert not any(is_held_out(*thing.combination) for thing in scene.things)
    for part in ("val", "eval", "eval_multi"):
        for scene in make_row(part, seed, LANGUAGES, seed)[1]:
            assert all(is_held_out(*thing.combination) for thing in scene.things)
    row, _ = text_row(random.Random(seed), "en", QUESTION_TYPES)
    text = row["conversations"][0]["content"]
    things = re.findall(r"(small|medium|large) (\w+) (\w+) [A-G][1-7]", text)
    assert things
    for size, color, shape in things:
        assert not is_held_out(color, shape, size)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
def test_things_are_inside_and_apart(seed, held_out):
    scene = sample_scene(random.Random(seed), held_out)
    assert 1 <= len(scene.things) <= MAX_THINGS
    assert len({thing.patch for thing in scene.things}) == len(scene.things)
    for thing in scene.things:
        assert RADII[thing.size] - 2 <= min(
            thing.x, thing.y, IMAGE_SIZE - thing.x, IMAGE_SIZE - thing.y
        )
    picture = np.asarray(draw_scene(scene)).astype(int)
    assert picture.shape == (224, 224, 3) and np.array_equal(picture, np.asarray(draw_scene(scene)))
    for thing in scene.things:
        assert np.abs(picture[thing.y, thing.x] - COLORS[thing.color]).max() <= 14, (
            "its color is at its center"
        )


def words_in(text: str, language: str) -> list[str]:
    """The known words of a text in English, in their order, and its places and numbers."""
    english = {word(name, language): name for name in WORDS}
    known = "|".join(sorted(english, key=len, reverse=True))
    return [english.get(found, found) for found in re.findall(rf"{known}|[A-G][1-7]|\d", text)]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(ALL_LANGUAGES))
def test_answers_follow_from_the_description_alone(seed, language):
    """Answer every question about one image again, from the English description alone."""
    rng = random.Random(seed)
    scene = sample_scene(rng, held_out=bool(seed % 2))
    things = re.findall(r"(\w+) (\w+) (\w+) ([A-G][1-7])", describe(scene.things, "en"))
    assert len(things) == len(scene.things)
    for question_type in ("color", "shape", "size", "count", "relation"):
        question = ask(rng, question_type, (scene,), language)
        if question is None:
            continue
        asked, answer = (words_in(text, language) for text in (question.text, question.answer))
        if question_type == "relation":
            pairs = [(w, s) for w, s in itertools.pairwise(asked) if w in COLORS and s in SHAPES]
            places = [
                place for pair in pairs for _, *found, place in things if tuple(found) == pair
            ]
            assert [w for w in answer if re.fullmatch("[A-G][1-7]", w)] == places
            one, other = (
                place[0] if {"left", "right"} & set(asked) else place[1] for place in places
            )
            expected = {
                "left": one < other,
                "right": one > other,
                "above": one < other,
                "below": one > other,
            }
            assert answer[-1] in asked and expected[answer[-1]]
            continue
        fitting = [t for t in things if all(w in t for w in asked if w in COLORS or w in SHAPES)]
        if question_type == "count":
            assert answer[-1] == str(len(fitting))
        else:
            assert len(fitting) == 1 and answer[-1] in fitting[0] and answer[-1] not in asked


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(ALL_LANGUAGES))
def test_answers_about_two_images_follow_from_them(seed, language):
    rng = random.Random(seed)
    for question_type in ("which_image", "in_image"):
        scenes = sample_scenes(rng, held_out=bool(seed % 2), question_type=question_type)
        question = ask(rng, question_type, scenes, language)
        if question is None:
            continue
        asked, answer = (words_in(text, language) for text in (question.text, question.answer))
        which = next(found for found in asked + answer if found in ("first", "second"))
        things = [scene.things for scene in scenes]
        here, other = things if which == "first" else reversed(things)
        color, shape = (next(w for w in answer if w in known) for known in (COLORS, SHAPES))
        assert (color, shape) in [(thing.color, thing.shape) for thing in here]
        if question_type == "which_image":
            assert (color, shape) not in [(thing.color, thing.shape) for thing in other]
        else:
            assert [thing.color for thing in here if thing.shape == shape] == [color]


@pytest.mark.parametrize("language", MORE_LANGUAGES)
def test_another_language_says_the_same_with_words_of_its_own(language):
    """Every word and template is there, and says what English and Chinese say."""
    assert MORE_LANGUAGES[language].WORDS.keys() == WORDS.keys()
    assert len({word(english, language) for english in WORDS}) == len(WORDS)
    assert MORE_LANGUAGES[language].TEMPLATES.keys() == TEMPLATES.keys()
    for name, texts in TEMPLATES.items():
        own, theirs = MORE_LANGUAGES[language].TEMPLATES[name], texts["zh"]
        for one, other in [(own, theirs)] if isinstance(own, str) else zip(own, theirs):
            assert set(re.findall(r"{\w+}", one)) == set(re.findall(r"{\w+}", other)), name
    scene = sample_scene(random.Random(7), held_out=False)
    description = caption(scene, language)[1]
    things = [[t.size, t.color, t.shape, t.place] for t in scene.things]
    assert words_in(description, language) == [said for thing in things for said in thing]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(["color", "shape", "size", "place"]))
def test_a_changed_scene_differs_in_one_aspect(seed, aspect):
    rng = random.Random(seed)
    first = sample_scene(rng, held_out=False)
    second = change_one(rng, first, aspect)
    if second:
        words = words_in(ask(rng, "difference", (first, second), "zh").answer, "zh")
        differs = [
            name
            for name, old, new in zip(("size", "color", "shape", "place"), words, words[4:])
            if old != new
        ]
        assert len(words) == 8 and differs == [aspect]
        for language in ALL_LANGUAGES:
            turned = ask(rng, "difference", (second, first), language).answer
            assert words_in(turned, language) == words[4:] + words[:4]
        assert not any(is_held_out(*thing.combination) for thing in second.things)


def test_files_are_in_the_published_formats_and_the_same_every_time(tmp_path):
    sizes = {"pretrain": 20, "sft": 30, "multi": 10, "eval": 24, "eval_multi": 12}
    write_scene_set(tmp_path / "a", sizes)
    write_scene_set(tmp_path / "b", sizes)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in names
    )
    parts = {}
    for part, (name, images) in FILES.items():
        if part in sizes:
            text = (tmp_path / "a" / name).read_text(encoding="utf-8")
            parts[part] = [json.loads(line) for line in text.splitlines()]
            for row in parts[part]:
                shown = row["image"].split(", ")
                n_images = 2 if part in ("multi", "eval_multi") else 1
                opening = row["conversations"][0]["content"]
                assert len(shown) == n_images == opening.count("<image>")
                assert all((tmp_path / "a" / images / name).is_file() for name in shown)
    types = Counter(row["type"] for row in parts["eval"])
    assert types == dict.fromkeys(EVAL_TYPES, 4)
    assert Counter(row["type"] for row in parts["eval_multi"]) == dict.fromkeys(PAIR_TYPES, 4)


def test_both_stages_show_the_same_scenes():
    """So the feature cache that pretraining fills serves SFT."""
    for index in range(20):
        (scene,) = make_row("pretrain", index, LANGUAGES, seed=1)[1]
        assert make_row("sft", index, LANGUAGES, seed=1)[1] == (scene,)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(LANGUAGES))
def test_a_request_in_other_words_changes_nothing_else(seed, language):
    rng = random.Random(seed)
    scene = sample_scene(rng, held_out=False)
    usual, _ = pretrain_row(rng, language, (scene,))
    row = json.loads(json.dumps(usual))
    vary_request(rng, row, language)
    question, answer = (turn["content"] for turn in row["conversations"])
    allowed = (caption(scene, language)[0], *OTHER_REQUESTS["caption"][language])
    assert question.removeprefix("<image>\n") in allowed and question.startswith("<image>\n")
    assert answer == describe(scene.things, language)


def test_the_command_line_writes_the_same_set(tmp_path):
    flags = [flag for part in N_ROWS if part != "pretrain" for flag in (f"--{part}_rows", "0")]
    finished = run_script(
        "-m",
        "dataset.scenes",
        tmp_path / "a",
        *flags,
        "--pretrain_rows",
        "3",
        "--seed",
        "7",
        "--languages",
        "ja",
    )
    assert finished.returncode == 0, finished.stdout
    write_scene_set(tmp_path / "b", {"pretrain": 3}, seed=7, languages=["ja"])
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in "ab"
    )
    assert found == expected and len(found) == 4


@pytest.mark.parametrize("word", [*COLORS, *SHAPES, *RADII, *(str(n) for n in range(1, 8))])
def test_every_attribute_is_one_token_wherever_it_stands(word):
    tokenizer = load_tokenizer(TOKENIZER)
    assert len(tokenizer.tokenize(f" {word}")) == 1
    if word in WORDS:
        alone = tokenizer.tokenize(WORDS[word])
        for before in (WORDS["red"], WORDS["large"], ""):
            tokens = tokenizer.tokenize(before + WORDS[word] + TEMPLATES["color"]["zh"][0][7:])
            assert len(alone) == 1 and alone[0] in tokens


def test_tokenizer_script_gives_the_shipped_tokenizer_again(tmp_path):
    assert run_script("-m", "scripts.demo.train_tokenizer", "--out_dir", tmp_path).returncode == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (TOKENIZER / name).read_text()


def test_stand_ins_are_small_and_their_scripts_repeat(tmp_path):
    """<= 8 MB shipped; two short runs of each training script give the same bytes."""
    stand_ins = [*(ROOT / "model/demo").rglob("*.*")]
    assert sum(path.stat().st_size for path in stand_ins) <= 8e6
    flags = ["--steps", "3", "--plain_steps", "2", "--batch_size", "4", "--eval_scenes", "4"]
    encoders = [tmp_path / name for name in ("a", "b")]
    for folder in encoders:
        finished = run_script(
            "-m", "scripts.demo.train_vision_encoder", *flags, "--out_dir", folder
        )
        assert finished.returncode == 0, finished.stdout
    first, second = ((folder / "model.safetensors").read_bytes() for folder in encoders)
    assert first == second

    flags = ["--max_steps", "3", "--eval_rows", "8"]
    weights = [tmp_path / name for name in ("a.pth", "b.pth")]
    for path in weights:
        finished = run_script("-m", "scripts.demo.train_base", *flags, "--out_file", path)
        assert finished.returncode == 0, finished.stdout
    assert weights[0].read_bytes() == weights[1].read_bytes()
