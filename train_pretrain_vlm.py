"""Stage 1, pretraining: the projector and the last layer of the language model learn captions.

    python train_pretrain_vlm.py --epochs 4
    torchrun --nproc_per_node 2 train_pretrain_vlm.py --epochs 4

On two CPU cores with 2 GB of memory it sees 7 to 13 images a second (docs/results.md).
"""

import sys

from common.errors import run_command
from common.flags import parse_flags
from dataset.mixture import find_sources, open_data
from trainer.config import TrainConfig
from trainer.paths import find_parts

DEFAULTS = TrainConfig(
    init_weights="lm",
    save_name="pretrain_vlm",
    data_path=["dataset/pretrain_vlm_data.jsonl"],
    images_path=["dataset/pretrain_images"],
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
    find_sources(config.data_path, config.images_path)
    find_sources(config.val_data, config.val_images)
    from trainer.build import build_model, set_trainable
    from trainer.loop import train
    from trainer.runtime import start_runtime

    runtime = start_runtime(config)
    model, processor = build_model(config, runtime)
    last_layer = f"layers.{model.config.n_layers - 1}."
    set_trainable(model, lambda name: name.startswith(("vision_proj.", last_layer)))
    length = config.max_seq_len
    train_data = open_data(config.data_path, config.images_path, processor, length)
    val_data = None
    if config.val_data:
        images = config.val_images or config.images_path
        val_data = open_data(config.val_data, images, processor, length)
    result = train(model, train_data, config, val_data, runtime)
    runtime.close()
    sys.exit(result.exit_status)


if __name__ == "__main__":
    run_command(main)
