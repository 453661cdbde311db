"""Which channel counts and bits fit a budget: a greedy walk from the whole network down, over measured costs. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lighten.shapes import resized
from lighten.types import ChannelGroup, LayerCost, LayerShape, Precision, Predicted, WidthCost

LayerMs = Callable[[LayerShape], float]
"""ms that one layer adds to a file; the cost model's, at the precision that is planned for."""

SATURATED = 1.0
"""Nats beyond which a network answers so differently that more damage does not show; such rows tell nothing."""
SCALE_BYTES = 9
"""Of one output channel of an integer layer: its scale, its zero point, its bias."""
LEAST = 0.1
"""No group keeps less than this share of its channels: a network that is cut in two does not recover."""
STEPS = 24
"""A group is narrowed in at most so many steps, so that wide networks do not take longer to plan."""


@dataclass(frozen=True)
class Limits:
    """Most bytes of the file and most ms of one image; None is no limit."""

    bytes: float | None = None
    latency_ms: float | None = None

    def met(self, got: Predicted) -> bool:
        """Whether a predicted file keeps them."""
        return self.excess(got) <= 0

    def excess(self, got: Predicted) -> float:
        """The largest overrun, relative to its limit; 0 or less where all are met."""
        rows = [got.bytes / self.bytes - 1] if self.bytes else []
        rows += [got.latency_ms / self.latency_ms - 1] if self.latency_ms and got.latency_ms is not None else []
        return max(rows, default=0.0)


@dataclass(frozen=True)
class Costs:
    """What planning needs to know of a network, all of it measured.

    `harm` is each group's damage coefficient (`harms`), `layer_ms` the time of a layer, `other_ms` and `other_bytes`
    what a file takes beside its layers, `bits` the damage of 4-bit weights beyond that of 8-bit ones, by layer.
    """

    shapes: Mapping[str, LayerShape]
    groups: tuple[ChannelGroup, ...]
    harm: Mapping[str, float]
    layer_ms: LayerMs | None = None
    other_ms: float = 0.0
    other_bytes: float = 0.0
    bits: Mapping[str, float] = field(default_factory=dict)
    multiple: int = 8


@dataclass(frozen=True)
class Plan:
    """Channels kept by group, layers with 4-bit weights, the file that is expected of it, and its summed damage."""

    widths: tuple[tuple[str, int], ...]
    int4: tuple[str, ...]
    predicted: Predicted
    damage: float

    def precision(self, ends: Iterable[str] = ()) -> Precision:
        """int8 with the planned layers at int4."""
        kept = set(ends)
        rows = tuple(sorted((name, "int4", "int8") for name in self.int4 if name not in kept))
        return Precision("int8", "int8", rows)


def harms(costs: Iterable[WidthCost], groups: Sequence[ChannelGroup]) -> dict[str, float]:
    """One coefficient a group: its damage is taken as harm x (1 / share kept - 1), fitted to what was measured.

    Untrained damage saturates (a network that guesses cannot get worse), so a group of which little is left would
    look free to remove; this curve has the measured slope where it can be measured and grows without bound. Rows
    beyond SATURATED are left out where a group has others; a group that was not measured takes the mean.
    """
    channels = {g.name: g.channels for g in groups}
    rows: dict[str, list[tuple[float, float]]] = {}
    for c in costs:
        if c.group in channels and 0 < c.width < channels[c.group]:
            rows.setdefault(c.group, []).append((channels[c.group] / c.width - 1, max(c.damage, 0.0)))
    found = {name: _slope([r for r in kept if r[1] <= SATURATED] or [min(kept)]) for name, kept in rows.items()}
    usual = sum(found.values()) / len(found) if found else 1.0
    least = max(usual, 1e-6) * 1e-2  # a group that seems free is only almost free
    return {name: max(found.get(name, usual), least) for name in channels}


def _slope(rows: Sequence[tuple[float, float]]) -> float:
    """Least squares through the origin."""
    return sum(x * y for x, y in rows) / sum(x * x for x, _ in rows)


def bits_harm(costs: Iterable[LayerCost]) -> dict[str, float]:
    """What 4-bit weights damage beyond 8-bit ones, by layer; layers without both rows are left out."""
    rows = {(c.layer, c.weights): c.damage for c in costs}
    return {
        name: max(damage - rows[name, "int8"], 0.0)
        for (name, weights), damage in rows.items()
        if weights == "int4" and (name, "int8") in rows
    }


