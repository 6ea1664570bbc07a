"""The MiniMind language model: a pre-norm Llama block with grouped-query attention, read from leaf to root.

State-dict names are those of the published weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model.LMConfig import LMConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)  # the same in one kernel
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return normed.type_as(x) * self.weight


def rope_table(head_dim: int, max_seq_len: int, theta: float) -> torch.Tensor:
    """float[max_seq_len, head_dim / 2, 2]: cosine and sine of every position and frequency (Su et al. 2021)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(max_seq_len).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the *interleaved* pairs (x0, x1), (x2, x3) … of float[B, T, n_heads, head_dim] by rope[(B,) T, head_dim / 2, 2].

    A pair is a complex number and a rotation its product with another: one kernel in place of eight. A compiler
    merges the eight by itself, and has none for complex numbers.
    """
    if torch.compiler.is_compiling():
        cos, sin = rope.unsqueeze(-3).unbind(-1)  # each (…, T, 1, head_dim / 2)
        x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, T, n_heads, head_dim / 2)
        return (
            torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).flatten(-2).type_as(x)
        )
    rotation = torch.view_as_complex(rope).unsqueeze(-2)  # (…, T, 1, head_dim / 2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, n_heads, head_dim / 2)
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)  # (B, T, n_heads, head_dim)


class KVCache:
    """Keys and values of every layer, allocated once for `max_length` tokens and filled from the left."""

    def __init__(
        self,
        config: LMConfig,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (config.n_layers, 2, batch_size, config.n_kv_heads, max_length, config.head_dim)
        store = torch.empty(shape, device=device, dtype=dtype)
        self.layers = [
            layer.unbind(0) for layer in store
        ]  # (keys, values) each (B, n_kv_heads, max_length, head_dim)
        self.length = 0  # tokens stored by finished forward passes

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store float[B, n_kv_heads, T, head_dim] behind what is there; returns all keys and values so far."""
        n_new = keys.shape[2]
        all_keys, all_values = self.layers[layer]
        all_keys.narrow(2, self.length, n_new).copy_(keys)
        all_values.narrow(2, self.length, n_new).copy_(values)
        return all_keys.narrow(2, 0, self.length + n_new), all_values.narrow(
            2, 0, self.length + n_new
        )


class Attention(nn.Module):
    """Grouped-query attention: `n_heads` queries share `n_kv_heads` keys and values (Ainslie et al. 2023)."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        """float[B, T, dim] -> float[B, T, dim]. `mask` bool[B, 1, T, S] says what may be seen; None means causal."""
        queries = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (B, T, n_heads, head_dim)
        keys = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (B, T, n_kv_heads, head_dim)
        values = (
            self.wv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        )  # (B, n_kv_heads, T, head_dim)
        queries = apply_rope(queries, rope).transpose(1, 2)  # (B, n_heads, T, head_dim)
        keys = apply_rope(keys, rope).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)
        if queries.shape[2] == 1 and mask is None and queries.device.type == "cpu":
            mixed = self._attend_one(queries, keys, values)
        else:
            mixed = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None and queries.shape[2] > 1,
                enable_gqa=True,
            )
        return self.wo(mixed.transpose(1, 2).flatten(2))  # (B, T, dim)

    def _attend_one(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """One new token on a CPU, a third of the time that the general kernel needs: the queries that share a key are rows
        of one product. float[B, n_heads, 1, head_dim] -> the same."""
        grouped = queries.view(
            len(queries), keys.shape[1], -1, self.head_dim
        )  # (B, n_kv_heads, n_rep, head_dim)
        scores = (grouped * self.head_dim**-0.5) @ keys.transpose(
            -2, -1
        )  # (B, n_kv_heads, n_rep, S)
        return (scores.softmax(dim=-1) @ values).view_as(queries)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MiniMindBlock(nn.Module):
    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cache))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class MiniMindLM(nn.Module):
    """Token embeddings -> blocks -> norm -> output head, which shares the embeddings' weights."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            MiniMindBlock(config, layer) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._init_weights()
        self.output.weight = self.tok_embeddings.weight
        rope = rope_table(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rope", rope, persistent=False)

    def _init_weights(self) -> None:
        """Start for training from nothing. Scales follow the width, so that attention is not flat at dim 128; embeddings
        are large beside what the blocks add at first, so that a token's identity reaches every layer."""
        scale = self.config.dim**-0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_residual = name.endswith(
                    ("wo.weight", "w2.weight")
                )  # smaller, as in GPT-2, section 2.3
                nn.init.normal_(
                    weight,
                    std=scale / math.sqrt(2 * self.config.n_layers) if is_residual else scale,
                )
        nn.init.normal_(self.tok_embeddings.weight, std=3 * scale)

    def run_layers(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """float[B, T, dim] embeddings -> float[B, T, dim] final hidden states, ready for `output`.

        `attention_mask` bool or int[B, S] has 0 at padding, S counting what the cache holds too. It is needed for left
        padding only: right padding is never seen by a causal model.
        """
        past = cache.length if cache is not None else 0
        length = past + embeddings.shape[1]
        if length > self.config.max_seq_len:
            raise ValueError(
                f"{length} tokens are more than max_seq_len {self.config.max_seq_len}: shorten the input"
            )
        rope, mask = self.rope[past:length], None
        if attention_mask is not None:
            rope = self.rope[
                (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
            ]  # (B, T, head_dim / 2, 2)
        if attention_mask is not None or (past > 0 and embeddings.shape[1] > 1):
            mask = _visible(past, length, attention_mask, embeddings.device)
        hidden = self.dropout(embeddings)
        for layer in self.layers:
            hidden = layer(hidden, rope, mask, cache)
        if cache is not None:
            cache.length = length
        return self.norm(hidden)


def _visible(
    past: int, length: int, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """bool[B or 1, 1, T, S]: what each new position may look at; at least itself, padding too, lest softmax give NaN."""
    positions = torch.arange(length, device=device)
    rows = positions[past:, None]  # (T, 1)
    visible = (positions <= rows)[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :] | (positions == rows)
    return visible
