"""How long a network takes, before it is built: its layers timed alone in the target runtime, kept by their shape."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.data.cache import cache_dir, write_whole
from lighten.errors import BadConfig, LightenError, RefusedFormat
from lighten.machine import this_machine
from lighten.plugins import get
from lighten.types import FLOATS, Device, LayerShape, Progress, digest, silent, to_json

if TYPE_CHECKING:
    from lighten.quant.timing import Alone

Choice = tuple[str, str]
"""Types of weights and activations, as in a Precision."""
Runner = Callable[[], object]
Load = Callable[[bytes, np.ndarray], Runner]
"""From an ONNX file's bytes and its input to a call of the runtime; raises where the runtime refuses."""
Clock = Callable[[], float]
Enough = Callable[[], bool]
"""Asked again and again: whether timing has to end here, with what there is."""
FRACTIONS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
ROUNDS, WARM_UP, LEAST = 120, 2, 12
SECONDS = 8.0
"""The longest that one turn of layers is timed, once each ran LEAST times."""
LOADED = 64_000_000
"""Weights that are held in memory at once while layers take turns."""
NOISE = 0.1
"""Standard deviation of one measured file's median, relative."""
SPREAD, BORROWED = (0.3, 0.05, 0.1), (10.0, 0.05, 0.1)
"""How far factor, overhead (in calls of the runtime) and fetch (in mean times a weight) may lie from the plain model:
one of the runtime's own times, and one of another's."""
TINY = 1e-12
VERSION = 1
"""Of the cache file and of how layers are timed: a change of either makes old times worthless."""


@dataclass(frozen=True)
class Point:
    """One width of a layer: multiplications for one image, and ms on one thread."""

    macs: int
    ms: float


@dataclass(frozen=True)
class Curve:
    """A layer at several widths, by rising multiplications; the times never fall. Not `timed`: guessed from others."""

    layer: LayerShape
    points: tuple[Point, ...]
    timed: bool = True

    def ms(self, macs: int) -> float:
        """Straight lines between the points; constant below the first, in proportion above the last."""
        last = self.points[-1]
        if macs >= last.macs:
            return last.ms * (macs / max(last.macs, 1))  # exactly last.ms where they are equal
        if macs <= self.points[0].macs:
            return self.points[0].ms
        a, b = next((a, b) for a, b in itertools.pairwise(self.points) if macs <= b.macs)
        return min(b.ms, a.ms + (b.ms - a.ms) * (macs - a.macs) / (b.macs - a.macs))


@dataclass(frozen=True)
class CostModel:
    """What every layer takes at one precision in one format, and what a network takes beside its layers.

    A network of layers l takes `call_ms` + sum(`factor` x l's curve + `overhead_ms` + `fetch_ms` x l's weights): what
    lies between the layers, and weights that a layer alone finds in the processor's cache. Plain until `calibrated`.
    The curves are `borrowed` where they are those of another format's runtime.
    """

    format: str
    precision: Choice
    runtime: str
    curves: tuple[Curve, ...]
    call_ms: float = 0.0
    factor: float = 1.0
    overhead_ms: float = 0.0
    fetch_ms: float = 0.0
    borrowed: bool = False

    @property
    def guessed(self) -> tuple[str, ...]:
        """Layers that the runtime would not run alone: their times follow from the others' rate."""
        return tuple(c.layer.name for c in self.curves if not c.timed)

    @cached_property
    def rate(self) -> float:
        """ms a multiplication over all layers that were timed, whole."""
        timed = [c for c in self.curves if c.timed]
        return sum(c.points[-1].ms for c in timed) / max(sum(c.points[-1].macs for c in timed), 1)

    @cached_property
    def weight_ms(self) -> float:
        """Mean ms a weight over all layers, whole: the scale of `fetch_ms`."""
        return sum(c.points[-1].ms for c in self.curves) / max(sum(c.layer.weights for c in self.curves), 1)

    @cached_property
    def by_name(self) -> dict[str, Curve]:
        return {c.layer.name: c for c in self.curves}

    @cached_property
    def by_place(self) -> dict[tuple[Any, ...], tuple[Curve, ...]]:
        rows: dict[tuple[Any, ...], tuple[Curve, ...]] = {}
        for curve in self.curves:
            rows[place(curve.layer)] = (*rows.get(place(curve.layer), ()), curve)
        return rows


