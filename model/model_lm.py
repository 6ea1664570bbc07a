"""The MiniMind language model: a pre-norm Llama block with grouped-query attention.

Read from leaf to root. State-dict names are those of the published weights. Shapes: B rows of a
batch, T new tokens, S tokens that attention looks at (the cached ones and the new).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model.LMConfig import LMConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # All float32: one kernel does it.
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return normed.type_as(x) * self.weight


def rope_table(head_dim: int, max_seq_len: int, theta: float) -> torch.Tensor:
    """Cosine and sine of every position and frequency (rotary embedding, Su et al. 2021).

    Returns float[max_seq_len, head_dim / 2, 2].
    """
    # The first pair of a head turns by 1 radian a token and tells neighbors apart; the last one
    # turns about 1 / theta as fast and still differs between tokens that are far from each other.
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(max_seq_len).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the *interleaved* pairs (x0, x1), (x2, x3) ... of each head by its token's angles.

    `x` is float[B, T, n_heads, head_dim], queries or keys, and so is the result; `rope` is
    float[T, head_dim / 2, 2] or float[B, T, head_dim / 2, 2], rows of `rope_table`.
    """
    # torch.compile merges these kernels by itself, and has none for complex numbers.
    if torch.compiler.is_compiling():
        cos, sin = rope.unsqueeze(-3).unbind(-1)  # (..., T, 1, head_dim / 2)
        x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, n_heads, head_dim / 2)
        rotated = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
        return rotated.flatten(-2).type_as(x)  # (B, T, n_heads, head_dim)

    # A pair is a complex number and a rotation a product: one kernel instead of eight.
    rotation = torch.view_as_complex(rope).unsqueeze(-2)  # (..., T, 1, head_dim / 2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, n_heads, head_dim / 2)
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)  # (B, T, n_heads, head_dim)