def steps_of(group: ChannelGroup, multiple: int, least: float = LEAST) -> tuple[int, ...]:
    """The widths a group may have, from all its channels down: multiples of the kernels' and of its own."""
    grid = math.lcm(multiple, group.multiple)
    if group.channels <= grid:
        return (group.channels,)
    low = max(grid, math.ceil(group.channels * least / grid) * grid)
    stride = max(1, math.ceil((group.channels - low) / grid / STEPS)) * grid
    below = range((group.channels - 1) // grid * grid, low - 1, -stride)
    return tuple(dict.fromkeys((group.channels, *below, low)))


def predict(costs: Costs, widths: Mapping[str, int], int4: Iterable[str] = ()) -> Predicted:
    """Bytes and ms of the file with these widths."""
    now = resized(costs.shapes, costs.groups, widths)
    four = frozenset(int4)
    weigh = sum(layer_bytes(s, 4 if n in four else 8) for n, s in now.items())
    ms = None if costs.layer_ms is None else costs.other_ms + sum(map(costs.layer_ms, now.values()))
    return Predicted(costs.other_bytes + weigh, ms)


def layer_bytes(shape: LayerShape, bits: int) -> float:
    """Bytes of one layer's weights, scales and biases."""
    return shape.weights * bits / 8 + shape.outputs * SCALE_BYTES


def damage(costs: Costs, widths: Mapping[str, int], int4: Iterable[str] = ()) -> float:
    """Summed over groups and layers, each as if it were alone."""
    narrow = sum(costs.harm[g.name] * (g.channels / widths.get(g.name, g.channels) - 1) for g in costs.groups)
    return narrow + sum(costs.bits.get(n, 0.0) for n in int4)


def even(costs: Costs, limits: Limits) -> Plan | None:
    """The same share of every group, as large as the limits allow: what tutorials do, and the control. None where
    even the narrowest network does not fit."""
    shares = [k / 200 for k in range(200, int(LEAST * 200) - 1, -1)]
    low, high = 0, len(shares) - 1
    if not limits.met(predict(costs, _share(costs, shares[high]))):
        return None
    while low < high:
        middle = (low + high) // 2
        fits = limits.met(predict(costs, _share(costs, shares[middle])))
        low, high = (low, middle) if fits else (middle + 1, high)
    return _plan(costs, _share(costs, shares[low]), ())


def _share(costs: Costs, share: float) -> dict[str, int]:
    """Each group at the step nearest to a share of its channels."""

    def nearest(group: ChannelGroup) -> int:
        return min(steps_of(group, costs.multiple), key=lambda width: abs(width - share * group.channels))

    return {g.name: nearest(g) for g in costs.groups}


def fitted(costs: Costs, limits: Limits, least: float = LEAST) -> Plan | None:
    """The least damaging widths and bits inside the limits, found greedily; None where nothing fits.

    From the whole network on, each step narrows the group, or halves the bits of the layer, that takes most off the
    broken limits for the damage it adds (each limit relative to itself); then what fits again is widened, the most
    harmful first. The damage curves are convex, so the greedy order is that of the Lagrangian relaxation (Shoham &
    Gersho, 1988, section III) as far as bytes and times add up.
    """
    ladder = {g.name: steps_of(g, costs.multiple, least) for g in costs.groups}
    place = dict.fromkeys(ladder, 0)
    four: set[str] = set()
    state = _State(costs, {n: w[0] for n, w in ladder.items()}, four)
    while not limits.met(state.predicted):
        if (move := _best_move(state, limits, ladder, place)) is None:
            return None
        kind, name = move
        if kind == "bits":
            state.lower(name)
        else:
            place[name] += 1
            state.narrow(name, ladder[name][place[name]])
    _widen(state, limits, ladder, place)
    return _plan(costs, state.widths, state.int4)


class _State:
    """Widths and bits on the way down, with bytes and ms kept up to date layer by layer."""

    def __init__(self, costs: Costs, widths: Mapping[str, int], int4: Iterable[str]) -> None:
        self.costs, self.widths, self.int4 = costs, dict(widths), set(int4)
        self.groups = {g.name: g for g in costs.groups}
        self.now = resized(costs.shapes, costs.groups, self.widths)
        self.predicted = predict(costs, self.widths, self.int4)

    def tried(self, name: str, width: int) -> Predicted:
        """What the file would take with one group at another width."""
        touched = self._touched(name, width)
        return self._moved((self.now[n], s, self._bits(n), self._bits(n)) for n, s in touched.items())

    def narrow(self, name: str, width: int) -> None:
        self.predicted = self.tried(name, width)
        self.now |= self._touched(name, width)
        self.widths[name] = width

    def tried_lower(self, layer: str) -> Predicted:
        """What the file would take with 4-bit weights in one layer."""
        shape = self.now[layer]
        return self._moved([(shape, shape, 8, 4)])

    def lower(self, layer: str) -> None:
        self.predicted = self.tried_lower(layer)
        self.int4.add(layer)

    def tried_raise(self, layer: str) -> Predicted:
        """What the file would take with 8-bit weights in one layer again."""
        shape = self.now[layer]
        return self._moved([(shape, shape, 4, 8)])

    def raise_(self, layer: str) -> None:
        self.predicted = self.tried_raise(layer)
        self.int4.remove(layer)

    def _bits(self, layer: str) -> int:
        return 4 if layer in self.int4 else 8

    def _touched(self, name: str, width: int) -> dict[str, LayerShape]:
        group = self.groups[name]
        layers = {n for n, _ in (*group.outputs, *group.inputs)}
        around = [g for g in self.costs.groups if layers & {n for n, _ in (*g.outputs, *g.inputs)}]
        part = {n: self.costs.shapes[n] for n in layers if n in self.costs.shapes}
        return resized(part, tuple(around), {**self.widths, name: width})

    def _moved(self, rows: Iterable[tuple[LayerShape, LayerShape, int, int]]) -> Predicted:
        more_bytes = more_ms = 0.0
        for before, after, bits_before, bits_after in rows:
            more_bytes += layer_bytes(after, bits_after) - layer_bytes(before, bits_before)
            if self.costs.layer_ms is not None:
                more_ms += self.costs.layer_ms(after) - self.costs.layer_ms(before)
        ms = self.predicted.latency_ms
        return Predicted(self.predicted.bytes + more_bytes, None if ms is None else ms + more_ms)


def _best_move(
    state: _State, limits: Limits, ladder: Mapping[str, Sequence[int]], place: Mapping[str, int]
) -> tuple[str, str] | None:
    """The group to narrow ("width"), or the layer to give 4 bits ("bits"), with the best gain for its damage."""
    best, found = 0.0, None
    for name, widths in ladder.items():
        if place[name] + 1 == len(widths):
            continue
        total, now, then = widths[0], widths[place[name]], widths[place[name] + 1]
        harm = state.costs.harm[name] * (total / then - total / now)
        rate = _gain(limits, state.predicted, state.tried(name, then)) / max(harm, 1e-12)
        best, found = (rate, ("width", name)) if rate > best else (best, found)
    for name, harm in state.costs.bits.items():
        if name in state.int4 or name not in state.now:
            continue
        rate = _gain(limits, state.predicted, state.tried_lower(name)) / max(harm, 1e-12)
        best, found = (rate, ("bits", name)) if rate > best else (best, found)
    return found


def _gain(limits: Limits, before: Predicted, after: Predicted) -> float:
    """How much nearer to the limits that are still broken, each in shares of itself."""
    gain = 0.0
    if limits.bytes and before.bytes > limits.bytes:
        gain += (before.bytes - after.bytes) / limits.bytes
    if limits.latency_ms and before.latency_ms and after.latency_ms and before.latency_ms > limits.latency_ms:
        gain += (before.latency_ms - after.latency_ms) / limits.latency_ms
    return gain


def _widen(state: _State, limits: Limits, ladder: Mapping[str, Sequence[int]], place: dict[str, int]) -> None:
    """Give back what still fits, bits first: the last step overshoots, and early ones may have become needless."""
    for name in sorted(state.int4, key=lambda n: -state.costs.bits[n]):
        if limits.met(state.tried_raise(name)):
            state.raise_(name)
    for name in sorted(ladder, key=lambda n: -state.costs.harm[n]):
        while place[name] and limits.met(state.tried(name, ladder[name][place[name] - 1])):
            place[name] -= 1
            state.narrow(name, ladder[name][place[name]])


def _plan(costs: Costs, widths: Mapping[str, int], int4: Iterable[str]) -> Plan:
    channels = {g.name: g.channels for g in costs.groups}
    kept = tuple(sorted((n, w) for n, w in widths.items() if w != channels[n]))
    lower = tuple(sorted(int4))
    return Plan(kept, lower, predict(costs, widths, lower), damage(costs, widths, lower))
