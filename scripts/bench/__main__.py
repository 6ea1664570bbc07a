"""Measure speed, memory and quality: the published recipe, and ours.

    python -m scripts.bench                 # training on rendered scenes; on a GPU, decoding too
    python -m scripts.bench train --flickr8k FOLDER --tokenizer FOLDER
    python -m scripts.bench decode --dims 512 768
    python -m scripts.bench quality         # both recipes from several seeds
    python -m scripts.bench rows            # up to 1 million rows: start-up, memory
    python -m scripts.bench parquet         # 1 million rows that share pictures: disk, start-up
    python -m scripts.bench clean --flickr8k FOLDER
    python -m scripts.bench photos --flickr8k FOLDER --tokenizer FOLDER
    python -m scripts.bench busy            # on a CPU that other programs use too
    python -m scripts.bench attention       # does a model look at what it speaks about?
    python -m scripts.bench serve --exported FOLDER     # our server, and that of transformers
    python -m scripts.bench formats         # what an exported model runs in: speed, same answers

A table is printed as it grows; out/bench.json keeps the newest of each kind.
"""

import argparse
import importlib
import json
from pathlib import Path

from common.errors import run_command
from common.files import write_text
from common.flags import program_name
from scripts.download.items import LAYERS

# Each is a module beside this one with `measure(args)`, which prints its rows and returns them.
SUBJECTS = (
    "train",
    "decode",
    "quality",
    "rows",
    "parquet",
    "clean",
    "photos",
    "busy",
    "attention",
    "formats",
    "serve",
)
RESULTS = Path("out/bench.json")
# Of formats.
TOOLS = ("PyTorch", "transformers", "onnxruntime", "llama.cpp", "browser", "endpoint")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        program_name(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument

    # what, and on what
    subject = "what to measure (default: train, and on a GPU decode too)"
    add("what", nargs="?", choices=SUBJECTS, help=subject)
    add("--flickr8k", type=Path, help="folder of real rows and images; scenes if not given")
    add("--tokenizer", default="model/demo/tokenizer", help="folder (default: the demo's)")
    add("--device", help="cpu or cuda; a GPU if there is one, if not given")
    add(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of our training, as in the training scripts (default: bfloat16)",
    )

    # which rows of the table
    stages = ("pretrain", "sft")
    add("--stages", nargs="+", choices=stages, default=stages, help="of training (default: both)")
    add(
        "--dims",
        nargs="+",
        type=int,
        choices=LAYERS,
        default=[512],
        help="widths of the model: 512 (8 layers), 768 (16 layers) (default: 512)",
    )
    gguf = "folder of .gguf files of a model of such a width: llama.cpp decodes them beside ours"
    add("--gguf", type=Path, help=gguf)
    recipes = ("published", "levers", "ours")
    add(
        "--recipes",
        nargs="+",
        choices=recipes,
        default=recipes,
        help="of training; levers: the published one with one part of ours (default: all)",
    )

    # of serve and formats
    demo = "model/demo/sft_vlm_128.pth"
    add("--weights", default=demo, help="for serve, formats: the model (default: the demo's)")
    served = "transformers directory (default: --weights, exported)"
    add("--exported", type=Path, help=f"for serve: {served}")
    at_once = "for serve: clients at once (default: 1 8 16 32)"
    add("--clients", nargs="+", type=int, default=[1, 8, 16, 32], help=at_once)

    languages = ("en", "zh")
    captions = "of the captions of photos (default: both)"
    add("--languages", nargs="+", choices=languages, default=languages, help=captions)

    # of formats
    add("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="that are asked (default: all)")
    add("--data", type=Path, help=".jsonl file of questions; drawn scenes if not given")
    add("--images", type=Path, help="folder of its pictures; the file's own if not given")
    add("--questions", type=int, default=200, help="how many are asked (default: 200)")

    # how much of each
    add("--batch_size", type=int, help="samples in a batch; as published if not given")
    add("--steps", type=int, default=6, help="steps of an epoch of ours (default: 6)")
    add("--published_steps", type=int, default=4, help="steps of the published one (default: 4)")
    add(
        "--warm_up",
        type=int,
        default=1,
        help="first log lines of ours not counted: steps, on a GPU tens of steps (default: 1)",
    )
    add("--seeds", type=int, default=3, help="runs of each recipe for quality (default: 3)")
    add(
        "--flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="all that follows goes to our training scripts",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # PyTorch takes seconds to import, so --help does without.
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # A rented GPU: one command for both.
    subjects = ["train", "decode"] if args.device != "cpu" else ["train"]
    for subject in [args.what] if args.what else subjects:
        rows = importlib.import_module(f"scripts.bench.{subject}").measure(args)
        results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
        write_text(RESULTS, json.dumps(results | {subject: rows}, indent=1))
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    run_command(main)
