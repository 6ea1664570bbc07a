"""Weights on disk: published names, whole files, and loads that never guess.

Training writes two files: NAME_DIM.pth, a state dict under the published names and without CLIP,
and NAME_DIM.json, which says what it is (`save_weights`). Published files have no JSON; their
sizes are read off the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import UserError
from common.files import write_text
from model.files import find_weights, info_path, read_info
from model.LMConfig import LMConfig, VLMConfig
from model.model_lm import MiniMindLM
from model.model_vlm import MiniMindVLM
from model.tensor_files import check_numbers, read_tensors, refusing_damage, save_atomically

if TYPE_CHECKING:
    from model.vision import VisionEncoder

PROJECTOR = "vision_proj."
MOST_NAMED = 8  # keys in a message
# Buffers and CLIP weights, which some published files carry.
_IGNORED = re.compile(r"^(mask|pos_cis|rope)$|\.mask$|^vision_encoder\.")
# What a network was wrapped in when it was saved: DistributedDataParallel, torch.compile.
_WRAPPERS = re.compile(r"^module\.|\b_orig_mod\.")
# Where a state dict lies in what others, and our own run states, save as one file.
_STATE_DICT_KEYS = ("weights", "model", "state_dict", "model_state_dict", "module")
# What may differ between a file and the model: no weight depends on it.
FREE_SIZES = ("max_seq_len", "dropout", "multiple_of")


def select_weights(model: MiniMindLM) -> dict[str, torch.Tensor]:
    """The model's own weights under the published names, without the vision encoder."""
    state = model.state_dict()
    return {name: weight for name, weight in state.items() if not _IGNORED.search(name)}


def describe_config(config: LMConfig) -> dict[str, int | float]:
    """All sizes of the network, as plain numbers."""
    sizes = config.language_sizes()
    if isinstance(config, VLMConfig):
        sizes |= {"vision_dim": config.vision_dim, "n_image_tokens": config.n_image_tokens}
    return sizes


def save_weights(model: MiniMindLM, path: Path, **facts) -> None:
    """Write the weights, and beside them the JSON that says what they are.

    Args:
        model: its weights are saved, without the vision encoder.
        path: of the .pth file.
        facts: what else the JSON says: tokenizer, vision_model, stage, data, question, step,
            val_loss.
    """
    # First the JSON: weights that replace others must not be described by the old one.
    info = {"config": describe_config(model.config), **facts}
    write_text(info_path(path), json.dumps(info, ensure_ascii=False, indent=1) + "\n")
    save_atomically(select_weights(model), path)


