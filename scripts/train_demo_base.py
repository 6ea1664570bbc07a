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

from dataset.scene_set import text_row, write_part
from model.checkpoint import PROJECTOR, read_weights, save_atomically
from scripts.demo import MODEL_FLAGS, STAND_INS

STAGES = {  # share of drawings among the rows, rows (each read once), learning rate
    "words": (0.0, 51_200, "2e-3"),  # short rows first: what is asked, and where in a text the answer stands
    "drawings": (0.8, 38_400, "1e-3"),  # then the same spread over 196 cells, as patches are
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_file", type=Path, default=STAND_INS / "lm_128.pth", help="where the weights are written")
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "out/demo_base", help="data, logs and full-precision weights"
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of the rows and the weights")
    args = parser.parse_args()

    weights_file = "none"
    for name, (drawn_share, n_rows, rate) in STAGES.items():
        data = args.work_dir / f"{name}.jsonl"
        write_part(data, n_rows, lambda rng, index: (text_row(rng, drawn_share), ()), seed=f"{args.seed}-{name}")
        command = [
            sys.executable, str(ROOT / "train_sft_vlm.py"), *MODEL_FLAGS, "--dtype", "float32", "--init_weights", weights_file,
            "--data_path", str(data), "--out_dir", str(args.work_dir), "--save_name", name,
            "--epochs", "1", "--batch_size", "32", "--learning_rate", rate, "--warmup_iters", "100",
            "--log_interval", "50", "--save_interval", "250", "--seed", str(args.seed),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        weights_file = str(args.work_dir / f"{name}_128.pth")
    weights = read_weights(Path(weights_file))
    weights = {name: weight.half() for name, weight in weights.items() if not name.startswith(PROJECTOR)}
    save_atomically(weights, args.out_file)
    print(f"{args.out_file}: {args.out_file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
