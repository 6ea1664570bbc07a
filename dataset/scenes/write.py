"""Write the rendered demo set in the published data formats.

python -m dataset.scenes out/demo/data        # the sizes `make demo` uses

lm_data.jsonl                             text-only rows: scenes in words, the same questions
pretrain_vlm_data.jsonl, pretrain_images/ one image and its description
sft_vlm_data.jsonl, sft_images/           dialogues about one image, or two
sft_vlm_data_multi.jsonl, sft_multi_images/    dialogues about two images
eval_vlm_data.jsonl, eval_images/         one question a row about held-out scenes, with its `type`
eval_vlm_data_multi.jsonl, eval_multi_images/  the same, about two
"""

import argparse
import json
import random
from collections.abc import Sequence
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

SIZES = {"lm": 6000, "pretrain": 6000, "sft": 9000, "multi": 3000, "eval": 960, "eval_multi": 300}
FILES = {  # of each part: rows, and the folder of their images beside
    "lm": ("lm_data.jsonl", ""),
    "pretrain": ("pretrain_vlm_data.jsonl", "pretrain_images"),
    "sft": ("sft_vlm_data.jsonl", "sft_images"),
    "multi": ("sft_vlm_data_multi.jsonl", "sft_multi_images"),
    "eval": ("eval_vlm_data.jsonl", "eval_images"),
    "eval_multi": ("eval_vlm_data_multi.jsonl", "eval_multi_images"),
}
LEAST_TURNS, MOST_TURNS = 6, 14
DIALOGUE_TYPES = (  # what is learned slowest is asked most: to find a thing by its shape, to count
    *QUESTION_TYPES, "color", "color", "count", "in_image",
)  # fmt: skip
MULTI_TYPES = (*PAIR_TYPES, "difference", "difference")


def sample_scenes(rng: random.Random, held_out: bool, question_type: str) -> tuple[Scene, ...]:
    """The scene a question of that type is about, or the two; for "difference" the second is a small change of the first."""
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
    """Training scenes and different questions about them; each of `types` that fits is as likely as the next."""
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
    """Questions and answers about one scene, or two; a third of the single ones open with a request for a description."""
    language = rng.choice(LANGUAGES)
    scenes, questions = sample_dialogue(rng, language, types)
    pairs = [(question.text, question.answer) for question in questions]
    if len(scenes) == 1 and rng.random() < 0.35:
        pairs[0] = caption(scenes[0], language)
    return {"conversations": as_turns(pairs, "\n".join(["<image>"] * len(scenes)))}, scenes


def text_row(rng: random.Random, index: int) -> tuple[dict, tuple[Scene, ...]]:
    """The same in words alone: each scene is described, things in any order."""
    row, scenes = dialogue_row(rng, index)
    for scene in scenes:
        words = describe(rng.sample(scene.things, len(scene.things)), "en")
        row["conversations"][0]["content"] = row["conversations"][0]["content"].replace(
            "<image>", words, 1
        )
    return row, ()


def write_part(path: Path, images: Path, n_rows: int, make_row, seed: str) -> None:
    """Write rows to a .jsonl file; `make_row(rng, index)` returns (row without "image", scenes to draw into `images`)."""
    rng = random.Random(seed)
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


def pretrain_row(rng: random.Random, index: int) -> tuple[dict, tuple[Scene, ...]]:
    scene = sample_scene(rng, held_out=False)
    return {"conversations": as_turns([caption(scene, rng.choice(LANGUAGES))], "<image>")}, (scene,)


def eval_row(
    rng: random.Random, index: int, types: Sequence[str] = QUESTION_TYPES
) -> tuple[dict, tuple[Scene, ...]]:
    """Every type equally often, languages in turn."""
    question_type = types[index % len(types)]
    language = LANGUAGES[index // len(types) % 2]
    while True:
        scenes = sample_scenes(rng, held_out=True, question_type=question_type)
        question = ask(rng, question_type, scenes, language)
        if question:
            turns = as_turns(
                [(question.text, question.answer)], "\n".join(["<image>"] * len(scenes))
            )
            return {"type": question_type, "conversations": turns}, scenes


def write_scene_set(folder: Path, sizes: dict[str, int], seed: int = 1337) -> None:
    """Write the parts named in `sizes` (rows of each of FILES)."""
    makers = {
        "lm": text_row,
        "pretrain": pretrain_row,
        "sft": dialogue_row,
        "multi": partial(dialogue_row, types=MULTI_TYPES),
        "eval": eval_row,
        "eval_multi": partial(eval_row, types=PAIR_TYPES),
    }
    for name, n_rows in sizes.items():
        file_name, images = FILES[name]
        write_part(folder / file_name, folder / images, n_rows, makers[name], seed=f"{seed}-{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the set is written")
    parser.add_argument("--seed", type=int, default=1337, help="seed of every scene and question")
    for name, default in SIZES.items():
        parser.add_argument(
            f"--{name}_rows", type=int, default=default, help=f"rows of the {name} part (0: none)"
        )
    args = parser.parse_args()
    sizes = {name: getattr(args, f"{name}_rows") for name in SIZES}
    write_scene_set(
        args.folder, {name: n_rows for name, n_rows in sizes.items() if n_rows}, args.seed
    )
