"""Ask a GGUF model about pictures: llama.cpp, started the way that suits these models.

python -m scripts.export.ask_gguf exported/gguf photo.jpg "What is this?"

llama.cpp fills up a picture to a square with gray, while CLIP cuts out its middle and SigLIP
stretches it. That is done here, before llama.cpp gets it.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from common.errors import MissingFileError, UserError, run_command
from common.flags import check_options, option, parse_flags
from common.numbers import check_number
from common.packages import check_packages
from model.image import load_image

# Of the language model, as in the names of files; the names are llama.cpp's.
Precision = Literal["F16", "Q8_0", "Q4_0"]
# Pixels of a side of the pictures that a vision encoder takes at most.
LARGEST_SIDE = 4096


@dataclass(frozen=True)
class AskGgufConfig:
    """Options of `python -m scripts.export.ask_gguf`."""

    folder: str = option("", "folder of the .gguf files", group="a question", positional=True)
    image: str = option("", "a picture", positional=True)
    prompt: str = option("", "the question", positional=True)
    precision: Precision = option("F16", "of the language model")
    max_new_tokens: int = option(512, "longest answer, in tokens", least=1, most=100_000)
    temperature: float = option(
        0.0, "0 takes the likeliest token, larger numbers give rarer ones a chance", least=0
    )
    n_threads: int = option(1, "threads that compute", least=1, most=256)

    def __post_init__(self):
        check_options(self)


class LlamaCpp:
    """llama.cpp's server, in this process, with one model.

    Args:
        folder: of the files that `python -m scripts.export --to gguf` wrote.
        precision: of the language model, a part of its file's name.
        n_threads: that compute.

    Attributes:
        image_size: pixels of a side of the squares that the vision encoder takes.
        is_clip: whether it is a CLIP; else it is a SigLIP.
        address: where llama.cpp's own HTTP server listens, on this machine only.
    """

    def __init__(self, folder: str | Path, precision: str = "F16", n_threads: int = 1):
        import xllamacpp

        # the two files
        language_model, vision_encoder = find_files(Path(folder), precision)
        self.image_size, self.is_clip = read_picture_kind(vision_encoder)

        # one answer at a time; the cache in 32 bits, as here
        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = str(language_model), str(vision_encoder)
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # nothing is logged, no page is served, no earlier prompt is looked up
        params.verbosity, params.ui, params.warmup = 0, False, False
        params.cache_ram_mib = 0
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise UserError(
                f"llama.cpp cannot load {language_model.name} with {vision_encoder.name} in "
                f"{language_model.parent}: export them again"
            ) from error
        self.address = self.server.listening_address

    def ask(self, images: list, prompt: str, **options) -> str:
        """The answer to a question about pictures, see `complete`."""
        return self.complete(images, prompt, **options)["message"]["content"]

    def complete(
        self,
        images: list,
        prompt: str,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        **more,
    ) -> dict:
        """The answer as llama.cpp gives it: message, finish_reason and, if asked for, logprobs.

        Args:
            images: pictures, or what `load_image` takes.
            prompt: the question.
            temperature: 0 takes the likeliest token.
            max_new_tokens: longest answer, in tokens.
            more: goes to llama.cpp as it is.

        UserError with llama.cpp's reason where it gives no answer.
        """
        squares = [
            make_square(load_image(image), self.image_size, self.is_clip) for image in images
        ]
        urls = [to_data_url(square) for square in squares]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": prompt})
        request = {
            "messages": [{"role": "user", "content": content}],
            "temperature": temperature,
            "max_tokens": max_new_tokens,
        }
        answer = self.server.handle_chat_completions(request | more)
        if "choices" not in answer:
            reason = answer.get("error", {}).get("message", answer)
            raise UserError(f"llama.cpp gives no answer: {reason!s:.200}")
        return answer["choices"][0]


def find_files(folder: Path, precision: str) -> tuple[Path, Path]:
    """(language model, vision encoder) in a folder of GGUF files, or in its gguf/."""
    for place in (folder, folder / "gguf"):
        vision_encoders = sorted(place.glob("mmproj-*.gguf"))
        models = sorted(set(place.glob(f"*-{precision}.gguf")) - set(vision_encoders))
        if models and vision_encoders:
            return models[0], vision_encoders[0]
    raise MissingFileError(
        f"no *-{precision}.gguf beside an mmproj-*.gguf in {folder}: write them with "
        "`python -m scripts.export MODEL --to gguf`"
    )


def read_picture_kind(path: Path) -> tuple[int, bool]:
    """(pixels of a side, whether it is a CLIP) of an mmproj file; UserError for any other file."""
    import gguf

    # The reader checks little of what it reads.
    try:
        reader = gguf.GGUFReader(path)
        side = int(reader.get_field(gguf.Keys.ClipVision.IMAGE_SIZE).contents())
        is_clip = any(tensor.name == "v.pre_ln.weight" for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is no mmproj file ({error!s:.80}): export it again") from error
    check_number(f"the image_size in {path.name}", side, 1, LARGEST_SIDE)
    return side, is_clip


def make_square(image: Image.Image, side: int, is_clip: bool) -> Image.Image:
    """A picture as CLIP or SigLIP sees it, `side` pixels wide and high."""
    if not is_clip:
        return image.resize((side, side), Image.Resampling.BICUBIC)
    # scale the shorter side, then cut off what sticks out of the longer one
    shorter = min(image.size)
    width, height = (side * length // shorter for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + side, top + side))


def to_data_url(image: Image.Image) -> str:
    """The picture as a PNG in a data: URL, as the OpenAI interface takes it."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def main() -> None:
    config = parse_flags(AskGgufConfig(), __doc__)
    if not config.prompt.strip():
        raise UserError('which question? pass a folder, a picture and "a question"')
    check_packages("requirements-export.txt", "gguf", "xllamacpp")
    find_files(Path(config.folder), config.precision)
    image = load_image(config.image)
    model = LlamaCpp(config.folder, config.precision, config.n_threads)
    options = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    print(model.ask([image], config.prompt, **options))


if __name__ == "__main__":
    run_command(main)