def read_weights(path: str | Path, only_shapes: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a .pth or .safetensors file, without the buffers some published files carry.

    Those of a network that was wrapped (`module.`, `_orig_mod.`) get its own names; in a file that
    holds more than them, such as a run state, they are found. With `only_shapes` the numbers stay
    on disk and are not checked, see `read_tensors`. MissingFileError, or UserError for a file that
    is damaged, holds anything but tensors, or holds nan or infinity.
    """
    content = read_tensors(find_weights(path), only_shapes)
    weights = find_state_dict(content)
    if weights is None:
        raise UserError(f"{path} holds no state dict of tensors: is it a weights file?")
    named = {_WRAPPERS.sub("", str(name)): weight for name, weight in weights.items()}
    kept = {name: weight for name, weight in named.items() if not _IGNORED.search(name)}
    if not only_shapes:
        with refusing_damage(path):
            check_numbers(kept, path)
    return kept


def find_state_dict(content: object) -> Mapping[str, torch.Tensor] | None:
    """The mapping of names to tensors that `content` is, or has under a usual key; else None."""
    if not isinstance(content, Mapping):
        return None
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    inner = (content[key] for key in _STATE_DICT_KEYS if key in content)
    return next(filter(None, map(find_state_dict, inner)), None)


def read_sizes(weights: Mapping[str, torch.Tensor], source: str | Path) -> dict[str, int]:
    """dim, n_layers, vocab_size and hidden_dim, read off the tensors of a state dict."""
    embeddings = weights.get("tok_embeddings.weight")
    layers = [int(name.split(".")[1]) for name in weights if re.match(r"layers\.\d+\.", name)]
    if "model.embed_tokens.weight" in weights:
        raise UserError(
            f"{source} is of the newer MiniMind (model.embed_tokens …), another network: take the "
            "weights of early 2025, `python -m scripts.download lm-512` fetches them"
        )
    if embeddings is None or embeddings.ndim != 2 or not layers:
        raise UserError(
            f"{source} holds no MiniMind language model: its keys are "
            f"{', '.join(sorted(weights)[:5])} …"
        )
    sizes = {
        "dim": embeddings.shape[1],
        "n_layers": max(layers) + 1,
        "vocab_size": embeddings.shape[0],
    }
    feed_forward = weights.get("layers.0.feed_forward.w1.weight")
    if feed_forward is not None:
        sizes["hidden_dim"] = feed_forward.shape[0]
    return sizes


def load_weights(
    model: MiniMindLM,
    weights: Mapping[str, torch.Tensor],
    source: str | Path,
    language_only: bool = False,
) -> None:
    """Copy `weights` into `model`; every key and every shape has to fit, see `check_weights`."""
    check_weights(model, weights, source, language_only)
    own = select_weights(model)
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)


def build_with_weights(
    config: VLMConfig,
    vision_encoder: VisionEncoder,
    weights: Mapping[str, torch.Tensor],
    source: str | Path,
) -> MiniMindVLM:
    """A network of these sizes, with its vision encoder and these weights, in eval mode."""
    # Sizes that the weights do not bear out would take memory before that is found out.
    with torch.device("meta"):
        check_weights(MiniMindVLM(config), weights, source)
    model = MiniMindVLM(config, vision_encoder)
    load_weights(model, weights, source)
    return model.eval()


def check_weights(
    model: MiniMindLM,
    weights: Mapping[str, torch.Tensor],
    source: str | Path,
    language_only: bool = False,
) -> None:
    """UserError names sizes that differ, or keys that are missing, unexpected or of another shape.

    Args:
        model: what is to receive the weights; one on the "meta" device will do.
        weights: a state dict under the published names.
        source: the file they come from; the JSON beside it, if any, has to agree with the model.
        language_only: accept weights without a projector, as lm_512.pth is; the model then keeps
            its own.
    """
    # Sizes first: they explain a hundred shapes.
    _check_described_sizes(model.config, read_info(source).get("config", {}), source)
    _check_tensor_sizes(model.config, weights, source)

    # Input and output embeddings are one tensor; one of the two names is enough.
    expected = {name: weight.shape for name, weight in select_weights(model).items()}
    given = {name: weight.shape for name, weight in weights.items()}
    optional = {name for name in expected if language_only and name.startswith(PROJECTOR)}
    problems = {
        "missing": sorted(expected.keys() - given.keys() - optional - {"output.weight"}),
        "unexpected": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(given[name])} instead of {tuple(expected[name])}"
            for name in sorted(expected.keys() & given.keys())
            if given[name] != expected[name]
        ],
    }
    found = "; ".join(f"{kind}: {_list_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise UserError(f"{source} does not fit the model, {found}")


def _list_some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(f"{name:.200}" for name in names[:MOST_NAMED]) + more


def _check_described_sizes(config: LMConfig, described: dict, source: str | Path) -> None:
    """Compare with the JSON beside the weights; it knows what no shape shows: rope_theta."""
    ours = describe_config(config)
    # Some sizes have flags; `_check_tensor_sizes` names these.
    others = (*FREE_SIZES, "dim", "n_layers", "vocab_size")
    different = [
        name
        for name in described
        if name in ours and name not in others and described[name] != ours[name]
    ]
    if different:
        theirs = ", ".join(f"{name} {described[name]}" for name in different)
        mine = ", ".join(f"{name} {ours[name]}" for name in different)
        raise UserError(
            f"{source} was trained with {theirs}, but the model here has {mine}: "
            "use the sizes it was trained with"
        )


def _check_tensor_sizes(
    config: LMConfig, weights: Mapping[str, torch.Tensor], source: str | Path
) -> None:
    """Compare with the shapes of the tensors; the message names the flags that fit."""
    sizes = read_sizes(weights, source)
    dim, n_layers = sizes["dim"], sizes["n_layers"]
    if (dim, n_layers) != (config.dim, config.n_layers):
        raise UserError(
            f"{source} is of dim {dim} with {n_layers} layers, not of dim {config.dim} with "
            f"{config.n_layers}: pass --dim {dim} --n_layers {n_layers}, or leave them out"
        )
    if sizes["vocab_size"] != config.vocab_size:
        raise UserError(
            f"{source} knows {sizes['vocab_size']} tokens but the tokenizer has "
            f"{config.vocab_size}: pass the --tokenizer it was trained with"
        )
    keys = weights.get("layers.0.attention.wk.weight")
    if keys is not None:
        sizes["n_kv_heads"] = keys.shape[0] // config.head_dim
    for name in ("hidden_dim", "n_kv_heads"):
        if name in sizes and sizes[name] != getattr(config, name):
            raise UserError(
                f"{source} has {name} {sizes[name]}, but the model here has {name} "
                f"{getattr(config, name)}: use the sizes it was trained with"
            )
