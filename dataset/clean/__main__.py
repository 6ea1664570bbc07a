"""Make a set one can trust: repair what can be repaired, leave out what cannot be used, and account for every row.

python -m dataset.clean raw.jsonl clean/ --images raw_images      # or raw_images.zip
python -m dataset.clean raw.parquet clean/ --format parquet

The folder gets train.jsonl, val.jsonl and images/ (or train-00000.parquet … and val-00000.parquet …), rejects with the reason for
each row that was left out, and report.html to read. A cleaning that was stopped goes on where it was when started again.
"""

import argparse
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Thread

import numpy as np
from tqdm import tqdm

from common.errors import UserError, run_command
from dataset.clean.decide import Decision, list_pictures, read_chunks
from dataset.clean.repair import Limits
from dataset.clean.report import Report
from dataset.clean.stages import (
    IMAGES_A_CHUNK,
    ROWS_A_CHUNK,
    Settings,
    chunk_path,
    examine_images,
    examine_rows,
    open_source,
    write_whole,
)
from dataset.clean.write import write_set
from dataset.images import ImageFolder

ROW_ARRAYS = ("n_images", "ids", "caption", "n_answers", "answers", "length", "is_rejected")


def parse_args() -> tuple[Settings, int]:
    """(what to do, number of processes)"""
    limits = Limits()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", help="rows to clean, .jsonl or .parquet")
    parser.add_argument(
        "out", help="folder that the cleaned set goes to; new, or of a cleaning that was stopped"
    )
    parser.add_argument("--images", help="folder or .zip of the images that a .jsonl names")
    parser.add_argument(
        "--format", choices=("jsonl", "parquet"), default="jsonl", help="of the cleaned set"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=Settings.size,
        help="pictures become squares of so many pixels; 0: as they are",
    )
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--min_answer",
        type=int,
        default=limits.min_answer,
        help="characters of a row's answers, at least",
    )
    group.add_argument(
        "--max_answer",
        type=int,
        default=limits.max_answer,
        help="characters of a row's answers, at most",
    )
    group.add_argument(
        "--min_side",
        type=int,
        default=limits.min_side,
        help="pixels of a picture's shorter side, at least",
    )
    group.add_argument(
        "--max_aspect",
        type=float,
        default=limits.max_aspect,
        help="longer side over shorter side, at most",
    )
    group.add_argument(
        "--languages",
        nargs="+",
        default=[],
        metavar="CODE",
        help="keep answers in these only, such as en zh",
    )
    group.add_argument(
        "--keep_duplicates",
        action="store_true",
        help="keep pictures that are copies, or nearly, of one of another name",
    )
    group.add_argument(
        "--keep_repeats",
        action="store_true",
        help="keep rows whose answers an earlier row has word for word (short ones often repeat)",
    )
    group.add_argument(
        "--max_repeats",
        type=int,
        default=Settings.max_repeats,
        help="rows with nothing but answers given so often before are left out",
    )
    group = parser.add_argument_group("the rest")
    group.add_argument(
        "--val_share",
        type=float,
        default=Settings.val_share,
        help="share of the rows for validation; none of their pictures is in the rest",
    )
    group.add_argument("--seed", type=int, default=Settings.seed, help="seed of that choice")
    group.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="that work at the same time; the result is the same",
    )
    args = parser.parse_args()
    for name, low, high in (
        ("size", 0, 4096),
        ("val_share", 0, 0.5),
        ("processes", 1, 1024),
        ("max_repeats", 1, 10**9),
    ):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} is {getattr(args, name)}: it has to be from {low} to {high}")
    for code in args.languages:
        if not re.fullmatch("[a-z]{2,3}", code):
            parser.error(
                f"--languages {code}: give codes of two or three small letters, such as en zh"
            )
    limits = Limits(
        args.min_answer, args.max_answer, args.min_side, args.max_aspect, tuple(args.languages)
    )
    settings = Settings(
        args.data, args.images, args.out, args.format, args.size, limits,
        args.keep_duplicates, args.keep_repeats, args.max_repeats, args.val_share, args.seed,
    )  # fmt: skip
    return settings, args.processes


def main() -> None:
    settings, n_processes = parse_args()
    try:
        clean(settings, n_processes)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{error}: free some space or look at that file; the same command goes on from here"
        ) from error


