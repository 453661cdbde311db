"""One precision for each layer under a budget: an integer program over what each layer costs alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lighten.errors import BadConfig, MissingBackend
from lighten.types import FLOATS, Advice, LayerCost, Precision

Choice = tuple[str, str]
Picked = tuple[LayerCost, ...]
SAME = 1e-9
"""Sums that differ by less than this share of themselves are equal: they are sums of floats in another order."""
LARGE, TINY, CUTS = 1e6, 1e-300, 50
"""Coefficients are scaled to LARGE, so that the solver's absolute tolerances of 1e-6 are shares of 1e-12."""


@dataclass(frozen=True)
class Allocation:
    """A mix: damage is the sum of what each layer does alone, in nats an image; bytes and ms hold what is beside the
    layers too. `latency_ms` is None where a layer was not timed. `reasons` name each layer that is kept above its
    smallest precision, with the number that speaks for it."""

    precision: Precision
    damage: float
    bytes: int
    latency_ms: float | None
    reasons: tuple[tuple[str, Advice], ...]
    picked: Picked


@dataclass(frozen=True)
class _Limit:
    name: str
    unit: str
    most: float


def allocate(
    costs: Iterable[LayerCost],
    *,
    max_bytes: float | None = None,
    max_damage: float | None = None,
    max_latency_ms: float | None = None,
    other_bytes: int = 0,
    other_ms: float = 0.0,
    fixed: Mapping[str, Choice] | None = None,
) -> Allocation:
    """The mix of least damage within `max_bytes` and `max_latency_ms`; with `max_damage`, the mix of fewest bytes.

    One precision a layer is chosen so that the sums keep every limit (Hubara et al., 2020, "Improving Post Training
    Neural Quantization: Layer-wise Calibration and Integer Programming", section 3.3); that damages add up is an
    assumption, so a mix is measured afterwards. Ties go to fewer bytes (with `max_damage`: to less time), then to the
    rest, then to accuracy for earlier layers. `other_bytes` and `other_ms` are what the file needs beside these layers.
    `fixed` holds layers to a choice ("fc": ("int8", "int8")). Precisions that were not measured finite are not chosen.

    Raises BadConfig where no mix keeps the limits, saying what the best one reaches, or where the question makes no
    sense; MissingBackend without scipy.
    """
    options = _options(costs, fixed or {})
    limits = _limits(max_bytes, max_damage, max_latency_ms, other_bytes, other_ms, options)
    _check_each(options, limits, other_bytes, other_ms)
    order = ("bytes", "latency_ms", "damage") if max_damage is not None else ("damage", "bytes", "latency_ms")
    picked = _solve(options, limits, order)
    if picked is None:
        raise _together(options, limits, other_bytes, other_ms)
    return _allocation(picked, options, other_bytes, other_ms, fixed or {})


def frontier(
    costs: Iterable[LayerCost],
    n: int,
    *,
    other_bytes: int = 0,
    other_ms: float = 0.0,
    fixed: Mapping[str, Choice] | None = None,
) -> tuple[Allocation, ...]:
    """At most `n` different mixes, from the smallest to the most accurate, evenly spread in bytes between the two."""
    if n < 2:
        raise BadConfig(f"A frontier of {n} mixes has no two ends.", "Ask for 2 or more.")
    options = _options(costs, fixed or {})
    rest: dict[str, Any] = {"other_bytes": other_bytes, "other_ms": other_ms, "fixed": fixed}
    given = [row for rows in options for row in rows]
    least = sum(min(row.bytes for row in rows) for rows in options) + other_bytes
    best = allocate(given, **rest)
    sizes = [math.floor(least + (best.bytes - least) * k / (n - 1)) for k in range(n - 1)]
    mixes = [*(allocate(given, max_bytes=size, **rest) for size in sizes), best]
    return tuple({mix.picked: mix for mix in mixes}.values())


# --- the question -----------------------------------------------------------------------------------


