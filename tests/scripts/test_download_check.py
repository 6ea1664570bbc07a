"""Whether downloaded files pass, and wrong ones are named; which command comes next."""

import io
import json
import zipfile

import pytest

from common.errors import MissingFileError, UserError
from scripts.download.check import check_item
from scripts.download.items import GOALS, ITEMS, next_command
from tests.helpers import SHARED, TOKENIZER, assistant, needs_shared, user
from tests.scripts.download_files import (
    clip_files,
    parquet_file,
    put,
    read_folder,
    rows_and_images,
    tokenizer_files,
    zeros,
)


def test_wrong_files_are_named(tmp_path):
    def refuses(name: str, files: dict[str, bytes], match: str) -> None:
        put(tmp_path, name, files)
        with pytest.raises(UserError, match=match):
            check_item(name, tmp_path)

    with pytest.raises(MissingFileError, match=r"lm_512.pth in out/"):
        check_item("lm-512", tmp_path)
    whole = zeros()
    refuses("lm-512", {"lm_512.pth": whole[: len(whole) // 2]}, "lm_512.pth is damaged")
    seven = {"lm_512.pth": zeros(n_layers=7)}
    refuses("lm-512", seven, "dim 512 with 7 layers, not of dim 512 with 8")
    wide = {"lm_512.pth": zeros(768, 16)}
    refuses("lm-512", wide, "lm_512.pth is 768 wide, not 512: it is another model")
    weights = {"pretrain_vlm_512.pth": whole, "sft_vlm_512.pth": zeros(language_only=True)}
    refuses("weights-512", weights, "sft_vlm_512.pth does not fit the model, missing: vision_proj")
    cut_off = clip_files() | {"model.safetensors": b"cut off"}
    refuses("clip", cut_off, "model.safetensors is damaged or not a weights file")
    refuses("tokenizer", tokenizer_files() | {"tokenizer.json": b"{}"}, "cannot load the tokenizer")
    refuses("tokenizer", read_folder(TOKENIZER), "knows 672 tokens, not 6400")
    rows, archive = rows_and_images()
    data = {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive}
    refuses("pretrain-data", data | {"pretrain_images.zip": archive[:-30]}, "is no whole .zip")
    others = data | {"pretrain_vlm_data.jsonl": rows.replace(b".png", b".jpg")}
    refuses("pretrain-data", others, r"no usable row with .*\(30 image missing\)")
    page = data | {"pretrain_vlm_data.jsonl": b"<html>"}
    refuses("pretrain-data", page, r"no usable row .*\(1 not a JSON object\)")
    refuses("sft-data", {"sft_i2t.parquet": b"PAR1"}, "sft_i2t.parquet is cut off")
    text = {"sft_i2t.parquet": parquet_file(text=["a"])}
    refuses("sft-data", text, "has columns text, not conversations and image_bytes")


def test_either_kind_of_data_is_ready(tmp_path):
    """Parquet; .jsonl with the folder its .zip was unpacked to, with an image missing."""
    turns = json.dumps([user("<image>"), assistant("A thing.")])
    rows = parquet_file(conversations=[turns] * 3, image_bytes=[b"a", b"b", None])
    put(tmp_path, "sft-data", {"sft_i2t.parquet": rows})
    assert check_item("sft-data", tmp_path) == "3 rows, images in 2 of the first 3"
    rows, archive = rows_and_images(1200)
    put(tmp_path, "sft-data", {"sft_vlm_data.jsonl": rows})
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        opened.extractall(tmp_path / "dataset")
    (tmp_path / "dataset/pretrain_images").rename(tmp_path / "dataset/sft_images")
    (tmp_path / "dataset/sft_images/7.png").unlink()
    ready = "1,200 rows, 1,199 images; of the first 1,000 rows 1 image missing"
    assert check_item("sft-data", tmp_path) == ready


@needs_shared
def test_published_data_and_tokenizer_pass(tmp_path):
    put(tmp_path, "tokenizer", read_folder(SHARED / "minimind_tokenizer"))
    assert check_item("tokenizer", tmp_path) == "6400 tokens"
    (tmp_path / "dataset").symlink_to(SHARED / "flickr8k")
    assert "rows, " in check_item("pretrain-data", tmp_path)


def test_the_next_command_fits_what_is_there(tmp_path):
    """Each goal comes first once its own things are there and asked for; Parquet needs its flag."""
    for folder in ("clip", "tokenizer"):
        put(tmp_path, folder, dict.fromkeys(ITEMS[folder].choices[0], b""))
    put(tmp_path, "weights-512", {"pretrain_vlm_512.pth": b""})
    assert next_command(["sft-data"], tmp_path) == "python -m scripts.download sft-data"
    put(tmp_path, "sft-data", {"sft_i2t.parquet": b""})
    command = "python train_sft_vlm.py --epochs 4 --data dataset/sft_i2t.parquet"
    assert next_command(["sft-data"], tmp_path) == command
    put(tmp_path, "weights-512", {"sft_vlm_512.pth": b""})
    put(tmp_path, "sft-multi-data", dict.fromkeys(ITEMS["sft-multi-data"].choices[0], b""))
    multi = "python train_sft_vlm.py --save_name sft_vlm_multi --epochs 4"
    data = "--data dataset/sft_vlm_data_multi.jsonl --images dataset/sft_multi_images"
    assert next_command(["sft-multi-data"], tmp_path) == f"{multi} {data}"
    put(tmp_path, "weights-768", dict.fromkeys(ITEMS["weights-768"].choices[0], b""))
    flags = "--dim 768 --n_layers 16 --data dataset/sft_i2t.parquet"
    assert next_command(["weights-768"], tmp_path).endswith(flags)
    assert {need for needs, _ in GOALS for need in needs} >= set(ITEMS)
