"""Start-up, memory and reading speed of 10 thousand to 1 million rows, with loader processes.

In three forms: a .jsonl with a folder of pictures, a .jsonl with a .zip of as many entries as rows,
and Parquet. Memory is read from /proc, so this bench runs on Linux only.
"""

import itertools
import json
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.bench import runs
from scripts.bench.runs import read_result
from scripts.processes import run_python

WORK = runs.WORK / "rows"
COUNTS = (10_000, 100_000, 1_000_000)
KINDS = ("folder", "zip", "parquet")
N_PICTURES, N_BATCHES, N_WORKERS = 100, 50, 8
# Samples read one after the other.
N_TIMED = 1000


def measure(args: Namespace) -> list[dict]:
    """Each kind and size twice: the first start checks every row and caches an index."""
    print(
        f"{'form':8}{'rows':>10}{'start':>8}{'open':>9}{'first batch':>13}{'main process':>14}"
        f"{'each worker':>13}  images/s of one worker, first epoch and cached"
    )
    table = []
    for kind, n_rows in itertools.product(KINDS, COUNTS):
        path = write_rows(kind, n_rows)
        images = WORK / ("rows.zip" if kind == "zip" else "images")
        for start in ("first", "again"):
            command = ["-m", "scripts.bench.rows", str(path), str(images)]
            row = {"form": kind, "rows": n_rows, "start": start}
            row |= read_result(run_python(*command, capture=True))
            table.append(row)
            rates = row["images_per_second"]
            print(
                f"{kind:8}{n_rows:10,}{start:>8}{row['seconds_to_open']:7.2f} s"
                f"{row['seconds_to_first_batch']:11.2f} s{row['main_bytes'] / 1e6:11.0f} MB"
                f"{row['worker_bytes'] / 1e6:10.0f} MB"
                f"{rates['first']:10,.0f}{rates['cached']:8,.0f}",
                flush=True,
            )
        for left in (*WORK.glob("rows.*"), *WORK.glob(".rows.*")):
            left.unlink()
    return table


def write_rows(kind: str, n_rows: int) -> Path:
    """A set of captions whose pictures take turns; returns the file of rows."""
    from PIL import Image

    # pictures
    (WORK / "images").mkdir(parents=True, exist_ok=True)
    pictures = [WORK / "images" / f"{number}.jpg" for number in range(N_PICTURES)]
    for number, path in enumerate(pictures):
        Image.new("RGB", (128, 128), (number, 255 - number, 128)).save(path)
    encoded = [path.read_bytes() for path in pictures]
    if kind == "zip":
        with zipfile.ZipFile(WORK / "rows.zip", "w") as archive:
            for number in range(n_rows):
                archive.writestr(f"rows/{number}.jpg", encoded[number % N_PICTURES])

    # rows
    if kind == "parquet":
        return write_parquet(WORK / "rows.parquet", n_rows, encoded)
    with open(WORK / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(n_rows):
            image = number if kind == "zip" else number % N_PICTURES
            row = {"conversations": make_turns(number), "image": f"{image}.jpg"}
            file.write(json.dumps(row) + "\n")
    return WORK / "rows.jsonl"


def make_turns(number: int) -> list[dict]:
    answer = f"Picture {number}: a plain color. " * 3
    return [
        {"role": "user", "content": "What is this?\n<image>"},
        {"role": "assistant", "content": answer},
    ]


def write_parquet(path: Path, n_rows: int, encoded: list[bytes]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = pa.schema([("conversations", pa.string()), ("image_bytes", pa.binary())])
    with parquet.ParquetWriter(path, schema, use_dictionary=False) as file:
        for start in range(0, n_rows, 10_000):
            numbers = range(start, min(start + 10_000, n_rows))
            texts = [json.dumps(make_turns(number)) for number in numbers]
            images = [encoded[number % N_PICTURES] for number in numbers]
            file.write_table(pa.table([texts, images], schema=schema))
    return path


def open_and_read(path: Path, images: Path) -> None:
    """In a process of its own: print seconds until the first batch, bytes, and images/s."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from common.files import hash_bytes, read_image_bytes
    from dataset.vlm_dataset import VLMDataset
    from model.LMConfig import VLMConfig
    from model.processing import VLMProcessor, load_tokenizer
    from trainer.collate import make_loader
    from trainer.feature_cache import FeatureCache
    from trainer.feature_format import FeatureFormat
    from trainer.sampler import StepSampler

    # time until the first batch
    config = VLMConfig()
    tokenizer = load_tokenizer("model/demo/tokenizer")
    processor = VLMProcessor(tokenizer, CLIPImageProcessorPil(), config)
    before = memory_bytes("self", "Anonymous")
    start, cpu = time.perf_counter(), time.process_time()
    data = VLMDataset(path, images, processor, 640)
    opened, cpu = time.perf_counter() - start, time.process_time() - cpu
    batches = iter(make_loader(data, StepSampler(data.lengths, 16), N_WORKERS))
    next(batches)
    first = time.perf_counter() - start

    # memory after some more
    for _ in range(N_BATCHES):
        next(batches)
    worker = max(memory_bytes(worker.pid, "Private_Dirty") for worker in batches._workers)
    main = memory_bytes("self", "Anonymous") - before
    # Its workers end.
    del batches

    # reading speed of one process, without and with cached features
    torch.set_num_threads(1)
    shape = (config.n_image_tokens, config.vision_dim)
    with TemporaryDirectory(dir=path.parent) as folder:
        cache = FeatureCache(Path(folder), FeatureFormat(shape, torch.bfloat16), 1e9)
        for image in (image for index in range(N_TIMED) for image in data.read(index)[1]):
            blank = torch.zeros(cache.slot_bytes, dtype=torch.uint8)
            cache.add(hash_bytes(read_image_bytes(image)), blank)
        rates = {"first": read_rate(data, None), "cached": read_rate(data, cache)}
    times = {
        "seconds_to_open": opened,
        "cpu_seconds_to_open": cpu,
        "seconds_to_first_batch": first,
        "images_per_second": rates,
    }
    print(json.dumps({"workers": N_WORKERS, **times, "main_bytes": main, "worker_bytes": worker}))


def read_rate(data, cache) -> float:
    """Images a second that one process makes ready for a batch."""
    from trainer.collate import TrainSamples

    samples = TrainSamples(data, cache)
    start = time.perf_counter()
    n_images = sum(len(samples[index][1]["images"]) for index in range(N_TIMED))
    return n_images / (time.perf_counter() - start)


def memory_bytes(process: int | str, kind: str) -> int:
    """Memory of a process.

    "Anonymous" is all but mapped files, which the system may take back at any time;
    "Private_Dirty" is what no other process shares.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


if __name__ == "__main__":
    open_and_read(*map(Path, sys.argv[1:]))
