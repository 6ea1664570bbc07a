"""The same quality: the published recipe and ours learn the same rows from several seeds.

Rendered scenes, the small language model and vision encoder that the repository ships; both stages
from the same start. Curves and validation losses are drawn to out/bench_quality.png.
"""

import random
import shutil
import statistics
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dataset.scenes.write import FILES, write_scene_set
from scripts.bench import runs
from scripts.bench.runs import TRAIN_SCRIPTS, read_log, read_result
from scripts.processes import as_flags, run_python

WORK = runs.WORK / "quality"
CURVES = Path("out/bench_quality.png")
RECIPES = {"published": "tab:gray", "ours": "tab:blue"}  # and their colors
# Those of the demo of 2026-11-24, which the figures of docs/results.md belong to.
LEARNING_RATES = {"pretrain": "2e-3", "sft": "6e-4"}
# Rows; the projector alone needs longer until its loss is steady.
N_TRAIN = {"pretrain": 6400, "sft": 1600}
N_VAL, DIM = 320, 128


def measure(args: Namespace) -> list[dict]:
    """Rows of recipe, stage, seed, losses (one a step) and val_loss."""
    # train, two at a time with a thread each
    shutil.rmtree(WORK, ignore_errors=True)
    seeds = list(range(1, args.seeds + 1))
    for stage in args.stages:
        write_rows(stage, seeds)
    jobs = [(recipe, stage, seed) for stage in args.stages for recipe in RECIPES for seed in seeds]
    with ThreadPoolExecutor(max_workers=2) as pool:
        rows = list(pool.map(lambda job: train(*job), jobs))

    # show
    print(f"{'stage':10}{'recipe':12}validation loss of each seed, mean ± standard deviation")
    for stage in args.stages:
        for recipe in RECIPES:
            values = [row["val_loss"] for row in select(rows, recipe, stage)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            listed = " ".join(f"{value:.4f}" for value in values)
            print(f"{stage:10}{recipe:12}{listed}   {statistics.mean(values):.4f} ± {spread:.4f}")
    draw(rows, CURVES)
    print(f"curves: {CURVES}")
    return rows


def select(rows: list[dict], recipe: str, stage: str) -> list[dict]:
    return [row for row in rows if (row["recipe"], row["stage"]) == (recipe, stage)]


def write_rows(stage: str, seeds: list[int]) -> None:
    """WORK/STAGE: images/, val.jsonl, and for each seed train-SEED.jsonl in another order."""
    folder, name = WORK / stage, FILES[stage][0]
    write_scene_set(folder, {stage: N_TRAIN[stage] + N_VAL})
    lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "val.jsonl").write_text("".join(lines[:N_VAL]), encoding="utf-8")
    for seed in seeds:
        rows = lines[N_VAL : N_VAL + N_TRAIN[stage]]
        random.Random(seed).shuffle(rows)
        (folder / f"train-{seed}.jsonl").write_text("".join(rows), encoding="utf-8")


def train(recipe: str, stage: str, seed: int) -> dict:
    """A row of the table."""
    folder, out_dir = WORK / stage, WORK / f"{recipe}-{stage}-{seed}"
    flags = as_flags(
        data_path=folder / f"train-{seed}.jsonl",
        images_path=folder / "images",
        val_data=folder / "val.jsonl",
        init_weights=f"model/demo/lm_{DIM}.pth",
        tokenizer="model/demo/tokenizer",
        vision_model="model/demo/vision_model",
        dim=DIM,
        n_layers=6,
        max_seq_len=640,
        batch_size=16,
        learning_rate=LEARNING_RATES[stage],
        seed=seed,
        device="cpu",
    )
    row = {"recipe": recipe, "stage": stage, "seed": seed}
    if recipe == "published":
        # Trimming gives the same loss, sooner: a causal model never sees padding on its right.
        flags += as_flags(stage=stage, num_workers=0, levers="trim")
        command = ["-m", "scripts.bench.published.train", *flags]
        result = read_result(run_python(*command, capture=True, OMP_NUM_THREADS="1"))
        return row | {name: result[name] for name in ("losses", "val_loss")}

    flags += as_flags(epochs=1, log_interval=1, save_name=stage, out_dir=out_dir)
    run_python(TRAIN_SCRIPTS[stage], *flags, capture=True, OMP_NUM_THREADS="1")
    log = out_dir / f"{stage}_{DIM}.log.jsonl"
    losses = [record["loss"] for record in read_log(log, "train")]
    return row | {"losses": losses, "val_loss": read_log(log, "validation")[-1]["val_loss"]}


def draw(rows: list[dict], path: Path) -> None:
    """A PNG with a panel for each stage: losses smoothed over ten steps, and validation losses."""
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(5.5 * len(stages), 4), dpi=110, layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        for recipe, color in RECIPES.items():
            for number, row in enumerate(select(rows, recipe, stage)):
                losses, n = row["losses"], len(row["losses"])
                means = [statistics.mean(losses[max(0, i - 9) : i + 1]) for i in range(n)]
                axes.plot(means, color=color, linewidth=1, label=recipe if number == 0 else None)
                axes.plot(n, row["val_loss"], "o", color=color, markersize=4)
        label = "loss (dots: validation)"
        axes.set(title=stage, xlabel="optimizer step", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