# --- predicting ---------------------------------------------------------------------------------------


def predict(model: CostModel, shapes: Iterable[LayerShape]) -> float:
    """ms that a network of these layers takes for one image on one thread."""
    rows = ((layer_ms(model, s), s.weights) for s in shapes)
    return model.call_ms + sum(model.factor * ms + model.overhead_ms + model.fetch_ms * n for ms, n in rows)


def layer_ms(model: CostModel, shape: LayerShape) -> float:
    """ms of one layer as it was timed alone: by its name, else by the nearest layer of its kernel and place, else by
    the mean rate of all."""
    curve = model.by_name.get(shape.name)
    if curve is None or place(curve.layer) != place(shape):
        alike = model.by_place.get(place(shape), ())
        curve = min(alike, key=lambda c: abs(c.points[-1].macs - shape.macs), default=None)
    return shape.macs * model.rate if curve is None else curve.ms(shape.macs)


def place(shape: LayerShape) -> tuple[Any, ...]:
    """All of a layer but its name and widths."""
    kind = "plain" if shape.groups == 1 else "depthwise" if shape.groups == shape.inputs else shape.groups
    return shape.op, kind, shape.kernel, shape.stride, shape.padding, shape.dilation, shape.source


def calibrated(model: CostModel, seen: Sequence[tuple[Sequence[LayerShape], float]]) -> CostModel:
    """`model` held to networks that were measured whole: (layers, ms) each, of the same format and precision.

    Factor, overhead and fetch, none below 0, minimise the squared relative errors over NOISE and their own distances
    from the plain model over SPREAD (ridge regression; Hoerl and Kennard, 1970): one network shifts all three a little,
    many decide them.
    """
    plain = dataclasses.replace(model, factor=1.0, overhead_ms=0.0, fetch_ms=0.0)
    units = np.array([1.0, max(model.call_ms, TINY), max(model.weight_ms, TINY)])
    rows = [(*_sums(plain, shapes), ms) for shapes, ms in seen if shapes and ms > model.call_ms]
    left = [np.array(row[:3]) * units / row[3] / NOISE for row in rows]
    right = [(1.0 - model.call_ms / row[3]) / NOISE for row in rows]
    spread = np.diag(1.0 / np.array(BORROWED if model.borrowed else SPREAD))
    found = non_negative(np.vstack([*left, spread]), np.array([*right, *(spread @ (1.0, 0.0, 0.0))])) * units
    return dataclasses.replace(plain, factor=float(found[0]), overhead_ms=float(found[1]), fetch_ms=float(found[2]))


def borrowed(model: CostModel, format: str) -> CostModel:
    """The times of another format, for one whose runtime does not run layers alone: whole files have to correct them."""
    return dataclasses.replace(model, format=format, borrowed=True)


