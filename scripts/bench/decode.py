"""Decoding speed: the published loop and ours, on the prompt of one image."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch

from inference.quantize import quantize
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from scripts.bench.published.decode import decode as decode_as_published
from scripts.download.items import LAYERS

# Of the published question about one picture.
PROMPT_TOKENS = 238
NEW_TOKENS = 128
REPEATS = 3
RECIPES = {
    "published": "float32",
    "ours, float32": "float32",
    "ours, float16": "float16",
    "ours, int8": "int8",
}
WEIGHT_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def measure(args: Namespace) -> list[dict]:
    """Rows of recipe, dim, tokens_per_second, seconds_to_first_token, bytes_per_second.

    The vision encoder's time is not in them.
    """
    bandwidth, rows = read_bandwidth(args.device), []
    print(f"memory: {bandwidth / 1e9:.1f} GB/s are read at best")
    print(
        f"{'recipe':16}{'dim':>5}{'tokens/s':>10}{'first token':>13}{'weights read':>14}"
        f"{'of the best':>13}"
    )
    for dim in args.dims:
        # the prompt
        config = VLMConfig(dim=dim, n_layers=LAYERS[dim])
        input_ids = torch.arange(100, 100 + PROMPT_TOKENS, device=args.device)[None]
        input_ids[:, 20 : 20 + config.n_image_tokens] = config.image_token_id
        features = torch.randn(1, config.n_image_tokens, config.vision_dim, device=args.device)
        for recipe, dtype in RECIPES.items():
            # Quantized weights are for CPUs.
            if args.device != "cpu" and dtype != "float32":
                continue

            # measure
            torch.manual_seed(0)
            model = MiniMindVLM(config).eval()
            quantize(model, dtype)
            decode = decode_as_published if recipe == "published" else decode_as_ours
            rate, first = clock(decode, model.to(args.device), input_ids, features)
            bytes_per_second = rate * count_weights_read(model) * WEIGHT_BYTES[dtype]

            # show
            rows.append(
                {
                    "recipe": recipe,
                    "dim": dim,
                    "weights": dtype,
                    "tokens_per_second": rate,
                    "seconds_to_first_token": first,
                    "bytes_per_second": bytes_per_second,
                    "memory_bytes_per_second": bandwidth,
                }
            )
            print(
                f"{recipe:16}{dim:5}{rate:10.1f}{first:11.2f} s{bytes_per_second / 1e9:9.1f} GB/s"
                f"{100 * bytes_per_second / bandwidth:11.0f} %",
                flush=True,
            )
    return rows


def decode_as_ours(
    model: MiniMindVLM, input_ids: torch.Tensor, image_features: torch.Tensor, n_new: int
) -> Iterator[torch.Tensor]:
    """As `decode` of published/decode.py; no token is the end of the answer."""
    return model.generate(
        input_ids, image_features=image_features, max_new_tokens=n_new, eos_token_id=-1, stream=True
    )


def clock(
    decode: Callable[..., Iterator],
    model: MiniMindVLM,
    input_ids: torch.Tensor,
    features: torch.Tensor,
) -> tuple[float, float]:
    """(tokens/s after the first, seconds to the first), medians.

    Args:
        decode: one of the loops.
        model: on the device.
        input_ids: int64[1, PROMPT_TOKENS].
        features: float[1, patches, vision_dim].
    """
    rates, firsts = [], []
    for _ in range(REPEATS + 1):
        times = [time.perf_counter()]
        for _ in decode(model, input_ids, features, NEW_TOKENS):
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        firsts.append(times[1] - times[0])
        rates.append((len(times) - 2) / (times[-1] - times[1]))
    # The first round warms up.
    return statistics.median(rates[1:]), statistics.median(firsts[1:])


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


def count_weights_read(model: MiniMindVLM) -> int:
    """Number of weights that every token reads: those of the layers and of the head."""
    parts = [*model.layers.modules(), model.output]
    names = ("weight", "quantized")
    tensors = [getattr(part, name) for part in parts for name in names if hasattr(part, name)]
    return sum(tensor.numel() for tensor in tensors)
