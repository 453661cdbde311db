"""Image files are hostile until checked: limits are read from the header, then the pixels are decoded right."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lighten.errors import BadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""Pillow's names. MPO (two JPEGs in one file) comes in through JPEG and has no entry of its own."""
MAX_PIXELS = 64_000_000
"""About a 64-megapixel photo; a bigger header is refused before a byte of it is decoded."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by its EXIF orientation."""
DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    MemoryError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders were seen to raise on damaged files (500,000 of them, mutated at random), and their kin."""

Image.MAX_IMAGE_PIXELS = None  # our own limit below is stricter, raises, and names the file


def open_image(source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright 8-bit RGB or L image. Only the first frame of an animation.

    EXIF rotation is applied, 16-bit grey is scaled (Pillow alone would clip it to white), CMYK and palettes become
    RGB. Raises BadImage, naming the file, where it is no image, too large, or truncated.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError as e:
        raise BadImage(f"{name}: not an image of a known format.", f"Formats: {', '.join(FORMATS)}.") from e
    except DAMAGE as e:
        raise BadImage(f"{name}: cannot be opened ({e}).", "Check the path and the file.") from e
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(
                f"{name}: its header claims {width} x {height} pixels, over the limit of {max_pixels:,}.",
                "Scale the image down first; it was not decoded.",
            )
        try:
            image.load()
            return eight_bit(_upright(image))
        except DAMAGE as e:
            raise BadImage(f"{name}: damaged or truncated ({e}).", "Remove it or fetch it again.") from e


def _upright(image: Image.Image) -> Image.Image:
    """Pillow's own exif_transpose also writes the EXIF anew, and fails where only that is damaged."""
    try:
        turn = TURNS.get(image.getexif().get(0x0112, 1))
    except DAMAGE:
        return image
    return image if turn is None else image.transpose(turn)


def eight_bit(image: Image.Image) -> Image.Image:
    """RGB or L. Raises ValueError where pixel values have no agreed range."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError("32-bit integer pixels have no agreed range")
        # A plain "I" image holds 16-bit values in the formats allowed here; 65535 / 257 is exactly 255.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8), "L")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode in ("LA", "La"):
        return image.convert("LA").getchannel("L")
    return image if image.mode == "RGB" else image.convert("RGB")
