"""--batch_size auto: the largest batch that fits; accumulation keeps the optimizer step."""

import numpy as np
import torch

from common.errors import UserError
from model.model_vlm import MiniMindVLM
from trainer.collate import TrainSamples
from trainer.config import TrainConfig
from trainer.image_encoder import ImageEncoder
from trainer.runtime import Runtime

PROBES = (1, 2, 4)  # batch sizes that are measured
SHARE = 0.8  # of the free memory
ADAM_BYTES = 8  # two float32 moments a parameter
# What the allocator holds beside: 10 % were seen in two epochs of SFT at 768/16 (dev/LOG.md).
MARGIN = 1.1


def choose_batch_size(
    model: MiniMindVLM, train_data, config: TrainConfig, runtime: Runtime
) -> tuple[int, int]:
    """(batch size, accumulation steps) of a run.

    With --batch_size auto, an optimizer step keeps auto_step_size * accumulation_steps samples.
    """
    if config.batch_size != "auto":
        return config.batch_size, config.accumulation_steps
    wanted = config.auto_step_size * config.accumulation_steps
    budget = config.memory_gb * 1e9 if config.memory_gb else SHARE * runtime.free_memory()
    size, predicted = runtime.from_main(
        lambda: _find_largest(model, train_data, wanted, budget, runtime)
    )
    runtime.print(
        f"batch size: {size} x {wanted // size} accumulation; the longest rows need about "
        f"{predicted / 1e9:.1f} of {budget / 1e9:.1f} GB"
    )
    return size, wanted // size


def _find_largest(
    model: MiniMindVLM, train_data, wanted: int, budget: float, runtime: Runtime
) -> tuple[int, float]:
    """(largest divisor of `wanted` whose batch of longest rows fits, its predicted bytes)."""
    # The first probe only warms up.
    peaks = {size: _measure_peak(model, train_data, size, runtime) for size in PROBES}
    model.zero_grad(set_to_none=True)

    # Memory grows in a straight line: base + slope * samples.
    slope = MARGIN * max(0.0, (peaks[4] - peaks[2]) / 2)
    n_trainable = sum(one.numel() for one in model.parameters() if one.requires_grad)
    base = MARGIN * (peaks[2] + ADAM_BYTES * n_trainable) - 2 * slope
    divisors = [size for size in range(1, wanted + 1) if wanted % size == 0]
    fitting = [size for size in divisors if base + size * slope <= budget]
    if not fitting:
        raise UserError(
            f"not even one sample fits: it needs {(base + slope) / 1e9:.1f} GB of "
            f"{budget / 1e9:.1f}: lower --max_seq_len, or raise --memory_gb"
        )
    return fitting[-1], base + fitting[-1] * slope


def _measure_peak(model: MiniMindVLM, train_data, size: int, runtime: Runtime) -> int:
    """Largest memory, in bytes, of one forward and backward pass over the `size` longest rows.

    Gradients stay, as they do between accumulated batches.
    """
    if runtime.has_own_memory:
        torch.accelerator.reset_peak_memory_stats(runtime.device)
    longest = np.argsort(train_data.lengths)[::-1]
    samples = TrainSamples(train_data)
    chosen = [samples[int(longest[index % len(longest)])] for index in range(size)]
    batch = samples.collate(chosen).to(runtime.device)
    image_processor = train_data.processor.image_processor
    images = ImageEncoder(model.vision_encoder, image_processor, runtime.device)
    with runtime.autocast():
        features = images.features(batch)
        loss = model(**batch.model_inputs(), image_features=features).loss
    loss.backward()
    return runtime.peak_memory()
