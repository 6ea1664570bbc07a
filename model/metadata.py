"""Picture files without their metadata, of which only the orientation is of use.

A camera's EXIF, a color profile or a comment may be damaged while all pixels are good, and a
decoder that reads them would refuse the picture.
"""

import re
import struct
import zlib

# EXIF: the tag of the orientation, and how the numbers are written that it may be.
ORIENTATION = 0x0112
NUMBER_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
# The two segments of a JPEG beside the pixels that say what its colors are, if they are whole.
COLOR_SEGMENT = re.compile(rb"\xff\xe0..JFIF\0.{9}|\xff\xee..Adobe.{7}", re.DOTALL)
# The entry for EXIF in the list of what an AVIF file holds, which is at its start.
AVIF_EXIF = re.compile(rb"(infe.{8})Exif", re.DOTALL)
HEAD_BYTES = 2**16


def strip_metadata(encoded: bytes) -> tuple[bytes, bytes]:
    """(what makes the pixels of a picture file, EXIF of a JPEG or PNG or b"").

    Formats whose metadata Pillow hands on unread stay as they are.
    """
    if encoded.startswith(b"\xff\xd8\xff"):
        return _strip_jpeg(encoded)
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return _strip_png(encoded)
    if encoded[4:8] == b"ftyp":
        # An AVIF file says its orientation outside of EXIF, which gets a type that nothing reads.
        return AVIF_EXIF.sub(rb"\1skip", encoded[:HEAD_BYTES]) + encoded[HEAD_BYTES:], b""
    return encoded, b""


def _strip_jpeg(encoded: bytes) -> tuple[bytes, bytes]:
    """Without its segments APP0 to APP15 and comments."""
    kept, exif, at = [encoded[:2]], b"", 2
    while re.match(rb"\xff[^\xda]", encoded[at : at + 2], re.DOTALL):
        # a segment: its marker, the length of the rest
        if encoded[at + 1] == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        segment, at = encoded[at:end], end

        is_metadata = 0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE
        if not is_metadata or COLOR_SEGMENT.match(segment):
            kept.append(segment)
        elif segment[1] == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[10:]
    return b"".join([*kept, encoded[at:]]), exif


def _strip_png(encoded: bytes) -> tuple[bytes, bytes]:
    """With its critical chunks, whose names begin with a capital, and transparency only."""
    kept, exif, at = [encoded[:8]], b"", 8
    depth, color = encoded[24:26].ljust(2, b"\0")
    while at < len(encoded):
        end = at + 12 + int.from_bytes(encoded[at : at + 4], "big")
        name, chunk, at = encoded[at + 4 : at + 8], encoded[at:end], end
        if name == b"tRNS" and (color, depth) in ((0, 2), (0, 4), (2, 16)):
            chunk = _scale_transparency(chunk[8:-4], depth)
        if name[:1].isupper() or name == b"tRNS":
            kept.append(chunk)
        elif name == b"eXIf":
            exif = chunk[8:-4]
        if name == b"IEND":
            break
    return b"".join(kept), exif


def _scale_transparency(values: bytes, depth: int) -> bytes:
    """The chunk for the color that is transparent, as Pillow needs it: of 8 bits, as its pixels."""
    values = values[: len(values) // 2 * 2]
    numbers = [number for (number,) in struct.iter_unpack(">H", values)]
    numbers = [number >> 8 if depth == 16 else number * 255 // (2**depth - 1) for number in numbers]
    chunk = b"tRNS" + b"".join((number & 0xFFFF).to_bytes(2, "big") for number in numbers)
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


def find_orientation(exif: bytes) -> int:
    """The orientation in EXIF, 1 (upright) to 8; 1 where there is none or it makes no sense.

    What else is in it is not looked at, nor how many numbers the entry claims to have.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * n_entries, 12):
            tag, number_type = struct.unpack_from(f"{order}HH", tiff, at)
            if tag == ORIENTATION and number_type in NUMBER_TYPES:
                (value,) = struct.unpack_from(order + NUMBER_TYPES[number_type], tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        # EXIF that ends too early
        pass
    return 1
