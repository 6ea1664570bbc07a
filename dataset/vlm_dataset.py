"""Conversations about images, read from the published formats, one encoded sample at a time.

Only each row's place in its file is kept in memory; rows are checked once, images when they are needed. Whatever cannot be used
is counted by reason, never fatal.
"""

import io
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import BadSampleError, MissingFileError, UserError, list_reasons
from dataset.images import open_images
from dataset.index_cache import open_cached, save_cached
from dataset.rows import JsonLinesRows, ParquetRows
from model.processing import VLMProcessor, check_conversation, match_image_tags

BYTES_PER_TOKEN = 3  # of UTF-8 text with a 6,400-word vocabulary, English and Chinese alike; only orders rows by length
CACHED_FROM = 50_000  # rows; fewer are checked in a second or two
ROW = np.dtype([("key", "<i8"), ("length", "<i4")])


@dataclass
class RowCounts:
    """What a check of all rows found."""

    skipped: Counter[str] = field(default_factory=Counter)  # rows that cannot be used, by reason
    repaired: int = 0  # rows with `<image>` tags to spare
    n_images: int = 0


def open_rows(data_path: str | Path, images_path: str | Path | None) -> JsonLinesRows | ParquetRows:
    """The rows of a .jsonl or .parquet file. `images_path`: folder or .zip with the pictures that a .jsonl names."""
    path = Path(data_path)
    if not path.is_file():
        raise MissingFileError(
            f"no data at {data_path}: fetch the published sets with `python -m scripts.download pretrain-data sft-data`, "
            "or name another file"
        )
    return (
        ParquetRows(path)
        if path.suffix == ".parquet"
        else JsonLinesRows(path, open_images(images_path))
    )


def list_images(rows: JsonLinesRows | ParquetRows) -> set[str] | None:
    """The names in the rows' image folder, read once, for `check_row`; None where none are needed."""
    source = getattr(rows, "image_source", None)
    return source.list_names() if source else None


def check_row(
    rows: JsonLinesRows | ParquetRows, row: dict | None, listed: set[str] | None
) -> tuple[list[tuple[str, str]], int, int]:
    """(turns, images, `<image>` tags to spare) of a row one can learn from; BadSampleError for any other. No image is decoded."""
    if row is None:
        raise BadSampleError("not a JSON object")
    n_images = rows.check_images(row, listed)
    turns = check_conversation(row.get("conversations"))
    if not any(role == "assistant" for role, _ in turns):
        raise BadSampleError("no answer")
    turns, surplus = match_image_tags(turns, n_images)
    return turns, n_images, surplus


class VLMDataset(Dataset):
    """`ds[i]` is {input_ids, labels, pixel_values} of usable row i, or raises BadSampleError where its image is damaged.

    data_path: .jsonl or .parquet; images_path: folder or .zip of a .jsonl's images. `lengths[i]` estimates the tokens of row i,
    `skipped` counts rows left out at the start by reason, `repaired` those that had `<image>` tags to spare.
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
        settings = dict(
            images=str(images_path),
            max_length=max_length,
            n_image_tokens=processor.config.n_image_tokens,
        )
        found = open_cached(self.data_path, "rows", ROW, **settings)
        if found:
            usable, counts = found[0], RowCounts(**found[1])
        else:
            usable, counts = self._check_rows()
            n_read = len(usable) + sum(counts.skipped.values())
            if (
                n_read >= CACHED_FROM and not counts.skipped["image missing"]
            ):  # an index would hide images that come later
                save_cached(usable, vars(counts), self.data_path, "rows", **settings)
        self.keys, self.lengths = usable["key"], usable["length"]
        self.skipped, self.repaired, self.n_images = (
            Counter(counts.skipped),
            counts.repaired,
            counts.n_images,
        )

    def _check_rows(self) -> tuple[np.ndarray, RowCounts]:
        """(ROW[n], the place in the file and the estimated tokens of each usable row, counts). No image is decoded."""
        listed = list_images(self.rows)
        counts, keys, lengths = RowCounts(), array("q"), array("i")
        n_image_tokens = self.processor.config.n_image_tokens
        for key, n_bytes, row in self.rows.scan():
            try:
                _, n_images, surplus = check_row(self.rows, row, listed)
            except BadSampleError as error:
                counts.skipped[error.args[0]] += 1
                continue
            counts.repaired += surplus > 0
            counts.n_images += n_images
            keys.append(key)
            lengths.append(
                min(self.max_length, n_bytes // BYTES_PER_TOKEN + n_images * n_image_tokens)
            )
        if not keys:
            reasons = list_reasons(counts.skipped) or "it is empty"
            raise UserError(
                f"{self.data_path} has no usable row ({reasons}){self._hint(listed, counts.skipped)}"
            )
        usable = np.empty(len(keys), ROW)
        usable["key"], usable["length"] = keys, lengths
        return usable, counts

    def _hint(self, listed: set[str] | None, skipped: Counter[str]) -> str:
        if listed or not skipped["image missing"]:
            return ""
        if self.images_path is None:
            return "; no image folder is given: pass --images_path"
        return (
            f"; the image folder {self.images_path} is missing or empty: fetch it or its .zip, which need not be unpacked, "
            "or pass --images_path"
        )

    def read(self, index: int) -> tuple[dict, list[Path | io.BytesIO]]:
        """(row, its images as `load_image` takes them), not encoded: what evaluation needs."""
        row = self.rows.read(int(self.keys[index]))
        return row, self.rows.images(row)

    def __len__(self) -> int:
        return len(self.lengths)

    def read_text(self, index: int) -> tuple[dict[str, torch.Tensor], list]:
        """({input_ids, labels}, its images as `load_image` takes them), none opened."""
        row, images = self.read(index)
        return self.processor.encode_text(row["conversations"], images, self.max_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, images = self.read(index)
        return self.processor.encode(row["conversations"], images, self.max_length)
