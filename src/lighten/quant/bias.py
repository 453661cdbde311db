"""After rounding: means (and spreads) of every layer's output brought back to the float network's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from lighten.errors import BadData
from lighten.kit.trace import trace
from lighten.quant import graph as graphs
from lighten.quant import policy
from lighten.quant.equalize import Equalized, bounds, by_channel, scale_outputs, tied
from lighten.quant.graph import Layer
from lighten.quant.plan import Plan

aten = policy.aten
GAINS = (0.5, 2.0)
"""No channel's spread is corrected by more than this."""
DEAD = 1e-4
"""A channel whose spread is under this share of the layer's largest is left as it is."""
Told = Callable[[int, int], None]
"""Called with layers done and layers in all."""


@dataclass(frozen=True)
class Corrected:
    """What was done to one layer: `shift`, the largest change of its bias; `gains`, smallest and largest of its
    channels; or the `reason` why nothing was done."""

    layer: str
    shift: float = 0.0
    gains: tuple[float, float] = (1.0, 1.0)
    reason: str = ""


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel (C,), float64."""

    mean: Tensor
    std: Tensor


Mend = Callable[[Layer, Moments, Moments], tuple[Tensor, Tensor]]
"""From a layer and its outputs' float and quantized moments to gain and shift of each channel (C,), float64."""


# --- on images ----------------------------------------------------------------------------------------


def correct_empirical(
    plan: Plan,
    batches: Iterable[Tensor],
    step: Told = lambda k, n: None,
    active: bool = True,
    real: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Corrected, ...]:
    """Shift every layer's bias so that the mean of each output channel is the float network's.

    Nagel et al., 2019, "Data-Free Quantization", section 4.2 and appendix D (empirical bias correction): layers are
    taken in the order they run, each with all layers before it rounded and corrected. The mean is that before the
    clip: as in the paper over all values, or with `active` over those that the clip lets through in the float
    network. Errors grow with the value, so a mean over what a ReLU throws away says little about what it keeps:
    that is, to first order, the least-squares shift of what the next layer reads (measured on EfficientNet-Lite0 and
    ResNet-18: the mean over all values makes the answers noisier). `plan` is prepared and calibrated; both networks
    run side by side in one pass, node by node, so the cost is two forward passes, and memory holds two copies of the
    widest live activations of all `batches` (a few hundred images are plenty). Layers that stay float are corrected
    too: they see the error of those before them. `real` are parameters of the float network that were overwritten since
    (attribute name to value): after a learned rounding. Raises BadData without images or with NaN.
    """
    return _walk(plan, batches, lambda _, before, rounded: _shift_only(before, rounded), step, active, real)


def reestimate(
    plan: Plan,
    batches: Iterable[Tensor],
    step: Told = lambda k, n: None,
    active: bool = True,
    real: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Corrected, ...]:
    """Match mean and standard deviation of every layer's output per channel: batch norm, re-estimated after folding.

    Sun et al., 2019, "Hybrid 8-bit Floating Point Training", and Finkelstein et al., 2019, "Fighting Quantization
    Bias With Bias", do it with the batch norm still there. Folded, it is y' = g * y + d with g = std_float /
    std_quantized: d goes to the bias and g to the weight's scale, so the integers stay as they are. g is held to
    GAINS and is 1 for channels that are all but constant and where a scale cannot carry it (one scale a layer,
    powers of two, tied weights); there only the mean is matched. `active`, cost and errors as `correct_empirical`.
    """
    shared = tied(plan.graph)

    def mend(layer: Layer, wanted: Moments, rounded: Moments) -> tuple[Tensor, Tensor]:
        if layer.name in shared or not scalable(plan.graph, layer):
            return _shift_only(wanted, rounded)
        gain = _gain(wanted, rounded)
        return gain, wanted.mean - gain * rounded.mean

    return _walk(plan, batches, mend, step, active, real)


def _shift_only(real: Moments, rounded: Moments) -> tuple[Tensor, Tensor]:
    return torch.ones_like(real.mean), real.mean - rounded.mean