def _options(costs: Iterable[LayerCost], fixed: Mapping[str, Choice]) -> list[list[LayerCost]]:
    """The rows of each layer, the most accurate first. Raises BadConfig on rows that contradict each other."""
    by_layer: dict[str, dict[Choice, LayerCost]] = {}
    for row in costs:
        mine = by_layer.setdefault(row.layer, {})
        choice = (row.weights, row.activations)
        if choice in mine and mine[choice] != row:
            raise BadConfig(f"{row.layer} has two costs at {_title(choice)}.", "Give each layer and precision once.")
        mine[choice] = row
    if not by_layer:
        raise BadConfig("There are no layer costs to choose from.", "Scan the sensitivity of the layers first.")
    if strangers := sorted(set(fixed) - set(by_layer)):
        raise BadConfig(f"fixed names layers that are not there: {', '.join(strangers[:3])}.", _some(by_layer))
    for name, choice in fixed.items():
        if choice not in by_layer[name]:
            raise BadConfig(
                f"{name} is fixed at {_title(choice)}, which was not measured.",
                f"Measured: {', '.join(map(_title, by_layer[name]))}",
            )
        by_layer[name] = {choice: by_layer[name][choice]}
    return [_usable(name, rows.values()) for name, rows in by_layer.items()]


def _usable(name: str, rows: Iterable[LayerCost]) -> list[LayerCost]:
    finite = [row for row in rows if math.isfinite(row.damage)]
    if not finite:
        raise BadConfig(f"{name} has no precision with a finite damage.", "Add float32 to the choices.")
    return sorted(finite, key=lambda row: (row.damage, row.bytes, row.key))


def _some(names: Iterable[str]) -> str:
    return f"Layers: {', '.join(list(names)[:40])}"


def _title(choice: Choice) -> str:
    return choice[0] if choice[0] == choice[1] else "/".join(choice)


def _limits(
    max_bytes: float | None,
    max_damage: float | None,
    max_latency_ms: float | None,
    other_bytes: int,
    other_ms: float,
    options: Sequence[Sequence[LayerCost]],
) -> list[_Limit]:
    """The limits on the layers alone."""
    given = {"max_bytes": max_bytes, "max_damage": max_damage, "max_latency_ms": max_latency_ms}
    for name, value in given.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BadConfig(f"{name} must be a number of 0 or more, not {value}.")
    if max_latency_ms is not None:
        untimed = [rows[0].layer for rows in options if any(row.latency_ms is None for row in rows)]
        if untimed:
            raise BadConfig(
                f"max_latency_ms cannot be kept: {untimed[0]} was not timed.", "Scan with timed=True on the target."
            )
    found = []
    if max_bytes is not None:
        found.append(_Limit("bytes", "bytes", max_bytes - other_bytes))
    if max_damage is not None:
        found.append(_Limit("damage", "nats", max_damage))
    if max_latency_ms is not None:
        found.append(_Limit("latency_ms", "ms", max_latency_ms - other_ms))
    return found


def _value(row: LayerCost, name: str) -> float:
    return float(getattr(row, name) or 0.0)


def _total(picked: Iterable[LayerCost], name: str) -> float:
    return math.fsum(_value(row, name) for row in picked)


def _keeps(picked: Picked, limit: _Limit) -> bool:
    return _total(picked, limit.name) <= limit.most * (1 + SAME)


# --- when there is no answer ------------------------------------------------------------------------


def _said(limit: _Limit, value: float, other_bytes: int, other_ms: float) -> str:
    if limit.name == "bytes":
        return f"{value + other_bytes:,.0f} bytes"
    return f"{value + (other_ms if limit.name == 'latency_ms' else 0.0):.4g} {limit.unit}"


def _check_each(
    options: Sequence[Sequence[LayerCost]], limits: Sequence[_Limit], other_bytes: int, other_ms: float
) -> None:
    """Raise BadConfig for a limit that no mix keeps, even alone."""
    for limit in limits:
        best = tuple(min(rows, key=lambda row: _value(row, limit.name)) for rows in options)
        if not _keeps(best, limit):
            got = _said(limit, _total(best, limit.name), other_bytes, other_ms)
            raise BadConfig(
                f"No mix keeps max_{limit.name} = {_said(limit, limit.most, other_bytes, other_ms)}: "
                f"with the best choice for every layer it is {got}.",
                _to_do(limit.name, got),
            )


