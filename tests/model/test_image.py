"""Pictures as people have them: good pixels load whatever is beside them; the rest is named."""

import io
import os
import socket
import struct
import zlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor

from common import files
from common.errors import BadSampleError
from model import image as image_module
from model.image import load_image
from model.metadata import find_orientation, strip_metadata
from tests.helpers import SHARED, needs_shared, picture

TROUBLE = SHARED / "trouble"
# Outside of pytest, which forgets them for each test, model/image.py has its own filters.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def load(content: bytes, **options) -> np.ndarray:
    image = load_image(io.BytesIO(content), **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def exif(orientation: int) -> bytes:
    one = Image.Exif()
    one[0x0112] = orientation
    return one.tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# --- files of ../shared/trouble ---


def cases(folder: str) -> list:
    return sorted(path.name for path in (TROUBLE / folder).glob("*")) or ["none"]


@needs_shared
@pytest.mark.parametrize("name", cases("01/imgs"))
def test_photographs_with_odd_metadata(name):
    """All show the same scene as plain.jpg, 128 x 96."""
    path = TROUBLE / "01/imgs" / name
    if name in ("jpg_cut.jpg", "jpg_missing_last_bytes.jpg"):
        with pytest.raises(BadSampleError, match="image damaged"):
            load_image(path)
        return
    image, plain = load_image(path), load_image(TROUBLE / "01/imgs/plain.jpg")
    if name.startswith("orient6_"):
        assert image.size == (96, 128)
        image = image.transpose(Image.Transpose.ROTATE_90)
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(plain))
    assert image.size == (128, 96) and difference.mean() < (0.01 if name[-3:] == "jpg" else 4)


@needs_shared
@pytest.mark.parametrize("name", cases("01/crash"))
def test_files_for_which_pillow_raises_anything(name):
    """Three have good pixels beside broken EXIF, which says that they are to be turned."""
    path = TROUBLE / "01/crash" / name
    if name in ("AttributeError_jpg_9", "TypeError_cmyk_4", "TypeError_jpg_17"):
        assert load_image(path).size == (48, 64)
    else:
        with pytest.raises(BadSampleError, match="image damaged"):
            load_image(path)


@needs_shared
def test_a_set_with_one_bad_picture():
    found = {}
    for path in (TROUBLE / "01/set").iterdir():
        try:
            found[path.name] = load_image(path).size
        except BadSampleError as error:
            found[path.name] = error.args[0]
    assert found == {f"ok{n}.jpg": (96, 96) for n in range(6)} | {
        "a.jpg": (128, 96),
        "phone.jpg": (96, 128),
        "phone2.jpg": (48, 64),
        "broken.avif": "image damaged",
    }


@needs_shared
@pytest.mark.parametrize("name", cases("02/set"))
def test_transparent_pictures_are_laid_on_white(name):
    """A corner is transparent, so white; not all of the picture is."""
    pixels = np.asarray(load_image(TROUBLE / "02/set" / name))
    assert pixels.shape == (128, 128, 3) and (pixels[0, 0] == 255).all() and pixels.min() < 128
    with Image.open(TROUBLE / "02/set" / name) as image:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    assert (pixels[alpha == 0] == 255).all()


# --- metadata ---


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE]),
            st.sampled_from(
                [
                    b"",
                    b"Exif\0\0",
                    b"ICC_PROFILE\0",
                    b"MPF\0",
                    b"Photoshop 3.0\0",
                    b"Adobe",
                    b"JFIF\0",
                ]
            ),
            st.binary(max_size=8),
        ),
        max_size=4,
    )
)
def test_no_segment_beside_a_jpegs_pixels_matters(segments):
    plain, broken = encode(picture(), "JPEG"), bytearray(b"\xff\xd8")
    for marker, name, data in segments:
        data = name + data[: 8 if name != b"Adobe" else 4]
        broken += bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data
    assert (load(bytes(broken + plain[2:])) == load(plain)).all()


@given(
    st.sampled_from(
        [b"eXIf", b"iTXt", b"zTXt", b"tEXt", b"iCCP", b"pHYs", b"gAMA", b"cHRM", b"acTL"]
    ),
    st.binary(max_size=20),
    st.booleans(),
    st.booleans(),
)
def test_no_chunk_beside_a_pngs_pixels_matters(name, data, is_whole, is_first):
    plain = encode(picture(), "PNG")
    broken = chunk(name, data)
    if not is_whole:
        broken = broken[:-4] + b"\0\0\0\0"
    at = 33 if is_first else len(plain) - 12  # behind the header, or before the end
    assert (load(plain[:at] + broken + plain[at:]) == load(plain)).all()


