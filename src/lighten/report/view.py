"""A Result as the report shows it: what is said and drawn, as ready text. The templates only lay it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.errors import BadBundle
from lighten.report import charts
from lighten.report.boxes import detector
from lighten.report.exported import NOTHING, Record, exported
from lighten.report.foresight import predictions, probes
from lighten.report.layers import layers, stored
from lighten.report.narrowed import groups, network
from lighten.report.numbers import fixed, saved, signed, significant
from lighten.report.recipes import detail, made
from lighten.report.sensitivity import sensitivity
from lighten.report.spent import spent
from lighten.report.texts import FORMATS, METRICS, PRECISIONS, Texts, sentence, texts
from lighten.search.reach import is_probe
from lighten.types import Evidence, Latency, Result, Trial, shrink, speedup

UNITS = {
    "max_drop": "",
    "max_size_mb": " MB",
    "min_shrink": "%",
    "max_latency_ms": " ms",
    "min_speedup": "×",
    "max_memory_mb": " MB",
    "time_s": " s",
}
MANY_CLASSES, FEW_CLASSES = 40, 20
MOST_FLIPS = 36


@dataclass(frozen=True)
class Cell:
    """One value of a row, with what belongs to it in smaller print."""

    label: str
    main: str
    sub: str = ""


@dataclass(frozen=True)
class Row:
    """One trial of the table. A failed one has no cells; its `note` is the reason. `detail` tells two of one title
    apart."""

    number: int
    title: str
    kind: str
    status: str
    note: str
    warning: str
    cells: tuple[Cell, ...]
    trial: Trial
    detail: str = ""
    probe: bool = False

    @property
    def mark(self) -> str:
        """How it is drawn: a short trial is faint, unless it has won."""
        return "probe" if self.probe and self.kind not in ("winner", "failed") else self.kind


def view(result: Result, lang: str, thumbnails: Mapping[str, str], record: Record = NOTHING) -> dict[str, Any]:
    """All that the templates need. `thumbnails`: data URI by the name that `Result.flips` uses; `record`: what was
    exported."""
    t = texts(lang, result.task)
    base, won = _evidence(result.baseline), _evidence(result.winning)
    table = rows(result, t)
    marked = [(row.number, row.mark, row.trial) for row in table]
    return {
        "t": t,
        "r": result,
        "lang": lang,
        "metric": metric_title(base.metric_name),
        **_headline(result, base, won, t),
        "signed": signed,
        "advice": [line.zh if lang == "zh" else line.en for line in result.advice],
        "limits": limits(result, base, won, t),
        "columns": next((row.cells for row in table if row.cells), ()),
        "rows": table,
        "short_trials": any(row.probe for row in table),
        **_pictures(result, table, t),
        **exported(record, base.size.bytes, t),
        "made": made(result.winning.recipe, widths_known(result), t),
        **network(result.baseline.network, result.winning.network, t),
        **groups(result, t),
        **predictions(marked, base, t),
        **probes(result, marked, metric_title(base.metric_name), t),
        **spent(result.spent, result.budget.time_s, t),
        **_classes(result, lang, t),
        **_flips(result, lang, thumbnails),
        **detector(result, won, thumbnails, lang, t),
        **sensitivity(result.sensitivity, result.winning.recipe.precision, t),
        **layers(result.winning, t),
        "stored": stored(won.size.weights),
        "facts": _facts(result, won, lang, t),
        "images": [(t.get(name, name), f"{n:,}") for name, n in result.images.items()],
        "agreements": [
            (t["fidelity_name"], t["fidelity_line"], _agreement(won.fidelity, t)),
            (t["drift"], t["drift_line"], _agreement(won.drift, t)),
        ],
    }


def widths_known(result: Result) -> dict[str, int]:
    """The original channels of each group."""
    return {group.name: group.channels for group in result.groups}


def _evidence(trial: Trial) -> Evidence:
    if trial.evidence is None:
        raise BadBundle(
            f"{trial.recipe.title} has no measurement in this result.",
            "Run `lighten compress` again: it resumes.",
        )
    return trial.evidence


# --- titles --------------------------------------------------------------------------------


def metric_title(name: str) -> str:
    return METRICS.get(name, name)


def file_title(trial: Trial) -> str:
    """INT8 ONNX, FP32 OpenVINO: precision and format as people say them; u and s 8 are both INT8."""
    precision = trial.recipe.precision
    kinds = dict.fromkeys(PRECISIONS.get(bits, bits) for bits in (precision.weights, precision.activations))
    mixed = "mixed " if precision.exceptions else ""
    return f"{mixed}{'/'.join(kinds)} {FORMATS.get(trial.recipe.format, trial.recipe.format)}"


# --- the verdict ------------------------------------------------------------------------------------


def _headline(result: Result, base: Evidence, won: Evidence, t: Texts) -> dict[str, Any]:
    metric, final = metric_title(base.metric_name), result.final
    kept = result.winner == result.baseline.id
    said = sentence(
        t,
        what=file_title(result.winning),
        shrink=shrink(won, base),
        speedup=speedup(won, base),
        drop=final.drop.value,
        metric=metric,
    )
    set_limits = sum(1 for name in UNITS if getattr(result.budget, name) is not None)
    outcome = t["some_missed"].format(len(result.misses), set_limits) if result.misses else t["all_kept"]
    return {
        "said": t["kept"].format(what=file_title(result.baseline)) if kept else said,
        "outcome": outcome if set_limits or result.misses else t["no_limits"],
        "doubt": t["doubt"].format(f"{final.winner.n:,}"),
        "tiles": _tiles(result, base, won, t),
    }


def _tiles(result: Result, base: Evidence, won: Evidence, t: Texts) -> list[dict[str, str]]:
    """Before, after and the change of what matters most. `good` colours the change; no colour within the error."""
    final, less, ratio = result.final, shrink(won, base), speedup(won, base)
    # The two times that the ratio was taken of: those of the table are of processes of their own.
    was_ms, now_ms = won.beside.medians if won.beside else (base.p50(), won.p50())
    gain = -final.drop.value
    memory = 100 * (1 - won.memory_mb / base.memory_mb) if base.memory_mb else math.nan
    points = t["points"].format(f"{signed(gain)} ± {fixed(final.drop.error)}")
    data = (
        ("tile_size", significant(base.size.mb), significant(won.size.mb), "MB", saved(less), _sign(less, 0.5)),
        (
            "tile_latency",
            significant(was_ms),
            significant(now_ms),
            "ms",
            t["times"].format(fixed(ratio, 1)),
            _sign(ratio - 1, 0.05),
        ),
        (
            "tile_accuracy",
            fixed(final.baseline.value),
            fixed(final.winner.value),
            "%",
            points,
            _sign(gain, max(0.005, 2 * final.drop.error)),
        ),
        (
            "tile_memory",
            significant(base.memory_mb),
            significant(won.memory_mb),
            "MB",
            saved(memory),
            _sign(memory, 0.5),
        ),
    )
    names = ("name", "before", "after", "unit", "change", "good")
    tiles = [dict(zip(names, (t[row[0]].format(metric_title(base.metric_name)), *row[1:]))) for row in data]
    return [tile for tile in tiles if tile["after"] != "—"]


def _sign(value: float, least: float) -> str:
    return "better" if value >= least else "worse" if value <= -least else "same"


def limits(result: Result, base: Evidence, won: Evidence, t: Texts) -> list[dict[str, str]]:
    """Each limit that was set: wanted, got, and whether it was kept as `Result.misses` says; nothing is judged anew."""
    missed = {miss.limit: miss for miss in result.misses}
    got = {
        "max_drop": result.final.drop.value,
        "max_size_mb": won.size.mb,
        "min_shrink": shrink(won, base),
        "max_latency_ms": won.p50(1),
        "min_speedup": speedup(won, base),
        "max_memory_mb": won.memory_mb,
        "time_s": sum(seconds for _, seconds in result.spent) if result.spent else math.nan,
    }
    table = []
    for name, unit in UNITS.items():
        wanted = getattr(result.budget, name)
        if wanted is None:
            continue
        unit = unit or t["pt"]
        value = missed[name].got if name in missed else got.get(name, math.nan)
        mark = "missed" if name in missed else "open" if name == "time_s" else "kept"
        text = fixed(value) if name == "max_drop" else significant(value)
        if value != wanted and text != "—" and float(text.replace(",", "").replace("−", "-")) == wanted:
            text = significant(value, 5)  # a broken limit must not look kept
        table.append(
            {
                "name": t[name],
                "wanted": f"{wanted:g}{unit}",
                "got": text if text == "—" else text + unit,
                "mark": mark,
                "says": t[f"{mark}_mark"],
            }
        )
    return table


# --- the table of trials ----------------------------------------------------------------------------


def rows(result: Result, t: Texts) -> list[Row]:
    """The original first, then each trial in the order tried."""
    tried = [trial for trial in result.trials if trial.id != result.baseline.id]
    threads = {
        max(row.threads for row in trial.evidence.latency)
        for trial in (result.baseline, *tried)
        if trial.evidence and trial.evidence.latency
    }
    most = t["latency_all"].format(threads.pop()) if len(threads) == 1 else t["latency_most"]
    return [_row(k, trial, result, t, most) for k, trial in enumerate((result.baseline, *tried))]


def _row(number: int, trial: Trial, result: Result, t: Texts, most: str) -> Row:
    kind, status = _status(trial, result, t)
    more, probe = detail(trial.recipe, widths_known(result), t), is_probe(trial.recipe)
    if trial.evidence is None:
        reason = trial.failure.reason if trial.failure else ""
        return Row(number, trial.recipe.title, kind, status, reason, "", (), trial, more, probe)
    warning = t["slow_quantized"] if slower_than_float(trial, result) else ""
    cells = _cells(trial.evidence, _evidence(result.baseline), t, most)
    return Row(number, trial.recipe.title, kind, status, "", warning, cells, trial, more, probe)


def _status(trial: Trial, result: Result, t: Texts) -> tuple[str, str]:
    if trial.evidence is None:
        return "failed", t["failed"].format(trial.failure.stage if trial.failure else "?")
    if trial.id == result.winner:
        names = [t[f"short_{m.limit}"] for m in result.misses if f"short_{m.limit}" in t]
        said = [t["original"]] if trial.id == result.baseline.id else []
        broken = [t["outside"].format(t["join"].join(names))] if names else []
        return "winner", t["join"].join([*said, t["winner"], *broken])
    if trial.id == result.baseline.id:
        return "original", t["original"]
    misses = result.budget.misses(trial.evidence, _evidence(result.baseline))
    if not misses:
        return "inside", t["inside"]
    return "outside", t["outside"].format(t["join"].join(t[f"short_{m.limit}"] for m in misses))


def slower_than_float(trial: Trial, result: Result) -> bool:
    """Whether a quantized trial takes longer than the unchanged float network in the same format."""
    if not trial.recipe.precision.quantized or trial.evidence is None:
        return False
    same = [
        other.evidence
        for other in (result.baseline, *result.trials)
        if other.evidence
        and other.recipe.format == trial.recipe.format
        and not other.recipe.complexity
        and other.recipe.precision.weights == "float32"
    ]
    return bool(same) and trial.evidence.p50(1) > same[0].p50(1)


def _cells(got: Evidence, base: Evidence, t: Texts, most: str) -> tuple[Cell, ...]:
    one, every = _threads(got.latency)
    first = got is base
    return (
        Cell(t["size"], significant(got.size.mb), "" if first else saved(shrink(got, base))),
        Cell(t["gzip"], significant(got.size.gzip_bytes / 1e6)),
        Cell(
            t["accuracy"].format(metric_title(got.metric_name)),
            fixed(got.metric.value),
            f"± {fixed(got.metric.error)}",
        ),
        Cell(t["drop"], "" if first else fixed(got.drop.value), "" if first else f"± {fixed(got.drop.error)}"),
        Cell(t["latency_1"], *_latency(one)),
        Cell(most, *_latency(every)),
        Cell(t["speedup"], "" if first else f"{fixed(speedup(got, base), 2)}×"),
        Cell(t["throughput"], significant(got.throughput)),
        Cell(t["memory"], significant(got.memory_mb)),
        Cell(t["fidelity"], fixed(got.fidelity.same_top1)),
    )


def _threads(latency: Sequence[Latency]) -> tuple[Latency | None, Latency | None]:
    """The row for one thread, and the one for the most threads where that is another."""
    one = min(latency, key=lambda row: row.threads, default=None)
    most = max(latency, key=lambda row: row.threads, default=None)
    return one, None if most is one else most


def _latency(row: Latency | None) -> tuple[str, str]:
    return ("—", "") if row is None else (significant(row.p50), f"p95 {significant(row.p95)}")


# --- pictures ---------------------------------------------------------------------------------------


def _pictures(result: Result, table: Sequence[Row], t: Texts) -> dict[str, Any]:
    """Each chart twice, for a wide page and for a phone; the page's CSS shows one."""
    base, budget = _evidence(result.baseline), result.budget
    measured = [(row, row.trial.evidence) for row in table if row.trial.evidence]
    metric, slack = metric_title(base.metric_name), budget.max_drop

    def plane(points: Sequence[charts.Point], title: str, limit: float | None) -> dict[str, str]:
        return _both(
            lambda width: charts.scatter(
                points,
                x_title=title,
                y_title=f"{metric} %",
                width=width,
                x_limit=limit,
                y_limit=None if slack is None else base.metric.value - slack,
                limit_text=t["limit_line"],
                floor=base.metric.value - max(6.0, 4 * (slack or 0)),
            )
        )

    size = [_point(row, got, got.size.mb) for row, got in measured]
    speed = [_point(row, got, got.p50(1)) for row, got in measured]
    planes = [
        plane(size, t["axis_size"], _size_limit(result, base)),
        plane(speed, t["axis_latency"], _latency_limit(result, base)),
    ]
    bars = [
        charts.Strip(f"{row.number} · {row.title}", one.samples_ms, row.mark, significant(one.p50))
        for row, got in measured
        if (one := _threads(got.latency)[0])
    ]
    kinds = [kind for kind in ("winner", "original", "inside", "outside", "probe") if any(p.kind == kind for p in size)]
    return {
        "planes": planes,
        "legend": [(charts.key(kind), t[f"key_{kind}"]) for kind in kinds],
        "strips": _both(lambda w: charts.strips(bars, width=w, title=t["latency"]), wide=900),
    }


