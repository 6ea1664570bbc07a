"""A Parquet file of 1 million rows over 225 thousand pictures: disk, start-up, memory, speed.

Beside it the same file as `load_dataset` of `datasets` reads it, if that package is installed. The
pictures are of 256 x 256 pixels; as in the published set, each is once in the file, and 8 % of the
rows are text with a black picture of 8 x 8. Runs on Linux only, as `rows` does.
"""

import importlib.util
import io
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np

from scripts.bench import runs
from scripts.bench.rows import make_turns
from scripts.bench.runs import read_result
from scripts.processes import run_python

WORK = runs.WORK / "parquet"
N_ROWS, N_PICTURES = 1_000_000, 225_000
# Rows of a row group; its pictures are in no other.
GROUP = 50_000
TEXT_ONLY = 0.08
# Pictures that are really encoded; a comment makes many of each.
N_ENCODED = 300


def measure(args: Namespace) -> list[dict]:
    """The file, what is written for it, and two starts of each reader."""
    WORK.mkdir(parents=True, exist_ok=True)
    path = write_set(WORK / "set.parquet")
    size = path.stat().st_size
    print(f"{N_ROWS:,} rows over {N_PICTURES:,} pictures: Parquet {size / 1e9:.2f} GB")
    table = []
    readers = {"ours": "scripts.bench.rows"}
    if importlib.util.find_spec("datasets"):
        readers["datasets"] = "scripts.bench.parquet"
    for (reader, module), start in ((r, s) for r in readers.items() for s in ("first", "again")):
        result = read_result(run_python("-m", module, str(path), str(WORK), capture=True))
        copy = sum(file.stat().st_size for file in list_copies(path))
        row = {"reader": reader, "start": start, "parquet_bytes": size, "copy_bytes": copy} | result
        table.append(row)
        print_row(row)
        if start == "again":
            for file in list_copies(path):
                file.unlink()
    path.unlink()
    return table


def print_row(row: dict) -> None:
    columns = [
        f"{row['reader']:8} {row['start']:5}",
        f"copy {row['copy_bytes'] / 1e9:.2f} GB",
        f"open {row['seconds_to_open']:.1f} s (CPU {row['cpu_seconds_to_open']:.1f} s)",
        f"main process {row['main_bytes'] / 1e6:.0f} MB",
    ]
    if "workers" in row:
        rates = row["images_per_second"]
        columns += [
            f"first batch {row['seconds_to_first_batch']:.1f} s",
            f"each of {row['workers']} workers {row['worker_bytes'] / 1e6:.0f} MB",
            f"images/s of one worker {rates['first']:,.0f}, cached {rates['cached']:,.0f}",
        ]
    else:
        columns.append(f"rows/s {row['rows_per_second']:,.0f}")
    print(", ".join(columns), flush=True)


def list_copies(path: Path) -> list[Path]:
    """All that a reader has written."""
    return [file for file in WORK.rglob("*") if file.is_file() and file != path]


def write_set(path: Path) -> Path:
    """The simulated set; its pictures and texts are the same each time."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from PIL import Image

    # what pictures and texts are made of
    random = np.random.default_rng(0)
    encoded = [encode_picture(random) for _ in range(N_ENCODED)]
    words = [f"{one}{two}" for one in "bcdfghklmn" for two in ("ar", "en", "ot", "ill", "ush")]
    sentences = [" ".join(random.choice(words, 12)) for _ in range(5000)]
    black = io.BytesIO()
    Image.new("RGB", (8, 8)).save(black, "JPEG")

    # row groups, each with its pictures as a dictionary
    kind = pa.dictionary(pa.int32(), pa.binary())
    schema = pa.schema([("conversations", pa.string()), ("image_bytes", kind)])
    n_pictures = N_PICTURES * GROUP // N_ROWS
    # Read as plain bytes: the file does not say what types it was written from.
    options = {"dictionary_pagesize_limit": 2**30, "store_schema": False}
    with parquet.ParquetWriter(path, schema, **options) as file:
        for start in range(0, N_ROWS, GROUP):
            numbers = range(start // GROUP * n_pictures, (start // GROUP + 1) * n_pictures)
            pictures = [add_comment(encoded[number % N_ENCODED], number) for number in numbers]
            # every picture is in a row
            chosen = np.concatenate(
                [np.arange(n_pictures), random.integers(0, n_pictures, GROUP - n_pictures)]
            )
            random.shuffle(chosen)
            chosen[random.random(GROUP) < TEXT_ONLY] = n_pictures
            texts = [make_text(one == n_pictures, sentences, random) for one in chosen]
            images = pa.DictionaryArray.from_arrays(
                pa.array(chosen, pa.int32()), pa.array([*pictures, black.getvalue()], pa.binary())
            )
            file.write_table(pa.table([texts, images], schema=schema))
    return path


def make_text(is_text_only: bool, sentences: list[str], random: np.random.Generator) -> str:
    turns = make_turns(0)
    answer = " ".join(sentences[number] for number in random.integers(0, len(sentences), 5))
    question = "What is this?" if is_text_only else turns[0]["content"]
    return json.dumps([{"role": "user", "content": question}, turns[1] | {"content": answer}])


def encode_picture(random: np.random.Generator) -> bytes:
    """A JPEG of 256 x 256 and about 9 kB, as photographs of that size have."""
    from PIL import Image

    blobs = Image.fromarray(random.integers(0, 256, (14, 14, 3), dtype=np.uint8))
    pixels = np.asarray(blobs.resize((256, 256), Image.Resampling.BICUBIC), np.int16)
    noise = random.integers(-5, 6, (256, 256, 1), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def add_comment(jpeg: bytes, number: int) -> bytes:
    """The same pixels in a file of its own: a comment behind the first two bytes."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def open_with_datasets(path: Path, work: Path) -> None:
    """In a process of its own: print seconds, bytes and rows/s of `load_dataset`."""
    from datasets import load_dataset
    from datasets.utils import disable_progress_bars

    from scripts.bench.rows import N_TIMED, memory_bytes

    disable_progress_bars()
    before = memory_bytes("self", "Anonymous")
    start, cpu = time.perf_counter(), time.process_time()
    data = load_dataset(
        "parquet", data_files=str(path), cache_dir=str(work / "datasets"), split="train"
    )
    opened, cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    for index in np.random.default_rng(0).integers(0, len(data), N_TIMED).tolist():
        data[index]
    rate = N_TIMED / (time.perf_counter() - start)
    memory = memory_bytes("self", "Anonymous") - before
    times = {"seconds_to_open": opened, "cpu_seconds_to_open": cpu, "rows_per_second": rate}
    print(json.dumps(times | {"main_bytes": memory}))


if __name__ == "__main__":
    open_with_datasets(*map(Path, sys.argv[1:]))
