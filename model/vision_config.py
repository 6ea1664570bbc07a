"""The sizes in a vision encoder's config.json, each of them checked before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import UserError
from common.numbers import check_number
from model.sizes import VISION_LISTS, VISION_SIZES, check_sizes
from model.vision_families import HALVES, find_family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Whether a part is there.
FLAGS = (
    *("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
    *("use_swiglu_ffn", "use_gated_mlp", "use_mask_token", "tf_padding", "finegrained_output"),
    *("downsample_in_first_stage", "downsample_in_bottleneck", "first_layer_is_expansion"),
)
NAMES = {*VISION_SIZES, *VISION_LISTS, *FLAGS, "hidden_act", "layer_type"}
# Kinds of layers of ResNet and RegNet.
LAYER_TYPES = ("basic", "bottleneck", "x", "y")
# Stages of a CNN, and blocks in the longest list.
MOST_STAGES, MOST_BLOCKS = 8, 64


def read_vision_config(facts: object) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """(the configuration of a vision encoder, its class in transformers).

    Of the file only what the network is made of is taken: names in the tables of sizes, the flags
    above. What is missing is as in transformers.

    Args:
        facts: a config.json, or the vision_config in one; of a model with two halves the vision
            half is taken. A file of no model_type is CLIP's, as it has always been.

    UserError where it cannot be.
    """
    # This takes 2.5 s, so it is not paid before it is needed.
    import transformers

    # the family
    if not isinstance(facts, dict):
        raise UserError("config.json has no vision_config")
    half = facts.get("vision_config", facts)
    if not isinstance(half, dict):
        raise UserError("config.json has no vision_config")
    model_type = half.get("model_type") or facts.get("model_type") or "clip"
    model_type = HALVES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    family = find_family(model_type, "config.json")
    config_class = getattr(transformers, f"{family.classes}Config")

    # each by itself
    known = config_class.__dataclass_fields__
    given = {name: value for name, value in half.items() if name in known and value is not None}
    chosen = choose_facts(given)
    _check_facts(chosen)
    if given.get("num_channels", 3) != 3:
        raise UserError(
            f"num_channels in config.json is {given['num_channels']!r:.40}: colors are 3"
        )
    # The head that pools a SigLIP's patches into one is of no use here.
    if "vision_use_head" in known:
        chosen["vision_use_head"] = False

    # all together
    config = config_class(**chosen)
    _check_together(config)
    return config, getattr(transformers, f"{family.classes}Model")


def choose_facts(facts: dict[str, object]) -> dict[str, object]:
    """What the network is made of; the rest of a file is for training, or for nothing."""
    return {name: value for name, value in sorted(facts.items()) if name in NAMES}


def _check_facts(facts: dict[str, object]) -> None:
    """UserError for a value that is not as our tables say."""
    from transformers.activations import ACT2FN

    check_sizes(facts, VISION_SIZES, "config.json")
    choices = {"hidden_act": list(ACT2FN), "layer_type": LAYER_TYPES}
    for name, value in facts.items():
        if name in VISION_LISTS:
            most = MOST_BLOCKS if name == "depthwise_padding" else MOST_STAGES
            if not isinstance(value, list) or len(value) > most:
                raise UserError(
                    f"{name} in config.json is {value!r:.40}: it has to be a list of at most {most}"
                )
            for number in value:
                check_number(f"{name} in config.json", number, *VISION_LISTS[name])
        elif name in FLAGS and not isinstance(value, bool):
            raise UserError(f"{name} in config.json is {value!r:.40}: it has to be true or false")
        elif name in choices and value not in choices[name]:
            raise UserError(f"{name} in config.json is {value!r:.40}: none is so called")


def _check_together(config: PreTrainedConfig) -> None:
    """UserError where sizes that are right by themselves do not fit."""
    heads = getattr(config, "num_attention_heads", None)
    if heads and config.hidden_size % heads:
        raise UserError(
            f"hidden_size {config.hidden_size} in config.json does not split into {heads} heads"
        )
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image, int) and isinstance(patch, int) and image < patch:
        raise UserError(f"image_size {image} in config.json is smaller than its patch_size {patch}")
    # One entry for each stage.
    names = [name for name in VISION_LISTS if name != "depthwise_padding" and hasattr(config, name)]
    lengths = {name: len(getattr(config, name)) for name in names}
    if len(set(lengths.values())) > 1:
        words = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"lists in config.json have different lengths: {words}")
