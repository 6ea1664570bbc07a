"""The vision encoder and the projector as llama.cpp's mmproj file.

llama.cpp's LLaVA is a CLIP or SigLIP and a projector of two layers with a GELU between. Ours is one
linear layer W, so it is written as a pair: gelu(x) - gelu(-x) = x, hence

    [I, -I] gelu([W; -W] x) = W x

Known bug of llama.cpp (ggml-org/llama.cpp#25814; its fix, #25844, was not merged when this was
written): it puts CLIP's class token behind the patches, while positions and rows count it as the
first. So each patch has the position of its neighbor, and the language model gets the states of the
second patch to the last one, and then that of the class token. Three forms of the file:

    first    as CLIP has it, right once the bug is fixed
    last     for llama.cpp as it is: positions are in the order in which it has the tokens, and the
             projector makes a line break of the class token; the first patch (a corner) is lost
    none     without a class token, which the patches then do not see: the bug does nothing

SigLIP has no class token: the bug does nothing, and all forms are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import gguf
import numpy as np
import torch
import torch.nn.functional as F

from common.errors import UserError
from model.image_processor import picture_side, pixel_statistics
from model.vision import VisionEncoder

if TYPE_CHECKING:
    from inference import VLM

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
# Name in transformers of the activation -> llama.cpp's `use_gelu`, which is the one by tanh; the
# exact one differs from it by 0.0005 at most.
ACTIVATIONS = {"quick_gelu": False, "gelu_pytorch_tanh": True, "gelu_new": True, "gelu": True}
# transformers' names within a layer, and llama.cpp's.
LAYER_NAMES = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# The pair of the projector is scaled by this and back, so that nearly all numbers lie where the
# GELU is exact: llama.cpp looks it up in a table of 16 bits between -10 and 10.
SCALE = 1024.0
# How many times larger than any number of an embedding the gate of the class token is.
GATE = 32.0
# What is added to the spread of states, of which some are alike in every picture.
RIDGE = 0.01


def check_vision_encoder(vision_encoder: VisionEncoder) -> None:
    """UserError where llama.cpp's LLaVA has no such vision encoder."""
    config = vision_encoder.config
    if config.model_type not in (CLIP, SIGLIP):
        raise UserError(
            f"a model with {vision_encoder.family.name} cannot be written as GGUF: its vision "
            "encoder has to be CLIP or SigLIP"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"a vision encoder with hidden_act {config.hidden_act} cannot be written as GGUF: "
            f"llama.cpp has {', '.join(ACTIVATIONS)}"
        )


def describe_class_token(vision_encoder: VisionEncoder, class_token: str) -> str:
    """What a user has to know of a file of this form."""
    bug = "bug #25814 of llama.cpp"
    if vision_encoder.config.model_type != CLIP:
        return f"gguf: {vision_encoder.family.name} has no class token, so {bug} does not matter"
    advice = {
        "first": f"right once {bug} is fixed: until then add --gguf_class_token last",
        "last": f"right until {bug} is fixed: then leave out --gguf_class_token",
        "none": "the patches do not see the class token: measure what that costs",
    }
    return f"gguf: {advice[class_token]}"


