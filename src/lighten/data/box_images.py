"""Images with boxes, on disk or in memory: labels in pixels, moved into the network's input, and balanced splits of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lighten.data.doctor import Finding
from lighten.data.preprocess import frame_of
from lighten.data.splits import ArrayImages, FileImages
from lighten.errors import BadData
from lighten.types import Data, Preprocess

MAX_BOXES, MAX_TABLE = 2_000, 2_000_000_000
"""Boxes of one image, and bytes of all labels: they are padded to the image that has most."""
NOTHING = 1e-4
"""Pixels; a box that is narrower after cutting is gone."""
BLOCK = 4096
"""Images whose boxes are moved at once: COCO's are padded to 93 each."""
NO_BOX = np.array([-1, 0, 0, 0, 0, 0], np.float32)


class Boxed(Protocol):
    """Images whose labels are boxes, which can be moved into the network's input."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def how(self) -> Preprocess | None: ...

    def read(self, i: int) -> Image.Image | np.ndarray: ...

    def name(self, i: int) -> str: ...

    def in_frame(self, how: Preprocess) -> Boxed: ...


@dataclass(frozen=True)
class BoxImages(FileImages):
    """Images on disk with boxes. `labels` float32 (N, M, 6): class, x1, y1, x2, y2, ignore, class -1 where there is no
    box; `sizes` (N, 2) width and height of the upright images. Boxes are in pixels of the image or, once `in_frame`
    was called, of the network's input as `how` makes it. `findings` are what reading found."""

    sizes: np.ndarray
    how: Preprocess | None = None
    findings: tuple[Finding, ...] = ()

    def in_frame(self, how: Preprocess) -> BoxImages:
        """The same images with boxes where `how` puts them. Raises ValueError where they lie in another frame."""
        return self if how == self.how else dataclasses.replace(self, labels=_moved(self, how), how=how)


@dataclass(frozen=True)
class BoxArrays(ArrayImages):
    """Images in memory or mapped from a file, uint8 (N, H, W, C), with boxes as `BoxImages` has them."""

    how: Preprocess | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Width and height of each, (N, 2)."""
        return np.tile(np.array(self.array.shape[2:0:-1], np.int64), (len(self.array), 1))

    def in_frame(self, how: Preprocess) -> BoxArrays:
        """As `BoxImages.in_frame`."""
        return self if how == self.how else dataclasses.replace(self, labels=_moved(self, how), how=how)


def _moved(images: Boxed, how: Preprocess) -> np.ndarray:
    if images.how is not None:
        raise ValueError(f"these boxes lie in the frame of {images.how} already")
    return moved(images.labels, images.sizes, how)


def moved(labels: np.ndarray, sizes: np.ndarray, how: Preprocess) -> np.ndarray:
    """Boxes (N, M, 6) of images of `sizes` (N, 2) in the network's input, cut at its edges and at the image's own.

    A box that is cut to nothing gets class -1.
    """
    out = np.empty(labels.shape, np.float32)
    for k in range(0, len(labels), BLOCK):
        out[k : k + BLOCK] = _moved_block(labels[k : k + BLOCK], np.asarray(sizes[k : k + BLOCK], np.float64), how)
    return out


def _moved_block(labels: np.ndarray, sizes: np.ndarray, how: Preprocess) -> np.ndarray:
    frames = [frame_of(int(w), int(h), how) for w, h in sizes]
    scale = np.array([(f.scale_x, f.scale_y) * 2 for f in frames])[:, None]
    shift = np.array([(f.left, f.top) * 2 for f in frames])[:, None]
    box = np.clip(labels[..., 1:5], 0, np.tile(sizes, 2)[:, None]) * scale + shift
    box = np.clip(box, 0, [how.width, how.height] * 2)
    here = (labels[..., 0] >= 0) & (np.minimum(box[..., 2] - box[..., 0], box[..., 3] - box[..., 1]) > NOTHING)
    rows = np.concatenate([labels[..., :1], box, labels[..., 5:]], axis=-1)
    return np.where(here[..., None], rows, NO_BOX)


def framed(data: Data, how: Preprocess) -> Data:
    """`data` with the boxes of every split in the frame of `how`; images that splits share stay shared.

    Raises ValueError where they lie in another frame already.
    """
    pools: dict[int, Any] = {id(s.images): s.images for s in data.splits.values()}
    inside = {key: images.in_frame(how) for key, images in pools.items()}
    splits = {k: dataclasses.replace(s, images=inside[id(s.images)]) for k, s in data.splits.items()}
    return dataclasses.replace(data, **splits)


def padded(rows: list[np.ndarray], paths: tuple[Path, ...]) -> np.ndarray:
    """float32 (N, M, 6); M is that of the image with most boxes, at least 1. Raises BadData where that is absurd."""
    counts = [len(r) for r in rows]
    most = max(range(len(rows)), key=counts.__getitem__)
    if counts[most] > MAX_BOXES or len(rows) * counts[most] * 24 > MAX_TABLE:
        raise BadData(
            f"{paths[most]} has {counts[most]:,} boxes, and there are {len(rows):,} images.",
            f"At most {MAX_BOXES:,} boxes an image are read, and 2 GB of labels.",
        )
    out: np.ndarray = np.tile(NO_BOX, (len(rows), max(1, counts[most]), 1))
    for k, mine in enumerate(rows):
        out[k, : len(mine)] = mine
    return out


# --- splits ------------------------------------------------------------------------------------------


def present(labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    """bool (N, classes): does image n show class c, in a box that counts."""
    classes = int(labels[..., 0].max(initial=-1)) + 1 if classes is None else classes
    image, row = np.nonzero((labels[..., 0] >= 0) & (labels[..., 0] < classes) & (labels[..., 5] == 0))
    out: np.ndarray = np.zeros((len(labels), classes), bool)
    out[image, labels[image, row, 0].astype(int)] = True
    return out


def balanced(labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Disjoint shuffled rows for each name in `sizes`; what is left over is "train". Boxes are `labels` (N, M, 6).

    Iterative stratification (Sechidis, Tsoumakas & Vlahavas, 2011, "On the Stratification of Multi-Label Data"): the
    rarest class first, each of its images to the split that lacks most of it. Sizes are kept exactly, and a class that
    has as many images as there are splits is in each.
    """
    rng, has, n = np.random.default_rng(seed), present(labels), len(labels)
    names = ["train", *sizes]
    left = np.array([n - sum(sizes.values()), *sizes.values()])
    wanted = np.outer(left / n, has.sum(0))
    wanted[1:] = np.where(has.sum(0) >= len(names), np.maximum(wanted[1:], 1), wanted[1:])
    wanted[0] = has.sum(0) - wanted[1:].sum(0)
    split, order = np.full(n, -1), rng.permutation(n)
    while (remaining := has[split < 0].sum(0)).any():
        rarest = int(np.where(remaining > 0, remaining, n + 1).argmin())
        for i in order[has[order, rarest] & (split[order] < 0)]:
            best = max(range(len(names)), key=lambda s: (left[s] > 0, wanted[s, rarest], left[s]))
            split[i] = best
            left[best] -= 1
            wanted[best] -= has[i]
    rest = order[split[order] < 0]
    split[rest] = np.repeat(np.arange(len(names)), left)[rng.permutation(len(rest))]
    return {name: rng.permutation(np.flatnonzero(split == k)) for k, name in enumerate(names)}
