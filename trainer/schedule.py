"""How long a run is, and the learning rate at each of its steps."""

import math

from trainer.config import TrainConfig
from trainer.sampler import StepSampler


class Schedule:
    """Made when a run starts or resumes, with the sampler at the position where that is."""

    def __init__(self, config: TrainConfig, sampler: StepSampler, steps_done: int):
        self.base, self.warmup_iters = config.learning_rate, config.warmup_iters
        self.total_steps = count_steps(config, sampler, steps_done)
        self.steps_left = self.total_steps - steps_done
        # The last step of an epoch may be short.
        all_samples = config.epochs * len(sampler.lengths)
        planned = sampler.samples_done + self.steps_left * sampler.step_size
        self.total_samples = min(all_samples, planned)

    def learning_rate(self, samples_done: int, steps_done: int) -> float:
        """Of the next step. It follows samples, so that a resumed run may change its batch size."""
        factor = min(1.0, (steps_done + 1) / self.warmup_iters) if self.warmup_iters else 1.0
        return factor * cosine(samples_done, self.total_samples, self.base)


def cosine(done: float, total: float, base: float) -> float:
    """The published schedule: base/10 + base/2 * (1 + cos(pi * done / total))."""
    return base / 10 + base / 2 * (1 + math.cos(math.pi * done / total))


def count_steps(config: TrainConfig, sampler: StepSampler, steps_done: int) -> int:
    """Optimizer steps of the whole run, those before a resume included."""
    full_epoch = -(-len(sampler.lengths) // sampler.step_size)
    epochs_left = max(0, config.epochs - sampler.epoch - 1)
    total = steps_done + sampler.steps_left + epochs_left * full_epoch
    return max(steps_done, min(total, config.max_steps or total))
