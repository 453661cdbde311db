"""Run folders beside each other: the leaderboard of all, and two of them compared. Nothing is measured here."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lighten import ledger, search
from lighten.errors import BadBundle, UnknownName
from lighten.report import read_result
from lighten.types import (
    Advice,
    Budget,
    ClassChange,
    Estimate,
    Evidence,
    Latency,
    Recipe,
    Result,
    Step,
    Trial,
    shrink,
    speedup,
    to_json,
)

RESULT = "result.json"
UNFINISHED, DAMAGED = "unfinished", "damaged"
ORDER = ("PASS", "FAIL", UNFINISHED, DAMAGED)
UNEVEN = 1.1
"""Ratio of the same original's times in two runs from which the machine was not equally fast."""
OWN_FOLDERS = ("artifacts", "bundle", "flips", "scratch")
"""Folders of a run, which hold no runs themselves."""


@dataclass(frozen=True)
class Run:
    """One run folder: its result, or the trials of a run that has not finished, or the reason why it cannot be read.

    `when` is the time of its last change, in seconds since 1970.
    """

    name: str
    path: str
    when: float
    result: Result | None = None
    trials: tuple[Trial, ...] = ()
    reason: str = ""

    @property
    def verdict(self) -> str:
        """PASS or FAIL, unfinished, damaged."""
        return DAMAGED if self.reason else self.result.verdict if self.result else UNFINISHED


@dataclass(frozen=True)
class Standing:
    """One row of the leaderboard. What is not known is empty or None.

    `drop` (points) is that of the report images where `report` is true; else the run is unfinished, and it is that of
    its best trial so far on the select images. `shrink` is percent of bytes saved; `speedup` and `latency_ms` are of one
    image on one thread. `missed` names broken limits.
    """

    verdict: str
    name: str
    path: str
    when: str
    model: str = ""
    data: str = ""
    device: str = ""
    recipe: str = ""
    drop: Estimate | None = None
    report: bool = False
    shrink: float | None = None
    speedup: float | None = None
    size_mb: float | None = None
    latency_ms: float | None = None
    trials: int = 0
    missed: tuple[str, ...] = ()
    reason: str = ""


# --- reading ----------------------------------------------------------------------------------------


def read_runs(folder: Path) -> tuple[Run, ...]:
    """Every run at or below `folder`, by path. Raises BadBundle where there is no such folder."""
    if not folder.is_dir():
        raise BadBundle(f"There is no folder {folder}.", "Give the folder of your runs, e.g. runs.")
    found: list[Path] = []
    for here, inside, files in os.walk(folder):
        run = RESULT in files or ledger.NAME in files
        found += [Path(here)] if run else []
        inside[:] = [d for d in inside if not d.startswith(".") and not (run and d in OWN_FOLDERS)]
    return tuple(read_run(path) for path in sorted(found))


def read_run(path: Path) -> Run:
    """One run folder; damage becomes its `reason`."""
    book = path / ledger.NAME
    file = path / RESULT if (path / RESULT).exists() else book
    run = Run(path.resolve().name, str(path), file.stat().st_mtime)
    try:
        if file.name == RESULT:
            result = read_result(path)
            _winning(result)
            return dataclasses.replace(run, result=result, trials=result.trials)
        return dataclasses.replace(run, trials=ledger.read(book).trials)
    except BadBundle as e:
        return dataclasses.replace(run, reason=e.what)
    except OSError as e:
        return dataclasses.replace(run, reason=f"{file} cannot be read ({e.strerror})")


def _winning(result: Result) -> tuple[Trial, Evidence, Evidence]:
    """The winner, its evidence and the original's. Raises BadBundle where one is missing."""
    winner = next((t for t in (*result.trials, result.baseline) if t.id == result.winner), None)
    if winner is None or winner.evidence is None or result.baseline.evidence is None:
        raise BadBundle(f"{result.path}/{RESULT} names a winner that was not measured.", "Run its command again.")
    return winner, winner.evidence, result.baseline.evidence


