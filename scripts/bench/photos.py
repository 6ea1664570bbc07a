"""A result on real photographs: Flickr8k, a vision encoder from ImageNet, an LM from scratch.

For each language a model of its own, each step a script of this repository:

    the LM reads captions       train_sft_vlm.py, rows of text alone
    it sees the photographs     train_sft_vlm.py, 18,000 rows twice: 36,000 samples
    it is asked about others    eval_vlm.py --metrics: with the right picture, a wrong one, none

The first step teaches it to write, and where to look: in the place of the picture stand words, and
the answer is a caption that needs most of them. So the second one has a dictionary to learn, from
patches to words, as in the demo (scripts/demo/train_base.py).
"""

import json
import random
import re
import shutil
from argparse import Namespace
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from common.text import IMAGE_TAG
from inference.questions import OVERALL
from scripts.bench import runs
from scripts.bench.photos_encoder import write_encoder
from scripts.processes import as_flags, run_python

WORK = runs.WORK / "photos"
TRAIN, TRAIN_IMAGES = "pretrain_vlm_data.jsonl", "pretrain_images.zip"
VAL, VAL_IMAGES = "val_captions.jsonl", "val_images.zip"
SIZES = {"dim": 256, "n_layers": 4}
SEED = 1337
SHOWN = ("CIDEr-D", "BLEU-4", "ROUGE-L")

# Reading: how often each caption comes; with how many words in the place of a picture, drawn from
# a part of its own and a smaller part of those of the photograph's other captions.
READINGS, N_WORDS, OWN_SHARE, OTHER_SHARE = 2, 24, 0.7, 0.3
READING = {"epochs": 1, "batch_size": 16, "learning_rate": 1.2e-3, "warmup_iters": 100}
# What is a word, and words that no picture shows.
WORD = {"en": r"\w+", "zh": r"[^\W\d_]"}
FUNCTION_WORDS = (
    "a an the in on at of to is are and with his her its their that as by for from while it s "
    "的 在 着 了 和 与 是 有 一 个 上"
)
# Seeing: 18,000 captions a language, twice. So few photographs are soon known by heart: dropout.
SEEING = {
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 1.5e-3,
    "warmup_iters": 50,
    "dropout": 0.1,
}


def measure(args: Namespace) -> list[dict]:
    """Rows of language, images, and each score with its interval."""
    if args.flickr8k is None:
        raise UserError("photos needs --flickr8k FOLDER: see docs/results.md for what is in it")
    for name in (TRAIN, TRAIN_IMAGES, VAL, VAL_IMAGES):
        if not (args.flickr8k / name).is_file():
            raise UserError(f"no {name} in {args.flickr8k}: correct --flickr8k")

    # what all runs share
    shutil.rmtree(WORK, ignore_errors=True)
    encoder = WORK / "efficientnet-lite0"
    write_encoder(encoder)
    rows = read_rows(args.flickr8k / TRAIN)

    # A language beside the other, with a thread each: faster than one after the other with two.
    def run(language: str) -> dict:
        return run_language(args, language, select_language(rows, language), encoder)

    with ThreadPoolExecutor(max_workers=2) as pool:
        reports = list(pool.map(run, args.languages))

    # show
    table = [row for pair in zip(args.languages, reports) for row in list_scores(*pair)]
    print_table(table)
    return table


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def select_language(rows: list[dict], language: str) -> list[dict]:
    """Those whose caption is in English ("en"), or those whose caption is not."""
    is_english = [row["conversations"][1]["content"].isascii() for row in rows]
    return [row for row, is_it in zip(rows, is_english) if is_it == (language == "en")]


