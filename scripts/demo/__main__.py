"""`make demo`: from nothing to a small model that sees, through the scripts a user runs.

    python -m scripts.demo                 # 10 to 15 minutes on 2 CPU cores; writes to out/demo/

Renders the scene set; then base language model -> pretraining -> SFT -> multi-image SFT; then asks
about held-out scenes with the right images, wrong ones and none.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from common.errors import run_command
from common.files import write_text
from common.flags import program_name
from dataset.scenes.text import PAIR_TYPES, QUESTION_TYPES
from dataset.scenes.write import FILES, write_scene_set
from scripts.processes import as_flags, run_python

OUT = Path("out/demo")
DATA = OUT / "data"
# Rows of each part of the set.
ROWS = {"lm": 1280, "pretrain": 3200, "sft": 7200, "multi": 2400, "eval": 640, "eval_multi": 300}
# Images that the questions come with -> name in the report.
ONE_IMAGE = {"right": "accuracy", "wrong": "accuracy_wrong_image", "none": "accuracy_no_image"}
TWO_IMAGES = {"right": "accuracy_multi", "wrong": "accuracy_multi_wrong_images"}


def main() -> None:
    parser = argparse.ArgumentParser(
        program_name(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

    # data and training
    started = time.perf_counter()
    print("== rendering the scene set", flush=True)
    write_scene_set(DATA, ROWS)
    train_stages()

    # evaluation
    report, title = {}, "evaluation on held-out scenes"
    for images, name in ONE_IMAGE.items():
        answered = evaluate(f"{title}, {images} image", "sft_vlm", "eval", images)
        report[name] = answered["accuracy"]
        if images == "right":
            answers = answered["answers"]
    title = "evaluation of multi-image SFT on held-out pairs"
    for images, name in TWO_IMAGES.items():
        answered = evaluate(f"{title}, {images} images", "sft_vlm_multi", "eval_multi", images)
        report[name] = answered["accuracy"]

    # report
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["peak_memory_bytes"] = peak_memory()
    write_text(OUT / "report.json", json.dumps(report, indent=1))
    print_results(report, answers)


def train_stages() -> None:
    """Each stage starts from the weights of the one before; sizes come with them."""
    # reads
    train(
        "base: the language model reads about scenes (it starts from a shipped stand-in for "
        "lm_512.pth)",
        "train_sft_vlm.py",
        part="lm",
        init_weights="model/demo/lm_128.pth",
        save_name="lm",
        batch_size=32,
        learning_rate="1e-4",
    )
    # sees
    train(
        "pretraining: the projector learns to translate patches into that language",
        "train_pretrain_vlm.py",
        part="pretrain",
        init_weights=OUT / "lm_128.pth",
        batch_size=16,
        learning_rate="2e-3",
        warmup_iters=20,
    )
    # answers
    train(
        "SFT: the whole language model learns to answer about images",
        "train_sft_vlm.py",
        part="sft",
        init_weights=OUT / "pretrain_vlm_128.pth",
        batch_size=8,
        accumulation_steps=2,
        learning_rate="6e-4",
        warmup_iters=20,
    )
    # compares
    train(
        "multi-image SFT: the same model goes on with questions about two images",
        "train_sft_vlm.py",
        part="multi",
        init_weights=OUT / "sft_vlm_128.pth",
        save_name="sft_vlm_multi",
        batch_size=8,
        accumulation_steps=2,
        learning_rate="4e-4",
        warmup_iters=10,
    )


def train(title: str, script: str, part: str, **options: object) -> None:
    """Run a training script on one part of the set, for an epoch.

    Args:
        title: printed above the command.
        script: of the repository.
        part: of FILES.
        options: flags of the script.
    """
    rows, images = FILES[part]
    data = {"data_path": DATA / rows}
    if images:
        data["images_path"] = DATA / images
    # An epoch looks at each image once, so caching features would gain nothing.
    rest = dict(
        epochs=1, out_dir=OUT, device="cpu", dtype="float32", log_interval=10, feature_cache_gb=0
    )
    run_stage(title, script, *as_flags(**data, **options, **rest))


def evaluate(title: str, model: str, part: str, images: str) -> dict:
    """The report of eval_vlm.py.

    Args:
        title: printed above the command.
        model: name of the weights.
        part: of FILES, the questions.
        images: "right", "wrong" or "none".
    """
    rows, folder = FILES[part]
    path = OUT / f"{part}_{images}.json"
    flags = as_flags(
        weights=OUT / f"{model}_128.pth",
        data=DATA / rows,
        images_path=DATA / folder,
        show_images=images,
        device="cpu",
        save_report=path,
    )
    run_stage(title, "eval_vlm.py", *flags)
    return json.loads(path.read_text(encoding="utf-8"))


def run_stage(title: str, script: str, *flags: str) -> None:
    """Run one of the repository's scripts as a user would, showing the command."""
    print(f"\n== {title}\n$ python {script} {' '.join(flags)}", flush=True)
    run_python(script, *flags)


def peak_memory() -> int:
    """Bytes of the largest process so far; 0 on a system that does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(who).ru_maxrss for who in processes)


def print_results(report: dict, answers: list[dict]) -> None:
    # accuracies
    print("\nExact answers on held-out scenes, % of questions\n")
    print_table(("right image", "wrong image", "no image"), QUESTION_TYPES, report, ONE_IMAGE)
    print("\nTwo images, after multi-image SFT\n")
    print_table(("right images", "wrong images"), PAIR_TYPES, report, TWO_IMAGES)

    # answers
    print("\nSome answers (right image):\n")
    for answer in answers[: 2 * len(QUESTION_TYPES)]:
        question = answer["question"].replace("<image>\n", "")
        pictures = ", ".join(Path(image).name for image in answer["images"])
        verdict = "" if answer["given"] == answer["answer"] else f"   (wrong: {answer['answer']})"
        print(f"  [{pictures}] {question} -> {answer['given']}{verdict}")

    # files and costs
    names = ("lm", "pretrain_vlm", "sft_vlm", "sft_vlm_multi")
    print("\nweights: " + ", ".join(f"{OUT}/{name}_128.pth" for name in names))
    print("loss curves: " + ", ".join(f"{OUT}/{name}_128.png" for name in names))
    print(f"report: {OUT}/report.json")
    minutes, memory = report["seconds"] / 60, report["peak_memory_bytes"] / 1e9
    print(f"{minutes:.1f} minutes, at most {memory:.2f} GB of memory")
    print("talk to it: make web, or")
    print(f"  python eval_vlm.py --weights {OUT}/sft_vlm_128.pth --temperature 0 \\")
    print(f'    --image {DATA}/eval_images/00000a.jpg --prompt "What color is the star?"')


def print_table(
    headings: tuple[str, ...], question_types: tuple[str, ...], report: dict, names: dict[str, str]
) -> None:
    """Accuracy by type of question, in %.

    Args:
        headings: of the columns.
        question_types: of the rows.
        report: accuracies by name.
        names: of the columns in the report.
    """
    print(" " * 14 + "".join(f"{heading:>13}" for heading in headings))
    for kind in (*question_types, "overall"):
        shares = [100 * report[name][kind] for name in names.values()]
        print(f"{kind:14}" + "".join(f"{share:13.1f}" for share in shares))


if __name__ == "__main__":
    run_command(main)
