"""A map over the patches of a picture, drawn on the picture."""

import numpy as np
import torch
from PIL import Image

# Of the picture under the map: how bright, and how gray, so that the colors are those of the map.
BRIGHTNESS, GRAYNESS = 0.45, 0.4
# How much of the picture the brightest color covers.
COVER = 0.9
# The brightest color stands for so many times the mean at least: a map of nearly equal numbers has
# no bright patch.
LEAST_PEAK = 10


def draw_map(pixels: torch.Tensor, heat: np.ndarray, top: float | None = None) -> Image.Image:
    """A picture as the model sees it, under the colors of a map.

    Args:
        pixels: uint8[3, H, W], see `VLMProcessor.denormalize`.
        heat: float[rows, cols]; what is below 0 counts as 0.
        top: the number that has the brightest color; `find_top` of this map if not given.

    Returns RGB, W x H.
    """
    from matplotlib import colormaps

    # the picture, dim
    picture = pixels.permute(1, 2, 0).numpy().astype(np.float32)  # (H, W, 3)
    gray = picture @ np.float32([0.299, 0.587, 0.114])  # (H, W)
    picture = BRIGHTNESS * ((1 - GRAYNESS) * picture + GRAYNESS * gray[..., None])

    # the map: each pixel has the number of its patch, 0 to 1
    (rows, cols), (height, width) = heat.shape, gray.shape
    top = find_top(heat) if top is None else top
    strength = np.clip(heat / max(top, 1e-30), 0, 1).astype(np.float32)
    row, col = np.arange(height) * rows // height, np.arange(width) * cols // width
    strength = strength[row][:, col]  # (H, W)

    # A perceptually uniform colormap, without its darkest colors: 0 is the picture alone.
    colors = 255 * colormaps["inferno"](0.15 + 0.85 * strength)[..., :3]  # (H, W, 3)
    cover = COVER * np.sqrt(strength)[..., None]  # (H, W, 1)
    mixed = (1 - cover) * picture + cover * colors
    return Image.fromarray(mixed.round().astype(np.uint8))


def find_top(heat: np.ndarray) -> float:
    """The number that has the brightest color, in one map or in several that are compared."""
    # Of few patches none can be much above the mean.
    peak = min(LEAST_PEAK, heat.size / 4)
    return max(float(heat.max()), peak * float(heat.clip(0).mean()))


def draw_picture(pixels: torch.Tensor) -> Image.Image:
    """The picture alone: uint8[3, H, W] -> RGB, W x H."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