def find_run(given: str, out: Path = Path("runs")) -> Run:
    """A finished run by its path, or by its name in `out`. Raises UnknownName, or BadBundle where it has no result."""
    paths = [p for p in (Path(given), out / given) if (p / RESULT).exists() or (p / ledger.NAME).exists()]
    if not paths:
        raise UnknownName("run", given, [r.name for r in read_runs(out)] if out.is_dir() else [])
    run = read_run(paths[0])
    if run.result is None:
        raise BadBundle(
            run.reason or f"{run.path} has not finished.", "Run its command again: it continues, and writes the result."
        )
    return run


# --- the leaderboard --------------------------------------------------------------------------------


def leaderboard(runs: Iterable[Run]) -> tuple[Standing, ...]:
    """PASS first, then FAIL, unfinished and damaged; each by model and data, the smallest drop first."""

    def order(row: Standing) -> tuple[int, str, str, float, str]:
        drop = math.inf if row.drop is None or math.isnan(row.drop.value) else row.drop.value
        return ORDER.index(row.verdict) if row.verdict in ORDER else len(ORDER), row.model, row.data, drop, row.path

    return tuple(sorted(map(standing, runs), key=order))


def standing(run: Run) -> Standing:
    """A run as its row."""
    when = datetime.fromtimestamp(run.when).isoformat(" ", "minutes")
    row = Standing(run.verdict, run.name, run.path, when, trials=len(run.trials), reason=run.reason)
    if run.result is not None:
        r = run.result
        winner, got, base = _winning(r)
        row = dataclasses.replace(
            row,
            model=r.model,
            data=r.data,
            device=r.device.name,
            drop=r.final.drop,
            report=True,
            missed=tuple(m.limit for m in r.misses),
        )
        return _measured(row, winner.recipe, got, base)
    best = best_so_far(run.trials)
    if best is None:
        return row
    winner, got, base = best
    return _measured(dataclasses.replace(row, drop=got.drop), winner.recipe, got, base)


def _measured(row: Standing, recipe: Recipe, got: Evidence, base: Evidence) -> Standing:
    return dataclasses.replace(
        row,
        recipe=recipe.title,
        shrink=shrink(got, base),
        speedup=speedup(got, base),
        size_mb=got.size.mb,
        latency_ms=got.p50(1),
    )


def best_so_far(trials: Sequence[Trial]) -> tuple[Trial, Evidence, Evidence] | None:
    """Of an unfinished run: who would win without any limit (its ledger names no budget), and the original's evidence."""
    baseline = next((t for t in trials if t.recipe == Recipe(format="onnx")), None)
    others = [t for t in trials if t is not baseline and t.evidence is not None]
    if baseline is None or baseline.evidence is None or not others:
        return None
    best = search.judge(others, baseline, Budget())
    assert best.evidence is not None
    return best, best.evidence, baseline.evidence


# --- two runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One thing that the two runs have differently, as text; empty where a run lacks it."""

    what: str
    a: str
    b: str


@dataclass(frozen=True)
class Beside:
    """One figure of both winners: `difference` is b - a, `error` its standard error where there is one.

    The error takes the two as independent. Accuracies on the same images are not, so there it is too large rather than
    too small. `better` is a, b, or empty where two errors do not tell them apart; figures without an error (bytes)
    are exact, and memory is one reading.
    """

    what: str
    unit: str
    a: float
    b: float
    difference: float
    error: float | None
    better: str


@dataclass(frozen=True)
class ClassBeside:
    """One class on the report images: accuracy (of detectors AP50-95) of both winners in percent, their difference b - a
    and its error; of an AP it is not known, and nan."""

    name: str
    name_zh: str
    a: float
    b: float
    difference: float
    error: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two finished runs. `warnings` say which figures must not be held against each other; `metric` is the name of both
    runs' metric, empty where they have different ones."""

    a: str
    b: str
    verdicts: tuple[str, str]
    titles: tuple[str, str]
    warnings: tuple[Advice, ...]
    recipe: tuple[Difference, ...]
    budget: tuple[Difference, ...]
    figures: tuple[Beside, ...]
    classes: tuple[ClassBeside, ...]
    metric: str = "top1"


