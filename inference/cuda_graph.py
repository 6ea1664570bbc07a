"""Decoding on a GPU: the pass of one token, recorded once as a CUDA graph and replayed for each token.

A GPU needs less time to compute a token of a model this small than the host needs to launch its kernels one by one.
A graph runs on the same memory each time, so nothing in it may grow: the position is a tensor, attention looks at the whole
cache through a mask.
"""

import torch

from model.model_lm import KVCache

WARM_UPS = 3  # before recording, as torch.cuda.graph asks for


class FixedCache(KVCache):
    """The store of a filled KVCache, written at `position`, a tensor, and read whole."""

    def __init__(self, cache: KVCache):
        self.layers, self.length = cache.layers, cache.length
        keys, _ = cache.layers[0]
        self.batch_size, self.max_length = keys.shape[0], keys.shape[2]
        self.position = torch.tensor(
            [cache.length], device=keys.device
        )  # int64[1], of the token to come

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        all_keys, all_values = self.layers[layer]
        return all_keys.index_copy_(2, self.position, keys), all_values.index_copy_(
            2, self.position, values
        )


class GraphDecoder:
    """`decode_one_token` for a GPU. `attention_mask` bool or int[B, max_length] has 0 at left padding. (On a CPU it computes
    the same without a graph, for the tests.)"""

    def __init__(self, model, cache: KVCache, attention_mask: torch.Tensor | None):
        self.model, self.cache = model, FixedCache(cache)
        device = self.cache.position.device
        self.token = torch.zeros(self.cache.batch_size, 1, dtype=torch.long, device=device)
        self.columns = torch.arange(self.cache.max_length, device=device)
        self.is_text = None if attention_mask is None else attention_mask.bool()  # (B, max_length)
        self.n_padding = 0 if attention_mask is None else (attention_mask == 0).sum(dim=1)  # (B,)
        self.graph = self._record() if device.type == "cuda" else None

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """int64[B], the tokens chosen last -> float[B, vocab_size], logits of the next ones, valid until the next call."""
        self.token.copy_(token[:, None])
        if self.graph is None:
            self.logits = self._step()
        else:
            self.graph.replay()
        return self.logits

    def _step(self) -> torch.Tensor:
        model, position = self.model, self.cache.position
        is_visible = (self.columns <= position)[None]  # (1, max_length)
        if self.is_text is not None:
            is_visible = is_visible & self.is_text  # (B, max_length)
        rope = model.rope[position - self.n_padding][:, None]  # (1 or B, 1, head_dim / 2, 2)
        hidden = model.tok_embeddings(self.token)
        for layer in model.layers:
            hidden = layer(hidden, rope, is_visible[:, None, None], self.cache)
        position += 1
        return model.output(model.norm(hidden)[:, -1])

    def _record(self) -> torch.cuda.CUDAGraph:
        """Capture `_step`; the cache is as before afterwards, but for the place that the next token fills."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.cache.position.fill_(self.cache.length)
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.position.fill_(self.cache.length)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._step()
        return graph
