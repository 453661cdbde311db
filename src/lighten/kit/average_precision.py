"""COCO's average precision by a well-kept evaluator, and how sure it is, by resampling the images."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lighten.errors import BadData, MissingBackend

LEVELS = np.linspace(0.5, 0.95, 10)
"""Overlaps that a right box must reach."""

RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is read."""

SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Areas of objects in square pixels, both ends included, as COCO has them."""

MOST = 100
"""Detections of one class in one image that count."""

RESAMPLES, SEED = 300, 0
_CHUNK = 4_000_000  # copies of detections held at once, int32


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's numbers in percent; those of which there is no object are nan. `classes` has one for each class."""

    mean: float
    at50: float
    at75: float
    small: float
    medium: float
    large: float
    classes: tuple[float, ...]


_NAN = float("nan")
NOTHING = AveragePrecision(_NAN, _NAN, _NAN, _NAN, _NAN, _NAN, ())
"""Of no images."""


@dataclass(frozen=True)
class Matches:
    """What the detections of each image hit: all that average precision needs of them, whatever images are counted.

    Detections are sorted by class, then best first; those of class k are starts[k] to starts[k + 1]. `image` (D,) says
    where each is from. `right` and `moot` (sizes, levels, D) say whether it hit an object that counts, or counts
    neither way. `objects` (sizes, classes, images) are how many objects count. Sizes are those of `SIZES`.
    """

    image: np.ndarray
    starts: np.ndarray
    right: np.ndarray
    moot: np.ndarray
    objects: np.ndarray


def coco(found: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> AveragePrecision:
    """COCO's numbers by faster-coco-eval. `found` are, for each image, detections (K, 6) of x1, y1, x2, y2, score,
    class; `labels` (N, M, 6) are class (-1: no box), x1, y1, x2, y2, ignore, in the same pixels. An ignored box is a
    crowd: detections that lie in it count neither way.

    Raises MissingBackend, and BadData where the two do not fit.
    """
    _check(found, labels, classes)
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise MissingBackend("faster-coco-eval (needed to score detections)", "detection")
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(as_coco(labels, classes))
    run = COCOeval_faster(truth, truth.loadRes(as_results(found)), "bbox")
    run.evaluate()
    run.accumulate()
    precision = run.eval["precision"][..., -1].mean(1)  # levels, classes, sizes; -1 where no object is
    return _summary(np.where(precision < 0, np.nan, precision).transpose(2, 0, 1))


def as_coco(labels: np.ndarray, classes: int) -> dict[str, Any]:
    """Labels (N, M, 6) as the dictionary of a COCO file; image and category ids begin at 1."""
    image, true = _true(labels)
    columns = zip(image.tolist(), true[:, 0].tolist(), _corner_and_size(true[:, 1:5]).tolist(), true[:, 5].tolist())
    annotations = [
        {"image_id": n + 1, "category_id": int(k) + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd > 0)}
        for n, k, box, crowd in columns
    ]
    return {
        "images": [{"id": n + 1} for n in range(len(labels))],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
        "annotations": [{"id": i + 1, **row} for i, row in enumerate(annotations)],
    }