class KVCache:
    """Keys and values of every layer, allocated once and filled from the left.

    Where the next token goes is stored twice: as a number for the host (`length`), and as a tensor
    on the device (`position`). A CUDA graph replays kernels without the host, so it can only follow
    the tensor.

    Args:
        config: sizes of the model.
        batch_size: B.
        max_length: most tokens of a row, prompt and answer together.
        device, dtype: of keys and values.
    """

    def __init__(
        self,
        config: LMConfig,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        # One block of memory: growing it token by token would copy all of it each time.
        shape = (config.n_layers, 2, batch_size, config.n_kv_heads, max_length, config.head_dim)
        # Zeros, since a masked position still counts as 0 * value, and memory may hold NaN.
        store = torch.zeros(shape, device=device, dtype=dtype)
        # of each layer: keys and values (B, n_kv_heads, max_length, head_dim)
        self.layers = [layer.unbind(0) for layer in store]
        self.max_length = max_length
        self.length = 0
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        # A CUDA graph needs shapes that never change: attention then gets all `max_length` tokens
        # and a mask, instead of the first `length`.
        self.has_fixed_shape = False

    def reserve(self, n_new: int) -> torch.Tensor:
        """int64[n_new]: the positions of the next tokens, which `update` fills layer by layer."""
        self.new_positions = self.position + torch.arange(n_new, device=self.position.device)
        self.length += n_new
        self.position += n_new
        self.n_visible = self.max_length if self.has_fixed_shape else self.length
        return self.new_positions

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store float[B, n_kv_heads, T, head_dim] at the reserved positions.

        Returns all keys and values of the layer, float[B, n_kv_heads, S, head_dim].
        """
        all_keys, all_values = self.layers[layer]
        all_keys.index_copy_(2, self.new_positions, keys)
        all_values.index_copy_(2, self.new_positions, values)
        return all_keys[:, :, : self.n_visible], all_values[:, :, : self.n_visible]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = length
        self.position.fill_(length)


class Attention(nn.Module):
    """Grouped-query attention: `n_heads` queries share `n_kv_heads` keys (Ainslie et al. 2023)."""

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
        """Mix the values of the tokens that each token may look at.

        Args:
            x: float[B, T, dim].
            rope: see `apply_rope`.
            mask: bool[B or 1, 1, T, S], True where a token may look; None means that each token
                looks at itself and at all before it.
            cache: gives the keys and values of earlier tokens, and stores the new ones.

        Returns float[B, T, dim].
        """
        queries = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (B, T, n_heads, head_dim)
        keys = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (B, T, n_kv_heads, head_dim)
        values = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, n_kv_heads, head_dim)

        # rotate, then heads before tokens: (B, n_heads or n_kv_heads, T, head_dim)
        queries = apply_rope(queries, rope).transpose(1, 2)
        keys = apply_rope(keys, rope).transpose(1, 2)
        values = values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(self.layer, keys, values)

        # attend; without a mask one token sees all there are, several see those before them
        dropout = self.dropout if self.training else 0.0
        is_causal = mask is None and queries.shape[2] > 1
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, mask, dropout, is_causal, enable_gqa=True
        )
        return self.wo(mixed.transpose(1, 2).flatten(2))  # (B, T, dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # silu(w1 x) is a gate: it scales each element of w3 x.
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MiniMindBlock(nn.Module):
    """Attention, then feed-forward; each reads a normed copy and adds to what came in."""

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
        """float[B, T, dim] -> float[B, T, dim]; the arguments are those of `Attention.forward`."""
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
        # One matrix for input and output (Press & Wolf 2017): with 6,400 tokens it is large.
        self.output.weight = self.tok_embeddings.weight
        rope = rope_table(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rope", rope, persistent=False)

    def _init_weights(self) -> None:
        """Random weights to train from.

        Scales follow the width, so that attention is not flat at dim 128. Embeddings are large
        beside what the blocks add at first, so that a token's identity reaches every layer.
        """
        scale = self.config.dim**-0.5
        # What a block adds to its input starts smaller, as in GPT-2, section 2.3.
        residual_scale = scale / math.sqrt(2 * self.config.n_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=residual_scale if is_residual else scale)
        nn.init.normal_(self.tok_embeddings.weight, std=3 * scale)

    def run_layers(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Run all blocks: training, prefill, decoding and CUDA graphs use this one way.

        Args:
            embeddings: float[B, T, dim] of the new tokens.
            attention_mask: bool or int[B, S], 0 at padding, cached tokens included; it may be
                longer than needed. Only padding on the left needs one: a causal model never sees
                what is on the right.
            cache: keys and values of earlier tokens; it gets those of the new ones.

        Returns float[B, T, dim], final hidden states, ready for `output`. UserError for more than
        max_seq_len tokens.
        """
        # how long rows are, with the new tokens
        n_new = embeddings.shape[1]
        length = n_new if cache is None else cache.length + n_new
        self.config.check_length(length)

        # positions: where the new tokens are among those that attention looks at
        if cache is None:
            positions, n_visible = torch.arange(n_new, device=embeddings.device), n_new
        else:
            positions, n_visible = cache.reserve(n_new), cache.n_visible
        rope = self.rope[positions]  # (T, head_dim / 2, 2)
        if attention_mask is not None:
            attention_mask = attention_mask[:, :n_visible]
            # Padding does not count: a row's first token is at 0.
            text_positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # (B, S)
            rope = self.rope[text_positions[:, positions]]  # (B, T, head_dim / 2, 2)

        # Attention needs no mask if every token sees all before it, and there is nothing else.
        is_plain = n_visible == n_new or (n_new == 1 and n_visible == length)
        mask = None
        if attention_mask is not None or not is_plain:
            mask = find_visible(positions, n_visible, attention_mask)

        # the blocks
        hidden = self.dropout(embeddings)
        for layer in self.layers:
            hidden = layer(hidden, rope, mask, cache)
        return self.norm(hidden)


def find_visible(
    positions: torch.Tensor, n_visible: int, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Which of the S = `n_visible` tokens the new ones at int64[T] `positions` may look at.

    `attention_mask` is bool or int[B, S], 0 at padding. Returns bool[B or 1, 1, T, S].
    """
    columns = torch.arange(n_visible, device=positions.device)
    rows = positions[:, None]  # (T, 1)
    visible = (columns <= rows)[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        # Padding looks at itself: a softmax over nothing would be NaN.
        visible = (visible & attention_mask.bool()[:, None, None, :]) | (columns == rows)
    return visible
