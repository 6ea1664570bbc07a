"""ONNX graphs for onnxruntime, and for transformers.js, whose layout and names they have.

    onnx/vision_encoder.onnx        pixel_values -> image_features, what the projector gives
    onnx/embed_tokens.onnx          input_ids -> inputs_embeds
    onnx/decoder_model_merged.onnx  inputs_embeds, attention_mask, past_key_values.* -> logits
    onnx/decoder_model_merged_quantized.onnx, _q4.onnx      the same with weights in int8, int4

Whoever runs them puts image_features in the place of the embeddings of `<image>`.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from onnx import TensorProto
from torch import nn

from inference.onnx_files import DECODER_NAMES, EMBEDDINGS_NAME, VISION_NAME
from model.image_processor import picture_side
from scripts.export.onnx_builder import OPSET, GraphBuilder
from scripts.export.onnx_decoder import build_decoder
from scripts.export.transformers_directory import write_small_files

if TYPE_CHECKING:
    from inference import VLM
    from model.model_vlm import MiniMindVLM
    from scripts.export.config import ExportConfig


def write(vlm: VLM, folder: Path, config: ExportConfig) -> None:
    """Write the graphs to `folder`/onnx, and beside it the small files that go with them."""
    write_graphs(vlm, folder / "onnx")
    if "transformers" not in config.formats:
        write_small_files(vlm, folder)


def write_graphs(vlm: VLM, folder: Path, dtypes: tuple[str, ...] = tuple(DECODER_NAMES)) -> None:
    """Write the three graphs, the decoder once for each dtype.

    Args:
        vlm: on the CPU, in float32.
        folder: is made if it is missing.
        dtypes: some of DECODER_NAMES.
    """
    folder.mkdir(parents=True, exist_ok=True)
    print("tracing the vision encoder for ONNX ...", flush=True)
    side = picture_side(vlm.processor.image_processor)
    trace_vision_encoder(vlm.model, side, folder / VISION_NAME)
    onnx.save(build_embeddings(vlm.model), folder / EMBEDDINGS_NAME)
    for dtype in dtypes:
        onnx.save(build_decoder(vlm.model, dtype), folder / DECODER_NAMES[dtype])


class ImageEncoder(nn.Module):
    """Vision encoder and projector in one."""

    def __init__(self, model: MiniMindVLM):
        super().__init__()
        self.vision_encoder, self.vision_proj = model.vision_encoder, model.vision_proj

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[k, 3, H, W] -> float[k, patches, dim]."""
        return self.vision_proj(self.vision_encoder(pixel_values))


def trace_vision_encoder(model: MiniMindVLM, side: int, path: Path) -> None:
    """Write vision encoder and projector, for any number of pictures of `side` x `side` pixels."""
    # Two pictures: a trace takes a size of 1 for one that never changes.
    pictures = torch.zeros(2, 3, side, side)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # What PyTorch says of its own parts is nothing for who exports a model.
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                ImageEncoder(model).eval(),
                (pictures,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=["image_features"],
                dynamic_shapes=({0: "n_images"},),
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    program.save(path)


def build_embeddings(model: MiniMindVLM) -> onnx.ModelProto:
    """input_ids int64[B, T] -> inputs_embeds float[B, T, dim].

    `<image>`, the id behind the vocabulary, has a row too: who runs the graph writes over it.
    """
    graph, weight = GraphBuilder(), model.tok_embeddings.weight
    shape = ["batch_size", "sequence_length"]
    graph.add_input("input_ids", TensorProto.INT64, shape)
    graph.add_output("inputs_embeds", TensorProto.FLOAT, [*shape, model.config.dim])
    rows = torch.cat((weight, weight.mean(dim=0, keepdim=True)))  # (vocab_size + 1, dim)
    table = graph.constant("tok_embeddings.weight", rows)
    graph.add("Gather", table, "input_ids", outputs="inputs_embeds")
    return graph.build()