def _to_do(name: str, got: str) -> str:
    more = {
        "bytes": "measure smaller precisions (int4), or compress the network itself",
        "damage": "add float32 to the choices",
        "latency_ms": "choose a smaller input or a smaller network",
    }
    return f"Allow at least {got}, or {more[name]}."


def _together(
    options: Sequence[Sequence[LayerCost]], limits: Sequence[_Limit], other_bytes: int, other_ms: float
) -> BadConfig:
    """Each limit can be kept, but not all of them: what the first can be when the others are kept."""
    last, rest = limits[-1], limits[:-1]
    reached = _solve(options, rest, (last.name,))
    assert reached is not None
    kept = " and ".join(f"max_{limit.name} = {_said(limit, limit.most, other_bytes, other_ms)}" for limit in rest)
    got = _said(last, _total(reached, last.name), other_bytes, other_ms)
    wanted = _said(last, last.most, other_bytes, other_ms)
    return BadConfig(
        f"No mix keeps {kept} and max_{last.name} = {wanted} together: within the rest, "
        f"the best max_{last.name} is {got}.",
        f"Allow at least {got}, or loosen the others.",
    )


# --- the program ------------------------------------------------------------------------------------


def _solve(options: Sequence[Sequence[LayerCost]], limits: Sequence[_Limit], order: Sequence[str]) -> Picked | None:
    """Exactly one row a layer: the first of `order` is least, then the next among equals, then earlier layers best."""
    best: Picked | None = None
    bounds = list(limits)
    for name in (*order, "place"):
        found = _minimise(options, bounds, name)
        if found is None:
            return best
        if best is None or _no_worse(found, best, order):
            best = found
        if name != "place":
            bounds.append(_Limit(name, "", _total(best, name)))
    return best


def _no_worse(new: Picked, old: Picked, order: Sequence[str]) -> bool:
    """Whether the first that differs is less: the solver's own tolerance must not win over an exact sum."""
    for name in order:
        a, b = _total(new, name), _total(old, name)
        if abs(a - b) > SAME * max(abs(a), abs(b)):
            return a < b
    return True


def _minimise(options: Sequence[Sequence[LayerCost]], limits: Sequence[_Limit], name: str) -> Picked | None:
    """Least sum of `name` under the limits, None where there is none. A mix that keeps them only within the solver's
    tolerance is cut off, and the next best one asked for."""
    barred: list[Picked] = []
    for _ in range(CUTS):
        found = _milp(options, limits, name, barred)
        if found is None or all(_keeps(found, limit) for limit in limits):
            return found
        barred.append(found)
    return None


def _milp(
    options: Sequence[Sequence[LayerCost]], limits: Sequence[_Limit], name: str, barred: Sequence[Picked]
) -> Picked | None:
    optimize, sparse = _scipy()
    rows = [row for mine in options for row in mine]
    layer: np.ndarray = np.repeat(np.arange(len(options)), [len(mine) for mine in options])
    one_each = sparse.csr_array((np.ones(len(rows)), (layer, np.arange(len(rows)))), shape=(len(options), len(rows)))
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    for limit in limits:
        values = np.array([_value(row, limit.name) for row in rows])
        scale = LARGE / max(limit.most, values.max(), TINY)
        constraints.append(optimize.LinearConstraint(values[None] * scale, -np.inf, limit.most * scale * (1 + SAME)))
    for mix in barred:
        chosen = {row.key for row in mix}
        marks = np.array([row.key in chosen for row in rows], dtype=float)
        constraints.append(optimize.LinearConstraint(marks[None], -np.inf, len(options) - 1))
    goal, whole, ends = _goal(options, rows, name), np.ones(len(rows)), optimize.Bounds(0, 1)
    solved = optimize.milp(goal, integrality=whole, bounds=ends, constraints=constraints, options={"mip_rel_gap": 0.0})
    if solved.x is None:
        return None
    return tuple(mine[int(np.argmax(solved.x[layer == k]))] for k, mine in enumerate(options))


