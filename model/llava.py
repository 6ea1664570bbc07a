"""MiniMind-V <-> transformers' stock LLaVA: the same network under other names.

`LlavaForConditionalGeneration` computes what MiniMindVLM computes if its text model is a Llama, its
vision encoder a CLIP, and the second layer of its projector the identity. Two things differ:

- Llama rotates half-split pairs (x0, x8), (x1, x9) ..., MiniMind interleaved ones (x0, x1),
  (x2, x3) ..., so the rows of wq and wk are reordered.
- `<image>` gets a token id of its own behind the vocabulary, so that '@' in text stays text.

The tests use this as an oracle, and `load_vlm` to read a transformers directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from common.errors import UserError
from common.numbers import check_number
from model.files import read_json
from model.LMConfig import LMConfig, VLMConfig, size_names
from model.model_vlm import MiniMindVLM
from model.pretrained import build, load_image_processor, read_folder_weights, refusing_folder
from model.sizes import LANGUAGE_SIZES
from model.vision import load_vision_encoder, make_vision_config
from model.weights import build_with_weights, load_weights, read_weights

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# How LLaVA's names begin.
VISION = "model.vision_tower."
TEXT = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
# How it joins language model and vision encoder.
JOINTS = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "linear",
}
# Our sizes of the language model, and Llama's.
TEXT_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
}
# What a Llama may have and ours has not; what is not said is so.
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "rope_type": "default",
}
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


def llava_config(config: VLMConfig, vision_config: CLIPVisionConfig) -> LlavaConfig:
    """The sizes of the LLaVA that computes the same."""
    text_config = LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.hidden_dim,
        # The last id is <image>.
        vocab_size=config.vocab_size + 1,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_bias=False,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=config.vocab_size,
        image_seq_length=config.n_image_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="linear",
        tie_word_embeddings=True,
    )


def minimind_config(config: LlavaConfig) -> VLMConfig:
    """The sizes of the MiniMind-V that computes the same; UserError if there is none."""
    text = config.text_config
    for name, value in {**JOINTS, "image_token_index": text.vocab_size - 1}.items():
        if getattr(config, name) != value:
            raise UserError(
                f"this LLaVA has {name} {getattr(config, name)}, a MiniMind-V has {value}: "
                "it is another model"
            )
    return VLMConfig.for_vision_encoder(
        config.vision_config,
        dim=text.hidden_size,
        n_layers=text.num_hidden_layers,
        n_heads=text.num_attention_heads,
        n_kv_heads=text.num_key_value_heads,
        vocab_size=text.vocab_size - 1,
        hidden_dim=text.intermediate_size,
        norm_eps=text.rms_norm_eps,
        max_seq_len=text.max_position_embeddings,
        rope_theta=text.rope_parameters["rope_theta"],
    )


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


def to_llava(model: MiniMindVLM) -> LlavaForConditionalGeneration:
    """The stock LLaVA that computes the same as `model`, which has to have its vision encoder."""
    config, ours = model.config, model.state_dict()
    llava = LlavaForConditionalGeneration(llava_config(config, model.vision_encoder.config))

    # what both have
    weights = {
        theirs: to_half_split(ours[name], config.head_dim) if is_rotated(name) else ours[name]
        for name, theirs in map_names(config).items()
    }
    vision_weights = model.vision_encoder.state_dict()
    weights |= {f"{VISION}{name}": weight for name, weight in vision_weights.items()}

    # embeddings: that of <image> is never looked at, so it may be the mean
    embeddings = ours["tok_embeddings.weight"]
    mean = embeddings.mean(dim=0, keepdim=True)
    weights[f"{TEXT}embed_tokens.weight"] = torch.cat((embeddings, mean))
    weights["lm_head.weight"] = weights[f"{TEXT}embed_tokens.weight"]

    # the projector's second layer: the identity
    weights[f"{PROJECTOR}linear_2.weight"] = torch.eye(config.dim)
    weights[f"{PROJECTOR}linear_2.bias"] = torch.zeros(config.dim)
    llava.load_state_dict(weights)
    return llava.eval()


def from_llava(llava: LlavaForConditionalGeneration) -> MiniMindVLM:
    """The MiniMind-V that computes the same as a LLaVA, sharing its vision encoder.

    Accepted is what `to_llava` makes, also after further training that left the second layer of
    the projector alone: a Llama behind a CLIP whose last layer is read without the class token, a
    projector that is linear and whose second layer is the identity, `<image>` as the last token.
    UserError for any other LLaVA.
    """
    # does it fit
    config = minimind_config(llava.config)
    theirs = llava.state_dict()
    second = theirs[f"{PROJECTOR}linear_2.weight"]
    identity = torch.eye(config.dim, dtype=second.dtype, device=second.device)
    if not torch.equal(second, identity) or theirs[f"{PROJECTOR}linear_2.bias"].any():
        raise UserError(
            "the projector's second layer is not the identity: this LLaVA is no MiniMind-V"
        )

    # rename
    weights = {}
    for name, their_name in map_names(config).items():
        weight = theirs[their_name]
        weights[name] = to_interleaved(weight, config.head_dim) if is_rotated(name) else weight
    # without the row of <image>
    weights["tok_embeddings.weight"] = theirs[f"{TEXT}embed_tokens.weight"][:-1]
    model = MiniMindVLM(config, llava.model.vision_tower)
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
) -> tuple[MiniMindVLM, CLIPImageProcessorPil]:
    """Load a LLaVA made by `to_llava`, or the published MiniMind2-V.

    The published directory has our own names for the weights, a config.json of `model_type`
    "minimind-v", and no CLIP. Code that a directory brings along is not run.

    Args:
        folder: the directory.
        vision_model: folder of CLIP; a LLaVA has its own and needs none.
        max_seq_len: most tokens of a sequence; that of the directory if not given.

    Returns (model in eval mode, its image processor).
    """
    with refusing_folder("model", folder):
        facts = read_json(folder / "config.json")
        if facts.get("model_type") == "llava":
            config = read_llava_config(facts, max_seq_len)
            llava = build(LlavaForConditionalGeneration, config, read_folder_weights(folder))
            size = config.vision_config.image_size
            return from_llava(llava), load_image_processor(folder, size)

    # transformers' own entries of the file are no sizes
    sizes = {name: facts[name] for name in size_names(LMConfig) if facts.get(name) is not None}
    if max_seq_len is not None:
        sizes["max_seq_len"] = max_seq_len
    vision_encoder, image_processor = load_vision_encoder(vision_model)
    config = VLMConfig.for_vision_encoder(vision_encoder.config, **sizes)
    file = folder / "model.safetensors"
    if not file.is_file():
        file = folder / "pytorch_model.bin"
    return build_with_weights(config, vision_encoder, read_weights(file), file), image_processor


def read_llava_config(facts: dict, max_seq_len: int | None) -> LlavaConfig:
    """The sizes in a LLaVA's config.json; UserError where it is no MiniMind-V.

    Args:
        facts: the whole file.
        max_seq_len: most tokens of a sequence; that of the file if not given.
    """
    # a Llama and nothing more
    text = facts.get("text_config")
    if not isinstance(text, dict):
        raise UserError("config.json has no text_config")
    rope = text.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters in config.json is {rope!r:.80}: it has to be an object")
    found = {**LLAMA, "rope_type": rope.get("rope_type", "default"), **text}
    for name, value in LLAMA.items():
        if found[name] != value:
            raise UserError(f"its {name} is {found[name]!r:.80}, a MiniMind-V has {value}")

    # its sizes, under our names
    text = text | {"rope_theta": rope.get("rope_theta", text.get("rope_theta"))}
    sizes = {}
    for ours, theirs in TEXT_SIZES.items():
        sizes[ours] = text.get(theirs)
        check_number(f"{theirs} in config.json", sizes[ours], *LANGUAGE_SIZES[ours])
    if max_seq_len is not None:
        sizes["max_seq_len"] = max_seq_len
    # The last token is <image>.
    sizes["vocab_size"] -= 1
    vision_config = make_vision_config(facts.get("vision_config"))
    config = llava_config(VLMConfig.for_vision_encoder(vision_config, **sizes), vision_config)

    # how the two are joined
    for name in (*JOINTS, "image_token_index"):
        if facts.get(name) != getattr(config, name):
            raise UserError(
                f"this LLaVA has {name} {facts.get(name)!r:.80}, a MiniMind-V has "
                f"{getattr(config, name)}: it is another model"
            )
    return config
