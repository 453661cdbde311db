"""Pictures of a narrowed network, of predictions and of time as inline SVG: pure functions from numbers to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lighten.report.charts import (
    FONT,
    Ask,
    Box,
    Map,
    log_ticks,
    logarithmic,
    place,
    shape,
    shorten,
    svg,
    svg_text,
    text_width,
)

PHONE = 600.0


# --- channels before and after ----------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """One layer: its channels and its multiplications (before, after), and the latter as the page writes them."""

    label: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    said: str


def layers(rows: Sequence[Kept], *, width: float, titles: tuple[str, str, str], title: str = "") -> str:
    """One row a layer: light is what it had, dark what it keeps. On a phone the multiplications are percent only.

    `titles` are those of the channels, of the multiplications, and of their percent. "" without rows.
    """
    if not rows:
        return ""
    step, size = (20.0, FONT) if len(rows) <= 30 else (15.0, 11.0)
    spans = _spans(rows, width, size)
    head, top = 18.0, 26.0
    most = max(max(r.channels) for r in rows) or 1, max(max(r.macs) for r in rows) or 1
    parts = [svg_text(spans[0][0], head - 4, titles[0], "title")]
    if width < PHONE:
        parts.append(svg_text(width, head - 4, titles[2], "title", "end"))
    else:
        parts.append(svg_text(spans[1][0], head - 4, titles[1], "title"))
    parts += [_row(row, spans, most, top + step * k, step, size, width) for k, row in enumerate(rows)]
    return svg(width, top + step * len(rows) + 2, title, parts)


def _spans(rows: Sequence[Kept], width: float, size: float) -> list[tuple[float, float]]:
    """Left and right ends of the bars of channels, and of those of the multiplications where there is room."""
    pairs = max(text_width(_pair(r), 11) for r in rows)
    left = 12 + min(width * (0.32 if width < PHONE else 0.24), max(text_width(r.label, size) for r in rows))
    if width < PHONE:
        return [(left, width - pairs - 52)]
    said = max(text_width(r.said, 11) for r in rows)
    middle = left + (width - left - pairs - said) * 0.5
    return [(left, middle - 16), (middle + pairs + 16, width - said - 8)]


def _row(
    row: Kept,
    spans: Sequence[tuple[float, float]],
    most: tuple[int, int],
    top: float,
    step: float,
    size: float,
    width: float,
) -> str:
    left, high, base = spans[0][0], step * 0.55, top + step * 0.5
    name = shorten(row.label, left - 12, size)
    bars = [_bar(row.channels, most[0], spans[0], base - high / 2, high), _said(spans[0][1] + 8, base, _pair(row))]
    if len(spans) > 1:
        bars += [_bar(row.macs, most[1], spans[1], base - high / 2, high), _said(spans[1][1] + 8, base, row.said)]
    elif row.macs[0]:
        bars.append(svg_text(width, base + 4, f"{100 * row.macs[1] / row.macs[0]:.0f}%", "tick", "end"))
    return (
        f'<g class="kept-row"><title>{escape(row.label)}: {escape(_pair(row))} · {escape(row.said)}</title>'
        f'<text x="{left - 12:.1f}" y="{base + 4:.1f}" class="name" text-anchor="end" font-size="{size:g}">{escape(name)}</text>'
        f"{''.join(bars)}</g>"
    )


def _bar(pair: tuple[int, int], most: int, span: tuple[float, float], top: float, high: float) -> str:
    """The two bars one over the other, the light one behind."""
    wide = [(span[1] - span[0]) * value / most for value in pair]
    return "".join(
        f'<rect class="{css}" x="{span[0]:.1f}" y="{top:.1f}" width="{max(w, 0.6) if v else 0:.1f}" height="{high:.1f}" rx="1.5"/>'
        for css, w, v in zip(("had", "keeps"), wide, pair)
    )


def _pair(row: Kept) -> str:
    before, after = row.channels
    return f"{before}" if before == after else f"{before} → {after}"


def _said(x: float, base: float, said: str) -> str:
    return svg_text(x, base + 4, said, "tick")


# --- predicted against measured -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What was predicted of a file and what was measured on it. `kind` as in the other pictures."""

    label: str
    kind: str
    predicted: float
    measured: float


