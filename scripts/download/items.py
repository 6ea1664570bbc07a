"""What can be downloaded by name: from which repository, which of its files, and where they go. One table."""

from dataclasses import dataclass
from pathlib import Path

CLIP = ("config.json", "preprocessor_config.json")
# Where the models are on ModelScope is assumed from where the data is: --repo overrides.
WEIGHTS = {
    "huggingface": "jingyaogong/MiniMind2-V-PyTorch",
    "modelscope": "gongjy/MiniMind2-V-PyTorch",
}
DATA = {"huggingface": "jingyaogong/minimind-v_dataset", "modelscope": "gongjy/minimind-v_dataset"}
LAYERS = {512: 8, 768: 16}  # of the two published widths


@dataclass(frozen=True)
class Item:
    """`choices`: sets of files, of which the first that is there completely is taken; `extras` are taken where they are there."""

    repos: dict[str, str]  # --source -> repository
    kind: str  # "model" or "dataset", as both hubs call it
    folder: str  # below the root
    choices: tuple[tuple[str, ...], ...]
    extras: tuple[str, ...] = ()
    dim: int = 0  # width of weights
    optional: bool = False  # `all` goes on where the repository has none


ITEMS = {
    "clip": Item(
        {
            "huggingface": "openai/clip-vit-base-patch16",
            "modelscope": "openai-mirror/clip-vit-base-patch16",
        },
        "model",
        "model/vision_model/clip-vit-base-patch16",
        ((*CLIP, "model.safetensors"), (*CLIP, "pytorch_model.bin")),
    ),
    "tokenizer": Item(
        {"huggingface": "jingyaogong/MiniMind2-V", "modelscope": "gongjy/MiniMind2-V"},
        "model",
        "model/minimind_tokenizer",
        (("tokenizer.json", "tokenizer_config.json"),),
        ("chat_template.jinja",),
    ),
    "lm-512": Item(WEIGHTS, "model", "out", (("lm_512.pth",),), dim=512),
    "lm-768": Item(WEIGHTS, "model", "out", (("lm_768.pth",),), dim=768),
    "pretrain-data": Item(
        DATA,
        "dataset",
        "dataset",
        (("pretrain_vlm_data.jsonl", "pretrain_images.zip"), ("pretrain_i2t.parquet",)),
    ),
    "sft-data": Item(
        DATA, "dataset", "dataset", (("sft_vlm_data.jsonl", "sft_images.zip"), ("sft_i2t.parquet",))
    ),
    "sft-multi-data": Item(
        DATA,
        "dataset",
        "dataset",
        (("sft_vlm_data_multi.jsonl", "sft_multi_images.zip"),),
        optional=True,
    ),
    "weights-512": Item(
        WEIGHTS,
        "model",
        "out",
        (("pretrain_vlm_512.pth", "sft_vlm_512.pth"),),
        ("sft_vlm_multi_512.pth",),
        dim=512,
    ),
    "weights-768": Item(
        WEIGHTS,
        "model",
        "out",
        (("pretrain_vlm_768.pth", "sft_vlm_768.pth"),),
        ("sft_vlm_multi_768.pth",),
        dim=768,
    ),
}

MEDIUM = " --dim 768 --n_layers 16"
MULTI = "python train_sft_vlm.py --save_name sft_vlm_multi"
GOALS = (  # (what a command needs, the command); a file of out/ may also come from training
    (("clip", "tokenizer", "lm-512", "pretrain-data"), "python train_pretrain_vlm.py --epochs 4"),
    (
        ("clip", "tokenizer", "lm-768", "pretrain-data"),
        f"python train_pretrain_vlm.py --epochs 4{MEDIUM}",
    ),
    (
        ("clip", "tokenizer", "out/pretrain_vlm_512.pth", "sft-data"),
        "python train_sft_vlm.py --epochs 4",
    ),
    (
        ("clip", "tokenizer", "out/pretrain_vlm_768.pth", "sft-data"),
        f"python train_sft_vlm.py --epochs 4{MEDIUM}",
    ),
    (("clip", "tokenizer", "out/pretrain_vlm_512.pth", "sft-multi-data"), f"{MULTI} --epochs 4"),
    (
        ("clip", "tokenizer", "out/pretrain_vlm_768.pth", "sft-multi-data"),
        f"{MULTI} --epochs 4{MEDIUM}",
    ),
    (("clip", "tokenizer", "weights-512"), "python eval_vlm.py --model_mode 1"),
    (("clip", "tokenizer", "weights-768"), f"python eval_vlm.py --model_mode 1{MEDIUM}"),
)


def choose_files(item: Item, available: set[str]) -> list[str] | None:
    """Names of the files to take of those `available`; None where they are not all there."""
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
    """Names of the files in `folder`. A folder with something in it stands for the .zip that it was unpacked from."""
    if not folder.is_dir():
        return set()
    files = {path.name for path in folder.iterdir() if path.is_file()}
    return files | {
        f"{path.name}.zip" for path in folder.iterdir() if path.is_dir() and any(path.iterdir())
    }


def find_files(name: str, root: Path) -> list[str] | None:
    """Names of the files of an item that are on disk; None where it is incomplete."""
    return choose_files(ITEMS[name], list_present(root / ITEMS[name].folder))


def next_command(names: list[str], root: Path) -> str:
    """The command that uses one of `names` and lacks least, the first of several; or the download of what it lacks."""
    relevant = [
        (needs, command)
        for needs, command in GOALS
        if any(_item_of(need) in names for need in needs)
    ]
    lacking = [
        [_item_of(need) for need in needs if not _is_present(need, root)] for needs, _ in relevant
    ]
    missing, (needs, command) = min(zip(lacking, relevant), key=lambda goal: len(goal[0]))
    return (
        f"python -m scripts.download {' '.join(missing)}"
        if missing
        else command + _data_flags(needs, root)
    )


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
