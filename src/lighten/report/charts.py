"""Pictures as inline SVG: pure functions from numbers to text; the page's CSS gives them their colours."""

from __future__ import annotations

import itertools
import math
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

Map = Callable[[float], float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""

FONT = 12.0
RADIUS = {"winner": 6, "probe": 4}
CROWD = 10
NEAR = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
FAR = tuple((dx, dy) for dy in (-34, 34, -56, 56, -78, 78) for dx in (0, 46, -46))


@dataclass(frozen=True)
class Point:
    """One trial in a plane. `kind` is winner, original, inside, outside or probe (a short trial, drawn faint).

    `short` is written where `label` has no room.
    """

    label: str
    short: str
    x: float
    y: float
    error: float
    kind: str


@dataclass(frozen=True)
class Strip:
    """Raw readings of one trial; `value` is their median as the page writes it."""

    label: str
    samples: tuple[float, ...]
    kind: str
    value: str


@dataclass(frozen=True)
class Change:
    """One class before and after, in percent."""

    label: str
    before: float
    after: float
    n: int

    @property
    def by(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Suspect:
    """One layer and its value in each series (None where it was not measured). `said` is its tip; with a `note`, which
    is written beside its last mark, it stands out. `kept` is ringed; `end` is written at the right edge where
    the picture is wide."""

    label: str
    values: tuple[float | None, ...]
    said: str = ""
    note: str = ""
    kept: float | None = None
    end: str = ""


@dataclass(frozen=True)
class Ask:
    """A spot that wants one of these texts beside it, the first if possible.

    `far` allows a place a little off, with a thin line back.
    """

    spot: tuple[float, float]
    texts: tuple[str, ...]
    far: bool = True


@dataclass(frozen=True)
class Note:
    """A text beside a point: where it goes, and whether a thin line leads back to the point."""

    text: str
    box: Box
    led: bool


# --- axes -----------------------------------------------------------------------------------------


def linear(lo: float, hi: float, start: float, end: float) -> Map:
    """Maps lo..hi to the pixels start..end."""
    return lambda v: start + (v - lo) / (hi - lo) * (end - start)


def logarithmic(lo: float, hi: float, start: float, end: float) -> Map:
    """Like `linear`, over the logarithm; lo, hi and what is mapped are above 0."""
    place = linear(math.log(lo), math.log(hi), start, end)
    return lambda v: place(math.log(v))


def nice_ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within lo..hi."""
    raw = (hi - lo) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def log_ticks(lo: float, hi: float, most: int = 6) -> list[float]:
    """1, 2 and 5 times powers of ten within lo..hi; fewer of them where that is too many.

    Where fewer than three lie in the range, round numbers instead.
    """
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{s * 10.0**d:.10g}") for d in decades for s in steps if lo <= s * 10.0**d <= hi]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) >= 3 else nice_ticks(lo, hi, 4)


# --- text -----------------------------------------------------------------------------------------


def text_width(text: str, size: float = FONT) -> float:
    """Pixels a line of text needs at most: a full em for Chinese, a generous share of one for Latin."""
    ems = {"W": 1.0, "F": 1.0, "A": 0.9}
    return size * sum(ems.get(unicodedata.east_asian_width(c), 0.7 if c.isupper() else 0.6) for c in text)


def shorten(text: str, width: float, size: float = FONT) -> str:
    """The text, its middle cut out where it needs more than `width` pixels: both ends tell most."""
    if text_width(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept // 3
        short = text[: kept - tail].rstrip() + "…" + text[len(text) - tail :].lstrip()
        if text_width(short, size) <= width:
            return short
    return "…"


def shortened(texts: Sequence[str], width: float, size: float = FONT) -> list[str]:
    """Each text as `shorten` has it; different ones that would look the same from where they begin to differ on."""
    short = [shorten(text, width, size) for text in texts]
    for look in {s for s in short if len({t for t, other in zip(texts, short) if other == s}) > 1}:
        alike = [k for k, s in enumerate(short) if s == look]
        common = next(
            k for k, signs in enumerate(itertools.zip_longest(*(texts[k] for k in alike))) if len({*signs}) > 1
        )
        for k in alike:
            short[k] = _from(texts[k], common, width, size)
    return short


def _from(text: str, start: int, width: float, size: float) -> str:
    """A little of the beginning, then the text from the word at `start` on, as much as there is room for."""
    while start and (text[start - 1].isascii() and text[start - 1].isalnum()):
        start -= 1
    head = text[: min(start, 4)].rstrip() + "…"
    for end in range(len(text), start, -1):
        cut = head + text[start:end].rstrip() + ("…" if end < len(text) else "")
        if text_width(cut, size) <= width:
            return cut
    return shorten(text, width, size)


def svg_text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" class="chart">'
        + "".join(parts)
        + "</svg>"
    )


# --- size or latency against accuracy ---------------------------------------------------------------


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats on both axes: smaller x, greater y."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or p.y > best[-1].y:
            best.append(p)
    return best


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    width: float = 540,
    height: float = 400,
    x_limit: float | None = None,
    y_limit: float | None = None,
    limit_text: str = "",
    floor: float = -math.inf,
) -> str:
    """x (log) against y with error bars, the Pareto front, and dashed budget limits where they are in range.

    What lies under `floor` is an arrow at the lower edge, so that one failure does not flatten the rest.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and p.x > 0]
    if not points:
        return ""
    points.sort(key=lambda p: ("winner", "original").index(p.kind) if p.kind in ("winner", "original") else 2)
    plane = _plane(points, (50.0, 30.0, width - 14, height - 42), floor)
    best = [p for p in front(points) if p.y >= plane.ys[0]]
    asks = [_ask(p, plane, crowded=len(points) > CROWD and p not in best) for p in points]
    marks, lines = _obstacles(points, asks, plane), _front_boxes(best, plane)
    limits = _limits(plane, x_limit, y_limit, limit_text, marks)
    notes = place(asks, [*marks, *limits.texts], plane.area, ([*lines, *limits.lines], lines))
    parts = [
        *_grid(plane, x_title, y_title),
        *limits.parts,
        _front_path(best, plane),
        *map(_leader, asks, notes),
        *(_mark(p, ask.spot, plane) for p, ask in reversed([*zip(points, asks)])),
        *map(_note, points, notes),
    ]
    return svg(width, height, f"{y_title} / {x_title}", parts)


@dataclass(frozen=True)
class _Plane:
    """The ranges of both axes, how they map to pixels, and where they lie."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    x: Map
    y: Map
    area: Box


def _plane(points: Sequence[Point], area: Box, floor: float) -> _Plane:
    xs, ys = _x_domain([p.x for p in points]), _y_domain(points, floor)
    return _Plane(xs, ys, logarithmic(*xs, area[0], area[2]), linear(*ys, area[3], area[1]), area)


def _ask(p: Point, plane: _Plane, crowded: bool) -> Ask:
    """Short trials, and in a crowd points off the front, get their number only, and only close by."""
    spot = (plane.x(p.x), min(plane.y(p.y), plane.area[3] - 6))
    plain = p.kind == "probe" or (crowded and p.kind not in ("winner", "original"))
    return Ask(spot, (p.short,) if plain else (p.label, p.short), far=not plain)


def _x_domain(values: Sequence[float]) -> tuple[float, float]:
    pad = max(1.12, (max(values) / min(values)) ** 0.14)
    return min(values) / pad, max(values) * pad


def _y_domain(points: Sequence[Point], floor: float) -> tuple[float, float]:
    shown = [p for p in points if p.y >= floor] or list(points)
    errors = [0.0 if math.isnan(p.error) else p.error for p in shown]
    lo, hi = min(p.y - e for p, e in zip(shown, errors)), max(p.y + e for p, e in zip(shown, errors))
    pad = max(0.12 * (hi - lo), 0.05)
    return lo - pad, hi + pad


def _grid(plane: _Plane, x_title: str, y_title: str) -> list[str]:
    left, top, right, bottom = plane.area
    rows = [svg_text(left - 50, top - 14, y_title, "title"), svg_text(right, bottom + 36, x_title, "title", "end")]
    for v in nice_ticks(*plane.ys):
        rows.append(f'<path class="grid" d="M{left:.1f} {plane.y(v):.1f}H{right:.1f}"/>')
        rows.append(svg_text(left - 8, plane.y(v) + 4, f"{v:g}", "tick", "end"))
    for v in log_ticks(*plane.xs):
        rows.append(f'<path class="grid" d="M{plane.x(v):.1f} {top:.1f}V{bottom:.1f}"/>')
        rows.append(svg_text(plane.x(v), bottom + 18, f"{v:g}", "tick", "middle"))
    return [*rows, f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>']


@dataclass
class _Limits:
    """Dashed lines with their texts as SVG, and the boxes that both take."""

    parts: list[str]
    lines: list[Box]
    texts: list[Box]


def _limits(plane: _Plane, x_limit: float | None, y_limit: float | None, text: str, taken: Sequence[Box]) -> _Limits:
    """Each text goes to the end of its line that covers nothing, or to the first end where both do."""
    left, top, right, bottom = plane.area
    found, wide = _Limits([], [], []), text_width(text, 11) + 6
    if x_limit is not None and plane.xs[0] < x_limit < plane.xs[1]:
        at = plane.x(x_limit)
        sides = [(x, y, x + wide, y + 16) for y in (bottom - 18, top + 2) for x in (at, at - wide)]
        _add_limit(found, f"M{at:.1f} {top:.1f}V{bottom:.1f}", (at - 1, top, at + 1, bottom), text)
        _add_limit_text(found, sides, text, taken, plane.area)
    if y_limit is not None and plane.ys[0] < y_limit < plane.ys[1]:
        at = plane.y(y_limit)
        sides = [(x, y, x + wide, y + 16) for x in (right - wide, left) for y in (at - 16, at + 2)]
        _add_limit(found, f"M{left:.1f} {at:.1f}H{right:.1f}", (left, at - 1, right, at + 1), text)
        _add_limit_text(found, sides, text, taken, plane.area)
    return found


def _add_limit(found: _Limits, path: str, box: Box, text: str) -> None:
    found.parts.append(f'<path class="limit" d="{path}"><title>{escape(text)}</title></path>')
    found.lines.append(box)


def _add_limit_text(found: _Limits, sides: Sequence[Box], text: str, taken: Sequence[Box], area: Box) -> None:
    box = next((side for side in sides if _free(side, [*taken, *found.texts], area)), sides[0])
    found.parts.append(svg_text((box[0] + box[2]) / 2, box[3] - 4, text, "limit-text", "middle"))
    found.texts.append(box)


def _obstacles(points: Sequence[Point], asks: Sequence[Ask], plane: _Plane) -> list[Box]:
    """What no label may cover: every marker and every error bar."""
    boxes = []
    for p, (px, py) in zip(points, (ask.spot for ask in asks)):
        boxes.append((px - 8, py - 8, px + 8, py + 8))
        if p.error > 0:
            boxes.append((px - 3, plane.y(p.y + p.error), px + 3, min(plane.y(p.y - p.error), plane.area[3])))
    return boxes


def _front_boxes(points: Sequence[Point], plane: _Plane) -> list[Box]:
    """The steps of the front as boxes two pixels wide."""
    boxes = []
    for p, q in itertools.pairwise((plane.x(p.x), plane.y(p.y)) for p in points):
        boxes.append((p[0], p[1] - 1, q[0], p[1] + 1))
        boxes.append((q[0] - 1, q[1], q[0] + 1, p[1]))
    return boxes


def place(
    asks: Sequence[Ask], taken: Iterable[Box], area: Box, dodge: Sequence[Sequence[Box]] = ()
) -> list[Note | None]:
    """A free place for each ask's first text that has one, close by or a little off; None where all is full.

    `taken` is never covered. `dodge` holds sets of thin lines: the first is dodged where possible, else the next.
    """
    taken = list(taken)
    notes: list[Note | None] = []
    for ask in asks:
        tries = ((n, lines) for text in ask.texts for lines in (*dodge, ()) for n in _candidates(ask, text))
        note = next((n for n, lines in tries if _free(n.box, [*taken, *lines], area)), None)
        notes.append(note)
        if note:
            taken.append(note.box)
    return notes


def _candidates(ask: Ask, text: str) -> Iterable[Note]:
    wide, high = text_width(text) + 4, FONT + 4
    for dx, dy in NEAR:
        reach = 9 if dx and dy else 10
        yield Note(text, _around(ask, dx * (reach + wide / 2), dy * (reach + high / 2), wide, high), False)
    for dx, dy in FAR if ask.far else ():
        yield Note(text, _around(ask, dx, dy, wide, high), True)


def _around(ask: Ask, dx: float, dy: float, wide: float, high: float) -> Box:
    """A box of this size whose centre is dx, dy off the spot."""
    cx, cy = ask.spot[0] + dx, ask.spot[1] + dy
    return (cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2)


def _free(box: Box, taken: Iterable[Box], area: Box) -> bool:
    inside = box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]
    return inside and not any(overlap(box, other) for other in taken)


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _front_path(points: Sequence[Point], plane: _Plane) -> str:
    if len(points) < 2:
        return ""
    steps = "".join(f"H{plane.x(p.x):.1f}V{plane.y(p.y):.1f}" for p in points[1:])
    return f'<path class="front" d="M{plane.x(points[0].x):.1f} {plane.y(points[0].y):.1f}{steps}"/>'


def _mark(p: Point, spot: tuple[float, float], plane: _Plane) -> str:
    px, py = spot
    low = p.y < plane.ys[0]
    tip, bar = f"{p.label}: {p.y:.2f} ± {p.error:.2f} · {p.x:.4g}", ""
    if p.error > 0 and not low:
        top, bottom = plane.y(p.y + p.error), min(plane.y(p.y - p.error), plane.area[3])
        ends = f"M{px - 3:.1f} {top:.1f}h6M{px - 3:.1f} {bottom:.1f}h6"
        bar = f'<path class="error" d="M{px:.1f} {top:.1f}V{bottom:.1f}{ends}"/>'
    drawn = shape("below" if low else p.kind, px, py)
    return f'<g class="mark {escape(p.kind)}"><title>{escape(tip)}</title>{bar}{drawn}</g>'


def shape(kind: str, px: float, py: float) -> str:
    """A marker: a ringed dot for the winner, a diamond for the original, an arrow for what is off the chart."""
    if kind == "original":
        return f'<path class="dot" d="M{px:.1f} {py - 7:.1f}l7 7l-7 7l-7 -7z"/>'
    if kind == "below":
        return f'<path class="dot" d="M{px - 6:.1f} {py - 6:.1f}h12l-6 10z"/>'
    ring = f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="9.5"/>' if kind == "winner" else ""
    return f'{ring}<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="{RADIUS.get(kind, 5)}"/>'


def key(kind: str) -> str:
    """The marker alone, for the legend."""
    return f'<svg viewBox="0 0 22 22" class="key mark {kind}" aria-hidden="true">{shape(kind, 11, 11)}</svg>'


def _leader(ask: Ask, note: Note | None) -> str:
    if note is None or not note.led:
        return ""
    (px, py), (left, top, right, bottom) = ask.spot, note.box
    return (
        f'<path class="leader" d="M{px:.1f} {py:.1f}L{(left + right) / 2:.1f} {bottom if bottom < py else top:.1f}"/>'
    )


def _note(p: Point, note: Note | None) -> str:
    if note is None:
        return ""
    return svg_text((note.box[0] + note.box[2]) / 2, note.box[3] - 4, note.text, f"note {p.kind}", "middle")


# --- latency ----------------------------------------------------------------------------------------


def strips(rows: Sequence[Strip], *, width: float = 900, unit: str = "ms", title: str = "") -> str:
    """Every reading as a tick, the middle half as a box, the median as a line; one axis from 0 for all rows.

    The axis ends a little after the slowest p95; readings beyond it are counted at the right edge.
    """
    rows = [r for r in rows if r.samples]
    if not rows:
        return ""
    stacked = width < 600
    names = min(width * 0.44, 24 + max(text_width(r.label) for r in rows))
    step, left, right = (46.0, 0.0, width - 62) if stacked else (34.0, names, width - 84)
    end = 1.12 * max(_quantile(r.samples, 0.95) for r in rows)
    x, bottom = linear(0, end, left, right), step * len(rows) + 8
    parts = []
    for v in nice_ticks(0, end, 4 if stacked else 6):
        parts.append(f'<path class="grid" d="M{x(v):.1f} 0V{bottom:.1f}"/>')
        parts.append(svg_text(x(v), bottom + 18, f"{v:g}", "tick", "start" if stacked and v == 0 else "middle"))
    parts.append(svg_text(width, bottom + 18, unit, "title", "end"))
    for k, row in enumerate(rows):
        parts.append(_strip(row, x, k * step + step * (0.72 if stacked else 0.5) + 4, end, left, width, stacked))
    return svg(width, bottom + 26, title, parts)


def _strip(row: Strip, x: Map, y: float, end: float, left: float, width: float, stacked: bool) -> str:
    middle, low, high = (_quantile(row.samples, q) for q in (0.5, 0.25, 0.75))
    seen = sorted({round(x(s), 1) for s in row.samples if s <= end})
    beyond = sum(s > end for s in row.samples)
    ticks = "".join(f"M{at:g} {y - 7:.1f}v14" for at in seen)
    label = shorten(row.label, width - 8 if stacked else left - 16)
    name = svg_text(0, y - 17 if stacked else y + 4, label, f"name {row.kind}")
    more = svg_text(x(end) + 2, y + 4, f"+{beyond}›", "tick") if beyond else ""
    return (
        f'<g class="strip {escape(row.kind)}"><title>{escape(row.label)}: {escape(row.value)}</title>{name}'
        f'<path class="samples" d="{ticks}"/>'
        f'<rect class="box" x="{x(low):.1f}" y="{y - 7:.1f}" width="{max(1.0, x(high) - x(low)):.1f}" '
        f'height="14" rx="2"/>'
        f'<path class="median" d="M{x(middle):.1f} {y - 10:.1f}v20"/>{more}'
        f"{svg_text(width, y + 4, row.value, f'value {row.kind}', 'end')}</g>"
    )


def _quantile(samples: Sequence[float], q: float) -> float:
    """The `q` quantile with linear interpolation between the readings."""
    if q == 0.5:
        return statistics.median(samples)
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    k = int(at)
    return ordered[k] + (at - k) * (ordered[min(k + 1, len(ordered) - 1)] - ordered[k])


# --- classes and layers -----------------------------------------------------------------------------


def extent(changes: Iterable[Change]) -> float:
    """A round number that no change exceeds; at least 1 point, so that noise does not look like news."""
    greatest = max((abs(c.by) for c in changes), default=0.0)
    return next((v for v in (1, 2, 3, 5, 10, 20, 30, 50) if greatest <= v), 100.0)


def diverging(changes: Sequence[Change], *, reach: float, width: float = 900, title: str = "") -> str:
    """One bar a class from the zero line, -reach..reach points: to the left it got worse, to the right better."""
    step, numbers = 24.0, 108.0
    names = min(width * 0.3, max((text_width(c.label) for c in changes), default=0.0))
    left, right, bottom = names + 10, width - numbers, step * len(changes) + 6
    x = linear(-reach, reach, left, right)
    parts = []
    for v in (-reach, -reach / 2, 0.0, reach / 2, reach):
        parts.append(f'<path class="{"axis" if v == 0 else "grid"}" d="M{x(v):.1f} 0V{bottom:.1f}"/>')
        if abs(v) in (0, reach):
            parts.append(svg_text(x(v), bottom + 17, f"{v:+g}".replace("-", "−") if v else "0", "tick", "middle"))
    labels = shortened([c.label for c in changes], names)
    for k, (change, label) in enumerate(zip(changes, labels)):
        parts.append(_change_bar(change, label, x, step * k + 3, width))
    return svg(width, bottom + 24, title, parts)


def _change_bar(c: Change, label: str, x: Map, top: float, width: float) -> str:
    start, end = sorted((x(0), x(c.by)))
    side = "worse" if c.by < 0 else "better" if c.by > 0 else "same"
    return (
        f'<g class="{side}"><title>{escape(c.label)}: {c.before:.1f} → {c.after:.1f} (n = {c.n})</title>'
        f"{svg_text(0, top + 14, label, 'name')}"
        f'<rect class="bar" x="{start:.1f}" y="{top + 3:.1f}" width="{max(end - start, 0.8):.1f}" '
        f'height="12" rx="1.5"/>'
        f"{svg_text(width, top + 14, f'{c.before:.1f} → {c.after:.1f}', 'pair', 'end')}</g>"
    )


def dots(
    rows: Sequence[Suspect], *, x_title: str, width: float = 900, title: str = "", tick: Callable[[float], str] = str
) -> str:
    """One row a layer, one mark a series on a logarithmic axis; what is 0 or far below the rest lies at its left end.

    The axis spans at most `DECADES` powers of ten below the greatest value. "" where nothing is above 0.
    """
    marks = [v for row in rows for v in (*row.values, row.kept)]
    seen = [v for v in marks if v is not None and v > 0 and math.isfinite(v)]
    if not seen:
        return ""
    lo, hi = max(min(seen) / 1.6, max(seen) / 10**DECADES), max(seen) * 1.3
    step, size = (22.0, FONT) if len(rows) <= 24 else (16.0, 11.0)
    ends = 0.0 if width < 600 else max(text_width(row.end, 11) for row in rows)
    notes = max(text_width(row.note, 11) for row in rows) + (ends + 10 if ends else 0)
    names = min(width * (0.4 if width < 600 else 0.3), max(text_width(row.label, size) for row in rows))
    left, right, top = names + 16, width - notes - 16, 22.0
    x, bottom = logarithmic(lo, hi, left, right), top + step * len(rows)
    parts = [_decades(lo, hi, x, top, bottom, tick, 4 if width < 600 else 7)]
    parts += [_suspect(row, x, lo, top + step * (k + 0.5), left, names, size) for k, row in enumerate(rows)]
    parts += [svg_text(width, top + step * (k + 0.5) + 4, row.end, "tick", "end") for k, row in enumerate(rows) if ends]
    return svg(width, bottom + 40, title, [*parts, svg_text(right, bottom + 34, x_title, "title", "end")])


DECADES = 6
SERIES = ("circle", "diamond", "square", "triangle")


def _decades(lo: float, hi: float, x: Map, top: float, bottom: float, tick: Callable[[float], str], most: int) -> str:
    """Lines at round values, named above and below: a picture of many layers is taller than a screen."""
    parts = [f'<path class="axis" d="M{x(lo):.1f} {top:.1f}V{bottom:.1f}"/>']
    ticks = log_ticks(lo, hi, most)
    for v in ticks[:: math.ceil(len(ticks) / most)]:
        parts.append(f'<path class="grid" d="M{x(v):.1f} {top:.1f}V{bottom:.1f}"/>')
        parts += [svg_text(x(v), y, tick(v), "tick", "middle") for y in (top - 8, bottom + 16)]
    return "".join(parts)


def _suspect(row: Suspect, x: Map, lo: float, y: float, left: float, names: float, size: float) -> str:
    placed = [(k, x(max(v, lo)), v) for k, v in enumerate(row.values) if v is not None and math.isfinite(v)]
    kept = x(max(row.kept, lo)) if row.kept is not None and math.isfinite(row.kept) else None
    ends = [*(at for _, at, _ in placed), *([kept] if kept is not None else [])] or [left]
    name = shorten(row.label, names, size)
    line = f'<path class="span" d="M{min(ends):.1f} {y:.1f}H{max(ends):.1f}"/>' if len(ends) > 1 else ""
    marks = "".join(series_mark(k, at, y, faint=v < lo) for k, at, v in placed)
    marks += "" if kept is None else kept_mark(kept, y)
    note = svg_text(max(ends) + 9, y + 4, row.note, "value") if row.note else ""
    return (
        f'<g class="suspect{" worst" if row.note else ""}"><title>{escape(row.label)}: {escape(row.said)}</title>'
        f'<rect class="hit" x="0" y="{y - 7:.1f}" width="{left:.1f}" height="14"/>'
        f'<text x="{left - 12:.1f}" y="{y + 4:.1f}" class="name" text-anchor="end" font-size="{size:g}">{escape(name)}</text>'
        f"{line}{marks}{note}</g>"
    )


def series_mark(k: int, px: float, y: float, faint: bool = False) -> str:
    """The mark of the k-th series: a circle, a diamond, a square, a triangle."""
    kind = SERIES[k % len(SERIES)]
    drawn = {
        "circle": f'<circle cx="{px:.1f}" cy="{y:.1f}" r="4"/>',
        "diamond": f'<path d="M{px:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>',
        "square": f'<rect x="{px - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
        "triangle": f'<path d="M{px:.1f} {y - 5:.1f}l5 9h-10z"/>',
    }[kind]
    return f'<g class="series {kind}{" off" if faint else ""}">{drawn}</g>'


def series_key(k: int) -> str:
    """The mark alone, for the legend."""
    return f'<svg viewBox="0 0 22 22" class="key" aria-hidden="true">{series_mark(k, 11, 11)}</svg>'


def kept_mark(px: float, y: float) -> str:
    """A ring around a value that was not measured itself."""
    return f'<circle class="kept" cx="{px:.1f}" cy="{y:.1f}" r="6.5"/>'


def kept_key() -> str:
    """The ring alone, for the legend."""
    return f'<svg viewBox="0 0 22 22" class="key" aria-hidden="true">{kept_mark(11, 11)}</svg>'


def meter(value: float, full: float, css: str = "") -> str:
    """A small bar, 64 pixels for `full`; empty for what is not a number."""
    wide = 64 * min(1.0, max(0.0, value / full)) if math.isfinite(value) else 0.0
    return (
        f'<svg viewBox="0 0 64 6" class="meter {escape(css)}" aria-hidden="true">'
        f'<rect class="track" width="64" height="6" rx="3"/>'
        f'<rect class="fill" width="{wide:.1f}" height="6" rx="3"/></svg>'
    )
