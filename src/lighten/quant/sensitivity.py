"""Which layer is guilty: each layer alone at each precision, and what the answers lose by it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lighten.errors import BadConfig, BadData, BadModel
from lighten.quant import graph as graphs
from lighten.quant.graph import Layer
from lighten.quant.observers import ActivationObserver, WeightObserver
from lighten.quant.plan import calibrate, prepare
from lighten.quant.ranges import METHODS
from lighten.quant.timing import time_layers
from lighten.types import FLOATS, Device, Estimate, LayerCost, Precision

Choice = tuple[str, str]
"""Weights and activations: ("int4", "int8")."""
Env = dict[Node, Any]
Rounding = Callable[[Tensor], Tensor]

CHOICES: tuple[Choice, ...] = (("int4", "int8"), ("int8", "int8"), ("float32", "float32"))
Damage = Callable[[Tensor, Tensor], Tensor]
"""From the float answers of some images and other ones to how far these are from those, one value an image."""
BITS = {"int4": 4, "int8": 8, "float16": 16, "float32": 32}
MEMORY = 1 << 30
"""Bytes of activations that are kept between layers; batches beyond it start from their images again."""


def scan(
    model: nn.Module,
    shape: tuple[int, ...],
    batches: Iterable[Tensor],
    device: Device,
    choices: Sequence[Choice] = CHOICES,
    *,
    only: Collection[str] = (),
    damage: Damage | None = None,
    labels: Tensor | None = None,
    known: Iterable[LayerCost] = (),
    made: Callable[[LayerCost], None] = lambda row: None,
    step: Callable[[int, int], None] = lambda done, total: None,
    methods: tuple[str, ...] = METHODS,
    timed: bool = False,
    memory: int = MEMORY,
) -> tuple[LayerCost, ...]:
    """What each layer costs at each of the `choices`, in the order of the network and of the choices.

    One layer's weight and input are rounded as the runtime will, everything else stays float (Dong et al., 2019, "HAWQ",
    rank layers by curvature instead; here the damage itself is measured). `batches` (N, C, H, W), 128 to 256 images in
    all, choose the ranges too. `damage` measures it, the divergence of softmax answers (images, classes) if not given.
    `labels` (images,) add the points of top-1 lost. A GraphModule is taken as folded already.

    Where layers are named by `only`, no others are measured. Rows of `known` are not measured again; `made` is given each new row at once, so that a caller can write it and
    resume; `step` is told the layers done. `timed` times each layer on this machine, which says something about
    `device` only where it has this processor. `model` is not changed. Raises BadData on NaN, no or misshapen images,
    BadModel on graphs that cannot be captured or whose answers are not what is measured, BadConfig on unknown choices.
    """
    _check_choices(choices)
    finished = {row.key: row for row in known}
    folded = copy.deepcopy(model) if isinstance(model, GraphModule) else graphs.fold(model, shape)
    names = dict.fromkeys(layer.name for layer in graphs.layers(folded) if not only or layer.name in only)
    if all((name, *choice) in finished for name in names for choice in choices):
        return tuple(finished[(name, *choice)] for name in names for choice in choices)
    images = _checked(batches, shape, labels)
    times = time_layers(folded, shape, choices, device) if timed else {}
    plan = prepare(folded, Precision("int8", "int8"), device, methods)
    calibrate(plan, images)
    walk = _Walk(plan.graph, scores=damage is None)
    bench = _Bench(walk, images, labels, choices, finished, times, memory, damage or divergences)
    rows: list[LayerCost] = []
    for done, parts in enumerate((p for p in _by_name(plan.layers) if p[0].name in names), 1):
        for row in bench.weigh(parts):
            if row.key not in finished:
                made(row)
            rows.append(row)
        step(done, len(names))
    return tuple(rows)


def _check_choices(choices: Sequence[Choice]) -> None:
    strangers = sorted({name for choice in choices for name in choice if name not in BITS})
    if strangers or not choices:
        said = f"precisions {', '.join(strangers)} are not known" if strangers else "no precision was given"
        raise BadConfig(f"Sensitivity: {said}.", f"Choose among {', '.join(BITS)}.")


def _checked(batches: Iterable[Tensor], shape: tuple[int, ...], labels: Tensor | None) -> list[Tensor]:
    """The batches as a list: they are walked more than once."""
    images = list(batches)
    for x in images:
        if tuple(x.shape[1:]) != tuple(shape):
            raise BadData(f"Calibration images are {tuple(x.shape[1:])}, not {tuple(shape)}.", "Check the input size.")
    count = sum(len(x) for x in images)
    if labels is not None and len(labels) != count:
        raise BadData(f"There are {count} calibration images and {len(labels)} labels.", "Give one label an image.")
    return images


def _by_name(layers: Iterable[Layer]) -> Iterator[tuple[Layer, ...]]:
    """A module that runs twice has one name and one precision, so its runs are rounded together."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.name, []).append(layer)
    yield from map(tuple, groups.values())