def _gain(real: Moments, rounded: Moments) -> Tensor:
    dead = (real.std <= DEAD * real.std.max()) | (rounded.std <= DEAD * rounded.std.max())
    return torch.where(dead, 1.0, real.std / rounded.std.clamp(min=1e-30)).clamp(*GAINS)


def scalable(graph: GraphModule, layer: Layer) -> bool:
    """Whether each output channel has a weight scale of its own that can be anything."""
    found = graphs.weight_observer(graph, layer)
    return found is None or (found.ch_axis is not None and not found.grid.power_of_two)


def _walk(
    plan: Plan, batches: Iterable[Tensor], mend: Mend, step: Told, active: bool, real: Mapping[str, Tensor]
) -> tuple[Corrected, ...]:
    images = [x for x in batches if len(x)]
    if not images:
        raise BadData("There are no calibration images.", "Give at least a few dozen.")
    if not all(bool(torch.isfinite(x).all()) for x in images):
        raise BadData("The calibration images hold NaN or infinity.", "Check the preprocessing.")
    todo = {layer.node: layer for layer in plan.layers}
    done: list[Corrected] = []
    with torch.no_grad(), simulated(plan.graph):
        twins = _Twins(plan.graph, images, real)
        for node in list(plan.graph.graph.nodes):
            twins.run(node)
            if node in todo:
                done.append(_mend(plan.graph, todo[node], twins, mend, active))
                step(len(done), len(todo))
            twins.forget(node)
    plan.graph.recompile()  # biases that were not there before
    return tuple(done)


@contextmanager
def simulated(graph: GraphModule) -> Iterator[None]:
    """Every observer rounds as the runtime will; afterwards all are as they were."""
    every = graphs.observers(graph)
    before = [o.stand_in for o in every]
    try:
        for o in every:
            o.stand_in = o.rounding()
        yield
    finally:
        for o, stand_in in zip(every, before):
            o.stand_in = stand_in


class _Twins:
    """Both networks at one node after the other, over all images: values are (float, quantized), one pair a batch.

    The float network is the same graph with observers passed by, on copies of the parameters from before; `real` holds
    those that had changed already (attribute name to value).
    """

    def __init__(self, graph: GraphModule, images: list[Tensor], real: Mapping[str, Tensor]) -> None:
        self.graph, self.images, self.run_one, self.real = graph, images, Interpreter(graph), real
        self.values: dict[Node, list[tuple[Any, Any]]] = {}
        self.last = {source: node for node in graph.graph.nodes for source in node.all_input_nodes}

    def run(self, node: Node) -> None:
        """Compute the node's values from those of its inputs."""
        if node.op == "output":
            return
        if node.op == "placeholder":
            self.values[node] = [(x.clone(), x.clone()) for x in self.images]
        elif node.op == "get_attr":
            held = self.run_one.get_attr(node.target, (), {})
            before = self.real.get(str(node.target), held)
            self.values[node] = [(before.clone() if isinstance(before, Tensor) else before, held)]
        else:
            # What depends on parameters alone has one value for all batches.
            count = max((len(self.values[source]) for source in node.all_input_nodes), default=1)
            self.values[node] = [(self._one(node, k, 0), self._one(node, k, 1)) for k in range(count)]

    def _one(self, node: Node, batch: int, side: int) -> Any:
        def value(source: Node) -> Any:
            found = self.values[source]
            return found[batch if len(found) > 1 else 0][side]

        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        if side == 0 and graphs.observer(self.graph, node) is not None:
            return args[0]
        return getattr(self.run_one, node.op)(node.target, args, kwargs)

    def forget(self, node: Node) -> None:
        """Let go of values that nothing will read any more."""
        for source in node.all_input_nodes:
            if self.last.get(source) is node:
                self.values.pop(source, None)

    def moments(self, node: Node, axis: int, ends: tuple[float, float] | None) -> tuple[Moments, Moments]:
        """Of the float and of the quantized output, per channel, where the float one lies between `ends`."""
        pairs = self.values[node]
        kept = [(x > ends[0]) & (x < ends[1]) for x, _ in pairs] if ends else [torch.ones_like(x) for x, _ in pairs]
        real, rounded = (moments([pair[side] for pair in pairs], axis, kept) for side in (0, 1))
        return real, rounded

    def change(self, node: Node, gain: Tensor, shift: Tensor, axis: int) -> None:
        """What the node's quantized outputs are once its bias and scale have changed: no rounding lies between."""
        view = [-1 if d == axis else 1 for d in range(self.values[node][0][0].ndim)]
        self.values[node] = [
            (x, y * gain.to(y.dtype).view(view) + shift.to(y.dtype).view(view)) for x, y in self.values[node]
        ]