def _both(draw: Callable[[float], str], wide: float = 540, narrow: float = 350) -> dict[str, str]:
    return {"wide": draw(wide), "narrow": draw(narrow)}


def _point(row: Row, got: Evidence, x: float) -> charts.Point:
    return charts.Point(row.title, f"#{row.number}", x, got.metric.value, got.metric.error, row.mark)


def _size_limit(result: Result, base: Evidence) -> float | None:
    budget = result.budget
    by_shrink = None if budget.min_shrink is None else base.size.mb * (1 - budget.min_shrink / 100)
    return min((v for v in (budget.max_size_mb, by_shrink) if v is not None), default=None)


def _latency_limit(result: Result, base: Evidence) -> float | None:
    budget = result.budget
    by_speed = base.p50(1) / budget.min_speedup if budget.min_speedup else None
    return min((v for v in (budget.max_latency_ms, by_speed) if v is not None), default=None)


def _classes(result: Result, lang: str, t: Texts) -> dict[str, Any]:
    """Worst change first; over 40 classes only the ends are drawn, on one common axis."""
    names = _names(result, lang)
    changes = [charts.Change(names.get(c.name, c.name), c.before, c.after, c.n) for c in result.final.classes]
    changes = sorted((c for c in changes if math.isfinite(c.by)), key=lambda c: c.by)
    parts = [("", changes)] if changes else []
    if len(changes) > MANY_CLASSES:
        parts = [
            (t["worst"].format(FEW_CLASSES), changes[:FEW_CLASSES]),
            (t["best"].format(FEW_CLASSES), changes[: -FEW_CLASSES - 1 : -1]),
        ]
    reach, wide = charts.extent(changes), 540 if len(parts) > 1 else 900
    return {"changes": changes, "panels": [(title, _panel(part, reach, wide, t)) for title, part in parts]}


