"""Build what is trained: vision encoder, tokenizer, network."""

import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Parameter

from common.errors import UserError
from model.files import read_info
from model.LMConfig import LMConfig, VLMConfig, size_names
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, load_tokenizer
from model.vision import load_vision_encoder
from model.weights import FREE_SIZES, read_sizes, read_weights
from trainer.config import TrainConfig
from trainer.paths import check_space, find_parts
from trainer.runtime import Runtime


def build_model(config: TrainConfig, runtime: Runtime) -> tuple[MiniMindVLM, VLMProcessor]:
    """The network on its device with random weights, and the processor that feeds it.

    `train` loads the weights to start from: where a run starts is decided in one place
    (run_state.py).
    """
    start, tokenizer_path, vision_path = find_parts(config)
    sizes = choose_sizes(config, start)
    # No weight depends on it, so it may change from one stage to the next.
    if config.dropout is not None:
        sizes["dropout"] = config.dropout
    tokenizer = load_tokenizer(tokenizer_path)
    vision_encoder, image_processor = load_vision_encoder(vision_path)
    model_config = VLMConfig.for_vision_encoder(vision_encoder, vocab_size=len(tokenizer), **sizes)
    runtime.print(f"sizes: {describe_sizes(sizes, model_config)}")
    if config.max_seq_len > model_config.max_seq_len:
        raise UserError(
            f"--max_seq_len is {config.max_seq_len} but the network takes at most "
            f"{model_config.max_seq_len} tokens (LMConfig.max_seq_len): lower the flag"
        )

    # before anything of that size is made
    n_bytes = count_bytes(model_config)
    check_memory(n_bytes)
    check_space(config, n_bytes)

    # the network
    model = MiniMindVLM(model_config, vision_encoder).to(runtime.device)
    # The vision encoder is frozen, so it needs no float32 copy for the optimizer.
    vision_encoder.to(runtime.dtype)
    if config.compile:
        compile_blocks(model)
    return model, VLMProcessor(tokenizer, image_processor, model_config)


def count_bytes(config: VLMConfig) -> int:
    """Bytes of the weights of such a network, without the vision encoder."""
    with torch.device("meta"):
        return sum(weight.nbytes for weight in MiniMindVLM(config).parameters())


def check_memory(n_bytes: int) -> None:
    """UserError where the weights alone are more than this machine's memory."""
    try:
        import psutil
    except ImportError:
        # On a bare image of packages nobody knows.
        return
    memory = psutil.virtual_memory().total
    if n_bytes > memory:
        raise UserError(
            f"the weights take {n_bytes / 1e9:,.0f} GB and this machine has {memory / 1e9:,.0f} GB "
            "of memory: lower --dim or --n_layers"
        )


def choose_sizes(config: TrainConfig, start: Path | None) -> dict[str, int | float]:
    """Sizes of the language model: the flags come first, then the weights to start from.

    What neither says is left out: it is as model/LMConfig.py says.

    Args:
        config: its dim and n_layers are None if not given.
        start: the weights to start from; None for random ones.
    """
    flags = {"dim": config.dim, "n_layers": config.n_layers}
    flags = {name: size for name, size in flags.items() if size is not None}
    if start is None:
        return flags
    theirs = read_info(start).get("config") or read_sizes(read_weights(start), start)
    # A flag that contradicts the weights: `load_weights` refuses it, unless the run is resumed.
    if any(theirs.get(name) != size for name, size in flags.items()):
        return {name: theirs[name] for name in ("dim", "n_layers") if name in theirs} | flags
    # What no weight depends on is free to be edited.
    others = {"vocab_size", *FREE_SIZES}
    return {name: theirs[name] for name in size_names(LMConfig) if name in theirs.keys() - others}


def describe_sizes(sizes: dict[str, int | float], model_config: LMConfig) -> str:
    """The size of the network, then what model/LMConfig.py says where it does not decide.

    Args:
        sizes: see `choose_sizes`.
        model_config: all sizes.
    """
    parameters = inspect.signature(LMConfig).parameters
    # A default of None follows from other sizes.
    edited = {
        name: parameters[name].default
        for name, size in sizes.items()
        if parameters[name].default not in (None, size)
    }
    names = dict.fromkeys(("dim", "n_layers", *edited))
    words = ", ".join(f"{name} {getattr(model_config, name)}" for name in names)
    if edited:
        other = ", ".join(f"{name} {default}" for name, default in edited.items())
        words += f" (model/LMConfig.py: {other}; flags and weights come first)"
    return words


def compile_blocks(model: MiniMindVLM) -> None:
    """Compile one block of each kind, for any batch size and length; names of weights stay.

    A CNN's blocks are of many kinds, and are left as they are.
    """
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if not any(shutil.which(name) for name in compilers):
        raise UserError(
            "--compile needs a C++ compiler and there is none: install g++, or leave --compile out"
        )
    for block in (*model.layers, *model.vision_encoder.layers):
        block.compile(dynamic=True)


def set_trainable(model: MiniMindVLM, is_trainable: Callable[[str], bool]) -> list[Parameter]:
    """Freeze every parameter but those whose name `is_trainable` accepts; returns those that learn.

    The vision encoder is frozen in any case.
    """
    for name, parameter in model.named_parameters():
        is_vision = name.startswith("vision_encoder.")
        parameter.requires_grad_(not is_vision and is_trainable(name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
