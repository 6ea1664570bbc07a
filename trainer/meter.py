"""What a run does with its time, and whether its loss is still a number."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.errors import UserError
from trainer.collate import Batch
from trainer.runtime import Runtime

# Parts of a step.
PARTS = ("data", "vision", "forward", "backward", "optimizer")


class Meter:
    """Counts what this rank has seen since the last log line: images, tokens, seconds of each part.

    With `time_split` the parts are timed on a GPU too: the host then waits for it at each one.
    """

    def __init__(self, runtime: Runtime, time_split: bool = False):
        self.runtime = runtime
        self.times_parts = not runtime.is_gpu or time_split
        self.n_labels = 0  # of the whole run, on all ranks
        self.n_damaged = 0  # cache entries, not yet reported
        self._restart()

    def _restart(self) -> None:
        self.images, self.labels, self.tokens, self.padding = 0, 0, 0, 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.since = time.perf_counter()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of this block to `part`."""
        # Loading is work of the host: it is timed on a GPU too, without a wait.
        if part != "data" and not self.times_parts:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out: rates are those of training."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def _wait(self) -> None:
        if self.runtime.is_gpu and self.times_parts:
            torch.accelerator.synchronize(self.runtime.device)

    def add(self, micro_batches: list[Batch]) -> None:
        for batch in micro_batches:
            self.n_damaged += batch.n_damaged
            self.images += len(batch.keys)
            self.labels += batch.n_labels
            self.tokens += batch.input_ids.numel()
            self.padding += batch.n_padding

    def take_rates(self) -> dict[str, float]:
        """Totals of all ranks per second since the last call; this rank's share of time by part."""
        seconds = time.perf_counter() - self.since
        images, labels, tokens, padding = self.runtime.sum_over_ranks(
            self.images, self.labels, self.tokens, self.padding
        )
        self.n_labels += labels
        rates = {
            "images_per_second": images / seconds,
            "label_tokens_per_second": labels / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": padding / max(tokens, 1),
        }
        timed = [part for part in PARTS if part in self.seconds]
        rates |= {f"{part}_share": self.seconds[part] / seconds for part in timed}
        self._restart()
        return {name: round(rate, 4) for name, rate in rates.items()}


class LossWatch:
    """The losses of the last steps, left on the device until they are read.

    Reading makes the host wait for the device.
    """

    def __init__(self, data_path: list[str]):
        self.data_path = " ".join(data_path)
        self._unread: list[tuple[int, torch.Tensor, list[int]]] = []

    def add(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, micro_batches: list[Batch]
    ) -> None:
        samples = sorted(index for batch in micro_batches for index in batch.indices)
        self._unread.append((step, torch.stack((loss, grad_norm)), samples))

    def read(self) -> tuple[float, float]:
        """The newest loss and gradient norm.

        UserError that names step and rows of the first one that is not finite.
        """
        unread, self._unread = self._unread, []
        values = torch.stack([values for _, values, _ in unread]).tolist()
        for (step, _, samples), (loss, grad_norm) in zip(unread, values):
            for name, value in (("loss", loss), ("gradient's norm", grad_norm)):
                if not math.isfinite(value):
                    raise UserError(
                        f"the {name} is {value} at step {step}, samples {samples} of "
                        f"{self.data_path}: look at these rows, or lower --learning_rate"
                    )
        return loss, grad_norm
