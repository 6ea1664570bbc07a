"""The training loop of both stages."""

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from model.model_vlm import MiniMindVLM
from trainer.advice import print_doubts
from trainer.auto_batch import choose_batch_size
from trainer.collate import Batch, make_loader
from trainer.config import TrainConfig
from trainer.image_encoder import ImageEncoder, open_image_encoder
from trainer.meter import Meter
from trainer.report import Report, TrainResult, describe_run
from trainer.run_state import RunState
from trainer.runtime import Runtime, start_runtime
from trainer.sampler import StepSampler
from trainer.schedule import Schedule
from trainer.shared_memory import is_too_small
from trainer.stop import limit_wait
from trainer.validation import validate


def train(
    model: MiniMindVLM,
    train_data,
    config: TrainConfig,
    val_data=None,
    runtime: Runtime | None = None,
) -> TrainResult:
    """Train every parameter that requires a gradient; leave weights, log and curve in out_dir.

    Args:
        model: with a vision encoder; starts from config.init_weights, or as it is.
        train_data: a VLMDataset or MixedDataset (dataset/).
        config: options of the run.
        val_data: for a validation loss and sample answers; the best weights are then saved too.
        runtime: device and processes; made from `config` if not given.
    """
    runtime = runtime or start_runtime(config)
    model.to(runtime.device).train()
    batch_size, accumulation_steps = choose_batch_size(model, train_data, config, runtime)

    # What learns, in which order it sees the data, and how far it is.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_fused = runtime.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, fused=is_fused)
    sampler = StepSampler(
        train_data.lengths,
        batch_size,
        accumulation_steps,
        runtime.rank,
        runtime.world_size,
        config.seed,
    )
    state = RunState(model, optimizer, sampler, train_data, config, runtime)
    state.start()
    progress = state.progress
    schedule = Schedule(config, sampler, progress.step)
    describe_run(config, train_data, trainable, state, schedule.total_steps)
    print_doubts(config, train_data, trainable, state, schedule.total_steps)

    # Where its batches and image features come from, and where its results go.
    images = open_image_encoder(model, train_data, val_data, config, runtime)
    num_workers, is_pinned = runtime.count_workers(config.num_workers), runtime.has_own_memory
    through_pipes = is_too_small(train_data, sampler, num_workers, runtime)
    loader = make_loader(train_data, sampler, num_workers, images.cache, is_pinned, through_pipes)
    network = model
    if runtime.world_size > 1:  # ranks exchange gradients through it
        network = DistributedDataParallel(model, forward_sync_buffers=False)
    report = Report(config, state, schedule.total_steps, train_data, images.cache)
    meter, is_stopped = report.meter, False

    with runtime.stop.listening(report.describe_abort), report.following():
        if val_data is not None and progress.step == 0:
            # what it says before it has learned anything
            with meter.paused():
                validation = validate(model, images, val_data, batch_size, runtime)
            report.log.validation(0, validation)

        steps = optimizer_steps(loader, sampler, config.epochs, meter)
        for micro_batches in itertools.islice(steps, schedule.steps_left):
            # learning rate
            learning_rate = schedule.learning_rate(sampler.samples_done, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            # gradients of the whole step
            loss = accumulate_gradients(network, images, micro_batches, meter, runtime)

            # clip and update
            with meter.timed("optimizer"):
                grad_norm = nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            sampler.advance()
            progress.step += 1
            report.add_step(loss, grad_norm, micro_batches)

            # now and then: log, validate, save
            step, is_end = progress.step, progress.step == schedule.total_steps
            is_log_due = is_end or step % config.log_interval == 0
            is_save_due = is_end or state.is_save_due()
            is_val_due = val_data is not None and (
                is_end
                or sampler.steps_left == 0
                or (config.val_interval is not None and step % config.val_interval == 0)
            )
            if not (is_log_due or is_val_due or is_save_due or runtime.is_read_due(step)):
                continue  # a GPU is not kept waiting
            last_loss, last_norm = report.read_losses()
            is_stopped = runtime.any_rank(runtime.stop.is_requested)
            if is_log_due:
                report.log_step(last_loss, last_norm, learning_rate)
            if is_val_due and not is_stopped:
                with meter.paused():
                    validation = validate(model, images, val_data, batch_size, runtime)
                report.log.validation(step, validation)
                state.save_if_best(validation.loss)
            if is_save_due or is_stopped:
                state.save()
            if is_stopped:
                break
        images.close()
        report.write_end()
    return report.end(is_stopped, val_data or train_data)


def optimizer_steps(
    loader: DataLoader, sampler: StepSampler, epochs: int, meter: Meter
) -> Iterator[list[Batch]]:
    """The batches of every optimizer step that is left; the caller advances the sampler."""
    while sampler.steps_left or sampler.epoch + 1 < epochs:
        if not sampler.steps_left:
            sampler.start_epoch(sampler.epoch + 1)
        batches = iter(loader)
        for _ in range(sampler.steps_left):
            with meter.timed("data"), limit_wait():
                micro_batches = list(itertools.islice(batches, sampler.accumulation_steps))
            yield micro_batches


def accumulate_gradients(
    network: nn.Module,
    images: ImageEncoder,
    micro_batches: list[Batch],
    meter: Meter,
    runtime: Runtime,
) -> torch.Tensor:
    """Add up the gradients of an optimizer step; returns its loss, float[].

    The loss is the mean over *all* label tokens of the step, on all ranks, so that it does not
    depend on how the step is cut into batches.
    """
    counts = [batch.n_labels for batch in micro_batches]
    n_labels = runtime.sum_on_device(sum(counts)).clamp(min=1)
    loss_sum = torch.zeros((), device=runtime.device)
    for index, (batch, count) in enumerate(zip(micro_batches, counts)):
        # Ranks exchange gradients once a step, with the last batch.
        is_last = index == len(micro_batches) - 1
        waits = isinstance(network, DistributedDataParallel) and not is_last
        with network.no_sync() if waits else nullcontext():
            batch = batch.to(runtime.device)
            with runtime.autocast():
                with meter.timed("vision"):
                    image_features = images.features(batch)
                with meter.timed("forward"):
                    loss = network(**batch.model_inputs(), image_features=image_features).loss
            with meter.timed("backward"):
                # DDP divides the sum of all ranks by their number.
                (loss * (count * runtime.world_size / n_labels)).backward()
            loss_sum += loss.detach() * count
    return runtime.sum_on_device(loss_sum) / n_labels
