"""What is said about rendered scenes, in English and Chinese: descriptions, questions and their answers.

Every question's answer follows from the scene alone. The text-only rows of the set are the same conversations with each
`<image>` replaced by `describe(scene)`: a language model that has read them knows the questions, and pretraining
has only to translate patches into that language.
"""

import random
from typing import NamedTuple

from dataset.scenes import GRID, Scene, Thing

LANGUAGES = ("en", "zh")
QUESTION_TYPES = ("color", "shape", "size", "count", "relation", "which_image", "in_image", "difference")
PAIR_TYPES = QUESTION_TYPES[5:]  # asked about two images

WORDS = {  # Chinese word for each English word that fills a slot
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "black": "黑色",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "heart": "心形", "cross": "十字形",
    "small": "小的", "medium": "中等的", "large": "大的",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面",
    "first": "第一张", "second": "第二张", "color": "颜色", "size": "大小", "shape": "形状", "place": "位置",
}  # fmt: skip

TEMPLATES = {
    "place": {
        "en": "{size} {color} {shape} {column}{row}",
        "zh": "{size}{color}{shape}{column}{row}",
    },
    "separator": {"en": "; ", "zh": "；"},
    "stop": {"en": ".", "zh": "。"},
    "caption": {
        "en": ("Describe the picture.", "What is in the picture, and where?"),
        "zh": ("描述一下这张图。", "图里有什么，在哪里？"),
    },
    "color": {"en": ("What color is the {shape}?",), "zh": ("{shape}是什么颜色？",)},
    "shape": {"en": ("What shape is the {color} thing?",), "zh": ("{color}的东西是什么形状？",)},
    "size": {"en": ("How big is the {color} {shape}?",), "zh": ("{color}{shape}有多大？",)},
    "count": {"en": ("How many things are there?",), "zh": ("一共有几个东西？",)},
    "count_shape": {"en": ("How many things have the shape {shape}?",), "zh": ("有几个{shape}？",)},
    "count_color": {"en": ("How many things are {color}?",), "zh": ("有几个{color}的东西？",)},
    "relation_column": {
        "en": ("Is the {color} {shape} left or right of the {other_color} {other_shape}?",),
        "zh": ("{color}{shape}在{other_color}{other_shape}的左边还是右边？",),
    },
    "relation_row": {
        "en": ("Is the {color} {shape} above or below the {other_color} {other_shape}?",),
        "zh": ("{color}{shape}在{other_color}{other_shape}的上面还是下面？",),
    },
    "which_image": {"en": ("Which image has the {color} {shape}?",), "zh": ("哪一张图有{color}{shape}？",)},
    "in_image": {
        "en": ("What color is the {shape} in the {which} image?",),
        "zh": ("{which}图里的{shape}是什么颜色？",),
    },
    "difference": {"en": ("What changes from the first image to the second?",), "zh": ("两张图有什么不同？",)},
}


class Question(NamedTuple):
    type: str
    text: str
    answer: str
    scenes: tuple[Scene, ...]  # one, or two for PAIR_TYPES


def word(english: str, language: str) -> str:
    return WORDS.get(english, english) if language == "zh" else english  # numbers stay digits


def _fill(rng: random.Random, template: str, language: str, **slots: str | int) -> str:
    choices = TEMPLATES[template][language]
    text = choices if isinstance(choices, str) else rng.choice(choices)
    return text.format(**{name: word(v, language) if isinstance(v, str) else v for name, v in slots.items()})


def place(rng: random.Random, thing: Thing, language: str) -> str:
    """ "large red circle C5" """
    slots = dict(zip(("size", "color", "shape", "column", "row"), thing.words))
    return _fill(rng, "place", language, **slots)


def describe(rng: random.Random, scene: Scene, language: str, shuffled: bool = False) -> str:
    """Every thing and its place; in reading order unless `shuffled`."""
    things = rng.sample(scene.things, len(scene.things)) if shuffled else scene.things
    separator, stop = TEMPLATES["separator"][language], TEMPLATES["stop"][language]
    return separator.join(place(rng, thing, language) for thing in things) + stop


