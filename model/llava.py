"""MiniMind-V <-> transformers' stock LLaVA: the same network under other names.

`LlavaForConditionalGeneration` computes what MiniMindVLM computes if its text model is a Llama, its
vision encoder a CLIP, SigLIP or DINOv2, and the second layer of its projector the identity. Two
things differ:

- Llama rotates half-split pairs (x0, x8), (x1, x9) ..., MiniMind interleaved ones (x0, x1),
  (x2, x3) ..., so the rows of wq and wk are reordered.
- `<image>` gets a token id of its own behind the vocabulary, so that '@' in text stays text.

The sizes are in llava_config.py. The tests use this as an oracle, and `load_vlm` to read a
transformers directory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import LlavaForConditionalGeneration

from common.errors import UserError
from model.files import read_json
from model.image_processor import picture_side
from model.llava_config import PROJECTOR_SCALES, llava_config, minimind_config, read_llava_config
from model.LMConfig import LMConfig, VLMConfig, size_names
from model.model_vlm import MiniMindVLM
from model.pretrained import build, read_folder_weights, refusing_folder
from model.vision import VisionEncoder, as_vision_encoder, load_own_processor, load_vision_encoder
from model.vision_config import read_vision_config
from model.vision_families import find_family
from model.weights import build_with_weights, load_weights, read_weights

if TYPE_CHECKING:
    from transformers import LlavaConfig
    from transformers.image_processing_utils import BaseImageProcessor

# How LLaVA's names begin.
VISION = "model.vision_tower."
TEXT = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
# Our names within a layer, and Llama's.
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def map_names(config: VLMConfig) -> dict[str, str]:
    """MiniMind name -> LLaVA name, of the tensors that both have."""
    names = {"norm.weight": f"{TEXT}norm.weight"}
    for layer in range(config.n_layers):
        for ours, theirs in LAYER_NAMES.items():
            names[f"layers.{layer}.{ours}.weight"] = f"{TEXT}layers.{layer}.{theirs}.weight"
    for kind in ("weight", "bias"):
        names[f"vision_proj.vision_proj.0.{kind}"] = f"{PROJECTOR}linear_1.{kind}"
    return names


def is_rotated(name: str) -> bool:
    """Whether the outputs of this weight are rotated by their position."""
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def to_half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head: (x0, y0, x1, y1 ...) -> (x0, x1 ..., y0, y1 ...).

    Args:
        weight: float[n_heads * head_dim, dim], wq or wk.
        head_dim: rows of a head.
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (n_heads, head_dim / 2, 2, dim)
    return pairs.transpose(1, 2).flatten(0, 2)  # (n_heads * head_dim, dim)


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_half_split`."""
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))  # (n_heads, 2, head_dim / 2, dim)
    return halves.transpose(1, 2).flatten(0, 2)  # (n_heads * head_dim, dim)


def to_llava(model: MiniMindVLM, projector_act: str = "linear") -> LlavaForConditionalGeneration:
    """The stock LLaVA that computes the same as `model`, which has to have its vision encoder.

    Args:
        model: in float32.
        projector_act: "linear", or "gelu" for tools that know nothing else: see PROJECTOR_SCALES.

    UserError where no LLaVA has such a vision encoder.
    """
    config, ours = model.config, model.state_dict()
    network = as_vision_encoder(model.vision_encoder).network
    llava = LlavaForConditionalGeneration(llava_config(config, network.config, projector_act))

    # what both have
    weights = {
        theirs: to_half_split(ours[name], config.head_dim) if is_rotated(name) else ours[name]
        for name, theirs in map_names(config).items()
    }
    weights |= {f"{VISION}{name}": weight for name, weight in network.state_dict().items()}

    # embeddings: that of <image> is never looked at, so it may be the mean
    embeddings = ours["tok_embeddings.weight"]
    mean = embeddings.mean(dim=0, keepdim=True)
    weights[f"{TEXT}embed_tokens.weight"] = torch.cat((embeddings, mean))
    weights["lm_head.weight"] = weights[f"{TEXT}embed_tokens.weight"]

    # the projector's second layer undoes what the activation needs
    first_scale, second_scale = PROJECTOR_SCALES[projector_act]
    for kind in ("weight", "bias"):
        weights[f"{PROJECTOR}linear_1.{kind}"] = (
            weights[f"{PROJECTOR}linear_1.{kind}"] * first_scale
        )
    weights[f"{PROJECTOR}linear_2.weight"] = torch.eye(config.dim) * second_scale
    weights[f"{PROJECTOR}linear_2.bias"] = torch.zeros(config.dim)
    llava.load_state_dict(weights)
    return llava.eval()


