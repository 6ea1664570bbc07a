"""Write the rendered demo set in the published data formats.

lm_data.jsonl                             text-only rows: scenes in words, the same questions
pretrain_vlm_data.jsonl, pretrain_images/ one image and its description
sft_vlm_data.jsonl, sft_images/           dialogues about one image, or two
sft_vlm_data_multi.jsonl, sft_multi_images/    dialogues about two images
eval_vlm_data.jsonl, eval_images/         one question a row about held-out scenes, with its `type`
eval_vlm_data_multi.jsonl, eval_multi_images/  the same, about two
"""

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dataset.scenes.scene import Scene, change_one, draw_scene, sample_scene
from dataset.scenes.text import (
    LANGUAGES,
    PAIR_TYPES,
    QUESTION_TYPES,
    Question,
    ask,
    caption,
    describe,
)

# Rows of each part, as `make demo` uses them.
N_ROWS = {"lm": 6000, "pretrain": 6000, "sft": 9000, "multi": 3000, "eval": 960, "eval_multi": 300}
# Of each part: the file of its rows, and the folder of their images beside it.
FILES = {
    "lm": ("lm_data.jsonl", ""),
    "pretrain": ("pretrain_vlm_data.jsonl", "pretrain_images"),
    "sft": ("sft_vlm_data.jsonl", "sft_images"),
    "multi": ("sft_vlm_data_multi.jsonl", "sft_multi_images"),
    "eval": ("eval_vlm_data.jsonl", "eval_images"),
    "eval_multi": ("eval_vlm_data_multi.jsonl", "eval_multi_images"),
}
RowMaker = Callable[[random.Random, int], tuple[dict, tuple[Scene, ...]]]
# Questions that a dialogue is given; those that come twice are dropped.
LEAST_TURNS, MOST_TURNS = 6, 14
# What is learned slowest is asked most: to find a thing by its shape, to count.
DIALOGUE_TYPES = (*QUESTION_TYPES, "color", "color", "count", "in_image")
MULTI_TYPES = (*PAIR_TYPES, "difference", "difference")


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
    rng: random.Random, language: str, types: Sequence[str] = DIALOGUE_TYPES
) -> tuple[tuple[Scene, ...], list[Question]]:
    """Training scenes, and different questions about them.

    Each of `types` that fits the number of scenes is as likely as the next.
    """
    questions: dict[str, Question] = {}
    while not questions:
        first_type = rng.choice(types)
        scenes = sample_scenes(rng, held_out=False, question_type=first_type)
        fitting = [name for name in types if (name in PAIR_TYPES) == (first_type in PAIR_TYPES)]
        for _ in range(rng.randint(LEAST_TURNS, MOST_TURNS)):
            question = ask(rng, rng.choice(fitting), scenes, language)
            if question:
                questions[question.text] = question
    return scenes, list(questions.values())


def as_turns(pairs: list[tuple[str, str]], prefix: str) -> list[dict]:
    """Conversation turns; `prefix` (the images, or their words) opens the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        content = f"{prefix}\n{question}" if index == 0 else question
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return turns


def dialogue_row(
    rng: random.Random, index: int, types: Sequence[str] = DIALOGUE_TYPES
) -> tuple[dict, tuple[Scene, ...]]:
    """A dialogue about one scene, or two. A third of the single ones begin with a description.

    Like every function of ROW_MAKERS it returns (row without "image", scenes to draw).

    Args:
        rng: source of every choice.
        index: number of the row.
        types: what is asked, see DIALOGUE_TYPES.
    """
    language = rng.choice(LANGUAGES)
    scenes, questions = sample_dialogue(rng, language, types)
    pairs = [(question.text, question.answer) for question in questions]
    if len(scenes) == 1 and rng.random() < 0.35:
        pairs[0] = caption(scenes[0], language)
    return {"conversations": as_turns(pairs, "\n".join(["<image>"] * len(scenes)))}, scenes


def text_row(rng: random.Random, index: int) -> tuple[dict, tuple[Scene, ...]]:
    """The same in words alone: each scene is described, its things in any order."""
    row, scenes = dialogue_row(rng, index)
    question = row["conversations"][0]
    for scene in scenes:
        words = describe(rng.sample(scene.things, len(scene.things)), "en")
        question["content"] = question["content"].replace("<image>", words, 1)
    return row, ()


def pretrain_row(rng: random.Random, index: int) -> tuple[dict, tuple[Scene, ...]]:
    """One scene and its description."""
    scene = sample_scene(rng, held_out=False)
    return {"conversations": as_turns([caption(scene, rng.choice(LANGUAGES))], "<image>")}, (scene,)


def eval_row(
    rng: random.Random, index: int, types: Sequence[str] = QUESTION_TYPES
) -> tuple[dict, tuple[Scene, ...]]:
    """One question about held-out scenes; every type equally often, languages in turn."""
    question_type = types[index % len(types)]
    language = LANGUAGES[index // len(types) % 2]
    while True:
        scenes = sample_scenes(rng, held_out=True, question_type=question_type)
        question = ask(rng, question_type, scenes, language)
        if question:
            images = "\n".join(["<image>"] * len(scenes))
            turns = as_turns([(question.text, question.answer)], images)
            return {"type": question_type, "conversations": turns}, scenes


ROW_MAKERS = {
    "lm": text_row,
    "pretrain": pretrain_row,
    "sft": dialogue_row,
    "multi": partial(dialogue_row, types=MULTI_TYPES),
    "eval": eval_row,
    "eval_multi": partial(eval_row, types=PAIR_TYPES),
}


def write_scene_set(folder: Path, n_rows: dict[str, int], seed: int = 1337) -> None:
    """Write parts of the set, the same for the same arguments.

    Args:
        folder: where they are written, see FILES.
        n_rows: rows of each part, see N_ROWS; a part that is left out is not written.
        seed: of every scene and question.
    """
    for part, n in n_rows.items():
        file_name, images = FILES[part]
        rng = random.Random(f"{seed}-{part}")
        write_part(folder / file_name, folder / images, n, ROW_MAKERS[part], rng)


def write_part(
    path: Path, images: Path, n_rows: int, make_row: RowMaker, rng: random.Random
) -> None:
    """Write rows to a .jsonl file, and their pictures.

    Args:
        path: the .jsonl file.
        images: folder of the pictures, made with the first of them.
        n_rows: number of rows.
        make_row: gives (row without "image", scenes to draw) of (rng, index).
        rng: source of every choice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for index in tqdm(range(n_rows), desc=f"write {path.name}", unit="row"):
            row, scenes = make_row(rng, index)
            names = []
            for number, scene in enumerate(scenes):
                images.mkdir(exist_ok=True)
                names.append(f"{index:05d}{'ab'[number]}.jpg")
                draw_scene(scene).save(images / names[-1], quality=92, subsampling=0)
            if names:
                row["image"] = ", ".join(names)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