def _panel(part: Sequence[charts.Change], reach: float, wide: float, t: Texts) -> dict[str, str]:
    return _both(lambda w: charts.diverging(part, reach=reach, width=w, title=t["classes"]), wide=wide)


def _names(result: Result, lang: str) -> dict[str, str]:
    """What a class is called in the language asked, by its own name."""
    if lang != "zh":
        return {}
    return {name: other or name for name, other in zip(result.classes, result.classes_zh)}


# --- flips, layers, weights ---------------------------------------------------------------------------


def _flips(result: Result, lang: str, thumbnails: Mapping[str, str]) -> dict[str, Any]:
    names = _names(result, lang)
    titles = [names.get(name, name) for name in result.classes]
    shown = [f for f in result.flips if str(f.get("thumbnail")) in thumbnails and "n_truth" not in f][:MOST_FLIPS]
    n = result.final.winner.n
    share = fixed(100 * result.final.flipped / n) if n else "—"
    cards = [
        {
            "src": thumbnails[str(flip["thumbnail"])],
            "image": str(flip.get("image", "")),
            "kind": _flip_kind(flip),
            **{key: _title(titles, flip.get(key)) for key in ("truth", "before", "after")},
        }
        for flip in shown
    ]
    return {"flips": cards, "flip_counts": (f"{result.final.flipped:,}", f"{n:,}", share)}


