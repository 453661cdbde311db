"""Step sizes that are learned with the weights: what quantization-aware training puts in the place of observers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lighten.quant import graph as graphs
from lighten.quant.observers import ActivationObserver, Watcher, WeightObserver
from lighten.quant.plan import leave_room
from lighten.quant.ranges import SMALLEST_SCALE, Grid, Range, errors

FLOOR = 1e-3
"""A scale never falls under this fraction of where it began: it stays positive."""
EDGE = 1e-6
"""A value exactly on the last level is inside, so that rounding what is rounded already changes no gradient."""


class Rounded(torch.autograd.Function):
    """x_hat = round(clip(x / s, low, high)) * s with the gradients of Esser et al., 2020, "Learned Step Size Quantization".

    Eqs. 1-2: the value. Eq. 3: d x_hat / d s = round(x/s) - x/s inside, low or high outside. Eq. 5: d x_hat / d x = 1
    inside, 0 outside. `factor` is their g (section 2.2), multiplied into the gradient of s. `low` and `high` are the
    integers -Qn and Qp, counted from the zero point; `s` is one value.

    torch's own learnable fake-quantize is not used: it counts values up to half a step beyond the last level as
    inside, and on a CPU it takes 2 to 4 times as long (measured, forward and backward, 4.2 million values).
    Eq. 3 is computed as (<grad, x_hat> - <grad inside, x>) / s, which needs no tensor beside those that are there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float) -> Tensor:
        out = (x / scale).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, scale, out)
        ctx.rest = low, high, factor
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, scale, out = ctx.saved_tensors
        low, high, factor = ctx.rest
        ends = [end * float(scale) for end in edges(low, high)]
        inside = torch.ops.aten.hardtanh_backward(grads[0], x, *ends)
        moved = (_dot(grads[0], out) - _dot(inside, x)) / scale * factor
        return inside, moved, None, None, None


class RoundedRows(torch.autograd.Function):
    """The same for a weight with one scale for each slice along `axis`, times a constant `unit` of the same shape."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, unit: Tensor, low: int, high: int, axis: int, factor: float
    ) -> Tensor:
        steps = x / _along(scale, x, axis)
        out = steps.round().clamp_(low, high).mul_(_along(scale * unit, x, axis))
        ctx.save_for_backward(steps, scale, unit, out)
        ctx.rest = low, high, axis, factor
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        steps, scale, unit, out = ctx.saved_tensors
        low, high, axis, factor = ctx.rest
        inside = torch.ops.aten.hardtanh_backward(grads[0], steps, *edges(low, high))
        inner, outer = (
            torch.linalg.vecdot(_rows(a, axis), _rows(b, axis)) for a, b in ((inside, steps), (grads[0], out))
        )
        moved = (outer / scale - inner * unit) * factor
        return inside.mul_(_along(unit, steps, axis)), moved, None, None, None, None, None


def edges(low: int, high: int) -> tuple[float, float]:
    """The first and last level, and a little more: what lies exactly on them is inside."""
    return low - EDGE * (high - low), high + EDGE * (high - low)


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    return scale.view([-1 if d == axis else 1 for d in range(x.ndim)])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, in the order the values lie in memory, so that nothing is moved."""
    if b.ndim == 4 and b.stride(1) == 1:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _rows(a: Tensor, axis: int) -> Tensor:
    """Values of each slice along `axis`; the order within a slice is the same for every tensor."""
    first = a.movedim(axis, 0)
    return first.movedim(1, -1).flatten(1) if a.ndim == 4 else first.flatten(1)


class LearnedScale(nn.Module):
    """Stands in for an observer and learns its scale; the zero point stays, an integer, so that 0 stays exact.

    What is learned is the `ratio` to where the scale began: one learning rate then suits every tensor. The gradient of
    the scale is multiplied by g = 1 / sqrt(N * Qp) (Esser et al., section 2.2), N the values of one image.
    """

    start: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("start", scale.detach().float().clone().clamp(min=SMALLEST_SCALE))
        self.register_buffer("zero", zero.detach().to(torch.int64).clone())
        self.low, self.high = grid.qmin - int(zero.max()), grid.qmax - int(zero.max())
        self.ratio = nn.Parameter(torch.ones_like(self.start))

    @property
    def scale(self) -> Tensor:
        """Positive; where the device wants it the nearest power of two, with the gradient of the one before rounding."""
        scale = self.start * self.ratio.clamp(min=FLOOR)
        if not self.grid.power_of_two:
            return scale
        return scale + (torch.exp2(torch.round(torch.log2(scale))) - scale).detach()

    def factor(self, count: int) -> float:
        """g for `count` values on one scale."""
        return 1 / math.sqrt(count * max(self.high, -self.low, 1))

    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x, self.scale.reshape(()), self.low, self.high, self.factor(x[0].numel()))


