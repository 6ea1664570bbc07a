"""Open a picture, whatever its format, as upright RGB.

Its way, in which each step may end with a BadSampleError:

    read_image_bytes    at most 64 MB, of a regular file
    strip_metadata      what makes the pixels, and EXIF for its orientation
    Pillow              at most 89 million pixels, fewer of a huge picture
    _shrink, _convert   8 bits, laid on white
    TURNS               upright
"""

import io
import logging
import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.errors import BadSampleError
from common.files import read_image_bytes
from model.metadata import find_orientation, strip_metadata

# 356 MB once decoded; a little under where Pillow begins to warn.
MAX_PIXELS = 89_000_000
# A picture of more pixels is shrunk while it is decoded, or each worker of a loader would hold
# 100 MB and more of it. Fewer, as in most photographs, stay exactly as CLIP's processor has them.
LARGE = 25_000_000
# The shorter side to which it is shrunk at most: CLIP takes 224 pixels of it.
LARGE_SIDE = 1024
# CLIP scales the shorter side to 224 pixels: a thinner picture would grow to hundreds of megabytes
# before its center is cut out.
MAX_ASPECT = 50

# What Pillow may take a file for, tried in this order. Others are rare, or run a program (EPS).
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "PPM", "ICO", "DDS", "PSD"),
    *("QOI", "SGI", "PCX", "TGA"),
)
CONVERT, FETCH = "convert it to JPEG or PNG", "fetch it again"
# How files begin that are often named .jpg, the reason why they are refused, and what to do.
OTHER_FILES = (
    (rb".{4}ftyp(hei|hev|mif1|msf1)(?!.{,40}avi[fs])", "HEIC is not supported", CONVERT),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL is not supported", CONVERT),
    (rb"(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*)?<(!DOCTYPE )?svg", "SVG is not supported", CONVERT),
    (rb"\s*%PDF-", "PDF is not supported", CONVERT),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript is not supported", CONVERT),
    (rb".{4}ftyp(iso|mp4|M4V|qt|3g)|\x1aE\xdf\xa3", "video is not supported", "take a frame of it"),
    (rb"(\xef\xbb\xbf)?\s*<(!DOCTYPE html|html|head|\?xml)", "image is a web page", FETCH),
    (rb"version https://git-lfs", "image is a Git LFS pointer", "run `git lfs pull`"),
)
# Bytes that are looked at for them; a comment may come first.
HEAD = 4096
# What brings a picture of each orientation upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow tells of all that it skips, and only warns of too many pixels.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def load_image(
    source: str | Path | BinaryIO | Image.Image, max_side: int | None = None
) -> Image.Image:
    """Open a picture as RGB, upright, on white where it is transparent, an animation's first frame.

    A file that was cut off is damaged; broken metadata beside good pixels is not looked at.

    Args:
        source: a path, an open file, or a picture that is open already.
        max_side: the longer side is shrunk to at most so many pixels, while decoding if it can be.

    BadSampleError with the reason where it is missing, no picture, damaged, too large or narrow.
    """
    is_open = isinstance(source, Image.Image)
    encoded = b"" if is_open else read_image_bytes(source)
    try:
        # limits, before a pixel is decoded
        pixels, exif = strip_metadata(encoded)
        image = source if is_open else Image.open(io.BytesIO(pixels), formats=FORMATS)
        _check_size(*image.size)

        # shrunk while decoding: JPEG can, of other formats a band is made RGB at a time
        if (factor := _choose_factor(image.size, max_side)) > 1:
            image.draft(None, (image.width // factor, image.height // factor))
            factor = _choose_factor(image.size, max_side)
        image.load()
        _check_size(*image.size)
        rgb = _shrink(image, factor)
        if max_side:
            rgb.thumbnail((max_side, max_side))

        # upright, as the camera noted it
        turn = TURNS.get(find_orientation(exif or image.info.get("exif") or b""))
        return rgb if turn is None else rgb.transpose(turn)
    except (BadSampleError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError("image too large", _name(source, str(error))) from error
    # Pillow raises nearly anything for damaged files: struct.error, TypeError, RuntimeError, ...
    except Exception as error:
        for start, reason, advice in OTHER_FILES:
            if re.match(start, encoded[:HEAD], re.DOTALL | re.IGNORECASE):
                raise BadSampleError(reason, _name(source, advice)) from error
        cause = "no picture" if encoded else "the file is empty"
        cause = cause if isinstance(error, UnidentifiedImageError) else f"{error!s:.200}"
        raise BadSampleError("image damaged", _name(source, cause)) from error


def _name(source: object, text: str) -> str:
    return f"{source}: {text}" if isinstance(source, str | os.PathLike) else text


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS // 10**6} million pixels"
        raise BadSampleError("image too large", f"{width}x{height} is over {limit}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSampleError("image too narrow", f"{width}x{height} is beyond {MAX_ASPECT}:1")


def _choose_factor(size: tuple[int, int], max_side: int | None) -> int:
    """How many times shorter the sides of a picture may become, a whole number."""
    if max_side:
        return max(1, max(size) // max_side)
    return max(1, min(size) // LARGE_SIDE) if size[0] * size[1] > LARGE else 1


def _shrink(image: Image.Image, factor: int) -> Image.Image:
    """RGB, each pixel the mean of factor x factor pixels."""
    scale = _find_scale(image)
    if factor == 1:
        return _convert(image, scale)

    # band after band: the whole is never held twice
    rgb = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    step = 64 * factor
    for top in range(0, image.height, step):
        band = image.crop((0, top, image.width, min(top + step, image.height)))
        rgb.paste(_convert(band, scale).reduce(factor), (0, top // factor))
    return rgb


def _find_scale(image: Image.Image) -> float:
    """What divides the pixels, so that they are 0 to 255: convert() would clip deeper ones."""
    if not image.mode.startswith(("I", "F")):
        return 1
    largest = np.nan_to_num(np.asarray(image)).max()
    if largest > 255:
        return 257
    # floats may be shares of white
    return 1 / 255 if image.mode == "F" and largest <= 1 else 1


def _convert(image: Image.Image, scale: float) -> Image.Image:
    """RGB of 8 bits, laid on white. `scale` divides pixels of more bits."""
    if image.mode.startswith(("I", "F")):
        gray = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if isinstance(image.info.get("transparency"), int):
            gray[gray == image.info["transparency"]] = 255 * scale
        return Image.fromarray((gray / scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")
