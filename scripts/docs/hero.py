"""The picture at the top of the README: a held-out scene, questions, and what a model answers.

The answers are those of the model, right or wrong; a mark beside each says which.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common.files import atomic_write
from dataset.scenes.scene import CELLS, Scene, draw_scene, sample_scene
from dataset.scenes.text import Question, ask
from inference import load_vlm

QUESTION_TYPES = ("color", "count", "relation")
# Everything is drawn at twice its size, for smooth edges. Sizes are those of the finished picture:
# large, since a phone shows it 358 pixels wide.
SCALE = 2
WIDTH, MARGIN, RADIUS = 1200, 36, 28
SCENE_SIZE, RULER = 476, 40
TEXT_SIZE, RULER_SIZE, LINE_HEIGHT = 41, 26, 50
PADDING, GAP = 16, 26
CARD, GRID, QUIET, INK = "#f6f8fa", "#c9d3dd", "#59636e", "#1f2328"
RIGHT, WRONG = "#1a7f37", "#cf222e"
BUBBLES = {True: "#dafbe1", False: "#ffebe9"}


def write_hero(weights: Path, seed: int, path: Path) -> list[tuple[Question, str]]:
    """Ask a model about a held-out scene and draw both; returns the questions with its answers.

    Args:
        weights: a model that was trained on scenes.
        seed: of the scene and the questions.
        path: the .png file.
    """
    # ask
    rng = random.Random(seed)
    scene = sample_scene(rng, held_out=True, n_things=4)
    asked = [ask(rng, question_type, (scene,), "en") for question_type in QUESTION_TYPES]
    vlm = load_vlm(weights, device="cpu")
    answers = [
        (question, vlm.ask(draw_scene(scene), question.text, temperature=0).strip())
        for question in filter(None, asked)
    ]

    # draw
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        draw_hero(scene, answers).save(file, "PNG", optimize=True)
    return answers


def draw_hero(scene: Scene, answers: list[tuple[Question, str]]) -> Image.Image:
    """RGBA: a light card with round corners, the scene on the left, the dialogue on the right."""
    # the dialogue first: it says how high the card is
    left = MARGIN + RULER + SCENE_SIZE + MARGIN
    dialogue = draw_dialogue(answers, WIDTH - left - MARGIN)
    text_height = dialogue.height // SCALE
    height = max(SCENE_SIZE + RULER, text_height) + 2 * MARGIN

    # the card, transparent around its corners
    card = Image.new("RGBA", (SCALE * WIDTH, SCALE * height))
    canvas = ImageDraw.Draw(card)
    box = (0, 0, card.width - 1, card.height - 1)
    canvas.rounded_rectangle(box, SCALE * RADIUS, fill=CARD, outline=GRID, width=SCALE)
    card.alpha_composite(dialogue, (SCALE * left, SCALE * (height - text_height) // 2))

    # the scene, with the letters and numbers that answers name places by
    top = (height - SCENE_SIZE - RULER) // 2 + RULER
    corner = (SCALE * (MARGIN + RULER), SCALE * top)
    side = SCALE * SCENE_SIZE
    card.paste(draw_scene(scene).resize((side, side), Image.Resampling.LANCZOS), corner)
    for line in range(CELLS + 1):
        offset = side * line // CELLS
        x, y = corner[0] + offset, corner[1] + offset
        canvas.line((x, corner[1], x, corner[1] + side), GRID, width=SCALE)
        canvas.line((corner[0], y, corner[0] + side, y), GRID, width=SCALE)
    font = load_font(RULER_SIZE)
    for cell in range(CELLS):
        middle, edge = side * (2 * cell + 1) // (2 * CELLS), SCALE * RULER // 2
        column, row = (corner[0] + middle, corner[1] - edge), (corner[0] - edge, corner[1] + middle)
        canvas.text(column, "ABCDEFG"[cell], QUIET, font, "mm")
        canvas.text(row, str(cell + 1), QUIET, font, "mm")
    return card.reduce(SCALE)


def draw_dialogue(answers: list[tuple[Question, str]], width: int) -> Image.Image:
    """RGBA at SCALE, `width` wide and as high as it has to be: questions and marked answers."""
    # where lines break; an answer has a mark on its left
    font, mark = load_font(TEXT_SIZE), TEXT_SIZE
    blocks = [
        (
            wrap(question.text, font, width),
            wrap(given, font, width - mark - 2 * PADDING),
            given == question.answer,
        )
        for question, given in answers
    ]
    n_lines = sum(len(question) + len(given) for question, given, _ in blocks)
    height = n_lines * LINE_HEIGHT + len(blocks) * (2 * PADDING + GAP) - GAP
    image = Image.new("RGBA", (SCALE * width, SCALE * height))
    canvas = ImageDraw.Draw(image)

    # question, bubble, mark, answer
    y = 0
    for question, given, is_right in blocks:
        y = write_lines(canvas, question, 0, y, font) + PADDING // 2
        bottom = y + len(given) * LINE_HEIGHT + PADDING
        longest = max(font.getlength(line) for line in given) / SCALE
        box = (0, y, mark + longest + 2 * PADDING, bottom)
        canvas.rounded_rectangle([SCALE * edge for edge in box], SCALE * 18, BUBBLES[is_right])
        draw_mark(canvas, PADDING, y + PADDING // 2 + LINE_HEIGHT // 2, is_right)
        write_lines(canvas, given, mark + PADDING, y + PADDING // 2, font)
        y = bottom + GAP + PADDING // 2
    return image


def write_lines(
    canvas: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, font: ImageFont.FreeTypeFont
) -> int:
    """Write lines from (x, y) down; returns where the next one would begin."""
    for line in lines:
        canvas.text((SCALE * x, SCALE * (y + LINE_HEIGHT // 2)), line, INK, font, "lm")
        y += LINE_HEIGHT
    return y


def draw_mark(canvas: ImageDraw.ImageDraw, x: int, y: int, is_right: bool) -> None:
    """A check mark or a cross; (x, y) is the middle of its left edge."""
    size = TEXT_SIZE // 2
    check = [[(0, 0.05), (0.38, 0.5), (1.1, -0.5)]]
    cross = [[(0.1, -0.45), (1, 0.45)], [(0.1, 0.45), (1, -0.45)]]
    for line in check if is_right else cross:
        points = [(SCALE * (x + size * u), SCALE * (y + size * v)) for u, v in line]
        canvas.line(points, RIGHT if is_right else WRONG, width=SCALE * 6, joint="curve")


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of a text that are at most so wide, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= SCALE * width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The font inside Pillow: the picture is the same on every system."""
    return ImageFont.load_default(SCALE * size)
