"""Training speed: the published recipe, single parts of ours in it, and ours as a user gets it.

Each row of the table is a process of its own. The vision encoder is a full-size ViT-B/16; its
weights are random, for speed does not depend on them.
"""

import json
import shutil
import time
import zipfile
from argparse import Namespace

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dataset.scenes.write import FILES, write_scene_set
from model.LMConfig import VLMConfig
from model.pretrained import quiet_transformers
from scripts.bench.published.train import LEVERS
from scripts.bench.runs import TRAIN_SCRIPTS, WORK, read_log, read_result
from scripts.download.items import LAYERS
from scripts.processes import as_flags, run_python
from trainer.meter import PARTS

VISION_MODEL = WORK / "vision_model"
# Defaults of the published scripts.
PUBLISHED_FLAGS = {
    "pretrain": {"batch_size": 16, "max_seq_len": 640},
    "sft": {"batch_size": 8, "max_seq_len": 1536},
}
# What a row takes from the log: means over the time of the steps.
MEANS = (
    "label_tokens_per_second",
    "tokens_per_second",
    "padding_share",
    *(f"{part}_share" for part in PARTS),
)


def measure(args: Namespace) -> list[dict]:
    """Rows of recipe, stage, dim and epoch ("first", or "cached" features): speed and memory."""
    shutil.rmtree(WORK, ignore_errors=True)
    write_vision_model()
    for stage in args.stages:
        write_rows(args, stage)
    best = {name: matmul_flops(args.device, name) for name in ("float32", "bfloat16")}
    print(
        f"matrix products: {best['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{best['bfloat16'] / 1e9:.0f} in bfloat16"
    )
    print(
        f"{'recipe':24}{'stage':10}{'dim':>5}{'epoch':>8}{'images/s':>10}{'labels/s':>10}"
        f"{'padding':>9}{'MFU':>6}{'GB':>6}  time split"
    )
    rows = []
    for dim in args.dims:
        for stage in args.stages:
            for row in measure_recipes(args, stage, dim):
                row |= {"stage": stage, "dim": dim}
                flops = flops_of_image(row, stage, dim) * row["images_per_second"]
                row["model_flop_utilisation"] = flops / best[row["dtype"]]
                rows.append(row)
                print_row(row)
    return rows


def measure_recipes(args: Namespace, stage: str, dim: int):
    """The rows of each recipe, as they come."""
    if "published" in args.recipes:
        yield measure_published(args, stage, dim)
    for lever in LEVERS if "levers" in args.recipes else ():
        yield measure_published(args, stage, dim, lever)
    if "ours" in args.recipes:
        yield from measure_ours(args, stage, dim)


def print_row(row: dict) -> None:
    split = [
        f"{part} {100 * row[f'{part}_share']:.0f} %" for part in PARTS if f"{part}_share" in row
    ]
    print(
        f"{row['recipe']:24}{row['stage']:10}{row['dim']:5}{row['epoch']:>8}"
        f"{row['images_per_second']:10.2f}{row['label_tokens_per_second']:10.1f}"
        f"{100 * row['padding_share']:8.1f}%{100 * row['model_flop_utilisation']:5.0f}%"
        f"{row['peak_memory_bytes'] / 1e9:6.2f}  {', '.join(split)}",
        flush=True,
    )


def write_vision_model() -> None:
    torch.manual_seed(0)
    with quiet_transformers():
        CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(VISION_MODEL)
    CLIPImageProcessorPil().save_pretrained(VISION_MODEL)


def write_rows(args: Namespace, stage: str) -> None:
    """WORK/STAGE: rows.jsonl, and images/ that all differ, enough for an epoch of ours."""
    folder, name = WORK / stage, FILES[stage][0]
    n_rows = choose_batch_size(args, stage) * args.steps
    if args.flickr8k is None:
        write_scene_set(folder, {stage: n_rows})
        (folder / name).rename(folder / "rows.jsonl")
        return

    # photographs: one row of each
    with open(args.flickr8k / name, encoding="utf-8") as file:
        by_image = {json.loads(line)["image"]: line for line in file}
    chosen = dict(list(by_image.items())[:n_rows])
    (folder / "images").mkdir(parents=True)
    with zipfile.ZipFile(args.flickr8k / "pretrain_images.zip") as archive:
        for image in chosen:
            (folder / "images" / image).write_bytes(archive.read(f"pretrain_images/{image}"))
    (folder / "rows.jsonl").write_text("".join(chosen.values()), encoding="utf-8")


def choose_batch_size(args: Namespace, stage: str) -> int:
    return args.batch_size or PUBLISHED_FLAGS[stage]["batch_size"]


