"""Decoding speed: the published loop, ours, ours on onnxruntime, and llama.cpp.

The prompt is that of one image. Rounds are interleaved: what slows the machine slows all recipes.
"""

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args
from urllib.request import Request, urlopen

import torch

from common.packages import check_packages
from inference.quantize import quantize
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from scripts.bench.published.decode import decode as decode_as_published
from scripts.bench.runs import WORK
from scripts.download.items import LAYERS
from scripts.export.ask_gguf import LlamaCpp, Precision, find_files

# Of the published question about one picture.
PROMPT_TOKENS = 238
NEW_TOKENS = 128
REPEATS = 3
# The first round warms up.
N_ROUNDS = REPEATS + 1
SECONDS = 600  # that an answer may take
# Bytes of a weight, with its share of a scale.
WEIGHT_BYTES = {
    **{"float32": 4, "float16": 2, "int8": 1, "int4": 4 / 8 + 4 / 32},
    **{"F16": 2, "Q8_0": 1 + 2 / 32, "Q4_0": 4 / 8 + 2 / 32},
}


class Recipe(NamedTuple):
    """A way to decode.

    Args:
        weights: their dtype.
        clock: one answer -> (tokens/s after the first, seconds to the first).
    """

    weights: str
    clock: Callable[[], tuple[float, float]]


def measure(args: Namespace) -> list[dict]:
    """Rows of recipe, dim, tokens_per_second, seconds_to_first_token, bytes_per_second: medians.

    The vision encoder's time is not in them.
    """
    bandwidth, rows = read_bandwidth(args.device), []
    print(f"memory: {bandwidth / 1e9:.1f} GB/s are read at best")
    print(
        f"{'recipe':21}{'dim':>5}{'tokens/s':>10}{'first token':>13}{'weights read':>14}"
        f"{'of the best':>13}"
    )
    for dim in args.dims:
        # measure
        recipes = open_recipes(args, VLMConfig(dim=dim, n_layers=LAYERS[dim]))
        clocked = {name: [] for name in recipes}
        for _ in range(N_ROUNDS):
            for name, recipe in recipes.items():
                clocked[name].append(recipe.clock())

        # show
        n_weights = count_weights_read(VLMConfig(dim=dim, n_layers=LAYERS[dim]))
        for name, recipe in recipes.items():
            rate, first = map(statistics.median, zip(*clocked[name][1:]))
            bytes_per_second = rate * n_weights * WEIGHT_BYTES[recipe.weights]
            rows.append(
                {
                    "recipe": name,
                    "dim": dim,
                    "weights": recipe.weights,
                    "tokens_per_second": rate,
                    "seconds_to_first_token": first,
                    "bytes_per_second": bytes_per_second,
                    "memory_bytes_per_second": bandwidth,
                }
            )
            print(
                f"{name:21}{dim:5}{rate:10.1f}{first:11.2f} s{bytes_per_second / 1e9:9.1f} GB/s"
                f"{100 * bytes_per_second / bandwidth:11.0f} %",
                flush=True,
            )
    return rows


def open_recipes(args: Namespace, config: VLMConfig) -> dict[str, Recipe]:
    """All ways to decode that there are on the device, each with a model of its own."""
    # the prompt
    torch.manual_seed(0)
    input_ids = torch.arange(100, 100 + PROMPT_TOKENS, device=args.device)[None]
    input_ids[:, 20 : 20 + config.n_image_tokens] = config.image_token_id
    features = torch.randn(1, config.n_image_tokens, config.vision_dim, device=args.device)

    # ours; quantized weights are for CPUs
    recipes = {}
    is_cpu = args.device == "cpu"
    for dtype in ("float32", "float16", "int8") if is_cpu else ("float32",):
        model = MiniMindVLM(config).eval()
        quantize(model, dtype)
        model.to(args.device)
        if dtype == "float32":
            clock_it = partial(clock, decode_as_published, model, input_ids, features)
            recipes["published"] = Recipe(dtype, clock_it)
        clock_it = partial(clock, decode_as_ours, model, input_ids, features)
        recipes[f"ours, {dtype}"] = Recipe(dtype, clock_it)
    if not is_cpu:
        return recipes

    # the same as graphs, whose features are projected already
    patches = torch.randn(1, config.n_image_tokens, config.dim)
    for dtype, model in open_graphs(config):
        clock_it = partial(clock, decode_as_ours, model, input_ids, patches)
        recipes[f"onnxruntime, {dtype}"] = Recipe(dtype, clock_it)

    # llama.cpp
    for precision in find_precisions(args.gguf, config.dim) if args.gguf else ():
        clock_it = partial(clock_llama_cpp, args.gguf, precision)
        recipes[f"llama.cpp, {precision}"] = Recipe(precision, clock_it)
    return recipes


