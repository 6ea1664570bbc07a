"""A cleaning from start to end: examine rows, then pictures, in worker processes; decide; write."""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.owner import Owner, live_with_parent
from dataset.clean.decide import Decision, Found, number_pictures
from dataset.clean.examine import PICTURE, examine_pictures, examine_rows, open_source
from dataset.clean.report import write_report
from dataset.clean.settings import Settings
from dataset.clean.write import UTF8, write_set
from dataset.images import ImageFolder
from dataset.next_command import write_train_command

ROWS, IMAGES = 2000, 100  # that a worker is given at a time


def clean(settings: Settings) -> None:
    """Clean a set. UserError if its files are not fit for that, or no row stays."""
    out = Path(settings.out)
    try:
        source = open_source(settings.data, settings.images)
        images = source.image_source
        if isinstance(images, ImageFolder) and not images.path.is_dir():
            raise UserError(f"no image folder {images.path}, nor a .zip of that name: see --images")
        if not len(keys := source.keys()):
            raise UserError(f"{settings.data} has no rows")
        with new_folder(out) as folder:
            found = examine(settings, keys, folder / "work")
            decision = Decision(settings, found)
            written = write_set(settings, folder, folder / "work", decision)
            summary = write_report(settings, folder, decision, written)
            shutil.rmtree(folder / "work")
    except BrokenProcessPool as error:
        raise UserError(
            "a process died, perhaps for want of memory: try again with a smaller --processes"
        ) from error
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error}: free some space, or look at that file") from error
    print_summary(settings, summary)
    if not summary["rows"]["train"]:
        raise UserError(f"no row is left to train on, see the report; remove {out} to try again")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which becomes `out` when the block ends without an error."""
    resolved = out.resolve()
    hidden = resolved.with_name(f".{resolved.name}.partial")
    owner = Owner(hidden.with_suffix(".lock"), f"{out}: wait for it, or choose another folder")
    try:
        if out.exists():
            if not out.is_dir() or any(out.iterdir()):
                raise UserError(f"{out} is not empty: choose a new folder")
            resolved.rmdir()
        if hidden.exists():
            print(f"an earlier cleaning into {out} was interrupted; starting anew", flush=True)
            shutil.rmtree(hidden)
        hidden.mkdir(parents=True)
        yield hidden
        os.replace(hidden, resolved)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        owner.release()


def examine(settings: Settings, keys: np.ndarray, work: Path) -> Found:
    """Look at the rows with these keys and at their pictures, which go to the folder `work`."""
    work.mkdir()
    with start_workers(settings.processes) as pool:
        # rows
        arrays, repairs = [], Counter()
        with open(work / "rows.jsonl", "w", **UTF8) as file:
            look = partial(examine_rows, settings)
            for *part, repaired, lines in run_chunks(pool, look, keys, ROWS, "row"):
                arrays.append(part)
                repairs += repaired
                file.write(lines)
        rows, images, answers = map(np.concatenate, zip(*arrays))
        numbers, places = number_pictures(rows, images)

        # pictures
        pictures, reasons, end = np.empty(len(places), PICTURE), [""], 0
        look = partial(examine_pictures, settings, work)
        sources = np.stack([np.arange(len(places)), keys[places[:, 0]], places[:, 1]], axis=1)
        for part, why in run_chunks(pool, look, sources, IMAGES, "image"):
            reasons += sorted(set(why) - set(reasons))
            part["reason"] = [reasons.index(reason) for reason in why]
            pictures[end : end + len(part)] = part
            end += len(part)
    return Found(keys, rows, answers, repairs, numbers, places, pictures, reasons)


def run_chunks(
    pool: ProcessPoolExecutor, examine: Callable, values: np.ndarray, size: int, unit: str
) -> Iterator:
    """What `examine` finds in each chunk of `size` values, in order, with a progress bar."""
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    with delay_ctrl_c():
        found = pool.map(examine, chunks)
    with tqdm(total=len(values), desc=f"examine {unit}s", unit=unit) as progress:
        for chunk, part in zip(chunks, found):
            yield part
            progress.update(len(chunk))


@contextmanager
def start_workers(n_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes. After an error they end with the chunk that they are at."""
    pool = ProcessPoolExecutor(n_processes, initializer=live_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def delay_ctrl_c() -> Iterator[None]:
    """While processes start: Python loses a Ctrl-C that comes while it forks."""
    can_delay = hasattr(signal, "pthread_sigmask")  # not on Windows
    if can_delay:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if can_delay:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def print_summary(settings: Settings, summary: dict) -> None:
    """Print the counts, and the command that trains on the set."""
    rows, out = summary["rows"], Path(settings.out)
    print(
        f"{rows['read']:,} rows read = {rows['train']:,} for training "
        f"+ {rows['val']:,} for validation + {rows['rejected']:,} rejected"
    )
    for title in ("reasons", "repairs"):
        width = max(map(len, summary[title]), default=0)
        lines = [f"  {name:{width}}{count:10,}" for name, count in summary[title].items()]
        print("\n".join([f"{title}:", *lines, ""] if lines else []), end="")
    pictures = summary["pictures"]
    text_only = pictures["rows_of_text_only"]
    about_text = f", {text_only:,} rows are text only" if text_only else ""
    print(f"pictures: {pictures['different']:,} different ones{about_text}")
    print(f"report: {out / 'report.html'}")
    if rows["train"]:
        print(f"next: {next_command(settings, rows)}")


def next_command(settings: Settings, rows: dict[str, int]) -> str:
    """The command that trains on the set."""
    out = Path(settings.out)
    train, val, images = out / "train.jsonl", out / "val.jsonl", out / "images"
    if settings.format == "parquet":
        train, val = out / "train-*.parquet", out / "val-*.parquet"
    return write_train_command(
        str(train),
        str(images) if images.is_dir() else None,
        str(val) if rows["val"] else None,
        rows["train"],
        out.name,
        settings.tokenizer,
        settings.max_seq_len,
    )
