"""Boxes in numpy: raw outputs decoded, overlap, suppression, letterbox undone; the same code here and on the device."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lighten.data.preprocess import Frame
from lighten.errors import BadModel
from lighten.heads import Head

CANDIDATES = 1000
"""How many of the best scores of one image are looked at before suppression."""

SAME = 0.5
"""Overlap from which two boxes of one class are one object."""

_BLOCK = 512  # rows whose overlaps are held at once: suppression needs memory for its square, not for all rows'


# --- raw outputs to boxes -----------------------------------------------------------------------------


def decode(outputs: np.ndarray, head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Every place of raw `outputs` (N, places, values): boxes (N, places, 4), x1, y1, x2, y2 in pixels of the input,
    not clipped, and scores (N, places, classes), both float32. A place with a value that is not finite scores 0.

    Raises BadModel where the shape is not what `head` describes.
    """
    raw = _checked(outputs, head)
    centres, sizes = anchors(head)
    return _boxes(raw[..., : head.numbers], centres, sizes, head), _scores(raw, head)


def detections(
    outputs: np.ndarray,
    head: Head,
    threshold: float = 0.05,
    iou: float = 0.6,
    most: int = 100,
    *,
    candidates: int = CANDIDATES,
    size: tuple[float, float] | None = None,
) -> tuple[np.ndarray, ...]:
    """What is found in each image of raw `outputs` (N, places, values): float32 (K, 6) of x1, y1, x2, y2, score and
    class, best first, at most `most`. Scores are above `threshold`; boxes of one class overlap by `iou` at most.

    Boxes are pixels of the input, clipped to `size` (width, height) where it is given; those without area or with a
    value that is not finite are never kept. Raises BadModel where the shape is not what `head` describes.
    """
    raw = _checked(outputs, head)
    return tuple(_found(one, head, threshold, iou, most, candidates, size) for one in raw)


