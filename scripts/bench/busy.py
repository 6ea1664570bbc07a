"""Training speed on a machine in use: beside none, one and two other busy programs.

Two trainings take turns, so that both see the same machine; the one that waits is suspended.
"before" lets idle threads wait as OpenMP does by itself, "after" as common/threads.py chooses. The
other programs are Python loops. Meant for 2 CPU cores without other work; the demo's SFT.
"""

import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil

from common.errors import UserError
from dataset.scenes.write import FILES, write_scene_set
from model.files import ROOT
from scripts.bench import runs
from scripts.bench.runs import TRAIN_SCRIPTS
from scripts.processes import as_flags

WORK = runs.WORK / "busy"
# 300,000 is what GNU OpenMP has if nothing is set.
WAYS = {"before": {"GOMP_SPINCOUNT": "300000"}, "after": {}}
# Busy programs -> seconds of a turn.
SECONDS = {0: 5, 1: 5, 2: 10}
N_TURNS = 5
# The first steps are slower and not measured.
FIRST_STEPS = 3
BATCH_SIZE, ACCUMULATION_STEPS, N_ROWS = 8, 2, 2400
# It ends by itself, in case that this process is killed.
BUSY_LOOP = "import time; end = time.monotonic() + 600\nwhile time.monotonic() < end: pass"


def measure(args: Namespace) -> list[dict]:
    """Rows of "way", "beside" (number of busy programs) and "images_per_second"."""
    # two trainings, suspended
    shutil.rmtree(WORK, ignore_errors=True)
    write_scene_set(WORK, {"sft": N_ROWS})
    rows = []
    with ExitStack() as stack:
        trainings = []
        for way, env in WAYS.items():
            process = stack.enter_context(running(*train_command(way, args), env=env))
            trainings.append(Training(way, process))
            trainings[-1].run(n_steps=FIRST_STEPS)

        # beside more and more programs
        print(f"{'images/s':18}{''.join(f'{way:>10}' for way in WAYS)}{'ratio':>10}")
        for beside, seconds in SECONDS.items():
            if beside:
                stack.enter_context(running("-c", BUSY_LOOP))
            rates = take_turns(trainings, seconds)
            for way, rate in zip(WAYS, rates):
                rows.append({"way": way, "beside": beside, "images_per_second": rate})
            printed = "".join(f"{rate:10.1f}" for rate in (*rates, rates[-1] / rates[0]))
            print(f"{f'beside {beside} programs':18}{printed}", flush=True)
    return rows


def take_turns(trainings: list["Training"], seconds: float) -> list[float]:
    """Images/s of each training, after N_TURNS turns of so many seconds.

    There are more turns while one of them has not ended a whole step.
    """
    for training in trainings:
        training.begin()
    turn = 0
    while turn < N_TURNS or min(training.n_steps for training in trainings) < 1:
        for training in trainings:
            training.run(seconds)
        turn += 1
    return [training.images_per_second() for training in trainings]


class Training:
    """A training that goes on in turns: counts whole steps and the seconds it ran for them.

    Args:
        way: its name.
        process: of the training script.
    """

    def __init__(self, way: str, process: psutil.Popen):
        self.process, self.log, self.n_logged = process, WORK / f"{way}_128.log.jsonl", 0
        self.begin()

    def begin(self) -> None:
        """Count from the end of the step that is at work."""
        self.n_steps, self.running, self.started, self.ended = -1, 0.0, 0.0, 0.0

    def run(self, seconds: float = float("inf"), n_steps: float = float("inf")) -> None:
        """Go on for so many seconds or steps, then be suspended."""
        self.process.resume()
        now = time.perf_counter()
        end = now + seconds
        while now < end and self.n_steps < n_steps:
            time.sleep(0.02)
            last, now = now, time.perf_counter()
            self.running += now - last
            self._count_steps()
        self.process.suspend()

    def _count_steps(self) -> None:
        if self.process.poll() is not None:
            raise UserError(f"a training stopped: its last lines are in {WORK}/printed.txt")
        text = self.log.read_text(encoding="utf-8") if self.log.is_file() else ""
        n_new = text.count('"event": "train"') - self.n_logged
        if n_new == 0:
            return
        if self.n_steps < 0:
            self.started = self.running
        self.n_logged += n_new
        self.n_steps += n_new
        self.ended = self.running

    def images_per_second(self) -> float:
        images = self.n_steps * BATCH_SIZE * ACCUMULATION_STEPS
        return images / (self.ended - self.started)


def train_command(way: str, args: Namespace) -> list[str]:
    rows, images = FILES["sft"]
    flags = as_flags(
        data_path=WORK / rows,
        images_path=WORK / images,
        init_weights="model/demo/lm_128.pth",
        tokenizer="model/demo/tokenizer",
        vision_model="model/demo/vision_model",
        save_name=way,
        out_dir=WORK,
        batch_size=BATCH_SIZE,
        accumulation_steps=ACCUMULATION_STEPS,
        epochs=10,
        dtype="float32",
        device="cpu",
        feature_cache_gb=0,
        log_interval=1,
    )
    return [TRAIN_SCRIPTS["sft"], *flags, *args.flags]


@contextmanager
def running(*command: str, env: dict[str, str] | None = None) -> Iterator[psutil.Popen]:
    """A Python process that is ended with this block; what it prints is in WORK/printed.txt."""
    # Without what this process chose for itself, so that the training chooses.
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    with open(WORK / "printed.txt", "a") as printed:
        process = psutil.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=own | (env or {}),
            stdout=printed,
            stderr=printed,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
