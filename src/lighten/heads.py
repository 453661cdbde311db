"""How a detector's raw outputs become boxes: plain data, the same here, in the manifest and on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """One feature map: `rows` x `columns` places, `step` (x, y) pixels apart, the first at `offset` steps from the
    corner. `shapes` are the (width, height) of the anchors at each place, in pixels; none for points.
    """

    rows: int
    columns: int
    step: tuple[float, float]
    offset: float = 0.5
    shapes: tuple[tuple[float, float], ...] = ()

    @property
    def places(self) -> int:
        """Predictions of this level: one for each anchor, or for each point."""
        return self.rows * self.columns * max(1, len(self.shapes))


@dataclass(frozen=True)
class Head:
    """What the values of raw outputs (N, places, values) mean. Places run level by level, row by row, column by column,
    anchor by anchor; values are box numbers, then centerness where there is one, then class scores (logits).

    `box` says what the box numbers are:
      "distances": left, top, right, bottom from the place, in steps, below 0 cut off (FCOS, Tian et al., 2019);
      "distribution": the same, each as logits of `bins` whole distances whose mean counts (GFL, Li et al., 2020);
      "offsets": centre and log size against the anchor, divided by `weights`, log sizes at most `clip` (Faster R-CNN).
    `score` is "sigmoid", one probability a class, or "softmax" with background as index 0. With `centerness` the score is
    the root of its product with the class's.
    """

    levels: tuple[Level, ...]
    classes: int
    box: str = "distances"
    score: str = "sigmoid"
    centerness: bool = False
    bins: int = 0
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    clip: float = math.log(1000 / 16)

    def __post_init__(self) -> None:
        anchors = [bool(level.shapes) for level in self.levels]
        checks = {
            "there is no level": bool(self.levels),
            "classes must be at least 1": self.classes >= 1,
            f"box {self.box!r} is not distances, distribution or offsets": self.box
            in ("distances", "distribution", "offsets"),
            f"score {self.score!r} is not sigmoid or softmax": self.score in ("sigmoid", "softmax"),
            "offsets need anchors on every level, distances none": all(anchors)
            if self.box == "offsets"
            else not any(anchors),
            "a distribution needs 2 bins or more, others none": self.bins >= 2
            if self.box == "distribution"
            else self.bins == 0,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(rule)

    @property
    def places(self) -> int:
        """Predictions of one image."""
        return sum(level.places for level in self.levels)

    @property
    def numbers(self) -> int:
        """Box numbers of one place."""
        return 4 * self.bins if self.box == "distribution" else 4

    @property
    def values(self) -> int:
        """Values of one place."""
        return self.numbers + self.centerness + self.classes + (self.score == "softmax")
