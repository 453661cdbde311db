"""A recipe as people read it: each step with its settings in short, long ones summarised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.report.texts import Texts
from lighten.types import Recipe, Step

SHOWN = 3
"""Members of a long setting, and layers with a precision of their own, that are named."""


def made(recipe: Recipe, channels: Mapping[str, int], t: Texts) -> list[tuple[str, str]]:
    """Each step's method with its settings, then the precision; empty where nothing but a plain precision was asked.

    `channels` are the original widths of the channel groups, by name.
    """
    if not recipe.complexity and not any(step.settings for step in recipe.steps) and not recipe.precision.exceptions:
        return []
    rows = [(step.method.replace("_", " "), settings(step, channels, t)) for step in recipe.steps]
    return [*rows, (t["precision"], precision(recipe, t))]


def detail(recipe: Recipe, channels: Mapping[str, int], t: Texts) -> str:
    """One short line that tells two recipes of the same title apart."""
    said = []
    for step in recipe.steps:
        kept = [f"{name} {_plain(v)}" for name, v in _given(step) if not isinstance(v, tuple | list)]
        if widths := widths_of(step):
            kept.insert(0, t["keeps_channels"].format(*_counts(widths, channels)))
        if kept and step.method != "quantize":
            said.append(f"{step.method.replace('_', ' ')}{t['colon']}{t['join'].join(kept)}")
    return t["then"].join(said)


def plan(recipe: Recipe, channels: Mapping[str, int], t: Texts) -> str:
    """What a narrowing recipe keeps: channels, and layers with bits of their own."""
    said = [t["keeps_channels"].format(*_counts(kept(recipe), channels))]
    lower = len(recipe.precision.exceptions)
    return t["join"].join([*said, *([t["other_bits"].format(lower)] if lower else [])])


def settings(step: Step, channels: Mapping[str, int], t: Texts) -> str:
    """`epochs 10, lr 0.02`; widths as `12 groups: conv1 64 → 24, …`."""
    widths = widths_of(step)
    parts = [_widths(widths, channels, t)] if widths else []
    parts += [f"{name} {_value(v, t)}" for name, v in _given(step) if not (widths and name == "widths")]
    return t["join"].join(parts) or t["as_it_comes"]


def precision(recipe: Recipe, t: Texts) -> str:
    """The bits, and the layers that have others."""
    rows = recipe.precision.exceptions
    listed = [f"{layer} {weights}/{activations}" for layer, weights, activations in rows[:SHOWN]]
    more = [t["and_more"].format(len(rows) - SHOWN)] if len(rows) > SHOWN else []
    said = t["colon"] + t["join"].join([*listed, *more]) if rows else ""
    return f"{recipe.precision.title} · {recipe.format}{said}"


def widths_of(step: Step) -> dict[str, int]:
    """The channels kept by group, where the step's settings name them so; else nothing."""
    found = dict(step.settings).get("widths") or ()
    pairs = found.items() if isinstance(found, Mapping) else found
    try:
        return {str(name): int(width) for name, width in pairs}
    except (TypeError, ValueError):
        return {}


def kept(recipe: Recipe) -> dict[str, int]:
    """The channels that a recipe keeps, by group; groups that it leaves whole are not named."""
    return {name: width for step in recipe.steps for name, width in widths_of(step).items()}


def _given(step: Step) -> list[tuple[str, Any]]:
    """Settings that say something: 0 seconds is no limit on time."""
    return [(name, v) for name, v in step.settings if not (name == "seconds" and not v)]


def _counts(widths: Mapping[str, int], channels: Mapping[str, int]) -> tuple[str, str]:
    """Channels kept of all that can go. A group whose width is not known counts by what it keeps."""
    whole = {**widths, **channels}
    return f"{sum(widths.get(name, n) for name, n in whole.items()):,}", f"{sum(whole.values()):,}"


def _widths(widths: Mapping[str, int], channels: Mapping[str, int], t: Texts) -> str:
    """The groups that lost the largest share first."""
    order = sorted(widths, key=lambda name: widths[name] / channels.get(name, widths[name]))
    listed = [f"{name} {channels.get(name, '?')} → {widths[name]}" for name in order[:SHOWN]]
    more = [t["and_more"].format(len(order) - SHOWN)] if len(order) > SHOWN else []
    count = t["one_group"] if len(widths) == 1 else t["groups"].format(len(widths))
    return f"{count}{t['colon']}{t['join'].join([*listed, *more])}"


def _value(value: Any, t: Texts) -> str:
    if not isinstance(value, tuple | list):
        return _plain(value)
    listed = [" ".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for v in value[:SHOWN]]
    more = [t["and_more"].format(len(value) - SHOWN)] if len(value) > SHOWN else []
    return t["join"].join([*listed, *more]) if value else "—"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and 1e-3 <= abs(value) < 1e5 else str(value)
