"""The next command of the walk look -> clean -> train, complete, with the parts that are there."""

import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from common.errors import MissingFileError
from model.files import (
    TOKENIZER_PATH,
    VISION_MODEL_PATH,
    find_tokenizer,
    find_vision_model,
    read_info,
)

DEMO_TOKENIZER = "model/demo/tokenizer"
# Weights that know pictures, the best start first; the demo's are stand-ins of 128 dimensions.
PUBLISHED_WEIGHTS = "out/sft_vlm_512.pth"
WEIGHTS = (
    PUBLISHED_WEIGHTS,
    "out/sft_vlm_768.pth",
    "out/pretrain_vlm_512.pth",
    "out/pretrain_vlm_768.pth",
    "out/demo/sft_vlm_128.pth",
    "model/demo/sft_vlm_128.pth",
)


class Recipe(NamedTuple):
    """How long and how fast a set is learned: docs/data.md, "Small sets"."""

    least_rows: int
    epochs: int
    # The learning rate of the demo's weights was measured; that of the published ones, which are
    # 4 times as wide, was not.
    demo_rate: str
    published_rate: str


# That of a set is the last one whose `least_rows` it has.
RECIPES = (
    Recipe(0, 10, "1e-3", "3e-4"),
    Recipe(500, 2, "1e-3", "3e-4"),
    Recipe(20_000, 1, "3e-4", "1e-4"),
)


def choose_recipe(n_rows: int) -> Recipe:
    """The recipe for that many training rows."""
    return max(recipe for recipe in RECIPES if recipe.least_rows <= n_rows)


def choose_tokenizer(given: str | None) -> str:
    """The tokenizer that is given; else the published one, or the demo's if that is not there.

    MissingFileError where there is none.
    """
    try:
        find_tokenizer(given or TOKENIZER_PATH)
        return given or TOKENIZER_PATH
    except MissingFileError as missing:
        if given is not None:
            raise
        try:
            find_tokenizer(DEMO_TOKENIZER)
        except MissingFileError:
            # It says how to get the published one.
            raise missing from None
        return DEMO_TOKENIZER


def write_clean_command(
    data: str, images: str | None, tokenizer: str | None, max_seq_len: int | None
) -> str:
    """The command that cleans a file; its result goes to a new folder beside it.

    Args:
        data: the .jsonl or .parquet file.
        images: folder or .zip of its pictures.
        tokenizer, max_seq_len: handed on to training; None leaves the choice to it.
    """
    path = Path(data)
    return join_command(
        *("-m", "dataset.clean", path, find_new_folder(path.with_name(f"{path.stem}_clean"))),
        images=images,
        tokenizer=tokenizer,
        max_seq_len=max_seq_len,
    )


def write_train_command(
    data: str,
    images: str | None,
    val_data: str | None,
    n_rows: int,
    name: str,
    tokenizer: str | None = None,
    max_seq_len: int | None = None,
) -> str:
    """The commands, one a line, that get what is missing and train on a set.

    Args:
        data: the training rows, a file or a pattern.
        images: folder of their pictures and those of `val_data`.
        val_data: the validation rows; None if there are none.
        n_rows: number of training rows, which decides how they are learned.
        name: of the weights that come out; letters that a file name may lack are replaced.
        tokenizer, max_seq_len: flags of training; None leaves the choice to it.
    """
    # where it starts
    start, recipe = find_start(tokenizer), choose_recipe(n_rows)
    is_demo = start is not None and "demo" in Path(start).parts
    own_tokenizer = (read_info(start) if start else {}).get("tokenizer") or TOKENIZER_PATH

    # the command
    command = join_command(
        "train_sft_vlm.py",
        data=data,
        images=images,
        val_data=val_data,
        init_weights=start or PUBLISHED_WEIGHTS,
        tokenizer=None if tokenizer == own_tokenizer else tokenizer,
        max_seq_len=max_seq_len,
        learning_rate=recipe.demo_rate if is_demo else recipe.published_rate,
        epochs=recipe.epochs,
        save_name=re.sub(r"[^\w-]", "_", name),
    )

    # what has to be fetched first
    if start is None:
        return f"python -m scripts.download clip tokenizer weights-512\n{command}"
    return command


def find_start(tokenizer: str | None = None) -> str | None:
    """The first of WEIGHTS that is there with its tokenizer and vision encoder; None if none is.

    Args:
        tokenizer: folder of the tokenizer that is asked for; weights with another one do not count.
    """
    for weights in filter(lambda path: Path(path).is_file(), WEIGHTS):
        info = read_info(weights)
        try:
            find_vision_model(info.get("vision_model") or VISION_MODEL_PATH)
            own = find_tokenizer(info.get("tokenizer") or TOKENIZER_PATH)
        except MissingFileError:
            continue
        if tokenizer is None or read_vocabulary(own) == read_vocabulary(tokenizer):
            return weights
    return None


def read_vocabulary(folder: str | Path) -> bytes:
    """What tells a tokenizer from others, wherever its folder is."""
    return (find_tokenizer(folder) / "tokenizer.json").read_bytes()


def find_new_folder(wanted: Path) -> Path:
    """`wanted`, or with _2, _3 … behind it if that is there with something in it."""

    others = (wanted.with_name(f"{wanted.name}_{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([wanted], others) if is_free(path))


def is_free(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def join_command(*words: object, **flags: object) -> str:
    """ "python WORDS --flag value …" as a shell takes it; flags that are None are left out."""
    given = {name: value for name, value in flags.items() if value is not None}
    pairs = (word for name, value in given.items() for word in (f"--{name}", value))
    return shlex.join(map(str, ("python", *words, *pairs)))
