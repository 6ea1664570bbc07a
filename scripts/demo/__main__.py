"""`make demo`: from nothing to a small model that sees, through the scripts a user runs.

    python -m scripts.demo              # 6 to 7 minutes on 2 CPU cores; out/demo/
    python -m scripts.demo --multi      # afterwards: the model learns to compare two images

Renders the scene set; pretraining -> SFT; then asks about held-out scenes with the right images,
wrong ones and none.
"""

import argparse
import json
import shlex
import sys
import textwrap
import time
from pathlib import Path

from common.errors import MissingFileError, run_command
from common.files import write_text
from common.flags import program_name
from dataset.scenes.text import PAIR_TYPES
from dataset.scenes.write import FILES, ONE_IMAGE_TYPES, write_scene_set
from scripts.demo.answers import draw_answers
from scripts.processes import as_flags, run_python

OUT = Path("out/demo")
DATA = OUT / "data"
# Rows of each part of the set. Both stages show the same pictures, so SFT finds their features in
# the cache that pretraining has filled.
ROWS = {"pretrain": 3000, "sft": 2000, "val": 24, "eval": 480}
ROWS_MULTI = {"multi": 1000, "eval_multi": 300}
# What the tables show: the questions, all of them together, and descriptions.
ONE_IMAGE_ROWS = (*ONE_IMAGE_TYPES, "overall", "description")
# Images that the questions come with -> name in the report.
IMAGES = {"right": "accuracy", "wrong": "accuracy_wrong_image", "none": "accuracy_no_image"}


