"""`make demo`: from nothing to a small model that sees, through the scripts a user of the real data runs.

    python -m scripts.demo                        # 10 to 15 minutes on 2 CPU cores; everything goes to out/demo/

Renders the scene set, then base language model -> pretraining -> SFT -> evaluation with the right image, a wrong one and none.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

from common.errors import run_command
from dataset.scenes.text import PAIR_TYPES, QUESTION_TYPES
from dataset.scenes.write import FILES, write_scene_set

STAND_INS = ROOT / "model" / "demo"
OUT = ROOT / "out" / "demo"
DIM, N_LAYERS = 128, 6
MODEL_FLAGS = [
    "--dim", str(DIM), "--n_layers", str(N_LAYERS), "--device", "cpu",
    "--tokenizer", str(STAND_INS / "tokenizer"), "--vision_model", str(STAND_INS / "vision_model"),
]  # fmt: skip
TRAIN_FLAGS = [
    *MODEL_FLAGS,
    "--dtype",
    "float32",
    "--out_dir",
    str(OUT),
    "--log_interval",
    "10",
    "--feature_cache_gb",
    "0",
]
ROWS = {"lm": 1280, "pretrain": 3200, "sft": 7200, "multi": 2400, "eval": 640, "eval_multi": 300}
IMAGE_CHOICES = {
    "right": "accuracy",
    "wrong": "accuracy_wrong_image",
    "none": "accuracy_no_image",
}  # -> name in the report


MULTI_CHOICES = {"right": "accuracy_multi", "wrong": "accuracy_multi_wrong_images"}


def run_stage(title: str, script: str, *flags: str) -> None:
    """Run one of the repository's scripts as a user would, showing the command."""
    shown = " ".join(flag.replace(f"{ROOT}/", "") for flag in flags)
    print(f"\n== {title}\n$ python {script} {shown}", flush=True)
    finished = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=ROOT)
    if finished.returncode:
        sys.exit(f"error: {script} stopped with status {finished.returncode}; its message is above")


def train_stages(data: Path) -> None:
    run_stage(
        "base: the language model reads about scenes (it starts from the shipped stand-in for lm_512.pth)", "train_sft_vlm.py",
        *TRAIN_FLAGS, "--data_path", str(data / "lm_data.jsonl"), "--init_weights", str(STAND_INS / "lm_128.pth"),
        "--save_name", "lm", "--epochs", "1", "--batch_size", "32", "--learning_rate", "1e-4",
    )  # fmt: skip
    run_stage(
        "pretraining: the projector learns to translate patches into that language", "train_pretrain_vlm.py",
        *TRAIN_FLAGS, "--data_path", str(data / "pretrain_vlm_data.jsonl"), "--images_path", str(data / "pretrain_images"),
        "--epochs", "1", "--batch_size", "16", "--learning_rate", "2e-3", "--warmup_iters", "20",
    )  # fmt: skip
    run_stage(
        "SFT: the whole language model learns to answer about images", "train_sft_vlm.py",
        *TRAIN_FLAGS, "--data_path", str(data / "sft_vlm_data.jsonl"), "--images_path", str(data / "sft_images"),
        "--epochs", "1", "--batch_size", "8", "--accumulation_steps", "2", "--learning_rate", "6e-4", "--warmup_iters", "20",
    )  # fmt: skip
    run_stage(
        "multi-image SFT: the same model goes on with questions about two images", "train_sft_vlm.py",
        *TRAIN_FLAGS, "--data_path", str(data / "sft_vlm_data_multi.jsonl"), "--images_path", str(data / "sft_multi_images"),
        "--init_weights", str(OUT / "sft_vlm_128.pth"), "--save_name", "sft_vlm_multi",
        "--epochs", "1", "--batch_size", "8", "--accumulation_steps", "2", "--learning_rate", "4e-4", "--warmup_iters", "10",
    )  # fmt: skip


def evaluate(title: str, part: str, images: str, mode: str) -> dict:
    """The report of eval_vlm.py on a part of the set, with the "right" images, "wrong" ones or "none"."""
    rows, folder = FILES[part]
    path = OUT / f"{part}_{images}.json"
    run_stage(
        title, "eval_vlm.py",
        *MODEL_FLAGS, "--out_dir", str(OUT), "--model_mode", mode, "--data", str(OUT / "data" / rows),
        "--images_path", str(OUT / "data" / folder), "--show_images", images, "--save_report", str(path),
    )  # fmt: skip
    return json.loads(path.read_text(encoding="utf-8"))


def print_results(reports: dict[str, dict], report: dict, report_path: Path) -> None:
    print("\nExact answers on held-out scenes, % of questions\n")
    print(
        f"{'':14}"
        + "".join(f"{heading:>13}" for heading in ("right image", "wrong image", "no image"))
    )
    for name in (*QUESTION_TYPES, "overall"):
        print(
            f"{name:14}"
            + "".join(f"{100 * report[key][name]:13.1f}" for key in IMAGE_CHOICES.values())
        )
    print("\nTwo images, after multi-image SFT\n")
    print(f"{'':14}" + "".join(f"{heading:>13}" for heading in ("right images", "wrong images")))
    for name in (*PAIR_TYPES, "overall"):
        print(
            f"{name:14}"
            + "".join(f"{100 * report[key][name]:13.1f}" for key in MULTI_CHOICES.values())
        )
    print("\nSome answers (right image):\n")
    for answer in reports["right"]["answers"][: 2 * len(QUESTION_TYPES)]:
        question = answer["question"].replace("<image>\n", "")
        pictures = ", ".join(Path(image).name for image in answer["images"])
        verdict = "" if answer["given"] == answer["answer"] else f"   (wrong: {answer['answer']})"
        print(f"  [{pictures}] {question} -> {answer['given']}{verdict}")
    shown = OUT.relative_to(ROOT)
    print("")
    for title, ending in (("weights", "pth"), ("loss curves", "png")):
        names = (
            f"{shown}/{name}_128.{ending}"
            for name in ("lm", "pretrain_vlm", "sft_vlm", "sft_vlm_multi")
        )
        print(f"{title}: {', '.join(names)}")
    print(f"report: {report_path.relative_to(ROOT)}")
    print(
        f"{report['seconds'] / 60:.1f} minutes, at most {report['peak_memory_bytes'] / 1e9:.2f} GB of memory"
    )
    flags = " ".join(flag.replace(f"{ROOT}/", "") for flag in MODEL_FLAGS)
    print("talk to it: make web, or")
    print(
        f'  python eval_vlm.py --image {shown}/data/eval_images/00000a.jpg --prompt "What color is the star?" --temperature 0 \\'
    )
    print(f"    --out_dir {shown} {flags}")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    started = time.perf_counter()
    data = OUT / "data"
    print("== rendering the scene set", flush=True)
    write_scene_set(data, ROWS)
    train_stages(data)
    reports = {
        images: evaluate(f"evaluation on held-out scenes, {images} image", "eval", images, "1")
        for images in IMAGE_CHOICES
    }
    report = {key: reports[images]["accuracy"] for images, key in IMAGE_CHOICES.items()}
    for images, key in MULTI_CHOICES.items():
        title = f"evaluation of multi-image SFT on held-out pairs, {images} images"
        report[key] = evaluate(title, "eval_multi", images, "2")["accuracy"]
    report["seconds"] = round(time.perf_counter() - started, 1)
    usage = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    report["peak_memory_bytes"] = max(usage) * (
        1 if sys.platform == "darwin" else 1024
    )  # of the largest process
    report_path = OUT / "report.json"
    report_path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print_results(reports, report, report_path)


if __name__ == "__main__":
    run_command(main)
