"""Samples as the model gets them: pictures, tokens, and in green what the loss counts."""

from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from common.text import IMAGE_TAG
from dataset.page import show_row, write_page
from model.processing import IGNORE_INDEX, VLMProcessor

# Kinds of pieces, which are also the classes of their spans.
SEEN, LABEL, MARK, IMAGE, CUT, GAP = "seen", "label", "mark", "image", "cut", "gap"
# Pieces at a row's start and at its end; those between are left out.
MOST_PIECES = (600, 200)
MOST_PICTURES = 9  # of a row that are shown
LINE_BREAK = "⏎"  # how one is shown


class Piece(NamedTuple):
    """One token; or several: of one character, of an image, or left out."""

    text: str
    n_tokens: int
    kind: str


class Sample(NamedTuple):
    """A row of the page."""

    title: str
    images: list[Image.Image]
    pieces: list[Piece]


def split_pieces(
    sample: dict[str, torch.Tensor], n_kept: int, processor: VLMProcessor
) -> list[Piece]:
    """The pieces of {input_ids int64[T], labels int64[T]}; those from token `n_kept` on are cut."""
    input_ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
    marks, size = set(processor.tokenizer.all_special_ids), len(processor.image_ids)
    pieces, start = [], 0
    while start < len(input_ids):
        if input_ids[start : start + size] == processor.image_ids:
            end, kind, text = start + size, IMAGE, f"{IMAGE_TAG} ×{size}"
        else:
            end, text = _decode_next(input_ids, start, processor.tokenizer)
            is_label = labels[start] != IGNORE_INDEX and start > 0
            kind = LABEL if is_label else MARK if input_ids[start] in marks else SEEN
        pieces.append(Piece(text, end - start, kind if start < n_kept else CUT))
        start = end
    return pieces


def _decode_next(input_ids: list[int], start: int, tokenizer) -> tuple[int, str]:
    """(end, text) of the fewest tokens from `start` on that make whole characters.

    A byte-level token may hold a third of a character.
    """
    for end in range(start + 1, min(start + 5, len(input_ids) + 1)):
        text = tokenizer.decode(input_ids[start:end], clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd"):
            return end, text
    one = input_ids[start : start + 1]
    return start + 1, tokenizer.decode(one, clean_up_tokenization_spaces=False)


def shorten(pieces: list[Piece]) -> list[Piece]:
    """The pieces, without the middle if they are many; its place says how many tokens it had."""
    n_first, n_last = MOST_PIECES
    if len(pieces) <= n_first + n_last + 1:
        return pieces
    n_tokens = sum(piece.n_tokens for piece in pieces[n_first:-n_last])
    gap = Piece(f" … {n_tokens:,} tokens … ", n_tokens, GAP)
    return [*pieces[:n_first], gap, *pieces[-n_last:]]


def show_piece(piece: Piece) -> str:
    """A span whose class is the kind; its title says if it has several tokens."""
    text = "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() else "□" for c in piece.text
    )
    text = escape(text).replace("\n", f"{LINE_BREAK}\n")
    title = f' title="{piece.n_tokens} tokens"' if piece.n_tokens > 1 else ""
    return f'<span class="{piece.kind}"{title}>{text}</span>'


def write_sheet(path: Path, title: str, about: str, samples: list[Sample], limit: str) -> None:
    """Write the page.

    Args:
        path: of the .html.
        title: name of the data file.
        about: which rows these are.
        samples: the rows.
        limit: the flag that decides what is cut.
    """
    entries = (
        (LABEL, "label", "trained on"),
        (SEEN, "seen", "read, not trained on"),
        (IMAGE, IMAGE_TAG, "tokens of an image"),
        (CUT, "cut", f"beyond {limit}"),
    )
    legend = "".join(
        f'<b><span class="{kind}">{escape(name)}</span> {escape(meaning)}</b> '
        for kind, name, meaning in entries
    )
    parts = [
        f'<p class="quiet">{escape(about)}',
        f'<p class="legend">{legend}',
        f'<p class="quiet">One shade is one token, {LINE_BREAK} is a line break. An answer\'s '
        "&lt;/s&gt; is a label too: it says when to stop.",
    ]
    for sample in samples:
        tokens = "".join(map(show_piece, shorten(sample.pieces)))
        text = f'<p class="quiet">{escape(sample.title)}<div class="tokens">{tokens}</div>'
        parts.append(show_row(sample.images[:MOST_PICTURES], text))
    write_page(path, title, "\n".join(parts))
