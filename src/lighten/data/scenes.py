"""One scene: cut-out objects at many scales on a ground made of other images; a pure function of its dice."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from lighten.data.boxes import NO_BOX
from lighten.data.cutout import cut_outs

VERSION = 1
"""Of what is made from the same dice: the cache holds scenes of one version."""
MOST, SMALLEST, LARGEST = 8, 24, 128
"""Objects of a scene at most, and pixels of an object's longer side."""
VISIBLE, OUTSIDE, TRIES, FULL = 0.85, 0.1, 12, 0.85
"""Least share of an object that others leave visible, share that the edge may cut, attempts to place one, and how much of
a scene the squares around its objects may add up to."""
CORNER = 10
"""Pixels of a source image's corner that count as ground."""
BICUBIC = Image.Resampling.BICUBIC

Dice = np.random.Generator


class Pieces(NamedTuple):
    """Source images of one split. `ground` are all of them, uint8 (n, 32, 32, 3); of those whose object was found:
    `pixels`, `masks` uint8 (m, 32, 32), `boxes` (m, 4) around the masks, and the rows of each class in `by_class`."""

    ground: np.ndarray
    pixels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    by_class: tuple[np.ndarray, ...]


def cut(pictures: np.ndarray, labels: np.ndarray) -> Pieces:
    """Objects of uint8 `pictures` (n, 32, 32, 3) with classes `labels` (n,), where they can be told from their ground."""
    masks, good = cut_outs(pictures)
    on = masks[good] > 0.5
    columns, rows = on.any(1), on.any(2)
    side = pictures.shape[1]
    boxes = np.stack(
        [columns.argmax(1), rows.argmax(1), side - columns[:, ::-1].argmax(1), side - rows[:, ::-1].argmax(1)], 1
    )
    kept = labels[good]
    by_class = tuple(np.flatnonzero(kept == c) for c in range(int(labels.max()) + 1))
    return Pieces(pictures, pictures[good], (masks[good] * 255).astype(np.uint8), boxes, by_class)


def scene(pieces: Pieces, size: int, dice: Dice) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (size, size, 3), and labels float32 (MOST, 6) with boxes tight around what is visible of each object."""
    canvas = ground(pieces.ground, size, dice)
    owner: np.ndarray = np.zeros((size, size), np.uint8)
    classes: list[int] = []
    areas: list[int] = []
    for side in _sides(size, dice):
        c = int(dice.integers(len(pieces.by_class)))
        colours, mask = _object(pieces, int(dice.choice(pieces.by_class[c])), side, dice)
        at = _place(owner, mask > 127, areas, dice)
        if at is not None:
            canvas.paste(colours, at, Image.fromarray(mask))
            classes.append(c)
    return np.asarray(_grained(canvas, dice)), _labels(owner, classes)


def _sides(size: int, dice: Dice) -> list[float]:
    """The longer sides of a scene's objects, the largest first, as many small ones as large ones on a scale of logarithms."""
    largest = LARGEST * max(1.0, size / 192)
    sides = np.exp(dice.uniform(math.log(SMALLEST), math.log(largest), int(dice.integers(1, MOST + 1))))
    fits = np.cumsum(sides**2) <= FULL * size**2
    fits[0] = True
    return sorted(sides[fits].tolist(), reverse=True)


def _labels(owner: np.ndarray, classes: list[int]) -> np.ndarray:
    rows = np.tile(NO_BOX, (MOST, 1))
    for k, c in enumerate(classes):
        mine = owner == k + 1
        x, y = np.flatnonzero(mine.any(0)), np.flatnonzero(mine.any(1))
        rows[k] = (c, x[0], y[0], x[-1] + 1, y[-1] + 1, 0)
    return rows


# --- objects ----------------------------------------------------------------------------------------


def _object(pieces: Pieces, k: int, side: float, dice: Dice) -> tuple[Image.Image, np.ndarray]:
    """The object and its mask, uint8 (H, W), the longer side `side` pixels: mirrored, bent, lit and tinted by chance."""
    x1, y1, x2, y2 = pieces.boxes[k].tolist()
    x1, y1, x2, y2 = max(0, x1 - 1), max(0, y1 - 1), min(32, x2 + 1), min(32, y2 + 1)
    scale, bend = side / max(x2 - x1, y2 - y1), math.exp(dice.uniform(-0.12, 0.12))
    wide, high = max(4, round((x2 - x1) * scale * bend)), max(4, round((y2 - y1) * scale / bend))
    turn = -1 if dice.random() < 0.5 else 1
    colours = _lit(pieces.pixels[k, y1:y2, x1:x2][:, ::turn], dice, 0.15).resize((wide, high), BICUBIC)
    mask = Image.fromarray(np.ascontiguousarray(pieces.masks[k, y1:y2, x1:x2][:, ::turn])).resize((wide, high), BICUBIC)
    # The edge of an enlarged mask stays about two pixels wide.
    steep = (np.asarray(mask, np.float32) - 127.5) * max(1.0, scale / 2) + 127.5
    return colours, np.clip(steep, 0, 255).astype(np.uint8)


