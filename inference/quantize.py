"""Smaller weights for decoding on a CPU: a token costs one pass over all weights, so bytes are time."""

import torch
import torch.nn.functional as F
from torch import nn

from model.model_lm import MiniMindLM

FEW_ROWS = 8  # up to here a product is bound by reading the weights


class WeightOnlyLinear(nn.Module):
    """A frozen linear layer without bias in `float16`, or in `int8` with one scale for each output.

    A few rows (decoding) go through torch's kernel for the format; many (a prompt) through the weights made float again.
    """

    def __init__(self, linear: nn.Linear, dtype: str):
        super().__init__()
        weight = linear.weight.detach()
        self.dtype = dtype
        if dtype == "float16":
            scale = torch.ones(len(weight), 1)
            quantized = weight.half()
        else:
            scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127  # (out, 1)
            quantized = (weight / scale).round().to(torch.int8)
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("kernel_scale", scale[:, 0].bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[..., 0].numel() > FEW_ROWS:
            return F.linear(x, self.quantized.to(x.dtype) * self.scale.to(x.dtype))
        if self.dtype == "float16":
            return F.linear(x.half(), self.quantized).to(x.dtype)
        product = torch._weight_int8pack_mm(
            x.flatten(0, -2).bfloat16(), self.quantized, self.kernel_scale
        )  # (rows, out)
        return product.to(x.dtype).view(*x.shape[:-1], -1)


def count_weights(model: MiniMindLM) -> int:
    """Learned numbers, in whatever dtype they are kept, without the vision encoder. The head is the embeddings."""
    return sum(
        tensor.numel()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not name.startswith(("vision_encoder.", "output."))
        and name.endswith(("weight", "bias", "quantized"))
    )


def quantize(model: MiniMindLM, dtype: str) -> None:
    """Keep the linear layers of the language model, and its head, in `dtype`: float16 or int8 (float32 leaves them alone)."""
    if dtype == "float32":
        return
    for module in list(model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, WeightOnlyLinear(child, dtype))
    model.output = WeightOnlyLinear(model.output, dtype)
