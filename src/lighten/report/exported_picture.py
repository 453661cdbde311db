"""Size against time of the files in other formats as inline SVG: one mark a file, its format beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lighten.report.charts import (
    FONT,
    Box,
    Map,
    Suspect,
    dots,
    log_ticks,
    logarithmic,
    series_key,
    series_mark,
    svg,
    svg_text,
    text_width,
)
from lighten.report.numbers import significant
from lighten.report.texts import Texts
from lighten.types import FLOATS, Exported

SHAPES = (0, 3, 1, 2)
"""Marks of the precisions, the smallest files first: circle, triangle, diamond, square."""
GAP = 15.0
"""Pixels from one label to the next."""


@dataclass(frozen=True)
class Mark:
    """One file: MB, ms, the precision that its shape tells."""

    label: str
    precision: str
    mb: float
    ms: float
    integer: bool


def marks(files: Sequence[tuple[str, Exported]]) -> list[Mark]:
    """Each file that has a size and a time above 0, by its label."""
    found = [(label, row, row.evidence.p50(1)) for label, row in files if row.evidence and row.bytes]
    return [
        Mark(label, row.precision.title, row.bytes / 1e6, ms, row.precision.weights not in FLOATS)
        for label, row, ms in found
        if 0 < ms < float("inf")
    ]


def worth(files: Sequence[Mark]) -> bool:
    """Whether there is anything to compare, integers in at least two formats, and a shape for each precision."""
    return len({m.label for m in files if m.integer}) > 1 and len(precisions(files)) <= len(SHAPES)


def legend(files: Sequence[Mark]) -> list[tuple[str, str]]:
    """Shape and name of each precision, the smallest files first."""
    return [(series_key(shape), name) for shape, name in zip(SHAPES, precisions(files))]


def precisions(files: Sequence[Mark]) -> list[str]:
    return list(dict.fromkeys(m.precision for m in sorted(files, key=lambda m: m.mb)))


def both(files: Sequence[Mark], t: Texts) -> dict[str, str]:
    """Size against time for a wide page; time alone for a phone, where columns of labels have no room."""
    return {
        "wide": plane(files, t["axis_size"], t["axis_latency"], title=t["exported"]),
        "narrow": dots(rows(files), x_title=t["axis_latency"], width=350, title=t["exported"], tick="{:g}".format),
    }


def rows(files: Sequence[Mark]) -> list[Suspect]:
    """One row a format, the ms of each precision in the place of its shape."""
    kinds = precisions(files)
    found: dict[str, list[float | None]] = {}
    for m in files:
        found.setdefault(m.label, [None] * len(SHAPES))[SHAPES[kinds.index(m.precision)]] = m.ms
    said = {label: [f"{m.precision} {significant(m.ms)}" for m in files if m.label == label] for label in found}
    return [Suspect(label, tuple(values), " · ".join(said[label])) for label, values in found.items()]


def plane(
    files: Sequence[Mark], x_title: str, y_title: str, *, width: float = 900, height: float = 380, title: str = ""
) -> str:
    """MB (x) against ms (y), both logarithmic. Labels stand in columns right of their marks. "" without files."""
    if not files:
        return ""
    wide = max(text_width(m.label) for m in files)
    area = (42.0, 30.0, width - 4, height - 42)
    xs, ys = _range([m.mb for m in files], 1.1), _range([m.ms for m in files], 1.25)
    x, y = logarithmic(*xs, area[0], area[2] - wide - 16), logarithmic(*ys, area[3], area[1])
    spots = [(x(m.mb), y(m.ms)) for m in files]
    kinds = precisions(files)
    parts = _grid(xs, ys, x, y, area, x_title, y_title)
    for column in columns([spot[0] for spot in spots], wide + 24):
        parts += _labels([files[k] for k in column], [spots[k] for k in column], area)
    for m, (px, py) in zip(files, spots):
        tip = f"{m.label} {m.precision}: {significant(m.mb)} MB, {significant(m.ms)} ms"
        drawn = series_mark(SHAPES[kinds.index(m.precision)], px, py)
        parts.append(f"<g><title>{escape(tip)}</title>{drawn}</g>")
    return svg(width, height, title, parts)


def columns(places: Sequence[float], reach: float) -> list[list[int]]:
    """Indices of marks so near each other (in x) that the label of one would run into the next."""
    found: list[list[int]] = []
    for k in sorted(range(len(places)), key=lambda k: places[k]):
        if found and places[k] - places[found[-1][-1]] < reach:
            found[-1].append(k)
        else:
            found.append([k])
    return found


def apart(places: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """Each of the ascending `places` moved as little as possible (in squares) so that they are `gap` apart, within
    lo..hi where they fit: isotonic regression of what is left of each after its share of the gaps."""
    blocks: list[tuple[float, int]] = []
    for k, place in enumerate(places):
        mean, n = place - gap * k, 1
        while blocks and blocks[-1][0] > mean:
            before, m = blocks.pop()
            mean, n = (before * m + mean * n) / (m + n), m + n
        blocks.append((mean, n))
    flat = [mean for mean, n in blocks for _ in range(n)]
    most = hi - gap * (len(flat) - 1)
    return [max(lo, min(most, v)) + gap * k for k, v in enumerate(flat)]


def _labels(files: Sequence[Mark], spots: Sequence[tuple[float, float]], area: Box) -> list[str]:
    """One column of labels, from the top, each led to from its mark."""
    order = sorted(range(len(files)), key=lambda k: spots[k][1])
    left = max(px for px, _ in spots) + 18
    tops = apart([spots[k][1] for k in order], GAP, area[1] + 4, area[3] - 6)
    parts = []
    for k, at in zip(order, tops):
        px, py = spots[k]
        parts.append(f'<path class="leader" d="M{px:.1f} {py:.1f}L{left - 3:.1f} {at:.1f}"/>')
        parts.append(svg_text(left, at + FONT / 3, files[k].label, "note"))
    return parts


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    return min(values) / pad, max(values) * pad


def _grid(
    xs: tuple[float, float], ys: tuple[float, float], x: Map, y: Map, area: Box, x_title: str, y_title: str
) -> list[str]:
    left, top, right, bottom = area
    parts = [svg_text(0, top - 14, y_title, "title"), svg_text(right, bottom + 36, x_title, "title", "end")]
    for v in log_ticks(*ys, 5):
        parts.append(f'<path class="grid" d="M{left:.1f} {y(v):.1f}H{right:.1f}"/>')
        parts.append(svg_text(left - 8, y(v) + 4, f"{v:g}", "tick", "end"))
    for v in _ticks(*xs):
        parts.append(f'<path class="grid" d="M{x(v):.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(svg_text(x(v), bottom + 18, f"{v:g}", "tick", "middle"))
    return [*parts, f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>']


def _ticks(lo: float, hi: float) -> list[float]:
    """At least three round sizes, where so many lie in the range: files span a factor of four or so."""
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    for steps in ((1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [v for d in decades for s in steps if lo <= (v := float(f"{s * 10.0**d:.6g}")) <= hi]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 8)]
