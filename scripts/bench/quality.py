"""The same quality: the published recipe and ours learn the same rows from several seeds; validation loss and curves.

Rendered scenes, the small language model and vision_encoder that the repository ships; one stage after the other from the same start.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]

from dataset.scenes.write import write_scene_set

WORK = ROOT / "out" / "bench" / "quality"
STAND_INS = ROOT / "model" / "demo"
SCRIPTS = {"pretrain": "train_pretrain_vlm.py", "sft": "train_sft_vlm.py"}
LEARNING_RATES = {"pretrain": "2e-3", "sft": "6e-4"}  # the demo's
N_TRAIN = {
    "pretrain": 6400,
    "sft": 1600,
}  # rows; the projector alone needs longer until its loss is steady
N_VAL, BATCH_SIZE, DIM = 320, 16, 128


def prepare(stage: str, seeds: list[int]) -> None:
    """WORK/STAGE/: images/, val.jsonl, and train-SEED.jsonl, the same rows in another order for each seed."""
    folder = WORK / stage
    write_scene_set(folder, {stage: 2 * (N_TRAIN[stage] + N_VAL)})
    (folder / f"{stage}_images").rename(folder / "images")
    lines = (
        (folder / f"{stage}_vlm_data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    )
    lines = [
        line for line in lines if len(json.loads(line)["image"].split(",")) == 1
    ]  # the published loader's limit
    (folder / "val.jsonl").write_text("".join(lines[:N_VAL]), encoding="utf-8")
    for seed in seeds:
        rows = lines[N_VAL : N_VAL + N_TRAIN[stage]]
        random.Random(seed).shuffle(rows)
        (folder / f"train-{seed}.jsonl").write_text("".join(rows), encoding="utf-8")


def run(recipe: str, stage: str, seed: int) -> dict:
    """A row with losses (one a step) and val_loss."""
    folder = WORK / stage
    flags = [
        "--dim", str(DIM), "--n_layers", "6", "--batch_size", str(BATCH_SIZE), "--max_seq_len", "640", "--device", "cpu",
        "--data_path", str(folder / f"train-{seed}.jsonl"), "--images_path", str(folder / "images"),
        "--val_data", str(folder / "val.jsonl"), "--tokenizer", str(STAND_INS / "tokenizer"),
        "--vision_model", str(STAND_INS / "vision_model"), "--init_weights", str(STAND_INS / f"lm_{DIM}.pth"),
        "--learning_rate", LEARNING_RATES[stage], "--seed", str(seed),
    ]  # fmt: skip
    if recipe == "published":
        script = ["-m", "scripts.bench.published.train", "--stage", stage, "--num_workers", "0"]
        script += [
            "--levers",
            "trim",
        ]  # the same loss, sooner: a causal model never sees padding on its right
    else:
        out_dir = WORK / f"{recipe}-{stage}-{seed}"
        script = [
            SCRIPTS[stage],
            "--epochs",
            "1",
            "--log_interval",
            "1",
            "--save_name",
            stage,
            "--out_dir",
            str(out_dir),
        ]
    finished = subprocess.run(
        [sys.executable, *script, *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        sys.exit(f"error: {script[0]} failed: {finished.stderr[-500:]}")
    row = {"recipe": recipe, "stage": stage, "seed": seed}
    if recipe == "published":
        result = json.loads(finished.stdout.splitlines()[-1])
        return row | {name: result[name] for name in ("losses", "val_loss")}
    log = (out_dir / f"{stage}_{DIM}.log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    losses = [record["loss"] for record in records if record["event"] == "train"]
    return row | {
        "losses": losses,
        "val_loss": [r["val_loss"] for r in records if r["event"] == "validation"][-1],
    }


def draw(rows: list[dict], path: Path) -> None:
    """A PNG with a panel for each stage: every run's loss, smoothed over ten steps, and its validation loss at the end."""
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(5.5 * len(stages), 4), dpi=110, layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        for recipe, color in (("published", "tab:gray"), ("ours", "tab:blue")):
            for number, row in enumerate(
                row for row in rows if (row["recipe"], row["stage"]) == (recipe, stage)
            ):
                means = [
                    statistics.mean(row["losses"][max(0, i - 9) : i + 1])
                    for i in range(len(row["losses"]))
                ]
                axes.plot(means, color=color, linewidth=1, label=recipe if number == 0 else None)
                axes.plot(len(means), row["val_loss"], "o", color=color, markersize=4)
        axes.set(
            title=stage, xlabel="optimizer step", ylabel="loss (dots: validation)", yscale="log"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def measure_quality(args) -> list[dict]:
    """Runs of both recipes for each stage and seed, two at a time with a thread each."""
    shutil.rmtree(WORK, ignore_errors=True)
    seeds = list(range(1, args.seeds + 1))
    for stage in args.stages:
        prepare(stage, seeds)
    jobs = [
        (recipe, stage, seed)
        for stage in args.stages
        for recipe in ("published", "ours")
        for seed in seeds
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        rows = list(pool.map(lambda job: run(*job), jobs))
    print(f"{'stage':10}{'recipe':12}validation loss of each seed, mean ± standard deviation")
    for stage in args.stages:
        for recipe in ("published", "ours"):
            values = [
                row["val_loss"] for row in rows if (row["recipe"], row["stage"]) == (recipe, stage)
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown = " ".join(f"{value:.4f}" for value in values)
            print(f"{stage:10}{recipe:12}{shown}   {statistics.mean(values):.4f} ± {spread:.4f}")
    draw(rows, ROOT / "out" / "bench_quality.png")
    print("curves: out/bench_quality.png")
    return rows