def clean(settings: Settings, n_processes: int) -> None:
    """Examine rows, then pictures, in chunks; decide; write. UserError where the input or the output folder is not fit for it."""
    source = open_source(settings.data, settings.images)
    images = getattr(source, "image_source", None)
    if isinstance(images, ImageFolder) and not images.path.is_dir():
        raise UserError(
            f"no image folder {settings.images}, nor a .zip of that name: correct --images"
        )
    prepare_folder(settings)
    keys = source.keys()
    if not len(keys):
        raise UserError(f"{settings.data} has no rows")
    np.save(settings.work / "keys.npy", keys)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ProcessPoolExecutor(n_processes, initializer=follow, initargs=(os.getpid(),)) as pool:
        n_chunks = run_chunks(pool, settings, "rows", examine_rows, len(keys), ROWS_A_CHUNK)
        rows = read_chunks(settings.work, "rows", ROW_ARRAYS)
        pictures = list_pictures(rows)
        np.save(settings.work / "images.npy", pictures.places)
        run_chunks(pool, settings, "images", examine_images, len(pictures.ids), IMAGES_A_CHUNK)
    decision = Decision(settings, rows, pictures)
    report = Report(settings, decision)
    counts = write_set(settings, decision, n_chunks, report.watch)
    summary = report.summarise(counts)
    report.write(summary)
    shutil.rmtree(settings.work)
    print_summary(settings, summary)
    if not counts["train"]:
        raise UserError(
            f"no row is left to train on: the report says why; remove {settings.out} before another try"
        )


def follow(main_process: int) -> None:
    """In a worker: leave Ctrl-C to the main process, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == main_process:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def prepare_folder(settings: Settings) -> None:
    """Make the output folder, or go on with the one of a cleaning that was stopped. UserError for any other folder with files."""
    out, described = Path(settings.out), settings.work / "settings.json"
    if described.is_file():
        if json.loads(described.read_text(encoding="utf-8")) != settings.describe():
            raise UserError(
                f"{out} holds a stopped cleaning of other data or flags: repeat its command, or remove {settings.work}"
            )
        print(f"going on with the cleaning in {out}")
        return
    if out.is_dir() and any(path != settings.work for path in out.iterdir()):
        raise UserError(f"{out} is not empty: choose a new folder")
    settings.work.mkdir(parents=True, exist_ok=True)
    write_whole(described, json.dumps(settings.describe()).encode())


def run_chunks(
    pool: ProcessPoolExecutor,
    settings: Settings,
    kind: str,
    examine: Callable,
    total: int,
    size: int,
) -> int:
    """Run `examine` for every chunk of `size` that no earlier start has finished; returns the number of chunks."""
    chunks = range(-(-total // size))
    missing = [
        chunk for chunk in chunks if not chunk_path(settings.work, kind, chunk, "npz").is_file()
    ]
    n_done = total - sum(min(size, total - chunk * size) for chunk in missing)
    with tqdm(
        total=total, initial=n_done, desc=f"examine {kind}", unit=kind.removesuffix("s")
    ) as progress:
        try:
            for future in as_completed(
                [pool.submit(examine, settings, chunk) for chunk in missing]
            ):
                progress.update(future.result())
        except BrokenProcessPool as error:
            raise UserError(
                "a process died, perhaps for want of memory: start again with a smaller --processes"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(chunks)


def print_summary(settings: Settings, summary: dict) -> None:
    rows = summary["rows"]
    print(
        f"{rows['read']:,} rows read = {rows['train']:,} for training + {rows['val']:,} for validation "
        f"+ {rows['rejected']:,} rejected"
    )
    for title in ("reasons", "repairs"):
        if summary[title]:
            print(f"{title}:")
            width = max(map(len, summary[title]))
            for name, count in summary[title].items():
                print(f"  {name:{width}}{count:10,}")
    out = Path(settings.out)
    print(f"report: {out / 'report.html'}")
    if settings.form == "parquet":
        train, val, images = f"'{out}/train-*.parquet'", f"'{out}/val-*.parquet'", ""
    else:
        train, val, images = out / "train.jsonl", out / "val.jsonl", f" --images {out / 'images'}"
    validation = f" --val_data {val}" if rows["val"] else ""
    if rows["train"]:
        print(f"next: python train_sft_vlm.py --data {train}{images}{validation}")


if __name__ == "__main__":
    run_command(main)
