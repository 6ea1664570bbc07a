"""Weights on disk: published names, atomic writes, and loads that never guess."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.errors import MissingFileError, UserError
from common.files import atomic_write
from model.LMConfig import LMConfig
from model.model_lm import MiniMindLM

STAGES = {0: "pretrain_vlm", 1: "sft_vlm", 2: "sft_vlm_multi"}  # --model_mode -> file name
PROJECTOR = "vision_proj."
_IGNORED = re.compile(
    r"^(mask|pos_cis|rope)$|\.mask$|^vision_encoder\."
)  # buffers and CLIP, in some published files


def weights_path(out_dir: str | Path, name: str, dim: int) -> Path:
    """out/sft_vlm_512.pth and the like; `name` is "lm" or one of STAGES."""
    return Path(out_dir) / f"{name}_{dim}.pth"


def weights_to_save(model: MiniMindLM) -> dict[str, torch.Tensor]:
    """The model's own weights under the published names, without the CLIP vision_encoder."""
    return {
        name: weight for name, weight in model.state_dict().items() if not _IGNORED.search(name)
    }


def save_atomically(payload: object, path: Path) -> None:
    """torch.save that leaves either the old file or the whole new one, whenever the process or the machine stops."""
    with atomic_write(path) as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:
            # The death of a loader worker is raised wherever the main process happens to be.
            if "DataLoader worker" in str(error):
                raise
            # PyTorch reports a full disk as RuntimeError.
            raise OSError(str(error)) from error


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth or .safetensors file, less the buffers and CLIP weights that some published files carry.

    Raises MissingFileError, or UserError for a file that is cut off or holds anything but tensors (no code is run).
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"no weights at {path}: train them first, or fetch the published ones with `python -m scripts.download lm-512` or "
            "`weights-512`, likewise 768"
        )
    weights = read_tensors(path)
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise UserError(f"{path} holds no state dict of tensors: is it a weights file?")
    return {name: weight for name, weight in weights.items() if not _IGNORED.search(name)}


def read_tensors(path: Path) -> dict:
    """What a .pth or .safetensors file holds: tensors, numbers, text. UserError where it is cut off or holds anything else."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # bytes of any kind are read as a pickle, which raises errors of any kind
        raise UserError(
            f"{path} is damaged or not a weights file ({type(error).__name__}): fetch or train it again"
        ) from error


def load_weights(
    model: MiniMindLM,
    weights: dict[str, torch.Tensor],
    source: str | Path,
    language_only: bool = False,
) -> None:
    """Copy `weights` into `model`; every key and every shape has to fit.

    `language_only` accepts weights without a projector, as lm_512.pth is; the model keeps its fresh one then. Raises UserError
    that says which size the file is of, or lists the keys that are missing, unexpected or of another shape.
    """
    _check_sizes(model.config, weights, source)
    expected = weights_to_save(model)
    optional = {name for name in expected if language_only and name.startswith(PROJECTOR)}
    if (
        "output.weight" not in weights and "tok_embeddings.weight" in weights
    ):  # tied: one name is enough
        weights = weights | {"output.weight": weights["tok_embeddings.weight"]}
    problems = {
        "missing": sorted(expected.keys() - weights.keys() - optional),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & weights.keys())
            if weights[name].shape != expected[name].shape
        ],
    }
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items())
        raise UserError(f"{source} does not fit the model, {found}")
    with torch.no_grad():
        for name, weight in weights.items():
            expected[name].copy_(weight)


def _check_sizes(config: LMConfig, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Name the flags that would fit, where the file is simply of another size."""
    embeddings = weights.get("tok_embeddings.weight")
    layers = [int(name.split(".")[1]) for name in weights if re.match(r"layers\.\d+\.", name)]
    if embeddings is None or embeddings.ndim != 2 or not layers:
        raise UserError(
            f"{source} holds no MiniMind language model: its keys are {', '.join(sorted(weights)[:5])} …"
        )
    n_words, dim = embeddings.shape
    n_layers = max(layers) + 1
    if (dim, n_layers) != (config.dim, config.n_layers):
        raise UserError(
            f"{source} is of dim {dim} with {n_layers} layers, not of dim {config.dim} with {config.n_layers}: "
            f"pass --dim {dim} --n_layers {n_layers}"
        )
    if n_words != config.vocab_size:
        raise UserError(
            f"{source} knows {n_words} tokens but the tokenizer has {config.vocab_size}: pass the --tokenizer it was trained with"
        )
