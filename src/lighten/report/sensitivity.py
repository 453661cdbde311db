"""Which layer is guilty, as the report shows it: a picture and a table from the costs of each layer alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lighten.report import charts
from lighten.report.numbers import fixed, nats, pair, power, significant
from lighten.report.texts import Texts
from lighten.types import FLOATS, LayerCost, Precision

Choice = tuple[str, str]
OPEN_LAYERS, WORST_LAYERS = 12, 5
BITS = {"int4": 4, "int8": 8, "float16": 16, "float32": 32}


def sensitivity(costs: Sequence[LayerCost], chosen: Precision, t: Texts) -> dict[str, Any]:
    """Rows in the order of the network, the picture for wide pages and for phones, and the worst layer in words."""
    by_layer: dict[str, dict[Choice, LayerCost]] = {}
    for row in costs:
        by_layer.setdefault(row.layer, {})[(row.weights, row.activations)] = row
    choices = sorted(dict.fromkeys((row.weights, row.activations) for row in costs), key=_finest_first)
    series = [c for c in choices if c[0] not in FLOATS]
    worst = sorted(by_layer, key=lambda name: -_worst(by_layer[name], series))[:WORST_LAYERS]
    table = [_row(name, rows, choices, series, chosen, costs) for name, rows in by_layer.items()]
    suspects = [_suspect(name, by_layer[name], series, name in worst) for name in by_layer]
    return {
        "suspects": table,
        "suspect_columns": _columns(costs, choices, series, chosen, t) if table else (),
        "suspect_picture": _picture(suspects, t),
        "suspect_legend": [(charts.series_key(k), _long_title(c, t)) for k, c in enumerate(series)],
        "guiltiest": _guiltiest(by_layer, series, t),
        "suspects_long": len(table) > OPEN_LAYERS,
        "worst_suspects": [row for name in worst for row in table if row["layer"] == name],
    }


def title(choice: Choice) -> str:
    """int8, or int4/int8 where activations have other bits."""
    return Precision(*choice).title


def _long_title(choice: Choice, t: Texts) -> str:
    """With the two spelled out where a reader may take one for both."""
    return (
        title(choice) if choice == ("int8", "int8") else f"{title(choice)}{t['colon']}{t['two_bits'].format(*choice)}"
    )


def _finest_first(choice: Choice) -> tuple[int, int]:
    return -BITS.get(choice[0], 0), -BITS.get(choice[1], 0)


def _harm(rows: Mapping[Choice, LayerCost], choice: Choice) -> float:
    return rows[choice].damage if choice in rows else math.nan


def _worst(rows: Mapping[Choice, LayerCost], series: Iterable[Choice]) -> float:
    return max((v for c in series if math.isfinite(v := _harm(rows, c))), default=0.0)


def _suspect(name: str, rows: Mapping[Choice, LayerCost], series: Sequence[Choice], worst: bool) -> charts.Suspect:
    values = tuple(v if math.isfinite(v := _harm(rows, c)) else None for c in series)
    said = " · ".join(f"{title(c)} {nats(v)}" for c, v in zip(series, values) if v is not None)
    return charts.Suspect(name, values, said, nats(_worst(rows, series)) if worst else "")


def _picture(suspects: Sequence[charts.Suspect], t: Texts) -> dict[str, str]:
    def draw(width: float) -> str:
        return charts.dots(suspects, x_title=t["axis_damage"], width=width, title=t["guilty"], tick=power)

    return {"wide": draw(900), "narrow": draw(350)}


def _guiltiest(by_layer: Mapping[str, Mapping[Choice, LayerCost]], series: Sequence[Choice], t: Texts) -> str:
    """The worst layer of the coarsest precision, and its share of the sum."""
    if not series:
        return ""
    harms = {name: v for name, rows in by_layer.items() if math.isfinite(v := _harm(rows, series[-1]))}
    total = sum(harms.values())
    if total <= 0:
        return ""
    name = max(harms, key=lambda key: harms[key])
    return t["guiltiest"].format(name, title(series[-1]), nats(harms[name]), fixed(100 * harms[name] / total, 0))


# --- the table ------------------------------------------------------------------------------------


def _columns(
    costs: Sequence[LayerCost], choices: Sequence[Choice], series: Sequence[Choice], chosen: Precision, t: Texts
) -> list[str]:
    """Titles of the cells of a row; a column that nothing was measured for is left out."""
    arrow = " → ".join
    return [
        *(t["damage"].format(title(c)) for c in series),
        *(t["points_lost"].format(title(c)) for c in series if _has_drops(costs, c)),
        t["kilobytes"].format(arrow(_stored_kinds(choices))),
        *([t["layer_ms"].format(arrow(map(title, choices)))] if _timed(costs) else []),
        *([t["chosen"]] if chosen.exceptions else []),
    ]


def _has_drops(costs: Iterable[LayerCost], choice: Choice) -> bool:
    return any(row.drop is not None for row in costs if (row.weights, row.activations) == choice)


def _timed(costs: Iterable[LayerCost]) -> bool:
    return any(row.latency_ms is not None for row in costs)


def _stored_kinds(choices: Iterable[Choice]) -> list[str]:
    return list(dict.fromkeys(weights for weights, _ in choices))


def _row(
    name: str,
    rows: Mapping[Choice, LayerCost],
    choices: Sequence[Choice],
    series: Sequence[Choice],
    chosen: Precision,
    costs: Sequence[LayerCost],
) -> dict[str, Any]:
    """One layer: its name and operator, and as many cells as there are columns."""
    by_weights = {weights: row.bytes for (weights, _), row in rows.items()}
    special = {layer: (w, a) for layer, w, a in chosen.exceptions}
    cells = [
        *(nats(_harm(rows, c)) for c in series),
        *(_points(rows.get(c)) for c in series if _has_drops(costs, c)),
        " → ".join(_kilobytes(by_weights.get(kind)) for kind in _stored_kinds(choices)),
        *([" → ".join(_ms(rows.get(c)) for c in choices)] if _timed(costs) else []),
        *([title(special.get(name, (chosen.weights, chosen.activations)))] if chosen.exceptions else []),
    ]
    return {"layer": name, "op": next(iter(rows.values())).op, "cells": cells}


def _points(row: LayerCost | None) -> str:
    return pair(row.drop) if row is not None and row.drop is not None else "—"


def _kilobytes(count: int | None) -> str:
    return "—" if count is None else significant(count / 1e3)


def _ms(row: LayerCost | None) -> str:
    return "—" if row is None or row.latency_ms is None else significant(row.latency_ms, 2)
