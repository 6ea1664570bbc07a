"""Conversations about images, read from any of the formats, one encoded sample at a time.

Only each row's place in its file stays in memory. Rows are checked once, pictures when they are
needed. What cannot be used is counted by reason and left out; it never ends a run.
"""

import io
import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import BadSampleError, UserError, list_reasons
from dataset.formats import SURPLUS_DROPPED, Row
from dataset.index_cache import open_cached, save_cached
from dataset.record_rows import RecordRows
from dataset.rows import open_rows
from model.processing import VLMProcessor, check_conversation, match_image_tags

# Of UTF-8 text with a vocabulary of 6,400 tokens, English and Chinese alike. Only orders rows by
# length, so that a batch has little padding.
BYTES_PER_TOKEN = 3
# Rows of a file from which on its check is cached; fewer are checked in a second or two.
CACHED_FROM = 50_000
# Of that check. Count it up when it finds something else in the same file.
CHECK = 3
# One usable row: its key in the file, and about how many tokens it has.
ROW = np.dtype([("key", "<i8"), ("length", "<i4")])
# What tells a picture from others.
IDENTITY = np.dtype("<u8")


class CheckedRow(NamedTuple):
    """A row that can be used.

    Args:
        turns: (role, content), as many `<image>` as pictures.
        pictures: what tells each from others, see `check_images`.
        repairs: what was done to it, in words that can be counted.
    """

    turns: list[tuple[str, str]]
    pictures: list[int]
    repairs: tuple[str, ...]


@dataclass
class RowCounts:
    """What the check of all rows found.

    Args:
        skipped: rows that cannot be used, by reason.
        repaired: usable rows that were repaired, by what was done.
        n_images: images of the usable rows.
        text_only: usable rows without any.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    n_images: int = 0
    text_only: int = 0


def check_row(rows: RecordRows, row: Row | BadSampleError) -> CheckedRow:
    """Check a row that `rows` gave; no picture is opened.

    BadSampleError for a row that nothing can be learned from.
    """
    if isinstance(row, BadSampleError):
        raise row
    pictures = rows.check_images(row)
    turns = check_conversation(row.conversations)
    if "assistant" not in [role for role, _ in turns]:
        raise BadSampleError("no answer")
    turns, n_surplus = match_image_tags(turns, len(pictures))
    repairs = (*row.repairs, SURPLUS_DROPPED) if n_surplus else row.repairs
    return CheckedRow(turns, pictures, repairs)


class VLMDataset(Dataset):
    """`ds[i]` is a sample of usable row i: input_ids, labels, pixel_values (`VLMProcessor.encode`).

    It raises BadSampleError where a picture turns out to be damaged. `lengths[i]` estimates the
    tokens of row i, `formats` names the format of the file. `skipped` counts the rows left out at
    the start by reason, `repaired` those that were repaired by what was done, `text_only` those
    without images; `n_images` are the images of all usable rows, `n_pictures` the distinct ones.

    Args:
        data_path: a data file, see dataset/rows.py.
        images_path: folder or .zip of the images that its rows name; None if there is none.
        processor: encodes the rows.
        max_length: most tokens of a sample; longer ones are cut.
    """

    def __init__(
        self,
        data_path: str | Path,
        images_path: str | Path | None,
        processor: VLMProcessor,
        max_length: int,
    ):
        self.data_path, self.images_path = Path(data_path), images_path
        self.processor, self.max_length = processor, max_length
        self.rows = open_rows(data_path, images_path)

        # usable rows: from the cache, or by a look at each
        settings = {
            "check": CHECK,
            "images": images_path and os.path.abspath(images_path),
            "max_length": max_length,
            "n_image_tokens": processor.config.n_image_tokens,
            "counts": list(vars(RowCounts())),
        }
        cached = self._open_cached(settings)
        if not cached:
            cached = self._check_rows()
            usable, _, counts = cached
            n_rows = len(usable) + sum(counts.skipped.values())
            # A cache would hide images that come later.
            if n_rows >= CACHED_FROM and not counts.skipped["image missing"]:
                self._save_cached(*cached, settings)
        usable, self.pictures, counts = cached

        self.keys, self.lengths = usable["key"], usable["length"]
        self.skipped, self.repaired = Counter(counts.skipped), Counter(counts.repaired)
        self.n_images, self.text_only = counts.n_images, counts.text_only
        self.n_pictures, self.formats = len(self.pictures), [self.rows.format]

    def _open_cached(self, settings: dict) -> tuple[np.ndarray, np.ndarray, RowCounts] | None:
        rows = open_cached(self.rows.path, "rows", ROW, **settings)
        pictures = open_cached(self.rows.path, "pictures", IDENTITY, **settings)
        return (rows[0], pictures[0], RowCounts(**rows[1])) if rows and pictures else None

    def _save_cached(
        self, usable: np.ndarray, pictures: np.ndarray, counts: RowCounts, settings: dict
    ) -> None:
        save_cached(pictures, {}, self.rows.path, "pictures", **settings)
        save_cached(usable, vars(counts), self.rows.path, "rows", **settings)

    def _check_rows(self) -> tuple[np.ndarray, np.ndarray, RowCounts]:
        """(ROW[n] of the usable rows, IDENTITY[m] sorted, counts). No picture is opened."""
        # each row is used, or counted with the reason why not
        counts, keys, lengths, pictures = RowCounts(), array("q"), array("i"), array("Q")
        n_image_tokens = self.processor.config.n_image_tokens
        for key, n_bytes, row in self.rows.scan():
            try:
                checked = check_row(self.rows, row)
            except BadSampleError as error:
                counts.skipped[error.args[0]] += 1
                continue
            if checked.repairs:
                counts.repaired.update(checked.repairs)
            n_images = len(checked.pictures)
            counts.n_images += n_images
            counts.text_only += not n_images
            pictures.extend(checked.pictures)
            n_tokens = n_bytes // BYTES_PER_TOKEN + n_images * n_image_tokens
            keys.append(key)
            lengths.append(min(self.max_length, n_tokens))

        # a set without a single usable row
        if not keys:
            reasons = list_reasons(counts.skipped) or "it is empty"
            hint = self._explain_missing_images(counts.skipped)
            raise UserError(f"{self.data_path} has no usable row ({reasons}){hint}")

        usable = np.empty(len(keys), ROW)
        usable["key"], usable["length"] = keys, lengths
        return usable, np.unique(np.array(pictures, IDENTITY)), counts

    def _explain_missing_images(self, skipped: Counter[str]) -> str:
        """What to do about a set without a single image; "" where that is not the reason."""
        if not skipped["image missing"]:
            return ""
        if self.images_path is None:
            return "; no image folder is given: pass --images_path"
        if self.rows.image_source.count():
            return ""
        return (
            f"; the image folder {self.images_path} is missing or empty: fetch it or its .zip, "
            "which need not be unpacked, or pass --images_path"
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, images = self.read(index)
        return self.processor.encode(row.conversations, images, self.max_length)

    def read(self, index: int) -> tuple[Row, list[Path | io.BytesIO]]:
        """(row, its images as `load_image` takes them): what evaluation needs."""
        row = self.rows.read(int(self.keys[index]))
        return row, self.rows.images(row)

    def read_text(self, index: int) -> tuple[dict[str, torch.Tensor], list[Path | io.BytesIO]]:
        """({input_ids, labels}, its images as `load_image` takes them): what training needs."""
        row, images = self.read(index)
        return self.processor.encode_text(row.conversations, images, self.max_length)