def compare(a: Run, b: Run) -> Comparison:
    """Winner against winner. Raises BadBundle where a run has no result."""
    if a.result is None or b.result is None:
        run = b if a.result else a
        raise BadBundle(run.reason or f"{run.path} has not finished.", "Run its command again: it continues.")
    one, other = _winning(a.result), _winning(b.result)
    names = (a.path, b.path) if a.name == b.name else (a.name, b.name)
    return Comparison(
        *names,
        (a.verdict, b.verdict),
        (one[0].recipe.title, other[0].recipe.title),
        unlike(a.result, b.result),
        _differences(recipe_facts(one[0].recipe), recipe_facts(other[0].recipe)),
        _differences(*({k: _text(v) for k, v in to_json(r.budget).items()} for r in (a.result, b.result))),
        tuple(_figures(a.result, b.result)),
        _classes(a.result, b.result),
        one[1].metric_name if one[1].metric_name == other[1].metric_name else "",
    )


def recipe_facts(recipe: Recipe) -> dict[str, str]:
    """A recipe as flat names and texts: format, bits, each layer that has others, each setting of each step."""
    facts = {"format": recipe.format}
    p = recipe.precision
    facts |= {"weights": p.weights, "activations": p.activations}
    facts |= {f"layer {layer}": f"{w}/{x}" for layer, w, x in p.exceptions}
    facts["steps"] = " + ".join(s.method for s in recipe.steps) or "none"
    seen: dict[str, int] = {}
    for step in recipe.steps:
        seen[step.method] = seen.get(step.method, 0) + 1
        name = step.method if seen[step.method] == 1 else f"{step.method} ({seen[step.method]})"
        facts |= {f"{name}.{key}": _text(value) for key, value in _flat(step)}
    return facts


def _flat(step: Step) -> Iterable[tuple[str, Any]]:
    """Settings; a table of pairs (layer, width) as one setting each."""
    for key, value in step.settings:
        rows = value if isinstance(value, tuple | list) else ()
        if rows and all(isinstance(r, tuple | list) and len(r) == 2 and isinstance(r[0], str) for r in rows):
            yield from ((f"{key}.{row[0]}", row[1]) for row in rows)
        else:
            yield key, value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differences(a: dict[str, str], b: dict[str, str]) -> tuple[Difference, ...]:
    """What differs, in the order of `a`, then what only `b` has."""
    names = dict.fromkeys([*a, *b])
    return tuple(Difference(k, a.get(k, ""), b.get(k, "")) for k in names if a.get(k, "") != b.get(k, ""))


# --- what must not be compared ------------------------------------------------------------------------


def unlike(a: Result, b: Result) -> tuple[Advice, ...]:
    """Whatever makes figures of two runs answers to different questions."""
    rows: list[Advice] = []

    def check(en: str, zh: str, x: Any, y: Any, harm: tuple[str, str]) -> None:
        if x != y:
            rows.append(Advice(f"{en}: {x} against {y}. {harm[0]}", f"{zh}：{x} 与 {y}。{harm[1]}"))

    names, names_zh = metric_words(a, b)
    accuracy = (f"{names} are not comparable.", f"{names_zh}不可比较。")
    images = (f"{names} and drops are of different images.", f"{names_zh}和下降来自不同的图片。")
    times = ("Times and memory are not comparable.", "时间和内存不可比较。")
    kernels = ("They were meant for different kernels.", "两者面向不同的计算内核。")
    check("Different data", "数据不同", a.data, b.data, accuracy)
    if a.data == b.data:
        check("Different split sizes", "数据划分的大小不同", _sizes(a), _sizes(b), images)
    if a.classes != b.classes:
        rows.append(Advice(f"Different classes. {accuracy[0]}", f"类别不同。{accuracy[1]}"))
    check("Different tasks", "任务不同", a.task, b.task, accuracy)
    check("Different target devices", "目标设备不同", a.device.name, b.device.name, kernels)
    check("Different processors", "处理器不同", _processor(a), _processor(b), times)
    return (*rows, *_other_original(a, b), *_other_settings(a, b), *_other_speed(a, b))


