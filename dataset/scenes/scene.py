"""The rendered demo world: colored shapes on a light ground, with exact ground truth, no download.

A thing has three attributes (color, shape, size) and a place. Of the 8 x 6 x 3 = 144 combinations
of attributes, 36 are *held out*: no training picture, no training text and no weights of the demo
have ever met one, and held-out scenes are made of nothing else. See `is_held_out`.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

IMAGE_SIZE = 224
PATCH_SIZE = 16
# Patches a side: 14.
GRID = IMAGE_SIZE // PATCH_SIZE
# Words for places are coarser than patches: columns A to G, rows 1 to 7.
CELLS = 7
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
# Half the width of a thing of each size, in pixels.
RADII = {"small": 13, "medium": 21, "large": 32}


@dataclass(frozen=True)
class Thing:
    """One drawn thing.

    Args:
        color, shape, size: a key of COLORS, one of SHAPES, a key of RADII.
        x, y: its center, in pixels from the top left.
        angle: how far it is turned, in degrees.
    """

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
        """Index of the patch that holds the center, 0 to 195, row by row."""
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
    """What a picture shows.

    Args:
        things: 1 to 4 of them, in reading order.
        background: RGB of the ground.
        jitter: seed of small color differences, so that the picture depends on the scene alone.
    """

    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    jitter: int


def is_held_out(color: str, shape: str, size: str) -> bool:
    """Whether a combination is kept for evaluation.

    A diagonal of the attribute cube: every color, shape and size is still met in training with many
    partners, and every (color, shape) pair keeps at least two of its three sizes there.
    """
    indices = list(COLORS).index(color) + SHAPES.index(shape) + list(RADII).index(size)
    return indices % 4 == 0


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """[(color, shape, size)] for training, or those that are held out."""
    every = [(color, shape, size) for color in COLORS for shape in SHAPES for size in RADII]
    return [combination for combination in every if is_held_out(*combination) == held_out]


def sample_scene(rng: random.Random, held_out: bool, n_things: int | None = None) -> Scene:
    """A scene of things that do not touch; no two have the same color and shape.

    Args:
        rng: source of every choice.
        held_out: use only combinations that are held out, or only the others.
        n_things: 1 to 4; at random if not given.
    """
    pool = combinations(held_out)
    n_things = n_things or rng.choice((1, 2, 2, 3, 3, 4, 4))
    things: list[Thing] = []
    while len(things) < n_things:
        # its attributes: look-alikes make counting and telling apart worth asking
        color, shape, size = rng.choice(pool)
        if things and rng.random() < 0.35:
            color, shape, size = rng.choice(
                [c for c in pool if things[0].color == c[0] or things[0].shape == c[1]]
            )
        if any((thing.color, thing.shape) == (color, shape) for thing in things):
            continue

        # its place: if the ground is full, start again
        place = _find_free_place(rng, RADII[size], things)
        if place is None:
            things.clear()
            continue
        things.append(Thing(color, shape, size, *place, angle=rng.uniform(-12, 12)))
    things.sort(key=lambda thing: (thing.row, thing.column, thing.x))
    background = rng.choice(
        ((250, 250, 250), (236, 236, 232), (245, 238, 220), (225, 236, 242), (232, 240, 226))
    )
    return Scene(tuple(things), background, jitter=rng.getrandbits(32))


def _find_free_place(
    rng: random.Random, radius: int, things: list[Thing]
) -> tuple[int, int] | None:
    """(x, y) where a thing of that radius touches no other; None if 50 tries find none."""
    lowest = math.ceil((radius + 2) / PATCH_SIZE - 0.5)
    highest = math.floor((IMAGE_SIZE - radius - 2) / PATCH_SIZE - 0.5)

    # Near the middle of a patch, so that "which patch holds the center" has one answer.
    def choose() -> int:
        patch = rng.randint(lowest, highest)
        return patch * PATCH_SIZE + PATCH_SIZE // 2 + rng.randint(-4, 4)

    for _ in range(50):
        x, y = choose(), choose()
        if all(
            math.hypot(x - thing.x, y - thing.y) > 1.2 * (radius + RADII[thing.size])
            for thing in things
        ):
            return x, y
    return None


def change_one(rng: random.Random, scene: Scene, aspect: str) -> Scene | None:
    """The same scene with one thing changed, or None where nothing fits.

    The new combination is on the same side of the train / held-out split as the old one.

    Args:
        rng: source of every choice.
        scene: what is changed.
        aspect: "color", "shape", "size" or "place".
    """
    # what the thing could become
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    others = scene.things[:index] + scene.things[index + 1 :]
    if aspect == "place":
        place = _find_free_place(rng, RADII[thing.size], list(scene.things))
        moved = replace(thing, x=place[0], y=place[1]) if place else thing
        candidates = [moved] if (moved.column, moved.row) != (thing.column, thing.row) else []
    else:
        values = {"color": list(COLORS), "shape": list(SHAPES), "size": list(RADII)}[aspect]
        candidates = [
            replace(thing, **{aspect: value}) for value in values if value != getattr(thing, aspect)
        ]

    # the first of these, in any order, that fits
    rng.shuffle(candidates)
    for changed in candidates:
        same_side = is_held_out(*changed.combination) == is_held_out(*thing.combination)
        if same_side and _fits(changed, others):
            things = scene.things[:index] + (changed,) + scene.things[index + 1 :]
            return replace(scene, things=things)
    return None


def _fits(thing: Thing, others: tuple[Thing, ...]) -> bool:
    """Whether a thing is inside the picture, touches no other and is not taken for another."""
    radius = RADII[thing.size]
    is_inside = all(radius + 2 <= place <= IMAGE_SIZE - radius - 2 for place in (thing.x, thing.y))
    return is_inside and all(
        (thing.color, thing.shape) != (other.color, other.shape)
        and math.hypot(thing.x - other.x, thing.y - other.y) > radius + RADII[other.size] + 4
        for other in others
    )


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 224 x 224, drawn at twice the size for smooth edges."""
    rng = random.Random(scene.jitter)
    image = Image.new("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE), _jitter(rng, scene.background, 4))
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        color = _jitter(rng, COLORS[thing.color], 14)
        x, y, radius = 2 * thing.x, 2 * thing.y, 2 * RADII[thing.size]
        if thing.shape == "circle":
            canvas.circle((x, y), 0.92 * radius, fill=color)
        else:
            outline = _rotate(_OUTLINES[thing.shape], thing.angle)
            canvas.polygon([(x + radius * u, y + radius * v) for u, v in outline], fill=color)
    return image.reduce(2)


def _jitter(rng: random.Random, color: tuple[int, int, int], amount: int) -> tuple[int, ...]:
    """A color up to `amount` levels away in each channel."""
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)


def _rotate(outline: list[tuple[float, float]], degrees: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(cos * u - sin * v, sin * u + cos * v) for u, v in outline]


def _star() -> list[tuple[float, float]]:
    corners = ((1.0 if k % 2 == 0 else 0.42, math.pi * (k / 5 - 0.5)) for k in range(10))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def _heart() -> list[tuple[float, float]]:
    def height(t: float) -> float:
        return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)

    turns = (2 * math.pi * k / 40 for k in range(40))
    return [(math.sin(t) ** 3, -height(t) / 16) for t in turns]


# Corners in units of the half width, x to the right, y down.
_OUTLINES = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-0.3, -0.9), (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3),
        (0.3, 0.9), (-0.3, 0.9), (-0.3, 0.3), (-0.9, 0.3), (-0.9, -0.3), (-0.3, -0.3),
    ],
}  # fmt: skip
