"""Which files a model is loaded from; nothing heavy is imported here.

So a missing file is named before PyTorch is imported, which takes seconds.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import MissingFileError, UserError
from inference.config import DTYPES, AskConfig
from inference.onnx_files import find_graphs
from model.files import (
    DEFAULT_DIM,
    TOKENIZER_PATH,
    VISION_MODEL_PATH,
    WEIGHTS_NAMES,
    find_own,
    find_tokenizer,
    find_vision_model,
    find_weights,
    name_places,
    read_info,
    read_json,
    weights_path,
)

# What a folder of weights is searched for, the best first.
PREFERRED_NAMES = [WEIGHTS_NAMES[mode] for mode in (1, 2, 0)]

# Options that say how a model is run.
RUN_OPTIONS = ("max_seq_len", "device", "backend", "dtype")

# Where weights of the demo are.
DEMO_FOLDERS = (Path("out/demo"), Path("model/demo"))

# Copied files may be a little older than those that they were made from.
SECONDS_OF_A_COPY = 60


class ModelFiles(NamedTuple):
    """The parts of a model on disk."""

    weights: Path  # a .pth file, or a transformers directory
    info: dict  # what the JSON beside the weights says
    tokenizer: Path
    vision_model: Path | None  # None: it is in the directory itself


def find_model(config: AskConfig) -> dict[str, Any]:
    """The arguments of `load_vlm` that the flags mean. MissingFileError where a file is missing."""
    names = ("tokenizer", "vision_model", "dim", "n_layers", *RUN_OPTIONS)
    options = {name: getattr(config, name) for name in names}
    weights = choose_weights(config)
    files = find_model_files(weights, config.tokenizer, config.vision_model, config.dim)
    if config.backend == "onnx":
        find_graphs(files.weights, config.dtype)
    return {"weights": weights, **options}


def choose_weights(config: AskConfig) -> Path:
    """The path that --weights names, or --load, --out_dir and --model_mode, and --dim if given."""
    if config.weights is not None:
        # What --weights meant once.
        if config.weights in DTYPES["torch"] and not Path(config.weights).exists():
            raise UserError(
                f"--weights names a file, but there is no {config.weights}: the number format is "
                f"--dtype {config.weights}"
            )
        return Path(config.weights)
    if config.load == 1:
        folder = find_own(config.transformers_dir)
        if not (folder / "config.json").is_file():
            raise MissingFileError(
                f"no transformers directory at {name_places(config.transformers_dir)}: fetch it "
                "with `hf download jingyaogong/MiniMind2-V --local-dir "
                f"{config.transformers_dir}`"
            )
        return folder
    # the file of that mode; else say which others there are
    folder, name = find_own(config.out_dir), WEIGHTS_NAMES[config.model_mode]
    if not folder.is_dir():
        folder = Path(config.out_dir)
    found = find_by_name(folder, name, config.dim)
    if found is not None:
        return found
    path = weights_path(folder, name, config.dim or DEFAULT_DIM)
    others = list_models(folder)
    if others:
        raise MissingFileError(
            f"no weights at {path}, but {', '.join(file.name for file in others)}: "
            f"pass --weights {others[0]}"
        )
    # what `make demo` has trained, or what is shipped
    for place in DEMO_FOLDERS:
        place = find_own(place)
        if find_by_name(place, name, config.dim):
            raise MissingFileError(
                f"no weights at {path}: pass --out_dir {place} for the demo's, or fetch the "
                "published ones with `python -m scripts.download weights-512`"
            )
    return find_weights(path)


def list_model_paths(config: AskConfig) -> list[Path]:
    """Every model that the flags lead to: .pth files of those that see, transformers directories.

    These are --weights, all in --out_dir, and --transformers_dir if it is there; where there is
    nothing, what `make demo` left, or what is shipped. MissingFileError where --weights or --load 1
    names what is not there.
    """
    # named by the flags
    paths = []
    if config.weights is not None or config.load == 1:
        path = find_own(choose_weights(config))
        if (path / "config.json").is_file():
            paths = [path]
        elif path.is_dir():
            paths = [choose_in_folder(path, config.dim), *list_models(path)]
        else:
            paths = [find_weights(path)]

    # beside them
    paths += list_models(find_own(config.out_dir))
    folder = find_own(config.transformers_dir)
    paths += [folder] if (folder / "config.json").is_file() else []
    for place in DEMO_FOLDERS:
        paths = paths or list_models(find_own(place))

    # each once
    by_place: dict[Path, Path] = {}
    for path in paths:
        by_place.setdefault(path.resolve(), path)
    return list(by_place.values())


def read_scores(weights: Path) -> dict[str, Any]:
    """How well a model answers, as it was measured last; {} if that is not known.

    Args:
        weights: NAME.pth, beside which NAME.scores.json may lie, or of the demo its report.

    Returns some of exact (share of answers that are exactly right), exact_wrong_image and
    exact_no_image (the same where other pictures were shown, or none), cider, data (what it was
    measured on), questions (how many), date.
    """
    kinds = {"exact": float | int, "cider": float | int, "data": str, "questions": int, "date": str}
    others = {"exact_wrong_image": "accuracy_wrong_image", "exact_no_image": "accuracy_no_image"}
    kinds |= dict.fromkeys(others, float | int)
    path = weights.with_suffix(".scores.json")
    reports = {"sft_vlm_128": "report.json", "sft_vlm_multi_128": "report_multi.json"}
    is_report = not path.is_file() and weights.stem in reports
    if is_report:
        path = weights.with_name(reports[weights.stem])
    try:
        # weights that were trained again have not been measured
        if path.stat().st_mtime < weights.stat().st_mtime - SECONDS_OF_A_COPY:
            return {}
        scores = read_json(path)
        if is_report:
            names = {"exact": "accuracy", **others}
            found = {ours: scores[it] for ours, it in names.items() if it in scores}
            scores = {name: accuracy["overall"] for name, accuracy in found.items()}
            scores["data"] = "eval.jsonl"
    # A score is only shown: a damaged one keeps nobody from the model.
    except (UserError, OSError, KeyError, TypeError):
        return {}
    return {
        name: scores[name] for name, kind in kinds.items() if isinstance(scores.get(name), kind)
    }


def find_model_files(
    weights: str | Path,
    tokenizer: str | Path | None = None,
    vision_model: str | Path | None = None,
    dim: int | None = None,
) -> ModelFiles:
    """Find all that a model is loaded from. MissingFileError where a part is missing.

    Arguments come first, then what the model brings along, then the published folders.

    Args:
        weights: a .pth file, a folder of them, or a transformers directory.
        tokenizer: folder of the tokenizer.
        vision_model: folder of the vision encoder.
        dim: width of the model, if a folder has several.
    """
    # the weights, and what they bring along
    path, info = find_own(weights), {}
    if (path / "config.json").is_file():
        if (path / "tokenizer.json").is_file():
            info = {"tokenizer": path}
        has_vision_model = is_llava(path)
    else:
        path = choose_in_folder(path, dim) if path.is_dir() else find_weights(weights)
        info = read_info(path)
        has_vision_model = False

    # the other parts
    tokenizer = find_tokenizer(tokenizer or info.get("tokenizer") or TOKENIZER_PATH)
    if has_vision_model:
        return ModelFiles(path, info, tokenizer, None)
    vision_model = vision_model or info.get("vision_model") or VISION_MODEL_PATH
    return ModelFiles(path, info, tokenizer, find_vision_model(vision_model))


def choose_in_folder(folder: Path, dim: int | None) -> Path:
    """The model in a folder of weights: SFT, multi-image SFT, pretrained, else the newest."""
    for name in PREFERRED_NAMES:
        found = find_by_name(folder, name, dim)
        if found is not None:
            return found
    models = [path for path in list_models(folder) if dim is None or path.stem.endswith(f"_{dim}")]
    if not models:
        wanted = "*.pth" if dim is None else f"*_{dim}.pth"
        raise MissingFileError(
            f"{folder} has no weights of a model that sees ({wanted}): train one first, or fetch "
            "the published ones with `python -m scripts.download weights-512`"
        )
    return max(models, key=lambda path: path.stat().st_mtime)


def find_by_name(folder: Path, name: str, dim: int | None) -> Path | None:
    """NAME_DIM.pth in a folder; None if there is none.

    If `dim` is not given and there are several, it is that of dim 512; UserError if there is no
    such file among them.
    """
    paths = {
        int(match[1]): path
        for path in sorted(folder.glob(f"{name}_*.pth"))
        if (match := re.fullmatch(rf"{name}_(\d+)", path.stem))
    }
    if dim is not None:
        return paths.get(dim)
    if len(paths) > 1 and DEFAULT_DIM not in paths:
        names = ", ".join(path.name for path in paths.values())
        raise UserError(f"{folder} has {names}: pass --dim to say which")
    return paths.get(DEFAULT_DIM) or next(iter(paths.values()), None)


def list_models(folder: Path) -> list[Path]:
    """The weights in a folder; lm_512.pth and the like are left out, for they have no eyes."""
    return [path for path in sorted(folder.glob("*.pth")) if not path.name.startswith("lm_")]


def is_llava(folder: Path) -> bool:
    """Whether a transformers directory holds a LLaVA, which brings its own vision encoder."""
    try:
        return read_json(folder / "config.json").get("model_type") == "llava"
    except UserError as error:
        raise UserError(f"cannot load the model in {folder} ({error}): fetch it again") from error
