"""A tiny random vision encoder of each family, with the image processor it is published with.

DINOv2 gets other pictures than its configuration speaks of, as the published ones do.
"""

import json
from pathlib import Path

import torch
import transformers
from torch import nn

VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
MLP = VIT | dict(intermediate_size=48)
# One block in each of four stages.
STAGES = dict(hidden_sizes=[8, 16, 24, 40], depths=[1, 1, 1, 1])
BLOCKS = dict(
    in_channels=[32, 16, 24],
    out_channels=[16, 24, 40],
    kernel_sizes=[3, 3, 5],
    strides=[2, 2, 2],
    num_block_repeats=[1, 2, 1],
    expand_ratios=[1, 4, 4],
    hidden_dim=1280,
)
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def crop(shorter: int, side: int) -> dict:
    return dict(size={"shortest_edge": shorter}, crop_size=square(side))


# Family: (classes in transformers, sizes, image processor, its settings, grid, width).
ENCODERS = {
    "clip": (
        ("CLIPVision", MLP | dict(image_size=48, patch_size=16)),
        ("CLIP", crop(48, 48)),
        (3, 32),
    ),
    "siglip": (
        ("SiglipVision", MLP | dict(image_size=60, patch_size=14)),
        ("Siglip", dict(size=square(60), resample=2)),
        (4, 32),
    ),
    "dinov2": (
        ("Dinov2", VIT | dict(image_size=98, patch_size=14)),
        ("Bit", crop(80, 70) | IMAGENET),
        (5, 32),
    ),
    "dinov2_with_registers": (
        ("Dinov2WithRegisters", VIT | dict(image_size=98, patch_size=14, num_register_tokens=3)),
        ("Bit", crop(90, 84) | IMAGENET),
        (6, 32),
    ),
    "dinov3_vit": (
        ("DINOv3ViT", MLP | dict(image_size=64, patch_size=16, num_register_tokens=4)),
        ("DINOv3ViT", dict(size=square(112), resample=2) | IMAGENET),
        (7, 32),
    ),
    "dinov3_convnext": (
        ("DINOv3ConvNext", STAGES),
        ("DINOv3ViT", dict(size=square(128), resample=2) | IMAGENET),
        (4, 40),
    ),
    "convnext": (
        ("ConvNext", STAGES),
        ("ConvNext", dict(size={"shortest_edge": 64}, crop_pct=0.875) | IMAGENET),
        (2, 40),
    ),
    "convnextv2": (
        ("ConvNextV2", STAGES),
        ("ConvNext", dict(size={"shortest_edge": 384}) | IMAGENET),
        (12, 40),
    ),
    "efficientnet": (
        ("EfficientNet", BLOCKS | dict(width_coefficient=1.0, depth_coefficient=1.0)),
        ("EfficientNet", dict(size=square(80), rescale_factor=1 / 127.5, rescale_offset=True)),
        (5, 1280),
    ),
    "mobilenet_v2": (
        ("MobileNetV2", dict(depth_multiplier=0.25)),
        ("MobileNetV2", crop(72, 64)),
        (2, 1280),
    ),
    "regnet": (
        ("RegNet", STAGES | dict(embedding_size=8, groups_width=8)),
        ("ConvNext", dict(size={"shortest_edge": 96}) | IMAGENET),
        (3, 40),
    ),
    "resnet": (
        ("ResNet", STAGES | dict(embedding_size=8)),
        ("ConvNext", dict(size={"shortest_edge": 128}) | IMAGENET),
        (4, 40),
    ),
}


def make_network(name: str, seed: int = 0) -> nn.Module:
    """With random weights, statistics of batch norms and scales of layers among them."""
    torch.manual_seed(seed)
    (classes, sizes), _, _ = ENCODERS[name]
    config = getattr(transformers, f"{classes}Config")(**sizes)
    network = getattr(transformers, f"{classes}Model")(config).eval()
    scales = ("norm.weight", "bn.weight", "normalization.weight", "running_var", "lambda1")
    scales += ("gamma", "layer_scale_parameter")
    with torch.no_grad():
        for key, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.ndim == 4:
                # Some begin so small that nothing comes out at the end.
                nn.init.kaiming_normal_(tensor)
            elif key.endswith(scales):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith(("running_mean", "bias", "token", "tokens")):
                tensor.add_(0.3 * torch.randn_like(tensor))
    return network


def make_processor(name: str):
    """The one of its family; for DINOv3's, which needs torchvision, the ViT's beside it."""
    _, (kind, settings), _ = ENCODERS[name]
    kind = "ViT" if kind == "DINOv3ViT" else kind
    return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)


def save_encoder(name: str, folder: Path) -> Path:
    """A folder as published: config.json, model.safetensors, preprocessor_config.json."""
    make_network(name).save_pretrained(folder)
    make_processor(name).save_pretrained(folder)
    _, (kind, _), _ = ENCODERS[name]
    path = folder / "preprocessor_config.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["image_processor_type"] = f"{kind}ImageProcessorFast"
    path.write_text(json.dumps(facts), encoding="utf-8")
    return folder
