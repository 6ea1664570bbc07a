"""Stage 2, supervised fine-tuning: the projector and the whole language model learn dialogues.

    python train_sft_vlm.py --epochs 4
    python train_sft_vlm.py --data dataset/sft_vlm_data_multi.jsonl \\
        --images dataset/sft_multi_images --save_name sft_vlm_multi

On two CPU cores with 2 GB of memory it sees 5 to 8 images a second (docs/results.md).
"""

import sys

from common.errors import run_command
from common.flags import parse_flags
from dataset.mixture import check_sources, open_train_and_val
from model.files import find_own
from trainer.config import TrainConfig
from trainer.paths import check_output, find_parts

DEFAULTS = TrainConfig(
    init_weights="pretrain_vlm",
    save_name="sft_vlm",
    data_path=[str(find_own("dataset/sft_vlm_data.jsonl"))],
    images_path=[str(find_own("dataset/sft_images"))],
    epochs=6,
    batch_size=8,
    auto_step_size=8,
    learning_rate=1e-6,
    max_seq_len=1536,
    log_interval=10,
)


def main() -> None:
    # Flags and files are checked before PyTorch and transformers, which take seconds to import.
    config = parse_flags(DEFAULTS, __doc__)
    find_parts(config)
    check_output(config)
    check_sources(config)
    from trainer.build import build_model, set_trainable
    from trainer.loop import train
    from trainer.runtime import start_runtime

    runtime = start_runtime(config)
    model, processor = build_model(config, runtime)
    set_trainable(model, lambda name: True)
    train_data, val_data = open_train_and_val(config, processor)
    sys.exit(train(model, train_data, config, val_data, runtime).exit_status)


if __name__ == "__main__":
    run_command(main)
