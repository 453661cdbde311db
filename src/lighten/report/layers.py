"""The winner's layers and stored tensors, as the report shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lighten.report import charts
from lighten.report.numbers import fixed, significant
from lighten.report.texts import Texts
from lighten.types import Trial, Weight

OPEN_LAYERS, WORST_LAYERS = 12, 5
GOOD_DB, POOR_DB, FULL_DB = 30.0, 20.0, 50.0


def layers(trial: Trial, t: Texts) -> dict[str, Any]:
    table = [_layer(row) for row in trial.layers]
    found = [
        (row[key], row["layer"], t[word])
        for row in table
        for key, word in (("weight_db", "weight_word"), ("input_db", "input_word"))
        if math.isfinite(row[key])
    ]
    worst = min(found, default=None)
    said = t["worst_layer"].format(worst[1], fixed(worst[0], 1), worst[2]) if worst else ""
    by_noise = sorted((row for row in table if math.isfinite(_lowest(row))), key=_lowest)
    return {
        "layers": table,
        "worst_layer": said,
        "long": len(table) > OPEN_LAYERS,
        "lowest": worst[0] if worst else math.nan,
        "worst_layers": by_noise[:WORST_LAYERS],
    }


def _lowest(row: Mapping[str, Any]) -> float:
    return min((row[key] for key in ("weight_db", "input_db") if math.isfinite(row[key])), default=math.nan)


def _layer(row: Mapping[str, Any]) -> dict[str, Any]:
    weight, given = _float(row.get("weight_sqnr_db")), _float(row.get("input_sqnr_db"))
    span = row.get("input_range")
    return {
        "layer": str(row.get("layer", "")),
        "op": str(row.get("op", "")),
        "bits": str(row.get("weights", "")),
        "shape": " × ".join(str(n) for n in row.get("shape") or ()),
        "weight_db": weight,
        "weight": fixed(weight, 1),
        "weight_bar": _meter(weight),
        "range": f"{significant(_float(span[0]))} … {significant(_float(span[1]))}" if span else "",
        "method": str(row.get("range_method", "")),
        "input_db": given,
        "input": fixed(given, 1),
        "input_bar": _meter(given),
        "reason": str(row.get("reason", "")),
    }


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _meter(db: float) -> str:
    if not math.isfinite(db):
        return ""
    return charts.meter(db, FULL_DB, "good" if db >= GOOD_DB else "fair" if db >= POOR_DB else "poor")


def stored(weights: Iterable[Weight]) -> list[dict[str, Any]]:
    """Bytes, tensors and share of zeros of each dtype, greatest first. Zeros are counted over values, not tensors."""
    weights = list(weights)
    total = sum(w.bytes for w in weights)
    table = []
    for dtype in {w.dtype for w in weights}:
        mine = [w for w in weights if w.dtype == dtype]
        size, values = sum(w.bytes for w in mine), sum(math.prod(w.shape) for w in mine)
        zeros = sum(w.zeros * math.prod(w.shape) for w in mine) / values if values else 0.0
        table.append(
            {
                "dtype": dtype,
                "tensors": len(mine),
                "size": size,
                "bytes": f"{size:,}",
                "percent": round(100 * size / total, 2) if total else 0.0,
                "zeros": f"{fixed(100 * zeros, 1)}%",
            }
        )
    return sorted(table, key=lambda row: (-row["size"], row["dtype"]))
