"""The training loop of both stages."""

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from model.checkpoint import save_atomically, weights_path, weights_to_save
from model.errors import UserError, list_reasons
from model.model_vlm import MiniMindVLM
from trainer.batches import Batch, LengthBatches, make_loader
from trainer.log import RunLog
from trainer.runtime import Runtime


def train(model: MiniMindVLM, train_data: Dataset, val_data: Dataset | None, args, runtime: Runtime) -> None:
    """Train every parameter that requires a gradient; leave weights, log and curve in args.out_dir."""
    batches = LengthBatches(
        train_data.lengths, args.batch_size, args.accumulation_steps, runtime.rank, runtime.world_size, args.seed
    )
    total_steps = min(args.epochs * batches.steps, args.max_steps or math.inf)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.learning_rate, fused=runtime.device.type in ("cpu", "cuda"))
    network = DistributedDataParallel(model, broadcast_buffers=False) if runtime.world_size > 1 else model
    loader = make_loader(train_data, batches, count_workers(args.num_workers, runtime), runtime.device.type == "cuda")
    describe_run(args, train_data, learned, total_steps, runtime)

    out = weights_path(args.out_dir, args.save_name, args.dim)
    log = RunLog(out.with_suffix(".log.jsonl"), total_steps, args, runtime.is_main)
    meter = Meter()
    step = 0
    runtime.stop.listen()
    model.train()
    with failures_explained(args, out, log):
        for epoch, is_epoch_end, micro_batches in optimizer_steps(loader, batches, args, total_steps):
            rate = learning_rate(step, total_steps, args.learning_rate, args.warmup_iters)
            for group in optimizer.param_groups:
                group["lr"] = rate

            loss, n_labels, stop_requested = accumulate_gradients(network, micro_batches, runtime)
            if not math.isfinite(loss):
                samples = sorted(index for batch in micro_batches for index in batch.indices)
                raise UserError(
                    f"the loss is {loss} at step {step + 1}, samples {samples} of {args.data_path}: "
                    "look at these rows, or lower --learning_rate"
                )
            nn.utils.clip_grad_norm_(learned, args.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            step += 1
            meter.add(micro_batches, n_labels)
            log.step(loss)
            if step % args.log_interval == 0 or step == total_steps:
                log.train(step, epoch=epoch + 1, loss=loss, learning_rate=rate, **meter.rates())
            if stop_requested:
                break
            if val_data is not None and (is_epoch_end or step == total_steps):
                log.validation(step, validation_loss(model, val_data, args, runtime))
            if step % args.save_interval == 0 and step < total_steps:
                save(model, out, runtime)
        save(model, out, runtime)
        dtype = str(runtime.dtype).removeprefix("torch.")  # what --dtype came to on this device
        log.event("end", step=step, total_steps=total_steps, weights=str(out), skipped=dict(meter.skipped), dtype=dtype)
    report_end(out, step, total_steps, meter, runtime)


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int = 0) -> float:
    """The published schedule, lr/10 + lr/2 * (1 + cos(pi * step / total)), times a linear warm-up."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * (peak / 10 + peak / 2 * (1 + math.cos(math.pi * step / total_steps)))


def optimizer_steps(
    loader: DataLoader, batches: LengthBatches, args, total_steps: int
) -> Iterator[tuple[int, bool, list[Batch]]]:
    """(epoch, whether the epoch ends with it, its batches) of every optimizer step, `total_steps` in all."""
    steps_left = total_steps
    for epoch in range(args.epochs):
        batches.epoch = epoch
        iterator = iter(loader)
        for step in range(min(batches.steps, steps_left)):
            yield epoch, step == batches.steps - 1, list(itertools.islice(iterator, args.accumulation_steps))
        steps_left -= batches.steps


def accumulate_gradients(network: nn.Module, micro_batches: list[Batch], runtime: Runtime) -> tuple[float, int, bool]:
    """Add up the gradient of the mean loss over *all* label tokens of the step, on all ranks.

    Returns (that loss, its label tokens, whether any rank was asked to stop).
    """
    counts = [batch.n_labels for batch in micro_batches]
    n_labels, n_stops = runtime.sum_over_ranks(sum(counts), bool(runtime.stop.received))
    loss_sum = 0.0
    for index, (batch, count) in enumerate(zip(micro_batches, counts)):
        waits = isinstance(network, DistributedDataParallel) and index < len(micro_batches) - 1
        with network.no_sync() if waits else nullcontext():  # ranks exchange gradients once a step
            batch = batch.to(runtime.device)
            with runtime.autocast():
                loss = network(batch.input_ids, batch.pixel_values, batch.labels, return_logits=False).loss
            (loss * (count * runtime.world_size / max(n_labels, 1))).backward()  # DDP will divide by world_size
            loss_sum += loss.item() * count
    (loss_sum,) = runtime.sum_over_ranks(loss_sum)
    return loss_sum / max(n_labels, 1), int(n_labels), n_stops > 0


@torch.no_grad()
def validation_loss(model: MiniMindVLM, val_data: Dataset, args, runtime: Runtime) -> float:
    """Mean loss over all label tokens of `val_data`, shared out among the ranks."""
    model.eval()
    batches = LengthBatches(
        val_data.lengths, args.batch_size, rank=runtime.rank, world_size=runtime.world_size, shuffle=False
    )
    loss_sum, n_labels = 0.0, 0
    for batch in make_loader(val_data, batches, num_workers=0):
        batch, count = batch.to(runtime.device), batch.n_labels
        with runtime.autocast():
            loss = model(batch.input_ids, batch.pixel_values, batch.labels, return_logits=False).loss
        loss_sum, n_labels = loss_sum + loss.item() * count, n_labels + count
    loss_sum, n_labels = runtime.sum_over_ranks(loss_sum, n_labels)
    model.train()
    return loss_sum / max(n_labels, 1)


def save(model: MiniMindVLM, out: Path, runtime: Runtime) -> None:
    if runtime.is_main:
        save_atomically(weights_to_save(model), out)


class Meter:
    """Counts what this rank has seen: images, label tokens of all ranks, samples left out."""

    def __init__(self):
        self.skipped: Counter[str] = Counter()
        self._restart()

    def _restart(self) -> None:
        self.images, self.labels, self.since = 0, 0, time.perf_counter()

    def add(self, micro_batches: list[Batch], n_labels: int) -> None:
        for batch in micro_batches:
            self.skipped.update(batch.skipped)
            self.images += 0 if batch.pixel_values is None else len(batch.pixel_values)
        self.labels += n_labels

    def rates(self) -> dict[str, float]:
        """Means since the last call."""
        seconds = time.perf_counter() - self.since
        rates = {"images_per_second": self.images / seconds, "label_tokens_per_second": self.labels / seconds}
        self._restart()
        return {name: round(rate, 2) for name, rate in rates.items()}


def count_workers(asked: int | None, runtime: Runtime) -> int:
    """Loader processes: what was asked for; else 8 beside a GPU, none where training needs the cores itself."""
    if asked is not None:
        return asked
    return min(8, os.cpu_count() or 1) if runtime.device.type == "cuda" else 0


def describe_run(args, train_data: Dataset, learned: list[nn.Parameter], total_steps: int, runtime: Runtime) -> None:
    effective = args.batch_size * args.accumulation_steps * runtime.world_size
    runtime.say(
        f"learned: {sum(parameter.numel() for parameter in learned):,} parameters\n"
        f"data: {len(train_data):,} rows of {args.data_path}\n"
        f"steps: {total_steps:,} of {effective} samples ({args.batch_size} x {args.accumulation_steps} accumulation "
        f"x {runtime.world_size} devices), {args.epochs} epochs"
    )
    left_out = getattr(train_data, "skipped", None)
    if left_out:
        runtime.say(f"left out: {list_reasons(left_out)}")
    if getattr(train_data, "repaired", 0):
        runtime.say(f"repaired: {train_data.repaired} rows had more <image> than images; the surplus is dropped")


@contextmanager
def failures_explained(args, out: Path, log: RunLog):
    """Close the log whatever happens; where a run fails, name the last weights, and the flag to lower if memory ran out."""
    try:
        yield
    except Exception as error:
        saved = f"; the last saved weights are intact: {out}" if out.is_file() else ""
        if isinstance(error, UserError):
            raise UserError(f"{error}{saved}") from error
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            raise UserError(
                f"a batch does not fit in memory: lower --batch_size (now {args.batch_size}) and raise --accumulation_steps "
                f"(now {args.accumulation_steps}) as much, or lower --max_seq_len (now {args.max_seq_len}){saved}"
            ) from error
        raise
    finally:
        log.close()


def report_end(out: Path, step: int, total_steps: int, meter: Meter, runtime: Runtime) -> None:
    if meter.skipped:
        runtime.say(f"skipped while training: {list_reasons(meter.skipped)}")
    if step < total_steps:
        runtime.say(f"stopped by {runtime.stop.received or 'another rank'} after step {step} of {total_steps}")
    runtime.say(f"weights: {out}\ncurve: {out.with_suffix('.png')}\nlog: {out.with_suffix('.log.jsonl')}")