# --- one layer at a time --------------------------------------------------------------------------


@dataclass
class _Start:
    """How far a batch has come through the float network, and the values that later nodes still read."""

    x: Tensor
    position: int = 0
    env: Env = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(v.numel() * v.element_size() for v in self.env.values() if isinstance(v, Tensor) and v is not self.x)


class _Bench:
    """Every batch stands just before the layer that is weighed; only what lies behind it is run again."""

    def __init__(
        self,
        walk: _Walk,
        images: Sequence[Tensor],
        labels: Tensor | None,
        choices: Sequence[Choice],
        finished: Mapping[tuple[str, str, str], LayerCost],
        times: Mapping[tuple[str, str, str], float | None],
        memory: int,
        damage: Damage,
    ) -> None:
        self.walk, self.labels, self.choices, self.finished = walk, labels, choices, finished
        self.times, self.memory, self.damage = times, memory, damage
        self.starts = [_Start(x) for x in images]
        self.answers = [walk.answer(x) for x in images]
        walk.check(images[0], self.answers[0])

    def weigh(self, parts: tuple[Layer, ...]) -> Iterator[LayerCost]:
        """The rows of one layer. `parts` are its runs: more than one where a module is used again."""
        wanted = [c for c in self.choices if (parts[0].name, *c) not in self.finished]
        measured = self._measure(parts, [c for c in wanted if self._can(parts, c)])
        for choice in self.choices:
            key = (parts[0].name, *choice)
            if key in self.finished:
                yield self.finished[key]
            elif choice in measured:
                yield self._row(parts, choice, measured[choice])

    def _can(self, parts: tuple[Layer, ...], choice: Choice) -> bool:
        """Whether the runtimes can store this layer so; grouped transposed convolutions stay float."""
        return choice[0] in FLOATS or all(graphs.weight_observer(self.walk.graph, p) is not None for p in parts)

    @torch.no_grad()
    def _measure(self, parts: tuple[Layer, ...], choices: Sequence[Choice]) -> dict[Choice, _Harm]:
        if not choices:
            return {}
        rounded = {c: {p.node: _roundings(self.walk.graph, p, c) for p in parts} for c in choices}
        harms = {c: _Harm(self.damage) for c in choices}
        first = min(self.walk.place[p.node] for p in parts)
        behind = self.walk.behind([p.node for p in parts])
        for k, float_answer in enumerate(self.answers):
            env = self.walk.aside(self._advance(k, first), first, behind)
            for choice, harm in harms.items():
                same = choice == ("float32", "float32")
                answer = float_answer if same else self.walk.rerun(env, behind, rounded[choice])
                harm.add(float_answer, answer, self._labels_of(k))
        return harms

    def _advance(self, k: int, position: int) -> Env:
        """The values that live just before `position`. They are kept while there is room, else found anew next time."""
        start = self.starts[k]
        env = self.walk.run(start.env or {self.walk.input: start.x}, start.position, position)
        others = sum(s.bytes for s in self.starts) - start.bytes
        kept = _Start(start.x, position, env)
        self.starts[k] = kept if others + kept.bytes <= self.memory else _Start(start.x)
        return env

    def _labels_of(self, k: int) -> Tensor | None:
        if self.labels is None:
            return None
        first = sum(len(s.x) for s in self.starts[:k])
        return self.labels[first : first + len(self.starts[k].x)]

    def _row(self, parts: tuple[Layer, ...], choice: Choice, harm: _Harm) -> LayerCost:
        layer = parts[0]
        return LayerCost(
            layer=layer.name,
            op=str(layer.kind).rsplit(".", 1)[-1],
            weights=choice[0],
            activations=choice[1],
            damage=harm.damage,
            mse=harm.mse,
            drop=harm.drop,
            bytes=stored_bytes(self.walk.graph, layer, choice[0]),
            latency_ms=self.times.get((layer.name, *choice)),
        )


