"""Using a bundle: labels or boxes of images, videos and cameras, drawn where wanted; times on this machine. Needs only
the base installation, for videos and cameras OpenCV too."""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lighten import bench
from lighten import bundle as bundles
from lighten.data.cache import write_whole
from lighten.data.images import open_image
from lighten.errors import BadConfig, BadData, BadImage
from lighten.eye import Box, Clock, Eye, load
from lighten.machine import environment, usable_threads
from lighten.targets import PICTURES, camera_target, sources, targets
from lighten.types import to_json
from lighten.video import Film, Frames, is_video, opencv, unwritable

QUALITY = 92
"""Of drawn JPEGs."""


@dataclass(frozen=True)
class Pace:
    """How fast a video or camera went: frames, seconds in all, and the seconds of each part of the work."""

    frames: int
    seconds: float
    parts: tuple[tuple[str, float], ...]

    def text(self, lang: str = "en") -> str:
        """One line."""
        rate = f"{self.frames / max(self.seconds, 1e-9):.1f}"
        each = ", ".join(
            f"{PARTS[name] if lang == 'zh' else name} {1e3 * s / max(1, self.frames):.1f} ms" for name, s in self.parts
        )
        if lang == "zh":
            return f"{self.frames} 帧，每秒 {rate} 帧（{each}）"
        return f"{self.frames} frames, {rate} a second ({each})"


PARTS = {
    "reading": "读取",
    "scaling": "缩放",
    "network": "网络",
    "boxes": "解码框",
    "labels": "解码标签",
    "drawing": "绘制",
}


@dataclass(frozen=True)
class Answer:
    """One image, or one frame of a video, with its labels and probabilities or its boxes; or with its problem.

    Of a video and of a camera there is one answer a frame, `frame` counting from 1, and a last one with the `pace` and, where
    there was one, the problem. `drawn` is the file that was written.
    """

    image: Path
    labels: tuple[tuple[str, float], ...] = ()
    problem: str = ""
    boxes: tuple[Box, ...] = ()
    frame: int | None = None
    pace: Pace | None = None
    drawn: Path | None = None

    def text(self, lang: str = "en") -> str:
        """What was seen, in one line."""
        where = f"{self.image}" if self.frame is None else f"{self.image}#{self.frame}"
        labels = [f"{name} {100 * p:.1f} %" for name, p in self.labels]
        found = [
            f"{b.name} {100 * b.probability:.0f} % ({', '.join(f'{v:.0f}' for v in b.corners)})" for b in self.boxes
        ]
        return "  ".join([where, *(labels or found or ["没有目标" if lang == "zh" else "nothing found"])])


def _never() -> bool:
    return False


def answers(
    folder: Path,
    images: list[Path],
    lang: str = "en",
    top: int | None = None,
    *,
    threshold: float | None = None,
    draw: Path | None = None,
    font: Path | None = None,
    camera: int | None = None,
    stop: Callable[[], bool] = _never,
) -> Iterator[Answer]:
    """An answer for each image and each frame, in order; folders are walked for images. `top` is how many labels [3] or
    boxes [all] are wanted, `threshold` the lowest score of a box [the bundle's].

    What is seen is drawn to `draw`: a picture, a video, or a folder for several. A video or camera ends, well, when `stop`
    says so. A damaged file is a problem of its own answer; raises BadBundle, BadConfig, MissingBackend, DiskFull.
    """
    if (camera is None) == (not images):
        raise BadConfig("Images, videos or a camera: one of them is needed.", "lighten run BUNDLE IMAGE, or --camera 0")
    rows = sources(images)
    to = targets(rows, draw) if draw and rows else {}
    recording = camera_target(draw) if draw and camera is not None else None
    if camera is not None or any(is_video(row.file) for row in rows):
        opencv()
    eye = load(folder, lang, top, threshold)
    if draw:
        eye.check_font(font)
    if camera is not None:
        yield from _watched(eye, camera, recording, font, stop)
    for row in rows:
        target = to.get(row.file)
        film = is_video(row.file)
        yield from _watched(eye, row.file, target, font, stop) if film else _seen(eye, row.file, target, font)


def _seen(eye: Eye, file: Path, target: Path | None, font: Path | None) -> Iterator[Answer]:
    try:
        image = open_image(file)
    except BadImage as e:
        yield Answer(file, problem=e.what)
        return
    look = eye.look(image)
    if target is not None:
        _write(target, eye.paint(image, look, font))
    yield Answer(file, look.labels, boxes=look.boxes, drawn=target)


def _write(path: Path, image: Image.Image) -> None:
    kept = io.BytesIO()
    try:
        image.save(kept, PICTURES[path.suffix.lower()], quality=QUALITY)
        write_whole(path, kept.getvalue())
    except (OSError, ValueError) as e:
        raise unwritable(path, e) from e


def _watched(
    eye: Eye, source: Path | int, target: Path | None, font: Path | None, stop: Callable[[], bool]
) -> Iterator[Answer]:
    """The frames of one video or camera, then its pace, and its problem where there is one."""
    name = source if isinstance(source, Path) else Path(f"camera-{source}")
    clock, spent, count, problem = time.perf_counter, defaultdict[str, float](float), 0, ""
    start = clock()
    try:
        with Frames(source) as frames, _film(target, frames.fps) as film:
            start = clock()
            for count, frame in enumerate(_timed(frames, spent, clock), 1):
                image = Image.fromarray(frame)
                look = eye.look(image)
                for part, seconds in look.spent:
                    spent[part] += seconds
                if film is not None:
                    begun = clock()
                    drawn = np.asarray(eye.paint(image, look, font))
                    for _ in range(_copies(film, clock() - start) if frames.camera else 1):
                        film.add(drawn)
                    spent["drawing"] += clock() - begun
                yield Answer(name, look.labels, boxes=look.boxes, frame=count)
                if stop():
                    break
            problem = frames.notice + (f" {target} has those alone." if frames.notice and target else "")
    except BadData as e:
        problem, target = e.what, None
    yield Answer(name, problem=problem, pace=Pace(count, clock() - start, tuple(spent.items())), drawn=target)


def _film(target: Path | None, fps: float) -> AbstractContextManager[Film | None]:
    return nullcontext() if target is None else Film(target, fps)


def _timed(frames: Frames, spent: dict[str, float], clock: Clock) -> Iterator[np.ndarray]:
    rows = iter(frames)
    while True:
        start = clock()
        frame = next(rows, None)
        spent["reading"] += clock() - start
        if frame is None:
            return
        yield frame


def _copies(film: Film, seconds: float) -> int:
    """How often a camera's frame is written, so that the film takes as long as what it shows did."""
    return max(0 if film.count else 1, round(seconds * film.fps) - film.count)


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