def parity(points: Sequence[Pair], *, x_title: str, y_title: str, within: float, width: float = 420) -> str:
    """Predicted (x) against measured (y) on equal logarithmic axes, the diagonal, and the band `within` percent of it.

    "" where nothing is above 0.
    """
    points = sorted((p for p in points if p.predicted > 0 and p.measured > 0), key=lambda p: p.kind != "winner")
    if not points:
        return ""
    values = [v for p in points for v in (p.predicted, p.measured)]
    pad = max(1.3, (max(values) / min(values)) ** 0.1)
    lo, hi = min(values) / pad, max(values) * pad
    height = width * 0.82
    area = (50.0, 30.0, width - 14, height - 42)
    x, y = logarithmic(lo, hi, area[0], area[2]), logarithmic(lo, hi, area[3], area[1])
    spots = [(x(p.predicted), y(p.measured)) for p in points]
    asks = [Ask(spot, (p.label,), far=False) for spot, p in zip(spots, points)]
    notes = place(asks, [(px - 8, py - 8, px + 8, py + 8) for px, py in spots], area)
    parts = [_band(lo, hi, within, x, y, area), *_grid(lo, hi, x, y, area, x_title, y_title)]
    parts.append(f'<path class="diagonal" d="M{x(lo):.1f} {y(lo):.1f}L{x(hi):.1f} {y(hi):.1f}"/>')
    for p, (px, py) in reversed([*zip(points, spots)]):
        tip = f"{p.label}: {p.predicted:.4g} → {p.measured:.4g}"
        parts.append(f'<g class="mark {escape(p.kind)}"><title>{escape(tip)}</title>{shape(p.kind, px, py)}</g>')
    for p, note in zip(points, notes):
        if note:
            middle = (note.box[0] + note.box[2]) / 2
            parts.append(svg_text(middle, note.box[3] - 4, note.text, f"note {p.kind}", "middle"))
    return svg(width, height, f"{y_title} / {x_title}", parts)


def _band(lo: float, hi: float, within: float, x: Map, y: Map, area: Box) -> str:
    """Where the prediction is within so many percent of the measured value, cut off at the edges."""
    more, less = 1 + within / 100, 1 - within / 100
    corners = [(lo, lo), (lo, lo / less), (hi * less, hi), (hi, hi), (hi, hi / more), (lo * more, lo)]
    drawn = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
    return f'<polygon class="band" points="{drawn}"/>'


def _grid(lo: float, hi: float, x: Map, y: Map, area: Box, x_title: str, y_title: str) -> list[str]:
    left, top, right, bottom = area
    rows = [svg_text(0, top - 14, y_title, "title"), svg_text(right, bottom + 36, x_title, "title", "end")]
    for v in log_ticks(lo, hi, 5):
        rows.append(f'<path class="grid" d="M{left:.1f} {y(v):.1f}H{right:.1f}M{x(v):.1f} {top:.1f}V{bottom:.1f}"/>')
        rows.append(svg_text(left - 8, y(v) + 4, f"{v:g}", "tick", "end"))
        rows.append(svg_text(x(v), bottom + 18, f"{v:g}", "tick", "middle"))
    return [*rows, f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>']


# --- time ---------------------------------------------------------------------------------------------


def stack(
    pieces: Sequence[tuple[str, float, int]], width: float, limit: float | None, limit_text: str, title: str = ""
) -> str:
    """Seconds of each part (name, seconds, colour) end to end in one bar; the time allowed is a line across it."""
    total = sum(seconds for _, seconds, _ in pieces)
    if total <= 0:
        return ""
    full, top, high = max(total, limit or 0.0), 22.0 if limit else 2.0, 26.0
    scale = (width - 2) / full
    parts = [f'<rect class="track" x="0" y="{top:.1f}" width="{width:.1f}" height="{high:.1f}" rx="4"/>']
    at = 0.0
    for name, seconds, color in pieces:
        wide = seconds * scale
        tip = f"{name}: {seconds:.1f} s"
        parts.append(
            f'<rect class="part p{color}" x="{at:.1f}" y="{top:.1f}" width="{max(wide - 1, 0.5):.1f}" height="{high:.1f}">'
            f"<title>{escape(tip)}</title></rect>"
        )
        at += wide
    if limit:
        x = limit * scale
        anchor = "end" if x > width / 2 else "start"
        parts.append(f'<path class="limit" d="M{x:.1f} {top - 6:.1f}v{high + 12:.1f}"/>')
        parts.append(svg_text(x, top - 10, limit_text, "limit-text", anchor))
    return svg(width, top + high + 8, title, parts)
