"""Flags of both training scripts: the published names, one help line each."""

import argparse

from model.LMConfig import LMConfig
from model.processing import TOKENIZER_PATH
from model.vision import VISION_MODEL_PATH

LEAST = dict(  # values of flags
    batch_size=1, accumulation_steps=1, epochs=1, max_steps=1, warmup_iters=0, learning_rate=0, grad_clip=0, log_interval=1,
    save_interval=1, val_interval=1, keep_checkpoints=1, max_seq_len=1, num_workers=0, n_layers=1, feature_cache_gb=0,
    memory_gb=0,
)  # fmt: skip


def parse_train_args(description: str, **defaults) -> argparse.Namespace:
    """Read the command line. `defaults` are the stage's own: save_name, init_name, epochs, batch_size, learning_rate,
    data_path, images_path, max_seq_len, log_interval."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", "--data", nargs="+", metavar="FILE",
        help="training rows, .jsonl or .parquet; several files or patterns are mixed, FILE:2 has its rows come twice an epoch",
    )  # fmt: skip
    group.add_argument(
        "--images_path", "--images", nargs="+", metavar="FOLDER",
        help="folder or .zip of the images that a .jsonl names: one for all, or one for each FILE",
    )  # fmt: skip
    group.add_argument(
        "--val_data", nargs="+", metavar="FILE", help="rows for a validation loss, same formats"
    )
    group.add_argument(
        "--val_images",
        nargs="+",
        metavar="FOLDER",
        help="folder of their images (as --images_path where not given)",
    )
    group.add_argument(
        "--val_interval",
        type=int,
        default=None,
        help="steps between validations (at the end of each epoch where not given)",
    )
    group.add_argument("--max_seq_len", type=int, help="tokens a sample is cut at")
    group.add_argument(
        "--num_workers", type=int, default=None, help="processes that read data (8, and 0 on a CPU)"
    )

    sizes = LMConfig()
    group = parser.add_argument_group("model")
    group.add_argument(
        "--dim",
        type=int,
        default=sizes.dim,
        help="width of the language model: 512, or 768 with --n_layers 16",
    )
    group.add_argument("--n_layers", type=int, default=sizes.n_layers, help="its layers")
    group.add_argument("--tokenizer", default=TOKENIZER_PATH, help="tokenizer folder")
    group.add_argument("--vision_model", default=VISION_MODEL_PATH, help="CLIP folder")
    group.add_argument(
        "--init_weights",
        help="weights to start from (OUT_DIR/INIT_NAME_DIM.pth where not given); none: random",
    )

    group = parser.add_argument_group("speed")
    group.add_argument(
        "--feature_cache",
        help="folder where the vision encoder's features are kept (OUT_DIR/features where not given)",
    )
    group.add_argument(
        "--feature_cache_gb", type=float, default=20, help="largest size of it; 0: no cache"
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks of vision_encoder and language model (needs a C++ compiler; on a CPU it gains nothing)",
    )
    group.add_argument(
        "--time_split",
        action="store_true",
        help="on a GPU, log the time of each part of a step (slower)",
    )

    group = parser.add_argument_group("learning")
    group.add_argument("--epochs", type=int, help="passes over the data")
    group.add_argument(
        "--batch_size", type=size_or_auto,
        help="samples at a time, on each device; auto: what fits, the rest by accumulation",
    )  # fmt: skip
    group.add_argument(
        "--memory_gb",
        type=float,
        default=None,
        help="memory for --batch_size auto (80 %% of what is free where not given)",
    )
    group.add_argument(
        "--accumulation_steps", type=int, default=1, help="batches that make one optimizer step"
    )
    group.add_argument(
        "--learning_rate", type=float, help="peak learning rate is 1.1 times this, as published"
    )
    group.add_argument(
        "--warmup_iters",
        type=int,
        default=0,
        help="steps over which the learning rate rises from 0",
    )
    group.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm")
    group.add_argument(
        "--max_steps", type=int, default=None, help="stop after this many optimizer steps"
    )
    group.add_argument(
        "--seed", type=int, default=1337, help="seed of fresh weights, data order and dropout"
    )

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default=None, help="cuda:0, cpu, … (the GPU where there is one)")
    group.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="bfloat16 where the device has it",
    )
    group.add_argument(
        "--ddp",
        action="store_true",
        help="refuse to start outside torchrun (under it, DDP is always on)",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--out_dir", default="out", help="folder of weights, logs and curves")
    group.add_argument("--save_name", help="weights go to OUT_DIR/SAVE_NAME_DIM.pth")
    group.add_argument("--log_interval", type=int, help="steps between log lines")
    group.add_argument(
        "--save_interval",
        type=int,
        default=None,
        help="steps between saves (once a minute where not given)",
    )
    group.add_argument(
        "--resume", nargs="?", const="yes", choices=("yes", "auto"),
        help="go on with the last checkpoint of OUT_DIR/SAVE_NAME_DIM.resume; auto: or start anew where there is none",
    )  # fmt: skip
    group.add_argument(
        "--keep_checkpoints",
        type=int,
        default=1,
        help="checkpoints to keep; older ones are removed",
    )
    group.add_argument(
        "--use_wandb",
        action="store_true",
        help="log to Weights & Biases (WANDB_MODE=offline needs no account)",
    )
    group.add_argument("--wandb_project", default="MiniMind-V", help="its project")

    parser.set_defaults(**defaults, default_batch_size=defaults["batch_size"])
    args = parser.parse_args()
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value not in (None, "auto") and value < least:
            parser.error(f"--{name} is {value}: it has to be at least {least}")
    return args


def size_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)
