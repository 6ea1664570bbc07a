"""The published decoding loop: logits at every position, a full sort, a host round trip a token."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from model.model_lm import MiniMindBlock, apply_rope
from model.model_vlm import MiniMindVLM


@torch.inference_mode()
def decode(
    model: MiniMindVLM, input_ids: torch.Tensor, image_features: torch.Tensor, n_new: int
) -> Iterator[int]:
    """Yield one token after the other.

    Args:
        model: in eval mode.
        input_ids: int64[1, T], the prompt.
        image_features: float[k, patches, vision_dim], of its images.
        n_new: how many tokens; the loop does not stop at the end of an answer.
    """
    config, caches, start = model.config, [None] * model.config.n_layers, 0
    hidden = model.embed(input_ids, None, image_features)
    for _ in range(n_new):
        # through the layers, whose caches grow
        rope = model.rope[start : start + hidden.shape[1]]
        for index, layer in enumerate(model.layers):
            repeats = config.n_heads // config.n_kv_heads
            hidden, caches[index] = run_layer(layer, hidden, rope, caches[index], repeats)
        logits = model.output(model.norm(hidden))[:, -1]

        # a repetition penalty of 1, temperature 0.65, top-p 0.85
        logits[:, list(set(input_ids.tolist()[0]))] /= 1.0
        logits /= 0.65
        ranked, order = logits.sort(descending=True, dim=-1)
        outside = ranked.softmax(-1).cumsum(-1) > 0.85
        outside[:, 1:], outside[:, 0] = outside[:, :-1].clone(), False
        logits[outside.scatter(1, order, outside)] = -torch.inf
        token = torch.multinomial(logits.softmax(-1), num_samples=1)  # (1, 1)

        start, input_ids = input_ids.shape[1], torch.cat((input_ids, token), dim=1)
        yield token.item()
        hidden = model.tok_embeddings(token)


def run_layer(
    layer: MiniMindBlock,
    hidden: torch.Tensor,
    rope: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor] | None,
    repeats: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """A block whose keys and values grow by concatenation and are copied for every query head.

    Args:
        layer: gives the weights.
        hidden: float[1, T, dim].
        rope: rows of `rope_table`, of these T tokens.
        cache: keys and values so far, float[1, S, n_kv_heads, head_dim] each.
        repeats: query heads that share a key.

    Returns (float[1, T, dim], the grown cache).
    """
    # project: (1, T, heads, head_dim)
    attention, x = layer.attention, layer.attention_norm(hidden)
    projections = (attention.wq, attention.wk, attention.wv)
    queries, keys, values = (
        linear(x).unflatten(-1, (-1, attention.head_dim)) for linear in projections
    )
    queries, keys = apply_rope(queries, rope), apply_rope(keys, rope)
    if cache is not None:
        keys, values = torch.cat((cache[0], keys), dim=1), torch.cat((cache[1], values), dim=1)

    # attend: (1, n_heads, T or S, head_dim)
    repeated = repeat_heads(keys, repeats), repeat_heads(values, repeats)
    q, k, v = (heads.transpose(1, 2) for heads in (queries, *repeated))
    if x.shape[1] > 1:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mixed = (q @ k.transpose(-2, -1) / attention.head_dim**0.5).softmax(-1) @ v
    hidden = hidden + attention.wo(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.feed_forward(layer.ffn_norm(hidden)), (keys, values)


def repeat_heads(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """float[1, S, n_kv_heads, head_dim] -> float[1, S, n_heads, head_dim], copied."""
    return x[:, :, :, None].expand(-1, -1, -1, repeats, -1).flatten(2, 3)
