"""A detector's result as `compress` would return it, made of composed scenes and made-up raw outputs; real numbers of them."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from conftest import evidence
from lighten import vault, workshop
from lighten.data import framed
from lighten.data.composed import composed_demo
from lighten.heads import Head, Level
from lighten.plugins import task_of
from lighten.types import (
    Advice,
    Artifact,
    Budget,
    ChannelGroup,
    Data,
    Device,
    Estimate,
    Evidence,
    Failure,
    Job,
    LayerCost,
    Precision,
    Preprocess,
    Recipe,
    Result,
    Step,
    Trial,
    WidthCost,
)

SIZE, BINS, OFF = 160, 8, -12.0
HOW = Preprocess(SIZE, SIZE, "letterbox")
INT8 = Recipe((Step("quantize"),), Precision("int8", "uint8"))
Row = tuple[float, float, float, float, float, int]


def head_of(classes: int) -> Head:
    """As `lighten:nano_detector` has it at this size."""
    levels = tuple(Level(SIZE // s, SIZE // s, (float(s), float(s))) for s in (8, 16, 32))
    return Head(levels, classes, "distribution", bins=BINS)


def encoded(images: list[list[Row]], head: Head) -> np.ndarray:
    """Raw outputs that hold these boxes (x1, y1, x2, y2, score, class), each at a place that reaches its sides."""
    out = np.full((len(images), head.places, head.values), OFF, np.float32)
    for n, rows in enumerate(images):
        for x1, y1, x2, y2, score, kind in rows:
            place, x, y, step = _place((x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, y2 - y1), head)
            far = np.clip(np.array([x - x1, y - y1, x2 - x, y2 - y]) / step, 0, BINS - 1.001)
            bins = np.full((4, BINS), OFF)
            low = far.astype(int)
            bins[range(4), low] = np.log(np.maximum(1 - (far - low), 1e-5))
            bins[range(4), low + 1] = np.log(np.maximum(far - low, 1e-5))
            out[n, place, : head.numbers] = bins.ravel()
            out[n, place, head.numbers + kind] = math.log(score / (1 - score))
    return out


def _place(x: float, y: float, longest: float, head: Head) -> tuple[int, float, float, float]:
    """The place nearest to x, y on the finest level that reaches so far, its centre, and its step."""
    first = 0
    for level in head.levels:
        step = level.step[0]
        if longest <= 1.4 * (BINS - 2) * step or level is head.levels[-1]:
            column, row = (min(max(int(v / step), 0), level.columns - 1) for v in (x, y))
            return first + row * level.columns + column, (column + 0.5) * step, (row + 0.5) * step, step
        first += level.places
    raise AssertionError


def answers(labels: np.ndarray, classes: int, dice: np.random.Generator) -> list[list[Row]]:
    """What a detector of some skill finds: most objects, boxes a little off, some of the wrong class, some of nothing."""
    found = []
    for rows in labels:
        mine: list[Row] = []
        for kind, x1, y1, x2, y2, _ in rows[rows[:, 0] >= 0].tolist():
            if dice.random() < 0.88:
                said = int(dice.integers(classes)) if dice.random() < 0.05 else int(kind)
                box = np.array([x1, y1, x2, y2]) + dice.normal(0, 1.4, 4)
                mine.append((*box.tolist(), float(dice.uniform(0.35, 0.97)), said))  # type: ignore[arg-type]
        if dice.random() < 0.15:
            x, y, w = dice.uniform(0, 120), dice.uniform(0, 120), dice.uniform(16, 40)
            mine.append((x, y, x + w, y + w, float(dice.uniform(0.31, 0.6)), int(dice.integers(classes))))
        found.append(mine)
    return found


def worse(images: list[list[Row]], dice: np.random.Generator, lost: float, moved: float) -> list[list[Row]]:
    """The same after compression: a share is `lost`, sides `moved` by so many pixels, scores a little lower."""
    return [
        [
            (*(np.array(box) + dice.normal(0, moved, 4)).tolist(), min(0.98, max(0.31, s - dice.normal(0.01, 0.02))), k)
            for *box, s, k in rows
            if dice.random() >= lost
        ]
        for rows in images
    ]  # type: ignore[misc]


@cache
def scenes() -> Data:
    """The demonstration set, boxes in the network's input."""
    return framed(composed_demo(SIZE), HOW)


