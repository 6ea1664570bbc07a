"""Open a picture, whatever its format, as upright RGB."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import BadSampleError

MAX_PIXELS = 89_000_000  # 270 MB once decoded; a little under where Pillow begins to warn
MAX_ASPECT = (
    50  # a thinner picture would be scaled to hundreds of megabytes before the centre is cut out
)
warnings.filterwarnings(
    "error", category=Image.DecompressionBombWarning
)  # load_image makes it a reason


def load_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """Any picture Pillow reads as RGB, upright, the first frame of an animation; BadSampleError with the reason otherwise."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadSampleError(
                "image too large", f"{width}x{height} is over {MAX_PIXELS // 10**6} million pixels"
            )
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadSampleError("image too narrow", f"{width}x{height} is beyond {MAX_ASPECT}:1")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16-bit grey: convert() would clip at 255
            grey = np.asarray(image, dtype=np.float32)
            image = Image.fromarray(
                (grey / (257 if grey.max() > 255 else 1)).clip(0, 255).astype(np.uint8)
            )
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise BadSampleError("image missing", str(source)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError("image too large", str(source)) from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
    ) as error:  # what Pillow raises for damaged files
        if isinstance(error, BadSampleError):
            raise
        reason = "no picture" if isinstance(error, UnidentifiedImageError) else error
        raise BadSampleError(
            "image damaged",
            f"{source} ({reason})" if isinstance(source, str | Path) else str(reason),
        ) from error