def moments(parts: Iterable[Tensor], axis: int, kept: Iterable[Tensor]) -> Moments:
    """Mean and standard deviation over everything but `axis`, where `kept` is not 0; 0 where nothing is kept.

    In float64 and two passes, so nothing cancels.
    """
    rows = [(x.movedim(axis, 0).flatten(1), k.movedim(axis, 0).flatten(1)) for x, k in zip(parts, kept)]
    nothing = torch.zeros((), dtype=torch.float64)
    count = sum((k.sum(1, dtype=torch.float64) for _, k in rows), nothing).clamp(min=1)
    mean = sum(((x.double() * k).sum(1) for x, k in rows), nothing) / count
    spread = sum((((x.double() - mean[:, None]) * k).square().sum(1) for x, k in rows), nothing)
    return Moments(mean, (spread / count).sqrt())


def _mend(graph: GraphModule, layer: Layer, twins: _Twins, mend: Mend, active: bool) -> Corrected:
    ndim = twins.values[layer.node][0][0].ndim
    axis = ndim - 1 if layer.kind is aten.linear else 1
    ends = bounds(layer.last) if active and layer.last is not layer.node else None
    gain, shift = mend(layer, *twins.moments(layer.node, axis, ends))
    if bool((gain != 1).any()):
        scale_layer(graph, layer, gain)
    add_to_bias(graph, layer, shift)
    twins.change(layer.node, gain, shift, axis)
    return Corrected(layer.name, float(shift.abs().max()), (float(gain.min()), float(gain.max())))


# --- changing a layer of a prepared graph -------------------------------------------------------------


@torch.no_grad()
def scale_layer(graph: GraphModule, layer: Layer, gain: Tensor) -> None:
    """Multiply weight, weight scale and bias of each output channel by `gain` (C,): the integers stay the same."""
    weight = graphs.parameter(graph, layer.weight)
    found = graphs.weight_observer(graph, layer)
    if found is not None:
        scale, zero = found.calculate_qparams()
        found.pin(scale.double() * gain, zero)
        found.stand_in = found.rounding() if found.stand_in is not None else None
    graphs.overwrite(graph, layer.weight, scale_outputs(weight.double(), layer, gain))
    if layer.bias:
        bias = own_bias(graph, layer)
        graphs.overwrite(graph, bias, graphs.parameter(graph, bias).double() * gain)


@torch.no_grad()
def add_to_bias(graph: GraphModule, layer: Layer, shift: Tensor) -> None:
    """Add `shift` (C,) to the layer's bias, which is made where there is none."""
    name = own_bias(graph, layer)
    graphs.overwrite(graph, name, graphs.parameter(graph, name).double() + shift)


def with_biases(plan: Plan) -> dict[str, Tensor]:
    """Give every layer a bias of its own; returns a copy of all weights and biases by attribute name."""
    for layer in plan.layers:
        own_bias(plan.graph, layer)
    plan.graph.recompile()
    names = [name for la in plan.layers for name in (la.weight, la.bias) if name]
    return {name: graphs.parameter(plan.graph, name).detach().clone() for name in names}


