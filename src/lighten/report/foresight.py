"""What was expected against what came: predicted bytes and times, and short trials before long ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lighten.report import drawings
from lighten.report.numbers import fixed, nats, saved, significant
from lighten.report.recipes import kept, plan
from lighten.report.spent import duration
from lighten.report.texts import Texts
from lighten.search.reach import is_probe, narrows
from lighten.search.widths import Costs, bits_harm, damage, harms
from lighten.types import Evidence, Predicted, Recipe, Result, Trial, level_ms

WITHIN = 25.0
"""Percent of the measured value that a prediction may be off and still be called near."""
Rows = Sequence[tuple[int, str, Trial]]
"""Number, kind (as in the pictures) and trial of each row of the page."""


# --- predicted against measured ---------------------------------------------------------------------


def predictions(rows: Rows, base: Evidence, t: Texts) -> dict[str, Any]:
    """Every measured file that something was predicted of, the share that came near, and both in a picture.

    Times are on the clock of the original (`base`), as the predictions are: what else the machine did is taken out.
    """
    known = [(n, kind, trial, p, e) for n, kind, trial in rows if (p := trial.predicted) and (e := trial.evidence)]
    if not known:
        return {"predictions": ()}
    size = [(n, k, p.bytes / 1e6, e.size.mb) for n, k, _, p, e in known]
    speed = [(n, k, p.latency_ms, level_ms(e, base)) for n, k, _, p, e in known if p.latency_ms is not None]
    table = [{"number": n, "title": trial.recipe.title, "cells": _cells(p, e, base)} for n, _, trial, p, e in known]
    planes = [(t["predicted_mb"], t["measured_mb"], size), (t["predicted_ms"], t["measured_ms"], speed)]
    return {
        "predictions": table,
        "prediction_said": t["gap"].join(
            t[name].format(sum(abs(error(p, m)) <= WITHIN for *_, p, m in found), len(found), fixed(WITHIN, 0))
            for name, found in (("near_bytes", size), ("near_ms", speed))
            if found
        ),
        "band_said": t["band_line"].format(fixed(WITHIN, 0)),
        "prediction_planes": [_plane(*plane) for plane in planes if len(plane[2]) > 1],
    }


def error(predicted: float, measured: float) -> float:
    """Percent of the measured value; above 0 more was predicted than came."""
    return 100 * (predicted / measured - 1) if measured else math.nan


def _cells(p: Predicted, e: Evidence, base: Evidence) -> list[str]:
    ms, took = p.latency_ms, level_ms(e, base)
    size = [significant(p.bytes / 1e6), significant(e.size.mb), _error(p.bytes, e.size.bytes)]
    if ms is None:
        return [*size, "—", significant(took), "—"]
    return [*size, significant(ms), significant(took), _error(ms, took)]


def _error(predicted: float, measured: float) -> str:
    off = error(predicted, measured)
    return saved(-off) if math.isfinite(off) else "—"


def _plane(x_title: str, y_title: str, found: Sequence[tuple[int, str, float, float]]) -> dict[str, str]:
    points = [drawings.Pair(f"#{n}", kind, p, m) for n, kind, p, m in found]

    def draw(width: float) -> str:
        return drawings.parity(points, x_title=x_title, y_title=y_title, within=WITHIN, width=width)

    return {"wide": draw(420), "narrow": draw(350)}


# --- small data first -------------------------------------------------------------------------------


def probes(result: Result, rows: Rows, metric: str, t: Texts) -> dict[str, Any]:
    """Short trials: what the damages of single groups said of each plan, against what its probe measured."""
    tried = first_of_each([(n, trial) for n, _, trial in rows if is_probe(trial.recipe)])
    long = [trial for _, _, trial in rows if narrows(trial.recipe) and not is_probe(trial.recipe)]
    said = saving([trial for _, trial in tried], long, t)
    done = [(n, trial, trial.evidence.metric) for n, trial in tried if trial.evidence]
    if len(done) < 2:
        return {"probes": (), "probe_said": said}
    harm = [predicted_damage(result, trial.recipe) for _, trial, _ in done]
    got = [value for *_, value in done]
    ranks = [ranked([h for h in harm if h is not None]), ranked([-m.value for m in got])]
    known, channels = None not in harm, {g.name: g.channels for g in result.groups}
    table = [
        {
            "number": n,
            "title": plan(trial.recipe, channels, t),
            "cells": ["—" if h is None else nats(h), _rank(ranks[0][k]) if known else "—", str(m), _rank(ranks[1][k])],
        }
        for k, ((n, trial, m), h) in enumerate(zip(done, harm))
    ]
    return {
        "probes": table,
        "probe_columns": (t["predicted_damage"], t["rank"], t["accuracy"].format(metric), t["rank"]),
        "probe_said": t["gap"].join(filter(None, [_agreed(ranks, t) if known else "", said])),
    }


def first_of_each(tried: list[tuple[int, Trial]]) -> list[tuple[int, Trial]]:
    """One probe a plan: the same network in another format says nothing new of what it lost."""
    plans = {(t.recipe.steps, t.recipe.precision): (n, t) for n, t in reversed(tried)}
    return sorted(plans.values(), key=lambda row: row[0])


def predicted_damage(result: Result, recipe: Recipe) -> float | None:
    """Nats that a plan was expected to cost before any training, each group and each 4-bit layer as if it were alone."""
    if not result.widths:
        return None
    costs = Costs({}, result.groups, harms(result.widths, result.groups), bits=bits_harm(result.sensitivity))
    int4 = [layer for layer, weights, _ in recipe.precision.exceptions if weights == "int4"]
    return damage(costs, kept(recipe), int4)


def ranked(values: Sequence[float]) -> list[float]:
    """Ranks from 1 for the least; equal values share the mean of theirs."""
    order = sorted(values)
    return [(order.index(v) + 1 + len(order) - order[::-1].index(v)) / 2 for v in values]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties by their mean rank; None under three pairs or where one side is all the same."""
    if len(xs) < 3 or len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    a, b, middle = ranked(xs), ranked(ys), (len(xs) + 1) / 2
    shared = sum((x - middle) * (y - middle) for x, y in zip(a, b))
    return shared / math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))


def saving(tried: Sequence[Trial], long: Sequence[Trial], t: Texts) -> str:
    """What probing saved: long trainings that were not needed, and what the probes took. "" where it saved none."""
    plans, trained = {_plan(trial.recipe) for trial in tried}, {_plan(trial.recipe) for trial in long}
    left, seconds = len(plans - trained), max((trial.build_s for trial in long), default=0.0)
    if not left or not seconds:
        return ""
    took = sum(trial.build_s + trial.measure_s for trial in tried)
    return t["probing_saved"].format(left, len(plans), *(duration(s, t) for s in (seconds, left * seconds, took)))


def _plan(recipe: Recipe) -> tuple[Any, ...]:
    return tuple(sorted(kept(recipe).items())), recipe.precision


def _agreed(ranks: Sequence[Sequence[float]], t: Texts) -> str:
    """The correlation from three probes on; of two, whether the order was right."""
    rho = spearman(*ranks)
    if rho is not None:
        return t["correlation"].format(fixed(rho, 2), len(ranks[0]))
    if len(ranks[0]) == 2 and len(set(ranks[0])) == len(set(ranks[1])) == 2:
        return t["order_right"] if list(ranks[0]) == list(ranks[1]) else t["order_wrong"]
    return ""


def _rank(value: float) -> str:
    return f"{value:g}"
