"""Where a run starts from and where it leaves what; nothing heavy is imported here."""

import re
from pathlib import Path
from typing import NamedTuple

from common.errors import MissingFileError
from model.files import (
    DEFAULT_DIM,
    TOKENIZER_PATH,
    VISION_MODEL_PATH,
    find_tokenizer,
    find_vision_model,
    find_weights,
    read_info,
    weights_path,
)
from trainer.config import TrainConfig


class RunPaths(NamedTuple):
    """The files of a run; the JSON of model/weights.py lies beside each weights file."""

    weights: Path  # out/sft_vlm_512.pth
    best: Path  # out/sft_vlm_best_512.pth
    resume: Path  # out/sft_vlm_512.resume/
    log: Path  # out/sft_vlm_512.log.jsonl
    curve: Path  # out/sft_vlm_512.png
    tensorboard: Path  # out/sft_vlm_512.tensorboard/


def run_paths(config: TrainConfig, dim: int) -> RunPaths:
    weights = weights_path(config.out_dir, config.save_name, dim)
    return RunPaths(
        weights,
        weights_path(config.out_dir, f"{config.save_name}_best", dim),
        weights.with_suffix(".resume"),
        weights.with_suffix(".log.jsonl"),
        weights.with_suffix(".png"),
        weights.with_suffix(".tensorboard"),
    )


def list_run_states(folder: Path) -> list[Path]:
    """The run states in a .resume folder, oldest first."""
    files = folder.glob("step-*.pth")
    return sorted(path for path in files if re.fullmatch(r"step-\d+\.pth", path.name))


def find_init_weights(config: TrainConfig) -> Path | None:
    """The file that --init_weights names; None to start from random weights.

    MissingFileError where it is not there.
    """
    name = config.init_weights
    if name in (None, "none"):
        return None
    if Path(name).suffix in (".pth", ".safetensors"):
        return find_weights(name)
    path = weights_path(config.out_dir, name, config.dim or DEFAULT_DIM)
    if path.is_file():
        return path
    # of another size than model/LMConfig.py or --dim says
    others = sorted(path.parent.glob(f"{name}_[0-9]*.pth"))
    if others:
        raise MissingFileError(
            f"no weights at {path}, but {', '.join(other.name for other in others)}: pass "
            f"--init_weights {others[0]}, or --init_weights none to start from random weights"
        )
    # published ones have these widths only
    if path.stem.removeprefix(f"{name}_") not in ("512", "768"):
        raise MissingFileError(
            f"no weights at {path}: train them first, or pass --init_weights none to start from "
            "random weights"
        )
    return find_weights(path)


def find_start(config: TrainConfig) -> Path | None:
    """The weights file whose sizes, tokenizer and vision encoder a run takes over.

    With --resume that may be the run's own, since those it once started from may be gone.
    """
    try:
        return find_init_weights(config)
    except MissingFileError:
        own = Path(config.out_dir).glob(f"{config.save_name}_*.resume") if config.resume else []
        found = [folder.with_suffix(".pth") for folder in sorted(own) if list_run_states(folder)]
        if config.dim is not None:
            found = [path for path in found if path == run_paths(config, config.dim).weights]
        if not found:
            raise
        return found[-1]


def find_dim(config: TrainConfig) -> int:
    """Width of the language model, as flags, the JSON beside the weights, or their name tell."""
    start = find_start(config)
    if config.dim is not None or start is None:
        return config.dim or DEFAULT_DIM
    in_name = re.search(r"_(\d+)$", start.stem)
    sizes = read_info(start).get("config", {})
    return sizes.get("dim") or (int(in_name[1]) if in_name else DEFAULT_DIM)


def find_parts(config: TrainConfig) -> tuple[Path | None, Path, Path]:
    """(weights to start from, tokenizer folder, vision encoder folder).

    MissingFileError where one is not there. Flags come first, then what the JSON beside the weights
    says, then the published folders.
    """
    start = find_start(config)
    info = read_info(start) if start else {}
    tokenizer = find_tokenizer(config.tokenizer or info.get("tokenizer") or TOKENIZER_PATH)
    vision_model = config.vision_model or info.get("vision_model") or VISION_MODEL_PATH
    return start, tokenizer, find_vision_model(vision_model)
