"""Text generation with a KV cache: prefill the prompt once, then decode one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from common.errors import UserError
from common.flags import MOST_SEED
from inference.cuda_graph import GraphDecoder
from model.model_lm import KVCache

if TYPE_CHECKING:
    from model.model_vlm import MiniMindVLM

# Tokens after which the host asks a GPU whether all answers have ended.
GPU_CHECK_INTERVAL = 16
# Tokens that a CPU ranks at first: nearly always enough, in a tenth of the time of sorting all.
N_LIKELIEST = 256
# Under this the likeliest token would be drawn anyway.
LEAST_TEMPERATURE = 1e-5


def prefill(
    model: MiniMindVLM,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_features: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: KVCache,
) -> torch.Tensor:
    """Run the prompt through the model and fill the cache.

    Args:
        model: in eval mode.
        input_ids: int64[B, T], the prompts.
        pixel_values: float[k, 3, H, W], their images in order.
        image_features: float[k, patches, vision_dim], instead of pixel_values.
        attention_mask: int64[B, T], 0 at left padding.
        cache: an empty one.

    Returns float[B, vocab_size], the logits of the first new token.
    """
    embeddings = model.embed(input_ids, pixel_values, image_features)
    # Only the last position says what comes next.
    return model.predict(embeddings, attention_mask, cache, n_last=1)[:, -1]


def decode_one_token(
    model: MiniMindVLM, token: torch.Tensor, *, attention_mask: torch.Tensor | None, cache: KVCache
) -> torch.Tensor:
    """Run one token of each row through the model.

    Args:
        model: in eval mode.
        token: int64[B], the tokens chosen last.
        attention_mask: int64[B, max_length of the cache], 0 at left padding.
        cache: holds all tokens before them.

    Returns float[B, vocab_size], the logits of the next token.
    """
    embeddings = model.tok_embeddings(token[:, None])  # (B, 1, dim)
    return model.predict(embeddings, attention_mask, cache)[:, -1]


def sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Choose a token of each row: float[B, vocab_size] -> int64[B].

    Temperature 0 takes the likeliest token. With top_p < 1 one is drawn from the likeliest tokens
    that hold this probability together (nucleus sampling, Holtzman et al. 2020). Random numbers
    come from `generator`, or from PyTorch's own, which all share.
    """
    # greedy; divided by less, logits would not fit into float32
    if temperature < LEAST_TEMPERATURE:
        return logits.argmax(dim=-1)
    # draw
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    if top_p == 1:
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    # rank tokens by probability: on a CPU the likeliest, and all only if these are not enough
    vocab_size = logits.shape[-1]
    n_ranked = min(N_LIKELIEST, vocab_size) if logits.device.type == "cpu" else vocab_size
    ranked, order = probabilities.topk(n_ranked, dim=-1)  # each (B, n_ranked)
    if n_ranked < vocab_size and (ranked.sum(dim=-1) < top_p).any():
        ranked, order = probabilities.sort(dim=-1, descending=True)

    # The token that crosses top_p still belongs.
    is_outside = ranked.cumsum(dim=-1) - ranked >= top_p
    allowed = ranked.masked_fill(is_outside, 0.0)
    choice = torch.multinomial(allowed, 1, generator=generator)  # (B, 1)
    return order.gather(-1, choice).squeeze(-1)


