"""Draw samples as the model gets them: pictures, tokens, and in green what the loss counts."""

import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.errors import MissingFileError
from model.processing import IGNORE_INDEX, IMAGE_TAG, VLMProcessor

READ, LEARNED, MARK, IMAGE, LEFT_OUT = (
    "read",
    "learned",
    "mark",
    "image",
    "left out",
)  # kinds of pieces
WHITE, INK, FAINT, RULE, ALARM = "#ffffff", "#1f2937", "#6b7280", "#d1d5db", "#b91c1c"
SHADES = {  # of a piece's background; neighbouring tokens take turns, so that each can be seen
    READ: ("#f3f4f6", "#e7e9ed"),
    MARK: (WHITE, WHITE),
    LEARNED: ("#bbf0c8", "#93dfa8"),
    IMAGE: ("#cfe2ff", "#b9d3fb"),
    LEFT_OUT: (WHITE, WHITE),
}
CUT_SHADES = ("#fde3e3", "#fad1d1")
WIDTH, MARGIN, COLUMN = (
    1320,
    32,
    232,
)  # pixels: of the sheet, around everything, of the pictures' column
TEXT_SIZE, TITLE_SIZE, LINE, BASELINE = 20, 28, 34, 24  # the last: from a line's top
HEADER, PAD, GAP, CHIP = (
    196,
    22,
    8,
    8,
)  # height of the legend; around a sample, between pictures, inside an image's chip
MOST_PIECES = (180, 70)  # at a row's start and at its end; those between are left out
MOST_PICTURES = 9  # of a row that are shown
LINE_BREAK = "⏎"  # how one is shown
FONT = "fonts/NotoSansCJKsc-Regular.otf"


class Piece(NamedTuple):
    """One token; or several, where a character is split among them, an image takes them, or they are left out."""

    text: str
    n_tokens: int
    kind: str
    is_cut: bool = False


class Sample(NamedTuple):
    title: str
    images: list[Image.Image]
    pieces: list[Piece]


class Placed(NamedTuple):
    x: float
    line: int
    width: float
    text: str
    piece: Piece
    shade: int


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """A font with Latin and Chinese in it, out of the package mplfonts; what it lacks it shows as a box."""
    package = find_spec("mplfonts")
    if package is None:
        raise MissingFileError(
            "no font for the contact sheet: pip install mplfonts, or pass --samples 0 to go without"
        )
    path = Path(package.origin).parent / FONT
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def split_pieces(
    sample: dict[str, torch.Tensor], n_kept: int, processor: VLMProcessor
) -> list[Piece]:
    """The pieces of {input_ids int64[T], labels int64[T]}; those from token `n_kept` on are cut away."""
    input_ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    marks, size = set(processor.tokenizer.all_special_ids), len(processor.image_ids)
    pieces, start = [], 0
    while start < len(input_ids):
        if input_ids[start : start + size] == processor.image_ids:
            end, kind, text = start + size, IMAGE, f"{IMAGE_TAG} ×{size}"
        else:
            end, text = _decode_next(input_ids, start, processor.tokenizer)
            is_trainable = labels[start] != IGNORE_INDEX and start > 0
            kind = LEARNED if is_trainable else MARK if input_ids[start] in marks else READ
        pieces.append(Piece(text, end - start, kind, start >= n_kept))
        start = end
    return pieces


def _decode_next(input_ids: list[int], start: int, tokenizer) -> tuple[int, str]:
    """(end, text) of the fewest tokens from `start` on that make whole characters: byte-level tokens may hold a third of one."""
    for end in range(start + 1, min(start + 5, len(input_ids) + 1)):
        text = tokenizer.decode(input_ids[start:end], clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd"):
            return end, text
    return start + 1, tokenizer.decode(
        input_ids[start : start + 1], clean_up_tokenization_spaces=False
    )


def shorten(pieces: list[Piece]) -> list[Piece]:
    """The pieces, without the middle where they are many; its place says how many tokens it had."""
    n_first, n_last = MOST_PIECES
    if len(pieces) <= n_first + n_last + 1:
        return pieces
    n_tokens = sum(piece.n_tokens for piece in pieces[n_first:-n_last])
    return [
        *pieces[:n_first],
        Piece(f" … {n_tokens:,} tokens … ", n_tokens, LEFT_OUT),
        *pieces[-n_last:],
    ]


def lay_out(pieces: list[Piece], measure: Callable[[str], float], width: float) -> list[Placed]:
    """Where each piece goes in lines of that `width`. A line ends after a line break, which may stand in the margin, and before a
    word that would not fit."""
    shown = [(number, text) for number, piece in enumerate(pieces) for text in _split_lines(piece)]
    widths = [measure(text) + 2 * CHIP * (pieces[number].kind == IMAGE) for number, text in shown]
    needed = widths.copy()  # by a piece with the rest of its word
    for k in range(len(shown) - 2, -1, -1):
        if _is_solid(shown[k][1][-1]) and _is_solid(shown[k + 1][1][0]):
            needed[k] += needed[k + 1]
    placed, x, line, names_role = [], 0.0, 0, False
    for (number, text), own_width, word_width in zip(shown, widths, needed):
        if (
            x > 0
            and text != LINE_BREAK
            and x + (word_width if word_width <= width else own_width) > width
        ):
            x, line = 0.0, line + 1
        placed.append(Placed(x, line, own_width, text, pieces[number], number % 2))
        x += own_width
        if text == "<s>" and pieces[number].kind == MARK:
            names_role = True
        elif text == LINE_BREAK:
            if not names_role:  # behind the role's name the line goes on
                x, line = 0.0, line + 1
            names_role = False
    return placed


def _split_lines(piece: Piece) -> list[str]:
    """What to show of a piece, each line break by itself; what cannot be shown becomes a box."""
    text = "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() else "□" for c in piece.text
    )
    return [part.replace("\n", LINE_BREAK) for part in re.split("(\n)", text) if part]


