"""Start-up time and memory of 10 thousand, 100 thousand and 1 million rows, with loader processes; how fast one of them reads."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

WORK = ROOT / "out" / "bench" / "rows"
COUNTS = (10_000, 100_000, 1_000_000)
N_PICTURES, N_BATCHES, N_WORKERS = 100, 50, 8
N_TIMED = 1000  # samples read one after the other


def prepare(n_rows: int) -> Path:
    """A .jsonl of captions, whose pictures take turns."""
    from PIL import Image

    (WORK / "images").mkdir(parents=True, exist_ok=True)
    for number in range(N_PICTURES):
        Image.new("RGB", (128, 128), (number, 255 - number, 128)).save(WORK / "images" / f"{number}.jpg")
    path = WORK / f"rows-{n_rows}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(n_rows):
            question, answer = (
                {"role": "user", "content": "What is this?\n<image>"},
                f"Picture {number}: a plain colour. " * 3,
            )
            turns = [question, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"conversations": turns, "image": f"{number % N_PICTURES}.jpg"}) + "\n")
    return path


def memory_bytes(process: int | str, kind: str) -> int:
    """Of a process: "Rss", all that it has in memory, or "Private_", what it shares with no other process."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def read_rate(data, find_features) -> float:
    """Images a second that one process makes ready for a batch."""
    from trainer.batches import TrainSamples

    samples = TrainSamples(data, find_features)
    start = time.perf_counter()
    for index in range(N_TIMED):
        samples[index]
    return N_TIMED / (time.perf_counter() - start)


def open_and_read(path: Path) -> None:
    """In a process of its own: print seconds until the first batch and bytes of this process and of the largest worker."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from dataset.vlm_dataset import VLMDataset
    from model.LMConfig import VLMConfig
    from model.processing import VLMProcessor, load_tokenizer
    from trainer.batches import StepBatches, find_nothing, hash_image, make_loader
    from trainer.features import FeatureCache

    processor = VLMProcessor(load_tokenizer(ROOT / "model/demo/tokenizer"), CLIPImageProcessorPil(), VLMConfig())
    before, start = memory_bytes("self", "Rss"), time.perf_counter()
    data = VLMDataset(path, WORK / "images", processor, 640)
    opened = time.perf_counter() - start
    batches = iter(make_loader(data, StepBatches(data.lengths, 16), N_WORKERS))
    next(batches)
    first = time.perf_counter() - start
    for _ in range(N_BATCHES):
        next(batches)
    worker = max(memory_bytes(worker.pid, "Private_") for worker in batches._workers)
    main = memory_bytes("self", "Rss") - before
    del batches  # its workers end
    torch.set_num_threads(1)
    config = processor.config
    with TemporaryDirectory(dir=WORK) as folder:
        cache = FeatureCache(Path(folder), (config.n_image_tokens, config.vision_dim), torch.bfloat16, 1e9)
        for number in range(N_PICTURES):
            digest = hash_image((WORK / "images" / f"{number}.jpg").read_bytes())
            cache.add(digest, torch.zeros(cache.shape))
        rates = {"first": read_rate(data, find_nothing), "cached": read_rate(data, cache.find)}
    times = {"seconds_to_open": opened, "seconds_to_first_batch": first, "images_per_second": rates}
    print(json.dumps({"workers": N_WORKERS, **times, "main_bytes": main, "worker_bytes": worker}))


def measure_rows(args) -> list[dict]:
    """Each size twice: the first start checks every row and keeps an index, the second finds it."""
    table = []
    print(
        f"{'rows':>10}{'start':>8}{'open':>9}{'first batch':>13}{'main process':>14}{'each worker':>13}"
        "  images/s of one worker, first epoch and cached"
    )
    for n_rows in COUNTS:
        path = prepare(n_rows)
        for start in ("first", "again"):
            command = [sys.executable, "-m", "scripts.bench_rows", str(path)]
            env = os.environ | {"PYTHONWARNINGS": "ignore"}  # more workers than cores, on purpose
            printed = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = {"rows": n_rows, "start": start, **json.loads(printed.splitlines()[-1])}
            table.append(row)
            print(
                f"{n_rows:10,}{start:>8}{row['seconds_to_open']:7.2f} s{row['seconds_to_first_batch']:11.2f} s"
                f"{row['main_bytes'] / 1e6:11.0f} MB{row['worker_bytes'] / 1e6:10.0f} MB"
                f"{row['images_per_second']['first']:10,.0f}{row['images_per_second']['cached']:8,.0f}",
                flush=True,
            )
        path.unlink()
    return table


if __name__ == "__main__":
    open_and_read(Path(sys.argv[1]))