class LearnedWeightScale(LearnedScale):
    """The same for a weight that is stored in units of `unit` (one value a channel, or one for all).

    Folded batch norms make the channels of a weight differ a hundredfold in size, and their gradients inversely: one
    learning rate would tear the small ones and leave the large ones where they are. In units of their first scale they
    are alike.
    """

    unit: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, grid: Grid, axis: int | None, unit: Tensor) -> None:
        super().__init__(scale, zero, grid)
        self.axis = axis
        self.register_buffer("unit", unit.clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale / self.unit
        factor = self.factor(x.numel() // scale.numel())
        if self.axis is None:
            return Rounded.apply(x, scale.reshape(()), self.low, self.high, factor) * self.unit
        return RoundedRows.apply(x, scale, self.unit, self.low, self.high, self.axis, factor)


def learn(graph: GraphModule) -> None:
    """Every observer of a calibrated graph gets a scale that can be learned, from the one it chose.

    The weights are stored in units of it until `settle`.
    """
    units: dict[str, Tensor] = {}
    for layer in graphs.layers(graph):
        for name in filter(None, (layer.weight, layer.bias)):
            graphs.parameter(graph, name).requires_grad_()  # folding freezes the biases that it makes
        found = graphs.weight_observer(graph, layer)
        if found is None or isinstance(found.stand_in, LearnedWeightScale):
            continue
        scale, zero = found.calculate_qparams()
        if layer.weight not in units:
            units[layer.weight] = scale.clamp(min=SMALLEST_SCALE)
            _rescale(graph, layer.weight, 1 / units[layer.weight], found.ch_axis)
        found.stand_in = LearnedWeightScale(scale, zero, found.grid, found.ch_axis, units[layer.weight])
    for observer in graphs.observers(graph):
        if isinstance(observer, ActivationObserver):
            observer.stand_in = LearnedScale(*observer.calculate_qparams(), observer.grid)


@torch.no_grad()
def settle(graph: GraphModule) -> None:
    """Pin what was learned, give the weights their own unit back, and let the observers be observers again.

    A weight's scale is kept large enough for the bias to fit 32 bits at input scale x weight scale.
    """
    restored: set[str] = set()
    for layer in graphs.layers(graph):
        found, source = graphs.weight_observer(graph, layer), graphs.input_observer(graph, layer)
        if found is None or not isinstance(learned := found.stand_in, LearnedWeightScale):
            continue
        if layer.weight not in restored:
            restored.add(layer.weight)
            _rescale(graph, layer.weight, learned.unit, found.ch_axis)
        if source is not None:
            read = source.stand_in.scale if isinstance(source.stand_in, LearnedScale) else source.calculate_qparams()[0]
            leave_room(graph, layer, read.detach())
    for observer in graphs.observers(graph):
        _pin(observer)


def _pin(observer: Watcher) -> None:
    learned = observer.stand_in
    if not isinstance(learned, LearnedScale):
        return
    scale = learned.scale.detach()
    if isinstance(observer, WeightObserver) and observer.least is not None:
        scale = torch.maximum(scale, _allowed(observer.least, learned.grid))
    observer.pin(scale, learned.zero)
    if isinstance(observer, ActivationObserver):
        lo, hi = (scale.double() * end for end in (learned.low, learned.high))
        error = float(errors(observer.histogram, lo.reshape(1), hi.reshape(1), learned.grid))
        observer.take(Range(float(lo), float(hi), "learned", error))
    observer.stand_in = None


def _allowed(least: Tensor, grid: Grid) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(least.clamp(min=1e-30)))) if grid.power_of_two else least


@torch.no_grad()
def _rescale(graph: GraphModule, name: str, by: Tensor, axis: int | None) -> None:
    weight = graphs.parameter(graph, name)
    graphs.overwrite(graph, name, weight * (by if axis is None else _along(by, weight, axis)))


class Trainable(nn.Module):
    """A prepared graph as a module that a fit loop can take: exported graphs refuse train() and eval().

    Its operators have no modes: batch norms are folded, and dropout stays off, as it was when the graph was captured.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)

    def train(self, mode: bool = True) -> Trainable:
        return self
