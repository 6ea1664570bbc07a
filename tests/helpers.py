"""Small real things for the tests: a vision encoder, a model, a tokenizer, pictures, rows."""

import json
import multiprocessing
import multiprocessing.reduction
import os
import signal
import socket
import subprocess
import sys
import tempfile
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
N_PATCHES = 9  # of the small encoder: 48 x 48 in patches of 16

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


def run_script(*command: str, **options) -> subprocess.CompletedProcess:
    """Run a script (or "-m", module) in a process of its own; all that it prints is one text.

    The process is forked from a server that has imported PyTorch and transformers already
    (tests/preload.py), which saves their seconds; for other commands see `run_cold`.
    """
    env, text = options.pop("env", {}), options.pop("input", "")
    assert not options, options
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdin,
        tempfile.TemporaryFile() as stdout,
    ):
        stdin.write(text)
        stdin.seek(0)
        streams = [multiprocessing.reduction.DupFd(file.fileno()) for file in (stdin, stdout)]
        process = _SERVER.Process(target=run_forked, args=([*map(str, command)], env, *streams))
        process.start()
        process.join(timeout=240)
        if process.exitcode is None:
            process.kill()
            process.join()
        stdout.seek(0)
        printed = stdout.read().decode("utf-8", "replace").replace("\r\n", "\n")
    return subprocess.CompletedProcess(command, process.exitcode, printed)


def run_cold(*command: str, **options) -> subprocess.CompletedProcess:
    """The same in a fresh Python, for what a warm process would hide: start-up, torchrun."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=240,
        **options,
    )


def start_script(*command: str, **options) -> subprocess.Popen:
    """Start a script of the repository and leave it running, for signals and requests."""
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
