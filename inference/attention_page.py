"""A page of words x pictures: what a model looked at and what its words depend on, as a PNG."""

from __future__ import annotations

import math
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.files import atomic_write
from common.text import IMAGE_TAG
from inference.attention import draw_map, occlude, watch_answer
from inference.heat_map import draw_picture, find_top

if TYPE_CHECKING:
    from inference.load import VLM

# Pixels of a map, of the gap beside it, of a line of text below or above it.
TILE, GAP, LINE = 168, 12, 22
MARGIN = 24
# Words side by side, and of an answer at most.
LEAST_COLUMNS, MOST_COLUMNS, MOST_WORDS = 4, 7, 70
# Under the first picture.
LEGEND = (
    "attention (above): where",
    "the model looks to choose",
    "a word; % of it that is",
    "on this picture",
    "occlusion (below): what",
    "a word's probability loses",
    "when a patch is gray",
)
INK, QUIET = "#1f2328", "#59636e"
# Smaller falls of a log-probability are those of rounding.
LEAST_FALL = 1e-5
# Fonts with Chinese and Japanese characters, which matplotlib's own has not.
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Source Han Sans CN"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Serif CJK SC", "Noto Serif CJK JP"),
    *("PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Arial Unicode MS", "Heiti TC"),
    *("Microsoft YaHei", "SimHei", "SimSun", "Yu Gothic", "MS Gothic"),
)


class LookedAt(NamedTuple):
    """An answer and its maps.

    Args:
        question: with `<image>` tags.
        words: of the answer.
        pixels: uint8[k, 3, H, W], the pictures as the model sees them.
        attention: float[words, k, rows, cols], shares of a word's attention.
        falls: float[words, k, rows, cols] of the log-probability, see `occlude`.
    """

    question: str
    words: list[str]
    pixels: torch.Tensor
    attention: np.ndarray
    falls: np.ndarray


def look_at_answer(
    vlm: VLM,
    turns: list[dict],
    answer: str,
    pixel_values: torch.Tensor,
    image_features: torch.Tensor,
) -> LookedAt:
    """Make the maps, with a progress bar; see `watch_answer` and `occlude`, also for errors."""
    # quick
    looks = watch_answer(vlm, turns, answer, image_features)
    n_words, n_images = len(looks.words), len(pixel_values)
    maps = [[looks.map(word, image) for image in range(n_images)] for word in range(n_words)]

    # slow: the vision encoder sees each picture again for each of its patches
    falls, n_patches = [], vlm.model.config.n_image_tokens
    with tqdm(total=n_images * n_patches, desc="occlusion", unit="patch") as bar:
        for image in range(n_images):

            def note(n_done: int, _: int, begin: int = image * n_patches) -> None:
                bar.update(begin + n_done - bar.n)

            falls.append(occlude(vlm, turns, answer, pixel_values, image, None, note))
    question, pixels = turns[-1]["content"], vlm.processor.denormalize(pixel_values)
    return LookedAt(question, looks.words, pixels, np.array(maps), np.stack(falls, axis=1))


def write_page(path: Path, answers: list[LookedAt]) -> None:
    """Write the PNG; answers come one below the other. UserError where it cannot be written."""
    sections = [draw_answer(answer) for answer in answers]
    size = max(section.width for section in sections), sum(section.height for section in sections)
    page = Image.new("RGB", size, "white")
    top = 0
    for section in sections:
        page.paste(section, (0, top))
        top += section.height
    with atomic_write(path) as file:
        page.save(file, "PNG")
    said = "".join(answer.question + "".join(answer.words) for answer in answers)
    has_chinese = any(unicodedata.name(letter, "").startswith("CJK") for letter in said)
    if has_chinese and not find_cjk_fonts():
        print(f"no font here has Chinese characters, such as {CJK_FONTS[0]}: {path} has boxes")