def main() -> None:
    parser = argparse.ArgumentParser(
        program_name(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--multi", action="store_true", help="go on with questions about two images"
    )
    started = time.perf_counter()
    if parser.parse_args().multi:
        learn_to_compare()
    else:
        learn_to_see()
    minutes, memory = (time.perf_counter() - started) / 60, peak_memory() / 1e9
    print(f"\n{minutes:.1f} minutes, at most {memory:.2f} GB of memory", flush=True)


def learn_to_see() -> None:
    """Both stages, then questions about held-out scenes."""
    # data
    started = time.perf_counter()
    print("== rendering the scene set: pictures, questions and answers", flush=True)
    write_scene_set(DATA, ROWS)
    show_first_picture()

    # training
    train(
        "pretraining: the projector and the last layer learn to describe pictures",
        "train_pretrain_vlm.py",
        "pretrain",
        init_weights="model/demo/lm_128.pth",
        batch_size=4,
        learning_rate="3e-3",
    )
    train(
        "SFT: the whole language model learns to answer about the same pictures",
        "train_sft_vlm.py",
        "sft",
        init_weights=OUT / "pretrain_vlm_128.pth",
        batch_size=8,
        learning_rate="6e-4",
    )

    # evaluation
    reports = evaluate("questions about held-out scenes", "sft_vlm", "eval", *IMAGES)
    report = {name: join_questions(reports[images]["accuracy"]) for images, name in IMAGES.items()}
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["peak_memory_bytes"] = peak_memory()
    write_text(OUT / "report.json", json.dumps(report, indent=1))
    draw_answers(reports["right"]["answers"], OUT / "answers.png")

    # what came of it
    print("\nExact answers about held-out scenes, % of questions\n")
    columns = [report[name] for name in IMAGES.values()]
    print_table(["right image", "wrong image", "no image"], ONE_IMAGE_ROWS, columns)
    print('("overall" is without descriptions)')
    print(f"\nthe first picture again: {DATA / 'val_images/00000a.jpg'}")
    first = read_last_samples(OUT / "sft_vlm_128.log.jsonl")[0]
    print(f"  {first['question']} -> {first['given']}")
    print(f"\ntwelve answers: {OUT}/answers.png")
    print(f"loss curves:    {OUT}/pretrain_vlm_128.png {OUT}/sft_vlm_128.png")
    print(f"all answers:    {OUT}/sft_vlm_eval.json")
    print("talk to it:     make web")
    print(
        f"or:             python eval_vlm.py --out_dir {OUT} --temperature 0 \\\n"
        f"                    --image {DATA}/val_images/00000a.jpg "
        '--prompt "What color is the star?"'
    )


def learn_to_compare() -> None:
    """Multi-image SFT, then questions about two held-out scenes, and about one again."""
    # data
    if not (OUT / "sft_vlm_128.pth").is_file():
        raise MissingFileError(f"no weights at {OUT}/sft_vlm_128.pth: run `make demo` first")
    print("== rendering pairs of scenes", flush=True)
    write_scene_set(DATA, ROWS_MULTI)

    # training; old dialogues among the new ones, so that it does not forget
    train(
        "multi-image SFT: the model goes on with questions about two images",
        "train_sft_vlm.py",
        "multi",
        "sft:0.2",
        init_weights=OUT / "sft_vlm_128.pth",
        save_name="sft_vlm_multi",
        batch_size=8,
        learning_rate="4e-4",
    )

    # evaluation
    pairs = evaluate("questions about two images", "sft_vlm_multi", "eval_multi", *IMAGES)
    single = evaluate("questions about one image, as before", "sft_vlm_multi", "eval", "right")
    report = {name: pairs[images]["accuracy"] for images, name in IMAGES.items()}
    report["accuracy_one_image"] = join_questions(single["accuracy"])
    report["peak_memory_bytes"] = peak_memory()
    write_text(OUT / "report_multi.json", json.dumps(report, indent=1))

    # what came of it
    print("\nTwo images, exact answers about held-out pairs, % of questions\n")
    columns = [report[name] for name in IMAGES.values()]
    print_table(["right images", "wrong images", "no images"], (*PAIR_TYPES, "overall"), columns)
    print("\nOne image, as after `make demo`\n")
    print_table(["right image"], ONE_IMAGE_ROWS, [report["accuracy_one_image"]])
    print(f"\nask it: python eval_vlm.py --out_dir {OUT} --model_mode 2 --temperature 0")


def show_first_picture() -> None:
    """A question that an untrained model is asked soon, and a trained one in the end."""
    path, images = (DATA / name for name in FILES["val"])
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    question, answer = (turn["content"] for turn in row["conversations"][:2])
    print(
        f"\na held-out picture: {images / row['image']}\n"
        f"  question: {question.removeprefix('<image>').strip()}\n"
        f"  right answer: {answer}\n"
        "What the untrained model says comes below, at step 0 of pretraining.",
        flush=True,
    )


def train(title: str, script: str, *parts: str, **options: object) -> None:
    """Run a training script on parts of the set, for an epoch.

    Args:
        title: printed above the command.
        script: of the repository.
        parts: of FILES, with ":WEIGHT" behind them if wanted.
        options: flags of the script.
    """
    names = [part.partition(":") for part in parts]
    flags = as_flags(
        data=[f"{DATA / FILES[name][0]}{colon}{weight}" for name, colon, weight in names],
        images=[DATA / FILES[name][1] for name, _, _ in names],
        val_data=DATA / FILES["val"][0],
        val_images=DATA / FILES["val"][1],
        val_interval=375,
        out_dir=OUT,
        epochs=1,
        warmup_iters=10,
        log_interval=10,
        device="cpu",
        **options,
    )
    run_stage(title, script, *flags)


def evaluate(title: str, model: str, part: str, *images: str) -> dict:
    """The report of eval_vlm.py: by choice of images if there are several.

    Args:
        title: printed above the command.
        model: name of the weights.
        part: of FILES, the questions.
        images: "right", "wrong" or "none", or several of them.
    """
    path = OUT / f"{model}_{part}.json"
    flags = as_flags(
        weights=OUT / f"{model}_128.pth",
        data=DATA / FILES[part][0],
        images=DATA / FILES[part][1],
        show_images=images,
        device="cpu",
        save_report=path,
    )
    run_stage(title, "eval_vlm.py", *flags)
    return json.loads(path.read_text(encoding="utf-8"))


def run_stage(title: str, script: str, *flags: str) -> None:
    """Run one of the repository's scripts as a user would, showing the command."""
    command = f"$ python {script} {shlex.join(flags)}"
    lines = textwrap.wrap(command, 98, subsequent_indent="    ", break_on_hyphens=False)
    print(f"\n== {title}\n" + " \\\n".join(lines), flush=True)
    run_python(script, *flags)


def read_last_samples(log: Path) -> list[dict]:
    """The sample answers of the last validation in a log."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    samples = [record for record in records if record["event"] == "sample"]
    return [sample for sample in samples if sample["step"] == samples[-1]["step"]]


def peak_memory() -> int:
    """Bytes of the largest process so far; 0 on a system that does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(who).ru_maxrss for who in processes)


def join_questions(accuracy: dict[str, float]) -> dict[str, float]:
    """The same with "overall" over the questions alone, all types alike.

    A description says everything about a picture at once: it stands beside them.
    """
    questions = [accuracy[kind] for kind in ONE_IMAGE_TYPES]
    return accuracy | {"overall": sum(questions) / len(questions)}


def print_table(
    headings: list[str], kinds: tuple[str, ...], columns: list[dict[str, float]]
) -> None:
    """Accuracy by type of question, in %.

    Args:
        headings: of the columns.
        kinds: of the rows.
        columns: share of right answers by kind.
    """
    print(" " * 14 + "".join(f"{heading:>14}" for heading in headings))
    for kind in kinds:
        print(f"{kind:14}" + "".join(f"{100 * column[kind]:14.1f}" for column in columns))


if __name__ == "__main__":
    run_command(main)
