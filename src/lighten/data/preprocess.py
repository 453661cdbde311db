"""From an image to the network's input, in numpy and Pillow alone: the same code here and on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lighten.types import Preprocess

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


GREY = 114
"""What letterboxed images are filled with, as YOLO's are."""


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the network's input, in pixels: x there = x in the image * scale_x + left, likewise y."""

    scale_x: float
    scale_y: float
    left: int
    top: int


def frame_of(width: int, height: int, how: Preprocess) -> Frame:
    """The frame of an image of `width` x `height`."""
    across, down = scaled(width, height, how)
    return Frame(across / width, down / height, *offset(width, height, how))


def scaled(width: int, height: int, how: Preprocess) -> tuple[int, int]:
    """Width and height of an image after scaling, before cropping or filling."""
    if how.mode == "stretch":
        return how.width, how.height
    if how.mode == "letterbox":
        ratio = min(how.width / width, how.height / height)
        return max(1, round(width * ratio)), max(1, round(height * ratio))
    short = how.resize or min(how.height, how.width)
    # torchvision's and timm's rule: the long side is truncated, not rounded.
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def offset(width: int, height: int, how: Preprocess) -> tuple[int, int]:
    """Left and top of the scaled image in the input; negative where it is cropped."""
    across, down = scaled(width, height, how)
    if how.mode == "letterbox":
        return (how.width - across) // 2, (how.height - down) // 2
    return -round((across - how.width) / 2.0), -round((down - how.height) / 2.0)


def to_pixels(image: Image.Image | np.ndarray, how: Preprocess) -> np.ndarray:
    """Scale, crop and order the channels: uint8 array of shape (height, width, channels).

    `image` is a Pillow image, or a uint8 array (H, W) or (H, W, 1 or 3) in RGB order.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    image = image.convert("L" if how.channel_order == "GRAY" else "RGB")
    (width, height), (left, top) = scaled(*image.size, how), offset(*image.size, how)
    image = image if image.size == (width, height) else image.resize((width, height), FILTERS[how.interpolation])
    if how.mode == "letterbox":
        whole = Image.new(image.mode, (how.width, how.height), (GREY,) * len(image.getbands()))
        whole.paste(image, (left, top))
        image = whole
    elif how.mode == "crop":
        image = image.crop((-left, -top, how.width - left, how.height - top))
    pixels = np.asarray(image, np.uint8)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(pixels[..., ::-1]) if how.channel_order == "BGR" else pixels


def normalize(pixels: np.ndarray, how: Preprocess) -> np.ndarray:
    """uint8 (N, H, W, C) to float32 (N, C, H, W): (pixel / 255 - mean) / std."""
    mean, std = (np.asarray(v, np.float32) for v in (how.mean, how.std))
    scaled = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))


def describe(how: Preprocess | None) -> str:
    """One line a person can check."""
    if how is None:
        return "none: images arrive as ready network inputs"
    scale = f"scale to {how.width}x{how.height}"
    if how.mode == "letterbox":
        scale = f"fit into {how.width}x{how.height}, the rest grey"
    if how.mode == "crop":
        scale = f"shorter side to {how.resize}, centre crop {how.width}x{how.height}"
    numbers = ", ".join(f"{m:g}" for m in how.mean) + " / " + ", ".join(f"{s:g}" for s in how.std)
    where = ", inside the file" if how.inside else ""
    return f"{how.channel_order}, {scale} ({how.interpolation}), /255, mean / std {numbers}{where} ({how.source})"
