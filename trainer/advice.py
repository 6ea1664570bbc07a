"""What a run tells its owner beyond figures: doubts at its start, the next command at its end.

A false alarm is worse than none, so each check speaks up only where measurements left no doubt
(docs/data.md, "Small sets").
"""

import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from common.errors import BadSampleError
from model.files import is_demo_encoder
from model.image import load_image
from trainer.config import TrainConfig
from trainer.glance import glance, spread
from trainer.paths import find_init_weights
from trainer.run_state import RunState

# The learning rate falls along a cosine from 1.1 to 0.1 times --learning_rate.
MEAN_FACTOR = 0.6
# A run that can move a weight by less than this part of its size changes no answer.
LEAST_REACH = 0.01
# What is suggested instead, and the highest rate that was tried.
GOOD_REACH, HIGHEST_RATE = 0.2, 1e-3
# Ground is over half of any scene, and under 5 % of half of all photographs.
LEAST_GROUND = 0.4
# So few rows did not teach a language model to see.
FEW_ROWS = 1000
ROWS_LOOKED_AT = 12


def print_doubts(
    config: TrainConfig,
    train_data,
    trainable: list[nn.Parameter],
    state: RunState,
    total_steps: int,
) -> None:
    """Print a line for each reason why a run may not learn; arguments as of `describe_run`."""
    # A resumed run said it at its start, and one of a few steps is only tried out.
    if state.progress.step or not state.runtime.is_main:
        return
    doubts, is_tried = [], config.max_steps is not None
    if not is_tried:
        doubts.append(check_rate(config.learning_rate, total_steps, measure_size(trainable)))
    if train_data.n_images:
        if not is_tried:
            doubts.append(check_start(find_init_weights(config), len(train_data)))
        if is_demo_encoder(state.model.vision_encoder.name_or_path):
            doubts.append(check_pictures(read_pictures(train_data)))
    for doubt in filter(None, doubts):
        state.runtime.print(f"warning: {doubt}")


def measure_size(parameters: Iterable[nn.Parameter]) -> float:
    """Root mean square of the weights of all matrices among the parameters."""
    matrices = [parameter.detach() for parameter in parameters if parameter.ndim > 1]
    n_weights = sum(matrix.numel() for matrix in matrices)
    return (sum(matrix.square().sum().item() for matrix in matrices) / max(n_weights, 1)) ** 0.5


def check_rate(learning_rate: float, n_steps: int, size: float) -> str | None:
    """Whether the weights can move far enough to change an answer.

    AdamW moves a weight by about the learning rate a step, whatever the size of its gradient, and
    by less if the gradients of different steps disagree. So no weight gets farther than the sum of
    all learning rates.

    Args:
        learning_rate: base of the schedule.
        n_steps: optimizer steps of the run.
        size: root mean square of the weights.
    """
    reach = MEAN_FACTOR * learning_rate * n_steps
    if reach >= LEAST_REACH * size:
        return None
    better = min(HIGHEST_RATE, GOOD_REACH * size / (MEAN_FACTOR * n_steps))
    return (
        f"{n_steps:,} steps at --learning_rate {learning_rate:g} move no weight by more than "
        f"{100 * reach / size:.2g} % of its size, so answers will hardly change: try "
        f"--learning_rate {better:.0e} (docs/data.md, Small sets)"
    )


def check_start(weights: Path | None, n_rows: int) -> str | None:
    """Whether a language model that has never seen a picture gets only few.

    Args:
        weights: where the run starts; None if not from a file.
        n_rows: training rows.
    """
    # lm_512.pth: that is how language models without eyes are called.
    if weights is None or not weights.name.startswith("lm_") or n_rows > FEW_ROWS:
        return None
    return (
        f"{weights} has never seen a picture, and {n_rows:,} rows do not teach it to look: start "
        "from weights that see, such as --init_weights out/sft_vlm_512.pth (docs/data.md, Small "
        "sets)"
    )


def read_pictures(train_data) -> list[Image.Image]:
    """The first picture of some rows spread over the set; what cannot be read is left out."""
    pictures = []
    for _, images in glance(train_data, spread(train_data, ROWS_LOOKED_AT)):
        try:
            pictures.append(load_image(images[0]))
        except BadSampleError:
            continue
    return pictures


def check_pictures(pictures: list[Image.Image]) -> str | None:
    """Whether these pictures are unlike those that the demo's vision encoder has seen."""
    if not pictures or np.median([measure_ground(picture) for picture in pictures]) >= LEAST_GROUND:
        return None
    return (
        "the demo's vision encoder has only seen rendered scenes, and these pictures look like "
        "photographs: they can be learned by heart, but new ones not understood; fetch CLIP and "
        "its model with `python -m scripts.download clip tokenizer weights-512`"
    )


def measure_ground(picture: Image.Image) -> float:
    """Share of a picture whose color is nearly its median color."""
    small = picture.convert("RGB").resize((64, 64), Image.Resampling.BOX)
    pixels = np.asarray(small, np.int16).reshape(-1, 3)
    distance = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1)
    return float((distance <= 10).mean())


def write_ask_command(weights: Path, data) -> str:
    """The command that asks a question of `data` about its picture.

    Args:
        weights: what is asked.
        data: a VLMDataset or MixedDataset. The picture is called PICTURE if it has no file of its
            own (in a .zip or a Parquet file).
    """
    question, images = next(glance(data, range(min(len(data), ROWS_LOOKED_AT))), ("", []))
    pictures, prompt = ["PICTURE"], question or "What is this?"
    if images and all(isinstance(image, Path) for image in images):
        here = Path.cwd()
        pictures = [
            str(image.relative_to(here) if image.is_relative_to(here) else image)
            for image in images
        ]
    flags = ["--weights", str(weights), "--image", *pictures, "--prompt", prompt]
    return shlex.join(["python", "eval_vlm.py", *flags, "--temperature", "0"])
