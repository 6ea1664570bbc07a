"""Quantized weights for decoding on a CPU.

A token costs one pass over all weights, and reading them from memory is what takes the time. So
half the bytes make it nearly twice as fast.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.LMConfig import VLMConfig
from model.model_lm import MiniMindLM
from model.model_vlm import MiniMindVLM

# Up to this number of rows a product takes as long as reading the weights.
FEW_ROWS = 8


class WeightOnlyLinear(nn.Module):
    """A frozen linear layer without bias whose weights are float16, or int8 with scales.

    A few rows (decoding) go through torch's kernel for the dtype; for many rows (a prompt) the
    weights are turned into floats again.

    Args:
        linear: the layer whose weights are quantized.
        dtype: "float16" or "int8"; int8 has one scale for each output.
    """

    def __init__(self, linear: nn.Linear, dtype: str):
        super().__init__()
        weight = linear.weight.detach()
        self.dtype = dtype
        if dtype == "float16":
            scale = torch.ones(len(weight), 1)
            quantized = weight.half()
        else:
            # A row of zeros has no scale of its own.
            scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127  # (out, 1)
            quantized = (weight / scale).round().to(torch.int8)
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("kernel_scale", scale[:, 0].bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float[..., in] -> float[..., out]."""
        # a prompt
        if x[..., 0].numel() > FEW_ROWS:
            return F.linear(x, self.quantized.to(x.dtype) * self.scale.to(x.dtype))
        # a new token of each row
        if self.dtype == "float16":
            return F.linear(x.half(), self.quantized).to(x.dtype)
        rows = x.flatten(0, -2).bfloat16()  # (rows, in)
        product = torch._weight_int8pack_mm(rows, self.quantized, self.kernel_scale)  # (rows, out)
        return product.to(x.dtype).view(*x.shape[:-1], -1)  # (..., out)


def quantize(model: MiniMindLM, dtype: str) -> None:
    """Replace the linear layers of the language model, and its output head.

    Args:
        model: is changed in place; vision encoder, embeddings and norms stay as they are.
        dtype: "float16" or "int8"; "float32" changes nothing.
    """
    if dtype == "float32":
        return
    for module in list(model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, WeightOnlyLinear(child, dtype))
    # The embeddings keep the float weights that the head shared with them.
    model.output = WeightOnlyLinear(model.output, dtype)


def count_weights(config: VLMConfig) -> int:
    """Number of weights of a model, however they are stored, without the vision encoder."""
    with torch.device("meta"):
        model = MiniMindVLM(config)
    # The output head does not count: its weights are the embeddings.
    return sum(weight.numel() for weight in model.parameters())
