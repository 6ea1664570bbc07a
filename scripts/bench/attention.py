"""Does a model look at what it speaks about? Rendered held-out scenes, the model that ships.

A question is about one thing, and its right answer names that thing: by color, shape, size. The map
of such a word (attention, or occlusion without what is below 0) has a part of its mass in the box
around the thing. The figure here is this part, divided by the box's part of the picture's area: 1
for a map that knows nothing. It is measured with the right picture and with one of another row.
Things are never at the edge of a scene, so a third figure says what chance is: the mass in the box
of another row's thing.
"""

import io
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset.scenes.scene import IMAGE_SIZE, RADII, Thing, draw_scene
from dataset.scenes.text import LANGUAGES, word
from dataset.scenes.write import EVAL_TYPES, make_row
from inference import VLM, load_vlm
from inference.answer_tokens import encode_answer, find_grid
from inference.attention import AttentionWatch, occlude, watch_answer

WEIGHTS = Path("model/demo/sft_vlm_128.pth")
# The demo's own evaluation is reported; which token speaks for a word was decided on other scenes.
REPORTED, OTHERS = 1337, 99
N_QUESTIONS = {"attention": 240, "occlusion": 60}
# Types of questions about one thing, and the words that can name it.
TYPES = ATTRIBUTES = ("color", "shape", "size")
# Picture and box of a figure, see `collect`.
KINDS = ("right", "wrong", "chance")


class Case(NamedTuple):
    """A question about one thing of a scene.

    Args:
        type: one of TYPES.
        turns: the question.
        answer: the right one.
        names: attribute -> the word of the answer for it, (first character, one after the last).
        thing: what is asked about.
        picture: the scene.
    """

    type: str
    turns: list[dict]
    answer: str
    names: dict[str, tuple[int, int]]
    thing: Thing
    picture: Image.Image


class Mass(NamedTuple):
    """How much of a word's map is in a box.

    Args:
        type: of the question.
        attribute: that the word names.
        case: number of the question.
        inside: float[n_layers + 1, n_heads + 1], 0 to 1 each; the last ones are of the mean of all
            layers and of all heads. [1, 1] for occlusion.
        area: the box's part of the picture.
    """

    type: str
    attribute: str
    case: int
    inside: np.ndarray
    area: float


def measure(args: Namespace) -> list[dict]:
    """Rows of map, picture, words, ratio, low and high (95 %), and n, the number of words."""
    # The figures are those of any device; a map takes some seconds on a CPU.
    vlm = load_vlm(WEIGHTS, device="cpu")

    # on other scenes: the token before a word, or the word's own?
    cases = make_cases(OTHERS, N_QUESTIONS["attention"])
    for name, watch in (("the token before it", attend), ("its own token", attend_from_own)):
        print(f"\nattention of a word, from {name}, other scenes")
        print_words("", collect(watch, vlm, cases, ["right"]))

    # what is reported
    rows = []
    for name, watch in (("attention", attend), ("occlusion", grey_out)):
        found = collect(watch, vlm, make_cases(REPORTED, N_QUESTIONS[name]))
        print(f"\n{name}: mass in the box / area of the box")
        rows += print_words(name, found)
        if name == "attention":
            print_layers(select(found["right"]))
    return rows