def own_bias(graph: GraphModule, layer: Layer) -> str:
    """The attribute of a bias that this layer alone reads: its own, or a new one (zero, or a copy of a shared one)."""
    now = graphs.stored(graph, layer.node.args[2]) if len(layer.node.args) > 2 and layer.node.args[2] else None
    if now and not _read_elsewhere(graph, now, layer.node):
        return now
    weight = graphs.parameter(graph, layer.weight)
    outputs = by_channel(weight, layer).shape[:2].numel()
    value = graphs.parameter(graph, now).detach().clone() if now else weight.new_zeros(outputs)
    name = _add_parameter(graph, f"{layer.weight.rpartition('.')[0]}.corrected_bias".lstrip("."), value)
    with graph.graph.inserting_before(layer.node):
        source = graph.graph.get_attr(name)
    layer.node.args = (*layer.node.args[:2], source, *layer.node.args[3:])
    return name


def _read_elsewhere(graph: GraphModule, name: str, reader: Node) -> bool:
    held = graphs.parameter(graph, name).data_ptr()
    same = (
        n for n in graph.graph.nodes if n.op == "get_attr" and graphs.parameter(graph, str(n.target)).data_ptr() == held
    )
    return any(user is not reader for node in same for user in node.users)


def _add_parameter(graph: GraphModule, wanted: str, value: Tensor) -> str:
    path, _, leaf = wanted.rpartition(".")
    owner = graph.get_submodule(path)
    while hasattr(owner, leaf):  # layers that share a weight share its module too
        leaf += "_"
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return f"{path}.{leaf}".lstrip(".")


# --- without images -----------------------------------------------------------------------------------


def correct_analytic(plan: Plan, model: nn.Module, equalized: Iterable[Equalized] = ()) -> tuple[Corrected, ...]:
    """Take the error that rounded weights make in a layer's mean out of its bias, without any image.

    Nagel et al., 2019, section 4.2: E[y~] - E[y] = (W~ - W) * E[x]. E[x] follows from the batch norms
    of `model` (the network from before folding): beta and |gamma| are mean and deviation of a normal distribution,
    clips make it `clipped_normal_mean`, sums of such values and averages over pixels keep what is linear, and other
    elementwise activations are integrated. `equalized` says by how much channels were scaled since. Zero padding at
    the borders is not counted, as in the paper. Layers whose input's mean is not known are left alone, and say so.
    """
    known = normals(model, _shape(plan.graph))
    for done in equalized:  # a pair's first layer now gives 1 / scale of what its batch norm gave
        name = next((layer.weight for layer in plan.layers if layer.name == done.first), "")
        if name in known:
            by = torch.tensor(done.scales, dtype=torch.float64)
            known[name] = Moments(known[name].mean / by, known[name].std / by)
    return tuple(_correct_one(plan.graph, layer, known) for layer in plan.layers)


def normals(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Moments]:
    """By the name of a layer's weight: mean and deviation of what the batch norm after the layer gives."""
    program = trace(model, shape).module(check_guards=False)
    return dict(_normals(program))


def _normals(graph: GraphModule) -> Iterator[tuple[str, Moments]]:
    layers = {layer.node: layer for layer in graphs.layers(graph)}
    for node in graph.graph.nodes:
        if policy.packet(node) is not aten.batch_norm or node.args[0] not in layers:
            continue
        gamma, beta, mean, _ = (graphs.stored(graph, a) for a in node.args[1:5])
        size = graphs.parameter(graph, mean or "").shape
        one, zero = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        std = graphs.parameter(graph, gamma).detach().double().abs() if gamma else one
        yield (
            layers[node.args[0]].weight,
            Moments(graphs.parameter(graph, beta).detach().double() if beta else zero, std),
        )


def _shape(graph: GraphModule) -> tuple[int, ...]:
    first = next(n for n in graph.graph.nodes if n.op == "placeholder")
    return tuple(int(n) for n in first.meta["val"].shape[1:])


def _correct_one(graph: GraphModule, layer: Layer, known: Mapping[str, Moments]) -> Corrected:
    found = graphs.weight_observer(graph, layer)
    if found is None:
        return Corrected(layer.name, reason="its weights are not rounded")
    if layer.axis == 1:
        return Corrected(layer.name, reason="transposed convolution: each pixel sees other taps")
    mean = expected(graph, layer.node.args[0], known)
    weight = graphs.parameter(graph, layer.weight).detach()
    blocks = by_channel((found.rounding()(weight) - weight).double(), layer).sum(3)
    if mean is None or mean.numel() != blocks.shape[0] * blocks.shape[2]:
        return Corrected(layer.name, reason="the mean of its input is not known from batch norms")
    error = (blocks * mean.view(blocks.shape[0], 1, -1)).sum(2).flatten()
    add_to_bias(graph, layer, -error)
    graph.recompile()
    return Corrected(layer.name, float(error.abs().max()))


