"""Measure speed and memory: the published recipe, single parts of ours in it, and ours as a user gets it.

    python -m scripts.bench                                            # training, on the rendered scenes
    python -m scripts.bench train --flickr8k ../shared/flickr8k --tokenizer ../shared/minimind_tokenizer
    python -m scripts.bench decode --tokenizer ../shared/minimind_tokenizer
    python -m scripts.bench quality                                    # both recipes from several seeds
    python -m scripts.bench rows                                       # up to 1 million rows: start-up, memory

Training runs with a full-size ViT-B/16 tower; its weights are random, speed does not depend on them. Each row is a
process of its own. Prints a table as it goes and writes out/bench.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dataset.scenes.write import write_scene_set
from model.LMConfig import VLMConfig
from model.vision import quiet_transformers
from scripts.bench.clean import measure_cleaning
from scripts.bench.decode import measure_decoding
from scripts.bench.published.train import LEVERS
from scripts.bench.quality import SCRIPTS, measure_quality
from scripts.bench.rows import measure_rows
from scripts.download.items import LAYERS

WORK = ROOT / "out" / "bench"
STAGES = {  # what the published scripts have as defaults, and the file of the real rows
    "pretrain": {"batch_size": 16, "max_seq_len": 640, "file": "pretrain_vlm_data.jsonl"},
    "sft": {"batch_size": 8, "max_seq_len": 1536, "file": "sft_vlm_data.jsonl"},
}
SHARES = ("data", "vision", "forward", "backward", "optimizer")


def prepare(args: argparse.Namespace) -> None:
    """A full-size vision_encoder, and out/bench/STAGE/ with rows.jsonl of pictures that differ, and the pictures."""
    shutil.rmtree(WORK, ignore_errors=True)
    torch.manual_seed(0)
    with quiet_transformers():
        CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(WORK / "vision_model")
    CLIPImageProcessorPil().save_pretrained(WORK / "vision_model")
    for stage in args.stages:
        folder, name = WORK / stage, STAGES[stage]["file"]
        n_rows = batch_size_of(args, stage) * args.steps
        if args.flickr8k is None:
            write_scene_set(folder, {stage: n_rows})
            (folder / f"{stage}_images").rename(folder / "images")
            (folder / name).rename(folder / "rows.jsonl")
            continue
        with open(args.flickr8k / name, encoding="utf-8") as file:
            by_image = {json.loads(line)["image"]: line for line in file}
        (folder / "images").mkdir(parents=True)
        with zipfile.ZipFile(args.flickr8k / "pretrain_images.zip") as archive:
            for image in list(by_image)[:n_rows]:
                (folder / "images" / image).write_bytes(archive.read(f"pretrain_images/{image}"))
        (folder / "rows.jsonl").write_text(
            "".join(list(by_image.values())[:n_rows]), encoding="utf-8"
        )


def batch_size_of(args: argparse.Namespace, stage: str) -> int:
    return args.batch_size or STAGES[stage]["batch_size"]


def stage_flags(args: argparse.Namespace, stage: str, dim: int) -> list[str]:
    return [
        "--dim", str(dim), "--n_layers", str(LAYERS[dim]), "--batch_size", str(batch_size_of(args, stage)),
        "--data_path", str(WORK / stage / "rows.jsonl"), "--images_path", str(WORK / stage / "images"),
        "--vision_model", str(WORK / "vision_model"), "--tokenizer", str(args.tokenizer), "--device", args.device,
        "--max_seq_len", str(STAGES[stage]["max_seq_len"]),
    ]  # fmt: skip


def run(*command: str) -> str:
    """What it printed."""
    env = os.environ | {
        "PYTHONWARNINGS": "ignore"
    }  # published: more workers than some machines have cores
    finished = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    if finished.returncode:
        sys.exit(f"error: {command[0]} failed; its message is above")
    return finished.stdout


def measure_published(
    args: argparse.Namespace, stage: str, dim: int, levers: list[str]
) -> list[dict]:
    printed = run(
        "-m", "scripts.bench.published.train", "--stage", stage, "--max_steps", str(args.published_steps),
        "--levers", *levers, *stage_flags(args, stage, dim),
    )  # fmt: skip
    epoch = "cached" if "cache" in levers else "first"
    return [{"recipe": "published", "epoch": epoch, **json.loads(printed.splitlines()[-1])}]


def measure_ours(args: argparse.Namespace, stage: str, dim: int) -> list[dict]:
    """Two epochs of the real script with its defaults: the first computes the features, the second finds them cached."""
    out_dir = WORK / f"out_{stage}_{dim}"
    flags = [
        *stage_flags(args, stage, dim),
        *args.flags,
        "--dtype",
        args.dtype,
        "--init_weights",
        "none",
    ]
    run(
        SCRIPTS[stage], *flags, "--out_dir", str(out_dir), "--epochs", "2", "--log_interval", "1", "--save_interval", "1000",
        "--save_name", "bench",
    )  # fmt: skip
    records = [
        json.loads(line) for line in (out_dir / f"bench_{dim}.log.jsonl").read_text().splitlines()
    ]
    end = next(record for record in records if record["event"] == "end")
    rows = []
    for number, epoch in ((1, "first"), (2, "cached")):
        steps = [
            record for record in records if record["event"] == "train" and record["epoch"] == number
        ]
        seconds = [
            1 / record["images_per_second"] for record in steps[args.warm_up :]
        ]  # an image; steps are of equal size
        row = {"recipe": "ours", "epoch": epoch, "images_per_second": len(seconds) / sum(seconds)}
        for name in (
            "label_tokens_per_second",
            "tokens_per_second",
            "padding_share",
            *(f"{part}_share" for part in SHARES),
        ):
            values = [record[name] for record in steps[args.warm_up :] if name in record]
            if values:
                row[name] = sum(value * second for value, second in zip(values, seconds)) / sum(
                    seconds
                )
        rows.append(row | {name: end[name] for name in ("peak_memory_bytes", "dtype")})
    return rows


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the device at its best: the fastest of some products of 2048 x 2048 (4096 on a GPU)."""
    n = 2048 if device == "cpu" else 4096
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = 1e9
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def flops_of_image(row: dict, stage: str, dim: int) -> float:
    """Multiplications and additions that one image with its text needs: padding, frozen gradients and the head where nothing
    is learned are not needed, whoever computes them."""
    config, vision_encoder = (
        VLMConfig(dim=dim, n_layers=LAYERS[dim]),
        CLIPVisionConfig(patch_size=16),
    )
    tokens = row["tokens_per_second"] * (1 - row["padding_share"]) / row["images_per_second"]
    labels = row["label_tokens_per_second"] / row["images_per_second"]
    attention = (
        config.dim * (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    )  # weights of wq, wk, wv, wo
    layer = (
        tokens * 2 * (attention + 3 * config.dim * config.hidden_dim) + 2 * tokens**2 * config.dim
    )
    head = labels * 2 * config.dim * config.vocab_size
    learned_layers = 1 if stage == "pretrain" else config.n_layers
    language = layer * (2 * config.n_layers + learned_layers) + head * (
        2 if stage == "pretrain" else 3
    )
    n, width = config.n_image_tokens + 1, vision_encoder.hidden_size
    block = n * 2 * (4 * width**2 + 2 * width * vision_encoder.intermediate_size) + 4 * n**2 * width
    vision = (
        vision_encoder.num_hidden_layers * block
        + 2 * config.n_image_tokens * 3 * vision_encoder.patch_size**2 * width
    )
    return language + (vision if row["epoch"] == "first" else 0)


def bench_training(args: argparse.Namespace) -> list[dict]:
    prepare(args)
    peaks = {
        name: matmul_flops(args.device, getattr(torch, name)) for name in ("float32", "bfloat16")
    }
    print(
        f"matrix products: {peaks['float32'] / 1e9:.0f} GFLOP/s in float32, {peaks['bfloat16'] / 1e9:.0f} in bfloat16"
    )
    print(
        f"{'recipe':24}{'stage':10}{'dim':>5}{'epoch':>8}{'images/s':>10}{'labels/s':>10}{'padding':>9}"
        f"{'MFU':>6}{'GB':>6}  time split"
    )
    rows = []
    for dim in args.dims:
        for stage in args.stages:
            jobs = {}
            if "published" in args.recipes:
                jobs["published"] = []
            if "levers" in args.recipes:
                jobs |= {f"published + {lever}": [lever] for lever in LEVERS}
            measured = []
            for recipe, levers in jobs.items():
                measured += [
                    row | {"recipe": recipe} for row in measure_published(args, stage, dim, levers)
                ]
            if "ours" in args.recipes:
                measured += measure_ours(args, stage, dim)
            for row in measured:
                row |= {"stage": stage, "dim": dim}
                row["model_flop_utilisation"] = (
                    flops_of_image(row, stage, dim) * row["images_per_second"] / peaks[row["dtype"]]
                )
                rows.append(row)
                print_row(row)
    return rows


def print_row(row: dict) -> None:
    split = ", ".join(
        f"{part} {100 * row[f'{part}_share']:.0f} %" for part in SHARES if f"{part}_share" in row
    )
    print(
        f"{row['recipe']:24}{row['stage']:10}{row['dim']:5}{row['epoch']:>8}{row['images_per_second']:10.2f}"
        f"{row['label_tokens_per_second']:10.1f}{100 * row['padding_share']:8.1f}%{100 * row['model_flop_utilisation']:5.0f}%"
        f"{row['peak_memory_bytes'] / 1e9:6.2f}  {split}",
        flush=True,
    )


MEASURE = {
    "train": bench_training,
    "decode": measure_decoding,
    "quality": measure_quality,
    "rows": measure_rows,
    "clean": measure_cleaning,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=MEASURE, default="train", help="what to measure")
    parser.add_argument(
        "--flickr8k",
        type=Path,
        help="folder of real rows and images (rendered scenes where not given)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "model/demo/tokenizer", help="tokenizer folder"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of ours, as the training scripts",
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="training stages"
    )
    parser.add_argument(
        "--dims",
        nargs="+",
        type=int,
        choices=LAYERS,
        default=[512],
        help="512 (8 layers), 768 (16)",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=("published", "levers", "ours"),
        default=["published", "levers", "ours"],
        help="rows",
    )
    parser.add_argument(
        "--batch_size", type=int, help="images at a time (as published where not given)"
    )
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps in an epoch of ours")
    parser.add_argument(
        "--published_steps", type=int, default=4, help="optimizer steps of the published recipe"
    )
    parser.add_argument(
        "--warm_up",
        type=int,
        default=1,
        help="first steps of an epoch of ours that are not counted",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe for quality")
    parser.add_argument(
        "--flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="all that follows goes to our training scripts",
    )
    args = parser.parse_args()
    rows = MEASURE[args.what](args)
    path = ROOT / "out" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(results | {args.what: rows}, indent=1))
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