def generate(
    model: MiniMindVLM,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    *,
    image_features: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.65,
    top_p: float = 0.85,
    seed: int | None = None,
    eos_token_id: int = 2,
    pad_token_id: int = 0,
    stream: bool = False,
) -> torch.Tensor | Iterator[torch.Tensor]:
    """Continue prompts.

    Args:
        model: in eval mode.
        input_ids: int64[B, T], the prompts; shorter ones are padded on the left.
        pixel_values: float[k, 3, H, W], the images of all prompts in order.
        image_features: float[k, patches, vision_dim], instead of pixel_values.
        attention_mask: int64[B, T], 0 at padding.
        max_new_tokens: longest answer; it is shorter if max_seq_len leaves less room.
        temperature: 0 takes the likeliest token; larger numbers give rarer ones a chance.
        top_p: probability that the tokens to choose from hold together, above 0, at most 1.
        seed: the same one gives the same answer, whatever else draws random numbers meanwhile.
        eos_token_id: an answer ends with this token.
        pad_token_id: what follows an answer that ended before the others.
        stream: return an iterator of int64[B, n], all new tokens so far, one step at a time.

    Returns int64[B, T + N], prompts and answers. UserError for a prompt that fills max_seq_len by
    itself, or an option that cannot be.
    """
    # check
    n_free = count_free(input_ids.shape[1], model.config.max_seq_len)
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}: it has to be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it has to be above 0 and at most 1")
    if not max_new_tokens >= 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it has to be at least 1")
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise UserError(f"seed is {seed}: it has to be 0 to {MOST_SEED}")

    # generate
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    steps = _generate_steps(
        model,
        input_ids,
        pixel_values,
        image_features,
        attention_mask,
        max_new_tokens=min(max_new_tokens, n_free),
        choose=partial(sample, temperature=temperature, top_p=top_p, generator=generator),
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        check_interval=GPU_CHECK_INTERVAL if input_ids.is_cuda and not stream else 1,
    )
    if stream:
        return steps
    # The last step has all tokens.
    *_, new_tokens = steps
    return torch.cat((input_ids, cut_after_end(new_tokens, eos_token_id)), dim=1)


def count_free(prompt_length: int, max_seq_len: int) -> int:
    """Tokens that an answer may have behind a prompt; UserError where there is room for none."""
    if prompt_length >= max_seq_len:
        raise UserError(
            f"the prompt has {prompt_length} tokens but max_seq_len is {max_seq_len}: "
            "shorten the prompt"
        )
    return max_seq_len - prompt_length


def cut_after_end(new_tokens: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Cut int64[B, N] where the last answer ends: a GPU may have gone on before the host asked."""
    has_ended = (new_tokens == eos_token_id).cumsum(dim=1).bool().all(dim=0)  # (N,)
    return new_tokens[:, : int((~has_ended).sum()) + 1]


@torch.inference_mode()
def _generate_steps(
    model: MiniMindVLM,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_features: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    *,
    max_new_tokens: int,
    choose,
    eos_token_id: int,
    pad_token_id: int,
    check_interval: int,
) -> Iterator[torch.Tensor]:
    """Yield int64[B, n], all new tokens so far, for n = 1, 2, 3 ...

    Args: those of `generate`, and
        choose: float[B, vocab_size] logits -> int64[B] tokens.
        check_interval: tokens after which to look whether all answers have ended.
    """
    # prefill
    batch_size, prompt_length = input_ids.shape
    device, dtype = input_ids.device, model.tok_embeddings.weight.dtype
    cache = KVCache(model.config, batch_size, prompt_length + max_new_tokens, device, dtype)
    logits = prefill(model, input_ids, pixel_values, image_features, attention_mask, cache)

    # decode; new tokens are no padding
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)
    decode = partial(decode_one_token, model, attention_mask=attention_mask, cache=cache)
    has_ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
    tokens = input_ids.new_empty(batch_size, max_new_tokens)
    for n in range(max_new_tokens):
        # Recording a graph takes some time, so the first token is given out before.
        if n == 1 and device.type == "cuda":
            decode = GraphDecoder(decode, cache, batch_size)
        if n > 0:
            logits = decode(tokens[:, n - 1])
        tokens[:, n] = choose(logits).masked_fill(has_ended, pad_token_id)
        has_ended |= tokens[:, n] == eos_token_id
        yield tokens[:, : n + 1]
        # Asking makes the host wait for the device.
        if (n + 1) % check_interval == 0 and has_ended.all():
            return
