"""Decoding on a GPU: the kernels of one token, recorded once as a CUDA graph and replayed.

A GPU computes a token of a model this small faster than the host can launch its kernels one by
one. A graph runs on the same memory each time. So nothing in it may grow: the position is a tensor,
and attention looks at the whole cache through a mask.
"""

from collections.abc import Callable

import torch

from model.model_lm import KVCache

# Runs before recording, as torch.cuda.graph asks for.
N_WARM_UPS = 3


class GraphDecoder:
    """`decode_one_token` of inference/generate.py for a GPU.

    On a CPU it computes the same without a graph, for the tests.

    Args:
        decode: int64[B], the tokens chosen last -> float[B, vocab_size], logits of the next ones.
        cache: what `decode` reads and fills; its shapes are fixed from now on.
        batch_size: B.
    """

    def __init__(
        self, decode: Callable[[torch.Tensor], torch.Tensor], cache: KVCache, batch_size: int
    ):
        self.decode, self.cache = decode, cache
        # All that a graph reads and writes has to stay where it is, and of one size.
        cache.has_fixed_shape = True
        device = cache.position.device
        self.token = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.graph = self._record() if device.type == "cuda" else None

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """The same as `decode`; a call overwrites the logits of the one before it."""
        self.token.copy_(token)
        if self.graph is None:
            self.logits = self.decode(self.token)
        else:
            self.graph.replay()
            # The graph moves the cache's position; the host's number is moved here.
            self.cache.length += 1
        return self.logits

    def _record(self) -> torch.cuda.CUDAGraph:
        """Capture `decode`. The cache is as before, but for the place that the next token fills."""
        length = self.cache.length

        # warm up on a stream of its own
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(N_WARM_UPS):
                self.decode(self.token)
                self.cache.rewind(length)
        torch.cuda.current_stream().wait_stream(stream)

        # record; kernels are noted here, not run
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: in training, those that load and store data.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self.decode(self.token)
        self.cache.rewind(length)
        return graph
