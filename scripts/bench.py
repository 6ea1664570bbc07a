"""Measure training speed and memory as a user gets them: the real scripts, a full-size ViT-B/16 tower, a 512/8 model.

    python scripts/bench.py                                            # on the rendered scenes
    python scripts/bench.py --data ../shared/flickr8k/pretrain_vlm_data.jsonl --images_zip ../shared/flickr8k/pretrain_images.zip

The tower's weights are random: speed does not depend on them. Writes out/bench.json.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dataset.scene_set import write_scene_set

WORK = ROOT / "out" / "bench"
WARM_UP = 2  # steps not counted: allocator and caches fill


def prepare(args: argparse.Namespace) -> tuple[Path, Path]:
    """(rows, image folder), and the tower in out/bench/vision_model."""
    shutil.rmtree(WORK, ignore_errors=True)
    CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(WORK / "vision_model")
    CLIPImageProcessorPil().save_pretrained(WORK / "vision_model")
    if args.data is None:
        write_scene_set(WORK, {"pretrain": args.batch_size * args.steps})
        return WORK / "pretrain_vlm_data.jsonl", WORK / "pretrain_images"
    with zipfile.ZipFile(args.images_zip) as archive:
        archive.extractall(WORK / "images")  # extractall keeps members inside the folder
    folders = [path for path in (WORK / "images").iterdir() if path.is_dir()]
    return args.data, folders[0] if folders else WORK / "images"


def measure(args: argparse.Namespace, rows: Path, images: Path) -> dict:
    """Run train_pretrain_vlm.py for a few steps; its own log gives the speed, the system its peak memory."""
    command = [
        sys.executable, str(ROOT / "train_pretrain_vlm.py"), "--dim", "512", "--n_layers", "8", "--init_weights", "none",
        "--data_path", str(rows), "--images_path", str(images), "--vision_model", str(WORK / "vision_model"),
        "--tokenizer", str(args.tokenizer), "--out_dir", str(WORK), "--batch_size", str(args.batch_size), "--dtype", args.dtype,
        "--max_steps", str(args.steps), "--log_interval", "1", "--epochs", "1",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    records = [json.loads(line) for line in (WORK / "pretrain_vlm_512.log.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "train"]
    seconds = steps[-1]["seconds"] - steps[WARM_UP - 1]["seconds"]
    return {
        "recipe": "ours",
        "stage": "pretrain",
        "dim": 512,
        "epoch": "first",
        "dtype": records[-1]["dtype"],
        "images_per_second": round((len(steps) - WARM_UP) * args.batch_size / seconds, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="pretraining rows (the rendered scenes where not given)")
    parser.add_argument("--images_zip", type=Path, help="zip of their images")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "model/demo/tokenizer", help="tokenizer folder")
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, the first two not counted")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="as the training scripts")
    args = parser.parse_args()
    if args.data and not args.images_zip:
        parser.error("--data needs --images_zip")
    row = measure(args, *prepare(args))
    (ROOT / "out" / "bench.json").write_text(json.dumps({"train": [row]}, indent=1))
    print(f"{row['images_per_second']} images/s, {row['peak_memory_bytes'] / 1e9:.2f} GB at most ({row['dtype']})")


if __name__ == "__main__":
    main()
