"""Train the demo's stand-in for lm_512.pth: a small language model that has only read about scenes.

    python scripts/train_demo_base.py             # about 20 minutes on 2 cores; writes model/demo/lm_128.pth

Text-only rows of the rendered set (dataset/scene_set.py) go through train_sft_vlm.py, as anyone's text would. Run
scripts/train_demo_tower.py first. Seeded: the same machine and number of threads give the same file again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dataset.scene_set import write_scene_set
from model.checkpoint import PROJECTOR, read_weights, save_atomically
from scripts.demo import MODEL_FLAGS, STAND_INS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_file", type=Path, default=STAND_INS / "lm_128.pth", help="where the weights are written")
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "out/demo_base", help="data, log and full-precision weights"
    )
    parser.add_argument("--rows", type=int, default=76_800, help="text rows, each read once")
    parser.add_argument("--seed", type=int, default=7, help="seed of the rows and the weights")
    args = parser.parse_args()

    write_scene_set(args.work_dir, {"lm": args.rows}, args.seed)
    command = [
        sys.executable, str(ROOT / "train_sft_vlm.py"), *MODEL_FLAGS, "--dtype", "float32", "--init_weights", "none",
        "--data_path", str(args.work_dir / "lm_data.jsonl"), "--out_dir", str(args.work_dir), "--save_name", "lm",
        "--epochs", "1", "--batch_size", "32", "--learning_rate", "1.5e-3", "--warmup_iters", "100",
        "--log_interval", "50", "--save_interval", "250", "--seed", str(args.seed),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    weights = read_weights(args.work_dir / "lm_128.pth")
    weights = {name: weight.half() for name, weight in weights.items() if not name.startswith(PROJECTOR)}
    save_atomically(weights, args.out_file)
    print(f"{args.out_file}: {args.out_file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
