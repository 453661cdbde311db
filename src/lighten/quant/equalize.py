"""Before rounding: scales moved between layers, outlier channels split or clipped, on a folded graph, in place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from lighten.errors import BadConfig, BadData
from lighten.quant import graph as graphs
from lighten.quant import policy
from lighten.quant.graph import Layer
from lighten.quant.ranges import Grid, Histogram, least_squares

aten = policy.aten
INFINITE = float("inf")
LIMITS = (1e-2, 1e2)
"""No channel is scaled by more than this, so that a channel that is all but dead moves nothing."""
HEADROOM = 1.1
"""How far beyond the largest value seen a clip is kept away."""
ROUNDS, CONVERGED = 100, 1e-4
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)

LEAKY = (aten.leaky_relu, aten.leaky_relu_)
SPATIAL = (aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.mean, aten.pad, aten.constant_pad_nd)
SHAPES = (aten.flatten, aten.view, aten.reshape, aten.squeeze)


@dataclass(frozen=True)
class Pair:
    """Two layers between which every channel can be scaled: nothing else reads what lies between.

    `lo` and `hi` are the clip between them (infinite where there is none); `repeat` is how many input features of
    the second each output channel of the first becomes (height x width where it is flattened); `literal` says that
    an operator between names the number of channels.
    """

    first: Layer
    second: Layer
    lo: float
    hi: float
    repeat: int
    literal: bool

    @property
    def clips(self) -> bool:
        """Whether the clip is one that a positive scale would move."""
        return self.hi < INFINITE or (self.lo < 0 and self.lo > -INFINITE)


@dataclass(frozen=True)
class Equalized:
    """What was done to a pair: output channel c of `first` was divided by scales[c], `second` takes it times that."""

    first: str
    second: str
    scales: tuple[float, ...]

    @property
    def smallest(self) -> float:
        return min(self.scales)

    @property
    def largest(self) -> float:
        return max(self.scales)


@dataclass(frozen=True)
class Split:
    """Output channels of `first` (numbered as they then were) that were doubled, and halved where `second` reads."""

    first: str
    second: str
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Clipped:
    """The limit that a layer's weights were clipped to, and the output channels that reached beyond it."""

    layer: str
    limit: float
    channels: tuple[int, ...]


# --- weights by channel -------------------------------------------------------------------------------


