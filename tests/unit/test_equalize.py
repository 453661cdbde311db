"""Equalization and splitting leave the network as it was, and the paper's fixed points are reached."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.errors import BadConfig, BadData
from lighten.quant import graph as graphs
from lighten.quant.equalize import (
    LIMITS,
    Pair,
    clip_outliers,
    cross_layer,
    pairs,
    split_outliers,
    watch,
)
from lighten.quant.plan import calibrate, convert, prepare
from lighten.types import Device, Precision
from nets import SHAPE, calibration, images, net

torch.set_num_threads(1)
PLAIN = Device("plain", "plain", "plain", ("onnx",))
INT8 = Precision("int8", "int8")


class Odd(nn.Module):
    """Grouped, depthwise, transposed (grouped too), leaky, pooled, padded and flattened: all that a scale passes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, groups=4, bias=False)
        self.c = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2)
        self.d, self.e = nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.f, self.g = nn.Linear(6 * 4, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.a(x).relu(), 2)
        x = self.c(nn.functional.leaky_relu(self.b(x)))
        x = self.d(nn.functional.pad(x.clamp(-30, 30), (1, 0, 1, 0)))
        x = nn.functional.adaptive_avg_pool2d(self.e(x.clamp(min=0)), 2)
        return self.g(torch.dropout(nn.functional.relu(self.f(torch.flatten(x, 1))), 0.1, False))


class Chain(nn.Module):
    """1x1 convolutions with channels of very different sizes, `between` after each but the last."""

    def __init__(self, between: type[nn.Module] = nn.ReLU, depthwise: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.three = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1)
        self.two = nn.Conv2d(6, 6, 3, groups=6) if depthwise else nn.Identity()
        self.act = between()
        with torch.no_grad():
            size = torch.tensor([0.4, 0.6, 1.0, 1.0, 3.0, 12.0])
            self.one.weight.mul_(size.view(-1, 1, 1, 1))
            self.one.bias.mul_(size)
            self.three.weight.div_(size.view(1, -1, 1, 1))  # small channels count as much as large ones

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.two(self.act(self.one(x))) if isinstance(self.two, nn.Conv2d) else self.one(x))
        return self.three(x)


def double(model: nn.Module) -> torch.fx.GraphModule:
    return graphs.fold(model.eval(), SHAPE).double()


def inputs(n: int = 32) -> list[Tensor]:
    return [x.double() for x in images(n, seed=5)[0].split(16)]


def weight(graph: torch.fx.GraphModule, name: str) -> np.ndarray:
    return graphs.parameter(graph, name).detach().numpy()


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval() if name == "odd" else net(name)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["small", "mobile", "odd"])
def test_the_network_computes_the_same(name: str, per_channel: bool) -> None:
    graph, x = double(model(name)), torch.cat(inputs())
    before = graph(x).detach()
    done = cross_layer(graph, inputs(), per_channel)
    assert done
    torch.testing.assert_close(graph(x).detach(), before, rtol=1e-10, atol=1e-10 * float(before.abs().max()))
    if not per_channel:
        assert max(d.largest / d.smallest for d in done) > 1.1, "nothing was moved"


