"""Small real things for the tests: a vision encoder, a model, a tokenizer, pictures, rows."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Container
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from tests.preload import run_forked

# A shell's background job ignores Ctrl-C, and so would the scripts that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TOKENIZER = ROOT / "model/demo/tokenizer"
# A trained model, which is part of the repository.
DEMO = ROOT / "model/demo/sft_vlm_128.pth"
# Of the small vision encoder: 48 x 48 pixels in patches of 16.
N_PATCHES = 9

# The server that forks scripts finds our modules by this.
os.environ["PYTHONPATH"] = str(ROOT)
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.preload"])

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="../shared with real photographs is not here"
)


def small_vision_encoder(seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=16,
    )
    return CLIPVisionModel(config).eval()


def small_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})


def small_model(seed: int = 0, vocab_size: int = 672, **sizes) -> MiniMindVLM:
    """A model of 2 layers with random weights."""
    vision_encoder = small_vision_encoder(seed)
    sizes = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=512) | sizes
    return MiniMindVLM(
        VLMConfig.for_vision_encoder(vision_encoder.config, vocab_size=vocab_size, **sizes),
        vision_encoder,
    ).eval()


def picture(seed: int = 0, size: tuple[int, int] = (64, 56)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(
        0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8
    )
    return Image.fromarray(noise).resize(size)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def write_zip(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def rows_with_damaged_pictures(images: Path, n_rows: int, damaged: Container[int]) -> list[dict]:
    """Rows of one picture each, which are written to a new folder; some files are cut off."""
    images.mkdir()
    rows = []
    for index in range(n_rows):
        path = images / f"{index}.jpg"
        picture(index).save(path)
        if index in damaged:
            path.write_bytes(path.read_bytes()[:150])
        turns = [{"content": "<image>\nWhat?"}, {"content": "red"}]
        rows.append({"conversations": turns, "image": path.name})
    return rows


class WarmScript:
    """A script in a process of its own, forked from a server that has imported PyTorch already.

    That saves the seconds of importing it (tests/preload.py); what is printed goes to a file.

    Args:
        command: a script and its arguments, or "-m", a module and its arguments.
        env: what is added to the environment.
        text: standard input.
    """

    def __init__(self, *command: str, env: dict | None = None, text: str = ""):
        self.command, self.folder = command, tempfile.TemporaryDirectory()
        stdin, self.printed = (Path(self.folder.name) / name for name in ("stdin", "printed"))
        stdin.write_text(text, encoding="utf-8")
        arguments = ([*map(str, command)], env or {}, str(stdin), str(self.printed))
        self.process = _SERVER.Process(target=run_forked, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Exit status, -9 after SIGKILL; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL; returns the exit status, which is another one if it had ended by itself."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def finish(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Wait for the end; stdout and stderr come back as one text."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
        text = self.printed.read_text(encoding="utf-8", errors="replace")
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.command, self.process.exitcode, text)


def run_script(*command: str, env: dict | None = None, input: str = ""):
    """Run a script, or "-m" and a module, to its end, see WarmScript."""
    return WarmScript(*command, env=env, text=input).finish()


def run_cold(*command: str, **options) -> subprocess.CompletedProcess:
    """The same in a fresh Python, for what a warm process would hide: start-up, torchrun."""
    process = start_script(*command, **options)
    try:
        printed, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def start_script(*command: str, **options) -> subprocess.Popen:
    """Start a script in a fresh Python and leave it running, for signals and requests."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=env,
        **options,
    )


def read_log(out_dir: Path, event: str, name: str = "sft_vlm_64") -> list[dict]:
    """The lines of a run's log that tell of an event: start, train, validation, end."""
    text = (out_dir / f"{name}.log.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def wait_for_steps(out_dir: Path, n_steps: int, name: str = "sft_vlm_64") -> None:
    """Until a run in another process has logged so many steps, a minute and a half at most."""
    log, deadline = out_dir / f"{name}.log.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline:
        if log.is_file() and log.read_text(encoding="utf-8").count('"train"') >= n_steps:
            return
        time.sleep(0.01)
