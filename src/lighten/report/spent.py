"""Where the time of a run went, and whether it kept to the time it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lighten.report import drawings
from lighten.report.numbers import fixed, significant
from lighten.report.texts import Texts

COLORS = 6


def spent(parts: Sequence[tuple[str, float]], allowed: float | None, t: Texts) -> dict[str, Any]:
    """A stacked bar with its legend, and the sum beside the limit. Parts of the same name are added up."""
    sums: dict[str, float] = {}
    for name, seconds in parts:
        sums[name] = sums.get(name, 0.0) + seconds
    sums = {name: seconds for name, seconds in sums.items() if seconds > 0}
    if not sums:
        return {"spent": ()}
    total = sum(sums.values())
    names = [t.get(f"spent_{name}", name) for name in sums]
    limit = None if allowed is None else t["time_limit"].format(duration(allowed, t))
    pieces = list(zip(names, sums.values()))
    return {
        "spent": [
            {"name": name, "took": duration(s, t), "percent": fixed(100 * s / total, 0), "color": k % COLORS}
            for k, (name, s) in enumerate(pieces)
        ],
        "spent_said": said(total, allowed, t),
        "spent_picture": {
            kind: drawings.stack(
                [(n, s, k % COLORS) for k, (n, s) in enumerate(pieces)], width, allowed, limit or "", t["spent"]
            )
            for kind, width in (("wide", 900), ("narrow", 350))
        },
    }


def said(total: float, allowed: float | None, t: Texts) -> str:
    """The whole run beside the time that it was given."""
    if not allowed:
        return t["spent_total"].format(duration(total, t))
    if total <= allowed:
        return t["spent_kept"].format(duration(total, t), duration(allowed, t))
    return t["spent_over"].format(duration(total, t), duration(allowed, t), significant(100 * (total / allowed - 1), 2))


def duration(seconds: float, t: Texts) -> str:
    """Seconds up to two minutes, then minutes up to two hours, then hours."""
    for name, unit in (("in_hours", 3600.0), ("in_minutes", 60.0)):
        if seconds >= 2 * unit:
            return t[name].format(_short(seconds / unit))
    return t["in_seconds"].format(_short(seconds))


def _short(value: float) -> str:
    """One digit after the point, none where it is 0."""
    return f"{value:,.1f}".removesuffix(".0")
