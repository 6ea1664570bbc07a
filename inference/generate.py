"""Text generation with a KV cache: prefill the prompt once, then decode one token at a time."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from common.errors import UserError
from inference.cuda_graph import GraphDecoder
from model.model_lm import KVCache

GPU_TOKENS_UNREAD = 16  # tokens after which the host asks a GPU whether all answers have ended
LIKELIEST = 256  # tokens ranked at first on a CPU: a tenth of the time that sorting all takes, and nearly always enough


def prefill(
    model,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_features: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: KVCache,
) -> torch.Tensor:
    """Run the prompt int64[B, T] through the model and fill `cache`; returns float[B, vocab_size], the last position's logits."""
    embeddings = model.embed(input_ids, pixel_values, image_features)
    hidden = model.run_layers(embeddings, attention_mask, cache)
    return model.output(hidden[:, -1])


def decode_one_token(
    model, token: torch.Tensor, *, attention_mask: torch.Tensor | None, cache: KVCache
) -> torch.Tensor:
    """int64[B], the tokens chosen last -> float[B, vocab_size], logits of the next ones. `attention_mask` [B, max_length]."""
    if attention_mask is not None:
        attention_mask = attention_mask[:, : cache.length + 1]
    hidden = model.run_layers(model.tok_embeddings(token[:, None]), attention_mask, cache)
    return model.output(hidden[:, -1])


def sample(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """float[B, vocab_size] -> int64[B]. Temperature 0 takes the likeliest token; top_p < 1 samples from the likeliest
    tokens that hold this probability together (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    if top_p == 1:
        return torch.multinomial(probabilities, num_samples=1).squeeze(-1)
    n_ranked = min(LIKELIEST, logits.shape[-1]) if logits.device.type == "cpu" else logits.shape[-1]
    ranked, order = probabilities.topk(n_ranked, dim=-1)
    if n_ranked < logits.shape[-1] and (ranked.sum(dim=-1) < top_p).any():
        ranked, order = probabilities.sort(dim=-1, descending=True)
    outside = ranked.cumsum(dim=-1) - ranked >= top_p  # the token that crosses top_p still belongs
    choice = torch.multinomial(ranked.masked_fill(outside, 0.0), num_samples=1)
    return order.gather(-1, choice).squeeze(-1)


def generate(
    model,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    *,
    image_features: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.65,
    top_p: float = 0.85,
    eos_token_id: int = 2,
    pad_token_id: int = 0,
    stream: bool = False,
) -> torch.Tensor | Iterator[torch.Tensor]:
    """Continue the prompts int64[B, T]; pad prompts of unequal length on the left and pass their attention_mask [B, T].

    Returns int64[B, T + N]: prompt and answer, `pad_token_id` after an answer's `eos_token_id`. With `stream=True`
    returns an iterator of int64[B, n], all new tokens so far, one step at a time. At most `max_new_tokens` are new, fewer
    where the model's max_seq_len leaves no room. Raises UserError for a prompt that fills max_seq_len by itself.
    """
    prompt_length = input_ids.shape[1]
    room = model.config.max_seq_len - prompt_length
    if room < 1:
        raise UserError(
            f"the prompt has {prompt_length} tokens but max_seq_len is {model.config.max_seq_len}: shorten the prompt"
        )
    if temperature < 0:
        raise UserError(f"temperature is {temperature}: it has to be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it has to be above 0 and at most 1")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it has to be at least 1")
    steps = _steps(
        model, input_ids, pixel_values, image_features, attention_mask,
        min(max_new_tokens, room), temperature, top_p, eos_token_id, pad_token_id,
        check_every=GPU_TOKENS_UNREAD if input_ids.is_cuda and not stream else 1,
    )  # fmt: skip
    if stream:
        return steps
    *_, new_tokens = [input_ids[:, :0], *steps]
    return torch.cat((input_ids, cut_after_end(new_tokens, eos_token_id)), dim=1)


def cut_after_end(new_tokens: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """int64[B, N] up to where the last answer ends: a GPU may have gone on before the host asked."""
    has_ended = (new_tokens == eos_token_id).cumsum(dim=1).bool().all(dim=0)  # (N,)
    return new_tokens[:, : int((~has_ended).sum()) + 1]


@torch.inference_mode()
def _steps(
    model, input_ids, pixel_values, image_features, attention_mask,
    max_new_tokens, temperature, top_p, eos_token_id, pad_token_id, check_every,
) -> Iterator[torch.Tensor]:  # fmt: skip
    batch_size, prompt_length = input_ids.shape
    dtype = model.tok_embeddings.weight.dtype
    cache = KVCache(
        model.config, batch_size, prompt_length + max_new_tokens, input_ids.device, dtype
    )
    finished = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    tokens = input_ids.new_empty(batch_size, max_new_tokens)
    logits = prefill(model, input_ids, pixel_values, image_features, attention_mask, cache)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)
    decode = partial(decode_one_token, model, attention_mask=attention_mask, cache=cache)
    for n in range(max_new_tokens):
        if (
            n == 1 and input_ids.is_cuda
        ):  # not before the first token is out: recording takes some time
            decode = GraphDecoder(model, cache, attention_mask)
        if n > 0:
            logits = decode(tokens[:, n - 1])
        tokens[:, n] = sample(logits, temperature, top_p).masked_fill(finished, pad_token_id)
        finished |= tokens[:, n] == eos_token_id
        yield tokens[:, : n + 1]
        if (n + 1) % check_every == 0 and finished.all():
            return
