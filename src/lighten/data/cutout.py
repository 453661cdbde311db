"""Objects cut out of small pictures by how far their colours are from the border, in numpy alone."""

from __future__ import annotations

import numpy as np

PASSES, BLOCK = 3, 1000
SHARE = (0.12, 0.55)
"""Of the picture; an object that takes less or more was not found."""
EDGE, WHOLE, CONTRAST = 0.12, 0.9, 0.3
"""Largest share of the border that an object may touch, least share of the salient pixels that hang together, least
difference between the mean saliency inside and outside."""


def cut_outs(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks of uint8 `pictures` (N, H, W, 3), W at most 64: float32 (N, H, W) from 0 to 1, and bool (N,), whether one
    object was found.

    Saliency is the minimum barrier distance from the border plus the contrast to its colours (Zhang et al., 2015,
    "Minimum Barrier Salient Object Detection at 80 FPS"), cut by Otsu's threshold; what hangs together with its middle is
    the object, and holes are filled.
    """
    blocks = [_block(pictures[k : k + BLOCK].astype(np.float32) / 255) for k in range(0, len(pictures), BLOCK)]
    return np.concatenate([mask for mask, _ in blocks]), np.concatenate([good for _, good in blocks])


def _block(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    soft = _blurred(x)
    map_ = _unit(barrier(soft).sum(3)) + _unit(_border_contrast(soft))
    map_ = _unit(_blurred(map_[..., None])[..., 0] * _centre(*x.shape[1:3]))
    salient = map_ > otsu(map_)[:, None, None]
    solid = filled(part_around(salient, _middle(salient)))
    mask = _blurred(solid[..., None].astype(np.float32))[..., 0]
    return mask, _found(solid, salient, map_)


def _middle(on: np.ndarray) -> np.ndarray:
    """The pixel of each mask (N, H, W) with most of the mask around it, as an index into H * W."""
    near: np.ndarray = on[..., None].astype(np.float32)
    for _ in range(4):
        near = _blurred(near)
    return np.asarray((near[..., 0] * on).reshape(len(on), -1).argmax(1))


def _found(solid: np.ndarray, salient: np.ndarray, map_: np.ndarray) -> np.ndarray:
    """Does it look like one object: of fair size, in one piece, not all along the border, well apart from its ground?"""
    share, pixels = solid.mean((1, 2)), np.maximum(solid.sum((1, 2)), 1)
    rim = np.concatenate([solid[:, 0], solid[:, -1], solid[:, 1:-1, 0], solid[:, 1:-1, -1]], 1).mean(1)
    inside = (map_ * solid).sum((1, 2)) / pixels
    outside = (map_ * ~solid).sum((1, 2)) / np.maximum((~solid).sum((1, 2)), 1)
    whole = (salient & solid).sum((1, 2)) / np.maximum(salient.sum((1, 2)), 1)
    fair = (share > SHARE[0]) & (share < SHARE[1]) & (rim < EDGE)
    return np.asarray(fair & (whole > WHOLE) & (inside - outside > CONTRAST))


# --- shapes, a row of pixels as the bits of one number --------------------------------------------------


def part_around(on: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The part of each mask (N, H, W) that hangs together (4 neighbours) with the pixel `at` (N,), index into H * W."""
    n, _, width = on.shape
    seed = np.zeros_like(on)
    seed.reshape(n, -1)[np.arange(n), at] = True
    return _rows(_flooded(_bits(seed & on), _bits(on)), width)


def filled(on: np.ndarray) -> np.ndarray:
    """Masks (N, H, W) without the holes that the border cannot reach."""
    off, rim = ~on, np.zeros_like(on)
    rim[:, [0, -1]] = True
    rim[:, :, [0, -1]] = True
    return ~_rows(_flooded(_bits(off & rim), _bits(off)), on.shape[2])


def _bits(on: np.ndarray) -> np.ndarray:
    """(N, H, W) as uint64 (N, H)."""
    return np.asarray((on.astype(np.uint64) << np.arange(on.shape[2], dtype=np.uint64)).sum(2, dtype=np.uint64))


def _rows(bits: np.ndarray, width: int) -> np.ndarray:
    return np.asarray((bits[..., None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1), bool)


def _flooded(seed: np.ndarray, within: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    while True:
        grown = seed | (seed << one) | (seed >> one)
        grown[:, 1:] |= seed[:, :-1]
        grown[:, :-1] |= seed[:, 1:]
        grown &= within
        if np.array_equal(grown, seed):
            return seed
        seed = grown


# --- saliency ---------------------------------------------------------------------------------------


def barrier(x: np.ndarray) -> np.ndarray:
    """Minimum barrier distance of each pixel and channel of (N, H, W, C) from the border: over all paths, the least
    difference between the highest and the lowest value on the way. Raster scans there and back (Zhang et al., alg. 1)."""
    _, height, width, _ = x.shape
    value = np.ascontiguousarray(x.transpose(1, 2, 3, 0))  # all images of one pixel side by side: scans go by pixel
    high, low, far = value.copy(), value.copy(), np.full(value.shape, 2, np.float32)
    far[[0, -1]] = 0
    far[:, [0, -1]] = 0
    for turn in range(PASSES):
        step = 1 if turn % 2 == 0 else -1
        for i in range(1, height - 1)[::step]:
            for j in range(1, width - 1)[::step]:
                for a, b in ((i - step, j), (i, j - step)):
                    up, down = np.maximum(high[a, b], value[i, j]), np.minimum(low[a, b], value[i, j])
                    cost = up - down
                    better = cost < far[i, j]
                    np.copyto(far[i, j], cost, where=better)
                    np.copyto(high[i, j], up, where=better)
                    np.copyto(low[i, j], down, where=better)
    return far.transpose(3, 0, 1, 2)


def _border_contrast(x: np.ndarray) -> np.ndarray:
    """Distance from the mean colour of each side, the nearest side left out: (N, H, W)."""
    sides = [x[:, :3], x[:, -3:], x[:, :, :3], x[:, :, -3:]]
    far = np.stack([np.abs(x - s.mean((1, 2), keepdims=True)).sum(3) for s in sides])
    return np.asarray(far.sum(0) - far.max(0))


def _centre(height: int, width: int) -> np.ndarray:
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    return np.asarray(np.exp(-0.45 * (x * x + y * y)))


def _blurred(x: np.ndarray) -> np.ndarray:
    """A 3 x 3 binomial filter over (N, H, W, C), edges repeated."""
    for axis in (1, 2):
        pad = [(1, 1) if k == axis else (0, 0) for k in range(4)]
        wide, n = np.pad(x, pad, mode="edge"), x.shape[axis]
        x = (wide.take(range(n), axis) + 2 * x + wide.take(range(2, n + 2), axis)) / 4
    return x


def _unit(x: np.ndarray) -> np.ndarray:
    """Each map from 0 to 1."""
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    return np.asarray((x - low) / np.maximum(high - low, 1e-6))


def otsu(maps: np.ndarray, bins: int = 32) -> np.ndarray:
    """The threshold of each map (N, H, W) of 0 to 1 that parts it into the two most different halves (Otsu, 1979)."""
    n = len(maps)
    index = np.minimum((maps * bins).astype(int), bins - 1) + bins * np.arange(n)[:, None, None]
    share = np.bincount(index.ravel(), minlength=n * bins).reshape(n, bins) / maps[0].size
    below, moment = share.cumsum(1), (share * (np.arange(bins) + 0.5) / bins).cumsum(1)
    mean = moment[:, -1:]
    between = (mean * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-9)
    return np.asarray((between[:, :-1].argmax(1) + 1) / bins)
