"""One picture: decoded for real, measured, given a fingerprint, and made as small as training needs it."""

import io
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from common.errors import BadSampleError
from common.files import hash_to_int, read_image_bytes
from dataset.clean.repair import Limits
from model.image import load_image

THUMBNAIL = 8  # cells a side: what tells pictures of one pattern but other colours apart
QUALITY = 92  # of the JPEG that a changed picture becomes


@dataclass
class Examined:
    """What is kept of a picture. With a `reason` it cannot be used, and all else is empty."""

    reason: str = ""
    detail: str = ""
    digest: int = 0  # of its file, 64 bits
    hash: int = 0  # perceptual hash, 64 bits
    thumbnail: np.ndarray | None = None  # uint8[8, 8, 3]
    size: tuple[int, int] = (0, 0)  # pixels, as it came
    encoded: bytes = b""  # a JPEG; the very file where nothing had to change


def examine_image(source: Path | io.BytesIO, limits: Limits, size: int) -> Examined:
    """Look at a picture; `size`: pixels of the square it becomes, 0 to leave it as it is."""
    try:
        encoded = read_image_bytes(source)
        image = load_image(io.BytesIO(encoded))
        check_size(image, limits)
    except BadSampleError as error:
        return Examined(error.args[0], error.detail)
    return Examined(
        digest=hash_to_int(encoded),
        hash=int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "little"),
        thumbnail=np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)),
        size=image.size,
        encoded=shrink(image, encoded, size),
    )


def check_size(image: Image.Image, limits: Limits) -> None:
    short, long = sorted(image.size)
    if short < limits.min_side:
        raise BadSampleError("image too small", f"{image.width}x{image.height} pixels")
    if long > limits.max_aspect * short:
        raise BadSampleError("image too narrow", f"{image.width}x{image.height} pixels")


def shrink(image: Image.Image, encoded: bytes, size: int) -> bytes:
    """The picture as a JPEG of size x size pixels; its own bytes where it is one already (each new JPEG loses a little)."""
    is_plain_jpeg = encoded[:3] == b"\xff\xd8\xff"
    if is_plain_jpeg and (size == 0 or image.size == (size, size)):
        return encoded
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
