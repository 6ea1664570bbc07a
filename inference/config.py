"""What eval_vlm.py, web_demo_vlm.py and the server can be told, explained in one place."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.errors import UserError
from common.flags import NO_MOE, PublishedFlag, check_options, option
from model.files import OUT_DIR, TOKENIZER_PATH, VISION_MODEL_PATH

# Of the language model's weights, by what runs it.
DTYPES = {"torch": ("float32", "float16", "int8"), "onnx": ("float32", "int8", "int4")}
# Of a picture that is sent to the web page.
MAX_UPLOAD_MB = 20


@dataclass(frozen=True)
class AskConfig:
    """Which model is asked, and how it answers; each field is a flag of all three."""

    published: ClassVar[tuple[PublishedFlag, ...]] = (
        PublishedFlag(("--stream",), "not needed: answers are always shown as they come"),
        PublishedFlag(("--lora_name",), "not needed: it had no effect there either"),
        NO_MOE,
    )

    # Which model: the sizes that are not given are read off the weights.
    weights: str | None = option(
        None,
        "the model: a .pth file, a folder of them, or a transformers directory; if not given, "
        "--load, --out_dir and --model_mode name it",
        group="model",
    )
    load: Literal[0, 1] = option(
        0, "0: the file OUT_DIR/NAME_DIM.pth; 1: the directory --transformers_dir"
    )
    model_mode: Literal[0, 1, 2] = option(
        1, "NAME of that file; 0: pretrain_vlm, 1: sft_vlm, 2: sft_vlm_multi (several images)"
    )
    out_dir: str = option(OUT_DIR, "folder of that file")
    transformers_dir: str = option("MiniMind2-V", "directory that --load 1 reads")
    dim: int | None = option(
        None, "width of the language model; read off the weights if not given", least=2, most=16_384
    )
    n_layers: int | None = option(
        None, "number of transformer layers; read off the weights if not given", least=1, most=256
    )
    max_seq_len: int | None = option(
        None,
        "most tokens of prompt and answer together, 196 for each image; that of the model if not "
        "given",
        least=1,
        most=131_072,
    )
    tokenizer: str | None = option(
        None,
        "folder of the tokenizer; if not given, the one the model was trained with, or "
        f"{TOKENIZER_PATH}",
    )
    vision_model: str | None = option(
        None,
        "folder of the vision encoder; if not given, the one the model was trained with, or "
        f"{VISION_MODEL_PATH}",
    )
    backend: Literal["torch", "onnx"] = option(
        "torch",
        "what runs the model; onnx: onnxruntime, fastest on a CPU, for the folder that `python -m "
        "scripts.export MODEL --to onnx` writes",
    )
    dtype: Literal["float32", "float16", "int8", "int4"] = option(
        "float32",
        "number format of the language model's weights; the small ones answer faster, on a CPU "
        "(float16 only with --backend torch, int4 only with onnx)",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:1, mps, xpu; a GPU if there is one, if not given"
    )

    # How it answers.
    temperature: float = option(
        0.65,
        "0 takes the likeliest token; larger numbers give rarer ones a chance",
        least=0,
        most=100,
        group="answers",
    )
    top_p: float = option(
        0.85,
        "choose from the likeliest tokens that hold this probability together; 1 takes all",
        least=0,
        most=1,
    )
    max_new_tokens: int = option(512, "longest answer, in tokens", least=1, most=131_072)

    def __post_init__(self):
        check_options(self)
        check_dtype(self.backend, self.dtype)
        if self.top_p == 0:
            raise UserError(f"--top_p is {self.top_p}: it has to be above 0 and at most 1")

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of `generate`."""
        names = ("temperature", "top_p", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EvalConfig(AskConfig):
    """Options of eval_vlm.py."""

    published: ClassVar[tuple[PublishedFlag, ...]] = (
        PublishedFlag(
            ("--use_multi",),
            "use --model_mode 2 for several pictures in a question",
            sets={"1": {}, "2": {"model_mode": 2}},
        ),
        *AskConfig.published,
    )

    # What --data changes; the other options are those of AskConfig.
    temperature: float | None = option(
        None,
        "0 takes the likeliest token, larger numbers give rarer ones a chance; if not given, 0.65, "
        "and 0 with --data, where the same command then always measures the same",
        least=0,
        most=100,
        group="answers",
    )
    max_new_tokens: int = option(
        512,
        "longest answer, in tokens; with --data an answer also ends where it is twice as long as "
        "the right one",
        least=1,
        most=131_072,
    )

    image: list[str] = option([], "pictures to ask about, all in one question", group="what to ask")
    prompt: str | None = option(
        None,
        "the question; if not given, the one that opens most rows of the model's training data, "
        "or a request for a description, in Chinese; with --data it asks for captions",
    )
    chat: bool = option(
        False, "type questions; /image FILE adds a picture, /new starts anew, /exit ends"
    )
    images_dir: str | None = option(
        None,
        "ask about each picture of this folder (dataset/eval_images if not given), or with "
        "--model_mode 2 about each folder of pictures in it (dataset/eval_multi_images)",
    )
    attention: str | None = option(
        None,
        "draw to this .png what the model looked at for each word of its answers, and which "
        "patches a word depends on: for that it sees each picture again for each of its patches",
    )
    data: list[str] = option(
        [],
        "rows with known answers, in any format of docs/data.md: measures loss and exact answers",
        group="what to measure",
    )
    images_path: list[str] = option(
        [],
        "folder or .zip of the images that --data names: one for all files, or one for each",
        aliases=("--images",),
    )
    show_images: list[Literal["right", "wrong", "none"]] = option(
        [],
        "ask each question of --data with its images, with those of another row, or with none; "
        "several are measured in one go (right if not given, and all three with --metrics)",
    )
    metrics: bool = option(
        False,
        "measure more of --data: perplexity, and for captions BLEU-4, ROUGE-L and CIDEr-D, each "
        "with its 95 % interval; --save_report then adds NAME.md and a page of answers, NAME.html",
    )
    batch_size: int = option(
        32, "questions of --data that are answered together", least=1, most=4096
    )
    save_report: str | None = option(
        None,
        "write scores and answers of --data to this JSON file, and until it is whole each answer "
        "to NAME.answers.jsonl beside it; no file if not given",
    )

    def __post_init__(self):
        super().__post_init__()
        # flags that would have no effect
        if self.metrics and not self.data:
            raise UserError("--metrics measures answers to --data: pass --data, or leave it out")
        if self.data and self.chat:
            raise UserError("--data measures answers and --chat asks for questions: leave one out")
        if self.attention is not None and self.backend != "torch":
            raise UserError(
                "--attention looks into the network: leave it out, or pass --backend torch"
            )
        if self.attention is not None and (self.data or self.chat):
            other = "--data" if self.data else "--chat"
            raise UserError(f"--attention draws answers about --image: leave it or {other} out")

        # files that are written when all the work is done
        if self.attention is not None:
            check_output("attention", self.attention, ".png", self.image)
        if self.save_report:
            check_output("save_report", self.save_report, ".json", self.data)

    @property
    def shown(self) -> list[str]:
        """The choices of images, each once."""
        default = ["right", "wrong", "none"] if self.metrics else ["right"]
        return list(dict.fromkeys(self.show_images or default))

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of `generate`."""
        default = 0.0 if self.data else AskConfig.temperature
        given = self.temperature
        return super().sampling | {"temperature": default if given is None else given}


def check_dtype(backend: str, dtype: str) -> None:
    """UserError for a backend that there is not, or a dtype that it has not."""
    if backend not in DTYPES:
        raise UserError(f"--backend is {backend}: choose from {', '.join(DTYPES)}")
    if dtype not in DTYPES[backend]:
        raise UserError(
            f"--dtype is {dtype}: with --backend {backend} choose from {', '.join(DTYPES[backend])}"
        )


def check_output(flag: str, name: str, suffix: str, inputs: list[str]) -> None:
    """UserError where a file cannot be written, or would take the place of one that is read.

    Args:
        flag: that names the file.
        name: of the file.
        suffix: of what is written.
        inputs: the files that are read.
    """
    path = Path(name)
    if path.suffix.lower() != suffix:
        raise UserError(f"--{flag} is {name}: it becomes a {suffix} file, so name it NAME{suffix}")
    if path.is_dir():
        raise UserError(f"--{flag} is {name}, which is a folder: name a file")
    if path.resolve() in (Path(file).resolve() for file in inputs):
        raise UserError(f"--{flag} is {name}, which is read too: give it another name")
    # the folder is made if it is missing, in the first one that is there
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--{flag} is {name}: nothing can be written in {folder}")


@dataclass(frozen=True)
class WebConfig(AskConfig):
    """Options of web_demo_vlm.py; the page begins with these for an answer, and can change them."""

    # What the demo's model changes; the other options are those of AskConfig.
    temperature: float | None = option(
        None,
        "0 takes the likeliest token, larger numbers give rarer ones a chance; if not given, 0.65, "
        "and 0 for the demo's model, which then answers as it was tested",
        least=0,
        most=100,
        group="answers",
    )

    port: int = option(8000, "port of the page", least=1, most=65_535, group="page")
    host: str = option(
        "localhost",
        "address that the page listens on; with any other than localhost, everybody who can reach "
        "this machine can use the page",
    )
    examples: list[str] = option(
        [],
        "rows with known answers, in any format of docs/data.md: the page offers those that the "
        "model answers exactly right; if not given, drawn shapes for the demo's model",
    )
    examples_images: list[str] = option(
        [], "folder or .zip of the images that --examples names: one for all files, or one for each"
    )
