"""Other formats: what `lighten export` made of the winner, read from its record and shown file by file."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lighten.report import exported_picture as picture
from lighten.report.numbers import fixed, significant
from lighten.report.texts import FORMATS, METRICS, Texts
from lighten.types import Evidence, Exported, from_json

RECORD = Path("exports") / "exports.json"
"""As lighten.exports writes it, in the run folder."""
COARSE = ("int4", "palette4", "palette6", "int8", "palette8", "float16", "float32")
MARKS = {"PASS": "inside", "FAIL": "failed", "failed": "failed"}
"""Colour of a status; others are grey."""
STATUSES = (*MARKS, "refused", "missing", "not run here")
OPEN_FALLBACKS = 2
DASH = "—"


@dataclass(frozen=True)
class Record:
    """The rows of a run's exports.json; `damaged` entries could not be read, `problem` says why none could."""

    rows: tuple[Exported, ...] = ()
    damaged: int = 0
    problem: str = ""


NOTHING = Record()


# --- the record -----------------------------------------------------------------------------------


def read_record(*folders: Path) -> Record:
    """What was exported, from the first of `folders` that has a record. Never raises: what is wrong is in the Record."""
    file = next((f for folder in folders if (f := folder / RECORD).exists()), None)
    if file is None:
        return NOTHING
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        return Record(problem=str(e)[:200])
    if not isinstance(entries, list):
        return Record(problem=f"a list was wanted, not {type(entries).__name__}")
    rows = [row for entry in entries if (row := _row(entry))]
    return Record(tuple(rows), len(entries) - len(rows))


def _row(entry: Any) -> Exported | None:
    """One entry, None where it is damaged."""
    try:
        row = from_json(Exported, entry)
        return row if fits(Exported, row) and (row.evidence is None or row.evidence.p50(1) >= 0) else None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        return None


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is what its type says, all the way down: `from_json` takes scalars as they come."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(arg, value) for arg in args)
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return len(kinds) == len(value) and all(map(fits, kinds, value))
    if not isinstance(value, (float, int) if hint is float else hint):
        return False
    return all(fits(kind, getattr(value, name)) for name, kind in _hints(hint).items())


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


# --- the section ----------------------------------------------------------------------------------


def exported(record: Record, original_bytes: int, t: Texts) -> dict[str, Any]:
    """Rows by format, finest precision first, what is wrong with the record, and a picture where integers were exported
    in several formats. Rows of another original than the run's, `original_bytes` long, are left out and counted."""
    mine = sorted((r for r in record.rows if r.original_bytes == original_bytes), key=_order)
    measured = [row.evidence for row in mine if row.evidence]
    metric = METRICS.get(name, name) if (name := next((e.metric_name for e in measured), "")) else t["exported_metric"]
    least = smallest(mine)
    marks = picture.marks([(_mark_title(r, t), r) for r in mine if r.status == "PASS"])
    names = [*dict.fromkeys(row.format for row in mine)]
    return {
        "exported": [{"place": names.index(row.format), **_shown(row, row is least, t)} for row in mine],
        "exported_columns": _columns(metric, t),
        "exported_lead": t["exported_lead"].format(_images(measured)),
        "exported_boxes": any(row.boxes for row in mine),
        "exported_wrong": list(_wrong(record, len(record.rows) - len(mine), t)),
        "exported_picture": picture.both(marks, t) if picture.worth(marks) else {},
        "exported_legend": picture.legend(marks),
    }


def smallest(rows: Sequence[Exported]) -> Exported | None:
    """The file with the fewest bytes among those that passed."""
    return min((r for r in rows if r.status == "PASS" and r.bytes), key=lambda r: r.bytes, default=None)


def format_title(row: Exported) -> str:
    return FORMATS.get(row.format, row.format)


def precision_title(row: Exported, t: Texts) -> str:
    """float16, int8; with what the file takes and gives where that is not what the network does."""
    marks = [t["pixels_in"]] * row.pixels + [t["boxes_out"]] * row.boxes
    return t["join"].join([row.precision.title, *marks])


def _mark_title(row: Exported, t: Texts) -> str:
    """What stands beside a mark, whose shape tells the precision."""
    marks = [t["short_pixels"]] * row.pixels + [t["short_boxes"]] * row.boxes
    return " + ".join([format_title(row), *marks])


def _order(row: Exported) -> tuple[Any, ...]:
    """By format; the finest precision first."""
    weights = row.precision.weights
    coarse = COARSE.index(weights) if weights in COARSE else -1
    return format_title(row).casefold(), -coarse, row.precision.title, row.pixels, row.boxes


def _columns(metric: str, t: Texts) -> list[str]:
    names = ("exported_mb", "exported_share", "exported_same")
    return [*(t[n] for n in names), t["accuracy"].format(metric), t["drop"], t["exported_ms"], t["memory"]]


def _images(measured: Sequence[Evidence]) -> str:
    """How many images the files answered, or from how few to how many."""
    counts = sorted({e.fidelity.n for e in measured})
    return "–".join(f"{n:,}" for n in dict.fromkeys(counts[:1] + counts[-1:])) or DASH


def _wrong(record: Record, foreign: int, t: Texts) -> typing.Iterator[str]:
    if record.problem:
        yield t["exported_unread"].format(RECORD, record.problem)
    if record.damaged:
        yield t["exported_damaged"].format(RECORD, record.damaged)
    if foreign:
        yield t["exported_foreign"].format(RECORD, foreign)


def _shown(row: Exported, least: bool, t: Texts) -> dict[str, Any]:
    status = t[f"exported_{row.status}"] if row.status in STATUSES else row.status
    differs = [t["fell_back"].format(t["join"].join(row.fallbacks))] if row.fallbacks else []
    return {
        "format": format_title(row),
        "precision": precision_title(row, t),
        "mark": MARKS.get(row.status, "plain"),
        "status": status,
        "said": t["then"].join([status, *[t["exported_least"]] * least, *filter(None, [row.reason]), *differs]),
        "least": least,
        "cells": _cells(row),
        "reason": row.reason,
        "fallbacks": row.fallbacks,
        "folded": len(row.fallbacks) > OPEN_FALLBACKS,
    }


def _cells(row: Exported) -> list[tuple[str, str]]:
    """As many as there are columns: what is measured, and its error."""
    share = fixed(100 * row.bytes / row.original_bytes, 1) if row.bytes and row.original_bytes else ""
    size = [(significant(row.bytes / 1e6) if row.bytes else DASH, ""), (f"{share}%" if share else DASH, "")]
    if (e := row.evidence) is None:
        return [*size, *[(DASH, "")] * 5]
    return [
        *size,
        (fixed(e.fidelity.same_top1), ""),
        (fixed(e.metric.value), f"± {fixed(e.metric.error)}"),
        (fixed(e.drop.value), f"± {fixed(e.drop.error)}"),
        (significant(e.p50(1)), ""),
        (significant(e.memory_mb), ""),
    ]
