"""How patch features are stored: 16 bits a number, or 8 bits and a scale for each group of them."""

import math
from dataclasses import dataclass

import torch

# Channels of one patch that share a scale: few channels are many times larger than the others.
GROUP = 32


@dataclass(frozen=True)
class FeatureFormat:
    """Packs features of pictures into slots of equal size.

    Args:
        shape: (patches, vision_dim) of a picture.
        dtype: bfloat16 or float16, in which features come out of `unpack`.
        is_int8: store bytes and a float16 scale for each group of channels.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    is_int8: bool = False

    @property
    def name(self) -> str:
        """Part of the cache's folder name: what is packed differently is kept apart."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"int8-{dtype}" if self.is_int8 else dtype

    @property
    def n_groups(self) -> int:
        """Of a patch."""
        return self.shape[1] // math.gcd(self.shape[1], GROUP)

    @property
    def slot_bytes(self) -> int:
        """Of one picture."""
        patches, dim = self.shape
        return patches * (dim + 2 * self.n_groups) if self.is_int8 else 2 * patches * dim

    def pack(self, features: torch.Tensor) -> torch.Tensor:
        """float[k, patches, vision_dim] -> uint8[k, slot_bytes], on the same device."""
        if not self.is_int8:
            return features.to(self.dtype).contiguous().view(torch.uint8).flatten(1)
        groups = features.float().reshape(len(features), -1, self.shape[1] // self.n_groups)
        scales = (groups.abs().amax(2, keepdim=True) / 127).half()
        # A group of zeros has scale 0.
        codes = (groups / scales.float().clamp(min=1e-9)).round().clamp(-127, 127).to(torch.int8)
        parts = (part.contiguous().view(torch.uint8).flatten(1) for part in (scales, codes))
        return torch.cat([*parts], dim=1)

    def unpack(self, slots: torch.Tensor) -> torch.Tensor:
        """uint8[k, slot_bytes] -> dtype[k, patches, vision_dim], on the same device."""
        if not self.is_int8:
            return slots.view(self.dtype).view(-1, *self.shape)
        n_scale_bytes = 2 * self.shape[0] * self.n_groups
        scales, codes = slots[:, :n_scale_bytes], slots[:, n_scale_bytes:]
        # A copy begins where a number of two bytes may begin.
        scales = scales.clone(memory_format=torch.contiguous_format)
        scales = scales.view(torch.float16).unsqueeze(2).float()
        codes = codes.contiguous().view(torch.int8).view(len(slots), scales.shape[1], -1)
        return (codes * scales).to(self.dtype).view(-1, *self.shape)
