"""A folder in the format of transformers, read without letting it decide what runs.

Of its JSON files only sizes are taken, each of them checked; its weights are read as any others
are (tensor_files.py); which class they go into is written in our code. So whatever else a folder
brings along, such as code (`auto_map`), adapters or kernels, is not even looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import UserError
from model.files import read_json
from model.tensor_files import check_numbers, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The better one first; each may be in parts, with a list of them beside.
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


@contextmanager
def refusing_folder(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever is raised while a folder is loaded into a UserError that names it."""
    try:
        with quiet_transformers():
            yield
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The tokenizers library panics, which is no Exception.
        # A folder "model" is not named by "model.safetensors".
        names = (f"{folder}{os.sep}", f" in {folder} ")
        if isinstance(error, UserError) and any(name in str(error) for name in names):
            raise
        first, *others = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"{first} {others[0].strip()}" if first.endswith(":") and others else first
        raise UserError(
            f"cannot load the {what} in {folder} ({reason:.300}): fetch it again"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report of keys left out on purpose (CLIP's text half)."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def read_folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, which may be in parts; UserError where one is missing or damaged."""
    for name in WEIGHTS_FILES:
        path, parts = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return _read_checked(path)
        if parts.is_file():
            return _read_parts(folder, read_json(parts))
    raise UserError(f"it has neither {' nor '.join(WEIGHTS_FILES)}")


def _read_parts(folder: Path, index: dict) -> dict[str, torch.Tensor]:
    """The tensors of all files that the list of parts names."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError("its list of parts has no weight_map")
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(set(places.values())):
        # A part lies in the folder itself.
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"its part {name!r:.100} is not there")
        weights |= _read_checked(folder / name)
    return weights


def _read_checked(path: Path) -> dict[str, torch.Tensor]:
    weights = read_tensors(path)
    if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise UserError(f"{path.name} holds other things than tensors")
    check_numbers(weights, path.name)
    return weights


def build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: Mapping[str, torch.Tensor],
) -> PreTrainedModel:
    """The network of these sizes with these weights, in eval mode and float32.

    Its class knows by what other names older versions of transformers called them; tensors that it
    has no place for are left out. UserError where some are missing or of another shape.
    """
    # Sizes that the weights do not bear out would take memory before that is found out.
    with torch.device("meta"):
        n_numbers = sum(weight.numel() for weight in model_class(config).parameters())
    n_given = sum(weight.numel() for weight in weights.values())
    if n_numbers > n_given:
        raise UserError(f"config.json speaks of {n_numbers:,} numbers, its weights are {n_given:,}")

    model, found = model_class.from_pretrained(
        None,
        config=config,
        state_dict=dict(weights),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # transformers fills missing weights with random numbers
    if found["mismatched_keys"]:
        name, given, expected = min(found["mismatched_keys"])
        raise UserError(f"{name} is {tuple(given)}, config.json asks for {tuple(expected)}")
    # what older versions do not write: what follows from sizes, and a count for training
    unwritten = ("position_ids", "num_batches_tracked")
    missing = sorted(name for name in found["missing_keys"] if not name.endswith(unwritten))
    if missing:
        raise UserError(f"it lacks {len(missing)} weights, such as {missing[0]}")
    return model.eval()
