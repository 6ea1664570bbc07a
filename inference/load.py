"""From a path to a model that answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.device import choose_device
from common.errors import UserError
from inference.chat import Chat
from inference.config import check_dtype
from inference.onnx_files import find_graphs
from inference.paths import ModelFiles, find_model_files
from inference.quantize import quantize
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, load_tokenizer
from model.vision import load_vision_encoder
from model.weights import PROJECTOR, build_with_weights, read_sizes, read_weights

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.image_processing_utils import BaseImageProcessor

    from inference.onnx_model import OnnxVLM

# Sizes of the vision encoder in the JSON beside a weights file.
VISION_SIZES = ("vision_dim", "n_image_tokens")


class VLM:
    """A model that is ready to answer; `load_vlm` makes it.

    Attributes:
        model: the network, in eval mode on its device; with the onnx backend an OnnxVLM.
        processor: turns questions and pictures into what the network takes.
        weights: the file or directory they were loaded from.
    """

    def __init__(self, model: MiniMindVLM | OnnxVLM, processor: VLMProcessor, weights: Path):
        self.model, self.processor, self.weights = model, processor, weights

    def ask(
        self,
        images: str | Path | Image | list | None,
        prompt: str,
        *,
        stream: bool = False,
        temperature: float = 0.65,
        top_p: float = 0.85,
        max_new_tokens: int = 512,
        seed: int | None = None,
    ) -> str | Iterator[str]:
        """Answer one question.

        Args:
            images: a picture or a list of them, each a path or a PIL image; None for text only.
            prompt: the question.
            stream: return an iterator of the answer's pieces, as they come, instead of a str.
            temperature: 0 takes the likeliest token; larger numbers give rarer ones a chance.
            top_p: probability that the tokens to choose from hold together.
            max_new_tokens: longest answer, in tokens.
            seed: the same one gives the same answer.

        BadSampleError for a picture that cannot be read, UserError for a prompt that is blank or
        too long.
        """
        # any number of pictures
        if images is None:
            images = []
        elif not isinstance(images, list | tuple):
            images = [images]
        # one question is a conversation of its own
        pieces = self.start_chat().ask(
            prompt,
            list(images),
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        return pieces if stream else "".join(pieces)

    def start_chat(self) -> Chat:
        """A new conversation, for questions that follow from one another."""
        return Chat(self.model, self.processor)


def load_vlm(
    weights: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vision_model: str | Path | None = None,
    dim: int | None = None,
    n_layers: int | None = None,
    max_seq_len: int | None = None,
    device: str | None = None,
    backend: str = "torch",
    dtype: str = "float32",
) -> VLM:
    """Load a trained model.

    >>> from inference import load_vlm
    >>> vlm = load_vlm("out/demo")
    >>> print(vlm.ask("cat.jpg", "What is this?"))

    Sizes, tokenizer and vision encoder come from the JSON that training leaves beside the weights.
    Published files have none: their sizes are read off the tensors, and the other parts come from
    model/minimind_tokenizer and model/vision_model. What is passed here comes first.

    Args:
        weights: a .pth file, a folder of them (SFT weights are preferred), or a transformers
            directory.
        tokenizer: folder of the tokenizer.
        vision_model: folder of the vision encoder.
        dim: width of the language model; it has to be that of the weights.
        n_layers: number of transformer layers, likewise.
        max_seq_len: most tokens of prompt and answer together.
        device: cpu, cuda, cuda:1, mps, xpu; a GPU if there is one, if not given.
        backend: what runs the model: torch, or onnx (onnxruntime), which is the fastest on a CPU
            and needs the folder that `python -m scripts.export MODEL --to onnx` writes.
        dtype: number format of the language model's weights: float32, float16 or int8, with onnx
            float32, int8 or int4. The small ones answer faster, on a CPU.

    MissingFileError where a file is missing, UserError where parts do not fit together.
    """
    # files, before anything is loaded
    check_dtype(backend, dtype)
    files = find_model_files(weights, tokenizer, vision_model, dim)
    device = choose_device("cpu" if backend == "onnx" and device is None else device)
    for flag, value, default in (("dtype", dtype, "float32"), ("backend", backend, "torch")):
        if value != default and device.type != "cpu":
            raise UserError(
                f"--{flag} {value} is for the CPU, not for {device}: leave it out or pass "
                "--device cpu"
            )

    # the network
    tokenizer = load_tokenizer(files.tokenizer)
    load = load_directory if files.weights.is_dir() else load_file
    if backend == "onnx":
        load = partial(load_graphs, dtype=dtype)
    model, image_processor = load(files, len(tokenizer), dim, n_layers, max_seq_len)

    # its dtype and its device
    if backend == "torch":
        quantize(model, dtype)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {device} cannot be used ({reason}): pass --device cpu"
        ) from error
    processor = VLMProcessor(tokenizer, image_processor, model.config)
    return VLM(model.eval(), processor, files.weights)


def load_file(
    files: ModelFiles,
    vocab_size: int,
    dim: int | None,
    n_layers: int | None,
    max_seq_len: int | None,
) -> tuple[MiniMindVLM, BaseImageProcessor]:
    """The network of a .pth file, and its image processor.

    Args:
        files: where the file lies, and what the JSON beside it says.
        vocab_size: number of tokens of the tokenizer.
        dim: see `load_vlm`, like the others.
    """
    # sizes
    path, weights = files.weights, read_weights(files.weights)
    sizes = read_sizes(weights, path)
    check_eyes(weights, path)
    sizes |= files.info.get("config", {})
    check_size("dim", dim, sizes["dim"], path)
    check_size("n_layers", n_layers, sizes["n_layers"], path)

    # Tokenizer and vision encoder give theirs, which `load_weights` compares with the file's.
    vision_encoder, image_processor = load_vision_encoder(files.vision_model)
    sizes = {name: size for name, size in sizes.items() if name not in VISION_SIZES}
    sizes["vocab_size"] = vocab_size
    if max_seq_len is not None:
        sizes["max_seq_len"] = max_seq_len
    config = VLMConfig.for_vision_encoder(vision_encoder, **sizes)
    return build_with_weights(config, vision_encoder, weights, path), image_processor


def load_directory(
    files: ModelFiles,
    vocab_size: int,
    dim: int | None,
    n_layers: int | None,
    max_seq_len: int | None,
) -> tuple[MiniMindVLM, BaseImageProcessor]:
    """The same for a transformers directory."""
    from model.llava import load_transformers_directory

    model, image_processor = load_transformers_directory(
        files.weights, files.vision_model, max_seq_len
    )
    check_directory(model.config, files, vocab_size, dim, n_layers)
    return model, image_processor


def load_graphs(
    files: ModelFiles,
    vocab_size: int,
    dim: int | None,
    n_layers: int | None,
    max_seq_len: int | None,
    *,
    dtype: str,
) -> tuple[OnnxVLM, BaseImageProcessor]:
    """The same for the graphs in an exported folder."""
    folder = files.weights
    find_graphs(folder, dtype)
    from inference.onnx_model import OnnxVLM
    from model.llava import read_directory_config

    config, image_processor = read_directory_config(folder)
    check_directory(config, files, vocab_size, dim, n_layers)
    # The graph has the angles of so many positions.
    if max_seq_len is not None and max_seq_len > config.max_seq_len:
        raise UserError(
            f"--max_seq_len is {max_seq_len} but {folder} was exported for "
            f"{config.max_seq_len}: pass at most that"
        )
    config.max_seq_len = max_seq_len or config.max_seq_len
    return OnnxVLM(config, folder, dtype), image_processor


def check_directory(
    config: VLMConfig, files: ModelFiles, vocab_size: int, dim: int | None, n_layers: int | None
) -> None:
    """UserError where a directory has other sizes than the user says or the tokenizer has."""
    check_size("dim", dim, config.dim, files.weights)
    check_size("n_layers", n_layers, config.n_layers, files.weights)
    # An exported tokenizer also holds <image>.
    if config.vocab_size not in (vocab_size, vocab_size - 1):
        raise UserError(
            f"{files.weights} knows {config.vocab_size} tokens but the tokenizer "
            f"{files.tokenizer} has {vocab_size}: pass the --tokenizer it was trained with"
        )


def check_eyes(weights: Iterable[str], path: Path) -> None:
    """UserError where the names of the weights are those of a language model alone."""
    if not any(name.startswith(PROJECTOR) for name in weights):
        raise UserError(
            f"{path} is a language model that has not learned to see: train it with "
            "train_pretrain_vlm.py, or pass weights that came out of training"
        )


def check_size(name: str, given: int | None, actual: int, path: Path) -> None:
    """UserError where the user gives another size than the file has."""
    if given is not None and given != actual:
        raise UserError(f"--{name} is {given} but {path} has {name} {actual}: leave --{name} out")
