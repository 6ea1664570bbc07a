"""Several data files as one set, each as often as its weight says: `--data a.jsonl:2 b.parquet`."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import MissingFileError, UserError
from dataset.rows import find_data_files

# Imported where they are used: `find_sources` names a missing file before torch is there.
if TYPE_CHECKING:
    import torch

    from dataset.formats import Row
    from dataset.vlm_dataset import VLMDataset
    from model.processing import VLMProcessor

# A larger weight is a slip of the finger.
MAX_WEIGHT = 100


class Source(NamedTuple):
    """One data file.

    Args:
        path: of a data file, or of a folder that is one, see `find_data_files`.
        images: folder or .zip of its pictures; None if there is none.
        weight: how often each of its rows comes in an epoch.
    """

    path: str
    images: str | None
    weight: Fraction


class MixedDataset:
    """The rows of several VLMDatasets, with the same attributes and methods as one of them.

    With weight 2 each row comes twice an epoch; with 0.5 every second one comes once, the same
    in each epoch; `n_images` and `text_only` are weighed alike. The training loop shuffles them
    all together. Memory: 6 bytes a row.

    Args:
        parts: datasets with the same processor and max_length.
        weights: one for each.
    """

    def __init__(self, parts: list[VLMDataset], weights: list[Fraction]):
        self.parts = parts
        rows = [repeat_rows(len(part), weight) for part, weight in zip(parts, weights)]
        n_rows = [len(part_rows) for part_rows in rows]
        # Index i is row `row[i]` of the part `part[i]`.
        self.row = np.concatenate(rows).astype(np.int32)
        self.part = np.repeat(np.arange(len(parts), dtype=np.int16), n_rows)
        self.lengths = np.concatenate([part.lengths[chosen] for part, chosen in zip(parts, rows)])
        self.skipped = sum((part.skipped for part in parts), Counter())
        self.repaired = sum((part.repaired for part in parts), Counter())
        # About so many, since rows are chosen by their number; a few images never become none.
        pairs = list(zip(parts, weights))
        self.n_images = sum(math.ceil(part.n_images * weight) for part, weight in pairs)
        self.text_only = sum(math.floor(part.text_only * weight) for part, weight in pairs)
        # One picture may be in several parts.
        self.pictures = np.unique(np.concatenate([part.pictures for part in parts]))
        self.n_pictures = len(self.pictures)
        self.formats = list(dict.fromkeys(name for part in parts for name in part.formats))
        self.processor, self.max_length = parts[0].processor, parts[0].max_length

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.parts[self.part[index]][self.row[index]]

    def read(self, index: int) -> tuple[Row, list]:
        """See VLMDataset.read."""
        return self.parts[self.part[index]].read(self.row[index])

    def read_text(self, index: int) -> tuple[dict[str, torch.Tensor], list]:
        """See VLMDataset.read_text."""
        return self.parts[self.part[index]].read_text(self.row[index])


def repeat_rows(n_rows: int, weight: Fraction) -> np.ndarray:
    """int64[about weight * n_rows]: the numbers of rows that come in an epoch.

    Every row comes as often as the whole part of `weight` says, and evenly spaced ones once more
    for the rest: those where the running sum of the rest reaches the next whole number.
    """
    whole, rest = divmod(weight, 1)
    numbers = np.arange(n_rows)
    sum_before = numbers * rest.numerator // rest.denominator
    sum_after = (numbers + 1) * rest.numerator // rest.denominator
    return np.concatenate([np.tile(numbers, int(whole)), numbers[sum_after > sum_before]])


def open_train_and_val(
    config, processor: VLMProcessor
) -> tuple[VLMDataset | MixedDataset, VLMDataset | MixedDataset | None]:
    """(training set, validation set or None) of a run; `config` is a TrainConfig."""
    length = config.max_seq_len
    train_data = open_data(config.data_path, config.images_path, processor, length)
    if not config.val_data:
        return train_data, None
    val_images = config.val_images or config.images_path
    return train_data, open_data(config.val_data, val_images, processor, length)


def check_sources(config) -> None:
    """MissingFileError where a file of a run's training or validation set is missing."""
    find_sources(config.data_path, config.images_path)
    if config.val_data:
        find_sources(config.val_data, config.val_images or config.images_path)


def open_data(
    data: list[str], images: list[str] | None, processor: VLMProcessor, max_length: int
) -> VLMDataset | MixedDataset:
    """The dataset that `--data` and `--images` describe.

    Args:
        data: files, folders, or patterns such as "part-*.parquet", each with ":WEIGHT" behind it
            if wanted.
        images: one folder or .zip for all of them, or one for each.
        processor: encodes the rows.
        max_length: most tokens of a sample; longer ones are cut.

    MissingFileError where a file is missing, UserError where nothing can be used.
    """
    from dataset.vlm_dataset import VLMDataset

    sources = find_sources(data, images)
    parts = [VLMDataset(source.path, source.images, processor, max_length) for source in sources]
    if len(parts) == 1 and sources[0].weight == 1:
        return parts[0]
    mixed = MixedDataset(parts, [source.weight for source in sources])
    if not len(mixed):
        raise UserError(f"--data {' '.join(data)} leaves no row: raise a weight")
    return mixed


def find_sources(data: list[str], images: list[str] | None) -> list[Source]:
    """One Source for each file that `data` names, or whose name fits a pattern in it, in order.

    Args:
        data: files, folders, or patterns such as "part-*.parquet", each with ":WEIGHT" behind it
            if wanted.
        images: one folder or .zip for all of them, or one for each.

    MissingFileError where a file is missing, UserError for other mistakes.
    """
    # one folder for each entry of --data
    folders = list(images or [None])
    if len(folders) not in (1, len(data)):
        raise UserError(
            f"--images gives {len(folders)} folders for {len(data)} entries of --data: "
            "give one for all, or one for each"
        )
    if len(folders) == 1:
        folders *= len(data)

    # one source for each file of an entry
    sources = []
    for entry, folder in zip(data, folders):
        pattern, weight = split_weight(entry)
        is_pattern = glob.has_magic(pattern) and not Path(pattern).exists()
        paths = sorted(glob.glob(pattern)) if is_pattern else [pattern]
        if not paths:
            raise MissingFileError(f"no data fits {pattern}: correct the pattern of --data")
        files = (str(file) for path in paths for file in find_data_files(path))
        sources += [Source(file, folder, weight) for file in files]
    return sources


def split_weight(entry: str) -> tuple[str, Fraction]:
    """("a.jsonl", 2) of "a.jsonl:2"; weight 1 if none is given."""
    # A file's own name may end like a weight.
    match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?|\.\d+)", entry)
    if not match or Path(entry).exists():
        return entry, Fraction(1)
    weight = Fraction(match[2])
    if not 0 < weight <= MAX_WEIGHT:
        raise UserError(f"--data {entry}: a weight has to be above 0 and at most {MAX_WEIGHT}")
    # Times a number of rows, a fraction of many digits would not fit into 64 bits.
    return match[1], weight.limit_denominator(10**6)
