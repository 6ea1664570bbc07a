"""Build what is trained: vision_encoder, tokenizer, model, and the weights it starts from."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch.nn import Parameter

from common.errors import UserError
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, load_tokenizer
from model.vision import load_vision_encoder
from model.weights import load_weights, read_weights, weights_path
from trainer.run_state import list_checkpoints
from trainer.runtime import Runtime


def build_model(args, runtime: Runtime) -> tuple[MiniMindVLM, VLMProcessor]:
    """The model on its device with its starting weights, and the processor that feeds it.

    Weights: --init_weights, else OUT_DIR/INIT_NAME_DIM.pth. Sizes: --dim, --n_layers, the vision encoder's patches, the tokenizer's words.
    """
    tokenizer = load_tokenizer(args.tokenizer)
    vision_encoder, image_processor = load_vision_encoder(args.vision_model)
    config = VLMConfig.for_vision_encoder(
        vision_encoder.config, dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer)
    )
    model = MiniMindVLM(config, vision_encoder)
    if args.resume and list_checkpoints(args):
        runtime.say(
            "weights: of the checkpoint"
        )  # those the run once started from may be gone by now
    elif args.init_weights == "none":
        runtime.say("weights: random")
    else:
        path = Path(args.init_weights or weights_path(args.out_dir, args.init_name, args.dim))
        load_weights(model, read_weights(path), path, language_only=True)
        runtime.say(f"weights: {path}")
    model.to(runtime.device)
    vision_encoder.to(runtime.dtype)  # frozen, so it needs no float32 master copy
    if args.compile:
        compile_blocks(model)
    return model, VLMProcessor(tokenizer, image_processor, config)


def compile_blocks(model: MiniMindVLM) -> None:
    """Compile one block of each kind for all of them, once for any batch size and length; names of weights stay."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        raise UserError(
            "--compile needs a C++ compiler and there is none: install g++, or leave --compile out"
        )
    for block in (*model.layers, *model.vision_encoder.encoder.layers):
        block.compile(dynamic=True)


def set_trainable(model: MiniMindVLM, is_trainable: Callable[[str], bool]) -> list[Parameter]:
    """Freeze every parameter but those whose name `is_trainable` accepts; the vision encoder is frozen in any case."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("vision_encoder.") and is_trainable(name))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
