"""What a report says of a detector alone: its metrics in detail, what became of its boxes, images with boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lighten.report.numbers import fixed, signed
from lighten.report.texts import METRICS, Texts
from lighten.types import Agreement, Estimate, Evidence, Result

TASK = "detection"
OPEN_STRIPS = 6


def detector(result: Result, won: Evidence, pictures: Mapping[str, str], lang: str, t: Texts) -> dict[str, Any]:
    """All of it; for other tasks nothing."""
    if result.task != TASK:
        return {"detail": (), "moved": (), "strips_of_boxes": ()}
    return {"detail": detail(result, t), **moved(won, t), **strips(result, pictures, lang, t)}


# --- metrics ----------------------------------------------------------------------------------------


def detail(result: Result, t: Texts) -> list[dict[str, Any]]:
    """mAP, AP50, AP75 and mAP by size of the original and the winner, then the change: each a number and its error, which
    is known of a change where it was measured on the same images."""
    final, name = result.final, result.baseline.evidence.metric_name if result.baseline.evidence else "mAP"
    old, new = dict(final.extra_before), dict(final.extra)
    first = {
        "name": t["tile_accuracy"].format(METRICS.get(name, name)),
        "cells": [
            _cell(final.baseline),
            _cell(final.winner),
            (signed(-final.drop.value), f"± {fixed(final.drop.error)}"),
        ],
    }
    return [first, *(_metric(t.get(k, k), old.get(k), new.get(k)) for k in dict.fromkeys([*old, *new]))]


def _metric(name: str, before: Estimate | None, after: Estimate | None) -> dict[str, Any]:
    change = signed(after.value - before.value) if before and after else "—"
    return {"name": name, "cells": [_cell(before), _cell(after), (change, "")]}


def _cell(e: Estimate | None) -> tuple[str, str]:
    return (fixed(e.value), f"± {fixed(e.error)}") if e else ("—", "")


# --- boxes that moved -----------------------------------------------------------------------------------


def moved(won: Evidence, t: Texts) -> dict[str, Any]:
    """Fidelity and drift of the boxes in one table, and the drift in a sentence; nothing where it was not measured."""
    rows = [(t["by_export"], won.fidelity), (t["by_compression"], won.drift)]
    table = [{"name": name, "cells": _cells(a)} for name, a in rows if a.boxes]
    titles = ("moved_n", "moved_again", "moved_partner", "moved_iou", "moved_score")
    return {"moved": table, "moved_columns": [t[name] for name in titles], "moved_sentence": said(won.drift, t)}


def _cells(a: Agreement) -> list[str]:
    assert a.boxes is not None
    b = a.boxes
    return [f"{b.n:,}", fixed(a.same_top1, 1), fixed(b.matched, 1), fixed(100 * b.iou, 1), fixed(b.score, 3)]


def said(drift: Agreement, t: Texts) -> str:
    """What compression did to the boxes, in a sentence."""
    b = drift.boxes
    if b is None:
        return ""
    if not math.isfinite(b.iou):
        return t["moved_none"] if b.n or not b.matched else t["moved_empty"]
    return t["moved_said"].format(fixed(b.matched, 1), fixed(100 * b.iou, 1), fixed(b.score, 3))


# --- images with boxes --------------------------------------------------------------------------------


def strips(result: Result, pictures: Mapping[str, str], lang: str, t: Texts) -> dict[str, Any]:
    """Pictures of truth, original and compressed, side by side, with what each found."""
    names = (
        [other or name for name, other in zip(result.classes, result.classes_zh)] if lang == "zh" else result.classes
    )
    seen = [(flip, pictures[name]) for flip in result.flips if (name := picture_of(flip, lang, pictures))]
    cards = [_card(flip, src, names, t) for flip, src in seen]
    changed = sum(card["kind"] != "same_boxes" for card in cards)
    calm = len(cards) - changed
    lines = [t["flips_some"].format(changed)] if changed else []
    lines += [t["flips_calm"].format(calm)] if calm else []
    return {
        "strips_of_boxes": cards,
        "strips_open": OPEN_STRIPS,
        "strips_said": t["gap"].join(lines),
    }


def picture_of(flip: Mapping[str, Any], lang: str, pictures: Mapping[str, str]) -> str:
    """The name of the picture in that language, else in English; "" where there is none."""
    for key in (f"thumbnail_{lang}", "thumbnail"):
        if (name := str(flip.get(key, ""))) in pictures:
            return name
    return ""


def _card(flip: Mapping[str, Any], src: str, names: Sequence[str], t: Texts) -> dict[str, Any]:
    truth, old, new = (_count(flip, key) for key in ("n_truth", "right_before", "right_after"))
    kind = "lost" if new < old else "won" if new > old else "both"
    return {
        "src": src,
        "image": str(flip.get("image", "")),
        "kind": kind if flip.get("changed", True) else "same_boxes",
        "truth": t["no_objects"] if not truth else t["one_object"] if truth == 1 else t["objects"].format(truth),
        "before": _found(flip, "before", truth, t),
        "after": _found(flip, "after", truth, t),
        "gone": _listed(flip.get("gone"), names, t),
        "new": _listed(flip.get("new"), names, t),
    }


def _found(flip: Mapping[str, Any], side: str, truth: int, t: Texts) -> str:
    """How many of the objects were found, and how many boxes are on none."""
    right, shown = _count(flip, f"right_{side}"), _count(flip, f"n_{side}")
    said = [t["of_objects"].format(right, truth)] if truth else []
    said += [t["strays"].format(shown - right)] if shown > right else []
    return t["join"].join(said or [t["none_shown"]])


def _listed(kinds: Any, names: Sequence[str], t: Texts) -> str:
    """Class names, those that come more than once with their number."""
    known = [k for k in kinds if isinstance(k, int) and 0 <= k < len(names)] if isinstance(kinds, list | tuple) else []
    counts = {k: known.count(k) for k in known}
    return t["join"].join(names[k] + (f" ×{n}" if n > 1 else "") for k, n in counts.items())


def _count(flip: Mapping[str, Any], key: str) -> int:
    value = flip.get(key, 0)
    return value if isinstance(value, int) else 0


def shown_names(flips: Sequence[Mapping[str, Any]], lang: str) -> set[str]:
    """The files that a report in `lang` may show."""
    return {str(flip.get(key, "")) for flip in flips for key in (f"thumbnail_{lang}", "thumbnail")} - {""}
