"""Decoding speed: the published loop in our own words, and ours, on one image's prompt."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

import torch
import torch.nn.functional as F

from inference.quantize import quantize
from model.LMConfig import VLMConfig
from model.model_lm import apply_rope
from model.model_vlm import MiniMindVLM
from scripts.download.items import LAYERS

PROMPT_TOKENS = 238  # the published question about one picture
NEW_TOKENS = 128
REPEATS = 3
RECIPES = {
    "published": "float32",
    "ours, float32": "float32",
    "ours, float16": "float16",
    "ours, int8": "int8",
}  # -> weights


def repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """float[B, S, n_kv_heads, head_dim] -> float[B, S, n_heads, head_dim], copied."""
    return x[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)


def published_layer(layer, hidden, rope, past, times: int):
    """A block as published: keys and values grow by concatenation and are repeated for every query head."""
    attention, x = layer.attention, layer.attention_norm(hidden)
    queries, keys, values = (
        linear(x).unflatten(-1, (-1, attention.head_dim))
        for linear in (attention.wq, attention.wk, attention.wv)
    )
    queries, keys = apply_rope(queries, rope), apply_rope(keys, rope)
    if past is not None:
        keys, values = torch.cat((past[0], keys), dim=1), torch.cat((past[1], values), dim=1)
    q, k, v = (
        t.transpose(1, 2) for t in (queries, repeat_heads(keys, times), repeat_heads(values, times))
    )
    if x.shape[1] > 1:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mixed = (q @ k.transpose(-2, -1) / attention.head_dim**0.5).softmax(-1) @ v
    hidden = hidden + attention.wo(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.feed_forward(layer.ffn_norm(hidden)), (keys, values)


@torch.inference_mode()
def published_steps(
    model: MiniMindVLM, input_ids: torch.Tensor, image_features: torch.Tensor, n_new: int
) -> Iterator[int]:
    """The published loop: logits at every position, a divided copy of those of words used, a full sort, a host round trip."""
    config, pasts, hidden, start = (
        model.config,
        [None] * model.config.n_layers,
        model.embed(input_ids, None, image_features),
        0,
    )
    for _ in range(n_new):
        rope = model.rope[start : start + hidden.shape[1]]
        for index, layer in enumerate(model.layers):
            hidden, pasts[index] = published_layer(
                layer, hidden, rope, pasts[index], config.n_heads // config.n_kv_heads
            )
        logits = model.output(model.norm(hidden))[:, -1]
        logits[:, list(set(input_ids.tolist()[0]))] /= 1.0
        logits /= 0.65
        ranked, order = logits.sort(descending=True, dim=-1)
        outside = ranked.softmax(-1).cumsum(-1) > 0.85
        outside[:, 1:], outside[:, 0] = outside[:, :-1].clone(), False
        logits[outside.scatter(1, order, outside)] = -torch.inf
        token = torch.multinomial(logits.softmax(-1), num_samples=1)
        start, input_ids = input_ids.shape[1], torch.cat((input_ids, token), dim=1)
        yield token.item()
        hidden = model.tok_embeddings(token)


def our_steps(
    model: MiniMindVLM, input_ids: torch.Tensor, image_features: torch.Tensor, n_new: int
) -> Iterator:
    return model.generate(
        input_ids, image_features=image_features, max_new_tokens=n_new, eos_token_id=-1, stream=True
    )


def clock(
    steps: Callable[..., Iterator],
    model: MiniMindVLM,
    input_ids: torch.Tensor,
    features: torch.Tensor,
):
    """(tokens/s after the first, seconds to the first), medians."""
    rates, firsts = [], []
    for _ in range(REPEATS + 1):
        times = [time.perf_counter()]
        for _ in steps(model, input_ids, features, NEW_TOKENS):
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        firsts.append(times[1] - times[0])
        rates.append((len(times) - 2) / (times[-1] - times[1]))
    return statistics.median(rates[1:]), statistics.median(firsts[1:])  # the first round warms up


def memory_bandwidth(device: str) -> float:
    """Bytes/s at which the device reads: the best of some sums over 256 MB."""
    x, best = torch.ones(64 * 2**20, device=device), 1e9
    for _ in range(6):
        start = time.perf_counter()
        x.sum()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return x.numel() * x.element_size() / best


def build_model(dim: int, form: str) -> MiniMindVLM:
    torch.manual_seed(0)
    model = MiniMindVLM(VLMConfig(dim=dim, n_layers=LAYERS[dim])).eval()
    quantize(model, form)
    return model


def count_weights(model: MiniMindVLM) -> int:
    """Weights that every token reads: the layers and the head."""
    names = ("weight", "compact")
    modules = [*model.layers.modules(), model.output]
    return sum(
        getattr(module, name).numel()
        for module in modules
        for name in names
        if hasattr(module, name)
    )


def measure_decoding(args) -> list[dict]:
    """Rows of recipe, dim, tokens_per_second, seconds_to_first_token, bytes_per_second; the vision encoder's time is not in them."""
    bandwidth, rows = memory_bandwidth(args.device), []
    print(f"memory: {bandwidth / 1e9:.1f} GB/s are read at best")
    print(
        f"{'recipe':16}{'dim':>5}{'tokens/s':>10}{'first token':>13}{'weights read':>14}{'of the best':>13}"
    )
    for dim in args.dims:
        config = VLMConfig(dim=dim, n_layers=LAYERS[dim])
        input_ids = torch.arange(100, 100 + PROMPT_TOKENS, device=args.device)[None]
        input_ids[:, 20 : 20 + config.n_image_tokens] = config.image_token_id
        features = torch.randn(1, config.n_image_tokens, config.vision_dim, device=args.device)
        for recipe, form in RECIPES.items():
            if args.device != "cpu" and form != "float32":
                continue
            model = build_model(dim, form).to(args.device)
            steps = published_steps if recipe == "published" else our_steps
            tokens_per_second, first = clock(steps, model, input_ids, features)
            read = (
                tokens_per_second
                * count_weights(model)
                * {"float32": 4, "float16": 2, "int8": 1}[form]
            )
            row = {
                "recipe": recipe,
                "dim": dim,
                "weights": form,
                "tokens_per_second": tokens_per_second,
            }
            row |= {
                "seconds_to_first_token": first,
                "bytes_per_second": read,
                "memory_bytes_per_second": bandwidth,
            }
            rows.append(row)
            print(f"{recipe:16}{dim:5}{tokens_per_second:10.1f}{first:11.2f} s", end="")
            print(f"{read / 1e9:9.1f} GB/s{100 * read / bandwidth:11.0f} %", flush=True)
    return rows
