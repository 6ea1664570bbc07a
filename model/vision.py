"""The frozen CLIP vision encoder: load its vision half, turn pictures into patch features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import UserError
from model.files import VISION_MODEL_PATH, find_vision_model

if TYPE_CHECKING:
    from transformers import CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report of keys left out on purpose (CLIP's text half)."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def load_vision_encoder(
    path: str | Path = VISION_MODEL_PATH,
) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """(frozen vision encoder in eval mode and float32, its image processor).

    Only the vision half of a whole CLIP is read. MissingFileError where there is none, UserError
    where it is damaged.
    """
    folder = find_vision_model(path)
    # This takes 2.5 s, so it is not paid before it is needed.
    from safetensors import SafetensorError
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        with quiet_transformers():
            # Of a whole CLIP's configuration it takes the vision half too.
            config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
            vision_encoder, loading = CLIPVisionModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            image_processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot load the vision encoder in {folder} ({reason}): fetch it again"
        ) from error

    # transformers fills missing weights with random numbers
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise UserError(
            f"the vision encoder in {folder} lacks {len(missing)} weights, such as {missing[0]}: "
            "fetch it again"
        )
    return vision_encoder.requires_grad_(False).eval(), image_processor


def normalize_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Bytes to floats, as CLIPImageProcessor does it.

    Args:
        pixels: uint8[k, 3, H, W].
        mean: float[3, 1, 1], of each color.
        std: float[3, 1, 1].

    Returns float32[k, 3, H, W].
    """
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def patch_features(vision_encoder: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """float[k, 3, H, W] -> float[k, patches, vision_dim].

    These are the states behind the last layer, before CLIP's `post_layernorm`, without the class
    token.
    """
    output = vision_encoder(pixel_values=pixel_values.to(vision_encoder.dtype))
    return output.last_hidden_state[:, 1:]