def _other_original(a: Result, b: Result) -> list[Advice]:
    """Drops, shrinks and speed-ups are relative to the original: is it the same, on the same images?"""
    if not _same_original(a, b):
        en, zh = f"Different originals: {a.model} against {b.model}", f"原模型不同：{a.model} 与 {b.model}"
        if a.model == b.model:
            en, zh = f"Different originals: two files of {a.model}", f"原模型不同：{a.model} 的两个文件"
        return [
            Advice(
                f"{en}. Drop, shrink and speed-up are each relative to its own original.",
                f"{zh}。下降、缩小和加速各自相对于自己的原模型。",
            )
        ]
    sizes_alike = a.data == b.data and _sizes(a) == _sizes(b)
    moved = a.final.baseline != b.final.baseline or _evidence(a).metric != _evidence(b).metric
    if not (sizes_alike and moved):
        return []
    names, names_zh = metric_words(a, b)
    return [
        Advice(
            "The same original scores differently in the two runs: other images (seed or data), or another runtime. "
            f"{names} and drops are not comparable.",
            f"同一个原模型在两次运行中得分不同：图片（种子或数据）不同，或运行时不同。{names_zh}和下降不可比较。",
        )
    ]


def metric_words(a: Result, b: Result) -> tuple[str, str]:
    """What both runs measured, in the plural, in both languages; of different metrics or top-1, accuracies."""
    names = {_evidence(r).metric_name for r in (a, b)}
    return ("Values of mAP", "mAP ") if names == {"mAP"} else ("Accuracies", "准确率")


def _same_original(a: Result, b: Result) -> bool:
    x, y = a.baseline.artifact, b.baseline.artifact
    return a.model == b.model and x is not None and y is not None and x.sha256 == y.sha256


def _other_speed(a: Result, b: Result) -> list[Advice]:
    """The same original on the same processor is the yardstick of how busy the machine was."""
    x, y = _evidence(a).p50(1), _evidence(b).p50(1)
    if not _same_original(a, b) or _processor(a) != _processor(b) or max(x, y) <= UNEVEN * min(x, y):
        return []
    return [
        Advice(
            f"The machine was not equally fast: the same original took {x:.2f} ms against {y:.2f} ms. "
            "Compare speed, not ms.",
            f"机器快慢不同：同一个原模型分别用了 {x:.2f} ms 与 {y:.2f} ms。请比较加速，不要比较毫秒。",
        )
    ]


def _other_settings(a: Result, b: Result) -> list[Advice]:
    rows = []
    if a.preprocess != b.preprocess:
        rows.append(Advice("Different preprocessing of the images.", "图片的预处理不同。"))
    x, y = _winning(a)[1].runtime, _winning(b)[1].runtime
    if x != y:
        rows.append(
            Advice(
                f"Different runtimes: {x} against {y}. Times and memory are also those of the runtime.",
                f"运行时不同：{x} 与 {y}。时间和内存也取决于运行时。",
            )
        )
    counts = [sorted(row.threads for row in _winning(r)[1].latency) for r in (a, b)]
    if counts[0] != counts[1]:
        rows.append(
            Advice(
                f"Timed on different numbers of threads: {_text(counts[0])} against {_text(counts[1])}.",
                f"计时的线程数不同：{_text(counts[0])} 与 {_text(counts[1])}。",
            )
        )
    return rows


def _evidence(result: Result) -> Evidence:
    return _winning(result)[2]


def _sizes(result: Result) -> str:
    return ", ".join(f"{k} {n}" for k, n in sorted(result.images.items()))


def _processor(result: Result) -> str:
    return result.environment.get("processor", "")


