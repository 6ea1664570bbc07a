"""Write what is made from the code: docs/flags.md and the picture of the README.

python -m scripts.docs                 # both
python -m scripts.docs --only flags
python -m scripts.docs --only hero --weights out/demo/sft_vlm_128.pth
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import run_command
from common.files import write_text
from common.flags import MOST_SEED, check_options, option, parse_flags
from inference.paths import find_model_files
from model.files import ROOT
from scripts.docs.flags_page import FLAGS_PATH, write_flags


@dataclass(frozen=True)
class Settings:
    """Options of `python -m scripts.docs`."""

    only: Literal["flags", "hero"] | None = option(
        None, "flags: docs/flags.md; hero: images/hero.png; both if not given"
    )
    weights: str = option(
        "model/demo/sft_vlm_128.pth", "model of the demo that answers the questions of the picture"
    )
    seed: int = option(8, "which held-out scene, and which questions", least=0, most=MOST_SEED)
    out: str = option("images/hero.png", "where the picture goes")

    def __post_init__(self):
        check_options(self)


def main() -> None:
    settings = parse_flags(Settings(), __doc__)
    if settings.only != "hero":
        write_text(FLAGS_PATH, write_flags())
        print(f"written: {FLAGS_PATH.relative_to(ROOT)}")
    if settings.only != "flags":
        # Files are checked before PyTorch is imported.
        find_model_files(settings.weights)
        from scripts.docs.hero import write_hero

        answers = write_hero(Path(settings.weights), settings.seed, Path(settings.out))
        for question, given in answers:
            print(f"{question.text} {given} ({'right' if given == question.answer else 'wrong'})")
        print(f"written: {settings.out}")


if __name__ == "__main__":
    run_command(main)
