"""Start-up time and memory of 10 thousand, 100 thousand and 1 million rows, with loader processes; how fast one of them reads.

In three forms: a .jsonl with a folder of pictures, a .jsonl with a .zip of as many entries as rows, and Parquet."""

import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]

WORK = ROOT / "out" / "bench" / "rows"
COUNTS = (10_000, 100_000, 1_000_000)
FORMS = ("folder", "zip", "parquet")
N_PICTURES, N_BATCHES, N_WORKERS = 100, 50, 8
N_TIMED = 1000  # samples read one after the other


def prepare(n_rows: int, form: str) -> Path:
    """A set of captions, whose pictures take turns."""
    from PIL import Image

    (WORK / "images").mkdir(parents=True, exist_ok=True)
    pictures = [WORK / "images" / f"{number}.jpg" for number in range(N_PICTURES)]
    for number, path in enumerate(pictures):
        Image.new("RGB", (128, 128), (number, 255 - number, 128)).save(path)
    encoded = [path.read_bytes() for path in pictures]
    if form == "parquet":
        return write_parquet(WORK / "rows.parquet", n_rows, encoded)
    if form == "zip":
        with zipfile.ZipFile(WORK / "rows.zip", "w") as archive:
            for number in range(n_rows):
                archive.writestr(f"rows/{number}.jpg", encoded[number % N_PICTURES])
    with open(WORK / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(n_rows):
            image = number if form == "zip" else number % N_PICTURES
            file.write(json.dumps({"conversations": talk(number), "image": f"{image}.jpg"}) + "\n")
    return WORK / "rows.jsonl"


def talk(number: int) -> list[dict]:
    answer = f"Picture {number}: a plain colour. " * 3
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
            texts = [json.dumps(talk(number)) for number in numbers]
            file.write_table(
                pa.table(
                    [texts, [encoded[number % N_PICTURES] for number in numbers]], schema=schema
                )
            )
    return path


def memory_bytes(process: int | str, kind: str) -> int:
    """Of a process: "Anonymous", all that it has in memory but for mapped files, which the system may take back at any time, or
    "Private_Dirty", what of it no other process shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def read_rate(data, find_features) -> float:
    """Images a second that one process makes ready for a batch."""
    from trainer.collate import TrainSamples

    samples = TrainSamples(data, find_features)
    start = time.perf_counter()
    for index in range(N_TIMED):
        samples[index]
    return N_TIMED / (time.perf_counter() - start)


def open_and_read(path: Path, images: Path) -> None:
    """In a process of its own: print seconds until the first batch and bytes of this process and of the largest worker."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from common.files import hash_bytes
    from dataset.vlm_dataset import VLMDataset
    from model.LMConfig import VLMConfig
    from model.processing import VLMProcessor, load_tokenizer
    from trainer.collate import find_nothing, make_loader
    from trainer.feature_cache import FeatureCache
    from trainer.sampler import StepBatches

    processor = VLMProcessor(
        load_tokenizer(ROOT / "model/demo/tokenizer"), CLIPImageProcessorPil(), VLMConfig()
    )
    before, start = memory_bytes("self", "Anonymous"), time.perf_counter()
    data = VLMDataset(path, images, processor, 640)
    opened = time.perf_counter() - start
    batches = iter(make_loader(data, StepBatches(data.lengths, 16), N_WORKERS))
    next(batches)
    first = time.perf_counter() - start
    for _ in range(N_BATCHES):
        next(batches)
    worker = max(memory_bytes(worker.pid, "Private_Dirty") for worker in batches._workers)
    main = memory_bytes("self", "Anonymous") - before
    del batches  # its workers end
    torch.set_num_threads(1)
    config = processor.config
    with TemporaryDirectory(dir=WORK) as folder:
        cache = FeatureCache(
            Path(folder), (config.n_image_tokens, config.vision_dim), torch.bfloat16, 1e9
        )
        for number in range(N_PICTURES):
            digest = hash_bytes((WORK / "images" / f"{number}.jpg").read_bytes())
            cache.add(digest, torch.zeros(cache.shape))
        rates = {"first": read_rate(data, find_nothing), "cached": read_rate(data, cache.find)}
    times = {"seconds_to_open": opened, "seconds_to_first_batch": first, "images_per_second": rates}
    print(json.dumps({"workers": N_WORKERS, **times, "main_bytes": main, "worker_bytes": worker}))


def measure_rows(args) -> list[dict]:
    """Each form and size twice: the first start checks every row and keeps an index, the second finds it."""
    table = []
    print(
        f"{'form':8}{'rows':>10}{'start':>8}{'open':>9}{'first batch':>13}{'main process':>14}{'each worker':>13}"
        "  images/s of one worker, first epoch and cached"
    )
    for form, n_rows in itertools.product(FORMS, COUNTS):
        path = prepare(n_rows, form)
        images = WORK / ("rows.zip" if form == "zip" else "images")
        for start in ("first", "again"):
            command = [sys.executable, "-m", "scripts.bench.rows", str(path), str(images)]
            env = os.environ | {"PYTHONWARNINGS": "ignore"}  # more workers than cores, on purpose
            printed = subprocess.run(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            row = {
                "form": form,
                "rows": n_rows,
                "start": start,
                **json.loads(printed.splitlines()[-1]),
            }
            table.append(row)
            print(
                f"{form:8}{n_rows:10,}{start:>8}{row['seconds_to_open']:7.2f} s{row['seconds_to_first_batch']:11.2f} s"
                f"{row['main_bytes'] / 1e6:11.0f} MB{row['worker_bytes'] / 1e6:10.0f} MB"
                f"{row['images_per_second']['first']:10,.0f}{row['images_per_second']['cached']:8,.0f}",
                flush=True,
            )
        for left in (*WORK.glob("rows.*"), *WORK.glob(".rows.*")):
            left.unlink()
    return table


if __name__ == "__main__":
    open_and_read(*map(Path, sys.argv[1:]))