def as_results(found: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Detections as the list of a COCO results file."""
    image, rows = _flat(found)
    columns = zip(image.tolist(), _corner_and_size(rows[:, :4]).tolist(), rows[:, 4].tolist(), rows[:, 5].tolist())
    return [{"image_id": n + 1, "category_id": int(k) + 1, "bbox": box, "score": s} for n, box, s, k in columns]


# --- matches, once for each image -----------------------------------------------------------------------


def matches(found: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> Matches:
    """COCO's matching (pycocotools, COCOeval.evaluateImg) of every image at every level and size. As `coco` takes it."""
    _check(found, labels, classes)
    image, rows, keys = _ranked(found, classes)
    boxes = _corner_and_size(rows[:, :4])
    hit: np.ndarray = np.zeros((len(SIZES), len(LEVELS), len(rows)), bool)
    moot = hit.copy()
    objects: np.ndarray = np.zeros((len(SIZES), classes, len(labels)), np.int32)
    for key, true in _objects(labels, classes):
        n, k = divmod(key, classes)
        its, crowd = _corner_and_size(true[:, 1:5]), true[:, 5] > 0
        ignored = crowd | _outside(its)
        objects[:, k, n] = (~ignored).sum(1)
        cell = slice(int(np.searchsorted(keys, key)), int(np.searchsorted(keys, key + 1)))
        hit[..., cell], moot[..., cell] = _match(_shared(boxes[cell], its, crowd), crowd, ignored)
    right, moot = hit & ~moot, moot | (~hit & _outside(boxes)[:, None])
    kind: np.ndarray = keys % classes
    order = np.lexsort((-rows[:, 4], kind))
    starts = np.concatenate([[0], np.bincount(kind, minlength=classes).cumsum()])
    return Matches(image[order], starts, right[..., order], moot[..., order], objects)


def _ranked(found: Sequence[np.ndarray], classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, rows and keys (image * classes + class) of the `MOST` best detections of each class in each image."""
    image, rows = _flat(found)
    keys = image * classes + rows[:, 5].astype(int)
    order = np.lexsort((-rows[:, 4], keys))
    keys = keys[order]
    rank = np.arange(len(keys)) - np.searchsorted(keys, keys)
    order, keys = order[rank < MOST], keys[rank < MOST]
    return image[order], rows[order], keys


def _objects(labels: np.ndarray, classes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Keys (image * classes + class) and their boxes (G, 6), in float64."""
    image, true = _true(labels)
    keys = image * classes + true[:, 0].astype(int)
    order = np.argsort(keys, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
        if len(part):
            yield int(keys[part[0]]), true[part]


def _match(shared: np.ndarray, crowd: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of D detections, best first, hit one of G objects, and which of those hit only an ignored one.

    `shared` (D, G) are overlaps, `crowd` (G,), `ignored` (sizes, G); both answers are (sizes, levels, D). Each takes the
    free object that it overlaps most, the last of equals, an ignored one only where no other is; crowds stay free.
    """
    if len(crowd) == 1 and not crowd[0]:  # most often: the best that reaches it has it
        reach = shared[:, 0] >= LEVELS[:, None]
        one = reach & (reach.cumsum(1) == 1)
        return np.broadcast_to(one, (len(ignored), *one.shape)), one & ignored[..., None]
    taken: np.ndarray = np.zeros((len(ignored), len(LEVELS), len(crowd)), bool)
    hit: np.ndarray = np.zeros((len(ignored), len(LEVELS), len(shared)), bool)
    moot = hit.copy()
    for d in np.flatnonzero((shared >= LEVELS[0]).any(1)):
        free = (~taken | crowd) & (shared[d] >= LEVELS[:, None])
        counts = free & ~ignored[:, None]
        choice = np.where(counts.any(-1, keepdims=True), counts, free)
        last = np.where(choice, shared[d], -1.0)[..., ::-1].argmax(-1)
        which = (len(crowd) - 1 - last)[..., None]
        hit[..., d] = free.any(-1)
        moot[..., d] = hit[..., d] & ~counts.any(-1)
        np.put_along_axis(taken, which, np.take_along_axis(taken, which, -1) | hit[..., d, None], -1)
    return hit, moot


def _shared(boxes: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Overlaps (D, G) of boxes x, y, width, height; with a crowd, the share of the detection that lies in it. The
    arithmetic is that of pycocotools (bbIou), so that boxes at the very edge of a level fall the same way."""
    far, ends = boxes[:, :2] + boxes[:, 2:], objects[:, :2] + objects[:, 2:]
    across = np.minimum(far[:, None, 0], ends[:, 0]) - np.maximum(boxes[:, None, 0], objects[:, 0])
    down = np.minimum(far[:, None, 1], ends[:, 1]) - np.maximum(boxes[:, None, 1], objects[:, 1])
    inside = np.where((across > 0) & (down > 0), across * down, 0)
    mine = (boxes[:, 2] * boxes[:, 3])[:, None]
    whole = np.where(crowd, mine, mine + objects[:, 2] * objects[:, 3] - inside)
    return np.divide(inside, whole, out=np.zeros_like(inside), where=inside > 0)


def _outside(boxes: np.ndarray) -> np.ndarray:
    """Which boxes (B, 4) of x, y, width, height are not of each size: (sizes, B)."""
    area = boxes[:, 2] * boxes[:, 3]
    return np.stack([(area < low) | (area > high) for low, high in SIZES.values()])


# --- accumulated, for any choice of images ----------------------------------------------------------------


def summary(m: Matches) -> AveragePrecision:
    """COCO's numbers by our own accumulation."""
    once = np.ones((1, m.objects.shape[2]), np.int32)
    return _summary(np.stack([averages(m, once, size)[0] for size in SIZES]))


def resamples(images: int, count: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each image is drawn in each of `count` resamples with replacement: (count, images), int32. The same
    for the same numbers, so that two sets of detections are compared on the same images (Efron, 1979)."""
    dice = np.random.default_rng(seed)
    drawn = (np.bincount(dice.integers(0, images, images), minlength=images) for _ in range(count))
    return np.stack(list(drawn)).astype(np.int32)


def averages(m: Matches, copies: np.ndarray, size: str = "all") -> np.ndarray:
    """Average precision (R, levels, classes) in shares of 1, nan where no object is, for `copies` (R, images): how
    often each image counts."""
    a = list(SIZES).index(size)
    out = np.full((len(copies), len(LEVELS), m.objects.shape[1]), np.nan)
    for k in range(m.objects.shape[1]):
        objects = copies @ m.objects[a, k]
        cell = slice(m.starts[k], m.starts[k + 1])
        right, moot, image = m.right[a, :, cell], m.moot[a, :, cell], m.image[cell]
        counts = ~moot.all(0)
        right, moot, image = right[:, counts], moot[:, counts], image[counts]
        step = max(1, _CHUNK // max(1, len(image)))
        for start in range(0, len(copies) if objects.any() else 0, step):
            some = slice(start, start + step)
            out[some, :, k] = _area_under(copies[some][:, image], right, moot, objects[some])
    return out


def _area_under(copies: np.ndarray, right: np.ndarray, moot: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Average precision (R, levels) of D detections, best first: precision made to fall, read at 101 recalls
    (pycocotools, COCOeval.accumulate). `copies` (R, D), `right` and `moot` (levels, D), `objects` (R,).

    Precision is only read where recall rises, so only right detections are looked at. Copies of a right detection lie
    together, and precision rises along them: their last one stands for them all.
    """
    so_far = copies.cumsum(1, dtype=np.int32)
    out = np.zeros((len(copies), len(right)))
    for t, (hits, neither) in enumerate(zip(right, moot)):
        at, skip = np.flatnonzero(hits), np.flatnonzero(neither)
        seen = so_far[:, at]
        if len(skip):
            skipped = np.pad(copies[:, skip].cumsum(1, dtype=np.int32), ((0, 0), (1, 0)))
            seen = seen - skipped[:, np.searchsorted(skip, at)]
        true = copies[:, at].cumsum(1, dtype=np.int32)
        precision = true / (seen + np.spacing(1))
        falling = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        recall = true / np.maximum(objects, 1)[:, None]
        reached = np.searchsorted(RECALLS, recall, side="right")
        out[:, t] = (falling * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALLS)
    out[objects == 0] = np.nan
    return out


def mean(averages: np.ndarray) -> np.ndarray:
    """Mean (...) of `averages` (..., levels, classes) over the classes that have objects; nan where none has."""
    there = np.isfinite(averages)
    total, n = np.where(there, averages, 0).sum((-2, -1)), there.sum((-2, -1))
    return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)


def spread(draws: np.ndarray) -> float:
    """Standard error: the standard deviation of resampled values (R,), those without a value left out."""
    draws = draws[np.isfinite(draws)]
    return float(draws.std(ddof=1)) if len(draws) > 1 else float("nan")


def _summary(by_size: np.ndarray) -> AveragePrecision:
    """From average precision (sizes, levels, classes) in shares of 1."""
    whole, small, medium, large = (100 * float(mean(one)) for one in by_size)
    at50, at75 = (100 * float(mean(by_size[0, t : t + 1])) for t in (0, 5))
    classes = tuple(100 * float(mean(by_size[0, :, k : k + 1])) for k in range(by_size.shape[2]))
    return AveragePrecision(whole, at50, at75, small, medium, large, classes)


# --- checks and shapes --------------------------------------------------------------------------------------


def _check(found: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> None:
    if labels.ndim != 3 or labels.shape[2] != 6 or len(found) != len(labels):
        raise BadData(
            f"Detections of {len(found)} images do not fit labels of shape {labels.shape}.",
            "Labels are (images, boxes, 6): class, x1, y1, x2, y2, ignore.",
        )
    true = labels[labels[..., 0] >= 0]
    if not np.isfinite(labels[..., 0]).all() or not np.isfinite(true).all():
        raise BadData("The labels hold a number that is not finite.", "Run the calibration doctor on the data.")
    kinds = [true[:, 0], *(one[:, 5] for one in found)]
    highest = max((float(k.max()) for k in kinds if len(k)), default=-1.0)
    if highest >= classes:
        raise BadData(f"Class {highest:g} is among the boxes of a model of {classes} classes.", "Classes begin at 0.")


def _flat(found: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All detections in one array (D, 6), float64, and the image of each (D,)."""
    image: np.ndarray = np.repeat(np.arange(len(found)), [len(one) for one in found])
    rows = np.concatenate([np.zeros((0, 6)), *(np.asarray(one, np.float64).reshape(-1, 6) for one in found)])
    return image, rows


def _true(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image (B,) of each box in the labels, and the boxes (B, 6), float64."""
    image, row = np.nonzero(labels[..., 0] >= 0)
    return image, labels[image, row].astype(np.float64)


def _corner_and_size(boxes: np.ndarray) -> np.ndarray:
    """x1, y1, x2, y2 to x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
