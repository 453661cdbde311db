"""Weights as indices into tables of few values (palettes): which are worth it, who shares a table, and the best values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

BITS = {"palette4": 4, "palette6": 6, "palette8": 8}
"""Weights of a precision by the bits of an index; a table has 2^bits values of float16."""

FEWEST = 2048
"""Weights in a layer, beyond which a table is worth it: the threshold that coremltools takes by default."""

PER_CHANNEL = 50
"""Weights of an output channel, at least: depthwise convolutions (7 x 7 = 49) stay as they are. Their channels differ
widely, and in MobileNetV3 at 4 bits they made a third of the damage for a twentieth of the bytes."""

TOGETHER = {4: 8, 6: 16}
"""Output channels that share a table, at least, by bits; all where it is not said: the fewer values, the more do tables
of one's own help. With smaller groups Core ML itself slows down (Apple's guide to coremltools, "Palettization
Performance", advises 8 or 16), and finding many tables of 256 values takes minutes."""

SHARE = 1 / 8
"""Of the bytes of the indices: what a weight's tables may take."""


def channels_together(shape: Sequence[int], axis: int, bits: int) -> int | None:
    """How many output channels (along `axis`) share a table of 2^`bits` values, or None where the weight is too small.

    As few as TOGETHER and SHARE allow, and a divisor of the channels, which Core ML asks for; all where none fits.
    """
    channels, weights = shape[axis], math.prod(shape)
    if weights <= FEWEST or weights < PER_CHANNEL * channels:
        return None
    fewest = 2**bits * 2 / (SHARE * bits / 8 * weights / channels)
    fits = (n for n in range(TOGETHER.get(bits, channels), channels) if channels % n == 0 and n >= fewest)
    return next(fits, channels)


def best_table(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The 2^`bits` float16 values that are nearest to `values` in the mean square, rising, and the index of each value.

    Exact one-dimensional k-means by dynamic programming (Gronlund et al., 2017, arXiv:1701.07204), so the same values
    have the same table. Values that are not needed repeat the last. The indices are flat, uint8.
    """
    from coremltools._deps.kmeans1d import cluster

    distinct, place, counts = np.unique(values.astype(np.float64), return_inverse=True, return_counts=True)
    found = cluster(distinct, min(len(distinct), 2**bits), weights=counts)
    table = np.asarray(found.centroids, np.float16)
    return np.pad(table, (0, 2**bits - len(table)), mode="edge"), np.asarray(found.clusters, np.uint8)[
        place.reshape(-1)
    ]


def dense(indices: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The weights that `indices` (of any shape) mean: `tables` (as many dimensions, then 2^bits) holds one for each
    block of them. Raises ValueError where the shapes do not fit."""
    blocks = tables.shape[:-1]
    if len(blocks) != indices.ndim or any(not b or n % b for n, b in zip(indices.shape, blocks)):
        raise ValueError(f"tables of shape {tables.shape} do not fit indices of shape {indices.shape}")
    if indices.size and int(indices.max()) >= tables.shape[-1]:
        raise ValueError(f"index {int(indices.max())} of a table of {tables.shape[-1]} values")
    which = np.ix_(*(np.arange(n) // max(n // b, 1) for n, b in zip(indices.shape, blocks)))
    whole: np.ndarray = tables[(*which, indices)]
    return whole


def problem(weight: np.ndarray, indices: np.ndarray, tables: np.ndarray, slack: float) -> str | None:
    """What is wrong with the tables of a float32 `weight`, or None. `slack`: how far float16 may move any value.

    The two conditions of k-means (Lloyd, 1982), each weight at the nearest value of its table and each value the mean
    of its weights; and that the root of the mean squared error of each table is at most 2^-(bits + 1) of the range of
    its weights. An even table over that range errs by no more than half a step anywhere, and the best one is no worse.
    """
    away = np.abs(weight - dense(indices, tables))
    for block, own in _blocks(indices.shape, tables):
        w, at, error = (a[block].reshape(-1) for a in (weight, indices, away))
        if np.any(np.diff(own) < 0):
            return "a table is not in rising order"
        nearest = np.abs(w - own[np.searchsorted((own[1:] + own[:-1]) / 2, w)])
        if (lost := float((error - nearest).max())) > 2 * slack:
            return f"a weight is off by {float(error.max()):.3g}, {lost:.3g} more than the nearest value of its table"
        sums, count = np.bincount(at, weights=w, minlength=len(own)), np.bincount(at, minlength=len(own))
        if (off := float((np.abs(own * count - sums) / np.maximum(count, 1)).max())) > slack:
            return f"a table's value is off by {off:.3g} from the mean of its weights"
        even = float(np.ptp(w)) / (2 * len(own))
        if (rms := math.sqrt(float(np.mean(error.astype(np.float64) ** 2)))) > even + slack:
            return f"a table's values are off by {rms:.3g} in the root mean square, where an even table is within {even:.3g}"
    return None


def _blocks(shape: tuple[int, ...], tables: np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Where each table's weights are, and its values."""
    for place in np.ndindex(*tables.shape[:-1]):
        steps = (n // b for n, b in zip(shape, tables.shape))
        yield tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, steps)), tables[place]
