"""How well and how fast `python -m dataset.clean` works, on photographs and on a million rows.

python -m scripts.bench clean --flickr8k FOLDER
"""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

from PIL import Image

from common.errors import UserError
from model.files import ROOT
from scripts.bench import runs

WORK = runs.WORK / "clean"
COUNTS = (10_000, 100_000, 1_000_000)
N_PHOTOGRAPHS = 5000
# Of the simulated sets.
N_PICTURES = 1000
COPIES = ("image is a copy", "image is nearly a copy")
# Planted faults, as shares of the rows.
SHARES = {
    "near copy": 0.1,
    "exact copy": 0.02,
    "truncated": 0.02,
    "too few <image>": 0.02,
    "mojibake": 0.02,
}


def measure(args: Namespace) -> list[dict]:
    """A row for the planted faults (with --flickr8k), then one for each simulated size."""
    rows = [measure_faults(args.flickr8k, N_PHOTOGRAPHS)] if args.flickr8k else []
    return rows + [measure_size(n_rows) for n_rows in COUNTS]


def measure_faults(flickr8k: Path, n_rows: int) -> dict:
    # plant and clean
    folder, out = WORK / "planted", WORK / "planted-clean"
    shutil.rmtree(folder, ignore_errors=True)
    planted = plant(flickr8k, folder, n_rows)
    report = clean(folder, out, "--val_share", "0")
    lines = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]

    # compare
    copies = {record["row"] for record in rejected if record["reason"] in COPIES}
    precision, recall = score(copies, set(planted["near copy"] + planted["exact copy"]))
    damaged = {record["row"] for record in rejected if record["reason"] == "image damaged"}
    n_images = report["pictures"]["different"]
    row = {
        "rows": report["rows"]["read"],
        "images": n_images,
        "seconds": report["seconds"],
        "images_per_second": n_images / report["seconds"],
        "main_bytes": report["main_bytes"],
        "copies_precision": precision,
        "copies_recall": recall,
        "damaged": score(damaged, set(planted["truncated"])),
        "repairs": report["repairs"],
        "planted": {kind: len(numbers) for kind, numbers in planted.items()},
    }

    # show
    print(
        f"{row['rows']:,} rows, {n_images:,} images in {row['seconds']:.1f} s: "
        f"{row['images_per_second']:.0f} images/s in all"
    )
    print(f"copies of pictures: precision {100 * precision:.2f} %, recall {100 * recall:.2f} %")
    print("truncated pictures: precision {:.2%}, recall {:.2%}".format(*row["damaged"]))
    print(f"planted: {row['planted']}; repairs: {row['repairs']}")
    return row


def plant(flickr8k: Path, folder: Path, n_rows: int, seed: int = 0) -> dict[str, list[int]]:
    """Write rows.jsonl and images/: good rows, then rows with faults.

    Args:
        flickr8k: folder of the photographs and captions.
        folder: is made.
        n_rows: good rows, each with a photograph and a caption of its own.
        seed: of the faults.

    Returns the numbers of the rows (from 1) with each kind of fault.
    """
    # good rows
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    with zipfile.ZipFile(flickr8k / "pretrain_images.zip") as archive:
        entries = [name for name in archive.namelist() if name.endswith(".jpg")]
        photographs = {Path(name).name: archive.read(name) for name in entries}
    lines = (flickr8k / "pretrain_vlm_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows, names, spare_captions = [], [], []
    for row in map(json.loads, lines):
        if len(rows) < n_rows and row["image"] not in names:
            names.append(row["image"])
            rows.append(row)
            (folder / "images" / row["image"]).write_bytes(photographs[row["image"]])
        else:
            spare_captions.append(row["conversations"][1]["content"])

    # rows with faults
    planted: dict[str, list[int]] = {kind: [] for kind in SHARES}
    for kind, share in SHARES.items():
        for name in rng.sample(names, round(share * n_rows)):
            encoded, caption = photographs[name], f"{spare_captions.pop()} ({len(rows)})"
            question, new_name = "<image>\nDescribe it.", name
            if kind in ("near copy", "exact copy", "truncated"):
                new_name = f"{kind.split()[0]}-{len(rows)}.jpg"
            if kind == "near copy":
                encoded = retouch(encoded, rng)
            if kind == "truncated":
                encoded = encoded[: rng.randint(100, len(encoded) * 3 // 4)]
            if kind == "too few <image>":
                question = "Describe it."
            if kind == "mojibake":
                caption = f"caf\u00e9 \u201c{caption}\u201d".encode().decode("cp1252", "ignore")
            (folder / "images" / new_name).write_bytes(encoded)
            rows.append({"conversations": make_turns(question, caption), "image": new_name})
            planted[kind].append(len(rows))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return planted


def make_turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def retouch(encoded: bytes, rng: random.Random) -> bytes:
    """The photograph encoded again, in most cases resized too (also out of proportion)."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if rng.random() < 0.8:
        width = rng.choice((64, 96, 160, 200, 256, 400))
        height = width if rng.random() < 0.6 else round(width * rng.uniform(0.6, 1.6))
        filters = (Image.BICUBIC, Image.LANCZOS, Image.BILINEAR, Image.NEAREST)
        image = image.resize((width, height), rng.choice(filters))
    buffer = io.BytesIO()
    image.save(buffer, rng.choice(("JPEG", "JPEG", "WEBP")), quality=rng.randint(25, 95))
    return buffer.getvalue()


def score(found: set[int], planted: set[int]) -> tuple[float, float]:
    """(precision, recall)"""
    hits = len(found & planted)
    return hits / max(len(found), 1), hits / max(len(planted), 1)


def measure_size(n_rows: int) -> dict:
    """Clean a set of captions whose pictures take turns."""
    # write the set
    folder, out = WORK / "simulated", WORK / "simulated-clean"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = random.Random(0)
    for number in range(N_PICTURES):
        picture = Image.frombytes("RGB", (16, 16), rng.randbytes(768)).resize((128, 128))
        picture.save(folder / "images" / f"{number}.jpg")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(n_rows):
            turns = make_turns("<image>\nWhat is this?", f"Picture {number}")
            row = {"conversations": turns, "image": f"{number % N_PICTURES}.jpg"}
            file.write(json.dumps(row) + "\n")

    # clean it
    report = clean(folder, out)
    row = {"rows": n_rows, "seconds": report["seconds"], "main_bytes": report["main_bytes"]}
    memory = f"{row['main_bytes'] / 1e6:8.0f} MB largest process"
    print(f"{n_rows:10,} rows{row['seconds']:8.1f} s{memory}", flush=True)
    shutil.rmtree(folder)
    shutil.rmtree(out)
    return row


def clean(folder: Path, out: Path, *flags: str) -> dict:
    """Run the command; its report, seconds, and peak bytes of its largest process (POSIX only)."""
    shutil.rmtree(out, ignore_errors=True)
    command = ["-m", "dataset.clean", folder / "rows.jsonl", out, "--images", folder / "images"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command), *flags], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError("dataset.clean failed; its message is above")
    seconds = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report | {"seconds": seconds, "main_bytes": usage.ru_maxrss * 1024}
