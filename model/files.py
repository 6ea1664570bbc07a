"""Where the parts of a model lie on disk, and how to get what is missing.

Nothing heavy is imported here, so that a missing file is named before PyTorch is loaded.
"""

import ast
import inspect
import json
from pathlib import Path

from common.errors import BadSampleError, MissingFileError, UserError
from common.files import read_small_file
from model.sizes import LANGUAGE_SIZES, check_sizes

ROOT = Path(__file__).parents[1]  # of the repository


def read_default_dim() -> int:
    """The default of `dim` in model/LMConfig.py, where people set the size of their models.

    It is read from the text of the file: to import it takes seconds, because of transformers.
    """
    text = (ROOT / "model" / "LMConfig.py").read_text(encoding="utf-8")
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    arguments = next(node.args for node in functions if node.name == "__init__")
    names = [argument.arg for argument in arguments.args]
    defaults = dict(zip(reversed(names), reversed(arguments.defaults)))
    try:
        return ast.literal_eval(defaults["dim"])
    except ValueError:
        # Not a plain number but, for example, 2 * 128: Python has to compute it.
        from model.LMConfig import LMConfig

        return inspect.signature(LMConfig).parameters["dim"].default


TOKENIZER_PATH = "model/minimind_tokenizer"
VISION_MODEL_PATH = "model/vision_model"
DEFAULT_DIM = read_default_dim()  # width if nothing else says it
# The demo's vision encoder has seen rendered scenes only: things on a ground of one color.
DEMO_ENCODER = ROOT / "model/demo/vision_model"
MAX_JSON_BYTES = 16 * 2**20  # of a file that describes a model
OUT_DIR = "out"  # of weights, if none is given
# Published names of weights, by --model_mode.
WEIGHTS_NAMES = {0: "pretrain_vlm", 1: "sft_vlm", 2: "sft_vlm_multi"}


def find_tokenizer(path: str | Path = TOKENIZER_PATH) -> Path:
    """The folder of a tokenizer; MissingFileError where there is none."""
    folder = find_own(path)
    if not (folder / "tokenizer.json").is_file():
        raise MissingFileError(
            f"no tokenizer in {name_places(path)}: fetch it with "
            "`python -m scripts.download tokenizer`, or point --tokenizer to it"
        )
    return folder


def find_vision_model(path: str | Path = VISION_MODEL_PATH) -> Path:
    """The folder of a vision encoder: `path` or clip-vit-base-patch16 below it."""
    folder = find_own(path)
    for candidate in (folder, folder / "clip-vit-base-patch16"):
        if (candidate / "config.json").is_file():
            return candidate
    raise MissingFileError(
        f"no vision encoder in {name_places(path)}: fetch CLIP with `python -m scripts.download "
        "clip`, or point --vision_model to the folder of another one"
    )


def is_demo_encoder(folder: str | Path) -> bool:
    return Path(folder).resolve() == DEMO_ENCODER.resolve()


def find_own(path: str | Path) -> Path:
    """`path` as seen from here; else from the repository, for scripts and notebooks elsewhere."""
    return Path(path) if Path(path).exists() or is_at_home() else ROOT / path


def name_places(path: str | Path) -> str:
    """Where `find_own` looks for a file, for the message that it is not there."""
    if Path(path).is_absolute() or is_at_home():
        return str(path)
    return f"{path}, as seen from {Path.cwd()} and from {ROOT}"


def is_at_home() -> bool:
    """Whether the repository is the working directory."""
    return Path.cwd() == ROOT.resolve()


def weights_path(out_dir: str | Path, name: str, dim: int) -> Path:
    """out/sft_vlm_512.pth for ("out", "sft_vlm", 512)."""
    return Path(out_dir) / f"{name}_{dim}.pth"


def find_weights(path: str | Path) -> Path:
    """The weights file `path`; MissingFileError where there is none."""
    found = find_own(path)
    if not found.is_file():
        raise MissingFileError(
            f"no weights at {name_places(path)}: train them first, or fetch the published ones "
            "with `python -m scripts.download lm-512` or `weights-512`, likewise 768"
        )
    return found


def info_path(weights: str | Path) -> Path:
    """The JSON that training leaves beside a weights file: out/sft_vlm_512.json."""
    return Path(weights).with_suffix(".json")


def read_info(weights: str | Path) -> dict:
    """What training wrote about a weights file; {} where nothing lies beside it (published files).

    Its keys: config (every size of the network), tokenizer, vision_model, stage, data, question and
    question_for_several (that open most training rows with one image, and with more), step,
    val_loss. UserError where the JSON is damaged: guessing sizes would hide that.
    """
    path = info_path(weights)
    if not path.is_file():
        return {}
    try:
        info = read_json(path)
        if not isinstance(info.get("config"), dict):
            raise UserError("config is no object")
        check_sizes(info["config"], LANGUAGE_SIZES)
        for name in ("tokenizer", "vision_model", "question", "question_for_several"):
            if not isinstance(info.get(name), str | None):
                raise UserError(f"{name} is no text")
    except UserError as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and pass --dim and --n_layers instead"
        ) from error
    return info


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError where there is none, which says why."""
    try:
        content = json.loads(read_small_file(path, "JSON", MAX_JSON_BYTES).decode("utf-8-sig"))
    except BadSampleError as error:
        raise UserError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is no JSON: {error!s:.100}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is no JSON object")
    return content