class Sheet:
    """Pictures and lines of text at places in pixels, from the top left."""

    def __init__(self):
        self.tiles: list[tuple[int, int, Image.Image]] = []
        self.lines: list[tuple[float, float, str, int, str]] = []

    def add_tile(self, x: int, y: int, tile: Image.Image) -> None:
        self.tiles.append((x, y, tile.resize((TILE, TILE), Image.Resampling.LANCZOS)))

    def add_line(self, x: float, y: float, text: str, size: int = 13, color: str = QUIET) -> None:
        """A line whose top is at y."""
        self.lines.append((x, y, text, size, color))

    def draw(self, width: int, height: int) -> Image.Image:
        """RGB, width x height."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # the pictures
        image = Image.new("RGB", (width, height), "white")
        for x, y, tile in self.tiles:
            image.paste(tile, (x, y))

        # Matplotlib takes each character from the first font that has it, or draws a box.
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        figure.figimage(np.asarray(image))
        families = ["DejaVu Sans", *find_cjk_fonts()]
        for x, y, text, size, color in self.lines:
            # 72 points are 100 pixels; a "$" begins no formula
            how = dict(size=0.72 * size, color=color, family=families, parse_math=False)
            figure.text(x / width, 1 - y / height, text, va="top", **how)
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
            canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_answer(answer: LookedAt) -> Image.Image:
    """RGB: a column for each word, and for each picture its attention and its occlusion."""
    # question and answer; a letter is about half as wide as high
    n_words = min(len(answer.words), MOST_WORDS)
    n_bands = math.ceil(n_words / MOST_COLUMNS)
    n_columns = max(math.ceil(n_words / n_bands), LEAST_COLUMNS)
    width = 2 * MARGIN + (n_columns + 1) * (TILE + GAP) - GAP
    question = " ".join(answer.question.replace(IMAGE_TAG, "").split())
    said = " ".join("".join(answer.words).split())
    sheet, y = Sheet(), MARGIN
    sheet.add_line(MARGIN, y, shorten(question, width // 11), size=17)
    sheet.add_line(MARGIN, y + 26, shorten(said, width // 13), size=20, color=INK)
    y += 64

    # the words, in bands
    for begin in range(0, n_words, n_columns):
        y = add_band(sheet, y, answer, range(begin, min(begin + n_columns, n_words)))
    if n_words < len(answer.words):
        sheet.add_line(MARGIN, y, f"… and {len(answer.words) - n_words} more words")
        y += LINE
    return sheet.draw(width, y + MARGIN)


def add_band(sheet: Sheet, y: int, answer: LookedAt, words: range) -> int:
    """Add some words and their maps; returns where the next band begins."""
    lefts = [MARGIN + (1 + column) * (TILE + GAP) for column in range(len(words))]
    for left, word in zip(lefts, words):
        text = " ".join(answer.words[word].split()) or "␣"
        sheet.add_line(left, y, shorten(text, 15), size=17, color=INK)
    y += 28

    for image, pixels in enumerate(answer.pixels):
        # the picture itself, and at the very first what is beside it
        below = y + TILE + LINE + 4
        sheet.add_tile(MARGIN, y, draw_picture(pixels))
        legend = LEGEND if image == words.start == 0 else ()
        name = ("picture",) if len(answer.pixels) == 1 else (f"picture {image + 1}",)
        for number, line in enumerate(name + legend):
            sheet.add_line(MARGIN, y + TILE + 4 + number * LINE, line)

        # of each word: attention above, occlusion below; the same scale for all pictures
        for left, word in zip(lefts, words):
            heat, falls = answer.attention[word], answer.falls[word]
            sheet.add_tile(left, y, draw_map(pixels, heat[image], find_top(heat)))
            sheet.add_line(left, y + TILE + 4, f"{100 * heat[image].sum():.0f} %")
            top = max(find_top(falls), LEAST_FALL)
            sheet.add_tile(left, below, draw_map(pixels, falls[image], top))
            sheet.add_line(left, below + TILE + 4, describe_fall(float(falls[image].max())))
        y = below + TILE + LINE + GAP
    return y + GAP


def describe_fall(nats: float) -> str:
    """What the worst patch costs a word, as a part of its probability: "−12 % at most"."""
    if nats < LEAST_FALL:
        return "none matters"
    percent = -100 * math.expm1(-nats)
    return f"−{percent:.0f} % at most" if percent >= 10 else f"−{percent:.1g} % at most"


def shorten(text: str, width: int) -> str:
    """The beginning of a text that is at most `width` wide; Chinese characters are 2 wide."""
    total = 0
    for index, character in enumerate(text):
        total += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if total > width:
            return text[:index] + "…"
    return text


def find_cjk_fonts() -> list[str]:
    """One font of this system that has Chinese characters; none where there is none."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [name for name in CJK_FONTS if name in installed][:1]