def draw_in_words(scene: Scene) -> str:
    """The picture as a text of 196 cells: " ." where nothing is, a thing's five words around its centre."""
    cells = [" ."] * (GRID * GRID)
    for thing in scene.things:
        for patch, english in thing.spelled.items():
            cells[patch] = english if english.isdigit() else f" {english}"
    return "".join(cells)


def caption(rng: random.Random, scene: Scene, language: str) -> tuple[str, str]:
    """(request, description)."""
    return _fill(rng, "caption", language), describe(rng, scene, language)


def ask(rng: random.Random, question_type: str, scenes: tuple[Scene, ...], language: str) -> Question | None:
    """A question of that type about the scene (or the two scenes), or None where they allow none."""
    found = _ASK[question_type](rng, *scenes)
    if found is None:
        return None
    template, answer, slots = found
    text = _fill(rng, template, language, **slots)
    return Question(question_type, text, word(answer, language), scenes)


# Each of these returns (template, answer in English, slots) or None.


def _ask_color(rng: random.Random, scene: Scene):
    thing = _unique(rng, scene, "shape")
    return thing and ("color", thing.color, {"shape": thing.shape})


def _ask_shape(rng: random.Random, scene: Scene):
    thing = _unique(rng, scene, "color")
    return thing and ("shape", thing.shape, {"color": thing.color})


def _ask_size(rng: random.Random, scene: Scene):
    thing = rng.choice(scene.things)
    return "size", thing.size, {"color": thing.color, "shape": thing.shape}


def _ask_count(rng: random.Random, scene: Scene):
    template = rng.choice(("count", "count", "count_shape", "count_color"))
    if template == "count":
        return template, str(len(scene.things)), {}
    attribute = template.removeprefix("count_")
    values = [getattr(thing, attribute) for thing in scene.things]
    value = max(rng.sample(values, len(values)), key=values.count) if rng.random() < 0.5 else rng.choice(values)
    return template, str(values.count(value)), {attribute: value}


def _ask_relation(rng: random.Random, scene: Scene):
    axis, words = rng.choice((("column", ("left", "right")), ("row", ("above", "below"))))
    pairs = [(a, b) for a in scene.things for b in scene.things if abs(getattr(a, axis) - getattr(b, axis)) >= 2]
    if not pairs:
        return None
    thing, other = rng.choice(pairs)
    slots = {"color": thing.color, "shape": thing.shape, "other_color": other.color, "other_shape": other.shape}
    return f"relation_{axis}", words[getattr(thing, axis) > getattr(other, axis)], slots


def _ask_which_image(rng: random.Random, first: Scene, second: Scene):
    which = rng.randrange(2)
    scene, other = (first, second)[which], (second, first)[which]
    there = {(thing.color, thing.shape) for thing in other.things}
    only_here = [thing for thing in scene.things if (thing.color, thing.shape) not in there]
    if not only_here:
        return None
    thing = rng.choice(only_here)
    return "which_image", ("first", "second")[which], {"color": thing.color, "shape": thing.shape}


def _ask_in_image(rng: random.Random, first: Scene, second: Scene):
    which = rng.randrange(2)
    thing = _unique(rng, (first, second)[which], "shape")
    return thing and ("in_image", thing.color, {"shape": thing.shape, "which": ("first", "second")[which]})


def _ask_difference(rng: random.Random, first: Scene, second: Scene):
    changed = [(a, b) for a, b in zip(first.things, second.things) if a != b]
    if len(first.things) != len(second.things) or len(changed) != 1:
        return None
    before, after = changed[0]
    names = {"color": "color", "shape": "shape", "size": "size", "patch": "place"}
    aspects = [name for field, name in names.items() if getattr(before, field) != getattr(after, field)]
    return ("difference", aspects[0], {}) if len(aspects) == 1 else None


def _unique(rng: random.Random, scene: Scene, attribute: str) -> Thing | None:
    values = [getattr(thing, attribute) for thing in scene.things]
    alone = [thing for thing in scene.things if values.count(getattr(thing, attribute)) == 1]
    return rng.choice(alone) if alone else None


_ASK = {question_type: globals()[f"_ask_{question_type}"] for question_type in QUESTION_TYPES}
