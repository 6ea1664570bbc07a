"""One call from flags to a model ready to answer: what eval_vlm.py and web_demo_vlm.py start with."""

import argparse
from pathlib import Path

import torch

from common.errors import UserError
from inference.quantize import quantize
from model.llava import load_transformers_directory
from model.LMConfig import LMConfig, VLMConfig
from model.model_vlm import MiniMindVLM
from model.processing import TOKENIZER_PATH, VLMProcessor, load_tokenizer
from model.vision import VISION_MODEL_PATH, load_vision_encoder
from model.weights import STAGES, load_weights, read_weights, weights_path


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    sizes = LMConfig()
    group = parser.add_argument_group("model")
    group.add_argument(
        "--load",
        type=int,
        default=0,
        choices=(0, 1),
        help="0: OUT_DIR/….pth; 1: a transformers directory",
    )
    group.add_argument(
        "--model_mode",
        type=int,
        default=1,
        choices=tuple(STAGES),
        help="0: pretrained, 1: SFT, 2: multi-image SFT",
    )
    group.add_argument("--out_dir", default="out", help="folder of the .pth weights")
    group.add_argument("--transformers_dir", default="MiniMind2-V", help="directory for --load 1")
    group.add_argument("--dim", type=int, default=sizes.dim, help="width of the language model")
    group.add_argument("--n_layers", type=int, default=sizes.n_layers, help="its layers")
    group.add_argument(
        "--max_seq_len",
        type=int,
        default=sizes.max_seq_len,
        help="most tokens of prompt and answer together",
    )
    group.add_argument("--tokenizer", default=TOKENIZER_PATH, help="tokenizer folder")
    group.add_argument("--vision_model", default=VISION_MODEL_PATH, help="CLIP folder")
    group.add_argument(
        "--weights", default="float32", choices=("float32", "float16", "int8"),
        help="format of the language model's weights; the smaller ones answer faster on a CPU, and need one",
    )  # fmt: skip
    group.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:0",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--temperature", type=float, default=0.65, help="0 takes the likeliest token"
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=0.85,
        help="sample from the likeliest tokens that hold this probability",
    )
    group.add_argument("--max_new_tokens", type=int, default=512, help="longest answer")


def load_vlm(args: argparse.Namespace) -> tuple[MiniMindVLM, VLMProcessor]:
    """The model that the flags of `add_model_flags` describe, in eval mode on its device, and its processor."""
    tokenizer_path = args.tokenizer
    if args.load == 1:
        folder = Path(args.transformers_dir)
        if (folder / "tokenizer.json").is_file():
            tokenizer_path = folder
        model, image_processor = load_transformers_directory(folder, args.vision_model)
        tokenizer = load_tokenizer(tokenizer_path)
    else:
        tokenizer = load_tokenizer(tokenizer_path)
        vision_encoder, image_processor = load_vision_encoder(args.vision_model)
        config = VLMConfig.for_vision_encoder(
            vision_encoder.config,
            dim=args.dim,
            n_layers=args.n_layers,
            max_seq_len=args.max_seq_len,
            vocab_size=len(tokenizer),
        )
        model = MiniMindVLM(config, vision_encoder)
        path = weights_path(args.out_dir, STAGES[args.model_mode], args.dim)
        load_weights(model, read_weights(path), path)
    if model.config.vocab_size not in (
        len(tokenizer),
        len(tokenizer) - 1,
    ):  # an exported tokenizer also holds <image>
        raise UserError(
            f"the model knows {model.config.vocab_size} tokens but the tokenizer {tokenizer_path} has {len(tokenizer)}"
        )
    if args.weights != "float32" and not args.device.startswith("cpu"):
        raise UserError(
            f"--weights {args.weights} is for the CPU, not for --device {args.device}: leave it out"
        )
    quantize(model, args.weights)
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {args.device} cannot be used ({str(error).splitlines()[0]}): pass --device cpu"
        ) from error
    return model.eval(), VLMProcessor(tokenizer, image_processor, model.config)
