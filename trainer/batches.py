"""Which samples come together, and how they become tensors."""

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from model.errors import BadSampleError
from model.processing import IGNORE_INDEX, count_labels

# Optimizer steps whose samples are sorted by length together: enough to pad little, too few to order an epoch.
POOL = 64


class LengthBatches(Sampler[list[int]]):
    """Shuffled batches of similar length, the same samples in each optimizer step however the step is cut up.

    An optimizer step takes world_size * accumulation_steps * batch_size samples; which ones depends on seed and epoch
    only. Each rank yields its accumulation_steps batches of every step; no sample is left out or repeated. In the last
    step, batches may be short or empty.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, accumulation_steps: int = 1,
        rank: int = 0, world_size: int = 1, seed: int = 0, shuffle: bool = True,
    ):  # fmt: skip
        self.lengths, self.batch_size, self.accumulation_steps = lengths, batch_size, accumulation_steps
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.epoch = 0

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.lengths) // (self.batch_size * self.accumulation_steps * self.world_size))

    def __len__(self) -> int:
        return self.steps * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        n_batches = self.accumulation_steps * self.world_size
        for step in self._steps():
            parts = [step[i * self.batch_size : (i + 1) * self.batch_size] for i in range(n_batches)]
            if len(step) < n_batches * self.batch_size:
                parts = [part.tolist() for part in np.array_split(np.array(step, dtype=np.int64), n_batches)]
            yield from parts[self.rank :: self.world_size]

    def _steps(self) -> list[list[int]]:
        """Indices of the samples of every optimizer step of this epoch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        step_size = self.batch_size * self.accumulation_steps * self.world_size
        steps = []
        for start in range(0, len(order), POOL * step_size):
            pool = order[start : start + POOL * step_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            steps += [pool[i : i + step_size].tolist() for i in range(0, len(pool), step_size)]
        if self.shuffle:
            last = steps.pop() if len(order) % step_size else None  # the short step stays last
            steps = [steps[i] for i in rng.permutation(len(steps))] + ([last] if last else [])
        return steps


@dataclass
class Batch:
    """Samples padded on the right to the longest of them."""

    input_ids: torch.Tensor  # int64[B, T]
    labels: torch.Tensor  # int64[B, T]
    pixel_values: torch.Tensor | None  # float[k, 3, H, W], or None without images
    indices: list[int]  # which samples these are
    skipped: Counter = field(default_factory=Counter)  # samples left out, by reason

    @property
    def n_labels(self) -> int:
        """Label tokens that the loss is a mean over."""
        return count_labels(self.labels)

    def to(self, device: torch.device) -> "Batch":
        pixel_values = None if self.pixel_values is None else self.pixel_values.to(device, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            pixel_values=pixel_values,
        )


class SafeDataset(Dataset):
    """A dataset whose bad samples come out as (index, reason) in place of stopping the run."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, dict | str]:
        try:
            return index, self.dataset[index]
        except BadSampleError as error:
            return index, error.args[0]


def collate(samples: list[tuple[int, dict | str]]) -> Batch:
    """Pad and join; without a single good sample, a blank row that has no label and so teaches nothing."""
    skipped = Counter(sample for _, sample in samples if isinstance(sample, str))
    good = [(index, sample) for index, sample in samples if not isinstance(sample, str)]
    if not good:
        blank = torch.zeros(1, 2, dtype=torch.long)
        return Batch(blank, torch.full_like(blank, IGNORE_INDEX), None, [], skipped)
    pad = torch.nn.utils.rnn.pad_sequence
    images = torch.cat([sample["pixel_values"] for _, sample in good])
    return Batch(
        input_ids=pad([sample["input_ids"] for _, sample in good], batch_first=True, padding_value=0),
        labels=pad([sample["labels"] for _, sample in good], batch_first=True, padding_value=IGNORE_INDEX),
        pixel_values=images if len(images) else None,
        indices=[index for index, _ in good],
        skipped=skipped,
    )


def make_loader(dataset: Dataset, batches: LengthBatches, num_workers: int, pin_memory: bool = False) -> DataLoader:
    return DataLoader(
        SafeDataset(dataset),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_main,
    )


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the loader's workers go on until the main process has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