def test_broken_exif_in_webp_and_avif():
    for format in ("WEBP", "AVIF"):
        whole = encode(picture(), format, exif=exif(6))
        at = max(whole.rfind(b"MM\0*"), whole.rfind(b"II*\0"))
        broken = whole[:at] + b"?" * 8 + whole[at + 8 :]
        assert sorted(load(broken).shape) == sorted(load(whole).shape)
        assert load(whole).shape == (64, 56, 3)
    assert load(broken).shape == (64, 56, 3), "AVIF says its orientation elsewhere too"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_as_pillow_has_it(format, orientation):
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(picture(), format, exif=exif(orientation), **options)
    with Image.open(io.BytesIO(content)) as image:
        expected = ImageOps.exif_transpose(image.convert("RGB") if format != "TIFF" else image)
        assert (load(content) == np.asarray(expected.convert("RGB"))).all()
    assert (np.asarray(load_image(Image.open(io.BytesIO(content)))) == load(content)).all()


@pytest.mark.parametrize("order", "<>")
def test_orientation_is_read_however_it_is_written(order):
    def write(number_type: int, count: int, value: bytes, n_entries: int = 1) -> bytes:
        start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
        entry = struct.pack(f"{order}HHHI", n_entries, 0x0112, number_type, count)
        return start + entry + value.ljust(4, b"\0")

    for number_type, letter in {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}.items():
        for count in (0, 1, 2**32 - 1):
            value = struct.pack(order + letter, 6)
            assert find_orientation(write(number_type, count, value)) == 6
            assert find_orientation(b"Exif\0\0" + write(number_type, count, value, 500)) == 6
    assert find_orientation(write(2, 2, b"6\0")) == 1, "a text"
    assert find_orientation(write(5, 1, b"\0\0\0\1")) == 1, "a fraction"
    assert find_orientation(write(3, 1, struct.pack(f"{order}H", 99))) == 1
    assert find_orientation(write(3, 1, b"")[:15]) == 1 == find_orientation(b"")


@given(st.binary(max_size=100), st.sampled_from([b"", b"II*\0", b"MM\0*", b"Exif\0\0II*\0"]))
def test_any_bytes_have_an_orientation(content, start):
    assert 1 <= find_orientation(start + content) <= 8


@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\0\0\0 ftyp", b""]), st.binary())
def test_any_bytes_can_be_stripped(start, content):
    stripped, _ = strip_metadata(start + content)
    assert len(stripped) <= len(start + content) + 8


# --- pixels ---


def transparent_png(color: int, depth: int, pixel: bytes, transparency: bytes) -> bytes:
    """A PNG of one pixel whose color is the transparent one."""
    header = struct.pack(">IIBBBBB", 1, 1, depth, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(48))) if color == 3 else b""
    chunks = chunk(b"IHDR", header) + palette + chunk(b"tRNS", transparency)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + pixel))
    return b"\x89PNG\r\n\x1a\n" + chunks + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("color", "depth", "pixel", "transparency"),
    [
        (0, 1, b"\0", b"\0\0"), (0, 2, b"\x80", b"\0\2"),
        (0, 4, b"\x50", b"\0\5"), (0, 8, b"\5", b"\0\5"), (0, 16, b"\5\6", b"\5\6"),
        (2, 8, b"\1\2\3", b"\0\1\0\2\0\3"), (2, 16, b"\1\2\3\4\5\6", b"\1\2\3\4\5\6"),
        (3, 2, b"\x80", b"\xff\xff\0"), (3, 8, b"\2", b"\xff\xff\0"), (3, 8, b"\2", b"\7\7\0"),
    ],
)  # fmt: skip
def test_the_transparent_color_of_a_png_is_white(color, depth, pixel, transparency):
    assert (load(transparent_png(color, depth, pixel, transparency)) == 255).all()
    others = b"\0\0\xff"
    if color != 3:  # another number of two bytes
        others = bytes(byte ^ (n % 2 or depth == 16) for n, byte in enumerate(transparency))
    assert (load(transparent_png(color, depth, pixel, others)) < 255).all()


@given(st.sampled_from(["PNG", "WEBP", "TIFF"]), st.integers(0, 255), st.integers(0, 255))
def test_pixels_are_mixed_with_white_as_their_alpha_says(format, value, alpha):
    image = Image.new("RGBA", (2, 2), (value, 40, 0, alpha))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    expected = [round((one * alpha + 255 * (255 - alpha)) / 255) for one in (value, 40, 0)]
    assert (np.abs(load(encode(image, format, **options))[0, 0] - np.array(expected)) <= 1).all()


