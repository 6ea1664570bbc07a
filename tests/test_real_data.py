"""Real photographs and human captions, with a vision encoder as large as CLIP's."""

import zipfile

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.weights import read_weights
from scripts.processes import as_flags
from tests.helpers import SHARED, needs_shared, read_log, run_script

pytestmark = needs_shared
FLICKR = SHARED / "flickr8k"
N_ROWS = {"pretrain_vlm_data": 12, "sft_vlm_data": 4, "sft_vlm_data_multi": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The published layout: unzipped photographs, first rows of each file, a random ViT-B/16."""
    folder = tmp_path_factory.mktemp("flickr")
    with zipfile.ZipFile(FLICKR / "pretrain_images.zip") as archive:
        archive.extractall(folder)
    for name, n_rows in N_ROWS.items():
        lines = (FLICKR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:n_rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(folder / "clip")
    CLIPImageProcessorPil().save_pretrained(folder / "clip")
    return folder


def test_pretraining_sft_and_evaluation_on_photographs(place):
    images = place / "pretrain_images"
    parts = dict(tokenizer=SHARED / "minimind_tokenizer", vision_model=place / "clip", device="cpu")
    options = parts | dict(
        dim=64,
        n_layers=2,
        images_path=images,
        out_dir=place,
        epochs=1,
        batch_size=4,
        log_interval=1,
    )
    stages = [
        (
            "train_pretrain_vlm.py",
            "pretrain_vlm",
            "pretrain_vlm_data",
            dict(init_weights="none"),
            0,
        ),
        ("train_sft_vlm.py", "sft_vlm", "sft_vlm_data", {}, 0),
        ("train_sft_vlm.py", "sft_vlm_multi", "sft_vlm_data_multi", {}, 2),
    ]
    for script, name, data, more, n_repaired in stages:
        data_path = place / f"{data}.jsonl"
        flags = as_flags(**options, data_path=data_path, save_name=name, **more)
        finished = run_script(script, *flags)
        assert finished.returncode == 0, finished.stdout
        assert "skipped" not in finished.stdout and "left out" not in finished.stdout
        is_repaired = f"repaired: {n_repaired} surplus <image> dropped" in finished.stdout
        assert is_repaired == bool(n_repaired), finished.stdout
        assert read_weights(place / f"{name}_64.pth")
        losses = [line["loss"] for line in read_log(place, "train", f"{name}_64")]
        assert losses and all(0 < loss < 20 for loss in losses)

    # The weights know their sizes, tokenizer and vision encoder.
    ask = ["eval_vlm.py", *as_flags(out_dir=place, device="cpu", max_new_tokens=4)]
    printed = run_script(*ask, "--images_dir", SHARED / "eval_images").stdout
    assert printed.count("tokens/s") == 8 and "Panda" in printed, printed
    several = as_flags(model_mode=2, images_dir=SHARED / "eval_multi_images")
    printed = run_script(*ask, *several).stdout
    assert "[0.jpg, 1.jpg]" in printed, printed
    rows = as_flags(data=place / "sft_vlm_data.jsonl", images_path=images)
    printed = run_script(*ask, *rows).stdout
    assert "exact answers, overall" in printed, printed
