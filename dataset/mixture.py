"""Several data files as one set, each as often as its weight says: `--data a.jsonl:2 b.parquet`."""

import glob
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import MissingFileError, UserError
from dataset.vlm_dataset import VLMDataset
from model.processing import VLMProcessor

MOST_REPEATS = 100  # a larger weight is a slip of the finger


class Source(NamedTuple):
    path: str
    images: str | None
    weight: Fraction  # how often each of its rows comes in an epoch


class MixedDataset(Dataset):
    """The rows of several VLMDatasets. With weight 2 each row comes twice an epoch, with 0.5 every second one comes once (the
    same in each epoch); the training loop shuffles them all together. Two numbers a row are kept, 6 bytes."""

    def __init__(self, parts: list[VLMDataset], weights: list[Fraction]):
        self.parts = parts
        rows = [repeat_rows(len(part), weight) for part, weight in zip(parts, weights)]
        self.row = np.concatenate(rows).astype(np.int32)
        self.part = np.repeat(np.arange(len(parts), dtype=np.int16), [len(one) for one in rows])
        self.lengths = np.concatenate([part.lengths[one] for part, one in zip(parts, rows)])
        self.skipped = sum((part.skipped for part in parts), Counter())
        self.repaired, self.n_images = (
            sum(part.repaired for part in parts),
            sum(part.n_images for part in parts),
        )
        self.processor, self.max_length = parts[0].processor, parts[0].max_length

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.parts[self.part[index]][self.row[index]]

    def read(self, index: int) -> tuple[dict, list]:
        """See VLMDataset.read."""
        return self.parts[self.part[index]].read(self.row[index])

    def read_text(self, index: int) -> tuple[dict[str, torch.Tensor], list]:
        """See VLMDataset.read_text."""
        return self.parts[self.part[index]].read_text(self.row[index])


def repeat_rows(n_rows: int, weight: Fraction) -> np.ndarray:
    """int64[about weight * n_rows]: every row, as often as the weight's whole part says, and evenly spaced ones for the rest."""
    whole, rest = divmod(weight, 1)
    numbers = np.arange(n_rows)
    extra = (
        numbers + 1
    ) * rest.numerator // rest.denominator > numbers * rest.numerator // rest.denominator
    return np.concatenate([np.tile(numbers, int(whole)), numbers[extra]])


def open_data(
    data: list[str], images: list[str] | None, processor: VLMProcessor, max_length: int
) -> VLMDataset | MixedDataset:
    """The set that `--data` and `--images` describe: files or patterns such as "part-*.parquet", each with ":WEIGHT" behind it
    where wanted; one image folder or .zip for all, or one for each. UserError where nothing fits."""
    sources = find_sources(data, images)
    parts = [VLMDataset(source.path, source.images, processor, max_length) for source in sources]
    if len(parts) == 1 and sources[0].weight == 1:
        return parts[0]
    mixed = MixedDataset(parts, [source.weight for source in sources])
    if not len(mixed):
        raise UserError(f"--data {' '.join(data)} leaves no row: raise a weight")
    return mixed


def find_sources(data: list[str], images: list[str] | None) -> list[Source]:
    """One Source for each file that `data` names or whose name fits a pattern, in order."""
    images = list(images or [None])
    if len(images) not in (1, len(data)):
        raise UserError(
            f"--images gives {len(images)} folders for {len(data)} entries of --data: give one for all, or one for each"
        )
    sources = []
    for entry, folder in zip(data, images * len(data) if len(images) == 1 else images):
        pattern, weight = split_weight(entry)
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not paths and glob.has_magic(pattern):
            raise MissingFileError(f"no data fits {pattern}: correct the pattern of --data")
        sources += [Source(path, folder, weight) for path in paths or [pattern]]
    return sources


def split_weight(entry: str) -> tuple[str, Fraction]:
    """("a.jsonl", 2) of "a.jsonl:2"; weight 1 where none is given."""
    match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?|\.\d+)", entry)
    if not match or Path(entry).is_file():
        return entry, Fraction(1)
    weight = Fraction(match[2])
    if not 0 < weight <= MOST_REPEATS:
        raise UserError(f"--data {entry}: a weight has to be above 0 and at most {MOST_REPEATS}")
    return match[1], weight