def test_the_network_computes_the_same_in_float32() -> None:
    graph, x = graphs.fold(net("small"), SHAPE), images(32, seed=5)[0]
    before = graph(x).detach()
    cross_layer(graph, [x], False)
    torch.testing.assert_close(graph(x).detach(), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_every_kind_of_layer_makes_a_pair() -> None:
    found = pairs(double(Odd()))
    assert [(p.first.name, p.second.name) for p in found] == [*zip("abcdef", "bcdefg")]
    assert [p.repeat for p in found] == [1, 1, 1, 1, 4, 1]
    assert [p.clips for p in found] == [False, False, True, False, False, False]


def test_two_layers_meet_at_the_geometric_mean_of_their_ranges() -> None:
    graph = double(Chain())
    r1 = np.abs(weight(graph, "one.weight")).max((1, 2, 3))
    r2 = np.abs(weight(graph, "three.weight")).max((0, 2, 3))
    (done,) = cross_layer(graph, (), per_channel=False)
    np.testing.assert_allclose(done.scales, np.sqrt(r1 / r2), rtol=1e-9)
    np.testing.assert_allclose(np.abs(weight(graph, "one.weight")).max((1, 2, 3)), np.sqrt(r1 * r2), rtol=1e-9)
    np.testing.assert_allclose(np.abs(weight(graph, "three.weight")).max((0, 2, 3)), np.sqrt(r1 * r2), rtol=1e-9)
    assert done.smallest == min(done.scales)
    assert done.largest == max(done.scales)


def test_three_layers_meet_at_the_cube_root() -> None:
    graph = double(Chain(depthwise=True))

    def ranges() -> list[np.ndarray]:
        return [
            np.abs(weight(graph, "one.weight")).max((1, 2, 3)),
            np.abs(weight(graph, "two.weight")).max((1, 2, 3)),
            np.abs(weight(graph, "three.weight")).max((0, 2, 3)),
        ]

    wanted = np.prod(ranges(), axis=0) ** (1 / 3)
    cross_layer(graph, (), per_channel=False)
    for got in ranges():
        np.testing.assert_allclose(got, wanted, rtol=1e-3)


@pytest.mark.parametrize("per_channel", [False, True])
def test_relu6_clips_the_same_channels_at_the_same_values(per_channel: bool) -> None:
    graph, x = double(Chain(nn.ReLU6)), torch.cat(inputs())
    before = graph(x).detach()
    found = pairs(graph)
    (seen,) = watch(graph, found, inputs())
    clipped = (seen.highest >= 6).numpy()
    assert clipped.any()
    assert not clipped.all()
    (done,) = cross_layer(graph, inputs(), per_channel)
    scales = np.array(done.scales)
    assert (scales[clipped] == 1).all()
    assert (scales[~clipped] != 1).any()
    assert (seen.highest.numpy() / scales)[~clipped].max() < 6
    torch.testing.assert_close(graph(x).detach(), before, rtol=1e-10, atol=1e-10)


def test_a_depthwise_second_layer_gives_every_channel_the_whole_range() -> None:
    graph = double(Chain(depthwise=True))
    cross_layer(graph, inputs(), per_channel=True)
    reach = watch(graph, pairs(graph)[:1], inputs())[0].reach
    np.testing.assert_allclose(reach / reach.max(), 1, rtol=1e-9)


def test_per_channel_scales_lower_the_error_of_the_rounded_network() -> None:
    x = torch.cat(inputs()).float()

    def error(equalized: bool) -> float:
        graph = graphs.fold(Chain(depthwise=True).eval(), SHAPE)
        wanted = graph(x).detach()
        if equalized:
            cross_layer(graph, [x], per_channel=True)
        plan = prepare(graph, INT8, PLAIN)
        calibrate(plan, [x])
        return float((convert(plan).module(x) - wanted).square().mean())

    assert error(True) < 0.8 * error(False)


def test_dead_channels_stay_as_they_are_and_scales_are_bounded() -> None:
    odd = Chain()
    with torch.no_grad():
        odd.one.weight[1] = 0
        odd.one.bias[1] = 0
        odd.one.weight[2] *= 1e-9
        odd.one.bias[2] *= 1e-9
        odd.three.weight[:, 3] = 0
    for per_channel in (False, True):
        (done,) = cross_layer(double(copy.deepcopy(odd)), inputs(), per_channel)
        assert done.scales[1] == done.scales[3] == 1
        assert done.smallest >= LIMITS[0]
        assert done.largest <= LIMITS[1]


class Hindered(nn.Module):
    """Nothing here can be scaled: two readers, a curve, a clip from 1, a mean over channels, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.d, self.e, self.f = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(16, 16)
        self.g, self.tied = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)
        self.h = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = nn.functional.silu(self.b(x) + x)
        x = nn.functional.hardswish(self.c(x))
        x = self.d(x).clamp(1, 5)
        x = self.f(self.e(x))  # along the width, not the channels
        x = self.g(x.mean(1, keepdim=True))
        x = self.tied(torch.relu(self.tied(x)))
        return self.h(torch.relu(x)).mean((2, 3))


def test_what_cannot_be_scaled_makes_no_pair() -> None:
    graph = double(Hindered())
    assert pairs(graph) == ()
    assert cross_layer(graph, (), per_channel=True) == ()


def test_images_that_are_missing_or_broken_are_refused() -> None:
    graph = double(Chain(nn.ReLU6))
    with pytest.raises(BadData, match="no calibration images"):
        cross_layer(graph, (), per_channel=False)
    with pytest.raises(BadData, match="NaN"):
        cross_layer(graph, [torch.full((2, *SHAPE), float("nan"), dtype=torch.float64)], per_channel=True)


# --- outliers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["mobile", "odd"])
def test_splitting_leaves_the_network_the_same(name: str, bits: int | None) -> None:
    graph, x = double(model(name)), torch.cat(inputs())
    before = graph(x).detach()
    assert split_outliers(graph, 0.1, bits)
    torch.testing.assert_close(graph(x).detach(), before, rtol=1e-10, atol=1e-10)


def test_the_channel_of_the_largest_weight_is_doubled_and_halved() -> None:
    graph = double(Chain())
    one, three = weight(graph, "one.weight").copy(), weight(graph, "three.weight").copy()
    three[3, 4], three[2, 1] = 8.0, 5.0
    graphs.overwrite(graph, "three.weight", torch.from_numpy(three))
    (done,) = split_outliers(graph, 0.5)  # 3 of 6: 8 -> 4 + 4, 5 -> 2.5 + 2.5, 4 -> 2 + 2
    assert done.channels == (4, 1, 4)
    got = weight(graph, "three.weight")[:, :, 0, 0]
    order = [0, 1, 2, 3, 4, 5, 4, 1, 4]
    wanted = three[:, order, 0, 0] * np.array([1, 0.5, 1, 1, 0.25, 1, 0.5, 0.5, 0.25])
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(weight(graph, "one.weight"), one[order])


def test_halves_for_a_grid_round_to_what_the_whole_rounds_to() -> None:
    """floor(w + 1/2) = floor((w - 1/2) / 2 + 1/2) + floor((w + 1/2) / 2 + 1/2): Hermite's identity, in steps."""
    graph = double(Chain())
    three = weight(graph, "three.weight").copy() * 0.1
    three[0, 0], three[:, 5] = 0.0, np.array([0.61, -0.37, 0.25, 0.9, 0.444])[:, None, None]
    graphs.overwrite(graph, "three.weight", torch.from_numpy(three))
    (done,) = split_outliers(graph, 0.01, bits=4)
    assert done.channels == (5,)
    got, step = weight(graph, "three.weight"), np.abs(three).max((1, 2, 3)) / 7
    halves = [np.floor(got[:, k, 0, 0] / step + 0.5) for k in (5, 6)]
    np.testing.assert_array_equal(halves[0] + halves[1], np.floor(three[:, 5, 0, 0] / step + 0.5))


@pytest.mark.parametrize("name", ["mobile", "odd"])
def test_a_split_network_goes_to_the_runtime(name: str, tmp_path: Path) -> None:
    from lighten.formats import onnx as fmt

    graph = graphs.fold(model(name), SHAPE)
    done = split_outliers(graph, 0.1, bits=8)
    shapes = {x.name: tuple(graphs.parameter(graph, x.weight).shape) for x in graphs.layers(graph)}
    plan = prepare(graph, INT8, PLAIN)
    calibrate(plan, calibration())
    module = convert(plan).module
    fmt.export(module, SHAPE, tmp_path / "split.onnx", INT8, PLAIN)
    stored = {w.shape for w in fmt.weights(tmp_path / "split.onnx") if w.dtype == "int8"}
    assert {shapes[name] for d in done for name in (d.first, d.second)} <= stored
    x = images(16, seed=9)[0]
    got, wanted = fmt.load(tmp_path / "split.onnx", 1)(x.numpy()), module(x).detach().numpy()
    assert done
    assert np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.9995


def test_weights_are_clipped_at_the_percentile_asked_for() -> None:
    graph = double(Chain())
    before = {p: weight(graph, f"{p}.weight").copy() for p in ("one", "three")}
    done = {c.layer: c for c in clip_outliers(graph, percent=90)}
    for name, old in before.items():
        sizes = np.sort(np.abs(old).ravel())
        limit = sizes[int(np.ceil(0.9 * len(sizes))) - 1]
        assert done[name].limit == limit
        np.testing.assert_array_equal(weight(graph, f"{name}.weight"), old.clip(-limit, limit))
        assert done[name].channels == tuple(np.flatnonzero(np.abs(old).max((1, 2, 3)) > limit))


def test_weights_are_clipped_where_that_lowers_the_rounding_error() -> None:
    graph = double(Chain())
    w = np.random.default_rng(0).normal(size=(6, 3, 1, 1))
    w[5, 0] = 9.0  # one weight takes most of the grid
    graphs.overwrite(graph, "one.weight", torch.from_numpy(w))
    clip_outliers(graph, bits=4)

    def error(limit: float) -> float:
        step = limit / 7
        return float(((np.rint(w / step).clip(-7, 7) * step - w) ** 2).sum())

    limit = float(np.abs(weight(graph, "one.weight")).max())
    best = min(error(v) for v in np.linspace(0.5, 9, 500))
    assert limit < 9
    assert error(limit) < error(9.0)
    assert error(limit) < 1.15 * best


def test_settings_out_of_range_are_refused() -> None:
    graph = double(Chain())
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(BadConfig):
            split_outliers(graph, share)
    for percent in (0, 101):
        with pytest.raises(BadConfig):
            clip_outliers(graph, percent=percent)


def test_a_pair_knows_its_clip() -> None:
    (pair,) = pairs(double(Chain(nn.ReLU6)))
    assert isinstance(pair, Pair)
    assert (pair.lo, pair.hi, pair.clips) == (0.0, 6.0, True)