def _sums(model: CostModel, shapes: Sequence[LayerShape]) -> tuple[float, float, float]:
    """ms of the layers alone, how many there are, their weights."""
    return sum(layer_ms(model, s) for s in shapes), float(len(shapes)), float(sum(s.weights for s in shapes))


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 (n,) that minimises |a x - b| for a (m, n) of full rank: the best of all subsets, for a handful of n."""
    best, least = np.zeros(a.shape[1]), float(b @ b)
    for kept in itertools.product((False, True), repeat=a.shape[1]):
        x = np.zeros(a.shape[1])
        if any(kept):
            x[list(kept)] = np.linalg.lstsq(a[:, list(kept)], b, rcond=None)[0]
        error = float(np.sum((a @ x - b) ** 2))
        if x.min() >= 0 and error < least:
            best, least = x, error
    return best


# --- measuring ----------------------------------------------------------------------------------------


def measure(
    shapes: Iterable[LayerShape],
    precision: Choice,
    format: str,
    device: Device,
    cache: Path | None = None,
    progress: Progress = silent,
    *,
    enough: Enough = lambda: False,
    load: Load | None = None,
    clock: Clock = time.perf_counter,
) -> CostModel:
    """Time every layer at FRACTIONS of its widths in the format's runtime; only what `cache` has not.

    A layer takes what a network of two such layers side by side takes more than a network of one: the call, and the
    change of layout at both ends that a whole network spares, cancel.
    `cache` is a JSON file, by default one in the cache folder. A layer that the runtime refuses is guessed from the
    mean rate of the others (CostModel.guessed names it).

    Where there is `enough` before the end, what was timed is kept all the same, and the next call goes on with the rest.
    One layer is timed in any case; whole layers come first, the most work first, and a layer whose narrow widths are
    missing takes less in proportion to its multiplications. Raises BadConfig for a precision that has no layer of its own,
    MissingBackend, and RefusedFormat where no layer can be timed.
    """
    shapes, weights = tuple(shapes), _timed_weights(precision)
    module = get("formats", format, needs="RUNS_ON" if load is None else None)
    cache = cache or cache_dir() / "layer-times.json"
    where = " ".join((_machine(), device.activations, module.runtime(), weights, precision[1]))
    wanted = {key(w): w for w in in_turn(shapes, device)}
    times = _known(cache, where)
    missing = {k: s for k, s in wanted.items() if k not in times}
    if missing or CALL not in times:
        with _loader(module, load) as ready:
            for found in _time_all(missing, (weights, precision[1]), device, ready, clock, progress, enough):
                times |= found
                _keep(cache, where, times)
    curves = (_curve(s, {w.macs: times[key(w)] for w in widths(s, device) if key(w) in times}, device) for s in shapes)
    model = CostModel(format, precision, module.runtime(), tuple(curves), times[CALL] or 0.0)
    return _with_guesses(model, device)


def _timed_weights(precision: Choice) -> str:
    """int4 weights beside integer activations are unpacked to int8 at load: the kernels are the same."""
    weights, activations = precision
    if reason := _no_layer(weights, activations):
        raise BadConfig(reason, "Predict the latency of float, weight-only or static integer files.")
    return "int8" if weights == "int4" and activations not in FLOATS else weights


def _no_layer(weights: str, activations: str) -> str | None:
    if activations == "dynamic":
        return "Layers that quantize their inputs as they run are not timed alone."
    known = (*FLOATS, "int8", "int4")
    return None if weights in known and activations in known else f"There are no {weights}/{activations} layers."


EMPTY = LayerShape("", "conv", 8, 8, (1, 1), (1, 1), (0, 0), (1, 1), groups=8, source=(1, 1), bias=False)
"""Next to no work: what the call of the runtime itself takes."""
CALL = "call"


def key(shape: LayerShape) -> str:
    """The same for layers that take the same time."""
    return digest(to_json(dataclasses.replace(shape, name="")))


def widths(shape: LayerShape, device: Device) -> tuple[LayerShape, ...]:
    """`shape` at every fraction of its widths, the widest first, each once.

    Widths are rounded to the device's multiple; those that are not above it (the colours of a picture) stay. The groups
    of a depthwise layer shrink with it; other groups keep their number.
    """
    depthwise = shape.groups > 1 and shape.groups == shape.inputs
    step = device.channel_multiple if depthwise else math.lcm(device.channel_multiple, shape.groups)
    rows = []
    for f in FRACTIONS:
        inputs, outputs = _width(shape.inputs, f, step), _width(shape.outputs, f, step)
        if depthwise:
            outputs = inputs * (shape.outputs // shape.inputs)
        groups = inputs if depthwise else shape.groups
        rows.append(dataclasses.replace(shape, inputs=inputs, outputs=outputs, groups=groups))
    return tuple(dict.fromkeys(rows))


def _width(full: int, fraction: float, step: int) -> int:
    return full if fraction == 1 or full <= step else min(full, max(step, round(full * fraction / step) * step))


def alone(shape: LayerShape) -> Alone:
    """What quant/timing.py writes a file of."""
    from lighten.quant.timing import Alone

    clip = (0.0, math.inf) if shape.clip else None
    if shape.op == "linear":
        op = "MatMul" if shape.source else "Gemm"
        return Alone(op, (shape.outputs, shape.inputs), (1, *shape.source, shape.inputs), 0, shape.bias, clip, ())
    turned = shape.op == "conv_transpose"
    a, b = (shape.inputs, shape.outputs) if turned else (shape.outputs, shape.inputs)
    attributes = {
        "dilations": shape.dilation,
        "group": shape.groups,
        "pads": shape.padding * 2,
        "strides": shape.stride,
    }
    return Alone(
        "ConvTranspose" if turned else "Conv",
        (a, b // shape.groups, *shape.kernel),
        (1, shape.inputs, *shape.source),
        1 if turned else 0,
        shape.bias,
        clip,
        tuple(attributes.items()),
    )


@contextmanager
def _loader(module: Any, load: Load | None) -> Iterator[Load]:
    """The format's own loader, so that its runtime is set as it is for the files that ship."""
    if load is not None:
        yield load
        return
    with tempfile.TemporaryDirectory(prefix="lighten-") as room:
        numbers = itertools.count()

        def from_file(raw: bytes, image: np.ndarray) -> Runner:
            path = Path(room) / f"{next(numbers)}.onnx"
            path.write_bytes(raw)
            run = module.load(path, 1)
            return lambda: run(image)

        yield from_file


