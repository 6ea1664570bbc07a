"""The training loop of both stages."""

import errno
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError, list_reasons
from model.model_vlm import MiniMindVLM
from trainer.auto_batch import fit_batch_size
from trainer.collate import Batch, make_loader
from trainer.feature_cache import open_cache
from trainer.image_encoder import ImageEncoder
from trainer.meter import LossWatch, Meter
from trainer.run_log import RunLog
from trainer.run_state import Checkpoints, Progress
from trainer.runtime import Runtime
from trainer.sampler import StepBatches

SAVE_SECONDS = 60  # between saves, where --save_interval is not given
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def train(
    model: MiniMindVLM, train_data: Dataset, val_data: Dataset | None, args, runtime: Runtime
) -> None:
    """Train every parameter that requires a gradient; leave weights, log and curve in args.out_dir."""
    if args.batch_size == "auto":
        fit_batch_size(model, train_data, args, runtime)
    batches = StepBatches(
        train_data.lengths,
        args.batch_size,
        args.accumulation_steps,
        runtime.rank,
        runtime.world_size,
        args.seed,
    )
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=args.learning_rate, fused=runtime.device.type in ("cpu", "cuda")
    )
    checkpoints = Checkpoints(model, optimizer, batches, args, runtime)
    progress = checkpoints.resume()
    first_step, total_steps = progress.step, count_steps(progress, batches, args)
    total_samples = min(
        args.epochs * len(train_data),
        batches.samples_done + (total_steps - first_step) * batches.step_size,
    )
    describe_run(args, train_data, learned, total_steps, runtime)
    cache = open_cache(
        args, model, train_data.processor.image_processor, train_data.n_images, runtime
    )
    images = ImageEncoder(
        model.vision_encoder, train_data.processor.image_processor, cache, runtime
    )
    network = (
        DistributedDataParallel(model, forward_sync_buffers=False)
        if runtime.world_size > 1
        else model
    )
    loader = make_loader(
        train_data,
        batches,
        count_workers(args.num_workers, runtime),
        images.find_features,
        runtime.device.type == "cuda",
    )

    out = checkpoints.weights
    log = RunLog(out.with_suffix(".log.jsonl"), progress.step, total_steps, args, runtime.is_main)
    meter, losses = Meter(runtime, args.time_split), LossWatch(" ".join(args.data_path))
    stop_requested = False
    saved_at = time.monotonic()
    runtime.stop.listen()
    model.train()
    with failures_explained(args, checkpoints, log):
        steps = optimizer_steps(loader, batches, args, meter)
        for micro_batches in itertools.islice(steps, total_steps - first_step):
            torch.manual_seed(
                args.seed + runtime.rank + runtime.world_size * progress.step
            )  # for dropout
            rate = learning_rate(batches.samples_done, total_samples, args.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate * warm_up(progress.step, args.warmup_iters)

            loss = accumulate_gradients(network, images, micro_batches, meter, runtime)
            with meter.timed("optimizer"):
                grad_norm = nn.utils.clip_grad_norm_(learned, args.grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            batches.advance()
            progress.step += 1
            meter.add(micro_batches)
            losses.add(progress.step, loss, grad_norm, micro_batches)
            log.step()

            is_end = progress.step == total_steps
            is_log_due = is_end or progress.step % args.log_interval == 0
            is_save_due = is_end or (args.save_interval and progress.step % args.save_interval == 0)
            is_validation_due = val_data is not None and (
                is_end
                or batches.steps_left == 0
                or (args.val_interval and progress.step % args.val_interval == 0)
            )
            if not (
                is_log_due
                or is_save_due
                or is_validation_due
                or runtime.reads_every_step(progress.step)
            ):
                continue  # a GPU is not kept waiting
            loss, grad_norm = losses.read()
            log.show_loss(loss)
            stop_requested = runtime.any_rank(runtime.stop.is_requested)
            if is_log_due:
                rates = meter.rates(runtime)
                if is_end and not meter.n_learned:
                    raise UserError(
                        f"no row of all {progress.step - first_step} steps could be used ({list_reasons(meter.skipped)}): "
                        "python -m dataset.preview shows what is wrong with them"
                    )
                log.train(
                    progress.step, epoch=batches.epoch + 1, loss=loss, grad_norm=grad_norm, learning_rate=rate,
                    **rates,
                )  # fmt: skip
            if is_validation_due and not stop_requested:
                validate(model, images, val_data, progress, checkpoints, log, args, runtime)
            if not args.save_interval and time.monotonic() > saved_at + SAVE_SECONDS:
                is_save_due = True
            if is_save_due or stop_requested:
                checkpoints.save(progress)
                saved_at = time.monotonic()
            if is_end or stop_requested:
                break
        images.close()
        dtype = str(runtime.dtype).removeprefix("torch.")  # what --dtype came to on this device
        log.event(
            "end",
            step=progress.step,
            total_steps=total_steps,
            weights=str(out),
            skipped=dict(meter.skipped),
            dtype=dtype,
            peak_memory_bytes=runtime.peak_memory(),
        )
    report_end(checkpoints, progress, first_step, total_steps, meter, runtime)
    if progress.step < total_steps:
        runtime.close()
        sys.exit(
            128 + runtime.stop.number
        )  # what a shell calls the end by that signal: nothing goes on as if all were done


def count_steps(progress: Progress, batches: StepBatches, args) -> int:
    """Optimizer steps of the whole run, those before a resume among them."""
    full_epoch = -(-len(batches.lengths) // batches.step_size)
    steps = (
        progress.step + batches.steps_left + max(0, args.epochs - batches.epoch - 1) * full_epoch
    )
    return max(progress.step, min(steps, args.max_steps or steps))


def learning_rate(done: float, total: float, peak: float) -> float:
    """The published schedule, lr/10 + lr/2 * (1 + cos(pi * done / total)); counted in samples, so that it goes on evenly
    where a run is resumed with another batch size."""
    return peak / 10 + peak / 2 * (1 + math.cos(math.pi * done / total))


def warm_up(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def optimizer_steps(
    loader: DataLoader, batches: StepBatches, args, meter: Meter
) -> Iterator[list[Batch]]:
    """The batches of every optimizer step that is left, epoch by epoch."""
    while batches.steps_left or batches.epoch + 1 < args.epochs:
        if not batches.steps_left:
            batches.start_epoch(batches.epoch + 1)
        iterator = iter(loader)
        for _ in range(batches.steps_left):
            with meter.timed("data"):
                micro_batches = list(itertools.islice(iterator, args.accumulation_steps))
            yield micro_batches


def accumulate_gradients(
    network: nn.Module,
    images: ImageEncoder,
    micro_batches: list[Batch],
    meter: Meter,
    runtime: Runtime,
) -> torch.Tensor:
    """Add up the gradient of the mean loss over *all* label tokens of the step, on all ranks; returns that loss, float[]."""
    counts = [batch.n_labels for batch in micro_batches]
    n_labels = runtime.sum_on_device(sum(counts)).clamp(min=1)
    loss_sum = torch.zeros((), device=runtime.device)
    for index, (batch, count) in enumerate(zip(micro_batches, counts)):
        waits = isinstance(network, DistributedDataParallel) and index < len(micro_batches) - 1
        with network.no_sync() if waits else nullcontext():  # ranks exchange gradients once a step
            batch = batch.to(runtime.device)
            with runtime.autocast():
                with meter.timed("vision"):
                    image_features = images.features(batch)
                with meter.timed("forward"):
                    loss = network(**batch.model_inputs(), image_features=image_features).loss
            with meter.timed("backward"):
                (
                    loss * (count * runtime.world_size / n_labels)
                ).backward()  # DDP will divide by world_size
            loss_sum += loss.detach() * count
    return runtime.sum_on_device(loss_sum) / n_labels


@torch.no_grad()
def validate(
    model: MiniMindVLM, images: ImageEncoder, val_data: Dataset, progress: Progress,
    checkpoints: Checkpoints, log: RunLog, args, runtime: Runtime,
) -> None:  # fmt: skip
    """Log the mean loss over all label tokens of `val_data`, shared out among the ranks; keep the best weights."""
    model.eval()
    batches = StepBatches(
        val_data.lengths,
        args.batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        shuffle=False,
    )
    loss_sum, n_labels = torch.zeros((), device=runtime.device), 0
    for batch in make_loader(val_data, batches, 0, images.find_features):
        batch, count = batch.to(runtime.device), batch.n_labels
        with runtime.autocast():
            output = model(**batch.model_inputs(), image_features=images.features(batch))
        loss_sum, n_labels = loss_sum + output.loss * count, n_labels + count
    loss_sum, n_labels = runtime.sum_over_ranks(loss_sum.item(), n_labels)
    model.train()
    loss = loss_sum / max(n_labels, 1)
    log.validation(progress.step, loss)
    if loss < progress.best_val_loss:
        progress.best_val_loss = loss
        checkpoints.save_best()


def count_workers(asked: int | None, runtime: Runtime) -> int:
    """Loader processes: what was asked for; else 8 beside a GPU, none where training needs the cores itself."""
    if asked is not None:
        return asked
    return min(8, os.cpu_count() or 1) if runtime.device.type == "cuda" else 0


def describe_run(
    args, train_data: Dataset, learned: list[nn.Parameter], total_steps: int, runtime: Runtime
) -> None:
    effective = args.batch_size * args.accumulation_steps * runtime.world_size
    runtime.say(
        f"learned: {sum(parameter.numel() for parameter in learned):,} parameters\n"
        f"data: {len(train_data):,} rows of {' '.join(args.data_path)}\n"
        f"steps: {total_steps:,} of {effective} samples ({args.batch_size} x {args.accumulation_steps} accumulation "
        f"x {runtime.world_size} devices), {args.epochs} epoch{'s' if args.epochs > 1 else ''}"
    )
    if train_data.skipped:
        runtime.say(f"left out: {list_reasons(train_data.skipped)}")
    if train_data.repaired:
        runtime.say(
            f"repaired: {train_data.repaired} rows had more <image> than images; the surplus is dropped"
        )


@contextmanager
def failures_explained(args, checkpoints: Checkpoints, log: RunLog):
    """Close the log whatever happens; where a run fails, name the last checkpoint, and the flag to lower if memory ran out."""
    try:
        yield
    except Exception as error:
        saved = checkpoints.describe_last()
        if isinstance(error, UserError):
            raise UserError(f"{error}{saved}") from error
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(
            error
        ):
            raise UserError(
                f"a batch does not fit in memory: lower --batch_size (now {args.batch_size}) and raise --accumulation_steps "
                f"(now {args.accumulation_steps}) as much, or lower --max_seq_len (now {args.max_seq_len}){saved}"
            ) from error
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise UserError(
                f"a file cannot be written ({error}): free some space{saved}"
            ) from error
        if "DataLoader worker" in str(error):
            raise UserError(
                f"a process that reads data died ({str(error).splitlines()[0]}): lower --num_workers or free some memory{saved}"
            ) from error
        raise
    finally:
        log.close()


def report_end(
    checkpoints: Checkpoints,
    progress: Progress,
    first_step: int,
    total_steps: int,
    meter: Meter,
    runtime: Runtime,
) -> None:
    if meter.skipped:
        runtime.say(f"skipped while training: {list_reasons(meter.skipped)}")
    if first_step == total_steps:
        runtime.say(f"nothing is left to do: all {total_steps} steps were done before")
    elif progress.step < total_steps:
        runtime.say(
            f"stopped by {signal.Signals(runtime.stop.number).name} after step {progress.step} of {total_steps}; "
            "the same command with --resume goes on"
        )
    out = checkpoints.weights
    runtime.say(
        f"weights: {out}\ncurve: {out.with_suffix('.png')}\nlog: {out.with_suffix('.log.jsonl')}"
    )
