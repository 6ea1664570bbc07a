"""Build what is trained: vision encoder, tokenizer, network."""

import os
import shutil
from collections.abc import Callable

from torch.nn import Parameter

from common.errors import UserError
from model.files import DEFAULT_DIM, read_info
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, load_tokenizer
from model.vision import load_vision_encoder
from model.weights import read_sizes, read_weights
from trainer.config import TrainConfig
from trainer.paths import find_parts
from trainer.runtime import Runtime


def build_model(config: TrainConfig, runtime: Runtime) -> tuple[MiniMindVLM, VLMProcessor]:
    """The network on its device with random weights, and the processor that feeds it.

    dim and n_layers come from the flags, else from the weights to start from. `train` loads these:
    where a run starts is decided in one place (run_state.py).
    """
    start, tokenizer_path, vision_path = find_parts(config)
    sizes = {}
    if start is not None:
        sizes = read_info(start).get("config") or read_sizes(read_weights(start), start)

    tokenizer = load_tokenizer(tokenizer_path)
    vision_encoder, image_processor = load_vision_encoder(vision_path)
    model_config = VLMConfig.for_vision_encoder(
        vision_encoder.config,
        dim=config.dim or sizes.get("dim", DEFAULT_DIM),
        n_layers=config.n_layers or sizes.get("n_layers", 8),
        vocab_size=len(tokenizer),
    )
    if config.max_seq_len > model_config.max_seq_len:
        raise UserError(
            f"--max_seq_len is {config.max_seq_len} but the network takes at most "
            f"{model_config.max_seq_len} tokens (LMConfig.max_seq_len): lower the flag"
        )

    model = MiniMindVLM(model_config, vision_encoder).to(runtime.device)
    # The vision encoder is frozen, so it needs no float32 copy for the optimizer.
    vision_encoder.to(runtime.dtype)
    if config.compile:
        compile_blocks(model)
    return model, VLMProcessor(tokenizer, image_processor, model_config)


def compile_blocks(model: MiniMindVLM) -> None:
    """Compile one block of each kind, for any batch size and length; names of weights stay."""
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if not any(shutil.which(name) for name in compilers):
        raise UserError(
            "--compile needs a C++ compiler and there is none: install g++, or leave --compile out"
        )
    for block in (*model.layers, *model.vision_encoder.encoder.layers):
        block.compile(dynamic=True)


def set_trainable(model: MiniMindVLM, is_trainable: Callable[[str], bool]) -> list[Parameter]:
    """Freeze every parameter but those whose name `is_trainable` accepts; returns the others.

    The vision encoder is frozen in any case.
    """
    for name, parameter in model.named_parameters():
        is_vision = name.startswith("vision_encoder.")
        parameter.requires_grad_(not is_vision and is_trainable(name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