@lru_cache(maxsize=32)
def anchors(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Centres and sizes (x, y) of every place, each (places, 2) in pixels, float32, read only. The size of a point is
    its step."""
    centres, sizes = [], []
    for level in head.levels:
        shapes = np.array(level.shapes or (level.step,), np.float64)
        x = (np.arange(level.columns) + level.offset) * level.step[0]
        y = (np.arange(level.rows) + level.offset) * level.step[1]
        grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
        centres.append(np.repeat(grid, len(shapes), 0))
        sizes.append(np.tile(shapes, (len(grid), 1)))
    both = np.concatenate(centres).astype(np.float32), np.concatenate(sizes).astype(np.float32)
    for array in both:
        array.setflags(write=False)
    return both


def _checked(outputs: np.ndarray, head: Head) -> np.ndarray:
    """`outputs` as float32, of the right shape."""
    raw = np.asarray(outputs)
    if raw.ndim != 3 or raw.shape[1:] != (head.places, head.values):
        raise BadModel(
            f"The outputs are {raw.shape}; the head describes (images, {head.places} places, {head.values} values).",
            "Give the head of this network at this input size.",
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is never kept
        return raw.astype(np.float32, copy=False)


def _boxes(numbers: np.ndarray, centres: np.ndarray, sizes: np.ndarray, head: Head) -> np.ndarray:
    """Box numbers (..., places, numbers) to corners (..., places, 4)."""
    with np.errstate(all="ignore"):
        if head.box == "offsets":
            moved = numbers / np.array(head.weights, np.float32)
            middle = moved[..., :2] * sizes + centres
            half = np.exp(np.minimum(moved[..., 2:], np.float32(head.clip))) * sizes * np.float32(0.5)
            return np.concatenate([middle - half, middle + half], -1)
        if head.box == "distribution":
            bins = _softmax(numbers.reshape(*numbers.shape[:-1], 4, head.bins))
            numbers = bins @ np.arange(head.bins, dtype=np.float32)
        reach = np.maximum(numbers, 0)
        return np.concatenate([centres - reach[..., :2] * sizes, centres + reach[..., 2:] * sizes], -1)


def _scores(raw: np.ndarray, head: Head) -> np.ndarray:
    """Scores (..., places, classes) of raw values (..., places, values)."""
    logits = raw[..., head.numbers + head.centerness :]
    with np.errstate(all="ignore"):
        scores = _softmax(logits)[..., 1:] if head.score == "softmax" else _sigmoid(logits)
        if head.centerness:
            scores = np.sqrt(scores * _sigmoid(raw[..., head.numbers, None]))
    scores[~np.isfinite(raw).all(-1)] = 0
    return scores


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _found(
    raw: np.ndarray,
    head: Head,
    threshold: float,
    iou: float,
    most: int,
    candidates: int,
    size: tuple[float, float] | None,
) -> np.ndarray:
    """The detections (K, 6) of one image (places, values)."""
    scores = _scores(raw, head).ravel()
    rows = best(scores, max(threshold, 0.0), candidates)
    place, kind = np.divmod(rows, head.classes)
    centres, sizes = anchors(head)
    boxes = _boxes(raw[place, : head.numbers], centres[place], sizes[place], head)
    boxes = boxes if size is None else clipped(boxes, *size)
    with np.errstate(all="ignore"):
        whole = np.isfinite(boxes).all(1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, kind, score = boxes[whole], kind[whole], scores[rows[whole]]
    kept = nms(boxes, score, kind, iou)[:most]
    return np.column_stack([boxes[kept], score[kept], kind[kept]]).astype(np.float32)


# --- overlap and suppression ----------------------------------------------------------------------------


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union (A, B) of boxes (A, 4) and (B, 4); 0 where both have no area."""
    with np.errstate(all="ignore"):
        across = np.minimum(a[:, 2, None], b[:, 2]) - np.maximum(a[:, 0, None], b[:, 0])
        down = np.minimum(a[:, 3, None], b[:, 3]) - np.maximum(a[:, 1, None], b[:, 1])
        shared = np.maximum(across, 0) * np.maximum(down, 0)
        union = areas(a)[:, None] + areas(b) - shared
        return np.where(union > 0, shared / union, 0)


def areas(boxes: np.ndarray) -> np.ndarray:
    """Areas (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def best(scores: np.ndarray, threshold: float = -np.inf, most: int | None = None) -> np.ndarray:
    """Rows of the `most` highest finite scores (N,) above `threshold`, best first; of equal ones the first."""
    with np.errstate(invalid="ignore"):
        rows = np.flatnonzero((scores > threshold) & np.isfinite(scores))
    if most is not None and len(rows) > most:
        if most <= 0:
            return rows[:0]
        cut = np.partition(scores[rows], len(rows) - most)[len(rows) - most]
        rows = rows[scores[rows] >= cut]
    return rows[np.argsort(-scores[rows], kind="stable")][:most]


def nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    iou: float = 0.6,
    threshold: float = -np.inf,
    candidates: int | None = None,
) -> np.ndarray:
    """Greedy suppression within each class: rows that stay, best first, of equal scores the first.

    `boxes` (N, 4), `scores` and `classes` (N,). A box goes where a better one of its class that stays overlaps it by
    more than `iou`. Only the `candidates` best scores above `threshold` are looked at, and only finite ones.
    """
    whole = np.isfinite(boxes).all(1)
    rows = best(np.where(whole, scores, np.nan), threshold, candidates)
    if not len(rows):
        return rows
    kinds = classes[rows]
    order = np.argsort(kinds, kind="stable")
    stays: np.ndarray = np.zeros(len(rows), bool)
    for mine in np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1):
        stays[mine[_survivors(boxes[rows[mine]], iou)]] = True
    return rows[stays]


def _survivors(boxes: np.ndarray, iou: float) -> np.ndarray:
    """Rows of `boxes` (N, 4), best first, that no better survivor overlaps by more than `iou`."""
    kept: np.ndarray = np.zeros(0, int)
    for start in range(0, len(boxes), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(boxes)))
        if len(kept):
            block = block[~(overlaps(boxes[kept], boxes[block]) > iou).any(0)]
        kept = np.concatenate([kept, block[_greedy(overlaps(boxes[block], boxes[block]) > iou)]])
    return kept


def _greedy(over: np.ndarray) -> np.ndarray:
    """Which rows stay where row i suppresses row j > i if `over` (N, N) says so and i itself stays.

    All rows at once, repeated until nothing changes: row j is settled one round after the rows before it, so that the
    end is the greedy answer (Zheng et al., 2020, "Enhancing Geometric Factors", Cluster-NMS, proposition 1).
    """
    over = np.triu(over, 1)
    stays: np.ndarray = np.ones(len(over), bool)
    while True:
        again = np.asarray(~over[stays].any(0))
        if (again == stays).all():
            return again
        stays = again


# --- where boxes lie ---------------------------------------------------------------------------------------


def clipped(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Boxes (..., 4) cut to a frame of `width` x `height` pixels."""
    return np.clip(boxes, 0, np.array([width, height, width, height], boxes.dtype))


def to_image(boxes: np.ndarray, frame: Frame, width: float, height: float) -> np.ndarray:
    """Boxes (..., 4) from pixels of the input to pixels of the image of `width` x `height`, cut to it."""
    scale, shift = _geometry(frame)
    return clipped((boxes - shift) / scale, width, height)


def to_input(boxes: np.ndarray, frame: Frame) -> np.ndarray:
    """Boxes (..., 4) from pixels of the image to pixels of the input, not cut."""
    scale, shift = _geometry(frame)
    return boxes * scale + shift


def _geometry(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    scale = np.array([frame.scale_x, frame.scale_y] * 2)
    return scale, np.array([frame.left, frame.top] * 2, np.float64)


def pairs(a: np.ndarray, b: np.ndarray, iou: float, score: float = np.inf) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections (A, 6) and (B, 6) matched one to one: rows in `a`, rows in `b`, and their overlaps.

    Pairs are of one class, overlap by `iou` or more and differ in score by `score` at most; the largest overlap first.
    """
    shared = overlaps(a[:, :4], b[:, :4])
    with np.errstate(invalid="ignore"):
        fits = (a[:, 5, None] == b[:, 5]) & (shared >= iou) & (np.abs(a[:, 4, None] - b[:, 4]) <= score)
    i, j = np.nonzero(fits)
    order = np.argsort(-shared[i, j], kind="stable")
    chosen, used_a, used_b = [], set(), set()
    for k, m, n in zip(order.tolist(), i[order].tolist(), j[order].tolist()):
        if m not in used_a and n not in used_b:
            chosen.append(k)
            used_a.add(m)
            used_b.add(n)
    return i[chosen], j[chosen], shared[i[chosen], j[chosen]]