def test_the_first_frame_of_an_animation():
    for format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "lime")]
        content = encode(frames[0], format, save_all=True, append_images=frames[1:])
        red, _, blue = load(content)[9, 9]
        assert red > 200 and blue < 50, format


def test_pixels_of_more_bits_are_scaled_and_never_clipped():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for content in (
        encode(Image.fromarray(ramp.astype(np.uint16)), "PNG"),
        encode(Image.fromarray(ramp.astype(np.uint16)), "TIFF"),
        encode(Image.fromarray(ramp.astype(np.int32)), "TIFF"),
        encode(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
        # floats as shares of white
        encode(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"),
    ):
        assert np.abs(load(content)[..., 0] - ramp / 257).max() <= 1
    dark = np.where(ramp < 30_000, np.nan, 100).astype(np.float32)
    assert set(np.unique(load(encode(Image.fromarray(dark), "TIFF")))) == {0, 100}


# --- sizes ---


def test_ordinary_pictures_reach_the_model_as_clips_own_processor_has_them():
    image = picture(3, (640, 400))
    for format in ("JPEG", "PNG"):
        content = encode(image, format)
        with Image.open(io.BytesIO(content)) as plain:
            expected = CLIPImageProcessor()(plain, return_tensors="np")["pixel_values"]
        found = CLIPImageProcessor()(load_image(io.BytesIO(content)), return_tensors="np")
        assert np.array_equal(found["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA", "I;16", "1", "CMYK"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_huge_pictures_are_shrunk_while_they_are_decoded(monkeypatch, mode, format):
    if (mode in ("P", "RGBA", "I;16") and format == "JPEG") or (mode, format) == ("CMYK", "PNG"):
        pytest.skip(f"no {format} has {mode}")
    monkeypatch.setattr(image_module, "LARGE", 100_000)
    monkeypatch.setattr(image_module, "LARGE_SIDE", 60)
    gray = np.tile(np.linspace(0, 255, 800), (600, 1))
    image = Image.fromarray(gray.astype(np.uint8))
    wide = np.tile(np.linspace(0, 65535, 800), (600, 1)).astype(np.uint16)
    image = Image.fromarray(wide) if mode == "I;16" else image.convert(mode)
    content = encode(image, format, exif=exif(6)) if format == "JPEG" else encode(image, format)
    pixels = load(content)
    if format == "JPEG":
        pixels = np.rot90(pixels)
    height, width, _ = pixels.shape
    assert 60 <= height <= 120 and width == round(height * 4 / 3), "the shorter side is kept"
    expected = np.linspace(0, 255, width)
    assert np.abs(pixels.mean(axis=(0, 2)) - expected).mean() < 6, "and what the picture shows"


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200))
def test_a_longest_side_is_kept(width, height, max_side):
    if max(width, height) > image_module.MAX_ASPECT * min(width, height):
        return
    image = load_image(Image.new("RGB", (width, height), "red"), max_side=max_side)
    if max(width, height) <= max_side:
        assert image.size == (width, height)
    else:
        assert max(image.size) == max_side
    assert image.getpixel((0, 0))[0] >= 254


def test_a_picture_of_88_million_pixels_becomes_small():
    content = encode(Image.new("1", (9400, 9400), 1), "PNG")
    assert len(content) < 100_000
    assert load_image(io.BytesIO(content), max_side=500).size == (500, 500)
    assert load_image(io.BytesIO(content)).size == (1045, 1045)


def test_too_many_pixels_or_too_few_on_one_side():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(BadSampleError, match="image too large"):
        load(huge)
    with pytest.raises(BadSampleError, match="image too large: 9500x9500 is over 89 million"):
        load(encode(Image.new("1", (9500, 9500)), "PNG"))
    with pytest.raises(BadSampleError, match="image too narrow: 2000x10"):
        load(encode(Image.new("L", (2000, 10)), "PNG"))


# --- what is no picture ---


def box(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(40)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (box(b"heic"), "HEIC is not supported"),
        (box(b"mif1"), "HEIC is not supported"),
        (box(b"avif"), "image damaged"),
        (b"\xff\x0a" + bytes(20), "JPEG XL is not supported"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "JPEG XL is not supported"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<svg width="9"></svg>', "SVG is not supported"),
        (b"\xef\xbb\xbf <svg></svg>", "SVG is not supported"),
        (b"<?xml version='1.0'?><!--" + b"x" * 900 + b"--><svg>", "SVG is not supported"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "image is a web page"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF is not supported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript is not supported"),
        (box(b"isom"), "video is not supported"),
        (b"<html>404</html>", "image is a web page"),
        (b"\n <!DOCTYPE html>\n<html>", "image is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "image is a Git LFS pointer"),
        (b"", "image damaged"),
        (b"text", "image damaged"),
        (encode(picture(), "JPEG")[:1000], "image damaged"),
        (encode(picture(), "PNG")[:1000], "image damaged"),
    ],
)
def test_the_reason_names_what_a_file_is(content, reason, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(BadSampleError) as from_bytes:
        load(content)
    with pytest.raises(BadSampleError) as from_path:
        load_image(path)
    assert from_bytes.value.args[0] == reason == from_path.value.args[0]
    assert str(path) in from_path.value.detail and "\n" not in str(from_path.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO in a folder")
def test_only_regular_files_are_read_and_at_once(tmp_path, monkeypatch):
    """A FIFO that nobody writes to would be waited for without an end."""
    os.mkfifo(tmp_path / "fifo.jpg")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "real.jpg").write_bytes(encode(picture(), "JPEG"))
    (tmp_path / "link.jpg").symlink_to("real.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert load_image(tmp_path / "link.jpg").size == (64, 56)
    for name, reason in {
        "fifo.jpg": "image is no file",
        "socket.jpg": "image is no file",
        "folder.jpg": "image is no file",
        "device.jpg": "image is no file",
        "gone.jpg": "image missing",
        "real.jpg/a.jpg": "image missing",
        "loop.jpg": "image cannot be read",
        "a" * 300: "image missing",
        "a\0.jpg": "image missing",
    }.items():
        for read in (load_image, files.read_image_bytes):
            with pytest.raises(BadSampleError) as error:
                read(str(tmp_path / name))
            assert error.value.args[0] == reason, name


def test_a_file_is_never_read_beyond_the_limit(tmp_path, monkeypatch):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(3 * 2**30)
    for source in (tmp_path / "sparse.png", open(tmp_path / "sparse.png", "rb")):
        with pytest.raises(BadSampleError, match="image too large: .*it has over 64 MB"):
            load_image(source)
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(BadSampleError, match="image too large"):
        load(encode(picture(), "JPEG"))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_no_memory_and_ctrl_c_are_no_bad_picture(monkeypatch, error):
    def stop(*args, **options):
        raise error

    monkeypatch.setattr(Image, "open", stop)
    with pytest.raises(error):
        load(b"x")


# --- any bytes ---


@cache
def samples() -> list[bytes]:
    """Small pictures of the formats that people have, in several modes."""
    image, turned = picture(2, (40, 32)), {"exif": exif(6)}
    deep = Image.fromarray(np.arange(1280).reshape(32, 40).astype(np.uint16) * 50)
    frames = {"save_all": True, "append_images": [image.convert("L")]}
    return [
        encode(image, "JPEG", **turned),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG", **turned),
        encode(image, "PNG", **turned),
        encode(image.convert("P"), "PNG", transparency=3),
        encode(deep, "PNG"),
        encode(image, "WEBP", **turned),
        encode(image.convert("RGBA"), "WEBP", lossless=True),
        encode(image, "GIF", **frames),
        encode(image, "TIFF", **turned),
        encode(image, "TIFF", compression="tiff_lzw"),
        encode(deep, "TIFF"),
        encode(image, "AVIF", **turned),
        encode(image, "BMP"),
        encode(image.convert("P"), "BMP"),
        encode(image, "DDS"),
        encode(image.convert("RGBA"), "DDS", pixel_format="DXT5"),
        encode(image, "ICO"),
        encode(image, "JPEG2000"),
    ]


def change(content: bytes, code: bytes) -> bytes:
    """A file with some bytes set, put in, taken out, or cut off there, as four bytes say."""
    far, near, kind, value = code
    # headers are at the start: half of the changes are there
    at = (near if kind & 1 else far * 256 + near) % (len(content) + 1)
    data = (bytes([value]), b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4))[kind >> 1 & 3]
    keep = (len(data), len(data), len(data), 0, value)[(kind >> 3) % 5]
    return content[:at] + (b"" if kind > 250 else data + content[at + keep :])


@settings(max_examples=4000, deadline=None)
@given(st.integers(0, 18), st.lists(st.binary(min_size=4, max_size=4), min_size=1, max_size=4))
def test_any_changed_file_is_a_picture_or_a_bad_sample(processor, which, codes):
    content = samples()[which]
    for code in codes:
        content = change(content, code)
    try:
        pixels = processor.resize(io.BytesIO(content))
    except BadSampleError as error:
        assert error.args[0].startswith("image ") or "is not supported" in error.args[0]
        return
    assert pixels.shape == (3, 48, 48)
