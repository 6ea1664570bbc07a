"""What a run state has to have in common with the run that goes on from it, and what may change."""

import zlib
from dataclasses import asdict

from common.errors import BadSampleError
from model.model_vlm import MiniMindVLM
from model.weights import describe_config
from trainer.config import TrainConfig
from trainer.glance import ROWS_LOOKED_AT, spread

# Options that give every step its meaning. Others may change: a run may be made longer, be cut
# into other batches, and read, save and log as it likes.
FIXED = ("seed", "max_seq_len", "learning_rate", "warmup_iters", "grad_clip")
# What a run always says anew.
UNSAID = {*FIXED, "resume"}


def describe_identity(model: MiniMindVLM, train_data) -> dict[str, int | float | str]:
    """What must stay the same from a run state to the run that goes on from it, beside FIXED.

    Args:
        model: what is trained, and which part of it.
        train_data: a VLMDataset or MixedDataset.
    """
    trainable = [one for one in model.parameters() if one.requires_grad]
    return {
        "stage": name_stage(model),
        "trainable parameters": sum(one.numel() for one in trainable),
        **describe_config(model.config),
        # Two families may have as many patches of the same width and mean other things by them.
        "vision encoder": model.vision_encoder.family.name,
        "rows": f"{len(train_data)}, checksum {zlib.crc32(train_data.lengths.tobytes()):08x}",
        "content of the rows": f"checksum {_checksum(train_data):08x}",
    }


def name_stage(model: MiniMindVLM) -> str:
    """ "sft" where all but the vision encoder learns, else "pretrain"."""
    is_trainable = [
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith("vision_encoder.")
    ]
    return "sft" if all(is_trainable) else "pretrain"


def _checksum(train_data) -> int:
    """Of the tokens of rows spread over a set; the same whatever its files are called.

    Rows that cannot be read count by their place.
    """
    checksum = 0
    for index in spread(train_data, ROWS_LOOKED_AT):
        try:
            sample, _ = train_data.read_text(index)
        except BadSampleError:
            continue
        tokens = (sample["input_ids"].numpy().tobytes(), sample["labels"].numpy().tobytes())
        checksum = zlib.crc32(b"".join((str(index).encode(), *tokens)), checksum)
    return checksum


def list_differences(state: dict, config: TrainConfig, identity: dict) -> str:
    """Both values of all that had to stay the same, "" if it did.

    Args:
        state: the run state; an older one may lack names.
        config: of the run.
        identity: see `describe_identity`.
    """
    before = {f"--{name}": state["config"].get(name) for name in FIXED} | state["run"]
    now = {f"--{name}": getattr(config, name) for name in FIXED} | identity
    found = {
        name: f"{name} {before[name]}, now it is {value}"
        for name, value in now.items()
        if before.get(name, value) not in (value, None)
    }
    # Another stage or flag explains other sizes and rows.
    chief = [text for name, text in found.items() if name == "stage" or name.startswith("--")]
    return ", and ".join(chief or found.values())


def list_changes(saved: dict, config: TrainConfig) -> str:
    """Options that are others now and may be, such as "epochs 4 (was 2)".

    Args:
        saved: the options in the run state.
        config: those of the run.
    """
    return ", ".join(
        f"{name} {_name_value(value)} (was {_name_value(saved[name])})"
        for name, value in asdict(config).items()
        if name not in UNSAID and saved.get(name, value) != value
    )


def _name_value(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