# --- figures ------------------------------------------------------------------------------------------


def _figures(a: Result, b: Result) -> Iterable[Beside]:
    (_, x, x0), (_, y, y0) = _winning(a), _winning(b)
    if x.metric_name == y.metric_name:
        yield _estimates("report metric", "%", a.final.winner, b.final.winner, higher=True)
        yield _estimates("report drop", "pt", a.final.drop, b.final.drop, higher=False)
        yield _estimates("metric", "%", x.metric, y.metric, higher=True)
        yield _estimates("drop", "pt", x.drop, y.drop, higher=False)
    yield _exact("bytes", "MB", x.size.mb, y.size.mb)
    yield _exact("gzip", "MB", x.size.gzip_bytes / 1e6, y.size.gzip_bytes / 1e6)
    yield _exact("shrink", "%", shrink(x, x0), shrink(y, y0), higher=True)
    for threads in sorted({row.threads for row in x.latency} & {row.threads for row in y.latency}):
        rows = [next(row for row in e.latency if row.threads == threads) for e in (x, y)]
        yield _estimates(f"latency {threads}", "ms", median(rows[0]), median(rows[1]), higher=False)
    yield _exact("speedup", "x", speedup(x, x0), speedup(y, y0), higher=True, exact=False)
    yield _exact("memory", "MB", x.memory_mb, y.memory_mb, exact=False)


def median(row: Latency) -> Estimate:
    """Median in ms and its standard error, 1.25 x (IQR / 1.35) / sqrt(n), as McGill, Tukey and Larsen 1978 take it."""
    ordered, n = sorted(row.samples_ms), len(row.samples_ms)
    iqr = _quantile(ordered, 0.75) - _quantile(ordered, 0.25)
    return Estimate(row.p50, 1.25 * iqr / 1.35 / math.sqrt(n), n)


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between the two nearest."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _estimates(what: str, unit: str, a: Estimate, b: Estimate, *, higher: bool) -> Beside:
    error, gap = math.hypot(a.error, b.error), b.value - a.value
    sure = abs(gap) > 2 * error
    return Beside(what, unit, a.value, b.value, gap, error, _better(gap, higher) if sure else "")


def _exact(what: str, unit: str, a: float, b: float, *, higher: bool = False, exact: bool = True) -> Beside:
    """One reading each; without an error nothing is called better unless it is `exact`."""
    return Beside(what, unit, a, b, b - a, None, _better(b - a, higher) if exact else "")


def _better(gap: float, higher: bool) -> str:
    if not gap or math.isnan(gap):
        return ""
    return "b" if (gap > 0) == higher else "a"


def _classes(a: Result, b: Result) -> tuple[ClassBeside, ...]:
    """Classes of the same name, the largest change first; none where the metrics are different ones."""
    metrics = {_evidence(r).metric_name for r in (a, b)}
    if len(metrics) > 1:
        return ()
    titles = dict(zip(a.classes, a.classes_zh))
    others: dict[str, ClassChange] = {c.name: c for c in b.final.classes}
    share = metrics == {"top1"}
    rows = [_class(c, others[c.name], titles.get(c.name, c.name), share) for c in a.final.classes if c.name in others]
    return tuple(sorted(rows, key=lambda r: 1.0 if math.isnan(r.difference) else -abs(r.difference)))


def _class(a: ClassChange, b: ClassChange, name_zh: str, share: bool = True) -> ClassBeside:
    """Binomial errors where the values are a `share` of images, smoothed so that a perfect class is not certain (Agresti
    and Coull 1998: two hits, two misses). An average precision is none."""

    def variance(c: ClassChange) -> float:
        p = (c.after / 100 * c.n + 2) / (c.n + 4)
        return p * (1 - p) / (c.n + 4)

    error = 100 * math.sqrt(variance(a) + variance(b)) if share else math.nan
    return ClassBeside(a.name, name_zh, a.after, b.after, b.after - a.after, error, min(a.n, b.n))