def make_cases(seed: int, n: int) -> list[Case]:
    """The first `n` questions about one thing of an evaluation set, see dataset/scenes/write.py."""
    cases, index = [], -1
    while len(cases) < n:
        index += 1
        row, (scene, *_) = make_row("eval", index, LANGUAGES, seed)
        if row["type"] not in TYPES:
            continue
        # what is asked about: no two things have the same color and shape
        question, answer = row["conversations"]
        language = LANGUAGES[index // len(EVAL_TYPES) % len(LANGUAGES)]
        for thing in scene.things:
            words = {name: word(getattr(thing, name), language) for name in ATTRIBUTES}
            if words["color"] in answer["content"] and words["shape"] in answer["content"]:
                break
        starts = {name: answer["content"].find(text) for name, text in words.items()}
        names = {name: (at, at + len(words[name])) for name, at in starts.items() if at >= 0}

        # the picture, through a file as in the evaluation
        file = io.BytesIO()
        draw_scene(scene).save(file, "JPEG", quality=92, subsampling=0)
        case = Case(row["type"], [question], answer["content"], names, thing, Image.open(file))
        cases.append(case)
    return cases


# The maps of all words of a case: words, and float[layers + 1, heads + 1, words, rows, cols].
Maps = tuple[list[str], np.ndarray]


def attend(vlm: VLM, case: Case, pixel_values: torch.Tensor) -> Maps:
    """Attention, as the project shows it."""
    looks = watch_answer(vlm, case.turns, case.answer, vlm.model.encode_images(pixel_values))
    return looks.words, with_means(looks.weights[:, :, :, 0])


@torch.inference_mode()
def attend_from_own(vlm: VLM, case: Case, pixel_values: torch.Tensor) -> Maps:
    """Attention of the words' own tokens, instead of those before them."""
    input_ids, patches, n_prompt, words = encode_answer(vlm, case.turns, case.answer, 1)
    embeddings = vlm.model.embed(input_ids, pixel_values, None, patches)
    with AttentionWatch(torch.arange(n_prompt, input_ids.shape[1]), patches) as watch:
        vlm.model.run_layers(embeddings)
    of_tokens = torch.stack(watch.weights)  # (layers, heads, tokens, patches)
    of_words = torch.stack([of_tokens[:, :, w.tokens].mean(dim=2) for w in words], dim=2)
    maps = of_words.unflatten(-1, find_grid(vlm.model))  # (layers, heads, words, rows, cols)
    return [one.text for one in words], with_means(maps.numpy())


def grey_out(vlm: VLM, case: Case, pixel_values: torch.Tensor) -> Maps:
    """Occlusion: what makes a word less likely."""
    words = encode_answer(vlm, case.turns, case.answer, 1).words
    falls = occlude(vlm, case.turns, case.answer, pixel_values, image=0, word=None)
    return [one.text for one in words], falls.clip(0)[None, None]


def with_means(weights: np.ndarray) -> np.ndarray:
    """[layers, heads, ...] -> [layers + 1, heads + 1, ...], the means of all behind them."""
    weights = np.concatenate((weights, weights.mean(axis=0, keepdims=True)), axis=0)
    return np.concatenate((weights, weights.mean(axis=1, keepdims=True)), axis=1)


def collect(
    watch: Callable[[VLM, Case, torch.Tensor], Maps],
    vlm: VLM,
    cases: list[Case],
    kinds: Sequence[str] = KINDS,
) -> dict[str, list[Mass]]:
    """{kind: masses of all words that name the asked thing}.

    Args:
        watch: makes the maps.
        vlm: the model.
        cases: the questions.
        kinds: some of KINDS. "right": picture and box of the question; "wrong": the picture of
            another one; "chance": the right picture, the box of another one.
    """
    masses: dict[str, list[Mass]] = {kind: [] for kind in kinds}
    for number, case in enumerate(tqdm(cases, desc=watch.__name__, unit="question")):
        # half the set away: another scene
        other = cases[(number + len(cases) // 2) % len(cases)]
        maps = watch(vlm, case, vlm.processor.preprocess([case.picture]))
        if "right" in kinds:
            masses["right"] += weigh(case, number, *maps, case.thing)
        if "chance" in kinds:
            masses["chance"] += weigh(case, number, *maps, other.thing)
        if "wrong" in kinds:
            maps = watch(vlm, case, vlm.processor.preprocess([other.picture]))
            masses["wrong"] += weigh(case, number, *maps, case.thing)
    return masses


def weigh(
    case: Case, number: int, words: list[str], maps: np.ndarray, thing: Thing
) -> Iterator[Mass]:
    """The masses in the box around `thing`, of the words that name the thing of a case."""
    box = find_box(thing, maps.shape[-2:])
    # the part of each map that is in the box
    inside = (maps * box).sum(axis=(-2, -1)) / maps.sum(axis=(-2, -1)).clip(1e-30)
    ends = np.cumsum([len(text) for text in words])
    starts = ends - [len(text) for text in words]
    for attribute, (start, end) in case.names.items():
        # mostly one word
        is_named = (ends > start) & (starts < end)
        part = inside[..., is_named].mean(axis=-1)
        yield Mass(case.type, attribute, number, part, float(box.mean()))


def find_box(thing: Thing, grid: tuple[int, int]) -> np.ndarray:
    """float[rows, cols]: the part of each patch that is in the box around a thing, 0 to 1."""
    radius = RADII[thing.size]

    def overlap(center: int, n: int) -> np.ndarray:
        edges = np.linspace(0, IMAGE_SIZE, n + 1)
        ends = np.minimum(edges[1:], center + radius)
        return (ends - np.maximum(edges[:-1], center - radius)).clip(0) * n / IMAGE_SIZE

    return np.outer(overlap(thing.y, grid[0]), overlap(thing.x, grid[1]))


def select(masses: list[Mass], type: str = "", attribute: str = "") -> list[Mass]:
    """Those of a type of question and an attribute; of all types; of color and shape."""
    attributes = (attribute,) if attribute else ("color", "shape")
    return [m for m in masses if m.type in (type or TYPES) and m.attribute in attributes]


def find_ratio(masses: list[Mass]) -> np.ndarray:
    """float[layers + 1, heads + 1]: mean mass in the box / mean area of the box."""
    return np.mean([m.inside for m in masses], axis=0) / np.mean([m.area for m in masses])


def find_interval(masses: list[Mass], n: int = 1000) -> tuple[float, float]:
    """95 % of the ratios when questions are drawn again, with replacement (bootstrap)."""
    cases = np.array([m.case for m in masses])
    inside = np.bincount(cases, [m.inside[-1, -1] for m in masses])
    area = np.bincount(cases, [m.area for m in masses])
    drawn = np.random.default_rng(0).integers(len(area), size=(n, len(area)))
    ratios = inside[drawn].sum(axis=1) / area[drawn].sum(axis=1)
    return tuple(float(bound) for bound in np.percentile(ratios, (2.5, 97.5)))


def print_words(name: str, found: dict[str, list[Mass]]) -> list[dict]:
    """A line for each type of question and word, and one for all; returns them as rows.

    Args:
        name: of the map.
        found: see `collect`.
    """
    rows = []
    print(f"{'question':10}{'word':8}" + "".join(f"{kind:>24}" for kind in found))
    parts = sorted({(m.type, m.attribute) for masses in found.values() for m in masses})
    for type, attribute in [*parts, ("", "")]:
        line = f"{type or 'all':10}{attribute or 'names':8}"
        for kind, masses in found.items():
            chosen = select(masses, type, attribute)
            ratio, (low, high) = float(find_ratio(chosen)[-1, -1]), find_interval(chosen)
            line += f"{f'{ratio:.2f} ({low:.2f} to {high:.2f})':>24}"
            row = {"map": name, "picture": kind, "type": type, "attribute": attribute}
            rows.append(row | {"ratio": ratio, "low": low, "high": high, "n": len(chosen)})
        print(line, flush=True)
    return rows


def print_layers(masses: list[Mass]) -> None:
    """The ratio of each layer and head."""
    table = find_ratio(masses)
    n_layers, n_heads = (size - 1 for size in table.shape)
    print("\neach layer and head, right picture, color and shape words")
    print("layer " + "".join(f"{f'head {head}':>8}" for head in range(n_heads)) + f"{'mean':>8}")
    for layer, ratios in zip([*range(n_layers), "mean"], table):
        print(f"{layer!s:6}" + "".join(f"{ratio:8.2f}" for ratio in ratios))
