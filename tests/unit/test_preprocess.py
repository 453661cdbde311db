"""Preprocessing gives the pixels torchvision gives, bit for bit, and its settings are checked at birth."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lighten.data.preprocess import describe, frame_of, normalize, to_pixels
from lighten.types import Preprocess

transforms = pytest.importorskip("torchvision.transforms")

SIZES = [(64, 64), (61, 37), (37, 61), (300, 41), (41, 300), (9, 7), (20, 24), (33, 25), (500, 333)]
CROP = Preprocess(24, 24, "crop", 28)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, shape, np.uint8))


def torchvision_pixels(image: Image.Image, how: Preprocess) -> np.ndarray:
    filters = {"nearest": "NEAREST", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS"}
    mode = transforms.InterpolationMode[filters[how.interpolation]]
    size = (how.height, how.width)
    if how.mode == "stretch":
        return np.asarray(transforms.Resize(size, mode)(image))
    return np.asarray(transforms.Compose([transforms.Resize(how.resize, mode), transforms.CenterCrop(size)])(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_crop_is_torchvisions_resize_and_center_crop(size: tuple[int, int], interpolation: str) -> None:
    how = dataclasses.replace(CROP, interpolation=interpolation)
    np.testing.assert_array_equal(to_pixels(picture(*size), how), torchvision_pixels(picture(*size), how))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("height", "width", "resize"), [(24, 24, 24), (23, 23, 28), (20, 27, 28), (27, 20, 31)])
def test_odd_and_oblong_crops(size: tuple[int, int], height: int, width: int, resize: int) -> None:
    how = Preprocess(height, width, "crop", resize)
    assert to_pixels(picture(*size), how).shape == (height, width, 3)
    np.testing.assert_array_equal(to_pixels(picture(*size), how), torchvision_pixels(picture(*size), how))


@pytest.mark.parametrize("size", SIZES)
def test_stretch_is_torchvisions_resize_to_both_sides(size: tuple[int, int]) -> None:
    how = Preprocess(24, 32)
    np.testing.assert_array_equal(to_pixels(picture(*size), how), torchvision_pixels(picture(*size), how))


def test_the_whole_way_to_the_network_input() -> None:
    image = picture(50, 40)
    mean, std = CROP.mean, CROP.std
    steps = [transforms.Resize(28), transforms.CenterCrop(24), transforms.ToTensor(), transforms.Normalize(mean, std)]
    ours = normalize(to_pixels(image, CROP)[None], CROP)
    np.testing.assert_allclose(ours[0], transforms.Compose(steps)(image).numpy(), rtol=1e-6, atol=1e-6)


def test_normalize_against_double_precision() -> None:
    how = Preprocess(3, 5, mean=(0.1, 0.5, 0.9), std=(0.2, 1.0, 3.0))
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), np.uint8)
    got = normalize(x, how)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    want = ((x / 255.0 - [0.1, 0.5, 0.9]) / [0.2, 1.0, 3.0]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bgr_is_rgb_with_the_channels_turned() -> None:
    rgb = to_pixels(picture(50, 40), CROP)
    bgr = to_pixels(picture(50, 40), dataclasses.replace(CROP, channel_order="BGR"))
    np.testing.assert_array_equal(bgr[..., [2, 1, 0]], rgb)
    assert bgr.flags.c_contiguous


def test_gray_is_pillows_luma() -> None:
    how = Preprocess(40, 50, channel_order="GRAY", mean=(0.5,), std=(0.5,))
    image = picture(50, 40)
    got = to_pixels(image, how)
    assert got.shape == (40, 50, 1)
    luma = np.asarray(image, float) @ [0.299, 0.587, 0.114]  # ITU-R 601-2
    assert np.abs(got[..., 0] - luma).max() <= 1
    assert normalize(got[None], how).shape == (1, 1, 40, 50)


def test_a_grey_image_for_a_colour_model_has_three_equal_channels() -> None:
    got = to_pixels(picture(24, 24, "L"), Preprocess(24, 24))
    np.testing.assert_array_equal(got, np.asarray(picture(24, 24, "L"))[..., None].repeat(3, 2))


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 3)])
def test_arrays_are_taken_as_images(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = Image.fromarray(x.reshape(30, 40) if x.size == 1200 else x)
    np.testing.assert_array_equal(to_pixels(x, CROP), to_pixels(image, CROP))


def test_the_right_size_passes_untouched() -> None:
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(to_pixels(x, Preprocess(32, 32)), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 0}, "height and width"),
        ({"width": 9000}, "height and width"),
        ({"mode": "squash"}, "mode must be"),
        ({"mode": "crop"}, "resize is needed"),
        ({"mode": "crop", "resize": 20}, "must cover the crop"),
        ({"interpolation": "area"}, "interpolation must be"),
        ({"channel_order": "RBG"}, "channel_order must be"),
        ({"mean": (0.5,)}, "need 3 values"),
        ({"channel_order": "GRAY"}, "need 1 values"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "finite"),
    ],
)
def test_nonsense_is_refused_at_birth(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"height": 24, "width": 24, **settings})


def test_describe_names_what_matters() -> None:
    line = describe(Preprocess(224, 192, "crop", 256, "bicubic", "BGR"))
    assert all(word in line for word in ("BGR", "256", "192x224", "bicubic", "0.485", "0.229"))
    assert "ready" in describe(None)


def test_a_letterboxed_image_keeps_its_aspect_and_is_filled_with_grey() -> None:
    """200 x 100 into 64 x 48: 64 x 32, eight grey rows above and below."""
    image = np.full((100, 200, 3), (10, 20, 30), np.uint8)
    got = to_pixels(image, Preprocess(48, 64, "letterbox"))
    assert got.shape == (48, 64, 3)
    assert (got[8:40] == (10, 20, 30)).all()
    assert (got[:8] == 114).all()
    assert (got[40:] == 114).all()


@pytest.mark.parametrize("size", [(200, 100), (90, 301), (64, 48), (31, 17)])
@pytest.mark.parametrize(
    "how", [Preprocess(48, 64), Preprocess(48, 64, "letterbox"), Preprocess(48, 40, "crop", resize=60)]
)
def test_the_frame_says_where_a_point_of_the_image_lies_in_the_input(size: tuple[int, int], how: Preprocess) -> None:
    """A bright block is found where its box is mapped to, by the pixels themselves."""
    width, height = size
    box = (0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height)
    left, top, right, bottom = (round(v) for v in box)
    image = np.zeros((height, width, 3), np.uint8)
    image[top:bottom, left:right] = 255
    frame = frame_of(width, height, how)
    want = [left * frame.scale_x + frame.left, top * frame.scale_y + frame.top]
    want += [right * frame.scale_x + frame.left, bottom * frame.scale_y + frame.top]
    bright = to_pixels(image, how)[..., 0] > 140
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    got = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(got, np.clip(want, 0, [how.width, how.height] * 2), atol=1.0)
