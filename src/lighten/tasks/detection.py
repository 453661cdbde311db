"""Detection: COCO's mean average precision, how sure we are of it, and which boxes changed. `bind` gives the task."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from lighten.errors import BadConfig, BadModel
from lighten.heads import Head
from lighten.kit import average_precision as ap
from lighten.kit import boxes
from lighten.types import BoxDrift, ClassChange, Estimate

METRIC = "mAP"
REQUIRES = ("faster_coco_eval",)
EXTRA = "detection"

EXACT, NEAR = 0.9, 0.05
"""Overlap and score difference at which a detection is found again."""


@dataclass(frozen=True)
class Found:
    """One object: its class's name, the score, and x1, y1, x2, y2 in pixels of the input."""

    name: str
    probability: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Task:
    """Detection with one head. `outputs` are raw (N, places, values), `labels` (N, M, 6): class (-1: no box), x1, y1,
    x2, y2, ignore, in pixels of the input of `size` (width, height); without a size, boxes are not clipped.

    Scores above `threshold` are what a user is shown; above `floor` they count in average precision. Boxes of a class
    overlap by `iou` at most, and an image has `most` of all classes together.
    """

    METRIC: ClassVar[str] = METRIC
    REQUIRES: ClassVar[tuple[str, ...]] = REQUIRES

    head: Head
    size: tuple[int, int] | None = None
    threshold: float = 0.3
    floor: float = 0.01
    iou: float = 0.6
    most: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.threshold < 1:
            raise ValueError(f"0 <= floor <= threshold < 1 does not hold for {self.floor} and {self.threshold}")
        if not (0 < self.iou <= 1 and self.most >= 1):
            raise ValueError("iou must be above 0 and at most 1, most 1 or more")

    # --- what is found -------------------------------------------------------------------------------

    def found(self, outputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """All detections of each image that count: (K, 6) of x1, y1, x2, y2, score, class, best first."""

        def look() -> tuple[np.ndarray, ...]:
            return boxes.detections(outputs, self.head, self.floor, self.iou, self.most, size=self.size)

        return _once(("found", self, _mark(outputs)), look)

    def shown(self, outputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Those of `found` that a user is shown."""
        return tuple(one[one[:, 4] > self.threshold] for one in self.found(outputs))

    def decode(self, outputs: np.ndarray, names: tuple[str, ...], top: int = 100) -> list[Found]:
        """What is shown of one image (places, values), the `top` best first. Raises BadModel where it has no name."""
        if len(names) < self.head.classes:
            raise BadModel(f"{len(names)} names do not fit a head of {self.head.classes} classes.", "Name every class.")
        (seen,) = boxes.detections(
            np.asarray(outputs)[None], self.head, self.threshold, self.iou, min(top, self.most), size=self.size
        )
        return [Found(names[int(k)], s, (x1, y1, x2, y2)) for x1, y1, x2, y2, s, k in seen.tolist()]

    # --- how good it is --------------------------------------------------------------------------------

    def score(self, outputs: np.ndarray, labels: np.ndarray) -> Estimate:
        """mAP50-95 in percent, with its standard error by resampling the images; nan without objects."""
        return self._estimate(outputs, labels, self._judged(outputs, labels).mean, ap.mean)

    def drop(self, before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Estimate:
        """Points of mAP lost, and the standard error of the difference: both are resampled on the same images."""
        if not len(labels):
            return _NOTHING
        lost = self._judged(before, labels).mean - self._judged(after, labels).mean
        draws = ap.mean(self._draws(before, labels)) - ap.mean(self._draws(after, labels))
        return Estimate(lost, 100 * ap.spread(draws), len(labels))

    def extra(self, outputs: np.ndarray, labels: np.ndarray) -> tuple[tuple[str, Estimate], ...]:
        """AP50 and AP75; mAP of small, medium and large objects where there are some, by area in pixels of the input."""
        got = self._judged(outputs, labels)
        rows = [
            ("AP50", self._estimate(outputs, labels, got.at50, lambda a: ap.mean(a[:, :1]))),
            ("AP75", self._estimate(outputs, labels, got.at75, lambda a: ap.mean(a[:, 5:6]))),
        ]
        for size, value in (("small", got.small), ("medium", got.medium), ("large", got.large)):
            if np.isfinite(value):
                rows.append((f"AP{size}", self._estimate(outputs, labels, value, ap.mean, size)))
        return tuple(rows) if np.isfinite(got.mean) else ()

    def per_class(
        self, before: np.ndarray, after: np.ndarray, labels: np.ndarray, names: tuple[str, ...]
    ) -> tuple[ClassChange, ...]:
        """AP50-95 of each class before and after, in percent, and in how many images it is; others are left out."""
        old, new = self._judged(before, labels).classes, self._judged(after, labels).classes
        counts = (labels[..., 0] >= 0) & (labels[..., 5] <= 0)
        images = [int(((labels[..., 0] == k) & counts).any(1).sum()) for k in range(len(old))]
        return tuple(ClassChange(*row) for row in zip(names, old, new, images) if row[3])

    def _judged(self, outputs: np.ndarray, labels: np.ndarray) -> ap.AveragePrecision:
        """COCO's numbers, by the evaluator."""
        if not len(labels):
            return ap.NOTHING
        key = ("judged", self, _mark(outputs), _mark(labels))
        return _once(key, lambda: ap.coco(self.found(outputs), labels, self.head.classes))

    def _draws(self, outputs: np.ndarray, labels: np.ndarray, size: str = "all") -> np.ndarray:
        """Average precision of resampled images, (resamples, levels, classes); the same resamples for all outputs."""
        marks = self, _mark(outputs), _mark(labels)
        hits = _once(("hits", *marks), lambda: ap.matches(self.found(outputs), labels, self.head.classes))
        return _once(("draws", size, *marks), lambda: ap.averages(hits, ap.resamples(len(labels)), size))

    def _estimate(
        self,
        outputs: np.ndarray,
        labels: np.ndarray,
        value: float,
        of: Callable[[np.ndarray], np.ndarray],
        size: str = "all",
    ) -> Estimate:
        if not len(labels):
            return _NOTHING
        return Estimate(value, 100 * ap.spread(of(self._draws(outputs, labels, size))), len(labels))

    # --- what changed -----------------------------------------------------------------------------------

    def flipped(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Rows of images that are shown otherwise: a box more or less, of another class, or moved to an overlap under
        a half."""
        rows = enumerate(zip(self.shown(before), self.shown(after)))
        return np.array([n for n, (a, b) in rows if not len(a) == len(b) == len(boxes.pairs(a, b, boxes.SAME)[0])], int)

    def drift(self, before: np.ndarray, after: np.ndarray) -> BoxDrift:
        """How far the boxes that are shown moved, and apart from that how far their scores did."""
        shared, apart, n, both = [], [], 0, 0
        for a, b in zip(self.shown(before), self.shown(after)):
            i, j, iou = boxes.pairs(a, b, boxes.SAME)
            shared.append(iou)
            apart.append(np.abs(a[i, 4] - b[j, 4]))
            n, both = n + len(a), both + len(a) + len(b)
        iou, score = np.concatenate([[], *shared]), np.concatenate([[], *apart])
        if not len(iou):
            return BoxDrift(float("nan"), float("nan"), 0.0 if both else 100.0, n)
        return BoxDrift(float(iou.mean()), float(score.mean()), 200.0 * len(iou) / both, n)

    def agreement(self, reference: np.ndarray, got: np.ndarray) -> float:
        """Percent of what `reference` shows that `got` finds again: the same class, an overlap of 0.9 or more, a score
        within 0.05. Where the reference shows nothing: 100 if `got` shows nothing either, else 0."""
        old, new = self.shown(reference), self.found(got)
        n = sum(map(len, old))
        if not n:
            return 0.0 if any(map(len, self.shown(got))) else 100.0
        return 100.0 * sum(len(boxes.pairs(a, b, EXACT, NEAR)[0]) for a, b in zip(old, new)) / n

    # --- training --------------------------------------------------------------------------------------

    def loss(self, model: Any, x: Any, y: Any, label_smoothing: float = 0.0) -> Any:
        """Loss of a batch: `y` are labels (N, M, 6). Raises BadConfig on label smoothing."""
        from lighten.kit.detection_loss import loss

        if label_smoothing:
            raise BadConfig(f"label_smoothing is {label_smoothing:g}; detection has none.", "Leave it at 0.")
        return loss(model(x).float(), y, self.head)

    def distill_loss(self, student: Any, teacher: Any, temperature: float = 4.0) -> Any:
        """How far the student's raw outputs are from the teacher's. Distributions are softened as their loss was made
        for; `temperature` is that of classes alone, of which a detector's answer has none."""
        from lighten.kit.detection_loss import distill_loss

        return distill_loss(student.float(), teacher.float(), self.head)

    def damage(self, before: Any, after: Any) -> Any:
        """How far raw outputs are from those `before`, by their distance in distillation: of a batch one value, that of
        each of its images."""
        return self.distill_loss(after, before).double().clamp(min=0).expand(len(before))

    def dkd_loss(self, *_: Any, **__: Any) -> Any:
        """Decoupled distillation takes one target class for an image; a detector has none. Raises BadConfig."""
        raise BadConfig("Detectors are not distilled by dkd.", 'Choose the loss "kd".')

    def protect(self, model: Any) -> tuple[str, ...]:
        """Names of the last layers of each branch of the heads: the model's own `head_layers()`, or those between which
        and the outputs no other layer lies. Raises BadModel where neither can be had."""
        if hasattr(model, "head_layers"):
            return tuple(model.head_layers())
        if self.size is None:
            raise BadModel(
                f"{type(model).__name__} does not say which layers end its heads.",
                "Give it head_layers(), or bind the task with the size of its input.",
            )
        return last_layers(model, self.size)


def bind(head: Head, size: tuple[int, int] | None = None, **settings: Any) -> Task:
    """The task of a detector with this head, on inputs of `size` (width, height) where known. Raises ValueError."""
    return Task(head, size, **settings)


def last_layers(model: Any, size: tuple[int, int]) -> tuple[str, ...]:
    """Names of the layers whose weights are the last before the output of `model` for inputs of `size` (width, height):
    autograd's graph, walked from the output to the first weights on every path. The model is left as it was."""
    import copy

    import torch

    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(True)
    names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters() if p.ndim >= 2}
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.enable_grad():
        out = model(torch.zeros(2, first.in_channels, size[1], size[0]))
    ends: set[str] = set()
    stack, seen = [out.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs = [child for child, _ in node.next_functions]
        weights = {names[id(v)] for v in map(_variable, inputs) if id(v) in names}
        ends |= weights
        stack += [] if weights else inputs
    return tuple(name for name, _ in model.named_modules() if name in ends)


def _variable(node: Any) -> Any:
    """The parameter that an autograd node hands on through views alone (a transposed weight), or None."""
    while node is not None and not hasattr(node, "variable") and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


# --- each thing once ---------------------------------------------------------------------------------------

_NOTHING = Estimate(float("nan"), float("nan"), 0)
_KEPT = 12
_MEMO: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_T = TypeVar("_T")


def _once(key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
    """What `make` gives, kept for the next calls with the same key: score, drop, extra and classes all start from the
    same detections, and finding them takes longest."""
    if key not in _MEMO:
        made = make()  # may itself keep things
        _MEMO[key] = made
    _MEMO.move_to_end(key)
    while len(_MEMO) > _KEPT:
        _MEMO.popitem(last=False)
    return _MEMO[key]


def _mark(array: np.ndarray) -> str:
    """What tells an array from another: its shape, kind and content."""
    array = np.ascontiguousarray(array)
    digest = hashlib.blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    digest.update(array.data.cast("B") if array.size else b"")
    return digest.hexdigest()
