"""Where a run starts from and where it leaves what; nothing heavy is imported here."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from common.errors import MissingFileError, UserError
from model.files import (
    DEFAULT_DIM,
    OUT_DIR,
    TOKENIZER_PATH,
    VISION_MODEL_PATH,
    find_own,
    find_tokenizer,
    find_vision_model,
    find_weights,
    read_info,
    weights_path,
)
from trainer.config import TrainConfig

# What log and curve of a run take at least, in bytes.
LEAST_OUTPUT = 1_000_000


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


def check_output(config: TrainConfig) -> None:
    """Make --out_dir; UserError where the files of the run cannot be written there."""
    # names
    name, folder = config.save_name, Path(config.out_dir)
    if not name.isprintable() or not re.fullmatch(r"[^/\\]+", name):
        raise UserError(f"--save_name is {name!r:.60}: give a name, the folder is --out_dir")
    paths = run_paths(config, find_dim(config))

    # the folder, and room for the beginning
    try:
        folder.mkdir(parents=True, exist_ok=True)
        most = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(LEAST_OUTPUT))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"cannot write in {folder} ({reason}): free some space, or choose another --out_dir"
        ) from error

    # While a file is written it has a longer name, see `atomic_write`.
    longest = max(len(os.fsencode(path.name)) for path in paths) + len(".1234567..partial")
    if longest > most:
        raise UserError(
            f"--save_name has {len(os.fsencode(name))} bytes: a file's name has at most {most} "
            f"here, so {len(os.fsencode(name)) - longest + most} are left for it"
        )
    for path in (paths.weights, paths.best, paths.log, paths.curve):
        if path.is_dir():
            raise UserError(f"{path} is a folder: move it away, or choose another --save_name")


def check_space(config: TrainConfig, n_bytes: int) -> None:
    """UserError where the disk of --out_dir has not that much space left."""
    free = shutil.disk_usage(config.out_dir).free
    if n_bytes > free:
        raise UserError(
            f"a save takes {n_bytes / 1e9:.2f} GB or more and {config.out_dir} has "
            f"{free / 1e9:.2f} GB left: free some space, or choose another --out_dir"
        )


def list_run_states(folder: Path) -> list[Path]:
    """The run states in a .resume folder, oldest first."""
    files = [path for path in folder.glob("step-*.pth") if path.is_file()]
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
    if config.out_dir == OUT_DIR:
        path = find_own(path)
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
