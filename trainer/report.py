"""What a run says: at its start, at its log lines, when it fails, and at its end."""

import errno
import signal
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError, is_memory_full, list_reasons
from trainer.advice import write_ask_command
from trainer.collate import Batch
from trainer.config import TrainConfig
from trainer.feature_cache import FeatureCache
from trainer.meter import LossWatch, Meter
from trainer.run_log import RunLog
from trainer.run_state import RunState
from trainer.runtime import Runtime
from trainer.skipped import SkippedRows

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What DataLoader says -> what that means.
LOADER_ERRORS = {
    "Bus error": (
        "a process that reads data found /dev/shm full: give it more room (docker run --shm-size), "
        "or lower --num_workers"
    ),
    "DataLoader worker": (
        "a process that reads data died ({error}): lower --num_workers or free some memory"
    ),
}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    weights: Path
    step: int  # optimizer steps done
    total_steps: int
    val_loss: float | None  # None without validation
    stopped_by: int | None  # the signal, if there was one

    @property
    def exit_status(self) -> int:
        """0, or 128 + signal, so that `train && eval` does not continue after a stopped run."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


def describe_run(
    config: TrainConfig,
    train_data,
    trainable: list[nn.Parameter],
    state: RunState,
    total_steps: int,
) -> None:
    """Print the options of a run, and what it is going to do."""
    runtime, sampler = state.runtime, state.sampler
    values = {name: value for name, value in asdict(config).items() if value not in (None, [])}
    options = ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in values.items()
    )
    runtime.print(textwrap.fill(f"config: {options}", 100, subsequent_indent="  "))
    source = f" of {' '.join(config.data_path)}" if config.data_path else ""
    text_only = train_data.text_only
    source += f", {text_only:,} of them text only" if text_only else ""
    epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
    runtime.print(
        f"trainable: {sum(parameter.numel() for parameter in trainable):,} parameters\n"
        f"data: {len(train_data):,} rows{source}\n"
        f"format: {', '.join(train_data.formats)}\n"
        f"steps: {total_steps:,} of {sampler.step_size} samples ({sampler.batch_size} x "
        f"{sampler.accumulation_steps} accumulation x {runtime.world_size} devices), {epochs}"
    )
    if train_data.skipped:
        runtime.print(f"left out: {list_reasons(train_data.skipped)}")
    if train_data.repaired:
        runtime.print(f"repaired: {list_reasons(train_data.repaired)}")


class Report:
    """Follows a run: log, progress bar, rates, and how it ends.

    Args:
        config: of the run.
        state: of the run, started.
        total_steps: optimizer steps of the whole run.
        train_data: what it learns from.
        cache: of image features, if there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: RunState,
        total_steps: int,
        train_data,
        cache: FeatureCache | None,
    ):
        self.config, self.state, self.cache = config, state, cache
        self.has_images = train_data.n_images > 0
        self.runtime: Runtime = state.runtime
        self.first_step, self.total_steps = state.progress.step, total_steps
        self.meter = Meter(self.runtime, config.time_split)
        self.skipped = SkippedRows(self.runtime, len(train_data))
        self.losses = LossWatch(config.data_path)
        self.log = RunLog(state.paths, self.first_step, total_steps, config, self.runtime.is_main)
        self._said_closed = False

    def add_step(
        self, loss: torch.Tensor, grad_norm: torch.Tensor, micro_batches: list[Batch]
    ) -> None:
        """Count an optimizer step; nothing is read from the device."""
        self.meter.add(micro_batches)
        self.skipped.add(self.state.sampler.epoch, micro_batches)
        self.losses.add(self.state.progress.step, loss, grad_norm, micro_batches)
        self.log.advance()

    def read_losses(self) -> tuple[float, float]:
        """The newest loss and gradient norm, see LossWatch."""
        loss, grad_norm = self.losses.read()
        self.log.show(loss, self.skipped.reasons.total())
        return loss, grad_norm

    def log_step(self, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Write a line of the log.

        UserError where most rows of an epoch cannot be used, or none of a whole run.
        """
        step, rates = self.state.progress.step, self.meter.take_rates()
        for line in self.skipped.share():
            self.log.print(line)
        if step == self.total_steps and not self.meter.n_labels:
            reasons = list_reasons(self.skipped.reasons)
            raise UserError(
                f"no row of all {step - self.first_step} steps could be used ({reasons}): "
                "python -m dataset.preview shows what is wrong with them"
            )
        self.log.train(
            step,
            epoch=self.state.sampler.epoch + 1,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=self.skipped.reasons.total(),
            **rates,
        )
        self._mention_cache()

    def _mention_cache(self) -> None:
        """Say once why the feature cache stores no more, and each time that slots are damaged."""
        if self.cache and self.cache.closed_reason and not self._said_closed:
            self._said_closed = True
            self.log.print(
                f"feature cache: it stores no more, {self.cache.closed_reason}; other images go "
                "through the vision encoder in each epoch"
            )
        if self.meter.n_damaged:
            self.log.print(
                f"feature cache: {self.meter.n_damaged} damaged entries; their images are encoded "
                "again"
            )
            self.meter.n_damaged = 0

    @contextmanager
    def following(self) -> Iterator[None]:
        """Close the log whatever happens; where a run fails, say in one line why."""
        try:
            yield
        except Exception as error:
            raise self._explain(error) from error
        finally:
            self.log.close()
            self.state.close()

    def _explain(self, error: Exception) -> Exception:
        """A UserError that says what to do and which run state is safe; others as they are."""
        saved = self.state.describe_newest()
        if isinstance(error, UserError):
            return UserError(f"{error}{saved}")

        # memory and disk
        if is_memory_full(error):
            sampler = self.state.sampler
            return UserError(
                f"a batch does not fit in memory: lower --batch_size (now {sampler.batch_size}) "
                f"and raise --accumulation_steps (now {sampler.accumulation_steps}) as much, or "
                f"lower --max_seq_len (now {self.config.max_seq_len}){saved}"
            )
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return UserError(f"a file cannot be written ({error}): free some space{saved}")

        # loader processes
        for sign, reason in LOADER_ERRORS.items():
            if sign in str(error):
                first_line = str(error).splitlines()[0]
                return UserError(reason.format(error=first_line) + saved)
        return error

    def describe_abort(self, number: int) -> str:
        """What is said where a run ends at once, without saving; only in the main process."""
        if not self.runtime.is_main:
            return ""
        saved = self.state.describe_newest() or "; nothing is saved yet"
        return f"stopped by {signal.Signals(number).name} in the middle of a step{saved}"

    def write_end(self) -> None:
        """The last line of the log."""
        # A run that was stopped has steps since its last log line.
        self.skipped.share()
        self.log.event(
            "end",
            step=self.state.progress.step,
            total_steps=self.total_steps,
            weights=str(self.state.paths.weights),
            skipped=dict(self.skipped.reasons),
            dtype=self.runtime.dtype_name,
            peak_memory_bytes=self.runtime.peak_memory(),
        )

    def end(self, is_stopped: bool, data) -> TrainResult:
        """Print how the run ended and what it left; the one place where a run ends.

        The model can be asked about pictures of `data`, which are new to it if that is the
        validation set.
        """
        step, paths = self.state.progress.step, self.state.paths
        is_stopped = is_stopped and step < self.total_steps
        number = self.runtime.stop.number if is_stopped else None
        if self.skipped.reasons:
            self.runtime.print(f"skipped while training: {list_reasons(self.skipped.reasons)}")
        if self.first_step == self.total_steps:
            self.runtime.print(
                f"nothing is left to do: all {self.total_steps} steps were done before"
            )
        elif is_stopped:
            self.runtime.print(
                f"stopped by {signal.Signals(number).name} after step {step} of "
                f"{self.total_steps}; the same command with --resume continues"
            )
        self.runtime.print(f"weights: {paths.weights}\ncurve: {paths.curve}\nlog: {paths.log}")
        if self.has_images:
            is_best_there = self.state.progress.val_loss is not None and paths.best.is_file()
            asked = paths.best if is_best_there else paths.weights
            self.runtime.print(f"ask it: {write_ask_command(asked, data)}")
        self.runtime.close()
        return TrainResult(
            paths.weights, step, self.total_steps, self.state.progress.val_loss, number
        )
