"""Which samples come together in a batch, an optimizer step, an epoch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Batches of sample indices; the same samples in each optimizer step however it is cut up.

    An optimizer step takes world_size * accumulation_steps * batch_size samples. Which ones depends
    on seed and epoch alone. Each rank gets its accumulation_steps batches of every step; no sample
    is left out or repeated. In the last step of an epoch, batches may be short or empty.

    Steps are random. Within a step, samples are sorted by length, so that the batches of a step
    have little padding and no rank waits long for another. Sorting over many steps would save more
    padding, but batches of samples that are alike teach less (dev/LOG.md, 2026-11-24).

    `epoch` and `samples_taken` are the position in the data: a run may continue from there with
    another step size.

    Args:
        lengths: int[n], estimated tokens of each sample.
        batch_size: samples in a batch, on each rank.
        accumulation_steps: batches of a step, on each rank.
        rank, world_size: which process this is, of how many.
        seed: of the order.
        shuffle: False takes the samples by length, for validation.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        self.lengths, self.seed, self.shuffle = lengths, seed, shuffle
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.samples_taken = 0  # in this epoch, on all ranks

    @property
    def step_size(self) -> int:
        """Samples of an optimizer step, on all ranks."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_left(self) -> int:
        """Optimizer steps until the epoch ends."""
        return -(-(len(self.lengths) - self.samples_taken) // self.step_size)

    @property
    def samples_done(self) -> int:
        """Samples of all epochs so far."""
        return self.epoch * len(self.lengths) + self.samples_taken

    def advance(self) -> None:
        """An optimizer step is done."""
        self.samples_taken = min(len(self.lengths), self.samples_taken + self.step_size)

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.samples_taken = epoch, 0

    def __len__(self) -> int:
        return self.steps_left * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.shuffle:
            order = rng.permutation(len(self.lengths))
        else:
            order = np.argsort(self.lengths, kind="stable")
        for start in range(self.samples_taken, len(order), self.step_size):
            step = order[start : start + self.step_size]
            step = step[np.argsort(self.lengths[step], kind="stable")]
            batches = np.array_split(step, self.accumulation_steps * self.world_size)
            yield from (batch.tolist() for batch in batches[self.rank :: self.world_size])
