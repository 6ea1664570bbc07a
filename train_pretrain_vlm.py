"""Stage 1, pretraining: the projector and the last layer of the language model learn from image captions.

python train_pretrain_vlm.py --epochs 4
torchrun --nproc_per_node 2 train_pretrain_vlm.py --epochs 4
"""

from common.errors import run_command
from dataset.mixture import open_data
from trainer.build import build_model, set_trainable
from trainer.config import parse_train_args
from trainer.loop import train
from trainer.runtime import start_runtime

DEFAULTS = dict(
    init_name="lm",  # starts from out/lm_512.pth
    save_name="pretrain_vlm",
    data_path=["dataset/pretrain_vlm_data.jsonl"],
    images_path=["dataset/pretrain_images"],
    epochs=4,
    batch_size=16,
    learning_rate=4e-4,
    max_seq_len=640,
    log_interval=100,
)


def main() -> None:
    args = parse_train_args(__doc__.splitlines()[0], **DEFAULTS)
    runtime = start_runtime(args)
    model, processor = build_model(args, runtime)
    last_layer = f"layers.{model.config.n_layers - 1}."
    set_trainable(model, lambda name: name.startswith(("vision_proj.", last_layer)))
    train_data = open_data(args.data_path, args.images_path, processor, args.max_seq_len)
    val_data = None
    if args.val_data:
        val_data = open_data(
            args.val_data, args.val_images or args.images_path, processor, args.max_seq_len
        )
    train(model, train_data, val_data, args, runtime)
    runtime.close()


if __name__ == "__main__":
    run_command(main)