def _flip_kind(flip: Mapping[str, Any]) -> str:
    truth = flip.get("truth")
    return "lost" if flip.get("before") == truth else "won" if flip.get("after") == truth else "both"


def _title(titles: Sequence[str], index: Any) -> str:
    return titles[index] if isinstance(index, int) and 0 <= index < len(titles) else str(index)


# --- how it was measured ------------------------------------------------------------------------------


def _facts(result: Result, won: Evidence, lang: str, t: Texts) -> list[tuple[str, str]]:
    artifact = result.winning.artifact
    device = (result.device.title_zh if lang == "zh" else result.device.title) or result.device.name
    facts = [
        (t["model"], result.model),
        (t["data"], result.data),
        (t["device"], device),
        (t["runtime"], won.runtime),
        (t["task"], result.task),
        (t["input"], _input(result)),
        (t["file"], f"{artifact.path} · sha256 {artifact.sha256}" if artifact else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _input(result: Result) -> str:
    how = result.preprocess
    if how is None:
        return ""
    resize = f" {how.resize}" if how.mode == "crop" else ""
    return f"{how.channels} × {how.height} × {how.width} {how.channel_order}, {how.mode}{resize}, {how.interpolation}"


def _agreement(a: Any, t: Texts) -> str:
    return t["agreement"].format(fixed(a.same_top1), fixed(a.sqnr_db, 1), significant(a.max_abs))
