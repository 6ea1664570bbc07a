"""What can be downloaded by name: from which repository, which files of it, and to where."""

from dataclasses import dataclass
from pathlib import Path

# Number of transformer layers of the two published widths.
LAYERS = {512: 8, 768: 16}
CLIP_FILES = ("config.json", "preprocessor_config.json")
# Where the models are on ModelScope is assumed from where the data is: --repo overrides.
CLIP = {
    "huggingface": "openai/clip-vit-base-patch16",
    "modelscope": "openai-mirror/clip-vit-base-patch16",
}
TOKENIZER = {"huggingface": "jingyaogong/MiniMind2-V", "modelscope": "gongjy/MiniMind2-V"}
WEIGHTS = {
    "huggingface": "jingyaogong/MiniMind2-V-PyTorch",
    "modelscope": "gongjy/MiniMind2-V-PyTorch",
}
DATA = {"huggingface": "jingyaogong/minimind-v_dataset", "modelscope": "gongjy/minimind-v_dataset"}


@dataclass(frozen=True)
class Item:
    """One row of the table below.

    Args:
        repos: the repository on each hub.
        kind: "model" or "dataset", as both hubs call it.
        folder: where the files go, below the root.
        choices: sets of files; the first that is there completely is taken.
        extras: files that are taken if they are there.
        dim: width, of weights.
        optional: `all` goes on if the repository has none.
    """

    repos: dict[str, str]
    kind: str
    folder: str
    choices: tuple[tuple[str, ...], ...]
    extras: tuple[str, ...] = ()
    dim: int = 0
    optional: bool = False


def published_weights(dim: int) -> Item:
    files = (f"pretrain_vlm_{dim}.pth", f"sft_vlm_{dim}.pth")
    return Item(WEIGHTS, "model", "out", (files,), (f"sft_vlm_multi_{dim}.pth",), dim)


def published_rows(*choices: tuple[str, ...], optional: bool = False) -> Item:
    return Item(DATA, "dataset", "dataset", choices, optional=optional)


ITEMS = {
    "clip": Item(
        CLIP,
        "model",
        "model/vision_model/clip-vit-base-patch16",
        ((*CLIP_FILES, "model.safetensors"), (*CLIP_FILES, "pytorch_model.bin")),
    ),
    "tokenizer": Item(
        TOKENIZER,
        "model",
        "model/minimind_tokenizer",
        (("tokenizer.json", "tokenizer_config.json"),),
        ("chat_template.jinja",),
    ),
    "lm-512": Item(WEIGHTS, "model", "out", (("lm_512.pth",),), dim=512),
    "lm-768": Item(WEIGHTS, "model", "out", (("lm_768.pth",),), dim=768),
    "pretrain-data": published_rows(
        ("pretrain_vlm_data.jsonl", "pretrain_images.zip"), ("pretrain_i2t.parquet",)
    ),
    "sft-data": published_rows(("sft_vlm_data.jsonl", "sft_images.zip"), ("sft_i2t.parquet",)),
    "sft-multi-data": published_rows(
        ("sft_vlm_data_multi.jsonl", "sft_multi_images.zip"), optional=True
    ),
    "weights-512": published_weights(512),
    "weights-768": published_weights(768),
}

MEDIUM = " --dim 768 --n_layers 16"
PRETRAIN = "python train_pretrain_vlm.py --epochs 4"
SFT = "python train_sft_vlm.py --epochs 4"
MULTI = "python train_sft_vlm.py --save_name sft_vlm_multi --epochs 4"
EVAL = "python eval_vlm.py --model_mode 1"
ALWAYS = ("clip", "tokenizer")
# (what a command needs, the command). A file of out/ may also come from training.
GOALS = (
    ((*ALWAYS, "lm-512", "pretrain-data"), PRETRAIN),
    ((*ALWAYS, "lm-768", "pretrain-data"), PRETRAIN + MEDIUM),
    ((*ALWAYS, "out/pretrain_vlm_512.pth", "sft-data"), SFT),
    ((*ALWAYS, "out/pretrain_vlm_768.pth", "sft-data"), SFT + MEDIUM),
    ((*ALWAYS, "out/pretrain_vlm_512.pth", "sft-multi-data"), MULTI),
    ((*ALWAYS, "out/pretrain_vlm_768.pth", "sft-multi-data"), MULTI + MEDIUM),
    ((*ALWAYS, "weights-512"), EVAL),
    ((*ALWAYS, "weights-768"), EVAL + MEDIUM),
)


def choose_files(item: Item, available: set[str]) -> list[str] | None:
    """Names of the files to take of those `available`; None if they are not all there."""
    for choice in item.choices:
        if available.issuperset(choice):
            return [*choice, *(name for name in item.extras if name in available)]
    return None


def describe_files(item: Item) -> str:
    """ "config.json + preprocessor_config.json + model.safetensors or pytorch_model.bin" """
    shared = [name for name in item.choices[0] if all(name in choice for choice in item.choices)]
    others = [" + ".join(name for name in choice if name not in shared) for choice in item.choices]
    return " + ".join([*shared, " or ".join(others)] if any(others) else shared)


def list_present(folder: Path) -> set[str]:
    """Names of the files in `folder`.

    A folder with something in it stands for the .zip that it was unpacked from.
    """
    if not folder.is_dir():
        return set()
    files = {path.name for path in folder.iterdir() if path.is_file()}
    unpacked = {path.name for path in folder.iterdir() if path.is_dir() and any(path.iterdir())}
    return files | {f"{name}.zip" for name in unpacked}


def find_files(name: str, root: Path) -> list[str] | None:
    """Names of the files of an item that are on disk; None if it is incomplete."""
    return choose_files(ITEMS[name], list_present(root / ITEMS[name].folder))


def next_command(names: list[str], root: Path) -> str:
    """The command that uses one of `names` and lacks least; or the download of what it lacks."""
    relevant = [goal for goal in GOALS if any(_item_of(need) in names for need in goal[0])]
    lacking = [
        [_item_of(need) for need in needs if not _is_present(need, root)] for needs, _ in relevant
    ]
    missing, (needs, command) = min(zip(lacking, relevant), key=lambda goal: len(goal[0]))
    if missing:
        return f"python -m scripts.download {' '.join(missing)}"
    return command + _data_flags(needs, root)


def _item_of(need: str) -> str:
    return need if need in ITEMS else f"weights-{Path(need).stem.rpartition('_')[2]}"


def _is_present(need: str, root: Path) -> bool:
    return find_files(need, root) is not None if need in ITEMS else (root / need).is_file()


def _data_flags(needs: tuple[str, ...], root: Path) -> str:
    """What to tell a training script about data that is not where it looks by itself."""
    for name in needs:
        files = find_files(name, root) if name.endswith("-data") else None
        if files and files[0].endswith(".parquet"):
            return f" --data dataset/{files[0]}"
        if name == "sft-multi-data":
            return f" --data dataset/{files[0]} --images dataset/{Path(files[1]).stem}"
    return ""