def by_channel(weight: Tensor, layer: Layer) -> Tensor:
    """The weight as (groups, outputs a group, inputs a group, taps), for every kind of layer."""
    groups = layer.groups
    if layer.axis == 1:  # transposed convolution: (in, out / groups, ...)
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def as_stored(blocks: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """Back from `by_channel`; `like` is the stored weight, whose taps are kept. The numbers of channels may differ."""
    groups, outputs, inputs, _ = blocks.shape
    if layer.axis == 1:
        return blocks.transpose(1, 2).reshape(groups * inputs, outputs, *like.shape[2:])
    return blocks.reshape(groups * outputs, inputs, *like.shape[2:])


def scale_outputs(weight: Tensor, layer: Layer, factor: Tensor) -> Tensor:
    """The weight with each output channel times `factor` (outputs,)."""
    blocks = by_channel(weight, layer)
    return as_stored(blocks * factor.to(weight.dtype).view(blocks.shape[0], -1, 1, 1), weight, layer)


def scale_inputs(weight: Tensor, layer: Layer, factor: Tensor) -> Tensor:
    """The weight with each input channel times `factor` (inputs,)."""
    blocks = by_channel(weight, layer)
    return as_stored(blocks * factor.to(weight.dtype).view(blocks.shape[0], 1, -1, 1), weight, layer)


# --- which layers make a pair -------------------------------------------------------------------------


def pairs(graph: GraphModule) -> tuple[Pair, ...]:
    """Every two layers with only clips and operators between that let a positive scale per channel pass.

    A layer whose weight or bias is read elsewhere too (tied weights) is in no pair.
    """
    shared = tied(graph)
    mine = {layer.node: layer for layer in graphs.layers(graph) if layer.name not in shared}
    return tuple(pair for layer in mine.values() if (pair := _follow(layer, mine)) is not None)


def tied(graph: GraphModule) -> frozenset[str]:
    """Names of the layers whose weight or bias something else reads too."""
    readers: Counter[int] = Counter()
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(held := _held(graph, str(node.target)), Tensor):
            readers[held.data_ptr()] += len(node.users)
    return frozenset(
        layer.name
        for layer in graphs.layers(graph)
        if any(readers[graphs.parameter(graph, name).data_ptr()] > 1 for name in (layer.weight, layer.bias) if name)
    )


def _held(graph: GraphModule, name: str) -> Any:
    try:
        return graphs.parameter(graph, name)
    except AttributeError:
        return None


def _follow(first: Layer, layers: dict[Node, Layer]) -> Pair | None:
    node, lo, hi, literal = first.node, -INFINITE, INFINITE, False
    axis = _rank(node) - 1 if first.kind is aten.linear else 1
    while len(node.users) == 1:
        user = next(iter(node.users))
        kind = policy.packet(user)
        if user in layers:
            return _pair(first, layers[user], node, axis, lo, hi, literal)
        if kind in policy.FUSED:
            ends = bounds(user)
            if ends is None or ends[0] > 0 or ends[1] <= 0:
                return None
            lo, hi = max(lo, ends[0]), min(hi, ends[1])
        elif not _lets_scale_pass(user, node, axis):
            return None
        literal = literal or kind in (aten.view, aten.reshape)
        node = user
    return None


def _pair(first: Layer, second: Layer, between: Node, axis: int, lo: float, hi: float, literal: bool) -> Pair | None:
    wanted = _rank(between) - 1 if second.kind is aten.linear else 1
    before, after = _size(first.node, axis), _size(between, axis)
    if second.node.args[0] is not between or wanted != axis or not before or after % before:
        return None
    if after != before and (second.kind is not aten.linear or _rank(between) != 2):
        return None
    return Pair(first, second, lo, hi, after // before, literal)


def bounds(node: Node) -> tuple[float, float] | None:
    """The ends of a clip (infinite where open); None where they are computed."""
    kind = policy.packet(node)
    if kind in (aten.relu, aten.relu_):
        return 0.0, INFINITE
    if kind is aten.relu6:
        return 0.0, 6.0
    plain = (-1.0, 1.0) if kind in (aten.hardtanh, aten.hardtanh_) else (None, None)
    names = ("min_val", "max_val") if plain[0] is not None else ("min", "max")
    ends = [node.args[k + 1] if len(node.args) > k + 1 else node.kwargs.get(names[k], plain[k]) for k in range(2)]
    if any(isinstance(end, Node) for end in ends):
        return None
    lo, hi = (float(end) if end is not None else None for end in ends)
    return (-INFINITE if lo is None else lo), (INFINITE if hi is None else hi)


def _lets_scale_pass(node: Node, source: Node, axis: int) -> bool:
    """Whether f(s * x) = s * f(x) for positive s per channel, with the channels staying where they are."""
    kind = policy.packet(node)
    if node.args[0] is not source:
        return False
    if kind in SHAPES:  # these may also take the batch size, which is another node
        return axis == 1 and _keeps_order(node, source)
    if len(node.all_input_nodes) != 1:
        return False
    if kind in SPATIAL:
        return axis == 1 and _size(node, 1) == _size(source, 1) and _keeps_zero(node) and not _averages_channels(node)
    return kind in policy.NOTHING or kind in LEAKY


def _averages_channels(node: Node) -> bool:
    if policy.packet(node) is not aten.mean:
        return False
    dims = node.args[1] if len(node.args) > 1 else None
    rank = _rank(node.args[0])
    return not isinstance(dims, list | tuple) or any(int(d) % rank < 2 for d in dims)


def _keeps_zero(node: Node) -> bool:
    """Padding must be with 0: anything else does not scale."""
    if policy.packet(node) not in (aten.pad, aten.constant_pad_nd):
        return True
    constant = [a for a in node.args[2:] if a is not None] + list(node.kwargs.values())
    return all(a == "constant" or a in (0, 0.0) for a in constant)


def _keeps_order(node: Node, source: Node) -> bool:
    """(N, C, H, W) to (N, C) or (N, C x H x W), row-major."""
    before, after = _shape(source), _shape(node)
    if len(before) < 2 or len(after) < 2 or len(after) > len(before):
        return False
    rest = math.prod(before[2:])
    return (len(after) == 2 and after[1] == before[1] * rest) or (after[1] == before[1] and rest == 1)


def _shape(node: Node) -> tuple[int, ...]:
    """Sizes of a node's value; -1 for the batch."""
    value = node.meta.get("val")
    return tuple(n if isinstance(n, int) else -1 for n in value.shape) if isinstance(value, Tensor) else ()


def _rank(node: Node) -> int:
    return len(_shape(node))


def _size(node: Node, axis: int) -> int:
    shape = _shape(node)
    return shape[axis] if 0 <= axis < len(shape) else 0


# --- what the images show -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Per channel: ends of the first layer's output before its clip (C,), largest size and mean square of what the
    second layer reads (C,); float64."""

    lowest: Tensor
    highest: Tensor
    reach: Tensor
    power: Tensor


class _Watch(Interpreter):
    """Runs the graph and keeps, for some nodes, smallest, largest, sum of squares and count of each channel."""

    def __init__(self, graph: GraphModule, axes: dict[Node, int]) -> None:
        super().__init__(graph)
        self.axes = axes
        self.stats: dict[Node, tuple[Tensor, Tensor, Tensor, int]] = {}

    def run_node(self, n: Node) -> Any:
        got = super().run_node(n)
        if n in self.axes:
            rows = got.detach().movedim(self.axes[n], 0).flatten(1).double()
            new = rows.amin(1), rows.amax(1), rows.square().sum(1), rows.shape[1]
            old = self.stats.get(n, new)
            both = new if n not in self.stats else (old[2] + new[2], old[3] + new[3])
            self.stats[n] = (
                torch.minimum(old[0], new[0]),
                torch.maximum(old[1], new[1]),
                both[-2],
                both[-1],
            )
        return got


@torch.no_grad()
def watch(graph: GraphModule, found: tuple[Pair, ...], batches: Iterable[Tensor]) -> tuple[Seen, ...]:
    """What `batches` show of each pair. Raises BadData where there are no images, or NaN."""
    axes: dict[Node, int] = {}
    for pair in found:
        axes[pair.first.node] = _rank(pair.first.node) - 1 if pair.first.kind is aten.linear else 1
        source: Any = pair.second.node.args[0]
        axes[source] = _rank(source) - 1 if pair.second.kind is aten.linear else 1
    watching, done = _Watch(graph, axes), 0
    for x in batches:
        if not torch.isfinite(x).all():
            raise BadData("The calibration images hold NaN or infinity.", "Check the preprocessing.")
        watching.run(x)
        done += len(x)
    if not done:
        raise BadData("There are no calibration images.", "Give at least a few dozen.")
    return tuple(_seen(pair, watching) for pair in found)


def _seen(pair: Pair, watching: _Watch) -> Seen:
    lowest, highest, _, _ = watching.stats[pair.first.node]
    lo, hi, squares, count = watching.stats[pair.second.node.args[0]]
    reach = torch.maximum(-lo, hi).view(-1, pair.repeat).amax(1)
    return Seen(lowest, highest, reach, squares.view(-1, pair.repeat).mean(1) / count)


def allowed(pair: Pair, seen: Seen | None, channels: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest scale of each channel (C,), float64.

    A clip at c does not scale with its input. A channel that no image clips stays unclipped while max / s <= c, so
    there s >= max / c is exact on those images (HEADROOM keeps it exact a little beyond them); a channel that is
    clipped must keep s = 1.
    """
    least = torch.full((channels,), LIMITS[0], dtype=torch.float64)
    most = torch.full((channels,), LIMITS[1], dtype=torch.float64)
    if not pair.clips or seen is None:
        return least, most
    used = (seen.highest / pair.hi).clamp(min=0)
    if pair.lo < 0:
        used = torch.maximum(used, (seen.lowest / pair.lo).clamp(min=0))
    least = torch.maximum(least, (used * HEADROOM).clamp(max=1))
    one, stuck = torch.ones_like(least), used >= 1
    return torch.where(stuck, one, least), torch.where(stuck, one, most)


# --- cross-layer equalization -------------------------------------------------------------------------


@torch.no_grad()
def cross_layer(
    graph: GraphModule, batches: Iterable[Tensor], per_channel: bool, bits: int = 8
) -> tuple[Equalized, ...]:
    """Scale channels between neighbouring layers so that rounding loses less; the network computes the same.

    Nagel et al., 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", eq. 11:
    W1 / s, b1 / s, and W2 * s along its input channels, which a (leaky) ReLU lets through. Clips are kept exact on
    `batches` by `allowed`. With one weight scale a layer (`per_channel` False), s = sqrt(r1 / r2) over the weight
    ranges, repeated over all pairs until it settles (section 4.1.2). With a scale for each output channel that range
    is moot, and what counts is how W2 and the activation between share the trouble: see `by_activations`, which
    rounds W2 to `bits`. `graph` is folded and not yet prepared. Raises BadData where images are wanted and missing.
    """
    found = pairs(graph)
    wanted = per_channel or any(pair.clips for pair in found)
    seen: tuple[Seen | None, ...] = watch(graph, found, batches) if wanted and found else (None,) * len(found)
    sizes = [_blocks(graph, pair.first).shape[:2].numel() for pair in found]
    ends = [allowed(pair, s, n) for pair, s, n in zip(found, seen, sizes)]
    if per_channel:
        scales = [
            by_activations(_blocks(graph, pair.second), s, pair.repeat, end, bits)
            for pair, s, end in zip(found, seen, ends)
            if s is not None
        ]
    else:
        scales = by_weights(graph, found, ends)
    for pair, scale in zip(found, scales):
        _rescale(graph, pair, scale)
    return tuple(Equalized(p.first.name, p.second.name, tuple(s.tolist())) for p, s in zip(found, scales))


def _blocks(graph: GraphModule, layer: Layer) -> Tensor:
    return by_channel(graphs.parameter(graph, layer.weight).detach(), layer).double()


def _rescale(graph: GraphModule, pair: Pair, scale: Tensor) -> None:
    for name, layer, factor in (
        (pair.first.weight, pair.first, None),
        (pair.second.weight, pair.second, scale.repeat_interleave(pair.repeat)),
    ):
        weight = graphs.parameter(graph, name)
        changed = (
            scale_outputs(weight.double(), layer, 1 / scale)
            if factor is None
            else scale_inputs(weight.double(), layer, factor)
        )
        graphs.overwrite(graph, name, changed)
    if pair.first.bias:
        graphs.overwrite(graph, pair.first.bias, graphs.parameter(graph, pair.first.bias).double() / scale)


def by_weights(graph: GraphModule, found: tuple[Pair, ...], ends: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Scales of each pair (C,), float64, from weight ranges alone: eq. 11, over all pairs until they settle.

    Works on the largest |weight| of each (output, input), so the weights themselves are multiplied once, at the end.
    """
    names = {layer.name: layer for pair in found for layer in (pair.first, pair.second)}
    sizes = {name: _blocks(graph, layer).abs().amax(3) for name, layer in names.items()}
    totals = [torch.ones_like(least) for least, _ in ends]
    for _ in range(ROUNDS):
        moved = 0.0
        for k, pair in enumerate(found):
            one, two = sizes[pair.first.name], sizes[pair.second.name]
            r1, r2 = one.amax(2).flatten(), two.amax(1).flatten().view(-1, pair.repeat).amax(1)
            wanted = torch.where((r1 > 0) & (r2 > 0), totals[k] * torch.sqrt(r1 / r2), totals[k])
            step = wanted.nan_to_num(1.0).clamp(*ends[k]) / totals[k]
            totals[k] = totals[k] * step
            sizes[pair.first.name] = one / step.view(one.shape[0], -1, 1)
            sizes[pair.second.name] = two * step.repeat_interleave(pair.repeat).view(two.shape[0], 1, -1)
            moved = max(moved, float(step.log().abs().max()))
        if moved < CONVERGED:
            break
    return totals


def by_activations(weight: Tensor, seen: Seen, repeat: int, ends: tuple[Tensor, Tensor], bits: int) -> Tensor:
    """Scale of each channel (C,), float64, between one activation scale and W2's scales per output channel.

    SmoothQuant (Xiao et al., 2023, eq. 4): s = act^a / weight^(1 - a), where `act` is the largest value seen in the
    channel and `weight` W2's largest share in any output's range. The exponent (or s = 1) is whichever promises the
    smallest error at W2's output; with a depthwise W2 nothing is lost in the weights, and a = 1 gives every channel
    the whole activation range. Normalised so that the widest channel keeps its range; dead channels keep s = 1.
    `weight` is (groups, outputs, inputs, taps) of W2.
    """
    rows = weight.abs().amax(3)
    share = (rows / rows.amax(2, keepdim=True).clamp(min=1e-30)).amax(1).flatten().view(-1, repeat).amax(1)
    live = (seen.reach > 0) & (share > 0)
    candidates = [torch.ones_like(share)]
    for a in EXPONENTS if bool(live.any()) else ():
        s = torch.where(live, seen.reach, 1.0) ** a / torch.where(live, share, 1.0) ** (1 - a)
        s = s * ((seen.reach / s)[live].max() / seen.reach[live].max())
        candidates.append(torch.where(live, s, 1.0).clamp(*ends))
    return min(candidates, key=lambda s: expected_noise(weight, seen, s, repeat, bits))


def expected_noise(weight: Tensor, seen: Seen, scale: Tensor, repeat: int, bits: int) -> float:
    """Mean square rounding noise that W2's outputs are to expect, summed over outputs.

    A step d adds d^2 / 12 (uniform noise): the activation's step over 8 bits meets W2^2, each output's weight step
    meets the activation's mean square.
    """
    wide = scale.repeat_interleave(repeat)
    moved = weight * wide.view(weight.shape[0], 1, -1, 1)
    step = (seen.reach / scale).max() / 255
    steps = moved.abs().amax((2, 3)) / (2 ** (bits - 1) - 1)
    power = (seen.power / scale**2).repeat_interleave(repeat).view(weight.shape[0], -1).sum(1) * weight.shape[3]
    return float(step**2 * moved.square().sum() + (steps.square() * power[:, None]).sum()) / 12


# --- outlier channels ---------------------------------------------------------------------------------


@torch.no_grad()
def split_outliers(graph: GraphModule, share: float = 0.02, bits: int | None = None) -> tuple[Split, ...]:
    """Double the channels in which a layer's largest weights are, each with half the weight: the range shrinks.

    Zhao et al., 2019, "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting",
    ICML: ceil(share * inputs) times, the input channel with the largest |weight| is split. With `bits` the halves are
    w / 2 -+ step / 4 (the paper's quantization-aware splitting), so that their roundings do not err twice the same
    way. Only where the pair's layers have no groups and no operator between names the number of channels. The same
    function in float. Parameters are replaced by larger ones, so the graph's recorded shapes (meta["val"]) are those
    from before: equalize first.
    """
    if not 0 < share <= 1:
        raise BadConfig(f"split_outliers: share is {share}.", "Give a number over 0, up to 1.")
    fit = (p for p in pairs(graph) if p.first.groups == p.second.groups == 1 and not p.literal)
    return tuple(_split(graph, pair, share, bits) for pair in fit)


def _split(graph: GraphModule, pair: Pair, share: float, bits: int | None) -> Split:
    stored = graphs.parameter(graph, pair.second.weight).detach()
    blocks = by_channel(stored, pair.second)[0]
    columns = blocks.reshape(blocks.shape[0], -1, pair.repeat * blocks.shape[2])
    chosen: list[int] = []
    for _ in range(math.ceil(share * columns.shape[1])):
        worst = int(columns.abs().amax((0, 2)).argmax())
        columns = _halved(columns, worst, bits)
        chosen.append(worst)
    blocks = columns.reshape(1, blocks.shape[0], -1, blocks.shape[2])
    replace(graph, pair.second.weight, as_stored(blocks, stored, pair.second))
    _double_outputs(graph, pair.first, chosen)
    return Split(pair.first.name, pair.second.name, tuple(chosen))


def _halved(columns: Tensor, channel: int, bits: int | None) -> Tensor:
    """(outputs, inputs, rest) with input `channel` in two halves, the second at the end."""
    whole = columns[:, channel : channel + 1]
    limit = columns.abs().amax((1, 2), keepdim=True)
    quarter = limit / (2 ** (bits - 1) - 1) / 4 if bits else torch.zeros_like(limit)
    quarter = torch.where(whole == 0, 0.0, quarter)
    first = whole / 2 - quarter
    return torch.cat([columns[:, :channel], first, columns[:, channel + 1 :], whole - first], 1)


def _double_outputs(graph: GraphModule, layer: Layer, channels: list[int]) -> None:
    stored = graphs.parameter(graph, layer.weight).detach()
    order = list(range(stored.shape[layer.axis]))
    for channel in channels:
        order.append(order[channel])
    replace(graph, layer.weight, stored.index_select(layer.axis, torch.tensor(order)))
    if layer.bias:
        replace(graph, layer.bias, graphs.parameter(graph, layer.bias).detach()[order])


def replace(graph: GraphModule, name: str, value: Tensor) -> None:
    """Put a tensor of another shape where an attribute was."""
    path, _, leaf = name.rpartition(".")
    old = graphs.parameter(graph, name)
    value = value.to(old.dtype).contiguous().clone()
    setattr(graph.get_submodule(path), leaf, nn.Parameter(value, old.requires_grad) if _is_parameter(old) else value)


def _is_parameter(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter)


@torch.no_grad()
def clip_outliers(graph: GraphModule, bits: int = 8, percent: float | None = None) -> tuple[Clipped, ...]:
    """Clip each layer's weights to one limit; output channels that stay inside are untouched. Not exact in float.

    The limit is the `percent` percentile of |weight|, or without it the one of least squared error at `bits`
    (Banner et al., 2019, "Post training 4-bit quantization"). For targets with one weight scale a layer.
    """
    if percent is not None and not 0 < percent <= 100:
        raise BadConfig(f"clip_outliers: percent is {percent}.", "Give a number over 0, up to 100.")
    return tuple(_clipped(graph, bits, percent))


def _clipped(graph: GraphModule, bits: int, percent: float | None) -> Iterator[Clipped]:
    for layer in graphs.layers(graph):
        weight = graphs.parameter(graph, layer.weight).detach()
        limit = _limit(weight, bits, percent)
        beyond = (by_channel(weight, layer).abs().amax((2, 3)).flatten() > limit).nonzero().flatten()
        if len(beyond) and limit > 0:
            graphs.overwrite(graph, layer.weight, weight.clamp(-limit, limit))
            yield Clipped(layer.name, limit, tuple(beyond.tolist()))


def _limit(weight: Tensor, bits: int, percent: float | None) -> float:
    sizes = weight.abs().flatten().double()
    if percent is not None:
        rank = max(math.ceil(percent / 100 * sizes.numel()), 1)
        return float(sizes.kthvalue(rank).values)
    both = Histogram()
    both.add(torch.cat([weight.flatten(), -weight.flatten()]))
    reach = 2 ** (bits - 1) - 1
    return max(abs(end) for end in least_squares(both, Grid(-reach, reach, symmetric=True)))