def data_of(names: tuple[str, ...], names_zh: tuple[str, ...]) -> Data:
    """The demonstration set with these classes: each of its ten is spread over as many of them."""
    data, share = scenes(), len(names) // 10
    if share < 2:
        return dataclasses.replace(data, classes=names, classes_zh=names_zh)
    split = data.report
    labels = split.images.labels.copy()
    spread = labels[..., 0] * share + np.arange(labels.shape[1]) % share
    labels[..., 0] = np.where(labels[..., 0] >= 0, spread, -1)
    split = dataclasses.replace(split, images=dataclasses.replace(split.images, labels=labels))
    return dataclasses.replace(data, classes=names, classes_zh=names_zh, report=split)


def measured(
    task: Any, before: np.ndarray, after: np.ndarray, labels: np.ndarray, seed: int, **figures: Any
) -> Evidence:
    """Evidence of made-up times and sizes, and of real answers; the export moves the boxes next to not at all."""
    base = evidence(**figures)
    exported = after + np.random.default_rng(seed).normal(0, 0.01, after.shape).astype(np.float32)
    return dataclasses.replace(
        base,
        metric_name="mAP",
        metric=task.score(after, labels),
        drop=task.drop(before, after, labels),
        extra=task.extra(after, labels),
        flipped=len(task.flipped(before, after)),
        fidelity=workshop.agreement(task, exported, after),
        drift=workshop.agreement(task, before, after),
    )


def detector_result(
    folder: Path,
    names: tuple[str, ...] | None = None,
    names_zh: tuple[str, ...] | None = None,
    *,
    lost: float = 0.08,
    moved: float = 1.2,
    blind: bool = False,
) -> Result:
    """A whole result with pictures in `folder`. `blind` detectors find nothing, `lost` and `moved` are those of `worse`."""
    data = scenes() if names is None else data_of(names, names_zh or names)
    head, split = head_of(len(data.classes)), data.report.prepare(HOW)
    job = Job(data, "detection", Device("x86", "x86 laptop (VNNI)", "x86 笔记本（VNNI）", ("onnx",)), HOW, head=head)
    task, dice = task_of(job), np.random.default_rng(7)
    first = [[] for _ in split.labels] if blind else answers(split.labels, head.classes, dice)
    before = encoded(first, head)
    after = before if not (lost or moved) else encoded(worse(first, dice, lost, moved), head)
    trials = (
        Trial(INT8, Artifact("artifacts/int8.onnx", "onnx", "ab" * 32), measured(task, before, after, split.labels, 1, size=2_200_000, ms=3.1)),
        Trial(dataclasses.replace(INT8, format="ncnn"), failure=Failure("export", "ncnn has no such layer.")),
    )  # fmt: skip
    original = measured(task, before, before, split.labels, 0, size=8_500_000, ms=9.4)
    return Result(
        verdict="PASS",
        misses=(),
        advice=(Advice("The ends of the box branches keep 8 bits.", "框分支的末层保持 8 位。"),),
        budget=Budget(max_drop=15, min_shrink=70, min_speedup=2),
        device=job.device,
        task="detection",
        model="nano_detector",
        data=data.name,
        classes=data.classes,
        classes_zh=data.classes_zh,
        preprocess=HOW,
        baseline=Trial(Recipe(), Artifact("artifacts/original.onnx", "onnx", "cd" * 32), original),
        trials=trials,
        winner=trials[0].id,
        final=vault.judged(task, before, after, split.labels, data.classes),
        environment={"lighten": "0.1.0", "onnxruntime": "1.31.1"},
        command="lighten compress nano.safetensors --task detection --data composed-demo",
        images={k: len(s) for k, s in data.splits.items()},
        flips=vault.thumbnails(folder, split, before, after, job),
        path=str(folder),
        sensitivity=costs(),
        widths=(
            WidthCost("stem", 8, 0.42, Estimate(1.2, 0.4, 256)),
            WidthCost("stem", 4, 2.1, Estimate(6.0, 0.9, 256)),
        ),
        groups=(ChannelGroup("stem", 16, (("stem", 1),), (("stages.0.0", 1),)),),
        head=head,
    )


def costs() -> tuple[LayerCost, ...]:
    """A scan of six layers, the ends of the box branch worst."""
    layers = ("stem.0", "stages.0.0.0", "neck.lateral.0.0", "heads.0.score", "heads.0.box", "heads.1.box")
    return tuple(
        LayerCost(
            layer, "conv2d", weights, "int8", 0.002 * 3**k * scale, 0.0, Estimate(0.1 * k * scale, 0.2, 256), 4000
        )
        for k, layer in enumerate(layers)
        for weights, scale in (("int8", 0.1), ("int4", 1.0))
    )
