"""A model that onnxruntime runs, from what `python -m scripts.export MODEL --to onnx` writes.

pixel_values ── vision_encoder.onnx ─> image_features, projected already
input_ids    ── embed_tokens.onnx ───> embeddings, those of the image tokens replaced by features
             ── decoder_*.onnx ──────> logits; its cache of keys and values is a KVCache of ours
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime
import torch
from torch import nn

from common.errors import UserError
from inference.generate import generate
from inference.onnx_files import DECODER_NAMES, EMBEDDINGS_NAME, KINDS, VISION_NAME, find_graphs
from model.LMConfig import VLMConfig
from model.model_lm import KVCache
from model.model_vlm import insert_patches, locate_images

NUMPY_DTYPES = {torch.float32: np.float32, torch.int64: np.int64}
# Of onnxruntime's messages only the fatal ones: errors come as exceptions, too.
FATAL = 4


class OnnxVLM(nn.Module):
    """Stands in for a MiniMindVLM wherever questions are answered.

    Args:
        config: sizes of the model that was exported.
        folder: of the exported model.
        dtype: of the decoder's weights: float32, int8 or int4.

    MissingFileError where a graph is missing, UserError where one is damaged or of another model.
    The vision encoder is opened with the first picture.
    """

    def __init__(self, config: VLMConfig, folder: Path, dtype: str):
        super().__init__()
        self.config, self.graphs = config, find_graphs(folder, dtype)
        self.path = self.graphs / DECODER_NAMES[dtype]
        self.decoder = open_graph(self.path)
        self._check_decoder()
        self.tok_embeddings = self._read_embeddings()
        # Of each cache in use: its layers, and the run that is bound to their memory.
        self._bound: WeakKeyDictionary[KVCache, tuple] = WeakKeyDictionary()

    def _check_decoder(self) -> None:
        """UserError where the decoder is not that of a model of these sizes."""
        config = self.config
        cached = (config.n_kv_heads, config.head_dim)
        expected = {"inputs_embeds": (config.dim,), "attention_mask": (), "position_ids": ()}
        expected["logits"] = (config.vocab_size,)
        for number in range(config.n_layers):
            expected |= {f"past_key_values.{number}.{kind}": cached for kind in KINDS}
        found = {
            node.name: tuple(size for size in node.shape if isinstance(size, int))
            for node in (*self.decoder.get_inputs(), self.decoder.get_outputs()[0])
        }
        if found != expected:
            wrong = dict(found.items() ^ expected.items())
            raise does_not_fit(self.path, ", ".join(wrong))

    def _read_embeddings(self) -> nn.Embedding:
        """The table: looking up a row of it is no work for a graph."""
        graph = open_graph(self.graphs / EMBEDDINGS_NAME)
        ids = np.arange(self.config.vocab_size)[None]  # (1, vocab_size)
        shape = (1, self.config.vocab_size, self.config.dim)
        rows = run_graph(graph, self.graphs / EMBEDDINGS_NAME, shape, input_ids=ids)
        return nn.Embedding.from_pretrained(rows[0])

    @cached_property
    def vision_encoder(self) -> onnxruntime.InferenceSession:
        """The graph of vision encoder and projector."""
        return open_graph(self.graphs / VISION_NAME)

    # What a MiniMindVLM can do.

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[k, 3, H, W] -> float[k, patches, dim], projected already."""
        path = self.graphs / VISION_NAME
        shape = (len(pixel_values), self.config.n_image_tokens, self.config.dim)
        return run_graph(self.vision_encoder, path, shape, pixel_values=pixel_values.numpy())

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `MiniMindVLM.embed`; image_features are those of `encode_images` here."""
        if image_features is None and pixel_values is not None and len(pixel_values):
            image_features = self.encode_images(pixel_values)
        embeddings = self.tok_embeddings(input_ids)
        n_images = 0 if image_features is None else len(image_features)
        indices = locate_images(input_ids, n_images, self.config)
        return insert_patches(embeddings, image_features, indices) if n_images else embeddings

    def predict(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        n_last: int | None = None,
    ) -> torch.Tensor:
        """See `MiniMindVLM.predict`."""
        # where the new tokens are, padding not counted
        n_rows, n_new, _ = embeddings.shape
        if cache is None:
            cache = KVCache(self.config, n_rows, n_new, torch.device("cpu"), torch.float32)
        is_first = cache.length == 0
        self.config.check_length(cache.length + n_new)
        cache.reserve(n_new)
        if attention_mask is None:
            attention_mask = torch.ones(n_rows, cache.length, dtype=torch.long)
        attention_mask = attention_mask[:, : cache.length].long()
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -n_new:]  # (B, T)
        inputs = (embeddings, attention_mask, position_ids)

        # Several rows cannot go on by several tokens at once: then it is row after row.
        if is_first or n_rows == 1 or n_new == 1:
            logits = self._run(self._bind(cache), *inputs)
        else:
            rows = (slice(row, row + 1) for row in range(n_rows))
            logits = torch.cat([self._run_rows(cache, row, inputs) for row in rows])
        return logits if n_last is None else logits[:, -n_last:]

    def generate(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **options
    ) -> torch.Tensor | Iterator[torch.Tensor]:
        """Continue prompts: see `generate` in inference/generate.py."""
        return generate(self, input_ids, pixel_values, **options)

    # The decoder.

    def _run(
        self,
        binding: onnxruntime.IOBinding,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """float[B, T, vocab_size]; keys and values go where `binding` says."""
        logits = embeddings.new_empty(*embeddings.shape[:2], self.config.vocab_size)
        inputs = {
            "inputs_embeds": embeddings.contiguous(),
            "attention_mask": attention_mask.contiguous(),
            "position_ids": position_ids.contiguous(),
        }
        for name, tensor in inputs.items():
            point_to(binding.bind_input, name, tensor)
        point_to(binding.bind_output, "logits", logits)
        try:
            self.decoder.run_with_iobinding(binding)
        except Exception as error:
            raise damaged(self.path, error) from error
        return logits

    def _run_rows(self, cache: KVCache, rows: slice, inputs: tuple) -> torch.Tensor:
        """The same for some rows of a batch."""
        layers = [tuple(part[rows] for part in layer) for layer in cache.layers]
        return self._run(self._bind_layers(layers), *(tensor[rows] for tensor in inputs))

    def _bind(self, cache: KVCache) -> onnxruntime.IOBinding:
        """A run on the memory of a cache; it is prepared once, that takes a tenth of a token."""
        layers, binding = self._bound.get(cache, (None, None))
        if layers is not cache.layers:
            binding = self._bind_layers(cache.layers)
            self._bound[cache] = cache.layers, binding
        return binding

    def _bind_layers(self, layers: list) -> onnxruntime.IOBinding:
        """A run that reads keys and values and writes the new ones behind them, without a copy.

        `layers` are those of a KVCache.
        """
        binding = self.decoder.io_binding()
        for number, layer in enumerate(layers):
            for kind, tensor in zip(KINDS, layer):
                point_to(binding.bind_input, f"past_key_values.{number}.{kind}", tensor)
                point_to(binding.bind_output, f"present.{number}.{kind}", tensor)
        return binding


def point_to(bind: Callable, name: str, tensor: torch.Tensor) -> None:
    """Bind an input or output of a graph to the memory of a tensor, which has to stay there."""
    bind(name, "cpu", 0, NUMPY_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    """Load a graph, for as many threads as PyTorch has. UserError where it is damaged."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = FATAL
    # An idle thread waits awake while a graph runs, and not for a moment longer.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # Its errors have no class in common but this one.
    except Exception as error:
        raise damaged(path, error) from error


def run_graph(
    graph: onnxruntime.InferenceSession, path: Path, shape: tuple[int, ...], **inputs: np.ndarray
) -> torch.Tensor:
    """The one output of a graph, float of that shape.

    UserError where it does not take these inputs, or gives another shape.
    """
    try:
        (output,) = graph.run(None, inputs)
    except Exception as error:
        raise damaged(path, error) from error
    if output.shape != shape:
        raise does_not_fit(path, f"{output.shape} instead of {shape}")
    return torch.from_numpy(output)


def does_not_fit(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} does not fit the config.json of its folder (see {what}): export the model again"
    )


def damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{path} cannot be used ({reason:.120}): export the model again")
