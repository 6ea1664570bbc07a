"""Write the rendered demo set in the published data formats.

pretrain_vlm_data.jsonl           one image and its description
sft_vlm_data.jsonl                dialogues about the same images
images/                           the images of both
sft_vlm_data_multi.jsonl, sft_multi_images/    dialogues about two images
eval_vlm_data.jsonl, eval_images/              one question a row about held-out scenes, with its
                                               `type`
val_vlm_data.jsonl, val_images/                the same, for the validation loss
eval_vlm_data_multi.jsonl, eval_multi_images/  the same, about two images
"""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.text import IMAGE_TAG
from dataset.scenes.scene import Scene, change_one, draw_scene, sample_scene
from dataset.scenes.text import (
    LANGUAGES,
    PAIR_TYPES,
    QUESTION_TYPES,
    Question,
    ask,
    caption,
    describe,
    get_template,
)

# Rows of each part, if not given.
N_ROWS = {"pretrain": 6000, "sft": 6000, "multi": 3000, "val": 24, "eval": 960, "eval_multi": 300}
# Of each part: the file of its rows, and the folder of their images beside it. Row i of "pretrain"
# and row i of "sft" show the same scene, so what one stage knows of a picture serves the other.
FILES = {
    "pretrain": ("pretrain_vlm_data.jsonl", "images"),
    "sft": ("sft_vlm_data.jsonl", "images"),
    "multi": ("sft_vlm_data_multi.jsonl", "sft_multi_images"),
    "val": ("val_vlm_data.jsonl", "val_images"),
    "eval": ("eval_vlm_data.jsonl", "eval_images"),
    "eval_multi": ("eval_vlm_data_multi.jsonl", "eval_multi_images"),
}
# Questions that a dialogue is given; those that come twice are dropped.
LEAST_TURNS, MOST_TURNS = 6, 14
# Asked about one image, and in evaluation its description as well.
ONE_IMAGE_TYPES = tuple(name for name in QUESTION_TYPES if name not in PAIR_TYPES)
EVAL_TYPES = (*ONE_IMAGE_TYPES, "description")
# What is learned slowest is asked most: to find a thing by its shape, to count; the difference.
SFT_TYPES = (*ONE_IMAGE_TYPES, "color", "count", "count")
MULTI_TYPES = (*PAIR_TYPES, "difference", "difference")
# Part of the dialogues about one image that begin with a description.
DESCRIPTION_SHARE = 0.35
# Ways to ask for a description and for a difference, beside that of TEMPLATES. The Chinese ones
# are the questions that the published project asks.
OTHER_REQUESTS = {
    "caption": {"en": ("What is this?",), "zh": ("描述一下这个图像的内容。", "这是什么？")},
    "difference": {"en": ("What changes?",), "zh": ("比较一下两张图像的异同点。",)},
}


def sample_scenes(rng: random.Random, held_out: bool, question_type: str) -> tuple[Scene, ...]:
    """The scene a question of that type is about, or the two.

    For "difference" the second is the first with one thing changed.
    """
    if question_type not in PAIR_TYPES:
        return (sample_scene(rng, held_out),)
    if question_type != "difference":
        return tuple(sample_scene(rng, held_out, rng.choice((1, 2, 2))) for _ in range(2))
    while True:
        first = sample_scene(rng, held_out, n_things=1)
        second = change_one(rng, first, rng.choice(("color", "shape", "size", "place")))
        if second:
            return first, second


def sample_dialogue(
    rng: random.Random, language: str, types: Sequence[str], scenes: tuple[Scene, ...] | None = None
) -> tuple[tuple[Scene, ...], list[Question]]:
    """Training scenes, and different questions about them.

    Each of `types` that fits the number of scenes is as likely as the next.

    Args:
        rng: source of every choice.
        language: one of LANGUAGES.
        types: what is asked.
        scenes: what it is about; drawn if not given.
    """
    questions: dict[str, Question] = {}
    while not questions:
        first_type = rng.choice(types)
        shown = scenes or sample_scenes(rng, held_out=False, question_type=first_type)
        fitting = [name for name in types if (name in PAIR_TYPES) == (first_type in PAIR_TYPES)]
        for _ in range(rng.randint(LEAST_TURNS, MOST_TURNS)):
            question = ask(rng, rng.choice(fitting), shown, language)
            if question:
                questions[question.text] = question
    return shown, list(questions.values())


