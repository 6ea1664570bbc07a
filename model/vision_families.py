"""The families of vision encoders that --vision_model takes, and what is a patch feature of each.

A folder's config.json says the family ("model_type"). Each is a class of transformers, which is
imported when it is asked for, and one of the functions below:

    CLIP, SigLIP        the states behind the last layer, before the norm that follows it: what
    DINOv2              LLaVA reads (`vision_feature_layer=-1`), so that a model can be exported
    DINO with registers the states behind the last norm, as DINO's authors use them: LLaVA drops
                        one token of a picture, not several, so there is nothing to agree with
    a CNN               its last map: 7 x 7 patches of a picture of 224 pixels

States of the class token and of registers are of no place in the picture: they are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError


@dataclass(frozen=True)
class Family:
    """What is different between vision encoders.

    Args:
        name: how messages call it.
        classes: its model and configuration in transformers are CLASSESModel and CLASSESConfig.
        image_processor: the one it has where a folder does not name one, see image_processor.py.
        features: (network, float[k, 3, H, W]) -> float[k, patches, width].
        layers: name of the list of its transformer layers; "" for a CNN.
        fixed_size: takes pictures of the image_size in config.json only.
        llava_strategy: `vision_feature_select_strategy` by which LLaVA reads the same features;
            None: it cannot.
        recipe: changes whenever `features` does, so that no feature cache mixes two of them.
    """

    name: str
    classes: str
    image_processor: str
    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    layers: str = ""
    fixed_size: bool = False
    llava_strategy: str | None = None
    recipe: str = ""


def read_clip(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """CLIP's own last_hidden_state is before its `post_layernorm`; the first is the class token."""
    return network(pixel_values=pixel_values).last_hidden_state[:, 1:]


def read_siglip(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """SigLIP has no class token. Its own last_hidden_state is behind the norm, so stop before."""
    embeddings = network.embeddings(pixel_values)
    return network.encoder(inputs_embeds=embeddings).last_hidden_state


def read_dinov2(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Before the norm, as for SigLIP; the first is the class token."""
    return network.encoder(network.embeddings(pixel_values)).last_hidden_state[:, 1:]


def read_dino_with_registers(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Behind the norm. The class token comes first, then the registers, then the patches."""
    n_others = 1 + network.config.num_register_tokens
    return network(pixel_values).last_hidden_state[:, n_others:]


def read_map(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The last map of a CNN, which is what its classifier reads.

    Each patch is brought to mean 0 and variance 1 over its channels: what comes out of a ReLU has
    neither, and the projector is one linear map. The finer map before it would make a picture of
    four times as many tokens; put into these it helped nothing in one comparison (dev/LOG.md).
    """
    patches = network(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)  # (k, n, width)
    return F.layer_norm(patches.float(), patches.shape[-1:]).to(patches.dtype)


def read_dino_convnext(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The last map too: DINOv3's is patches behind a norm already. The first is their mean."""
    return network(pixel_values).last_hidden_state[:, 1:]


def _cnn(name: str, classes: str, image_processor: str) -> Family:
    return Family(name, classes, image_processor, read_map, recipe="last map, normed 1")


# By the model_type in config.json, that of the vision half where a model has two.
FAMILIES = {
    "clip_vision_model": Family(
        name="CLIP",
        classes="CLIPVision",
        image_processor="CLIP",
        features=read_clip,
        layers="encoder.layers",
        fixed_size=True,
        llava_strategy="default",
        # Caches of before there were others stay valid.
        recipe="",
    ),
    "siglip_vision_model": Family(
        name="SigLIP",
        classes="SiglipVision",
        image_processor="Siglip",
        features=read_siglip,
        layers="encoder.layers",
        fixed_size=True,
        llava_strategy="full",
        recipe="before the norm 1",
    ),
    "dinov2": Family(
        name="DINOv2",
        classes="Dinov2",
        image_processor="Bit",
        features=read_dinov2,
        layers="encoder.layer",
        llava_strategy="default",
        recipe="before the norm 1",
    ),
    "dinov2_with_registers": Family(
        name="DINOv2 with registers",
        classes="Dinov2WithRegisters",
        image_processor="Bit",
        features=read_dino_with_registers,
        layers="encoder.layer",
        recipe="behind the norm 1",
    ),
    "dinov3_vit": Family(
        name="DINOv3",
        classes="DINOv3ViT",
        image_processor="DINOv3ViT",
        features=read_dino_with_registers,
        layers="model.layer",
        recipe="behind the norm 1",
    ),
    "dinov3_convnext": Family(
        name="DINOv3's ConvNeXt",
        classes="DINOv3ConvNext",
        image_processor="DINOv3ViT",
        features=read_dino_convnext,
        recipe="behind the norm 1",
    ),
    "convnext": _cnn("ConvNeXt", "ConvNext", "ConvNext"),
    "convnextv2": _cnn("ConvNeXt V2", "ConvNextV2", "ConvNext"),
    "efficientnet": _cnn("EfficientNet", "EfficientNet", "EfficientNet"),
    "mobilenet_v2": _cnn("MobileNetV2", "MobileNetV2", "MobileNetV2"),
    "regnet": _cnn("RegNet", "RegNet", "ConvNext"),
    "resnet": _cnn("ResNet", "ResNet", "ConvNext"),
}
# Models with a text half, and their vision half.
HALVES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_REFUSED = {
    "siglip2": "SigLIP 2 NaFlex, whose pictures have any shape: take a SigLIP 2 of one size, such "
    "as google/siglip2-base-patch16-224"
}
_REFUSED["siglip2_vision_model"] = _REFUSED["siglip2"]


def find_family(model_type: object, where: str = "the vision encoder") -> Family:
    """The family of this model_type; UserError names those there are."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = _REFUSED.get(model_type) if isinstance(model_type, str) else None
    known = ", ".join(name.removesuffix("_vision_model") for name in FAMILIES)
    raise UserError(
        f"model_type of {where} is {model_type!r:.40}: "
        + (reason or f"a vision encoder here is one of {known}")
    )