def expected(graph: GraphModule, node: Any, known: Mapping[str, Moments]) -> Tensor | None:
    """E of each channel of a node's value (C,), float64, or of each feature of a flattened one; None: unknown."""
    if not isinstance(node, Node):
        return None
    source = node.args[0] if node.args else None
    kind = policy.packet(node)
    if graphs.observer(graph, node) is not None or kind in policy.NOTHING:
        return expected(graph, source, known)
    if kind in policy.COMPUTE:
        normal = known.get(graphs.stored(graph, node.args[1]) or "")
        return normal.mean if normal else None
    if kind in (aten.add, aten.add_) and not node.kwargs:
        both = [expected(graph, a, known) for a in node.args[:2]]
        return both[0] + both[1] if both[0] is not None and both[1] is not None else None
    if kind in (aten.adaptive_avg_pool2d, aten.mean):
        return expected(graph, source, known) if _over_pixels(node) else None
    if kind is aten.flatten:
        mean, features = expected(graph, source, known), node.meta["val"].shape[-1]
        return mean.repeat_interleave(int(features) // len(mean)) if mean is not None else None
    return _after_activation(graph, node, known)


def _over_pixels(node: Node) -> bool:
    if policy.packet(node) is not aten.mean:
        return True
    return len(node.args) > 1 and sorted(d % 4 for d in node.args[1]) == [2, 3]


def _after_activation(graph: GraphModule, node: Node, known: Mapping[str, Moments]) -> Tensor | None:
    source, kind = node.args[0] if node.args else None, policy.packet(node)
    if kind not in (*policy.FUSED, *policy.CURVED):
        return None
    while isinstance(source, Node) and graphs.observer(graph, source) is not None:
        source = source.args[0]
    if not isinstance(source, Node) or policy.packet(source) not in policy.COMPUTE:
        return None
    normal = known.get(graphs.stored(graph, source.args[1]) or "")
    if normal is None:
        return None
    if kind in policy.CURVED:
        return normal_mean(lambda x: node.target(x, *node.args[1:], **node.kwargs), normal.mean, normal.std)
    ends = bounds(node)
    return clipped_normal_mean(normal.mean, normal.std, *ends) if ends else None


def clipped_normal_mean(mean: Tensor, std: Tensor, lo: float, hi: float) -> Tensor:
    """E[clip(x, lo, hi)] for normal x, float64; Nagel et al., 2019, appendix C. `lo`, `hi` may be infinite.

    With a = (lo - mean) / std and b = (hi - mean) / std: lo * P(a) + hi * (1 - P(b)) + mean * (P(b) - P(a))
    + std * (p(a) - p(b)), where p and P are density and distribution of the standard normal.
    """
    mean, std = mean.double(), std.double()
    safe = std.clamp(min=1e-30)
    a, b = (lo - mean) / safe, (hi - mean) / safe
    under, over = torch.special.ndtr(a), torch.special.ndtr(-b)
    got = mean * (torch.special.ndtr(b) - under) + std * (_density(a) - _density(b))
    got = got + (lo * under if lo > -math.inf else 0.0) + (hi * over if hi < math.inf else 0.0)
    return torch.where(std > 0, got, mean.clamp(lo, hi))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def normal_mean(f: Callable[[Tensor], Tensor], mean: Tensor, std: Tensor, steps: int = 4001) -> Tensor:
    """E[f(x)] for normal x and elementwise `f`, float64: the density's weighted sum over 8 deviations either way."""
    z = torch.linspace(-8, 8, steps, dtype=torch.float64)
    weight = _density(z) / _density(z).sum()
    return (f(mean.double()[:, None] + std.double()[:, None] * z[None]) * weight[None]).sum(1)
