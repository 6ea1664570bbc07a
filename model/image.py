"""Open a picture, whatever its format, as upright RGB."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import BadSampleError

# 270 MB once decoded; a little under where Pillow begins to warn.
MAX_PIXELS = 89_000_000
# CLIP scales the shorter side to 224 pixels: a thinner picture would grow to hundreds of megabytes
# before its center is cut out.
MAX_ASPECT = 50

# Pillow only warns about a picture of too many pixels: as an error, `load_image` can refuse it.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def load_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """Open a picture as RGB, upright, the first frame of an animation.

    Args:
        source: anything Pillow reads: a path, an open file, or a picture that is open already.

    BadSampleError with the reason where it is missing, damaged, too large or too narrow.
    """
    try:
        # limits, before a pixel is decoded
        image = source if isinstance(source, Image.Image) else Image.open(source)
        width, height = image.size
        if width * height > MAX_PIXELS:
            limit = f"{MAX_PIXELS // 10**6} million pixels"
            raise BadSampleError("image too large", f"{width}x{height} is over {limit}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadSampleError("image too narrow", f"{width}x{height} is beyond {MAX_ASPECT}:1")

        # upright, as the camera noted it
        image = ImageOps.exif_transpose(image)

        # 16-bit gray is scaled to 8 bits: convert() would clip it at 255
        if image.mode.startswith(("I", "F")):
            gray = np.asarray(image, dtype=np.float32)
            scale = 257 if gray.max() > 255 else 1
            image = Image.fromarray((gray / scale).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except BadSampleError:
        raise
    except FileNotFoundError as error:
        raise BadSampleError("image missing", str(source)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError("image too large", str(source)) from error
    # what Pillow raises for damaged files
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        cause = "no picture" if isinstance(error, UnidentifiedImageError) else str(error)
        detail = f"{source} ({cause})" if isinstance(source, str | Path) else cause
        raise BadSampleError("image damaged", detail) from error
