"""Everything a training run can be told, typed and explained in one place."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.flags import MOST_SEED, NO_MOE, PublishedFlag, check_options, option
from model.files import OUT_DIR, TOKENIZER_PATH, VISION_MODEL_PATH

MOST_STEPS = 1_000_000_000  # optimizer steps


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; each field is a flag of both training scripts too.

    The scripts hold the defaults of their stage (train_pretrain_vlm.py, train_sft_vlm.py). A
    TrainConfig never changes; what is found out later (device, dtype, batch size) is stored by
    whoever finds it out. UserError for an impossible value.
    """

    published: ClassVar[tuple[PublishedFlag, ...]] = (
        PublishedFlag(
            ("--local_rank", "--local-rank"),
            "not needed: torchrun and deepspeed also tell each process its rank without it",
        ),
        NO_MOE,
    )

    # Where the samples come from.
    data_path: list[str] = option(
        [],
        "training rows: files or folders in any of the formats of docs/data.md, or patterns such "
        "as 'part-*.parquet'; the rows of several are mixed; FILE:2 takes those of FILE twice an "
        "epoch",
        aliases=("--data",),
        group="data",
    )
    images_path: list[str] = option(
        [],
        "folder or .zip of the images that the rows name: one for all files, or one for each",
        aliases=("--images",),
    )
    val_data: list[str] = option(
        [], "rows for the validation loss, in the same formats; none if not given"
    )
    val_images: list[str] = option(
        [], "folder or .zip of the validation images; that of --images_path if not given"
    )
    val_interval: int | None = option(
        None,
        "optimizer steps between validations; once at the end of each epoch if not given; a new "
        "run starts with one",
        least=1,
        most=MOST_STEPS,
    )
    max_seq_len: int = option(640, "tokens at which a sample is cut off", least=1, most=131_072)
    num_workers: int | None = option(
        None, "processes that read data; 8 on a GPU and 0 on a CPU if not given", least=0, most=256
    )

    # Which network, and from where it starts.
    dim: int | None = option(
        None,
        "width of the language model; if not given, that of --init_weights, or that of "
        "model/LMConfig.py",
        least=2,
        most=16_384,
        group="model",
    )
    n_layers: int | None = option(
        None,
        "number of transformer layers; if not given, that of --init_weights, or that "
        "of model/LMConfig.py (the published 768 wide model has 16)",
        least=1,
        most=256,
    )
    tokenizer: str | None = option(
        None, f"folder of the tokenizer; if not given, that of --init_weights, or {TOKENIZER_PATH}"
    )
    vision_model: str | None = option(
        None,
        "folder of the vision encoder: CLIP, SigLIP, DINOv2, DINOv3 or a CNN of transformers "
        "(docs/training.md); if not given, that of --init_weights, or "
        f"{VISION_MODEL_PATH}",
    )
    init_weights: str | None = option(
        None,
        "weights to start from: a file, or a name for OUT_DIR/NAME_DIM.pth; 'none' starts from "
        "random weights",
    )

    # What makes it fast and changes no result.
    feature_cache: str | None = option(
        None,
        "folder where the features of images are cached; OUT_DIR/features if not given",
        group="speed",
    )
    feature_cache_gb: float = option(
        20, "largest size of that cache, in GB; 0 turns it off", least=0, most=1_000_000
    )
    feature_cache_dtype: Literal["auto", "int8"] = option(
        "auto",
        "number format of that cache; 'auto' has 16 bits, 'int8' about half the size: bytes, and a "
        "scale for each 32 of them",
    )
    compile: bool = option(
        False,
        "compile the blocks of vision encoder and language model (needs a C++ compiler; for GPUs: "
        "a CPU gains nothing)",
    )
    time_split: bool = option(
        False, "on a GPU, log the time of each part of a step too (slower; a CPU always does)"
    )

    # How it learns.
    epochs: int = option(1, "passes over the data", least=1, most=1_000_000, group="optimization")
    batch_size: int | Literal["auto"] = option(
        16,
        "samples in a batch, on each device; 'auto' takes the largest that fits into memory and "
        "reaches --auto_step_size by accumulation",
        least=1,
        most=4096,
    )
    auto_step_size: int = option(
        16,
        "with --batch_size auto: samples of an optimizer step on each device, times "
        "accumulation_steps",
        least=1,
        most=4096,
    )
    memory_gb: float | None = option(
        None,
        "with --batch_size auto: memory to use, in GB; 80 % of what is free if not given",
        least=0,
        most=1_000_000,
    )
    accumulation_steps: int = option(
        1, "batches whose gradients make one optimizer step", least=1, most=4096
    )
    learning_rate: float = option(
        4e-4,
        "base of the learning rate, which falls along a cosine from 1.1 times to 0.1 times this "
        "number, as published",
        least=0,
        most=1000,
    )
    warmup_iters: int = option(
        0, "optimizer steps over which the learning rate rises from 0", least=0, most=MOST_STEPS
    )
    grad_clip: float = option(
        1.0,
        "largest norm of the gradient; a longer one is scaled down; 0: none is",
        least=0,
        most=1_000_000,
    )
    dropout: float | None = option(
        None,
        "share of the activations that are set to 0 in training, against learning by heart; that "
        "of model/LMConfig.py if not given",
        least=0,
        most=0.9,
    )
    max_steps: int | None = option(
        None,
        "optimizer steps after which to stop; all epochs if not given",
        least=1,
        most=MOST_STEPS,
    )
    seed: int = option(
        1337, "seed of random weights and of the order of the data", least=0, most=MOST_SEED
    )

    # Where it runs.
    device: str | None = option(
        None, "cpu, cuda, cuda:1, mps, xpu; a GPU if there is one, if not given", group="machine"
    )
    dtype: Literal["bfloat16", "float32"] = option(
        "bfloat16",
        "number format of matrix products; bfloat16 only where the device has it and it is faster. "
        "Weights are float32 in any case",
    )
    ddp: bool = option(False, "refuse to start outside torchrun (under torchrun, DDP is always on)")

    # What it leaves.
    out_dir: str = option(OUT_DIR, "folder of weights, logs and curves", group="output")
    save_name: str = option("train", "weights go to OUT_DIR/SAVE_NAME_DIM.pth")
    log_interval: int = option(
        10, "optimizer steps between lines of the log", least=1, most=MOST_STEPS
    )
    save_interval: int | None = option(
        None, "optimizer steps between saves; once a minute if not given", least=1, most=MOST_STEPS
    )
    resume: Literal["yes", "auto"] | None = option(
        None,
        "continue from the newest run state in OUT_DIR/SAVE_NAME_DIM.resume; 'auto' starts a new "
        "run where there is none",
    )
    keep_run_states: int = option(
        2,
        "run states to keep; older ones are removed; the one before the newest takes the place of "
        "a damaged one",
        least=1,
        most=1_000_000,
        aliases=("--keep_checkpoints",),
    )
    use_wandb: bool = option(
        False, "log to Weights & Biases too (WANDB_MODE=offline needs no account)"
    )
    wandb_project: str = option("MiniMind-V", "name of the Weights & Biases project")
    use_tensorboard: bool = option(
        False, "log to OUT_DIR/SAVE_NAME_DIM.tensorboard too; `tensorboard --logdir out` shows it"
    )

    def __post_init__(self):
        check_options(self)
