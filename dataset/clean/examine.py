"""What worker processes do: repair rows; decode, measure and shrink pictures.

What they find goes back to the main process as numbers, so that a million rows fit into memory.
"""

import io
import json
from collections import Counter
from functools import lru_cache
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from common.errors import BadSampleError
from common.files import hash_to_int, read_image_bytes
from common.text import simplify_answer
from dataset.clean.repair import check_answers, repair_conversation
from dataset.clean.settings import Settings
from dataset.image_names import normalize_name
from dataset.record_rows import RecordRows
from dataset.rows import open_rows
from model.image import load_image

THUMBNAIL = 8  # cells a side; tells colors apart
QUALITY = 92  # of the JPEG that a picture becomes
# A row: numbers of its images, its answers and their characters; hash of its answers.
ROW = np.dtype("i4, i4, i4, u8, ?")
ROW.names = "n_images", "n_answers", "length", "text", "is_rejected"
# A picture: hash of its file, perceptual hash, thumbnail, width and height, and the number of the
# reason why it cannot be used (0 if it can).
PICTURE = np.dtype(f"u8, u8, ({THUMBNAIL},{THUMBNAIL},3)u1, 2i4, i2")
PICTURE.names = "digest", "hash", "thumbnail", "size", "reason"


@lru_cache(maxsize=1)
def open_source(data: str, images: str | None) -> RecordRows:
    """The rows to clean, opened once in each process."""
    return open_rows(data, images)


def examine_rows(settings: Settings, keys: np.ndarray) -> tuple:
    """Repair and check the rows with these keys, int64[n].

    Returns ROW[n]; uint64[all images], equal for equal ones; uint64[all answers], their hashes;
    the repairs counted; lines of JSON, {"row", "images"} or {"reason", "detail"}.
    """
    source = open_source(settings.data, settings.images)
    rows, images, answers = np.zeros(len(keys), ROW), [], []
    repairs, lines = Counter(), []
    for number, key in enumerate(keys.tolist()):
        try:
            row = source.read(key)
            ids = source.check_images(row)
            names = [name_picture(*one) for one in zip(row.images, ids)]
            turns, repaired = repair_conversation(row.conversations, len(ids))
            texts = check_answers(turns, settings)
        except BadSampleError as error:
            rows["is_rejected"][number] = True
            lines.append({"reason": error.args[0], "detail": error.detail})
            continue
        lines.append({"row": row.other | {"conversations": turns}, "images": names})
        repairs.update([*row.repairs, *repaired])
        images += ids
        answers += map(hash_text, texts)
        length = sum(map(len, texts))
        rows[number] = (len(ids), len(texts), length, hash_text("\n".join(texts)), False)
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    return rows, np.array(images, np.uint64), np.array(answers, np.uint64), repairs, text


def name_picture(image: str | bytes, id_: int) -> str:
    """What a picture is called in the cleaned set: what its row calls it, if that is a name."""
    try:
        name = normalize_name(image) if isinstance(image, str) else f"{id_:016x}"
    except BadSampleError:
        # an absolute one, of a picture in its folder
        name = f"{id_:016x}"
    return name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"


def hash_text(text: str) -> int:
    """The same 64 bits for answers that are the same, see `simplify_answer`."""
    return hash_to_int(simplify_answer(text).encode())


def examine_pictures(settings: Settings, work: Path, places: np.ndarray) -> tuple:
    """Look at the pictures int64[k, 3]: number, key of a row, and which of its pictures it is.

    The JPEG of picture N goes to the file N in the folder `work`. Returns PICTURE[k], and why each
    one cannot be used, "" if it can; the details are in the file then.
    """
    source = open_source(settings.data, settings.images)
    pictures, reasons = np.zeros(len(places), PICTURE), []
    for picture, (number, key, which) in zip(pictures, places.tolist()):
        try:
            content = source.images(source.read(key))[which]
            content, reason = examine_picture(content, settings, picture), ""
        except BadSampleError as error:
            content, reason = error.detail[:200].encode("utf-8", "surrogatepass"), error.args[0]
        (work / str(number)).write_bytes(content)
        reasons.append(reason)
    return pictures, reasons


def examine_picture(source: Path | io.BytesIO, settings: Settings, picture: np.void) -> bytes:
    """The JPEG that a picture becomes. Its hashes and so on go into `picture`, a PICTURE."""
    encoded = read_image_bytes(source)
    image = load_image(io.BytesIO(encoded))
    short, long = sorted(image.size)
    for is_bad, reason in (
        (short < settings.min_side, "image too small"),
        (long > settings.max_aspect * short, "image too narrow"),
    ):
        if is_bad:
            raise BadSampleError(reason, f"{image.width}x{image.height} pixels")
    bits = np.packbits(imagehash.phash(image).hash).tobytes()
    picture["digest"], picture["hash"] = hash_to_int(encoded), int.from_bytes(bits, "little")
    cells = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    picture["thumbnail"], picture["size"] = np.asarray(cells), image.size
    return shrink(image, encoded, settings.size)


def shrink(image: Image.Image, encoded: bytes, size: int) -> bytes:
    """A JPEG of size x size pixels, or of the picture's own size if that is 0.

    A file that is one already stays as it is: each new JPEG loses a little.
    """
    is_right_size = size == 0 or image.size == (size, size)
    if is_right_size and encoded[:3] == b"\xff\xd8\xff":
        return encoded
    if not is_right_size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
