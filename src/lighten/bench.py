"""Warm-up, timing, memory, outputs: of one artifact, in a process of its own, so that a crash is one failed row."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lighten.errors import BadBundle, CrashedRuntime, LightenError
from lighten.machine import usable_threads
from lighten.plugins import get
from lighten.types import Beside, Latency, Preprocess, from_json, to_json

Run = Callable[[np.ndarray], np.ndarray]
BATCH = 32
"""Images that are run at once where no times are taken."""


@dataclass(frozen=True)
class Timing:
    """How long to warm up and measure. Each number of runs is bounded by its seconds, but never under `least`."""

    warmup: int = 10
    runs: int = 60
    least: int = 10
    seconds: float = 4.0


@dataclass(frozen=True)
class Readings:
    """What the process said: outputs (N, classes), raw times, images per second, peak memory in MB, the runtime, and the
    times beside another file where one was given."""

    outputs: np.ndarray
    latency: tuple[Latency, ...]
    throughput: float
    memory_mb: float
    runtime: str
    beside: Beside | None = None


def samples_ms(
    run: Callable[[], object], timing: Timing, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, ...]:
    """Raw times of `run` in ms, after a warm-up that is not counted."""
    start = clock()
    for _ in range(timing.warmup):
        run()
        if clock() - start > timing.seconds / 2:
            break
    times: list[float] = []
    start = clock()
    while len(times) < timing.runs and (len(times) < timing.least or clock() - start < timing.seconds):
        before = clock()
        run()
        times.append((clock() - before) * 1e3)
    return tuple(times)


def in_turns_ms(
    run: Callable[[], object],
    other: Callable[[], object],
    timing: Timing,
    clock: Callable[[], float] = time.perf_counter,
) -> Beside:
    """Raw times of both, burst by burst: calls one by one would drive each other's weights out of the caches."""
    ours: list[float] = []
    theirs: list[float] = []
    burst, start = Timing(2, 5, 3, timing.seconds / 8), clock()
    while len(ours) < 3 * burst.runs or (len(ours) < timing.runs and clock() - start < timing.seconds):
        for times, one in ((ours, run), (theirs, other)):
            times.extend(samples_ms(one, burst, clock))
        if clock() - start > 3 * timing.seconds:
            break
    return Beside(tuple(ours), tuple(theirs))


def peak_memory_mb() -> float:
    """Most memory this process ever held. Linux's VmHWM: getrusage would count the parent it was forked from."""
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
        return int(next(r for r in rows if r.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def thread_counts() -> tuple[int, ...]:
    """One thread, and all that this process may use."""
    return tuple(sorted({1, usable_threads()}))


def measure(
    path: Path,
    format: str,
    pixels: np.ndarray,
    how: Preprocess | None,
    *,
    timing: Timing | None = Timing(),
    batch: int = BATCH,
    beside: tuple[Path, str] | None = None,
    timeout_s: float = 3600,
) -> Readings:
    """Run the artifact at `path` over `pixels` (N, H, W, C) in a fresh process; no timing where `timing` is None.

    `beside` is another file, with the network's own inputs, and its format: single images of both are timed in turns.

    Raises CrashedRuntime where the process dies, BadBundle and others as the format's loader gives them.
    """
    get("formats", format, needs="RUNS_ON")
    with tempfile.TemporaryDirectory(prefix="lighten-") as room:
        folder = Path(room)
        np.save(folder / "pixels.npy", pixels)
        request = {
            "path": str(path.resolve()),
            "format": format,
            "how": to_json(how),
            "timing": to_json(timing),
            "batch": batch,
            "beside": [str(beside[0].resolve()), beside[1]] if beside and timing else None,
        }
        (folder / "request.json").write_text(json.dumps(request))
        _run_child(folder, timeout_s, path)
        reply = json.loads((folder / "reply.json").read_text())
        outputs = np.load(folder / "outputs.npy", allow_pickle=False)
    latency = tuple(from_json(Latency, row) for row in reply["latency"])
    turns = from_json(Beside, reply["beside"]) if reply["beside"] else None
    return Readings(outputs, latency, reply["throughput"], reply["memory_mb"], reply["runtime"], turns)


def _run_child(folder: Path, timeout_s: float, path: Path) -> None:
    # Threads are set by each runtime; a library's own default must not come on top.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lighten.bench", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired as e:
        raise CrashedRuntime(
            f"{path.name} gave no answer in {timeout_s:.0f} s.", "Try a smaller model or fewer images."
        ) from e
    if (folder / "error.json").exists():
        error = json.loads((folder / "error.json").read_text())
        raise BadBundle(error["what"], error["to_do"])
    if done.returncode or not (folder / "reply.json").exists():
        why = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        tail = " ".join(done.stderr.strip().splitlines()[-2:])[-300:]
        raise CrashedRuntime(f"The runtime died on {path.name} ({why}). {tail}".strip(), "Try another format.")


def _child(folder: Path) -> None:
    """The fresh process: timing first, so that peak memory is that of single images."""
    request = json.loads((folder / "request.json").read_text())
    module, path = get("formats", request["format"]), Path(request["path"])
    how = from_json(Preprocess, request["how"]) if request["how"] else None
    pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
    latency = []
    for threads in thread_counts() if request["timing"] else ():
        one, run = inputs_of(pixels[:1], how), module.load(path, threads)
        latency.append(Latency(threads, samples_ms(functools.partial(run, one), from_json(Timing, request["timing"]))))
    memory_mb = peak_memory_mb()
    outputs, rate = _all_outputs(module.load(path, usable_threads()), pixels, how, request["batch"])
    np.save(folder / "outputs.npy", outputs)
    reply = {
        "latency": to_json(tuple(latency)),
        "throughput": rate,
        "memory_mb": memory_mb,
        "runtime": module.runtime(),
        "beside": to_json(_beside(request, module, pixels, how)),
    }
    (folder / "reply.json").write_text(json.dumps(reply))


def _beside(request: dict[str, Any], module: ModuleType, pixels: np.ndarray, how: Preprocess | None) -> Beside | None:
    if request["beside"] is None:
        return None
    from lighten.data.splits import as_inputs

    other, format = request["beside"]
    one, theirs = inputs_of(pixels[:1], how), as_inputs(np.asarray(pixels[:1]), how)
    run, their_run = module.load(Path(request["path"]), 1), get("formats", format).load(Path(other), 1)
    timing = from_json(Timing, request["timing"])
    return in_turns_ms(functools.partial(run, one), functools.partial(their_run, theirs), timing)


def _all_outputs(run: Run, pixels: np.ndarray, how: Preprocess | None, batch: int) -> tuple[np.ndarray, float]:
    """Outputs of every image, and images per second of the runs alone."""
    parts, spent = [], 0.0
    for start in range(0, len(pixels), batch):
        x = inputs_of(pixels[start : start + batch], how)
        before = time.perf_counter()
        parts.append(np.asarray(run(x), np.float32))
        spent += time.perf_counter() - before
    return np.concatenate(parts), len(pixels) / max(spent, 1e-9)


def inputs_of(pixels: np.ndarray, how: Preprocess | None) -> np.ndarray:
    """What a file takes for decoded pixels: the network's inputs, or the pixels where it normalises them inside."""
    from lighten.data.splits import as_inputs

    return np.asarray(pixels) if how is not None and how.inside else as_inputs(np.asarray(pixels), how)


def main(folder: Path) -> int:
    """Entry point of the child process."""
    try:
        _child(folder)
    except LightenError as e:
        (folder / "error.json").write_text(json.dumps({"what": e.what, "to_do": e.to_do}))
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
