"""One recipe after another: where it is tried, how long it may take, what is said and recorded of it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten import search, workshop
from lighten.bench import Timing
from lighten.clock import Clock
from lighten.ledger import Ledger
from lighten.plugins import get, missing_backends
from lighten.types import Budget, Evidence, Job, Predicted, Recipe, Say, Trial, metric_title
from lighten.worker import Worker

TRAINED = re.compile(r"trained [\d.]+ epochs in (\d+) s")


@dataclass(frozen=True)
class Run:
    """What stays the same throughout a run. `formats` are those that are tried, `asked` those of them that the user
    named; `weighed` is the unchanged network's trial, once there is one."""

    job: Job
    folder: Path
    budget: Budget
    clock: Clock
    log: Say
    formats: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    timing: Timing = dataclasses.field(default_factory=Timing)
    isolate: bool = True
    weighed: Trial | None = None

    @property
    def baseline(self) -> Trial:
        """The unchanged network's trial."""
        assert self.weighed is not None
        return self.weighed

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"


class Here:
    """Tries recipes in this process; what `Worker` does in another one."""

    def __init__(self, run: Run, reference: workshop.Reference) -> None:
        self.run, self.reference = run, reference
        self.made: workshop.Made = {}

    def start(self) -> None:
        """There is nothing to start."""

    def attempt(self, recipe: Recipe, limit_s: float | None = None) -> Trial:
        """As `Worker.attempt`, but a crash ends the run, and `limit_s` is not held."""
        run = self.run
        return workshop.attempt(recipe, run.job, self.reference, run.artifacts, run.timing, self.made)


Bench = Worker | Here


@contextlib.contextmanager
def bench_for(run: Run, reference: workshop.Reference) -> Iterator[Bench]:
    """Where recipes are tried."""
    if not run.isolate:
        yield Here(run, reference)
        return
    with Worker(run.job, reference, run.folder, run.timing) as worker:
        yield worker


def tried(
    book: Ledger,
    recipe: Recipe,
    bench: Bench,
    run: Run,
    *,
    predicted: Predicted | None = None,
    limit_s: float | None = None,
) -> tuple[Ledger, Trial]:
    """The trial of a recipe: from the ledger where its files are whole, else made and recorded."""
    known = next((t for t in book.trials if t.id == recipe.id), None)
    if known is not None and workshop.is_whole(known, run.folder):
        run.log(f"{recipe.title}: done before")
        return book, known
    workshop.sweep(run.artifacts)
    began = time.monotonic()
    bench.start()
    if limit_s is not None:
        limit_s = max(limit_s - (time.monotonic() - began), 0.0)
    trial = dataclasses.replace(bench.attempt(recipe, limit_s), predicted=predicted)
    book = book.append("trial", trial)
    run.log(line_of(trial))
    return book, trial


def try_all(book: Ledger, menu: Sequence[Recipe], bench: Bench, run: Run) -> Ledger:
    """Every recipe of the menu, in order, until the time is up."""
    done = [run.baseline]
    for line in left_out(run):
        run.log(line)
    while (recipe := search.next_recipe(menu, done)) is not None:
        limit_s = limit_of(book, run)
        if limit_s is not None and limit_s <= 0:
            run.log(f"time is up after {len(done)} trials")
            break
        run.job.progress("trials", len(done), len(menu))
        book, trial = tried(book, recipe, bench, run, limit_s=limit_s)
        done.append(trial)
    run.job.progress("trials", len(menu), len(menu))
    return book


def left_out(run: Run) -> list[str]:
    """Formats of the device that are not tried because their tools are missing, and how to get them."""
    rows = [(f, get("formats", f)) for f in (() if run.asked else run.job.device.formats)]
    return [f"{f} is left out: pip install 'lighten[{m.EXTRA}]'" for f, m in rows if missing_backends(m)]


def line_of(trial: Trial) -> str:
    """One trial in one line."""
    if trial.evidence is None:
        return f"{trial.recipe.title}: failed, {trial.failure.reason if trial.failure else 'no evidence'}"
    e = trial.evidence
    return f"{trial.recipe.title}: {e.size.mb:.2f} MB, {metric_title(e.metric_name)} {e.metric} %, drop {e.drop.value:.2f} pt, {e.p50(1):.2f} ms, {e.memory_mb:.0f} MB of memory"


# --- how long it may take -----------------------------------------------------------------------------


def limit_of(book: Ledger, run: Run) -> float | None:
    """Seconds after which a trial is stopped, so that what follows keeps within the time."""
    return None if run.clock.left_s is None else run.clock.left_s - closing_s(book, run)


def closing_s(book: Ledger, run: Run) -> float:
    """Seconds that follow the last trial: original and winner answer the report images, each in a new process."""
    known = [(t, t.evidence) for t in (run.baseline, *book.trials) if t.evidence]
    rate = max(min(e.throughput for _, e in known), 1e-3)
    start = min(max(t.measure_s - len(run.job.data.select) / e.throughput, 0.0) for t, e in known)
    return 2 * (start + len(run.job.data.report) / rate)


def untrained_s(trial: Trial) -> float:
    """Seconds of a trial without those of its training, as `kit.fit` told them: it may end before its time.

    Who took over what was trained for another format tells of longer training than it was built in.
    """
    trained = sum(int(found[1]) for note in trial.notes if (found := TRAINED.match(note)))  # in whole seconds
    return max(trial.build_s - (trained if trained <= trial.build_s + 0.5 else 0), 0.0) + trial.measure_s


def evidence_of(trial: Trial) -> Evidence:
    """Of a trial that has some."""
    assert trial.evidence is not None
    return trial.evidence
