"""The rows of a running batch: prompts join it, a token of each row is decoded, rows leave it.

All rows share one cache and the column that the next tokens go to, so a row is padded on the left:

    columns     0 1 2 3 4 5 6 7 8
    row 0       . . . a a a a a >       starts[0] = 3; > is where the next tokens go
    row 1       b b b b b b b b >       starts[1] = 0
    row 2       . . . . . . c c >       joined now: its prompt is copied in, up to this column
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from inference.generate import decode_one_token
from model.model_lm import KVCache

if TYPE_CHECKING:
    from inference.onnx_model import OnnxVLM
    from model.model_vlm import MiniMindVLM

# Tokens of a prompt between two decoding steps: the other rows wait that long for their next token.
CHUNK = 256
# Columns that a cache begins with; it doubles where rows are longer.
FIRST_COLUMNS = 1024


class Prompt:
    """A prompt on its way into the batch, in a cache of its own.

    Args:
        embeddings: float[1, T, dim] of its tokens and pictures.
        cache: room for all of them.
    """

    def __init__(self, embeddings: torch.Tensor, cache: KVCache):
        self.embeddings, self.cache = embeddings, cache

    @property
    def n_done(self) -> int:
        """Tokens that have been prefilled."""
        return self.cache.length


class Rows:
    """A batch.

    Args:
        model: in eval mode; our network or, with the onnx backend, an OnnxVLM.
        max_rows: most rows at a time.

    Attributes:
        starts: first column of each row.
    """

    def __init__(self, model: MiniMindVLM | OnnxVLM, max_rows: int):
        self.model, self.max_rows = model, max_rows
        self.device = model.tok_embeddings.weight.device
        self.starts: list[int] = []
        self._set_cache(self._new_cache(max_rows, FIRST_COLUMNS))

    # What a batch can do.

    @torch.inference_mode()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[k, 3, H, W] -> float[k, patches, vision_dim]."""
        return self.model.encode_images(pixel_values.to(self.device))

    @torch.inference_mode()
    def open_prompt(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> Prompt:
        """Begin a row with int64[1, T] and float[k, patches, vision_dim] of its pictures.

        UserError where these do not fit together.
        """
        embeddings = self.model.embed(input_ids.to(self.device), image_features=image_features)
        return Prompt(embeddings, self._new_cache(1, input_ids.shape[1]))

    @torch.inference_mode()
    def prefill(self, prompt: Prompt) -> torch.Tensor | None:
        """Run the next CHUNK tokens of a prompt; after the last ones it is ready to join.

        Returns float[1, vocab_size], the logits of its first new token; None if more are to come.
        """
        chunk = prompt.embeddings[:, prompt.n_done : prompt.n_done + CHUNK]  # (1, <= CHUNK, dim)
        logits = self.model.predict(chunk, cache=prompt.cache, n_last=1)[:, -1]
        return logits if prompt.n_done == prompt.embeddings.shape[1] else None

    @torch.inference_mode()
    def join(self, prompt: Prompt) -> None:
        """Add a prefilled prompt as the last row."""
        # its columns end where those of the others do
        n_tokens, row = prompt.n_done, len(self.starts)
        if not self.starts:
            self._empty()
        if n_tokens > self.cache.length:
            self._shift(n_tokens - self.cache.length)
        length = self.cache.length

        # copy
        self.starts.append(length - n_tokens)
        for own, its in zip(self._parts, flatten(prompt.cache)):
            own[row, :, length - n_tokens : length] = its[0]
        self._show_rows()

    @torch.inference_mode()
    def decode(self, tokens: list[int]) -> torch.Tensor:
        """Run the token of each row that was chosen last.

        Returns float[rows, vocab_size], the logits of the next ones.
        """
        # a free column
        if self.cache.length == self.cache.max_length:
            self._shift(-min(self.starts))
        if self.cache.length == self.cache.max_length:
            self._grow(self.cache.length + 1)

        # padding is hidden; where there is none, the model has a faster way
        mask = None
        if any(self.starts):
            columns = torch.arange(self.cache.length + 1, device=self.device)
            starts = torch.tensor(self.starts, device=self.device)
            mask = columns >= starts[:, None]  # (rows, columns)
        token = torch.tensor(tokens, device=self.device)
        return decode_one_token(self.model, token, attention_mask=mask, cache=self.cache)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Take a row out; the last row moves to its place."""
        # the last row moves
        start = self.starts.pop()
        if row < len(self.starts):
            for part in self._parts:
                part[row, :, start : self.cache.length] = part[
                    len(self.starts), :, start : self.cache.length
                ]
            self.starts[row] = start
        self._show_rows()

        # columns that hold nothing but padding cost time
        if self.starts:
            unused = min(self.starts)
            if unused > self.cache.length // 2 or (unused and len(self.starts) == 1):
                self._shift(-unused)

    def clear(self) -> None:
        """Take all rows out."""
        self.starts = []
        self._empty()

    # The cache.

    def _new_cache(self, n_rows: int, n_columns: int) -> KVCache:
        config, dtype = self.model.config, self.model.tok_embeddings.weight.dtype
        return KVCache(config, n_rows, min(n_columns, config.max_seq_len), self.device, dtype)

    def _set_cache(self, cache: KVCache) -> None:
        """Use this cache, of `max_rows` rows."""
        # keys and values of each layer: (max_rows, n_kv_heads, columns, head_dim)
        self.cache, self._parts = cache, flatten(cache)
        self._show_rows()

    def _show_rows(self) -> None:
        """Let the model see the rows that there are."""
        n_rows = len(self.starts)
        rows = iter(part[:n_rows] for part in self._parts)
        self.cache.layers = list(zip(rows, rows))

    def _empty(self) -> None:
        """Begin at the first column; a cache that has grown is given back."""
        if self.cache.max_length > FIRST_COLUMNS:
            self._set_cache(self._new_cache(self.max_rows, FIRST_COLUMNS))
        self.cache.rewind(0)

    def _shift(self, by: int) -> None:
        """Move all rows so many columns to the right, or to the left if it is negative."""
        # what is moved
        if by == 0:
            return
        old, length = self.cache.length, self.cache.length + by
        n_rows, first = len(self.starts), min(self.starts, default=old)
        self._grow(length)

        # a copy first, for the places overlap
        for part in self._parts:
            part[:n_rows, :, first + by : length] = part[:n_rows, :, first:old].clone()
        self.starts = [start + by for start in self.starts]
        self.cache.rewind(length)

    def _grow(self, n_columns: int) -> None:
        """Have room for so many columns."""
        if n_columns <= self.cache.max_length:
            return
        old, length = self._parts, self.cache.length
        n_rows = len(self.starts)
        self._set_cache(self._new_cache(self.max_rows, max(n_columns, 2 * self.cache.max_length)))
        for part, old_part in zip(self._parts, old):
            part[:n_rows, :, :length] = old_part[:n_rows, :, :length]
        self.cache.rewind(length)


def flatten(cache: KVCache) -> list[torch.Tensor]:
    """Keys, values, keys ... of its layers, each float[B, n_kv_heads, columns, head_dim]."""
    return [part for layer in cache.layers for part in layer]
