"""How well and how fast `python -m dataset.clean` works, on real photographs with faults planted, and on a million rows.

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
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
WORK = ROOT / "out" / "bench" / "clean"
COUNTS = (10_000, 100_000, 1_000_000)
N_PICTURES = 1000  # of the simulated sets
COPIES = ("image is a copy", "image is nearly a copy")
SHARES = {
    "near copy": 0.1,
    "exact copy": 0.02,
    "truncated": 0.02,
    "too few <image>": 0.02,
    "mojibake": 0.02,
}


def retouch(encoded: bytes, rng: random.Random) -> bytes:
    """The photograph re-encoded, in most cases resized too (also out of proportion)."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if rng.random() < 0.8:
        width = rng.choice((64, 96, 160, 200, 256, 400))
        height = width if rng.random() < 0.6 else round(width * rng.uniform(0.6, 1.6))
        image = image.resize(
            (width, height),
            rng.choice((Image.BICUBIC, Image.LANCZOS, Image.BILINEAR, Image.NEAREST)),
        )
    buffer = io.BytesIO()
    image.save(buffer, rng.choice(("JPEG", "JPEG", "WEBP")), quality=rng.randint(25, 95))
    return buffer.getvalue()


def plant(flickr: Path, folder: Path, n_rows: int, seed: int = 0) -> dict[str, list[int]]:
    """Write rows.jsonl and images/ with a photograph and a caption of its own in each of the first `n_rows` rows, then faults;
    returns the numbers of the rows (from 1) with each kind of fault."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    rows: list[dict] = []
    with zipfile.ZipFile(flickr / "pretrain_images.zip") as archive:
        photographs = {
            Path(name).name: archive.read(name)
            for name in archive.namelist()
            if name.endswith(".jpg")
        }
    lines = (flickr / "pretrain_vlm_data.jsonl").read_text(encoding="utf-8").splitlines()
    spare: list[str] = []  # captions that no row has
    names: list[str] = []
    for row in map(json.loads, lines):
        if len(rows) < n_rows and row["image"] not in names:
            names.append(row["image"])
            rows.append(row)
            (folder / "images" / row["image"]).write_bytes(photographs[row["image"]])
        else:
            spare.append(row["conversations"][1]["content"])
    truth: dict[str, list[int]] = {}
    for kind, share in SHARES.items():
        truth[kind] = []
        for name in rng.sample(names, round(share * n_rows)):
            encoded, caption = photographs[name], f"{spare.pop()} ({len(rows)})"
            if kind == "near copy":
                encoded = retouch(encoded, rng)
            if kind == "truncated":
                encoded = encoded[: rng.randint(100, len(encoded) * 3 // 4)]
            question = "Describe it." if kind == "too few <image>" else "<image>\nDescribe it."
            if kind == "mojibake":
                caption = f"caf\u00e9 \u201c{caption}\u201d".encode().decode("cp1252", "ignore")
            new_name = (
                f"{kind.split()[0]}-{len(rows)}.jpg"
                if kind in ("near copy", "exact copy", "truncated")
                else name
            )
            (folder / "images" / new_name).write_bytes(encoded)
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": caption},
            ]
            rows.append({"conversations": turns, "image": new_name})
            truth[kind].append(len(rows))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return truth


def clean(folder: Path, out: Path, *flags: str) -> dict:
    """Run the command; seconds, peak bytes of its largest process, and its report."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "dataset.clean",
        folder / "rows.jsonl",
        out,
        "--images",
        folder / "images",
        *flags,
    ]
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("error: the cleaning failed; its message is above")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report | {"seconds": time.perf_counter() - start, "main_bytes": usage.ru_maxrss * 1024}


def score(found: set[int], planted: set[int]) -> tuple[float, float]:
    """(precision, recall)"""
    hits = len(found & planted)
    return hits / max(len(found), 1), hits / max(len(planted), 1)


def measure_faults(flickr: Path, n_rows: int) -> dict:
    folder, out = WORK / "planted", WORK / "planted-clean"
    shutil.rmtree(folder, ignore_errors=True)
    truth = plant(flickr, folder, n_rows)
    report = clean(folder, out, "--val_share", "0")
    rejected = [
        json.loads(line)
        for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    copies = {record["row"] for record in rejected if record["reason"] in COPIES}
    precision, recall = score(copies, set(truth["near copy"] + truth["exact copy"]))
    damaged = {record["row"] for record in rejected if record["reason"] == "image damaged"}
    n_images = report["pictures"]["different"]
    row = {"rows": report["rows"]["read"], "images": n_images, "seconds": report["seconds"]}
    row |= {"images_per_second": n_images / report["seconds"], "main_bytes": report["main_bytes"]}
    row |= {
        "copies_precision": precision,
        "copies_recall": recall,
        "damaged": score(damaged, set(truth["truncated"])),
    }
    row |= {
        "repairs": report["repairs"],
        "planted": {kind: len(rows) for kind, rows in truth.items()},
    }
    print(
        f"{row['rows']:,} rows, {n_images:,} images in {row['seconds']:.1f} s: {row['images_per_second']:.0f} images/s in all"
    )
    print(f"copies of pictures: precision {100 * precision:.2f} %, recall {100 * recall:.2f} %")
    print("truncated pictures: precision {:.2%}, recall {:.2%}".format(*row["damaged"]))
    print(f"planted: {row['planted']}; repairs: {row['repairs']}")
    return row


def simulate(n_rows: int) -> dict:
    """A set of captions whose pictures take turns."""
    folder = WORK / "simulated"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = random.Random(0)
    for number in range(N_PICTURES):
        Image.frombytes("RGB", (16, 16), rng.randbytes(768)).resize((128, 128)).save(
            folder / "images" / f"{number}.jpg"
        )
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(n_rows):
            turns = [
                {"role": "user", "content": "<image>\nWhat is this?"},
                {"role": "assistant", "content": f"Picture {number}"},
            ]
            file.write(
                json.dumps({"conversations": turns, "image": f"{number % N_PICTURES}.jpg"}) + "\n"
            )
    report = clean(folder, WORK / "simulated-clean")
    row = {"rows": n_rows, "seconds": report["seconds"], "main_bytes": report["main_bytes"]}
    print(
        f"{n_rows:10,} rows{report['seconds']:8.1f} s{report['main_bytes'] / 1e6:8.0f} MB largest process",
        flush=True,
    )
    shutil.rmtree(folder)
    shutil.rmtree(WORK / "simulated-clean")
    return row


def measure_cleaning(args) -> list[dict]:
    """A row for the planted faults (with --flickr8k), then one for each simulated size."""
    rows = [measure_faults(Path(args.flickr8k), 5000)] if args.flickr8k else []
    return rows + [simulate(n_rows) for n_rows in COUNTS]
