"""Which samples come together."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StepBatches(Sampler[list[int]]):
    """Shuffled batches (by length where nothing is learned), the same samples in each optimizer step however it is cut up.

    An optimizer step takes world_size * accumulation_steps * batch_size samples; which ones depends on seed and epoch
    only. Each rank yields its accumulation_steps batches of every step; no sample is left out or repeated. In the last
    step, batches may be short or empty. Steps are random; within a step, samples are sorted by length, so that batches of one
    step pad little and ranks wait little for each other. (Sorting over many steps would pad less, but batches of samples that are
    alike teach less: dev/LOG.md, 2026-11-24.)

    `epoch` and `samples_taken` are the position in the data: a run may go on from there with another number of samples in a step.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, accumulation_steps: int = 1,
        rank: int = 0, world_size: int = 1, seed: int = 0, shuffle: bool = True,
    ):  # fmt: skip
        self.lengths, self.batch_size, self.accumulation_steps = (
            lengths,
            batch_size,
            accumulation_steps,
        )
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.epoch = 0
        self.samples_taken = 0  # in this epoch, over all ranks

    @property
    def step_size(self) -> int:
        """Samples of an optimizer step, over all ranks."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_left(self) -> int:
        """Optimizer steps until the epoch ends."""
        return -(-(len(self.lengths) - self.samples_taken) // self.step_size)

    @property
    def samples_done(self) -> int:
        """Samples done over all epochs."""
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
        order = (
            rng.permutation(len(self.lengths))
            if self.shuffle
            else np.argsort(self.lengths, kind="stable")
        )
        for start in range(self.samples_taken, len(order), self.step_size):
            step = order[start : start + self.step_size]
            step = step[np.argsort(self.lengths[step], kind="stable")]
            parts = np.array_split(step, self.accumulation_steps * self.world_size)
            yield from (part.tolist() for part in parts[self.rank :: self.world_size])
