"""The sizes of MiniMind-V <-> those of transformers' stock LLaVA, see llava.py."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from transformers import LlamaConfig, LlavaConfig

from common.errors import UserError
from common.numbers import check_number
from model.LMConfig import IMAGE_TOKEN, VLMConfig
from model.sizes import LANGUAGE_SIZES
from model.vision_families import FAMILIES, find_family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from model.llava import EncoderShape
    from model.vision import VisionEncoder

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
# The projector is one linear map, which LLaVA writes as two layers with an activation between them.
# By the name of the activation: the weight of ours is in the first layer times one number, and the
# second is the identity times the other. vLLM and mlx-vlm know no "linear". gelu(x) is x / 2 around
# 0, so numbers made small go through it unbent: the error is 1e-6 of them. Powers of two cost
# nothing in float32 and bfloat16; float16 has no room for them, and the projector would say 0.
PROJECTOR_SCALES = {"linear": (1.0, 1.0), "gelu": (2.0**-24, 2.0**25)}
# What a Llama may have and ours has not; what is not said is so.
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "rope_type": "default",
}


def find_joints(vision_config: PreTrainedConfig, projector_act: object) -> dict[str, object]:
    """How a LLaVA joins language model and vision encoder; UserError where it cannot be said.

    It reads the states behind the last layer, all of them ("full") or without the first one
    ("default").

    Args:
        vision_config: sizes of the vision encoder.
        projector_act: the activation in the projector, one of PROJECTOR_SCALES; "linear" is put in
            the place of any other.
    """
    family = find_family(vision_config.model_type)
    if family.llava_strategy is None:
        able = ", ".join(one.name for one in FAMILIES.values() if one.llava_strategy)
        raise UserError(
            f"a model with {family.name} cannot become a LLaVA, which leaves out one class token "
            f"at most and knows no CNN: its vision encoder has to be one of {able}"
        )
    return {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": family.llava_strategy,
        "projector_hidden_act": "gelu" if projector_act == "gelu" else "linear",
    }


def llava_config(
    config: VLMConfig, vision_config: PreTrainedConfig, projector_act: object = "linear"
) -> LlavaConfig:
    """The sizes of the LLaVA that computes the same; `projector_act` as for `find_joints`."""
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
        # A copy: transformers writes into what it is given, which may be that of a model.
        vision_config=copy.deepcopy(vision_config),
        text_config=text_config,
        image_token_index=config.vocab_size,
        image_seq_length=config.n_image_tokens,
        tie_word_embeddings=True,
        **find_joints(vision_config, projector_act),
    )


def minimind_config(config: LlavaConfig, vision_encoder: VisionEncoder | EncoderShape) -> VLMConfig:
    """The sizes of the MiniMind-V that computes the same; UserError if there is none.

    Args:
        config: of the LLaVA.
        vision_encoder: its own, or the sizes of that.
    """
    text = config.text_config
    joints = find_joints(config.vision_config, config.projector_hidden_act)
    for name, value in {**joints, "image_token_index": text.vocab_size - 1}.items():
        if getattr(config, name) != value:
            raise UserError(
                f"this LLaVA has {name} {getattr(config, name)}, a MiniMind-V has {value}: "
                "it is another model"
            )
    return VLMConfig.for_vision_encoder(
        vision_encoder,
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


def read_llava_config(
    facts: dict, vision_config: PreTrainedConfig, image_size: int, max_seq_len: int | None
) -> LlavaConfig:
    """The sizes in a LLaVA's config.json; UserError where it is no MiniMind-V.

    Args:
        facts: the whole file.
        vision_config: what it says of the vision encoder, checked.
        image_size: pixels of a side of the pictures that come with it.
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
    n_patches = (image_size // vision_config.patch_size) ** 2
    sizes |= {"image_special_token": IMAGE_TOKEN * n_patches}
    config = VLMConfig(vision_dim=vision_config.hidden_size, **sizes)
    projector_act = facts.get("projector_hidden_act")
    config = llava_config(config, vision_config, projector_act)

    # how the two are joined
    for name in (*find_joints(vision_config, projector_act), "image_token_index"):
        if facts.get(name) != getattr(config, name):
            raise UserError(
                f"this LLaVA has {name} {facts.get(name)!r:.80}, a MiniMind-V has "
                f"{getattr(config, name)}: it is another model"
            )
    return config