def _is_solid(character: str) -> bool:
    """Whether it is part of a Latin word, with its punctuation; Chinese may be broken anywhere."""
    return character.isascii() and not character.isspace()


def draw_sheet(
    samples: list[Sample], title: str, subtitle: str, n_image_tokens: int, max_seq_len: int
) -> Image.Image:
    """The samples one below the other, with what the colours mean on top. Raises MissingFileError without the font."""
    font = load_font(TEXT_SIZE)
    left = COLUMN + 2 * MARGIN
    texts = [
        lay_out(shorten(sample.pieces), font.getlength, WIDTH - left - MARGIN) for sample in samples
    ]
    pictures = [arrange_pictures(sample.images) for sample in samples]
    heights = [
        2 * PAD
        + max(
            LINE * (text[-1].line + 2), max((y + image.height for image, _, y in placed), default=0)
        )
        for text, placed in zip(texts, pictures)
    ]
    sheet = Image.new("RGB", (WIDTH, HEADER + sum(heights) + MARGIN), WHITE)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 54), title, INK, load_font(TITLE_SIZE), anchor="ls")
    draw.text((MARGIN, 88), subtitle, FAINT, font, anchor="ls")
    _draw_legend(draw, font, n_image_tokens, max_seq_len)
    top = HEADER
    for sample, text, placed, height in zip(samples, texts, pictures, heights):
        draw.line((MARGIN, top, WIDTH - MARGIN, top), RULE)
        for image, x, y in placed:
            sheet.paste(image, (MARGIN + x, top + PAD + y))
        if not placed:
            draw.text((MARGIN, top + PAD + BASELINE), "no picture", FAINT, font, anchor="ls")
        draw.text((left, top + PAD + BASELINE), sample.title, FAINT, font, anchor="ls")
        for one in text:
            _draw_piece(draw, font, one, left + one.x, top + PAD + LINE * (one.line + 1))
        top += height
    return sheet


def arrange_pictures(images: list[Image.Image]) -> list[tuple[Image.Image, int, int]]:
    """(small picture, x, y) within the pictures' column: one, or smaller ones in rows of two or three."""
    across = 1 if len(images) == 1 else 2 if len(images) <= 4 else 3
    size = (COLUMN - GAP * (across - 1)) // across
    step = size + GAP
    return [
        (ImageOps.contain(image, (size, size)), k % across * step, k // across * step)
        for k, image in enumerate(images[:MOST_PICTURES])
    ]


def _draw_legend(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, n_image_tokens: int, max_seq_len: int
) -> None:
    """One of each kind and what it means, side by side."""
    entries = (
        (Piece("learned", 1, LEARNED), "the loss counts it"),
        (Piece("read", 1, READ), "seen, not learned"),
        (Piece(f"{IMAGE_TAG} ×{n_image_tokens}", n_image_tokens, IMAGE), "a picture's tokens"),
        (Piece("cut", 1, READ, is_cut=True), f"beyond --max_seq_len {max_seq_len}"),
    )
    x, y = MARGIN, 108
    for piece, meaning in entries:
        for one in lay_out([piece], font.getlength, WIDTH):
            _draw_piece(draw, font, one, x, y)
            x += one.width + 8
        draw.text((x, y + BASELINE), meaning, INK, font, anchor="ls")
        x += font.getlength(meaning) + 36
    hint = f"One shade, one token. {LINE_BREAK} is a line break. An answer's </s> is learned too: it says when to stop."
    draw.text((MARGIN, y + LINE + 6 + BASELINE), hint, FAINT, font, anchor="ls")


def _draw_piece(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, one: Placed, x: float, y: float
) -> None:
    """A piece with its background; (x, y) is the top left of its line."""
    kind, is_cut = one.piece.kind, one.piece.is_cut
    shade = CUT_SHADES[one.shade] if is_cut else SHADES[kind][one.shade]
    is_faint = kind in (MARK, LEFT_OUT) or one.text == LINE_BREAK
    box = (round(x), y + 2, round(x + one.width) - 1, y + LINE - 3)
    draw.rounded_rectangle(box, CHIP if kind == IMAGE else 0, shade)
    start = (x + CHIP * (kind == IMAGE), y + BASELINE)
    draw.text(start, one.text, ALARM if is_cut else FAINT if is_faint else INK, font, anchor="ls")
    if is_cut:
        draw.line((box[0], y + LINE // 2, box[2], y + LINE // 2), ALARM, width=2)