def _goal(options: Sequence[Sequence[LayerCost]], rows: Sequence[LayerCost], name: str) -> np.ndarray:
    """What is minimised; `LARGE`, because the solver stops at an absolute gap of 1e-6.

    "place" prefers less damage in earlier layers, so that equal mixes have one answer.
    """
    if name == "place":
        ranks = [(len(options) - k) * j for k, mine in enumerate(options) for j in range(len(mine))]
        return np.array(ranks, dtype=float)
    values = np.array([_value(row, name) for row in rows])
    return values * (LARGE / max(values.max(), TINY))


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as e:
        raise MissingBackend("scipy", "compress") from e
    return optimize, sparse


# --- the answer -------------------------------------------------------------------------------------


def _allocation(
    picked: Picked,
    options: Sequence[Sequence[LayerCost]],
    other_bytes: int,
    other_ms: float,
    fixed: Mapping[str, Choice],
) -> Allocation:
    timed = [row.latency_ms for row in picked]
    return Allocation(
        precision=precision_of(picked),
        damage=_total(picked, "damage"),
        bytes=sum(row.bytes for row in picked) + other_bytes,
        latency_ms=math.fsum(t or 0.0 for t in timed) + other_ms if None not in timed else None,
        reasons=tuple(_reasons(picked, options, fixed)),
        picked=picked,
    )


def precision_of(picked: Sequence[LayerCost]) -> Precision:
    """The most frequent pair as the default (on a tie, the earlier one), the other layers as sorted exceptions.

    Where any layer is quantized the default is, too: a network is float or it is not, layers are left out of it.
    """
    pairs = Counter((row.weights, row.activations) for row in picked)
    whole = {pair: n for pair, n in pairs.items() if pair[0] not in FLOATS}
    usual = Counter(whole or pairs).most_common(1)[0][0]
    rest = sorted(
        (row.layer, row.weights, row.activations) for row in picked if (row.weights, row.activations) != usual
    )
    return Precision(*usual, tuple(rest))


def _reasons(
    picked: Picked, options: Sequence[Sequence[LayerCost]], fixed: Mapping[str, Choice]
) -> Iterable[tuple[str, Advice]]:
    """Why a layer is kept above its smallest precision, each with the number behind it."""
    smallest = [min(rows, key=lambda row: (row.bytes, row.damage)) for rows in options]
    harms = sorted((row.damage for row in smallest), reverse=True)
    for row, small in zip(picked, smallest):
        choice = (row.weights, row.activations)
        if row.layer in fixed:
            if fixed[row.layer][0] != "int4":
                yield row.layer, _was_fixed(choice)
        elif row.bytes > small.bytes:
            yield row.layer, _harmful(row, small, harms.index(small.damage) + 1, len(harms))
        elif row.weights != "int4":
            yield row.layer, _only(choice)


def _was_fixed(choice: Choice) -> Advice:
    return Advice(f"it was asked to stay {_title(choice)}", f"按要求保持 {_title(choice)}")


def _only(choice: Choice) -> Advice:
    return Advice(f"nothing smaller than {_title(choice)} was measured", f"没有测过比 {_title(choice)} 更小的精度")


def _harmful(row: LayerCost, small: LayerCost, rank: int, of: int) -> Advice:
    name, harm, saved = (
        small.weights,
        "<0.0001" if 0 < small.damage < 1e-4 else f"{small.damage:.2g}",
        saving(row, small),
    )
    en = "the most of all layers" if rank == 1 else f"number {rank} of {of} layers"
    zh = "是所有层中最大的" if rank == 1 else f"在 {of} 层中排第 {rank}"
    return Advice(
        f"{name} alone costs {harm} nats, {en}, and would save {saved}",
        f"单独用 {name} 的损害为 {harm} nat，{zh}，只能省 {saved}",
    )


def saving(row: LayerCost, small: LayerCost) -> str:
    """The bytes between two precisions of a layer, as people read them."""
    saved = row.bytes - small.bytes
    return f"{saved / 1e6:.2f} MB" if saved >= 1e6 else f"{saved / 1e3:.1f} kB" if saved >= 1000 else f"{saved} bytes"
