"""A directory that transformers reads without any code of ours, and other tools after it.

transformers 5 reads what its own `save_pretrained` writes; transformers 4, vLLM and transformers.js
do not, and some of them only warn, or not even that. So every file is written here with the names
that all of them know: LLaVA's first ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save

from common.files import write_text
from common.text import IMAGE_TAG
from model.llava import PROJECTOR, TEXT, VISION, to_llava
from model.llava_config import llava_config
from model.vision import as_vision_encoder
from scripts.export.model_card import model_card
from scripts.export.tokenizer_files import chat_template, tokenizer_config, tokenizer_json

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration

    from inference import VLM
    from scripts.export.config import ExportConfig

# What transformers 5 calls otherwise than the versions before it, which it reads as well: the parts
# of a LLaVA, and those of a vision encoder by its kind.
FIRST_NAMES = {VISION: "vision_tower.", TEXT: "language_model.model.", PROJECTOR: PROJECTOR[6:]}
FIRST_VISION_NAMES = {
    "clip_vision_model": {"vision_tower.": "vision_tower.vision_model."},
    "siglip_vision_model": {"vision_tower.": "vision_tower.vision_model."},
    "dinov2": {
        "attention.q_proj.": "attention.attention.query.",
        "attention.k_proj.": "attention.attention.key.",
        "attention.v_proj.": "attention.attention.value.",
        "attention.o_proj.": "attention.output.dense.",
    },
}
# Tokens of an answer if nobody says how many, as here.
MAX_NEW_TOKENS = 512


def write(vlm: VLM, folder: Path, config: ExportConfig) -> None:
    """Write the whole directory: weights, the small files, and the model card."""
    llava = to_llava(vlm.model, "gelu")
    (folder / "model.safetensors").write_bytes(save(name_weights(llava), {"format": "pt"}))
    write_small_files(vlm, folder)
    write_text(folder / "README.md", model_card(vlm, config))


def write_small_files(vlm: VLM, folder: Path) -> None:
    """Write all but weights and model card: sizes, tokenizer, processor; 1 MB at most."""
    template = chat_template(vlm.processor)
    write_text(folder / "chat_template.jinja", template)
    files = {
        "config.json": describe_model(vlm),
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "max_new_tokens": MAX_NEW_TOKENS,
            # An answer is text.
            "suppress_tokens": [vlm.model.config.vocab_size],
        },
        "tokenizer.json": tokenizer_json(vlm.processor),
        "tokenizer_config.json": tokenizer_config(vlm.processor, template),
        "preprocessor_config.json": describe_images(vlm),
        "processor_config.json": describe_processor(vlm),
    }
    for name, facts in files.items():
        write_text(folder / name, json.dumps(facts, ensure_ascii=False, indent=2) + "\n")


def name_weights(llava: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Its tensors under LLaVA's first names; the output embeddings are the input ones."""
    weights = llava.state_dict()
    del weights["lm_head.weight"]
    vision_names = FIRST_VISION_NAMES[llava.config.vision_config.model_type]
    for new, first in (FIRST_NAMES | vision_names).items():
        weights = {name.replace(new, first, 1): weight for name, weight in weights.items()}
    return weights


def describe_model(vlm: VLM) -> dict:
    """config.json."""
    config = vlm.model.config
    vision_config = as_vision_encoder(vlm.model.vision_encoder).config
    facts = json.loads(llava_config(config, vision_config, "gelu").to_json_string())
    facts |= {"architectures": ["LlavaForConditionalGeneration"], "dtype": "float32"}
    # transformers 4 looks for it here, and takes 10,000 if it is not there
    facts["text_config"]["rope_theta"] = config.rope_theta
    # a place on this machine
    facts["vision_config"].pop("_name_or_path", None)
    return facts


def describe_images(vlm: VLM) -> dict:
    """preprocessor_config.json."""
    facts = json.loads(vlm.processor.image_processor.to_json_string())
    return facts | {"processor_class": "LlavaProcessor"}


def describe_processor(vlm: VLM) -> dict:
    """processor_config.json: how many `<image>` tokens a picture has.

    They are as many as its patches. Said by "full" and 0 additional tokens every tool counts so;
    by "default" and 1, as config.json has to say it of a CLIP, transformers.js counts one more.
    """
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TAG,
        "patch_size": as_vision_encoder(vlm.model.vision_encoder).config.patch_size,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }
