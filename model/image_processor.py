"""How pictures are prepared for a vision encoder: what preprocessor_config.json beside it says.

What it asks for is done by the image processor of transformers that it names, in the variant that
needs Pillow and NumPy only: CLIP scales the shorter side and cuts out the middle, SigLIP squashes
the picture to a square, EfficientNet divides by the deviation twice, and so on. Every number of
the file is checked before, and no other class than those below is ever made.

From then on a picture is bytes, resized, until `normalize_pixels` (vision.py) makes floats of it;
`pixel_statistics` says how. Both steps together are what the image processor does in one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import UserError
from common.numbers import check_number
from model.files import read_json

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

# By the beginning of the name in the file, which goes on ImageProcessor(Fast) or FeatureExtractor.
PROCESSORS = {
    "CLIP": "CLIPImageProcessorPil",
    "Siglip": "SiglipImageProcessorPil",
    "Bit": "BitImageProcessorPil",
    "ViT": "ViTImageProcessorPil",
    "DeiT": "DeiTImageProcessorPil",
    "ConvNext": "ConvNextImageProcessorPil",
    "EfficientNet": "EfficientNetImageProcessorPil",
    "MobileNetV2": "MobileNetV2ImageProcessorPil",
    # It has no such variant, and ViT's does the same: squash to a square, bilinear. DINOv3's own
    # keeps fractions of a byte from resizing, here they are rounded: by one byte at most.
    "DINOv3ViT": "ViTImageProcessorPil",
}
# What a class has other than the one it is made by.
DEFAULTS = {"DINOv3ViT": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}}
_SUFFIX = re.compile(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$")
FLAGS = ("do_center_crop", "do_rescale", "do_normalize", "rescale_offset", "include_top")
LARGEST_SIDE = 4096


def load_image_processor(
    folder: Path, default: str, image_size: int | None = None
) -> BaseImageProcessor:
    """The image processor that a folder describes.

    Args:
        folder: with preprocessor_config.json, or processor_config.json.
        default: one of PROCESSORS, where the file names none.
        image_size: pixels that the vision encoder takes; None: of any size.

    UserError where its file is missing, damaged or asks for what cannot be.
    """
    # transformers 5 may write the second of them
    place = "preprocessor_config.json"
    if (folder / place).is_file():
        facts = read_json(folder / place)
    else:
        place = "processor_config.json"
        facts = read_json(folder / place).get("image_processor")
    if not isinstance(facts, dict):
        raise UserError(f"{place} describes no image_processor")
    facts = {name: value for name, value in facts.items() if value is not None}

    # its class
    kind = facts.get("image_processor_type") or facts.get("feature_extractor_type") or default
    kind = _SUFFIX.sub("", kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in PROCESSORS:
        raise UserError(
            f"image_processor_type in {place} is {kind!r:.40}: here it is one of "
            f"{', '.join(PROCESSORS)}"
        )
    import transformers

    processor_class = getattr(transformers, PROCESSORS[kind])

    # its numbers
    # Some words are understood by one class only.
    for name in ("rescale_offset", "include_top", "crop_pct"):
        if not hasattr(processor_class, name):
            facts.pop(name, None)
    chosen = DEFAULTS.get(kind, {}) | _choose(facts, place, processor_class.default_to_square)
    image_processor = processor_class(**chosen)
    _check_pictures(image_processor, place, image_size)
    return image_processor


def _choose(facts: dict, place: str, is_square: bool) -> dict[str, object]:
    """What the file says, checked.

    Args:
        facts: the file, without what is null or not for this class.
        place: its name.
        is_square: a size of one number is both sides, not the shorter one.
    """
    # what is done
    for name, needed in (("do_resize", True), ("do_pad", False)):
        if facts.get(name, needed) is not needed:
            raise UserError(f"{name} in {place} is {facts[name]!r:.40}: it has to be {needed}")
    chosen: dict[str, object] = {name: facts[name] for name in FLAGS if name in facts}
    for name, flag in chosen.items():
        if not isinstance(flag, bool):
            raise UserError(f"{name} in {place} is {flag!r:.40}: it has to be true or false")

    # sizes
    if "size" in facts:
        chosen["size"] = _read_size(facts["size"], f"size in {place}", is_square)
    if "crop_size" in facts:
        chosen["crop_size"] = _read_size(facts["crop_size"], f"crop_size in {place}", True)

    # numbers: bytes become 0 to 1, or 0 to 2 before an offset
    bounds = {"rescale_factor": (0.0039, 0.008), "crop_pct": (0.1, 1), "resample": (0, 5)}
    for name, (least, most) in bounds.items():
        if name in facts:
            check_number(f"{name} in {place}", facts[name], least, most, name == "resample")
            chosen[name] = facts[name]

    # colors: pixels are divided by the deviation
    for name, least in (("image_mean", -10), ("image_std", 0.001)):
        if name in facts:
            chosen[name] = _read_colors(facts[name], f"{name} in {place}", least)
    return chosen


def _read_size(value: object, place: str, is_square: bool) -> dict[str, int]:
    """{"shortest_edge": 224} of that, {"height": 224, "width": 224} of that; of 224 either."""
    names = ("height", "width") if is_square else ("shortest_edge",)
    sides = value if isinstance(value, dict) else dict.fromkeys(names, value)
    if sides.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise UserError(
            f"{place} is {value!r:.80}: it has to have shortest_edge, or height and width"
        )
    for side in sides.values():
        check_number(place, side, 1, LARGEST_SIDE, is_whole=True)
    return sides


def _read_colors(value: object, place: str, least: float) -> list[float]:
    """A number for each of three colors."""
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(f"{place} is {value!r:.80}: it has to be a list of three numbers")
    for number in value:
        check_number(place, number, least, 10)
    return value


def _check_pictures(
    image_processor: BaseImageProcessor, place: str, image_size: int | None
) -> None:
    """UserError unless all pictures come out as squares of one size: a wide one is tried."""
    side, size = picture_side(image_processor), image_processor.size
    if image_processor.do_center_crop:
        least = min(value for _, value in size)
        if least < side:
            raise UserError(f"size in {place} is {least}, less than the crop of {side}")
    wide = np.zeros((16, 24, 3), dtype=np.uint8)
    _, height, width = image_processor(wide, return_tensors="np")["pixel_values"][0].shape
    if not height == width == side:
        raise UserError(
            f"pictures come out of {place} as {width} x {height}: they have to be squares of one "
            "size, by height and width alike, or by a crop"
        )
    if image_size not in (None, side):
        raise UserError(
            f"pictures come out of {place} with {side} pixels, but the vision encoder takes "
            f"{image_size}"
        )


def picture_side(image_processor: BaseImageProcessor) -> int:
    """Pixels of a side of the squares that an image processor makes."""
    # Some have a crop_size that is not used.
    if getattr(image_processor, "do_center_crop", True) and image_processor.crop_size:
        return image_processor.crop_size["height"]
    size = image_processor.size
    return size["height"] or size["shortest_edge"]


def resize_picture(image_processor: BaseImageProcessor, image) -> torch.Tensor:
    """uint8[3, H, W] of an RGB picture: what is done to it up to where bytes become floats."""
    later = ("do_rescale", "do_normalize", "include_top")
    skipped = {name: False for name in later if hasattr(image_processor, name)}
    resized = image_processor(image, return_tensors="pt", **skipped)
    return resized["pixel_values"][0].to(torch.uint8)


def pixel_statistics(image_processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std), float32[3, 1, 1] each: floats are (bytes / 255 - mean) / std.

    Whatever an image processor does from there on (scale, shift, one or two divisions) is of that
    form; CLIP's are its image_mean and image_std.
    """
    # floats are (factor * bytes - shift) / scale
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    shift = np.zeros(3)
    scale = np.ones(3)
    if image_processor.do_rescale and getattr(image_processor, "rescale_offset", False):
        shift = shift + 1
    if image_processor.do_normalize:
        shift = shift + image_processor.image_mean
        scale = scale * image_processor.image_std
    if getattr(image_processor, "include_top", False):
        scale = scale * image_processor.image_std

    # in units of 255 bytes
    per_unit = factor * 255
    mean, std = (torch.tensor(each / per_unit).float().view(3, 1, 1) for each in (shift, scale))
    return mean, std