def _place(owner: np.ndarray, solid: np.ndarray, areas: list[int], dice: Dice) -> tuple[int, int] | None:
    """Where an object hides no more of others than is allowed. `owner` then says which pixels are its own, and `areas`
    how many it has."""
    size, (high, wide), count = len(owner), solid.shape, len(areas)
    total = int(solid.sum())
    spare_x, spare_y = int(OUTSIDE * wide), int(OUTSIDE * high)
    for _ in range(TRIES if total else 0):
        x = int(dice.integers(-spare_x, size - wide + spare_x + 1))
        y = int(dice.integers(-spare_y, size - high + spare_y + 1))
        window = owner[max(0, y) : y + high, max(0, x) : x + wide]
        part = solid[max(0, -y) : max(0, -y) + window.shape[0], max(0, -x) : max(0, -x) + window.shape[1]]
        hidden = np.bincount(window[part], minlength=count + 1)
        shown = int(hidden.sum())
        # Against the whole object: what an earlier one hides was taken from `areas` already.
        if shown >= VISIBLE * total and all(hidden[k + 1] <= (1 - VISIBLE) * areas[k] for k in range(count)):
            window[part] = count + 1
            areas.append(shown)
            return x, y
    return None


def _lit(pixels: np.ndarray, dice: Dice, by: float) -> Image.Image:
    """Brightness, contrast and colour of uint8 (H, W, 3) changed by up to `by`."""
    bright, contrast, colour = 1 + dice.uniform(-by, by, 3).astype(np.float32)
    x: np.ndarray = pixels.astype(np.float32)
    grey = x.mean(2, keepdims=True)
    x = (grey - grey.mean()) * contrast + (x - grey) * (contrast * colour) + grey.mean()
    return Image.fromarray(np.clip(x * bright, 0, 255).astype(np.uint8))


# --- ground -----------------------------------------------------------------------------------------


def ground(pictures: np.ndarray, size: int, dice: Dice) -> Image.Image:
    """A ground without objects: the borders of one image drawn out to a wide gradient, with the texture of the corners of
    two others over it. Made at half the size: all of it is enlarged anyway."""
    n, half = len(pictures), (size + 1) // 2
    base = _drawn_out(pictures[int(dice.integers(n))], half, dice)
    for strength in (0.4, 0.25):
        texture = _woven(_corner(pictures[int(dice.integers(n))], dice), half, dice)
        base = Image.blend(base, texture, float(dice.uniform(0.1, strength)))
    return base.resize((size, size), BICUBIC)


def _drawn_out(picture: np.ndarray, size: int, dice: Dice) -> Image.Image:
    """Left and right border of an image, or upper and lower, two pixels each, blurred and stretched over the scene."""
    profile = np.concatenate([picture[:, :2], picture[:, -2:]], 1)
    if dice.random() < 0.3:
        profile = np.concatenate([picture[:2], picture[-2:]], 0).transpose(1, 0, 2)
    low = int(dice.integers(0, 12))
    strip = _lit(profile[low : low + 20], dice, 0.25).filter(ImageFilter.BoxBlur(1))
    return strip.resize((size, size), BICUBIC)


def _corner(picture: np.ndarray, dice: Dice) -> np.ndarray:
    y, x = ((0, 32 - CORNER)[int(dice.integers(2))] for _ in range(2))
    return picture[y : y + CORNER, x : x + CORNER]


def _woven(patch: np.ndarray, size: int, dice: Dice) -> Image.Image:
    """A patch continued without a seam, enlarged: to and fro over it on paths that wander, so that nothing repeats."""
    need = math.ceil(size / float(dice.uniform(1, 3)))
    y = _walk(need, dice, 0.1)[:, None] + _walk(need, dice, 0.5)
    x = _walk(need, dice, 0.1) + _walk(need, dice, 0.5)[:, None]
    return Image.fromarray(patch[_mirrored(y, len(patch)), _mirrored(x, len(patch))]).resize((size, size), BICUBIC)


def _walk(steps: int, dice: Dice, turn: float) -> np.ndarray:
    """Whole numbers, neighbours one apart, that turn about with that chance at each step."""
    return np.asarray(np.where(dice.random(steps) < turn, -1, 1).cumprod().cumsum() + int(dice.integers(64)))


def _mirrored(at: np.ndarray, length: int) -> np.ndarray:
    at = at % (2 * length - 2)
    return np.asarray(np.minimum(at, 2 * length - 2 - at))


@lru_cache(maxsize=1)
def _noise() -> Image.Image:
    values = np.random.default_rng(0).normal(128, 3, (512, 512, 3)).round()
    return Image.fromarray(values.astype(np.uint8))


def _grained(image: Image.Image, dice: Dice) -> Image.Image:
    """A little noise, as of a camera: enlarged pictures are smoother than any photograph."""
    y, x = (int(dice.integers(512 - image.width)) for _ in range(2))
    return ImageChops.add(image, _noise().crop((x, y, x + image.width, y + image.height)), 1.0, -128)