@dataclass
class _Harm:
    """What rounding did to the answers, batch by batch."""

    of: Damage
    distance: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    images: int = 0
    lost: list[Tensor] = field(default_factory=list)

    def add(self, before: Tensor, after: Tensor, labels: Tensor | None) -> None:
        """Answers of the float network and of the rounded one, and the classes (N,) if they are known."""
        self.distance += float(self.of(before, after).sum())
        self.noise += float(((after.double() - before.double()) ** 2).sum())
        self.power += float((before.double() ** 2).sum())
        self.images += len(before)
        if labels is not None:
            self.lost.append((before.argmax(1) == labels).double() - (after.argmax(1) == labels).double())

    @property
    def damage(self) -> float:
        """Mean of an image; infinite where an answer was not finite."""
        mean = self.distance / self.images
        return mean if math.isfinite(mean) else math.inf

    @property
    def mse(self) -> float:
        """Noise over power."""
        return self.noise / self.power if self.power and math.isfinite(self.noise) else math.inf

    @property
    def drop(self) -> Estimate | None:
        """Points of top-1 lost and the error of paired images (McNemar, 1947)."""
        if not self.lost:
            return None
        lost = torch.cat(self.lost)
        error = float(lost.std()) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
        return Estimate(100 * float(lost.mean()), 100 * error, len(lost))


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(after)) of each row, in nats; float64, never under 0."""
    p, q = (torch.log_softmax(x.double(), 1) for x in (before, after))
    return (p.exp() * (p - q)).sum(1).clamp(min=0)


# --- rounding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rounded:
    """A layer's weight as it would be stored, and what rounds its input."""

    weight: Tensor
    source: Rounding


def _roundings(graph: GraphModule, layer: Layer, choice: Choice) -> _Rounded:
    weight = graphs.parameter(graph, layer.weight).detach()
    stored = _round_weight(graph, layer, choice[0])(weight)
    return _Rounded(stored, _round_input(graph, layer, choice[1]))


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _round_weight(graph: GraphModule, layer: Layer, name: str) -> Rounding:
    if name in FLOATS:
        return _half if name == "float16" else nn.Identity()
    seen = graphs.weight_observer(graph, layer)
    assert seen is not None
    return seen.rounding() if name == "int8" else with_bits(seen, BITS[name]).rounding()


def _round_input(graph: GraphModule, layer: Layer, name: str) -> Rounding:
    seen = graphs.input_observer(graph, layer)
    if name in FLOATS or seen is None:
        return _half if name == "float16" else nn.Identity()
    return seen.rounding() if name == "int8" else with_bits(seen, BITS[name]).rounding()


def with_bits(seen: ActivationObserver | WeightObserver, bits: int) -> ActivationObserver | WeightObserver:
    """An observer that saw the same values and answers for a grid of `bits`; for 8 the device may want one bit less."""
    top = 2 ** (bits - 1) - 1
    power = seen.grid.power_of_two
    if isinstance(seen, ActivationObserver):
        other = ActivationObserver(seen.dtype, seen.qscheme, -top - 1, top, seen.methods, power)
        other.histogram = seen.histogram
        return other
    weight = WeightObserver(seen.dtype, seen.qscheme, -top, top, seen.ch_axis, seen.methods, power)
    weight.weight = seen.weight
    if seen.least is not None:
        weight.keep_above(seen.least)
    return weight


def stored_bytes(graph: GraphModule, layer: Layer, weights: str) -> int:
    """Bytes of a layer's weight (int4: two to a byte), its bias, and where it is quantized one float scale a channel."""
    weight = graphs.parameter(graph, layer.weight)
    bias = graphs.parameter(graph, layer.bias).numel() if layer.bias else 0
    if weights in FLOATS:
        return (weight.numel() + bias) * BITS[weights] // 8
    seen = graphs.weight_observer(graph, layer)
    scales = weight.shape[layer.axis] if seen is None or seen.ch_axis is not None else 1
    return math.ceil(weight.numel() * BITS[weights] / 8) + 4 * (bias + scales)


# --- the network, node by node --------------------------------------------------------------------