def open_graphs(config: VLMConfig) -> Iterator[tuple[str, torch.nn.Module]]:
    """(dtype, model that onnxruntime runs) of a random model, for each dtype."""
    check_packages("requirements-export.txt", "onnx", "onnxscript", "onnxruntime")
    import onnx

    from inference.onnx_files import DECODER_NAMES, EMBEDDINGS_NAME, VISION_NAME
    from inference.onnx_model import OnnxVLM
    from scripts.export.onnx_decoder import build_decoder
    from scripts.export.onnx_graphs import build_embeddings

    model, folder = MiniMindVLM(config).eval(), WORK / f"decode_{config.dim}"
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    # It has to be there, but no picture is shown to it.
    (folder / "onnx" / VISION_NAME).touch()
    onnx.save(build_embeddings(model), folder / "onnx" / EMBEDDINGS_NAME)
    for dtype, name in DECODER_NAMES.items():
        onnx.save(build_decoder(model, dtype), folder / "onnx" / name)
        yield dtype, OnnxVLM(config, folder, dtype)


def find_precisions(folder: Path, dim: int) -> list[str]:
    """Those of a folder of GGUF files; none if its language model is not as wide as `dim`."""
    check_packages("requirements-export.txt", "gguf", "xllamacpp")
    import gguf

    precisions = get_args(Precision)
    language_model, _ = find_files(folder, precisions[0])
    width = gguf.GGUFReader(language_model).get_field("llama.embedding_length").contents()
    return list(precisions) if width == dim else []


def decode_as_ours(
    model: torch.nn.Module, input_ids: torch.Tensor, image_features: torch.Tensor, n_new: int
) -> Iterator[torch.Tensor]:
    """As `decode` of published/decode.py; no token is the end of the answer."""
    return model.generate(
        input_ids, image_features=image_features, max_new_tokens=n_new, eos_token_id=-1, stream=True
    )


def clock(
    decode: Callable[..., Iterator],
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    features: torch.Tensor,
) -> tuple[float, float]:
    """(tokens/s after the first, seconds to the first) of one answer.

    Args:
        decode: one of the loops.
        model: on the device.
        input_ids: int64[1, PROMPT_TOKENS].
        features: float[1, patches, width] that `model` takes.
    """
    times = [time.perf_counter()]
    for _ in decode(model, input_ids, features, NEW_TOKENS):
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return (len(times) - 2) / (times[-1] - times[1]), times[1] - times[0]


def clock_llama_cpp(folder: Path, precision: str) -> tuple[float, float]:
    """The same of llama.cpp, by its own clock; see `LlamaCpp` for folder and precision."""
    model = LlamaCpp(folder, precision, torch.get_num_threads())
    question = {
        # any tokens; nothing ends the answer earlier
        "prompt": [100 + n % 500 for n in range(PROMPT_TOKENS)],
        "n_predict": NEW_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
    }
    request = Request(f"{model.address}/completion", json.dumps(question).encode())
    with urlopen(request, timeout=SECONDS) as response:
        times = json.load(response)["timings"]
    return times["predicted_per_second"], times["prompt_ms"] / 1000


def read_bandwidth(device: str) -> float:
    """Bytes/s at which the device reads: the best of some sums over 256 MB."""
    x, best = torch.ones(64 * 2**20, device=device), float("inf")
    for _ in range(6):
        start = time.perf_counter()
        x.sum()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return x.numel() * x.element_size() / best


def count_weights_read(config: VLMConfig) -> int:
    """Number of weights that every token reads: those of the layers and of the head."""
    with torch.device("meta"):
        model = MiniMindVLM(config)
    return sum(
        weight.numel() for part in (model.layers, model.output) for weight in part.parameters()
    )