def _time_all(
    missing: Mapping[str, LayerShape],
    choice: Choice,
    device: Device,
    load: Load,
    clock: Clock,
    progress: Progress,
    enough: Enough,
) -> Iterator[dict[str, float | None]]:
    """ms of each call, as many layers in turns as fit in memory, so that a busy machine harms all alike and the faster
    half of each is found over a long while."""
    done = 0
    for part in _parts(missing):
        runners, loaded = {(CALL, 1): _runner(EMPTY, 1, choice, device, load)}, list[str]()
        for k in part:
            runners |= {(k, n): _runner(missing[k], n, choice, device, load) for n in (1, 2)}
            loaded.append(k)
            progress("load layers to time", done + len(loaded), len(missing))
            if enough() and any(runners[k, n] for k in loaded for n in (1, 2)):
                break
        times = _turns({k: r for k, r in runners.items() if r is not None}, clock, enough)
        alone = {k: max(times[k, 2] - times[k, 1], 0.0) if {(k, 1), (k, 2)} <= times.keys() else None for k in loaded}
        yield {CALL: times.get((CALL, 1)), **alone}
        done += len(loaded)
        if enough() and any(ms is not None for ms in alone.values()):
            return


def in_turn(shapes: Iterable[LayerShape], device: Device) -> tuple[LayerShape, ...]:
    """All widths of all layers as they are to be timed: each layer whole, then at its narrowest, then between, and the
    most work first."""
    rows = [(widths(s, device), s.macs) for s in shapes]
    turns = [((k > 0) + (0 < k < len(ws) - 1), -macs, w) for ws, macs in rows for k, w in enumerate(ws)]
    return tuple(w for _, _, w in sorted(turns, key=lambda row: row[:2]))


def _parts(missing: Mapping[str, LayerShape]) -> Iterator[list[str]]:
    """In their order, as many as fit in memory; at least one part, empty where nothing is missing."""
    part: list[str] = []
    held = 0
    for k, shape in missing.items():
        if part and held + 3 * shape.weights > LOADED:
            yield part
            part, held = [], 0
        part.append(k)
        held += 3 * shape.weights
    yield part


def _runner(shape: LayerShape, copies: int, choice: Choice, device: Device, load: Load) -> Runner | None:
    from lighten.quant.timing import _refusals, network

    refusals: tuple[type[Exception], ...] = (*_refusals(), LightenError)
    layer = alone(shape)
    weights, activations = choice
    integers = activations not in FLOATS and weights not in FLOATS
    flows = device.activations if integers else "float16" if weights == "float16" else "float32"
    try:
        file = network(layer, weights, activations, device)
        run = load(twin(file) if copies == 2 else file, np.ones(layer.source, flows))
        run()
    except refusals:
        return None  # a layer that cannot be timed is guessed from the others, and named
    return run


def twin(file: bytes) -> bytes:
    """From quant/timing's network of one layer, one of two that read the same input and whose outputs are added."""
    import onnx

    model = onnx.load_from_string(file)
    graph, helper = model.graph, onnx.helper
    first = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "input"]
    layer = [n for n in graph.node if n not in first]
    weight = next(c for c in graph.initializer if c.name == "weight")
    other = graph.initializer.add()
    other.CopyFrom(weight)
    other.name, other.raw_data = "weight_twin", weight.raw_data[4:] + weight.raw_data[:4]  # alike, they would be merged
    flow = list(layer[-1].input[1:])
    nodes, ends = list(first), []
    for suffix in ("", "_twin"):
        inside = {name: name + suffix for n in layer for name in n.output} | {"output": f"end{suffix}"}
        nodes += [_renamed(n, {**inside, "weight": f"weight{suffix}"}) for n in layer]
        ends.append(f"end{suffix}")
        if flow:
            nodes.append(helper.make_node("DequantizeLinear", [f"end{suffix}", *flow], [f"real{suffix}"]))
            ends[-1] = f"real{suffix}"
    nodes.append(helper.make_node("Add", ends, ["sum" if flow else "output"]))
    nodes += [helper.make_node("QuantizeLinear", ["sum", *flow], ["output"])] if flow else []
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    made = type(node)()
    made.CopyFrom(node)
    made.input[:] = [names.get(name, name) for name in node.input]
    made.output[:] = [names.get(name, name) for name in node.output]
    return made


