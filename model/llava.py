"""MiniMind-V <-> transformers' stock LLaVA: the same network under other names.

`LlavaForConditionalGeneration` with a Llama text model, a CLIP vision_encoder and a projector whose second layer is the identity
computes what MiniMindVLM computes. Two things differ: Llama rotates half-split pairs (x0, x8), (x1, x9) … where
MiniMind rotates interleaved ones, so the rows of wq and wk are reordered; and `<image>` gets a token id of its own
behind the vocabulary, so that a plain '@' in text stays text. The tests use this as an oracle, `eval_vlm.py --load 1`
to read a transformers directory.
"""

import inspect
import json
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common.errors import MissingFileError, UserError
from model.LMConfig import LMConfig, VLMConfig
from model.model_vlm import MiniMindVLM
from model.vision import load_vision_encoder, quiet_transformers
from model.weights import load_weights, read_weights

TOWER = "model.vision_tower."
TEXT = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
_LAYER_NAMES = {
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
    text_config = LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size + 1,  # the last id is <image>
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
    """The sizes of a LLaVA directory that `to_llava` could have made; UserError for any other LLaVA."""
    wanted = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "linear",
        "image_token_index": config.text_config.vocab_size - 1,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise UserError(
                f"this LLaVA has {name} {getattr(config, name)}, a MiniMind-V has {value}: it is another model"
            )
    text = config.text_config
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


def _names(config: VLMConfig) -> dict[str, str]:
    """MiniMind name -> LLaVA name, where one tensor becomes one tensor."""
    names = {"norm.weight": TEXT + "norm.weight"}
    for layer in range(config.n_layers):
        for ours, theirs in _LAYER_NAMES.items():
            names[f"layers.{layer}.{ours}.weight"] = f"{TEXT}layers.{layer}.{theirs}.weight"
    for kind in ("weight", "bias"):
        names[f"vision_proj.vision_proj.0.{kind}"] = f"{PROJECTOR}linear_1.{kind}"
    return names


def _is_rotated(name: str) -> bool:
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def to_half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of wq or wk: interleaved (x0, y0, x1, y1 …) -> half-split (x0, x1 …, y0, y1 …), head by head."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (heads, head_dim / 2, 2, dim)
    return pairs.transpose(1, 2).flatten(0, 2)  # (heads * head_dim, dim)


def to_interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `to_half_split`."""
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))  # (heads, 2, head_dim / 2, dim)
    return halves.transpose(1, 2).flatten(0, 2)  # (heads * head_dim, dim)


def to_llava(model: MiniMindVLM) -> LlavaForConditionalGeneration:
    """The stock LLaVA that computes the same; the row of `<image>` is the mean embedding (it is never looked at)."""
    config = model.config
    llava = LlavaForConditionalGeneration(llava_config(config, model.vision_encoder.config))
    ours, names = model.state_dict(), _names(config)
    weights = {
        theirs: to_half_split(ours[name], config.head_dim) if _is_rotated(name) else ours[name]
        for name, theirs in names.items()
    }
    embeddings = ours["tok_embeddings.weight"]
    weights[TEXT + "embed_tokens.weight"] = torch.cat(
        (embeddings, embeddings.mean(dim=0, keepdim=True))
    )
    weights["lm_head.weight"] = weights[TEXT + "embed_tokens.weight"]
    weights[PROJECTOR + "linear_2.weight"] = torch.eye(config.dim)
    weights[PROJECTOR + "linear_2.bias"] = torch.zeros(config.dim)
    weights |= {TOWER + name: weight for name, weight in model.vision_encoder.state_dict().items()}
    llava.load_state_dict(weights)
    return llava.eval()


def from_llava(llava: LlavaForConditionalGeneration) -> MiniMindVLM:
    """The MiniMind-V that computes the same as this LLaVA; UserError where it has no such form."""
    config = minimind_config(llava.config)
    theirs = llava.state_dict()
    identity = torch.eye(config.dim, dtype=theirs[PROJECTOR + "linear_2.weight"].dtype)
    if (
        not torch.equal(theirs[PROJECTOR + "linear_2.weight"], identity)
        or theirs[PROJECTOR + "linear_2.bias"].any()
    ):
        raise UserError(
            "the projector's second layer is not the identity: this LLaVA is no MiniMind-V"
        )
    weights = {
        name: to_interleaved(theirs[their_name], config.head_dim)
        if _is_rotated(name)
        else theirs[their_name]
        for name, their_name in _names(config).items()
    }
    weights["tok_embeddings.weight"] = theirs[TEXT + "embed_tokens.weight"][:-1]
    model = MiniMindVLM(config, llava.model.vision_tower)
    load_weights(model, weights, "the LLaVA")
    return model.eval()


def to_llava_ids(
    input_ids: torch.Tensor, image_token_indices: torch.Tensor, config: VLMConfig
) -> torch.Tensor:
    """Give the placeholders (`find_image_tokens`) of int64[B, T] the id of `<image>`."""
    return (
        input_ids.flatten().index_fill(0, image_token_indices, config.vocab_size).view_as(input_ids)
    )  # (B, T)


def load_transformers_directory(
    folder: str | Path, vision_model: str | Path
) -> tuple[MiniMindVLM, CLIPImageProcessorPil]:
    """(model, image processor) from a transformers directory: a LLaVA made by `to_llava`, or the published MiniMind2-V.

    The published layout has our own key names beside a config.json of `model_type` "minimind-v" and no CLIP, which then
    comes from `vision_model`. Code that a directory brings along is not run.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise MissingFileError(
            f"no transformers directory at {folder}: fetch it with `hf download jingyaogong/MiniMind2-V "
            f"--local-dir {folder}`"
        )
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if sizes.get("model_type") == "llava":
        return _load_llava(folder)
    vision_encoder, image_processor = load_vision_encoder(vision_model)
    known = inspect.signature(LMConfig.__init__).parameters
    config = VLMConfig.for_vision_encoder(
        vision_encoder.config, **{name: size for name, size in sizes.items() if name in known}
    )
    file = folder / "model.safetensors"
    file = file if file.is_file() else folder / "pytorch_model.bin"
    model = MiniMindVLM(config, vision_encoder)
    load_weights(model, read_weights(file), file)
    return model.eval(), image_processor


def _load_llava(folder: Path) -> tuple[MiniMindVLM, CLIPImageProcessorPil]:
    with quiet_transformers():
        llava = LlavaForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        image_processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return from_llava(llava), image_processor
