"""Where the parts of a model lie on disk, and how to get what is missing.

Nothing heavy is imported here, so that a missing file is named before PyTorch is loaded.
"""

import json
from pathlib import Path

from common.errors import MissingFileError, UserError

ROOT = Path(__file__).parents[1]  # of the repository
TOKENIZER_PATH = "model/minimind_tokenizer"
VISION_MODEL_PATH = "model/vision_model"
DEFAULT_DIM = 512  # width if nothing says it
# Published names of weights, by --model_mode.
WEIGHTS_NAMES = {0: "pretrain_vlm", 1: "sft_vlm", 2: "sft_vlm_multi"}


def find_tokenizer(path: str | Path = TOKENIZER_PATH) -> Path:
    """The folder of a tokenizer; MissingFileError where there is none."""
    folder = _find_folder(path)
    if not (folder / "tokenizer.json").is_file():
        raise MissingFileError(
            f"no tokenizer in {path}: fetch it with `python -m scripts.download tokenizer`, "
            "or point --tokenizer to it"
        )
    return folder


def find_vision_model(path: str | Path = VISION_MODEL_PATH) -> Path:
    """The folder of a vision encoder: `path` or clip-vit-base-patch16 below it."""
    folder = _find_folder(path)
    for candidate in (folder, folder / "clip-vit-base-patch16"):
        if (candidate / "config.json").is_file():
            return candidate
    raise MissingFileError(
        f"no CLIP in {path}: fetch it with `python -m scripts.download clip`, "
        "or point --vision_model to it"
    )


def _find_folder(path: str | Path) -> Path:
    """`path` as seen from here; else from the repository, for scripts and notebooks elsewhere."""
    return Path(path) if Path(path).exists() else ROOT / path


def weights_path(out_dir: str | Path, name: str, dim: int) -> Path:
    """out/sft_vlm_512.pth for ("out", "sft_vlm", 512)."""
    return Path(out_dir) / f"{name}_{dim}.pth"


def find_weights(path: str | Path) -> Path:
    """The weights file `path`; MissingFileError where there is none."""
    if not Path(path).is_file():
        raise MissingFileError(
            f"no weights at {path}: train them first, or fetch the published ones with "
            "`python -m scripts.download lm-512` or `weights-512`, likewise 768"
        )
    return Path(path)


def info_path(weights: str | Path) -> Path:
    """The JSON that training leaves beside a weights file: out/sft_vlm_512.json."""
    return Path(weights).with_suffix(".json")


def read_info(weights: str | Path) -> dict:
    """What training wrote about a weights file; {} where nothing lies beside it (published files).

    Its keys: config (every size of the network), tokenizer, vision_model, stage, data, step,
    val_loss. UserError where the JSON is damaged: guessing sizes would hide that.
    """
    path = info_path(weights)
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info["config"], dict):
            raise TypeError("config is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and pass --dim and --n_layers instead"
        ) from error
    return info