def _turns(runners: Mapping[tuple[str, int], Runner], clock: Clock, enough: Enough) -> dict[tuple[str, int], float]:
    """Each runs twice in its turn and the second is timed: the first pays for having been away."""
    times: dict[tuple[str, int], list[float]] = {k: [] for k in runners}
    start = clock()
    for done in range(WARM_UP + ROUNDS):
        for k, run in runners.items():
            run()
            before = clock()
            run()
            if done >= WARM_UP:
                times[k].append((clock() - before) * 1e3)
        if done >= WARM_UP + LEAST and (clock() - start > SECONDS or enough()):
            break
    return {k: faster(row) for k, row in times.items()}


def faster(samples: Sequence[float]) -> float:
    """Median of the faster half: what a neighbour on the machine slows down is left out."""
    return statistics.median(sorted(samples)[: (len(samples) + 1) // 2])


def _curve(shape: LayerShape, times: Mapping[int, float | None], device: Device) -> Curve:
    """From the times at several multiplications; None where there is none. Below the narrowest that was timed, a width
    that nobody tried takes less in proportion."""
    points = [Point(macs, ms) for macs, ms in sorted(times.items()) if ms is not None]
    least = widths(shape, device)[-1].macs
    if points and least not in times:
        points.insert(0, Point(least, points[0].ms * least / max(points[0].macs, 1)))
    return Curve(shape, rising(points), bool(points))


def rising(points: Sequence[Point]) -> tuple[Point, ...]:
    """The nearest times, by squares, that never fall (pool adjacent violators; Barlow et al., 1972)."""
    pools: list[list[float]] = []
    for point in points:
        pools.append([point.ms])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = [statistics.fmean(pool) for pool in pools for _ in pool]
    return tuple(Point(p.macs, ms) for p, ms in zip(points, level))


def _with_guesses(model: CostModel, device: Device) -> CostModel:
    """Curves of layers that were not timed: their multiplications at the mean rate."""
    if model.curves and len(model.guessed) == len(model.curves):
        raise RefusedFormat(
            f"{model.runtime} runs no layer of this network alone at {'/'.join(model.precision)}.",
            "Give no latency limit for this format, or leave the format out.",
        )
    guess = lambda c: tuple(Point(w.macs, w.macs * model.rate) for w in reversed(widths(c.layer, device)))  # noqa: E731
    curves = (c if c.timed else dataclasses.replace(c, points=guess(c)) for c in model.curves)
    return dataclasses.replace(model, curves=tuple(curves))


# --- the cache ----------------------------------------------------------------------------------------


def _machine() -> str:
    m = this_machine()
    return f"{m.processor} {m.arch} {' '.join(m.features)}"


def _known(cache: Path, where: str) -> dict[str, float | None]:
    return _sections(cache).get(where, {})


def _sections(cache: Path) -> dict[str, dict[str, float | None]]:
    """All that the file holds; nothing where it is damaged, of another version, or not there."""
    try:
        page = json.loads(cache.read_text("utf-8"))
        if page["version"] != VERSION or not all(_sound(s) for s in page["times"].values()):
            return {}
        return dict(page["times"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _sound(section: Mapping[str, Any]) -> bool:
    return all(v is None or (isinstance(v, float) and math.isfinite(v) and v >= 0) for v in section.values())


def _keep(cache: Path, where: str, times: Mapping[str, float | None]) -> None:
    """Beside what another process may have added meanwhile."""
    sections = _sections(cache)
    sections[where] = sections.get(where, {}) | dict(times)
    write_whole(cache, json.dumps({"version": VERSION, "times": sections}))
