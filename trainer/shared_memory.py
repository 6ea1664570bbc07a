"""Whether /dev/shm is large enough for the batches that loader processes hand over through it."""

import os
import shutil
from pathlib import Path

from model.image_processor import picture_side
from trainer.collate import BATCHES_AHEAD
from trainer.runtime import Runtime
from trainer.sampler import StepSampler

SHARED_MEMORY = Path("/dev/shm")
# Of input_ids, labels and indices, for each place of a row.
TOKEN_BYTES = 32
# An estimate: rows have different numbers of images.
MARGIN = 2


def is_too_small(train_data, sampler: StepSampler, n_workers: int, runtime: Runtime) -> bool:
    """Whether batches may not fit into /dev/shm, as in a container of Docker's 64 MB; says so.

    A loader process that finds no room there stands still without a word.

    Args:
        train_data: a VLMDataset or MixedDataset.
        sampler: how large batches are.
        n_workers: loader processes of each rank.
        runtime: how many ranks there are.
    """
    if not n_workers or not SHARED_MEMORY.is_dir():
        return False
    n_batches = BATCHES_AHEAD * n_workers + 2
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = MARGIN * n_batches * n_ranks * estimate_bytes(train_data, sampler.batch_size)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return False
    runtime.print(
        f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free and {n_workers} processes that read data "
        f"may need {needed / 1e6:,.0f}: batches come through pipes, more slowly. Give it more "
        f"(docker run --shm-size {-(-needed // 10**9)}g), or lower --num_workers"
    )
    return True


def estimate_bytes(train_data, batch_size: int) -> int:
    """Of a batch: its images, as pixels or as cached features, and its tokens."""
    config = train_data.processor.config
    pixels = 3 * picture_side(train_data.processor.image_processor) ** 2
    features = 2 * config.n_image_tokens * config.vision_dim
    images = -(-train_data.n_images // len(train_data)) * max(pixels, features)
    return batch_size * (images + TOKEN_BYTES * int(train_data.lengths.max()))