class _Walk:
    """Runs a graph between any two nodes; observers are seen through, so all is float but what is asked for."""

    def __init__(self, graph: GraphModule, scores: bool = True) -> None:
        self.graph, self.scores = graph, scores
        self.nodes = [n for n in graph.graph.nodes if self._runs(n)]
        self.place = {n: k for k, n in enumerate(self.nodes)}
        self.input = next(n for n in graph.graph.nodes if n.op == "placeholder")
        self.reads = {n: tuple(dict.fromkeys(map(self._seen_through, n.all_input_nodes))) for n in self.nodes}
        self.last = {read: k for k, n in enumerate(self.nodes) for read in self.reads[n]}

    def _runs(self, node: Node) -> bool:
        return node.op in ("call_function", "call_module", "output") and graphs.observer(self.graph, node) is None

    def _seen_through(self, node: Node) -> Node:
        while graphs.observer(self.graph, node) is not None:
            node = node.args[0]
        return node

    def _value(self, node: Node, env: Env) -> Any:
        node = self._seen_through(node)
        return graphs.parameter(self.graph, str(node.target)) if node.op == "get_attr" else env[node]

    def _call(self, node: Node, env: Env, rounded: _Rounded | None = None) -> Any:
        args, kwargs = (map_arg(a, lambda n: self._value(n, env)) for a in (node.args, node.kwargs))
        if node.op == "output":
            return args[0]
        if rounded is not None:
            args = (rounded.source(args[0]), rounded.weight, *args[2:])
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:  # relu_ would write into a value that is read again
            args = (args[0].clone(), *args[1:])
        called: Any = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        return called(*args, **kwargs)

    def run(self, env: Env, start: int, stop: int) -> Env:
        """The values that nodes from `stop` on read, from those that nodes from `start` on read."""
        env = dict(env)
        for k in range(start, stop):
            node = self.nodes[k]
            env[node] = self._call(node, env)
            self._forget(env, node, k)
        return env

    def _forget(self, env: Env, node: Node, k: int) -> None:
        for read in (*self.reads[node], node):
            if self.last.get(read, -1) <= k and node.op != "output":
                env.pop(read, None)

    @torch.no_grad()
    def answer(self, x: Tensor) -> Tensor:
        """The float answers, (N, classes) where they are `scores`. Raises BadModel on another shape or what is not finite."""
        got = _single(self.run({self.input: x}, 0, len(self.nodes))[self.nodes[-1]])
        if self.scores and got.ndim != 2:
            raise BadModel(
                f"The model answers shape {tuple(got.shape)}; sensitivity is measured on (images, classes).",
                "Scan a classifier.",
            )
        if not bool(torch.isfinite(got).all()):
            raise BadModel("The float model answers NaN or infinity for a calibration image.", "Check the weights.")
        return got

    @torch.no_grad()
    def check(self, x: Tensor, answer: Tensor) -> None:
        """That running node by node is running the graph. Raises BadModel (operators that write into a view)."""
        for seen in graphs.observers(self.graph):
            seen.stand_in = nn.Identity()
        if not torch.allclose(_single(self.graph(x)), answer, rtol=1e-3, atol=1e-4):
            raise BadModel(
                "The graph cannot be run in parts: an operator changes a value that another reads.",
                "Replace in-place operators on views.",
            )

    def behind(self, starts: Sequence[Node]) -> list[Node]:
        """Every node whose value depends on `starts`, themselves included, and the output; in order."""
        touched = set(starts)
        for node in self.nodes:
            if node.op == "output" or touched.intersection(self.reads[node]):
                touched.add(node)
        return [n for n in self.nodes if n in touched]

    def aside(self, env: Env, position: int, behind: Sequence[Node]) -> Env:
        """All that the nodes `behind` read and do not make: branches beside them are run here, once."""
        touched, env = set(behind), dict(env)
        wanted = {read for node in behind for read in self.reads[node]}
        for node in self.nodes[position:]:
            if node not in touched:
                env[node] = self._call(node, env)
        return {node: value for node, value in env.items() if node in wanted}

    def rerun(self, env: Env, behind: Sequence[Node], rounded: Mapping[Node, _Rounded]) -> Tensor:
        """The answers with some layers rounded."""
        env = dict(env)
        for node in behind:
            env[node] = self._call(node, env, rounded.get(node))
            self._forget(env, node, self.place[node])
        return _single(env[behind[-1]])


def _single(output: Any) -> Tensor:
    """The one tensor that a graph answers."""
    while isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor):
        raise BadModel(f"The model answers a {type(output).__name__}, not one tensor.", "Scan a classifier.")
    return output