def write_vision_encoder(writer: gguf.GGUFWriter, vlm: VLM, class_token: str) -> None:
    """Add sizes and tensors.

    Args:
        writer: of the file.
        vlm: the model, with its vision encoder.
        class_token: first, last or none, see above.
    """
    # the sizes
    config, image_processor = vlm.model.vision_encoder.config, vlm.processor.image_processor
    mean, std = pixel_statistics(image_processor)
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool(gguf.Keys.Clip.HAS_LLAVA_PROJECTOR, True)
    writer.add_vision_image_size(picture_side(image_processor))
    writer.add_vision_image_mean(mean.flatten().tolist())
    writer.add_vision_image_std(std.flatten().tolist())
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_projection_dim(vlm.model.config.dim)
    writer.add_vision_block_count(config.num_hidden_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_use_gelu(ACTIVATIONS[config.hidden_act])
    # The states behind the last layer; without this llama.cpp would take those before it.
    writer.add_array("clip.vision.feature_layer", [config.num_hidden_layers])

    # the tensors
    network, linear = vlm.model.vision_encoder.network, vlm.model.vision_proj.vision_proj[0]
    for name, tensor in name_tensors(network, class_token):
        # Matrices and the patches' convolution have 16 bits.
        is_large = tensor.ndim > 1 and name != "v.position_embd.weight"
        writer.add_tensor(name, tensor.astype(np.float16 if is_large else np.float32))
    projector = as_pair(linear)
    if class_token == "last" and config.model_type == CLIP:
        line_break = vlm.processor.encode_content("\n")
        stand_in = vlm.model.tok_embeddings.weight[line_break[0]]
        projector = replace_class_token(projector, find_class_token(network, linear), stand_in)
    for name, tensor in projector.items():
        writer.add_tensor(name, tensor.detach().float().numpy())


def name_tensors(network: torch.nn.Module, class_token: str) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, float32 values) of each tensor of a CLIP or SigLIP that is used."""
    # what llama.cpp calls otherwise
    config, position = network.config, "embeddings.position_embedding.weight"
    weights = {name: weight.float().numpy() for name, weight in network.state_dict().items()}
    names = {"embeddings.patch_embedding.weight": "v.patch_embd.weight"}
    names[position] = "v.position_embd.weight"
    if config.model_type == CLIP:
        names |= {f"pre_layrnorm.{kind}": f"v.pre_ln.{kind}" for kind in ("weight", "bias")}
        if class_token != "none":
            names["embeddings.class_embedding"] = "v.class_embd"
        # The first position is that of the class token.
        if class_token == "last":
            weights[position] = np.roll(weights[position], -1, axis=0)
        if class_token == "none":
            weights[position] = weights[position][1:]
    else:
        names["embeddings.patch_embedding.bias"] = "v.patch_embd.bias"

    # the layers
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layers.{layer}.{theirs}.{kind}"] = f"v.blk.{layer}.{ours}.{kind}"
    for theirs, ours in names.items():
        yield ours, weights[theirs]


def as_pair(linear: torch.nn.Linear) -> dict[str, torch.Tensor]:
    """The two layers, under llama.cpp's names, that are this one where a GELU is between them."""
    weight, bias, identity = linear.weight, linear.bias, torch.eye(linear.out_features)
    return {
        "mm.0.weight": SCALE * torch.cat((weight, -weight)),  # (2 * dim, vision_dim)
        "mm.0.bias": SCALE * torch.cat((bias, -bias)),  # (2 * dim,)
        "mm.2.weight": torch.cat((identity, -identity), dim=1) / SCALE,  # (dim, 2 * dim)
        "mm.2.bias": torch.zeros_like(bias),
    }


class Gate(NamedTuple):
    """normal x + offset: about 1 for states of the class token, about -1 for those of patches."""

    normal: torch.Tensor  # float[vision_dim]
    offset: torch.Tensor  # float[]
    size: float  # far above any embedding's


def replace_class_token(
    pair: dict[str, torch.Tensor], gate: Gate, stand_in: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The same for patches; what is the class token becomes an embedding that is given.

    The gate, times its size, is taken from both halves of the pair. For a patch both are then above
    0, where gelu(a) = a, and their difference is 2 W x. For the class token both are below 0, where
    gelu(a) = 0. One more row, the gate itself, adds the embedding there.

    Args:
        pair: see `as_pair`.
        gate: see `find_class_token`.
        stand_in: float[dim].
    """
    weight, bias = pair["mm.0.weight"], pair["mm.0.bias"]
    normal, offset = SCALE * gate.normal, SCALE * gate.offset
    return {
        # (2 * dim + 1, vision_dim)
        "mm.0.weight": torch.cat((weight - gate.size * normal, normal[None])),
        "mm.0.bias": torch.cat((bias - gate.size * offset, offset[None])),  # (2 * dim + 1,)
        "mm.2.weight": torch.cat((pair["mm.2.weight"] / 2, stand_in[:, None] / SCALE), dim=1),
        "mm.2.bias": pair["mm.2.bias"],
    }


@torch.no_grad()
def find_class_token(network: torch.nn.Module, linear: torch.nn.Linear) -> Gate:
    """The gate by which the class token's last states are told from those of patches.

    It is found by linear discriminant analysis (Fisher 1936) on pictures of noise, coarse and fine.

    Args:
        network: a CLIP.
        linear: the projector.
    """
    # states of both
    generator, side = torch.Generator().manual_seed(0), network.config.image_size
    noises = [
        F.interpolate(torch.randn(2, 3, n, n, generator=generator).clamp(-2, 2), size=(side, side))
        for n in (1, 2, 4, 8, 16, 32, side)
    ]
    states = network(pixel_values=torch.cat(noises)).last_hidden_state.float()
    # (k, vision_dim), (k * patches, vision_dim)
    groups = states[:, 0], states[:, 1:].flatten(0, 1)

    # the plane between them
    means = [group.mean(dim=0) for group in groups]
    spread = sum(torch.cov(group.T, correction=0) for group in groups)
    spread += RIDGE * spread.diagonal().mean() * torch.eye(len(spread))
    normal = torch.linalg.solve(spread, means[0] - means[1])
    normal = 2 * normal / (normal @ (means[0] - means[1]))
    offset = -normal @ (means[0] + means[1]) / 2
    return Gate(normal, offset, GATE * linear(states).abs().max().item())