def from_llava(llava: LlavaForConditionalGeneration, image_size: int | None = None) -> MiniMindVLM:
    """The MiniMind-V that computes the same as a LLaVA, sharing its vision encoder.

    Accepted is what `to_llava` makes, also after further training that left the second layer of
    the projector alone: a Llama behind a vision encoder whose last layer is read without a class
    token, `<image>` as the last token, and one of two projectors: with the activation "linear" and
    the identity as second layer, or with "gelu" and the identity times 2^25, whose first layer is
    then 2^-24 times ours. What `to_llava` was given comes back bit by bit. UserError for any other
    LLaVA.

    Args:
        llava: the model.
        image_size: pixels of a side of its pictures; if not given, what its configuration says.
    """
    # does it fit
    vision_config = llava.config.vision_config
    if image_size is None and not find_family(vision_config.model_type).fixed_size:
        # A DINOv2 takes pictures of any size; this LLaVA was made for so many patches of one.
        image_size = math.isqrt(llava.config.image_seq_length) * vision_config.patch_size
    vision_encoder = VisionEncoder(llava.model.vision_tower, image_size)
    config = minimind_config(llava.config, vision_encoder)
    theirs = llava.state_dict()
    second = theirs[f"{PROJECTOR}linear_2.weight"]
    first_scale, second_scale = PROJECTOR_SCALES[llava.config.projector_hidden_act]
    expected = torch.eye(config.dim, dtype=second.dtype, device=second.device) * second_scale
    if not torch.equal(second, expected) or theirs[f"{PROJECTOR}linear_2.bias"].any():
        raise UserError(
            f"the projector's second layer is not {second_scale:g} times the identity: this LLaVA "
            "is no MiniMind-V"
        )

    # rename
    weights = {}
    for name, their_name in map_names(config).items():
        weight = theirs[their_name]
        if is_rotated(name):
            weight = to_interleaved(weight, config.head_dim)
        elif their_name.startswith(PROJECTOR):
            weight = weight / first_scale
        weights[name] = weight
    # without the row of <image>
    weights["tok_embeddings.weight"] = theirs[f"{TEXT}embed_tokens.weight"][:-1]
    model = MiniMindVLM(config, vision_encoder)
    load_weights(model, weights, "the LLaVA")
    return model.eval()


def to_llava_ids(
    input_ids: torch.Tensor, image_token_indices: torch.Tensor, config: VLMConfig
) -> torch.Tensor:
    """Give the image tokens the id of `<image>`.

    Args:
        input_ids: int64[B, T].
        image_token_indices: int64[n], see `find_image_tokens`.
        config: of the MiniMind-V.

    Returns int64[B, T].
    """
    flat = input_ids.flatten().index_fill(0, image_token_indices, config.vocab_size)  # (B * T,)
    return flat.view_as(input_ids)  # (B, T)


def load_transformers_directory(
    folder: Path, vision_model: Path | None, max_seq_len: int | None = None
) -> tuple[MiniMindVLM, BaseImageProcessor]:
    """Load a LLaVA made by `to_llava`, or the published MiniMind2-V.

    The published directory has our own names for the weights, a config.json of `model_type`
    "minimind-v", and no vision encoder. Code that a directory brings along is not run.

    Args:
        folder: the directory.
        vision_model: folder of the vision encoder; a LLaVA has its own and needs none.
        max_seq_len: most tokens of a sequence; that of the directory if not given.

    Returns (model in eval mode, its image processor).
    """
    with refusing_folder("model", folder):
        facts = read_json(folder / "config.json")
        if facts.get("model_type") == "llava":
            config, image_processor = read_llava_directory(folder, facts, max_seq_len)
            llava = build(LlavaForConditionalGeneration, config, read_folder_weights(folder))
            return from_llava(llava, picture_side(image_processor)), image_processor

    # transformers' own entries of the file are no sizes
    sizes = {name: facts[name] for name in size_names(LMConfig) if facts.get(name) is not None}
    if max_seq_len is not None:
        sizes["max_seq_len"] = max_seq_len
    vision_encoder, image_processor = load_vision_encoder(vision_model)
    config = VLMConfig.for_vision_encoder(vision_encoder, **sizes)
    file = folder / "model.safetensors"
    if not file.is_file():
        file = folder / "pytorch_model.bin"
    return build_with_weights(config, vision_encoder, read_weights(file), file), image_processor


def read_llava_directory(
    folder: Path, facts: dict, max_seq_len: int | None = None
) -> tuple[LlavaConfig, BaseImageProcessor]:
    """Sizes of a LLaVA and its image processor, without its weights.

    Args:
        folder: the directory.
        facts: its config.json.
        max_seq_len: most tokens of a sequence; that of the directory if not given.
    """
    vision_config, _ = read_vision_config(facts.get("vision_config"))
    image_processor = load_own_processor(folder, vision_config)
    side = picture_side(image_processor)
    return read_llava_config(facts, vision_config, side, max_seq_len), image_processor


class EncoderShape(NamedTuple):
    """What a directory's config.json says of its vision encoder: enough for `minimind_config`."""

    n_patches: int
    width: int


def read_directory_config(folder: Path) -> tuple[VLMConfig, BaseImageProcessor]:
    """Sizes of the MiniMind-V in a directory made by `to_llava`, and its image processor.

    For a folder without model.safetensors, such as one of ONNX graphs. UserError where it is
    another model.
    """
    with refusing_folder("model", folder):
        config, image_processor = read_llava_directory(folder, read_json(folder / "config.json"))
        shape = EncoderShape(config.image_seq_length, config.vision_config.hidden_size)
        return minimind_config(config, shape), image_processor
