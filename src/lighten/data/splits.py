"""Images with labels, and disjoint, class-balanced splits of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from lighten.data.images import open_image
from lighten.data.preprocess import normalize, to_pixels
from lighten.errors import BadData, BadImage
from lighten.types import Preprocess, Progress, silent


class Images(Protocol):
    """Labelled images that are read one at a time. `read` gives a Pillow image, uint8 HWC, or float32 CHW."""

    @property
    def labels(self) -> np.ndarray: ...

    def read(self, i: int) -> Image.Image | np.ndarray: ...

    def name(self, i: int) -> str: ...


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory: uint8 (N, H, W, C), or float32 (N, C, H, W) that are network inputs already."""

    array: np.ndarray
    labels: np.ndarray

    def read(self, i: int) -> np.ndarray:
        return self.array[i]

    def name(self, i: int) -> str:
        return f"image {i}"


@dataclass(frozen=True)
class FileImages:
    """Images on disk, decoded when they are read. Raises BadImage."""

    paths: tuple[Path, ...]
    labels: np.ndarray

    def read(self, i: int) -> Image.Image:
        return open_image(self.paths[i])

    def name(self, i: int) -> str:
        return str(self.paths[i])


@dataclass(frozen=True)
class ListImages:
    """Images of mixed sizes in memory, as a Python iterable yields them."""

    items: tuple[Image.Image | np.ndarray, ...]
    labels: np.ndarray

    def read(self, i: int) -> Image.Image | np.ndarray:
        return self.items[i]

    def name(self, i: int) -> str:
        return f"item {i}"


@dataclass(frozen=True)
class Split:
    """Some rows of `images`. `ready` holds decoded pixels once `prepare` has run."""

    images: Images
    rows: np.ndarray
    ready: np.ndarray | None = field(default=None, repr=False, compare=False)
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        return self.images.labels[self.rows]

    def take(self, n: int) -> Split:
        """At most the first `n` images; rows are shuffled at birth, so this is a fair sample."""
        ready = None if self.ready is None else self.ready[:n]
        return dataclasses.replace(self, rows=self.rows[:n], ready=ready)

    def pixels(self, how: Preprocess | None, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """uint8 (N, H, W, C) after scaling and cropping; float32 inputs pass as they are."""
        if self.ready is not None:
            return self.ready[where]
        return np.stack([self._read(int(i), how) for i in self.rows[where]])

    def inputs(self, how: Preprocess | None, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """float32 (N, C, H, W), as the network takes them."""
        return as_inputs(self.pixels(how, where), how)

    def batches(self, how: Preprocess | None, size: int) -> Iterator[np.ndarray]:
        """`inputs` in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.inputs(how, slice(start, start + size))

    def prepare(self, how: Preprocess | None, progress: Progress = silent, what: str = "images") -> Split:
        """Decode every image once, on all cores. Unreadable ones are dropped and named in `unreadable`."""
        if self.ready is not None:
            return self
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            decoded = []
            for done, one in enumerate(pool.map(lambda i: self._try(int(i), how), self.rows), 1):
                decoded.append(one)
                progress(f"reading {what}", done, len(self.rows))
        good = [k for k, one in enumerate(decoded) if not isinstance(one, str)]
        whole = [one for one in decoded if not isinstance(one, str)]
        bad = tuple(one for one in decoded if isinstance(one, str))
        if not good:
            raise BadData(f"None of the {len(self)} {what} images can be read.", bad[0] if bad else "It is empty.")
        shapes = {one.shape for one in whole}
        if len(shapes) > 1:
            raise BadData(f"Ready inputs have different shapes: {sorted(shapes)[:3]}.", "Give them one shape.")
        return dataclasses.replace(self, rows=self.rows[good], ready=np.stack(whole), unreadable=bad)

    def _try(self, row: int, how: Preprocess | None) -> np.ndarray | str:
        try:
            return self._read(row, how)
        except BadImage as e:
            return e.what

    def _read(self, row: int, how: Preprocess | None) -> np.ndarray:
        image = self.images.read(row)
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            return image
        if how is None:
            raise BadData(
                "The images are pixels, and how the model wants them is not known.",
                "Give --input-size, --mean, --std.",
            )
        return to_pixels(image, how)


def as_inputs(pixels: np.ndarray, how: Preprocess | None) -> np.ndarray:
    """uint8 pixels normalised; float inputs as they are."""
    return (
        normalize(pixels, how)
        if pixels.dtype == np.uint8 and how is not None
        else pixels.astype(np.float32, copy=False)
    )


def stratified(labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Disjoint shuffled rows for each name in `sizes`; what is left over is "train".

    Each class gives each split its share, so a split of n images has n/total of every class (largest remainders
    first). The same labels, sizes and seed give the same rows.
    """
    rng = np.random.default_rng(seed)
    total, classes = len(labels), np.unique(labels)
    pools = {c: rng.permutation(np.flatnonzero(labels == c)) for c in classes}
    used = dict.fromkeys(classes.tolist(), 0)
    out: dict[str, np.ndarray] = {}
    for name, size in sizes.items():
        shares = np.array([size * len(pools[c]) / total for c in classes])
        left = np.array([len(pools[c]) - used[c] for c in classes.tolist()])
        counts = np.minimum(np.floor(shares).astype(int), left)
        order = np.argsort(-(shares - counts), kind="stable")
        counts[order[(counts < left)[order]][: size - counts.sum()]] += 1
        picked = [pools[c][used[c] : used[c] + n] for c, n in zip(classes.tolist(), counts)]
        for c, part in zip(classes.tolist(), picked):
            used[c] += len(part)
        out[name] = rng.permutation(np.concatenate(picked))
    rest = [pools[c][used[c] :] for c in classes.tolist()]
    out["train"] = rng.permutation(np.concatenate(rest)) if rest else np.array([], int)
    return out
