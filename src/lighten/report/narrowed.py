"""The narrowed network and what narrowing each channel group costs, as the report shows them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lighten.report import charts, drawings
from lighten.report.numbers import fixed, nats, pair, power, saved, significant
from lighten.report.recipes import kept
from lighten.report.texts import Texts
from lighten.search.widths import harms
from lighten.types import ChannelGroup, LayerShape, Result, WidthCost

OPEN_LAYERS, WORST_GROUPS = 12, 5


# --- the network, layer by layer ------------------------------------------------------------------


def network(before: Sequence[LayerShape], after: Sequence[LayerShape], t: Texts) -> dict[str, Any]:
    """Picture, totals and table of a network before and after; nothing where its layers are as they were."""
    rows = aligned(before, after)
    if not before or not after or all(a == b for a, b in rows):
        return {"narrowed": (), "narrowed_totals": ()}
    bars = [_bar(a, b) for a, b in rows]
    return {
        "narrowed": [_layer(a, b) for a, b in rows],
        "narrowed_totals": totals(before, after, t),
        "narrowed_picture": _both(lambda w: _network_picture(bars, w, t)),
        "narrowed_long": len(rows) > OPEN_LAYERS,
    }


def aligned(
    before: Sequence[LayerShape], after: Sequence[LayerShape]
) -> list[tuple[LayerShape | None, LayerShape | None]]:
    """Layers of the same name side by side, in the order of the original; a new layer comes after the one before it."""
    old, new = {s.name: s for s in before}, {s.name: s for s in after}
    names, at = list(old), -1
    for name in new:
        if name in old:
            at = names.index(name)
        else:
            at += 1
            names.insert(at, name)
    return [(old.get(name), new.get(name)) for name in names]


def totals(before: Sequence[LayerShape], after: Sequence[LayerShape], t: Texts) -> list[dict[str, str]]:
    """Weights, multiplications, channels and layers of the whole network."""
    sums = (
        ("sum_weights", lambda rows: sum(s.weights for s in rows)),
        ("sum_macs", lambda rows: sum(s.macs for s in rows)),
        ("sum_channels", lambda rows: sum(s.outputs for s in rows)),
        ("sum_layers", len),
    )
    pairs = [(t[name], add(before), add(after)) for name, add in sums]
    return [
        {"name": name, "before": count(a), "after": count(b), "change": saved(100 * (1 - b / a)) if a else "—"}
        for name, a, b in pairs
        if name != t["sum_layers"] or a != b
    ]


def count(n: float) -> str:
    """A count in thousands, millions or billions, to three digits: 512, 9.41 k, 11.2 M, 1.82 G."""
    for power_of_ten, unit in ((9, " G"), (6, " M"), (3, " k")):
        if n >= 10**power_of_ten:
            return significant(n / 10**power_of_ten) + unit
    return f"{n:g}"


def _bar(a: LayerShape | None, b: LayerShape | None) -> drawings.Kept:
    """A layer that is gone keeps nothing; a new one had nothing."""
    name = (a or b).name  # type: ignore[union-attr]
    wide, macs = (a.outputs if a else 0, b.outputs if b else 0), (a.macs if a else 0, b.macs if b else 0)
    return drawings.Kept(name, wide, macs, f"{count(macs[0])} → {count(macs[1])}")


def _layer(a: LayerShape | None, b: LayerShape | None) -> dict[str, Any]:
    def arrow(read: Any) -> str:
        return " → ".join("—" if s is None else count(read(s)) for s in (a, b))

    shape = a or b
    assert shape is not None
    return {
        "layer": shape.name,
        "op": shape.op,
        "cells": [
            arrow(lambda s: s.inputs),
            arrow(lambda s: s.outputs),
            arrow(lambda s: s.weights),
            arrow(lambda s: s.macs),
        ],
    }


def _network_picture(bars: Sequence[drawings.Kept], width: float, t: Texts) -> str:
    return drawings.layers(bars, width=width, titles=(t["channels"], t["macs"], t["macs_kept"]), title=t["narrowed"])


def _both(draw: Any) -> dict[str, str]:
    return {"wide": draw(900), "narrow": draw(350)}


# --- what each group costs --------------------------------------------------------------------------


def groups(result: Result, t: Texts) -> dict[str, Any]:
    """Rows in the order of the network, picture, and the most sensitive group in words.

    Rows of groups that the result does not describe are left out: their share of the channels is not known.
    """
    known = {g.name: g for g in result.groups}
    rows: dict[str, list[WidthCost]] = {}
    for row in result.widths:
        if row.group in known and math.isfinite(row.damage):
            rows.setdefault(row.group, []).append(row)
    if not rows:
        return {"width_groups": ()}
    shares = typical_shares(rows, known)
    placed = {name: _placed(mine, known[name].channels, shares) for name, mine in rows.items()}
    widths, harm = kept(result.winning.recipe), harms(result.widths, result.groups)
    worst = sorted(rows, key=lambda name: -max(r.damage for r in rows[name]))[:WORST_GROUPS]
    suspects = [_suspect(known[n], placed[n], widths.get(n), harm[n], n in worst) for n in rows]
    table = [_group_row(known[n], placed[n], widths.get(n), bool(widths)) for n in rows]
    legend = [(charts.series_key(k), t["share_kept"].format(fixed(100 * s, 0))) for k, s in enumerate(shares)]
    if any(s.kept is not None for s in suspects):
        legend.append((charts.kept_key(), t["kept_mark_key"]))
    return {
        "width_groups": table,
        "width_columns": _columns(shares, bool(widths), t),
        "width_picture": _both(lambda w: _groups_picture(suspects, w, t)),
        "width_legend": legend,
        "width_said": _said(rows, known, t),
        "width_long": len(table) > OPEN_LAYERS,
        "worst_widths": [row for n in worst for row in table if row["layer"] == n],
    }


def typical_shares(rows: Mapping[str, Sequence[WidthCost]], known: Mapping[str, ChannelGroup]) -> list[float]:
    """The shares of their channels that the groups with most rows were measured at (medians), widest first."""
    ladders = [sorted((r.width / known[n].channels for r in mine), reverse=True) for n, mine in rows.items()]
    most = max(map(len, ladders))
    return [statistics.median(ladder[k] for ladder in ladders if len(ladder) == most) for k in range(most)]


def _placed(mine: Sequence[WidthCost], channels: int, shares: Sequence[float]) -> list[WidthCost | None]:
    """Each row at the nearest share that is still free: widths are rounded, so shares are only about these."""
    found: list[WidthCost | None] = [None] * len(shares)
    for row in sorted(mine, key=lambda r: -r.width):
        free = [k for k, there in enumerate(found) if there is None]
        if free:
            found[min(free, key=lambda k: abs(shares[k] - row.width / channels))] = row
    return found


def _suspect(
    group: ChannelGroup, placed: Sequence[WidthCost | None], width: int | None, harm: float, worst: bool
) -> charts.Suspect:
    damages = tuple(None if r is None else r.damage for r in placed)
    said = " · ".join(f"{r.width}/{group.channels} {nats(r.damage)}" for r in placed if r)
    kept = None if width is None or width >= group.channels else harm * (group.channels / width - 1)
    note = nats(max((d for d in damages if d is not None), default=0.0)) if worst else ""
    end = "" if width is None else f"{group.channels} → {width}"
    return charts.Suspect(group.name, damages, said, note, kept, end)


def _groups_picture(suspects: Sequence[charts.Suspect], width: float, t: Texts) -> str:
    return charts.dots(suspects, x_title=t["axis_damage"], width=width, title=t["matter"], tick=power)


def _columns(shares: Sequence[float], narrowed: bool, t: Texts) -> list[str]:
    names = [t["share_kept"].format(fixed(100 * s, 0)) for s in shares]
    return [t["channels"], *(t["damage_at"].format(n) for n in names), *(t["points_at"].format(n) for n in names)] + (
        [t["chosen"]] if narrowed else []
    )


def _group_row(
    group: ChannelGroup, placed: Sequence[WidthCost | None], width: int | None, narrowed: bool
) -> dict[str, Any]:
    chosen = [str(group.channels if width is None else width)] if narrowed else []
    damages = ["—" if r is None else f"{nats(r.damage)} ({r.width})" for r in placed]
    points = ["—" if r is None or r.drop is None else pair(r.drop) for r in placed]
    return {"layer": group.name, "cells": [str(group.channels), *damages, *points, *chosen]}


def _said(rows: Mapping[str, Sequence[WidthCost]], known: Mapping[str, ChannelGroup], t: Texts) -> str:
    worst = max((r for mine in rows.values() for r in mine), key=lambda r: r.damage)
    return t["most_sensitive"].format(worst.group, worst.width, known[worst.group].channels, nats(worst.damage))
