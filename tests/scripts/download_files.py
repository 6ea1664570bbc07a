"""Small files in the published formats, as bytes."""

import io
import json
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as parquet
import torch

from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from model.processing import load_tokenizer
from scripts.download.items import ITEMS
from tests.helpers import TOKENIZER, picture, small_image_processor, small_vision_encoder


def zeros(dim: int = 512, n_layers: int = 8, language_only: bool = False, **sizes) -> bytes:
    """A weights file of the published shapes, all of whose tensors share one zero."""
    with torch.device("meta"):
        weights = MiniMindVLM(VLMConfig(dim=dim, n_layers=n_layers, **sizes)).state_dict().items()
    zeros = {name: torch.zeros(1).expand(weight.shape) for name, weight in weights}
    if language_only:
        zeros = {name: zero for name, zero in zeros.items() if not name.startswith("vision_proj")}
    file = io.BytesIO()
    torch.save(zeros, file)
    return file.getvalue()


def rows_and_images(n_rows: int = 30) -> tuple[bytes, bytes]:
    """A .jsonl and the .zip of its images."""
    file, packed = io.BytesIO(), io.BytesIO()
    picture().save(file, format="PNG")
    turns = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A thing."},
    ]
    rows = [
        json.dumps({"image": f"{number}.png", "conversations": turns}) for number in range(n_rows)
    ]
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(n_rows):
            archive.writestr(f"pretrain_images/{number}.png", file.getvalue())
    return "\n".join(rows).encode(), packed.getvalue()


def parquet_file(**columns) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def large_archive(n_bytes: int) -> bytes:
    """The .zip of `rows_and_images`, with an entry more that makes it large."""
    packed = io.BytesIO(rows_and_images()[1])
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("pretrain_images/large.bin", bytes(n_bytes))
    return packed.getvalue()


@cache
def tokenizer_files() -> dict[str, bytes]:
    """A tokenizer of 6,400 tokens with the ids the model counts on."""
    tokenizer = load_tokenizer(TOKENIZER)
    n_missing = VLMConfig().vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"word{number}" for number in range(n_missing)])
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return read_folder(Path(folder))


@cache
def clip_files() -> dict[str, bytes]:
    """As the published repository: the same weights four times, three of them not to be fetched."""
    with TemporaryDirectory() as folder:
        small_vision_encoder().save_pretrained(folder)
        small_image_processor().save_pretrained(folder)
        files = read_folder(Path(folder))
    others = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md")
    return files | dict.fromkeys(others, b"no")


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(root: Path, name: str, files: dict[str, bytes]) -> None:
    """Write files to the place of that name."""
    folder = root / ITEMS[name].folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
