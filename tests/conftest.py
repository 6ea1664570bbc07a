"""Small real things for the tests: a tower, a model, a tokenizer, pictures, rows."""

import json
import os
import signal
import socket
import subprocess
import sys
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
from model.processing import VLMProcessor, load_tokenizer

# A shell's background job ignores Ctrl-C, and so would the scripts that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
TOKENIZER = ROOT / "model/demo/tokenizer"
N_PATCHES = 9  # of the small tower: 48 x 48 in patches of 16

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with real photographs is not here")


def small_tower(seed: int = 0) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=16
    )
    return CLIPVisionModel(config).eval()


def small_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})


def small_model(seed: int = 0, vocab_size: int = 672, **sizes) -> MiniMindVLM:
    """A model of 2 layers with random weights."""
    tower = small_tower(seed)
    sizes = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=512) | sizes
    return MiniMindVLM(VLMConfig.for_tower(tower.config, vocab_size=vocab_size, **sizes), tower).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def model():
    return small_model()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return VLMProcessor(
        tokenizer, small_image_processor(), VLMConfig.for_tower(small_tower().config, vocab_size=len(tokenizer))
    )


@pytest.fixture(scope="session")
def tower_dir(tmp_path_factory) -> Path:
    """A folder as CLIP's: config, weights, preprocessing."""
    folder = tmp_path_factory.mktemp("tower")
    small_tower().save_pretrained(folder)
    small_image_processor().save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (64, 56)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory) -> Path:
    """24 rows with 0, 1 or 2 images, in rows.jsonl and images/."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "images").mkdir()
    rows = []
    for index in range(24):
        names = [f"{index}-{k}.png" for k in range(index % 3)]
        for k, name in enumerate(names):
            picture(2 * index + k).save(folder / "images" / name)
        question = "<image>\n" * len(names) + "What color is the circle?" * (1 + index % 4)
        row = {
            "conversations": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "red blue"[: 3 + index % 6]},
            ]
        }
        rows.append(row | ({"image": ", ".join(names)} if names else {}))
    write_rows(folder / "rows.jsonl", rows)
    return folder


def run_script(*command: str, **options) -> subprocess.CompletedProcess:
    """Run a script of the repository in a process of its own; stdout and stderr come back as one text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env, timeout=240, **options,
    )  # fmt: skip


def start_script(*command: str, **options) -> subprocess.Popen:
    """Start a script of the repository and leave it running, for signals and requests."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env, **options,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
