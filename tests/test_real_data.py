"""Real photographs and human captions through training and evaluation, with a vision encoder as large as CLIP's."""

import json
import zipfile

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.weights import read_weights
from tests.helpers import SHARED, needs_shared, run_script

pytestmark = needs_shared
FLICKR = SHARED / "flickr8k"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The published layout: unzipped photographs, the first rows of each file, a ViT-B/16 of random weights."""
    folder = tmp_path_factory.mktemp("flickr")
    with zipfile.ZipFile(FLICKR / "pretrain_images.zip") as archive:
        archive.extractall(folder)
    for name, n_rows in (("pretrain_vlm_data", 12), ("sft_vlm_data", 4), ("sft_vlm_data_multi", 4)):
        lines = (FLICKR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:n_rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(folder / "clip")
    CLIPImageProcessorPil().save_pretrained(folder / "clip")
    return folder


def test_pretraining_sft_and_evaluation_on_photographs(place):
    sizes = [
        "--dim",
        "64",
        "--n_layers",
        "2",
        "--tokenizer",
        SHARED / "minimind_tokenizer",
        "--vision_model",
        place / "clip",
    ]
    train = [*sizes, "--images_path", place / "pretrain_images", "--out_dir", place, "--epochs", "1", "--batch_size", "4",
             "--log_interval", "1", "--device", "cpu"]  # fmt: skip
    many_threads = {"OMP_NUM_THREADS": "2"}
    stages = [
        ("train_pretrain_vlm.py", "pretrain_vlm_data", ["--init_weights", "none"], 0),
        ("train_sft_vlm.py", "sft_vlm_data", [], 0),
        ("train_sft_vlm.py", "sft_vlm_data_multi", ["--save_name", "sft_vlm_multi"], 2),
    ]
    for script, name, more, n_repaired in stages:
        finished = run_script(
            script, *train, "--data_path", place / f"{name}.jsonl", *more, env=many_threads
        )
        assert finished.returncode == 0, finished.stdout
        assert "skipped" not in finished.stdout and "left out" not in finished.stdout
        assert (f"repaired: {n_repaired} rows" in finished.stdout) == bool(n_repaired), (
            finished.stdout
        )
    for name in ("pretrain_vlm", "sft_vlm", "sft_vlm_multi"):
        assert read_weights(place / f"{name}_64.pth")
        records = [
            json.loads(line) for line in (place / f"{name}_64.log.jsonl").read_text().splitlines()
        ]
        assert all(0 < record["loss"] < 20 for record in records if record["event"] == "train")

    evaluate = [
        "eval_vlm.py",
        *sizes,
        "--out_dir",
        place,
        "--device",
        "cpu",
        "--max_new_tokens",
        "4",
    ]
    finished = run_script(*evaluate, "--images_dir", SHARED / "eval_images", env=many_threads)
    assert (
        finished.returncode == 0
        and finished.stdout.count("tokens/s") == 8
        and "Panda" in finished.stdout
    )
    finished = run_script(
        *evaluate,
        "--model_mode",
        "2",
        "--images_dir",
        SHARED / "eval_multi_images",
        env=many_threads,
    )
    assert finished.returncode == 0 and "[0.jpg, 1.jpg]" in finished.stdout
    finished = run_script(
        *evaluate,
        "--data",
        place / "sft_vlm_data.jsonl",
        "--images_path",
        place / "pretrain_images",
        env=many_threads,
    )
    assert finished.returncode == 0 and "exact answers, overall" in finished.stdout
