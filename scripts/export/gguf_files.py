"""GGUF files for llama.cpp and the programs that are built on it.

    NAME-F16.gguf, NAME-Q8_0.gguf, NAME-Q4_0.gguf    the language model, in three precisions
    mmproj-NAME-F16.gguf                             what sees, see gguf_vision.py

To llama.cpp the language model is a Llama. It rotates interleaved pairs as ours does, so no row is
reordered. Its tokenizer is GPT-2's with another vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from common.errors import UserError
from model.model_lm import MiniMindLM
from scripts.export.gguf_vision import (
    check_vision_encoder,
    describe_class_token,
    write_vision_encoder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inference import VLM
    from scripts.export.config import ExportConfig

# Precision in a file's name -> that of the matrices, and of the embeddings, which are the output
# head too. Names are llama.cpp's.
F16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F16", "Q8_0", "Q4_0"))
PRECISIONS = {"F16": (F16, F16), "Q8_0": (Q8_0, Q8_0), "Q4_0": (Q4_0, Q8_0)}
# Our names within a layer, and llama.cpp's.
LAYER_NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
EMBEDDINGS = "token_embd.weight"
# llama.cpp splits a text at its pictures, and our models have a line break behind each picture.
# In the text that the template gets, a picture is a mark such as <__media_1a2b__>.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{ '<s>system\\n' + SYSTEM + '</s>\\n' }}{% endif -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if '<__media' in content -%}
{%- set content = content | replace('__>', '__>\\n') | replace('__>\\n\\n', '__>\\n') -%}
{%- endif -%}
{{- '<s>' + message['role'] + '\\n' + content + '</s>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif -%}
"""


def write(vlm: VLM, folder: Path, config: ExportConfig) -> None:
    """Write folder/gguf. UserError where llama.cpp has no such tokenizer or vision encoder."""
    # what cannot be written is said before anything is
    tokens = read_tokenizer(vlm.processor.tokenizer)
    check_vision_encoder(vlm.model.vision_encoder)
    is_file = vlm.weights.suffix == ".pth"
    name = vlm.weights.stem if is_file else f"minimind-v-{vlm.model.config.dim}"
    folder = folder / "gguf"
    folder.mkdir()

    # the language model
    system = json.dumps(vlm.processor.default_system, ensure_ascii=False)
    template = CHAT_TEMPLATE.replace("SYSTEM", system)
    for precision in PRECISIONS:
        writer = gguf.GGUFWriter(folder / f"{name}-{precision}.gguf", "llama")
        add_sizes(writer, vlm.model, name, precision)
        add_tokenizer(writer, tokens)
        writer.add_chat_template(template)
        for tensor_name, tensor in name_tensors(vlm.model):
            add_matrix(writer, tensor_name, tensor, precision)
        save(writer)

    # the vision encoder
    writer = gguf.GGUFWriter(folder / f"mmproj-{name}-F16.gguf", "clip")
    write_vision_encoder(writer, vlm, config.gguf_class_token)
    save(writer)
    print(describe_class_token(vlm.model.vision_encoder, config.gguf_class_token))


def save(writer: gguf.GGUFWriter) -> None:
    """Write the file, whose parts have been added, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, model: MiniMindLM, name: str, precision: str) -> None:
    """The sizes of the language model, under the names of a Llama."""
    config = model.config
    # A file's name may be any bytes, this one is text.
    writer.add_name(name.encode("utf-8", "replace").decode())
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{precision}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_context_length(config.max_seq_len)
    writer.add_vocab_size(config.vocab_size)


def name_tensors(model: MiniMindLM) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, float32 values) of each tensor of the language model."""
    weights = model.state_dict()
    names = {"tok_embeddings.weight": EMBEDDINGS, "norm.weight": "output_norm.weight"}
    for layer in range(model.config.n_layers):
        for ours, theirs in LAYER_NAMES.items():
            names[f"layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for ours, theirs in names.items():
        yield theirs, weights[ours].float().numpy()


def add_matrix(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, precision: str) -> None:
    """Add a tensor of the language model.

    Args:
        writer: of the file.
        name: llama.cpp's.
        tensor: float32[out, in], or float32[dim], a norm's, which stays as it is.
        precision: of the file.
    """
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor)
        return
    of_matrices, of_embeddings = PRECISIONS[precision]
    kind = of_embeddings if name == EMBEDDINGS else of_matrices
    # Rows are quantized in blocks of 32 numbers.
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    kind = kind if tensor.shape[1] % block_size == 0 else F16
    writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)


def read_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What is in tokenizer.json; UserError where it is not of GPT-2's kind, as llama.cpp needs."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, splitter = facts["model"]["type"], facts["pre_tokenizer"] or {}
    if kind != "BPE" or not facts["model"]["merges"]:
        raise UserError(
            f"a tokenizer of the kind {kind} with {len(facts['model'].get('merges', []))} merges "
            "cannot be written as GGUF: llama.cpp needs a BPE with merges"
        )
    is_byte_level = splitter.get("type") == "ByteLevel" and splitter["use_regex"]
    if not is_byte_level or splitter["add_prefix_space"] or facts["normalizer"]:
        raise UserError(
            "this tokenizer cannot be written as GGUF: its pre_tokenizer has to be ByteLevel "
            "without add_prefix_space, and its normalizer null"
        )
    return facts


def add_tokenizer(writer: gguf.GGUFWriter, facts: dict) -> None:
    """Vocabulary and merges of a tokenizer.json.

    Args:
        writer: of the file.
        facts: see `read_tokenizer`.
    """
    # its tokens, by id
    ids = facts["model"]["vocab"] | {
        token["content"]: token["id"] for token in facts["added_tokens"]
    }
    kinds = dict.fromkeys(ids, gguf.TokenType.NORMAL)
    for token in facts["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        kinds[token["content"]] = kind
    tokens = sorted(ids, key=ids.get)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token] for token in tokens])

    # how a text is split; the ids of the format are those that `load_tokenizer` has checked
    merges = facts["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_pad_token_id(ids["<unk>"])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    # The template writes the first <s>.
    writer.add_add_bos_token(False)
