"""The frozen vision encoder: pictures in, patch features out, whatever it is inside.

All other code asks what `VisionEncoder` says: how many patches of what width, and the features.
Which networks there are, and what is a feature of each: vision_families.py. How pictures are
prepared for them: image_processor.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.errors import UserError
from model.files import VISION_MODEL_PATH, find_vision_model, read_json
from model.image_processor import load_image_processor, picture_side
from model.pretrained import build, read_folder_weights, refusing_folder
from model.vision_config import choose_facts, read_vision_config
from model.vision_families import find_family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor


class VisionEncoder(nn.Module):
    """A network of transformers as the rest of this project sees it; frozen, in eval mode.

    Args:
        network: of one of the families, such as a CLIPVisionModel.
        image_size: pixels of a side of the square pictures it will get; if not given, the
            image_size of its configuration.

    Attributes:
        network: see above.
        family: see vision_families.py.
        grid: (rows, columns) of the patches of a picture, which come row by row.
        n_patches: rows * columns.
        width: numbers of a patch feature.

    UserError where the network is of no family, or no pictures of that size go through it.
    """

    def __init__(self, network: PreTrainedModel, image_size: int | None = None):
        super().__init__()
        self.family = find_family(network.config.model_type)
        if image_size is None:
            image_size = getattr(network.config, "image_size", None)
        if not isinstance(image_size, int):
            raise UserError(
                f"a {self.family.name} whose configuration names no image_size: pass image_size"
            )
        self.network = network.requires_grad_(False)
        self.eval()
        self.n_patches, self.width = self._measure(image_size)
        side = math.isqrt(self.n_patches)
        self.grid = (side, side)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[k, 3, H, W] -> float[k, patches, width] in the network's dtype, no gradient."""
        with torch.no_grad():
            return self.family.features(self.network, pixel_values.to(self.dtype))

    def train(self, mode: bool = True) -> VisionEncoder:
        """Nothing: it stays in eval mode, whatever mode the model around it goes into."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def config(self) -> PreTrainedConfig:
        """The network's configuration in transformers, for export."""
        return self.network.config

    @property
    def name_or_path(self) -> str:
        """The folder it was loaded from; "" for none."""
        return self.network.name_or_path

    @property
    def layers(self) -> list[nn.Module]:
        """Its transformer layers, which are alike; none in a CNN."""
        return list(self.network.get_submodule(self.family.layers)) if self.family.layers else []

    @property
    def recipe(self) -> str:
        """What decides about its features, beside weights and pixels; "" for a CLIP."""
        if not self.family.recipe:
            return ""
        return json.dumps([self.family.recipe, choose_facts(self.config.to_dict())])

    def _measure(self, image_size: int) -> tuple[int, int]:
        """(patches, width) of a picture of that many pixels: one goes through without a number."""
        tensors = (*self.network.named_parameters(), *self.network.named_buffers())
        on_meta = {f"network.{name}": tensor.to("meta") for name, tensor in tensors}
        picture = torch.empty(1, 3, image_size, image_size, device="meta")
        try:
            features = torch.func.functional_call(self, on_meta, (picture,))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"no picture of {image_size} x {image_size} pixels goes through it ({error})"
            ) from error
        return features.shape[1], features.shape[2]


def as_vision_encoder(vision_encoder: VisionEncoder | PreTrainedModel) -> VisionEncoder:
    """The same where it is one already; else a network of transformers, wrapped."""
    if isinstance(vision_encoder, VisionEncoder):
        return vision_encoder
    return VisionEncoder(vision_encoder)


def load_vision_encoder(
    path: str | Path = VISION_MODEL_PATH,
) -> tuple[VisionEncoder, BaseImageProcessor]:
    """(frozen vision encoder in eval mode and float32, its image processor).

    Only the vision half of a model with two is read. MissingFileError where there is none,
    UserError where it is damaged or of no family.
    """
    folder = find_vision_model(path)
    with refusing_folder("vision encoder", folder):
        config, network_class = read_vision_config(read_json(folder / "config.json"))
        image_processor = load_own_processor(folder, config)
        network = build(network_class, config, read_folder_weights(folder))
        # Training writes down where it was.
        network.name_or_path = str(folder)
        return VisionEncoder(network, picture_side(image_processor)), image_processor


def load_own_processor(folder: Path, config: PreTrainedConfig) -> BaseImageProcessor:
    """The image processor of the vision encoder of these sizes, see `load_image_processor`."""
    family = find_family(config.model_type)
    image_size = config.image_size if family.fixed_size else None
    return load_image_processor(folder, family.image_processor, image_size)


def normalize_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Bytes to floats, as image processors do it.

    Args:
        pixels: uint8[k, 3, H, W].
        mean, std: float[3, 1, 1] each, see `pixel_statistics`.

    Returns float32[k, 3, H, W].
    """
    return (pixels.float() / 255 - mean) / std


def patch_features(
    vision_encoder: VisionEncoder | PreTrainedModel, pixel_values: torch.Tensor
) -> torch.Tensor:
    """float[k, 3, H, W] -> float[k, patches, width], without gradient."""
    return as_vision_encoder(vision_encoder)(pixel_values)
