"""--batch_size auto: the largest batch that fits, with the samples of an optimizer step kept by accumulation."""

import os

import numpy as np
import torch

from common.errors import UserError
from model.model_vlm import MiniMindVLM
from trainer.collate import TrainSamples, find_nothing
from trainer.image_encoder import ImageEncoder
from trainer.runtime import Runtime

PROBES = (1, 2, 4)  # samples in the batches whose memory is measured; the first only warms up
SHARE = 0.8  # of the memory that is free
ADAM_BYTES = 8  # two float32 moments for each learned parameter
MARGIN = 1.1  # what the allocator holds beside: 10 % were seen in a run of two epochs (768/16, SFT)


def fit_batch_size(model: MiniMindVLM, train_data, args, runtime: Runtime) -> None:
    """Set args.batch_size, and args.accumulation_steps so that a step has as many samples as with the stage's own batch size."""
    wanted = args.default_batch_size * args.accumulation_steps
    budget = args.memory_gb * 1e9 if args.memory_gb else SHARE * free_memory(runtime)
    size, predicted = runtime.from_main(
        lambda: largest_fitting(model, train_data, wanted, budget, runtime)
    )
    args.batch_size, args.accumulation_steps = size, wanted // size
    runtime.say(
        f"batch size: {size} x {wanted // size} accumulation; the longest rows need about {predicted / 1e9:.1f} of "
        f"{budget / 1e9:.1f} GB"
    )


def largest_fitting(
    model: MiniMindVLM, train_data, wanted: int, budget: float, runtime: Runtime
) -> tuple[int, float]:
    """(largest divisor of `wanted` whose batch of longest rows fits into `budget` bytes, its predicted bytes)."""
    peaks = {size: measure_peak(model, train_data, size, runtime) for size in PROBES}
    model.zero_grad(set_to_none=True)
    slope = MARGIN * max(0.0, (peaks[4] - peaks[2]) / 2)  # bytes of another sample
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = MARGIN * (peaks[2] + ADAM_BYTES * learned) - 2 * slope
    fitting = [
        size
        for size in range(1, wanted + 1)
        if wanted % size == 0 and base + size * slope <= budget
    ]
    if not fitting:
        raise UserError(
            f"not even one sample fits: it needs {(base + slope) / 1e9:.1f} GB of {budget / 1e9:.1f}: lower --max_seq_len, "
            "or raise --memory_gb"
        )
    return fitting[-1], base + fitting[-1] * slope


def measure_peak(model: MiniMindVLM, train_data, size: int, runtime: Runtime) -> int:
    """Bytes in use at the height of one forward and backward pass over the `size` longest rows. Gradients stay, since they do
    while batches are accumulated."""
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    longest = np.argsort(train_data.lengths)[::-1]
    samples = TrainSamples(train_data, find_nothing)
    batch = samples.collate(
        [samples[int(longest[index % len(longest)])] for index in range(size)]
    ).to(runtime.device)
    images = ImageEncoder(model.vision_encoder, train_data.processor.image_processor, None, runtime)
    with runtime.autocast():
        features = images.features(batch)
        loss = model(**batch.model_inputs(), image_features=features).loss
    loss.backward()
    return runtime.peak_memory()


def free_memory(runtime: Runtime) -> float:
    """Bytes this process may have: what it holds and what is free, shared with the other processes of a machine's CPU."""
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        return free + torch.cuda.memory_reserved(runtime.device)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