def list_flags(args: Namespace, stage: str, dim: int) -> list[str]:
    """What both recipes are told."""
    return as_flags(
        dim=dim,
        n_layers=LAYERS[dim],
        batch_size=choose_batch_size(args, stage),
        max_seq_len=PUBLISHED_FLAGS[stage]["max_seq_len"],
        data_path=WORK / stage / "rows.jsonl",
        images_path=WORK / stage / "images",
        vision_model=VISION_MODEL,
        tokenizer=args.tokenizer,
        device=args.device,
    )


def measure_published(args: Namespace, stage: str, dim: int, *levers: str) -> dict:
    flags = as_flags(stage=stage, max_steps=args.published_steps, levers=levers)
    command = ["-m", "scripts.bench.published.train", *flags, *list_flags(args, stage, dim)]
    result = read_result(run_python(*command, capture=True))
    recipe = " + ".join(["published", *levers])
    return {"recipe": recipe, "epoch": "cached" if "cache" in levers else "first", **result}


def measure_ours(args: Namespace, stage: str, dim: int) -> list[dict]:
    """Two epochs of the real script: the first computes the features, the second has them cached.

    What is not given has the script's default.
    """
    # train
    out_dir = WORK / f"out_{stage}_{dim}"
    is_gpu = args.device != "cpu"
    flags = as_flags(
        dtype=args.dtype,
        init_weights="none",
        out_dir=out_dir,
        save_name="bench",
        epochs=2,
        log_interval=10 if is_gpu else 1,  # a GPU waits at each line
        save_interval=1000,
    )
    command = [TRAIN_SCRIPTS[stage], *list_flags(args, stage, dim), *flags, *args.flags]
    run_python(*command, capture=True)

    # read the log
    log = out_dir / f"bench_{dim}.log.jsonl"
    (end,) = read_log(log, "end")
    rows = []
    for number, epoch in ((1, "first"), (2, "cached")):
        steps = [step for step in read_log(log, "train") if step["epoch"] == number][args.warm_up :]
        # Seconds of an image; lines are of steps of equal size.
        seconds = [1 / step["images_per_second"] for step in steps]
        row = {"recipe": "ours", "epoch": epoch, "images_per_second": len(seconds) / sum(seconds)}
        for name in MEANS:
            if name in steps[0]:
                weighted = [step[name] * second for step, second in zip(steps, seconds)]
                row[name] = sum(weighted) / sum(seconds)
        rows.append(row | {name: end[name] for name in ("peak_memory_bytes", "dtype")})
    return rows


def matmul_flops(device: str, dtype: str) -> float:
    """FLOP/s of the device at its best: the fastest of ten large matrix products, or of 10 s."""
    n = 2048 if device == "cpu" else 4096
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
    best, begun = float("inf"), time.perf_counter()
    for _ in range(10):
        # A CPU without instructions for bfloat16 is a hundred times slower.
        if time.perf_counter() > begun + 10:
            break
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def flops_of_image(row: dict, stage: str, dim: int) -> float:
    """Multiplications and additions that one image with its text needs, whoever computes them.

    Padding is not needed, nor are the gradients of frozen weights, nor the head where there is no
    label.

    Args:
        row: of the table, for its tokens and labels of an image.
        stage: "pretrain" trains the last layer, "sft" all.
        dim: width of the language model.
    """
    config = VLMConfig(dim=dim, n_layers=LAYERS[dim])
    vision = CLIPVisionConfig(patch_size=16)
    tokens = row["tokens_per_second"] * (1 - row["padding_share"]) / row["images_per_second"]
    labels = row["label_tokens_per_second"] / row["images_per_second"]

    # language model: two passes through each layer, and one more for the gradients of its weights
    attention = config.dim * (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    weights = attention + 3 * config.dim * config.hidden_dim
    layer = tokens * 2 * weights + 2 * tokens**2 * config.dim
    head = labels * 2 * config.dim * config.vocab_size
    is_pretraining = stage == "pretrain"
    n_trainable = 1 if is_pretraining else config.n_layers
    language = layer * (2 * config.n_layers + n_trainable) + head * (2 if is_pretraining else 3)
    if row["epoch"] == "cached":
        return language

    # vision encoder: one pass through each block, and the embedding of patches
    n, width = config.n_image_tokens + 1, vision.hidden_size
    block = n * 2 * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * n**2 * width
    patches = 2 * config.n_image_tokens * 3 * vision.patch_size**2 * width
    return language + vision.num_hidden_layers * block + patches
