"""The frozen CLIP vision encoder: load its vision half, turn pictures into patch features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import UserError
from model.files import VISION_MODEL_PATH, find_vision_model, read_json
from model.LMConfig import count_patches
from model.pretrained import build, load_image_processor, read_folder_weights, refusing_folder
from model.sizes import VISION_SIZES, check_sizes

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


# The words of config.json that the vision encoder is made of.
_SIZES = (*VISION_SIZES, "hidden_act")


def load_vision_encoder(
    path: str | Path = VISION_MODEL_PATH,
) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """(frozen vision encoder in eval mode and float32, its image processor).

    Only the vision half of a whole CLIP is read. MissingFileError where there is none, UserError
    where it is damaged.
    """
    folder = find_vision_model(path)
    # This takes 2.5 s, so it is not paid before it is needed.
    from transformers import CLIPVisionModel

    with refusing_folder("vision encoder", folder):
        facts = read_json(folder / "config.json")
        # A whole CLIP's configuration has one for each half.
        config = make_vision_config(facts.get("vision_config", facts))
        vision_encoder = build(CLIPVisionModel, config, read_folder_weights(folder))
        image_processor = load_image_processor(folder, config.image_size)
    # Training writes down where it was.
    vision_encoder.name_or_path = str(folder)
    return vision_encoder.requires_grad_(False), image_processor


def make_vision_config(facts: object) -> CLIPVisionConfig:
    """The sizes of a CLIP vision encoder; UserError where they cannot be."""
    from transformers import CLIPVisionConfig
    from transformers.activations import ACT2FN

    # each by itself
    if not isinstance(facts, dict):
        raise UserError("config.json has no vision_config")
    sizes = {name: facts[name] for name in _SIZES if facts.get(name) is not None}
    check_sizes(sizes, VISION_SIZES, "config.json")
    if facts.get("num_channels", 3) != 3:
        raise UserError(
            f"num_channels in config.json is {facts['num_channels']!r:.40}: colors are 3"
        )
    if sizes.get("hidden_act", "gelu") not in list(ACT2FN):
        raise UserError(
            f"hidden_act in config.json is {sizes['hidden_act']!r:.40}: none is so called"
        )

    # all together
    config = CLIPVisionConfig(**sizes)
    count_patches(config)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} in config.json does not split into "
            f"{config.num_attention_heads} heads"
        )
    return config


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
