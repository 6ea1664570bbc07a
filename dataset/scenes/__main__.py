"""Write the rendered demo set.

python -m dataset.scenes out/demo/data
python -m dataset.scenes out/ja --languages ja --sft_rows 1000
"""

import argparse
from pathlib import Path

from common.errors import run_command
from common.flags import program_name
from dataset.scenes.text import ALL_LANGUAGES, LANGUAGES
from dataset.scenes.write import FILES, N_ROWS, write_scene_set


def main() -> None:
    parser = argparse.ArgumentParser(
        program_name(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder that the set is written to")
    parser.add_argument(
        "--seed", type=int, default=1337, help="seed of every scene and question (default: 1337)"
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        choices=ALL_LANGUAGES,
        default=LANGUAGES,
        help=f"of questions and answers (default: {' '.join(LANGUAGES)}, as `make demo` uses)",
    )
    for part, default in N_ROWS.items():
        parser.add_argument(
            f"--{part}_rows",
            type=int,
            default=default,
            help=f"rows of {FILES[part][0]}; 0 leaves it out (default: {default})",
        )
    args = parser.parse_args()
    n_rows = {part: getattr(args, f"{part}_rows") for part in N_ROWS}
    n_rows = {part: n for part, n in n_rows.items() if n}
    write_scene_set(args.folder, n_rows, args.seed, args.languages)


if __name__ == "__main__":
    run_command(main)
