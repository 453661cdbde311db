"""Using a bundle: labels of images, times on this machine. Needs only the base installation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten import bench
from lighten import bundle as bundles
from lighten.data.cache import write_whole
from lighten.data.images import SUFFIXES, open_image
from lighten.data.preprocess import to_pixels
from lighten.errors import BadBundle, BadConfig, BadImage
from lighten.machine import environment, usable_threads
from lighten.plugins import get
from lighten.types import to_json


@dataclass(frozen=True)
class Answer:
    """One image with its labels and probabilities, or with its problem."""

    image: Path
    labels: tuple[tuple[str, float], ...] = ()
    problem: str = ""


def answers(folder: Path, images: list[Path], lang: str, top: int) -> Iterator[Answer]:
    """An answer for each image, in order; folders are walked. Raises BadBundle, BadConfig."""
    if lang not in ("en", "zh"):
        raise BadConfig(f"lang is {lang!r}.", "Choose en or zh.")
    found = bundles.load(folder)
    how = found.preprocess
    if how is None:
        raise BadBundle(
            f"The model in {folder} takes ready float inputs; its preprocessing is not known.",
            "Compress it again with --input-size, --mean, --std.",
        )
    run, task = (
        get("formats", found.format, needs="RUNS_ON").load(found.model, usable_threads()),
        get("tasks", found.manifest["task"]),
    )
    names = found.labels(lang)
    for path in _files(images):
        try:
            scores = run(bench.inputs_of(to_pixels(open_image(path), how)[None], how))[0]
        except BadImage as e:
            yield Answer(path, problem=e.what)
            continue
        yield Answer(path, tuple(task.decode(np.asarray(scores, np.float64), names, top)))


def _files(images: list[Path]) -> Iterator[Path]:
    for path in images:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise BadConfig(f"{path} holds no images.", f"Known endings: {', '.join(SUFFIXES)}.")
            yield from inside
        else:
            yield path


def bench_bundle(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Latency at one thread and at all, throughput, peak memory, from a fresh process; JSON with raw samples to `out`."""
    found = bundles.load(folder)
    golden = found.golden()
    pixels = np.concatenate([golden["pixels"]] * 8)
    got = bench.measure(found.model, found.format, pixels, found.preprocess)
    if out is not None:
        record = {
            "latency": to_json(got.latency),
            "throughput": got.throughput,
            "memory_mb": got.memory_mb,
            "runtime": got.runtime,
            "model_sha256": found.manifest["model"]["sha256"],
            "environment": environment(),
        }
        write_whole(out, json.dumps(record, indent=1))
    rows: dict[str, Any] = {"runtime": got.runtime, "processor": environment()["processor"]}
    for row in got.latency:
        spread = f"p50 {row.p50:.2f} ms, p95 {row.p95:.2f} ms ({len(row.samples_ms)} runs)"
        rows[f"latency, {row.threads} thread{'s' if row.threads > 1 else ''}"] = spread
    rows["throughput"] = f"{got.throughput:.0f} images/s (batches of 32, {usable_threads()} threads)"
    return rows | {"peak memory": f"{got.memory_mb:.0f} MB"}
