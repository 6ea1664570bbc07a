"""The rendered demo world: coloured shapes on a light ground, with exact ground truth and no download.

A thing has three attributes (colour, shape, size) and a place. Of the 8 x 6 x 3 = 144 attribute combinations, 36 are
*held out*: no training picture, no training text and no stand-in weight has ever met one, and held-out scenes are made
of nothing else. See `is_held_out`.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

IMAGE_SIZE = 224
PATCH_SIZE = 16
GRID = IMAGE_SIZE // PATCH_SIZE  # 14 patches a side
CELLS = 7  # words for places are coarser than patches: columns A-G, rows 1-7
MAX_THINGS = 4

COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (240, 218, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "purple": (130, 50, 170),
    "pink": (250, 140, 190),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = {"small": 13, "medium": 21, "large": 32}  # half the width, in pixels


@dataclass(frozen=True)
class Thing:
    """One drawn thing. `x`, `y` are its centre in pixels from the top left; `angle` is in degrees."""

    color: str
    shape: str
    size: str
    x: int
    y: int
    angle: float = 0.0

    @property
    def combination(self) -> tuple[str, str, str]:
        return self.color, self.shape, self.size

    @property
    def patch(self) -> int:
        """Index of the patch that holds the centre, 0 … 195, row by row."""
        return self.y // PATCH_SIZE * GRID + self.x // PATCH_SIZE

    @property
    def column(self) -> int:
        return self.x * CELLS // IMAGE_SIZE + 1

    @property
    def row(self) -> int:
        return self.y * CELLS // IMAGE_SIZE + 1

    @property
    def place(self) -> str:
        """Column and row as on a chessboard read from the top: "A1" to "G7"."""
        return f"{'ABCDEFG'[self.column - 1]}{self.row}"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    jitter: int  # seed of the small colour differences, so that drawing is a function of the scene alone


def is_held_out(color: str, shape: str, size: str) -> bool:
    """Whether a combination is kept for evaluation.

    A diagonal of the attribute cube: every colour, shape and size is still met in training with many partners, and
    every (colour, shape) pair keeps at least two of its three sizes there.
    """
    indices = list(COLORS).index(color) + SHAPES.index(shape) + list(SIZES).index(size)
    return indices % 4 == 0


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    every = [(color, shape, size) for color in COLORS for shape in SHAPES for size in SIZES]
    return [combination for combination in every if is_held_out(*combination) == held_out]


def sample_scene(rng: random.Random, held_out: bool, n_things: int | None = None) -> Scene:
    """A scene of 1-4 things that do not touch and have pairwise different (colour, shape)."""
    pool = combinations(held_out)
    n_things = n_things or rng.choice((1, 2, 2, 3, 3, 4, 4))
    things: list[Thing] = []
    while len(things) < n_things:
        color, shape, size = rng.choice(pool)
        if (
            things and rng.random() < 0.35
        ):  # look-alikes make counting and telling apart worth asking
            color, shape, size = rng.choice(
                [c for c in pool if things[0].color == c[0] or things[0].shape == c[1]]
            )
        if any((thing.color, thing.shape) == (color, shape) for thing in things):
            continue
        place = _free_place(rng, SIZES[size], things)
        if place is None:  # the ground is full: start again
            things.clear()
            continue
        things.append(Thing(color, shape, size, *place, angle=rng.uniform(-12, 12)))
    things.sort(key=lambda thing: (thing.row, thing.column, thing.x))
    background = rng.choice(
        ((250, 250, 250), (236, 236, 232), (245, 238, 220), (225, 236, 242), (232, 240, 226))
    )
    return Scene(tuple(things), background, jitter=rng.getrandbits(32))


def _free_place(rng: random.Random, radius: int, things: list[Thing]) -> tuple[int, int] | None:
    low, high = (
        math.ceil((radius + 2) / PATCH_SIZE - 0.5),
        math.floor((IMAGE_SIZE - radius - 2) / PATCH_SIZE - 0.5),
    )
    for _ in range(50):
        # Near the middle of a patch, so that "which patch holds the centre" has one answer.
        x, y = (
            rng.randint(low, high) * PATCH_SIZE + PATCH_SIZE // 2 + rng.randint(-4, 4)
            for _ in range(2)
        )
        if all(
            math.hypot(x - thing.x, y - thing.y) > 1.2 * (radius + SIZES[thing.size])
            for thing in things
        ):
            return x, y
    return None


def change_one(rng: random.Random, scene: Scene, aspect: str) -> Scene | None:
    """The same scene with one thing's `aspect` ("color", "shape", "size" or "place") changed, or None where none fits.

    The new combination is on the same side of the train / held-out split as the old one.
    """
    index = rng.randrange(len(scene.things))
    thing, others = (
        scene.things[index],
        [other for i, other in enumerate(scene.things) if i != index],
    )
    if aspect == "place":
        place = _free_place(rng, SIZES[thing.size], list(scene.things))
        moved = replace(thing, x=place[0], y=place[1]) if place else thing
        candidates = [moved] if (moved.column, moved.row) != (thing.column, thing.row) else []
    else:
        values = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES)}[aspect]
        candidates = [
            replace(thing, **{aspect: value}) for value in values if value != getattr(thing, aspect)
        ]
    rng.shuffle(candidates)
    for changed in candidates:
        radius = SIZES[changed.size]
        same_side = is_held_out(*changed.combination) == is_held_out(*thing.combination)
        inside = all(
            radius + 2 <= place <= IMAGE_SIZE - radius - 2 for place in (changed.x, changed.y)
        )
        free = all(
            (changed.color, changed.shape) != (other.color, other.shape)
            and math.hypot(changed.x - other.x, changed.y - other.y)
            > radius + SIZES[other.size] + 4
            for other in others
        )
        if same_side and inside and free:
            return replace(
                scene, things=scene.things[:index] + (changed,) + scene.things[index + 1 :]
            )
    return None


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 224 x 224, drawn at twice the size for smooth edges."""
    rng = random.Random(scene.jitter)
    image = Image.new("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE), _jitter(rng, scene.background, 4))
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        color = _jitter(rng, COLORS[thing.color], 14)
        radius = 2 * SIZES[thing.size]
        if thing.shape == "circle":
            canvas.circle((2 * thing.x, 2 * thing.y), 0.92 * radius, fill=color)
        else:
            outline = _rotate(_OUTLINES[thing.shape], thing.angle)
            canvas.polygon(
                [(2 * thing.x + radius * u, 2 * thing.y + radius * v) for u, v in outline],
                fill=color,
            )
    return image.reduce(2)


def _jitter(rng: random.Random, color: tuple[int, int, int], amount: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)


def _rotate(outline: list[tuple[float, float]], degrees: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(cos * u - sin * v, sin * u + cos * v) for u, v in outline]


def _star() -> list[tuple[float, float]]:
    corners = ((1.0 if k % 2 == 0 else 0.42, math.pi * (k / 5 - 0.5)) for k in range(10))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def _heart() -> list[tuple[float, float]]:
    turns = (2 * math.pi * k / 40 for k in range(40))
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


_OUTLINES = {  # corners in units of the half width, x to the right, y down
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-0.3, -0.9), (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3),
        (0.3, 0.9), (-0.3, 0.9), (-0.3, 0.3), (-0.9, 0.3), (-0.9, -0.3), (-0.3, -0.3),
    ],
}  # fmt: skip