def run_language(args: Namespace, language: str, rows: list[dict], encoder: Path) -> dict:
    """The report of eval_vlm.py about a model that learns these rows."""
    folder = WORK / language
    flags = SIZES | {"tokenizer": args.tokenizer, "vision_model": encoder, "out_dir": folder}
    flags |= {"images_path": args.flickr8k / TRAIN_IMAGES, "feature_cache": WORK / "features"}
    flags |= {"device": args.device, "dtype": args.dtype, "seed": SEED}

    # it reads, then it sees
    captions, photos = folder / "captions.jsonl", folder / "photos.jsonl"
    write_rows(captions, make_text_rows(rows, language))
    write_rows(photos, rows)
    stages = (
        READING | {"data_path": captions, "init_weights": "none", "save_name": "lm"},
        SEEING | {"data_path": photos, "init_weights": "lm", "save_name": "sft_vlm"},
    )
    for stage in stages:
        print(f"{language}: training {stage['save_name']}; log: {folder}", flush=True)
        command = ["train_sft_vlm.py", *as_flags(**flags | stage), *args.flags]
        run_python(*command, capture=True, OMP_NUM_THREADS="1")

    # it is asked about photographs that it has never met
    references = folder / "references.jsonl"
    write_rows(references, select_references(args.flickr8k / VAL, language))
    report = folder / "report.json"
    ask = {"out_dir": folder, "data": references, "images_path": args.flickr8k / VAL_IMAGES}
    ask |= {"device": args.device, "save_report": report}
    print(f"{language}: asking about {args.flickr8k / VAL_IMAGES}", flush=True)
    command = ["eval_vlm.py", "--metrics", *as_flags(**ask)]
    run_python(*command, capture=True, OMP_NUM_THREADS="1")
    return json.loads(report.read_text(encoding="utf-8"))


def make_text_rows(rows: list[dict], language: str) -> list[dict]:
    """The rows READINGS times without pictures: where one stood, there are words.

    They are what a picture gives: in no order, some several times, most but not all that a caption
    needs, and some that it does not need.
    """
    rng, pattern, left_out = random.Random(SEED), WORD[language], set(FUNCTION_WORDS.split())
    words = defaultdict(list)
    for row in rows:
        found = re.findall(pattern, row["conversations"][1]["content"].lower())
        words[row["image"]].append([word for word in found if word not in left_out])

    text_rows, n_met = [], Counter()
    for row in rows * READINGS:
        # own words, and those of the photograph's other captions
        captions = words[row["image"]]
        own = captions[n_met[row["image"]] % len(captions)]
        n_met[row["image"]] += 1
        others = [word for caption in captions if caption is not own for word in caption]
        seen = [word for word in own if rng.random() < OWN_SHARE]
        seen += [word for word in others if rng.random() < OTHER_SHARE]
        text = " ".join(rng.choices(seen, k=N_WORDS)) if seen else ""

        # the same conversation with them
        question, answer = row["conversations"]
        question = question | {"content": question["content"].replace(IMAGE_TAG, text).strip()}
        text_rows.append({"conversations": [question, answer]})
    return text_rows


def select_references(path: Path, language: str) -> list[dict]:
    """The validation photographs with their captions in one language."""
    return [{"image": row["image"], language: row[language]} for row in read_rows(path)]


def list_scores(language: str, report: dict) -> list[dict]:
    """A row for each choice of pictures: {"language", "images", "CIDEr-D": {"value", ...}, ...}."""
    return [
        {"language": language, "images": images} | of_images["metrics"][OVERALL]
        for images, of_images in report.items()
    ]


def print_table(table: list[dict]) -> None:
    """Captions' scores in hundredths, each with the ends of its 95 % interval."""
    print(f"{'':10}{'picture':10}" + "".join(f"{name:22}" for name in SHOWN))
    for row in table:
        cells = (
            f"{100 * row[name]['value']:.1f} "
            f"({100 * row[name]['low']:.1f} to {100 * row[name]['high']:.1f})"
            for name in SHOWN
        )
        print(f"{row['language']:10}{row['images']:10}" + "".join(f"{cell:22}" for cell in cells))
