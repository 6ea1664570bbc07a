"""Write the rendered demo set.

python -m dataset.scenes out/demo/data
python -m dataset.scenes out/ja --languages ja --sft_rows 1000
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import run_command
from common.flags import MOST_SEED, check_options, option, parse_flags
from dataset.scenes.text import ALL_LANGUAGES, LANGUAGES
from dataset.scenes.write import FILES, N_ROWS, write_scene_set


def rows_option(part: str) -> int:
    """How many rows a part of the set has."""
    help = f"rows of {FILES[part][0]}; 0 leaves it out"
    return option(N_ROWS[part], help, least=0, most=10_000_000)


@dataclass(frozen=True)
class Settings:
    """Options of `python -m dataset.scenes`."""

    folder: str = option("", "folder that the set is written to", positional=True)
    seed: int = option(1337, "seed of every scene and question", least=0, most=MOST_SEED)
    languages: list[Literal[ALL_LANGUAGES]] = option(list(LANGUAGES), "of questions and answers")
    pretrain_rows: int = rows_option("pretrain")
    sft_rows: int = rows_option("sft")
    multi_rows: int = rows_option("multi")
    val_rows: int = rows_option("val")
    eval_rows: int = rows_option("eval")
    eval_multi_rows: int = rows_option("eval_multi")

    def __post_init__(self):
        check_options(self)


def main() -> None:
    settings = parse_flags(Settings(), __doc__)
    n_rows = {part: getattr(settings, f"{part}_rows") for part in N_ROWS}
    n_rows = {part: n for part, n in n_rows.items() if n}
    write_scene_set(Path(settings.folder), n_rows, settings.seed, settings.languages)


if __name__ == "__main__":
    run_command(main)
