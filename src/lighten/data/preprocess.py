"""From an image to the network's input, in numpy and Pillow alone: the same code here and on the device."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lighten.types import Preprocess

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_pixels(image: Image.Image | np.ndarray, how: Preprocess) -> np.ndarray:
    """Scale, crop and order the channels: uint8 array of shape (height, width, channels).

    `image` is a Pillow image, or a uint8 array (H, W) or (H, W, 1 or 3) in RGB order.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    image = image.convert("L" if how.channel_order == "GRAY" else "RGB")
    if how.mode == "stretch":
        image = _resize(image, how.width, how.height, how)
    else:
        width, height = image.size
        short = how.resize or min(how.height, how.width)
        # torchvision's and timm's rule: the long side is truncated, not rounded.
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = _crop(_resize(image, *size, how), how)
    pixels = np.asarray(image, np.uint8)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(pixels[..., ::-1]) if how.channel_order == "BGR" else pixels


def normalize(pixels: np.ndarray, how: Preprocess) -> np.ndarray:
    """uint8 (N, H, W, C) to float32 (N, C, H, W): (pixel / 255 - mean) / std."""
    mean, std = (np.asarray(v, np.float32) for v in (how.mean, how.std))
    scaled = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))


def _resize(image: Image.Image, width: int, height: int, how: Preprocess) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), FILTERS[how.interpolation])


def _crop(image: Image.Image, how: Preprocess) -> Image.Image:
    left, top = round((image.width - how.width) / 2.0), round((image.height - how.height) / 2.0)
    return image.crop((left, top, left + how.width, top + how.height))


def describe(how: Preprocess | None) -> str:
    """One line a person can check."""
    if how is None:
        return "none: images arrive as ready network inputs"
    scale = f"scale to {how.width}x{how.height}"
    if how.mode == "crop":
        scale = f"shorter side to {how.resize}, centre crop {how.width}x{how.height}"
    numbers = ", ".join(f"{m:g}" for m in how.mean) + " / " + ", ".join(f"{s:g}" for s in how.std)
    where = ", inside the file" if how.inside else ""
    return f"{how.channel_order}, {scale} ({how.interpolation}), /255, mean / std {numbers}{where} ({how.source})"
