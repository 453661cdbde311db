"""Decoding: right pixels for every kind of file, and a named refusal for what is damaged or hostile."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lighten.data.images import FORMATS, open_image
from lighten.errors import BadImage

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(raw: bytes) -> np.ndarray:
    return np.asarray(open_image(raw))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_lossless_formats_give_back_their_pixels(kind: str) -> None:
    x = noise(9, 7, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(x), kind, **options)), x)


def test_jpeg_and_mpo_open() -> None:
    x = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    for raw in (encoded(x, "JPEG"), encoded(x, "MPO", save_all=True, append_images=[x])):
        assert abs(pixels(raw).astype(int) - 90).max() <= 2


SIXTEEN = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], np.uint16)
EIGHT = np.array([[0, 0, 1, 1], [128, 254, 255, 255]], np.uint8)  # SIXTEEN / 257, to the nearest, by hand


def test_16_bit_grey_png_is_scaled() -> None:
    image = open_image(encoded(Image.fromarray(SIXTEEN), "PNG"))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), EIGHT)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_16_bit_tiff_in_either_byte_order_and_as_mode_i(dtype: str) -> None:
    raw = encoded(Image.fromarray(SIXTEEN.astype(dtype)), "TIFF")
    with Image.open(io.BytesIO(raw)) as plain:
        assert plain.mode.startswith("I")
    np.testing.assert_array_equal(pixels(raw), EIGHT)


def test_16_bit_pgm_which_pillow_reads_as_mode_i() -> None:
    raw = b"P5\n4 2\n65535\n" + SIXTEEN.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(raw), EIGHT)


def test_cmyk_jpeg_as_pillow_converts_it() -> None:
    raw = encoded(Image.fromarray(noise(16, 16, 4), "CMYK"), "JPEG")
    image = open_image(raw)
    assert image.mode == "RGB"
    with Image.open(io.BytesIO(raw)) as plain:
        assert plain.mode == "CMYK"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(plain.convert("RGB")))


def test_palette_with_transparency_gives_the_palette_colours() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    raw = encoded(image, "PNG", transparency=0)
    np.testing.assert_array_equal(pixels(raw), [[[70, 80, 90], [10, 20, 30], [40, 50, 60]]])


@pytest.mark.parametrize(("mode", "channels"), [("LA", 2), ("RGBA", 4)])
def test_alpha_is_dropped(mode: str, channels: int) -> None:
    x = noise(5, 4, channels)
    wanted = x[..., 0] if mode == "LA" else x[..., :3]
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(x, mode), "PNG")), wanted)


def test_one_bit_becomes_black_and_white() -> None:
    bits = noise(5, 9) > 127
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(bits), "PNG")), np.where(bits, 255, 0))


UPRIGHT = {  # EXIF orientation: what makes the stored array upright, from the EXIF specification
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(Image.fromarray(noise(16, 24, 3)), kind, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(noise(16, 24, 3)), kind))))
    np.testing.assert_array_equal(pixels(raw), UPRIGHT[orientation](stored))


def test_odd_exif_does_not_cost_the_image() -> None:
    """A width of 1.5 beside the orientation: Pillow's own exif_transpose raises struct.error on it."""
    rows = struct.pack("<HHIf", 0x0100, 11, 1, 1.5) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + rows + bytes(4)
    image = open_image(encoded(Image.fromarray(noise(16, 24, 3)), "JPEG", exif=exif))
    assert image.size == (16, 24)  # turned: width and height exchanged


def test_only_the_first_frame_of_an_animation() -> None:
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    raw = encoded(red, "GIF", save_all=True, append_images=[blue])
    np.testing.assert_array_equal(pixels(raw), np.asarray(red))


# --- damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    raw = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    file = tmp_path / f"half.{kind.lower()}"
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadImage, match=f"half.{kind.lower()}"):
        open_image(file)


@pytest.mark.parametrize("content", [b"", b"this is a note, not a photo\n", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    with pytest.raises(BadImage, match=r"photo\.jpg"):
        open_image(file)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(BadImage, match=path.name):
            open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_random_damage_raises_nothing_but_bad_image(kind: str) -> None:
    whole, rng = encoded(Image.fromarray(noise(20, 24, 3)), kind), np.random.default_rng(1)
    for _ in range(60):
        raw = np.frombuffer(whole, np.uint8).copy()
        raw[rng.integers(0, min(len(raw), 300), 3)] = rng.integers(0, 256, 3)
        with contextlib.suppress(BadImage):
            assert open_image(raw.tobytes(), max_pixels=100_000).mode in ("L", "RGB")


# --- hostile ----------------------------------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(100))) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _gif_bomb() -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b";"


def _gif_frame_bomb() -> bytes:
    """A small screen with a frame that is far larger than it."""
    palette = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6)
    return palette + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\x00;"


def _tiff_bomb() -> bytes:
    tags = [
        (256, 60_000),
        (257, 60_000),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 60_000),
        (279, 1),
    ]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + table + bytes(4)


def _bmp_bomb() -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


@pytest.mark.parametrize("bomb", [_png_bomb, _gif_bomb, _gif_frame_bomb, _tiff_bomb, _bmp_bomb])
def test_bombs_are_refused_from_their_header(bomb: Any, tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb())
    assert file.stat().st_size < 1000
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(BadImage, match=r"bomb\.png") as caught:
        open_image(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - start < 1.0
    assert peak < 5_000_000
    if bomb is not _gif_bomb:  # that one has no frame, so Pillow may refuse it first
        assert "its header claims" in str(caught.value)


def test_the_limit_itself_is_allowed() -> None:
    raw = encoded(Image.new("L", (30, 20)), "PNG")
    assert open_image(raw, max_pixels=600).size == (30, 20)
    with pytest.raises(BadImage, match="30 x 20"):
        open_image(raw, max_pixels=599)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("raw", [SVG, EPS], ids=["svg", "eps"])
def test_formats_that_carry_programs_are_not_accepted(raw: bytes) -> None:
    with pytest.raises(BadImage, match="known format"):
        open_image(raw)
    assert not {"EPS", "PDF", "WMF"} & set(FORMATS)


def test_pixels_without_an_agreed_range_are_refused() -> None:
    floats = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    wide = Image.fromarray(np.array([[0, 70_000]], np.int32))
    for image in (floats, wide):
        with pytest.raises(BadImage, match="no agreed range"):
            open_image(encoded(image, "TIFF"))
