"""Write the rendered demo set: `python -m dataset.scenes out/demo/data`."""

import argparse
from pathlib import Path

from common.errors import run_command
from common.flags import program_name
from dataset.scenes.write import FILES, N_ROWS, write_scene_set


def main() -> None:
    parser = argparse.ArgumentParser(program_name(), description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that the set is written to")
    parser.add_argument(
        "--seed", type=int, default=1337, help="seed of every scene and question (default: 1337)"
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
    write_scene_set(args.folder, {part: n for part, n in n_rows.items() if n}, args.seed)


if __name__ == "__main__":
    run_command(main)
