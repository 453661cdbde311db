"""What the benchmarks share: fair timing of several files in one run, and tables kept in README.md."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lighten.data.cache import write_whole
from lighten.machine import environment

HERE = Path(__file__).parent
Run = Callable[[np.ndarray], np.ndarray]
WARM, BURST = 3, 10


def interleaved_ms(
    runs: Mapping[str, Run], x: np.ndarray, rounds: int = 80, warmup: int = 10
) -> dict[str, list[float]]:
    """Raw times in ms of single calls, `rounds` of each file, taken in turns, so that a busy moment hits all alike.

    A turn is BURST calls of one file after WARM that are not timed: a device runs one network, whose weights stay in its
    caches, and not ten in turns that drive each other out.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(-(-(warmup + rounds) // BURST)):
        for name, run in runs.items():
            for _ in range(WARM):
                run(x)
            for _ in range(BURST):
                before = time.perf_counter()
                run(x)
                if k * BURST >= warmup:
                    times[name].append((time.perf_counter() - before) * 1e3)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(row) for name, row in times.items()}


def outputs(run: Run, batches: Callable[[], object]) -> np.ndarray:
    """Outputs of every batch that `batches()` yields."""
    return np.concatenate([np.asarray(run(x)) for x in batches()])  # type: ignore[attr-defined]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def put(section: str, text: str) -> None:
    """Write `text` between the marks of a section of README.md, with the command and the machine that made it."""
    file = HERE / "README.md"
    page = file.read_text("utf-8") if file.exists() else "# Benchmarks\n"
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    e = environment()
    versions = ", ".join(f"{k} {e[k]}" for k in ("torch", "onnxruntime", "openvino") if k in e)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    block = f"{start}\n`{command}`\n\n{text}\n\n{e['processor']}; {versions}.\n{end}"
    if start in page:
        page = page[: page.index(start)] + block + page[page.index(end) + len(end) :]
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    write_whole(file, page)
    print(text)


@contextlib.contextmanager
def room_for(keep: Path | None) -> Iterator[Path]:
    """`keep`, made where it is not there, else a folder that goes away."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory() as room:
        yield Path(room)
