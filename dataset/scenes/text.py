"""What is said about rendered scenes, in English, Chinese and more: descriptions and dialogues.

Every answer follows from the scene alone. The text-only rows of the set are the same conversations
with each `<image>` replaced by a description: a language model that has read them knows the
questions, and pretraining has only to translate patches into that language.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from dataset.scenes import japanese
from dataset.scenes.scene import Scene, Thing

# What the shipped stand-ins and `make demo` speak.
LANGUAGES = ("en", "zh")
# Languages for fine-tuning, each a file with WORDS and TEMPLATES.
MORE_LANGUAGES = {"ja": japanese}
ALL_LANGUAGES = (*LANGUAGES, *MORE_LANGUAGES)
QUESTION_TYPES = (
    "color",
    "shape",
    "size",
    "count",
    "relation",
    "which_image",
    "in_image",
    "difference",
)
# Asked about two images.
PAIR_TYPES = QUESTION_TYPES[5:]

# The Chinese word for each English word that fills a slot.
WORDS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "black": "黑色",
    "circle": "圆形", "square": "方形", "triangle": "三角形",
    "star": "星形", "heart": "心形", "cross": "十字形",
    "small": "小的", "medium": "中等的", "large": "大的",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面",
    "first": "第一张", "second": "第二张",
}  # fmt: skip

RELATION_ANSWER = {
    "en": "The {color} {shape} is at {place}, "
    "the {other_color} {other_shape} at {other_place}: {answer}.",
    "zh": "{color}{shape}在{place}，{other_color}{other_shape}在{other_place}：{answer}。",
}
# Of each language: a text, or (question, answer). Answers say what was asked for before they say
# what it is: a small model finds a thing again by the words just said.
TEMPLATES = {
    "thing": {"en": "{size} {color} {shape} {place}", "zh": "{size}{color}{shape}{place}"},
    "separator": {"en": "; ", "zh": "；"},
    "stop": {"en": ".", "zh": "。"},
    "caption": {"en": "Describe the picture.", "zh": "描述一下这张图。"},
    "color": {
        "en": ("What color is the {shape}?", "The {shape} is {color}."),
        "zh": ("{shape}是什么颜色？", "{shape}是{color}。"),
    },
    "shape": {
        "en": ("What shape is the {color} thing?", "The {color} thing is a {shape}."),
        "zh": ("{color}的东西是什么形状？", "{color}的东西是{shape}。"),
    },
    "size": {
        "en": ("How big is the {color} {shape}?", "The {color} {shape} is {size}."),
        "zh": ("{color}{shape}有多大？", "{color}{shape}是{size}。"),
    },
    "count": {
        "en": ("How many things are there?", "The number of things is {number}."),
        "zh": ("一共有几个东西？", "东西的数目是{number}。"),
    },
    "count_shape": {
        "en": (
            "How many things have the shape {shape}?",
            "The number of things with the shape {shape} is {number}.",
        ),
        "zh": ("有几个{shape}？", "{shape}的数目是{number}。"),
    },
    "count_color": {
        "en": ("How many things are {color}?", "The number of {color} things is {number}."),
        "zh": ("有几个{color}的东西？", "{color}东西的数目是{number}。"),
    },
    "relation_column": {
        "en": (
            "Is the {color} {shape} left or right of the {other_color} {other_shape}?",
            RELATION_ANSWER["en"],
        ),
        "zh": ("{color}{shape}在{other_color}{other_shape}的左边还是右边？", RELATION_ANSWER["zh"]),
    },
    "relation_row": {
        "en": (
            "Is the {color} {shape} above or below the {other_color} {other_shape}?",
            RELATION_ANSWER["en"],
        ),
        "zh": ("{color}{shape}在{other_color}{other_shape}的上面还是下面？", RELATION_ANSWER["zh"]),
    },
    "which_image": {
        "en": (
            "Which image has the {color} {shape}?",
            "The {color} {shape} is in the {which} image.",
        ),
        "zh": ("哪一张图有{color}{shape}？", "{color}{shape}在{which}图里。"),
    },
    "in_image": {
        "en": (
            "What color is the {shape} in the {which} image?",
            "The {shape} in the {which} image is {color}.",
        ),
        "zh": ("{which}图里的{shape}是什么颜色？", "{which}图里的{shape}是{color}。"),
    },
    "difference": {
        "en": ("What changes from the first image to the second?", "{before} becomes {after}."),
        "zh": ("两张图有什么不同？", "{before}变成{after}。"),
    },
}


class Question(NamedTuple):
    """A question and its answer.

    Args:
        type: one of QUESTION_TYPES.
        text, answer: in one of ALL_LANGUAGES.
        scenes: what it is about; two for PAIR_TYPES, else one.
    """

    type: str
    text: str
    answer: str
    scenes: tuple[Scene, ...]


def word(english: str, language: str) -> str:
    """The word in `language`; numbers and places stay as they are."""
    if language == "en":
        return english
    words = MORE_LANGUAGES[language].WORDS if language in MORE_LANGUAGES else WORDS
    return words.get(english, english)


def get_template(name: str, language: str) -> str | tuple[str, str]:
    """A text with slots, or (question, answer); `name` is a key of TEMPLATES."""
    if language in MORE_LANGUAGES:
        return MORE_LANGUAGES[language].TEMPLATES[name]
    return TEMPLATES[name][language]


def _fill(text: str, language: str, **slots) -> str:
    """Fill the slots of `text` with words of `language`, made of English words, numbers, things."""
    words = {}
    for name, value in slots.items():
        is_thing = isinstance(value, Thing)
        words[name] = describe_thing(value, language) if is_thing else word(str(value), language)
    return text.format(**words)


def describe_thing(thing: Thing, language: str) -> str:
    """ "large red circle C5" """
    slots = {"size": thing.size, "color": thing.color, "shape": thing.shape, "place": thing.place}
    return _fill(get_template("thing", language), language, **slots)


def describe(things: Sequence[Thing], language: str) -> str:
    """Every thing and its place, in the order given."""
    separator, stop = get_template("separator", language), get_template("stop", language)
    return separator.join(describe_thing(thing, language) for thing in things) + stop


def caption(scene: Scene, language: str) -> tuple[str, str]:
    """(request, description in reading order)."""
    return get_template("caption", language), describe(scene.things, language)


# The template of a question and the words for its slots; None where the scene allows no question.
Slots = tuple[str, dict] | None


def _ask_color(rng: random.Random, scene: Scene) -> Slots:
    thing = _choose_unique(rng, scene, "shape")
    return thing and ("color", {"shape": thing.shape, "color": thing.color})


def _ask_shape(rng: random.Random, scene: Scene) -> Slots:
    thing = _choose_unique(rng, scene, "color")
    return thing and ("shape", {"shape": thing.shape, "color": thing.color})


def _ask_size(rng: random.Random, scene: Scene) -> Slots:
    thing = rng.choice(scene.things)
    return "size", {"color": thing.color, "shape": thing.shape, "size": thing.size}


def _ask_count(rng: random.Random, scene: Scene) -> Slots:
    template = rng.choice(("count", "count", "count_shape", "count_color"))
    if template == "count":
        return template, {"number": len(scene.things)}
    attribute = template.removeprefix("count_")
    values = [getattr(thing, attribute) for thing in scene.things]
    # Every second time the most frequent one: most values are there once.
    if rng.random() < 0.5:
        value = max(rng.sample(values, len(values)), key=values.count)
    else:
        value = rng.choice(values)
    return template, {"number": values.count(value), attribute: value}


def _ask_relation(rng: random.Random, scene: Scene) -> Slots:
    axis, answers = rng.choice((("column", ("left", "right")), ("row", ("above", "below"))))
    # At least two cells apart, so that the answer can be seen.
    pairs = [
        (a, b)
        for a in scene.things
        for b in scene.things
        if abs(getattr(a, axis) - getattr(b, axis)) >= 2
    ]
    if not pairs:
        return None
    thing, other = rng.choice(pairs)
    return f"relation_{axis}", {
        "color": thing.color,
        "shape": thing.shape,
        "place": thing.place,
        "other_color": other.color,
        "other_shape": other.shape,
        "other_place": other.place,
        "answer": answers[getattr(thing, axis) > getattr(other, axis)],
    }


def _ask_which_image(rng: random.Random, first: Scene, second: Scene) -> Slots:
    which = rng.randrange(2)
    scene, other = (first, second)[which], (second, first)[which]
    there = {(thing.color, thing.shape) for thing in other.things}
    only_here = [thing for thing in scene.things if (thing.color, thing.shape) not in there]
    if not only_here:
        return None
    thing = rng.choice(only_here)
    slots = {"color": thing.color, "shape": thing.shape, "which": ("first", "second")[which]}
    return "which_image", slots


def _ask_in_image(rng: random.Random, first: Scene, second: Scene) -> Slots:
    which = rng.randrange(2)
    thing = _choose_unique(rng, (first, second)[which], "shape")
    if thing is None:
        return None
    slots = {"shape": thing.shape, "color": thing.color, "which": ("first", "second")[which]}
    return "in_image", slots


def _ask_difference(rng: random.Random, first: Scene, second: Scene) -> Slots:
    changed = [(a, b) for a, b in zip(first.things, second.things) if a != b]
    if len(first.things) != len(second.things) or len(changed) != 1:
        return None
    return "difference", {"before": changed[0][0], "after": changed[0][1]}


def _choose_unique(rng: random.Random, scene: Scene, attribute: str) -> Thing | None:
    """A thing that no other shares this attribute with, or None."""
    values = [getattr(thing, attribute) for thing in scene.things]
    alone = [thing for thing in scene.things if values.count(getattr(thing, attribute)) == 1]
    return rng.choice(alone) if alone else None


_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "relation": _ask_relation,
    "which_image": _ask_which_image,
    "in_image": _ask_in_image,
    "difference": _ask_difference,
}


def ask(
    rng: random.Random, question_type: str, scenes: tuple[Scene, ...], language: str
) -> Question | None:
    """A question about scenes, or None where they allow none of that type.

    Args:
        rng: source of every choice.
        question_type: one of QUESTION_TYPES.
        scenes: two for PAIR_TYPES, else one.
        language: one of ALL_LANGUAGES.
    """
    chosen = _ASK[question_type](rng, *scenes)
    if chosen is None:
        return None
    name, slots = chosen
    question, answer = (_fill(text, language, **slots) for text in get_template(name, language))
    return Question(question_type, question, answer, scenes)
