"""Stage 1, pretraining: the projector and the last layer of the language model learn captions.

    python train_pretrain_vlm.py --epochs 4
    torchrun --nproc_per_node 2 train_pretrain_vlm.py --epochs 4

On two CPU cores with 2 GB of memory it sees 7 to 13 images a second (docs/results.md).
"""

import sys

from common.errors import run_command
from common.flags import parse_flags
from dataset.mixture import check_sources, open_train_and_val
from model.files import find_own
from trainer.config import TrainConfig
from trainer.paths import check_output, find_parts

DEFAULTS = TrainConfig(
    init_weights="lm",
    save_name="pretrain_vlm",
    data_path=[str(find_own("dataset/pretrain_vlm_data.jsonl"))],
    images_path=[str(find_own("dataset/pretrain_images"))],
    epochs=4,
    batch_size=16,
    auto_step_size=16,
    learning_rate=4e-4,
    max_seq_len=640,
    log_interval=100,
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
    last_layer = f"layers.{model.config.n_layers - 1}."
    set_trainable(model, lambda name: name.startswith(("vision_proj.", last_layer)))
    train_data, val_data = open_train_and_val(config, processor)
    sys.exit(train(model, train_data, config, val_data, runtime).exit_status)


if __name__ == "__main__":
    run_command(main)