def as_turns(pairs: list[tuple[str, str]], prefix: str) -> list[dict]:
    """Conversation turns; `prefix` (the images, or their words) opens the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        content = f"{prefix}\n{question}" if index == 0 else question
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return turns


def dialogue_row(
    rng: random.Random, language: str, types: Sequence[str], scenes: tuple[Scene, ...] | None = None
) -> tuple[dict, tuple[Scene, ...]]:
    """(row without "image", scenes): a dialogue about one scene, or two.

    A part of the single ones begin with a description. See `sample_dialogue` for the arguments.
    """
    scenes, questions = sample_dialogue(rng, language, types, scenes)
    pairs = [(question.text, question.answer) for question in questions]
    if len(scenes) == 1 and rng.random() < DESCRIPTION_SHARE:
        pairs[0] = caption(scenes[0], language)
    return {"conversations": as_turns(pairs, "\n".join([IMAGE_TAG] * len(scenes)))}, scenes


def text_row(
    rng: random.Random, language: str, types: Sequence[str]
) -> tuple[dict, tuple[Scene, ...]]:
    """The same in words alone: each scene is described, its things in any order."""
    row, scenes = dialogue_row(rng, language, types)
    question = row["conversations"][0]
    for scene in scenes:
        words = describe(rng.sample(scene.things, len(scene.things)), "en")
        question["content"] = question["content"].replace(IMAGE_TAG, words, 1)
    return row, ()


def pretrain_row(
    rng: random.Random, language: str, scenes: tuple[Scene, ...]
) -> tuple[dict, tuple[Scene, ...]]:
    """(row without "image", scenes): one scene and its description."""
    return {"conversations": as_turns([caption(scenes[0], language)], IMAGE_TAG)}, scenes


def eval_row(
    rng: random.Random, language: str, question_type: str
) -> tuple[dict, tuple[Scene, ...]]:
    """(row without "image", scenes): one question about held-out scenes."""
    while True:
        scenes = sample_scenes(rng, held_out=True, question_type=question_type)
        if question_type == "description":
            pair = caption(scenes[0], language)
        elif question := ask(rng, question_type, scenes, language):
            pair = question.text, question.answer
        else:
            continue
        turns = as_turns([pair], "\n".join([IMAGE_TAG] * len(scenes)))
        return {"type": question_type, "conversations": turns}, scenes


def vary_request(rng: random.Random, row: dict, language: str) -> None:
    """Ask for a description or a difference in other words, in place."""
    for name, requests in OTHER_REQUESTS.items():
        usual = get_template(name, language)
        usual = usual if isinstance(usual, str) else usual[0]
        for turn in row["conversations"]:
            # The first question has the images before it.
            start, end = turn["content"][: -len(usual)], turn["content"][-len(usual) :]
            if turn["role"] == "user" and end == usual:
                turn["content"] = start + rng.choice((usual, *requests.get(language, ())))


def make_row(
    part: str, index: int, languages: Sequence[str], seed: int
) -> tuple[dict, tuple[Scene, ...]]:
    """(row without "image", scenes to draw) number `index` of a part of FILES."""
    rng = random.Random(f"{seed}-{part}-{index}")
    if part in ("pretrain", "sft"):
        language = rng.choice(languages)
        scene = sample_scene(random.Random(f"{seed}-scene-{index}"), held_out=False)
        make = pretrain_row if part == "pretrain" else partial(dialogue_row, types=SFT_TYPES)
        row, scenes = make(rng, language, scenes=(scene,))
    elif part == "multi":
        language = rng.choice(languages)
        row, scenes = dialogue_row(rng, language, MULTI_TYPES)
    else:
        # every type equally often, languages in turn
        types = PAIR_TYPES if part == "eval_multi" else EVAL_TYPES
        language = languages[index // len(types) % len(languages)]
        row, scenes = eval_row(rng, language, types[index % len(types)])
    vary_request(rng, row, language)
    return row, scenes


def write_scene_set(
    folder: Path, n_rows: dict[str, int], seed: int = 1337, languages: Sequence[str] = LANGUAGES
) -> None:
    """Write parts of the set, the same for the same arguments.

    Args:
        folder: where they are written, see FILES.
        n_rows: rows of each part, see N_ROWS; a part that is left out is not written.
        seed: of every scene and question.
        languages: of the rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: set[Path] = set()
    for part, n in n_rows.items():
        file_name, images_name = FILES[part]
        images = folder / images_name
        images.mkdir(exist_ok=True)
        with open(folder / file_name, "w", encoding="utf-8") as file:
            for index in tqdm(range(n), desc=f"write {file_name}", unit="row"):
                row, scenes = make_row(part, index, languages, seed)
                paths = [images / f"{index:05d}{'ab'[k]}.jpg" for k in range(len(scenes))]
                for path, scene in zip(paths, scenes):
                    # Two parts may show the same picture.
                    if path not in drawn:
                        draw_scene(scene).save(path, quality=92, subsampling=0)
                        drawn.add(path)
                row["image"] = ", ".join(path.name for path in paths)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
