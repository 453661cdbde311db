"""A bundle that is loaded and looks at images: what it sees in pixels of the image, and a picture of that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lighten import bench
from lighten import bundle as bundles
from lighten.data.preprocess import frame_of, to_pixels
from lighten.errors import BadBundle, BadConfig
from lighten.kit import boxes as kit_boxes
from lighten.kit import draw as kit_draw
from lighten.machine import usable_threads
from lighten.plugins import get
from lighten.types import Preprocess

LABELS = 3
"""Labels of an image that are shown where nothing else is asked for."""
Clock = Callable[[], float]


class Box(NamedTuple):
    """One object: its name, the score, x1, y1, x2, y2 in pixels of the image, and the class."""

    name: str
    probability: float
    corners: tuple[float, float, float, float]
    kind: int


@dataclass(frozen=True)
class Look:
    """What a loaded bundle made of one image, and the seconds of each part."""

    labels: tuple[tuple[str, float], ...]
    boxes: tuple[Box, ...]
    spent: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Eye:
    """A loaded bundle: `run` takes what `how` prepares, `task` reads what comes out; a detector's has a head."""

    run: Callable[[np.ndarray], np.ndarray]
    how: Preprocess
    task: Any
    names: tuple[str, ...]
    top: int | None = None

    @property
    def detects(self) -> bool:
        return hasattr(self.task, "head")

    def look(self, image: Image.Image, clock: Clock = time.perf_counter) -> Look:
        """Labels or boxes of an upright 8-bit image. Raises BadModel where the outputs are not what the manifest says."""
        start = clock()
        x = bench.inputs_of(to_pixels(image, self.how)[None], self.how)
        scaled = clock()
        raw = np.asarray(self.run(x))
        ran = clock()
        labels, found = ((), self._boxes(raw, image.size)) if self.detects else (self._labels(raw), ())
        read = clock()
        last = "boxes" if self.detects else "labels"
        spent = (("scaling", scaled - start), ("network", ran - scaled), (last, read - ran))
        return Look(labels, found, spent)

    def _labels(self, raw: np.ndarray) -> tuple[tuple[str, float], ...]:
        return tuple(self.task.decode(np.asarray(raw[0], np.float64), self.names, self.top or LABELS))

    def _boxes(self, raw: np.ndarray, size: tuple[int, int]) -> tuple[Box, ...]:
        """Boxes in pixels of the image; those that lie in its grey border alone are gone."""
        task = self.task
        most = min(self.top or task.most, task.most)
        (seen,) = kit_boxes.detections(raw, task.head, task.threshold, task.iou, task.most, size=task.size)
        corners = kit_boxes.to_image(seen[:, :4].astype(np.float64), frame_of(*size, self.how), *size)
        whole = (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
        rows = zip(seen[whole, 4:].tolist(), corners[whole].tolist())
        return tuple(Box(self.names[int(k)], p, tuple(c), int(k)) for (p, k), c in rows)[:most]

    def check_font(self, font: Path | None) -> None:
        """Raises BadConfig where a name cannot be written, before the frame in which it is."""
        kit_draw.font_for("".join(self.names) + "0123456789%", 16, font)

    def paint(self, image: Image.Image, look: Look, font: Path | None) -> Image.Image:
        """A copy of the image with the boxes, or the best label in its corner. Raises BadConfig as kit/draw does."""
        if not self.detects:
            return kit_draw.labelled(image, [f"{name} {100 * p:.0f}%" for name, p in look.labels], font)
        rows = [(*b.corners, b.probability, b.kind) for b in look.boxes]
        return kit_draw.draw(image, np.array(rows, np.float64).reshape(-1, 6), self.names, font)


def load(folder: Path, lang: str = "en", top: int | None = None, threshold: float | None = None) -> Eye:
    """The bundle in `folder`, ready to look. Raises BadBundle, BadConfig, MissingBackend."""
    if lang not in ("en", "zh"):
        raise BadConfig(f"lang is {lang!r}.", "Choose en or zh.")
    found = bundles.load(folder)
    how, task = found.preprocess, found.task
    if how is None:
        raise BadBundle(
            f"The model in {folder} takes ready float inputs; its preprocessing is not known.",
            "Compress it again with --input-size, --mean, --std.",
        )
    if threshold is not None:
        task = _with_threshold(task, threshold)
    run = get("formats", found.format, needs="RUNS_ON").load(found.model, usable_threads())
    return Eye(run, how, task, found.labels(lang), top)


def _with_threshold(task: Any, threshold: float) -> Any:
    if not hasattr(task, "head"):
        raise BadConfig("A threshold is for detectors; this bundle classifies.", "Leave --threshold out.")
    if not 0 <= threshold < 1:
        raise BadConfig(f"threshold is {threshold:g}.", "Give 0 to under 1: the lowest score that is shown.")
    return replace(task, threshold=threshold, floor=min(task.floor, threshold))
