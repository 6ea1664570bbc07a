"""Stage 2, supervised fine-tuning: the projector and the whole language model learn from dialogues about images.

python train_sft_vlm.py --epochs 4
python train_sft_vlm.py --data dataset/sft_vlm_data_multi.jsonl --images dataset/sft_multi_images --save_name sft_vlm_multi
"""

from common.errors import run_command
from dataset.mixture import open_data
from trainer.build import build_model, set_trainable
from trainer.config import parse_train_args
from trainer.loop import train
from trainer.runtime import start_runtime

DEFAULTS = dict(
    init_name="pretrain_vlm",  # starts from out/pretrain_vlm_512.pth
    save_name="sft_vlm",
    data_path=["dataset/sft_vlm_data.jsonl"],
    images_path=["dataset/sft_images"],
    epochs=6,
    batch_size=8,
    learning_rate=1e-6,
    max_seq_len=1536,
    log_interval=10,
)


def main() -> None:
    args = parse_train_args(__doc__.splitlines()[0], **DEFAULTS)
    runtime = start_runtime(args)
    model, processor = build_model(args, runtime)
    set_trainable(model, lambda name: True)
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
