"""Corrections against numpy by hand, and through `convert`: what ships carries them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from lighten.errors import BadData
from lighten.quant import graph as graphs
from lighten.quant.bias import (
    Corrected,
    clipped_normal_mean,
    correct_analytic,
    correct_empirical,
    moments,
    normal_mean,
    reestimate,
)
from lighten.quant.equalize import cross_layer, scale_outputs
from lighten.quant.plan import Plan, calibrate, convert, prepare
from lighten.types import Device, Precision
from nets import SHAPE, calibration, images, net

torch.set_num_threads(1)
PLAIN = Device("plain", "plain", "plain", ("onnx",))
PER_TENSOR = replace(PLAIN, per_channel_weights=False)
W8, W4 = Precision("int8", "int8"), Precision("int4", "int8")
Correct = Callable[..., tuple[Corrected, ...]]


def planned(model: nn.Module, precision: Precision = W4, device: Device = PLAIN) -> Plan:
    plan = prepare(graphs.fold(copy.deepcopy(model).eval(), SHAPE), precision, device)
    calibrate(plan, calibration())
    return plan


def outputs(graph: GraphModule, x: Tensor) -> dict[str, np.ndarray]:
    """Every layer's output by node name, channels last, float64: (values, C)."""

    class Keep(Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            got = super().run_node(n)
            if n.name.startswith(("conv", "linear")) and isinstance(got, Tensor):
                kept[n.name] = got.detach().movedim(1, -1).flatten(0, -2).double().numpy()
            return got

    kept: dict[str, np.ndarray] = {}
    Keep(graph).run(x)
    return kept


def integers(plan: Plan) -> list[np.ndarray]:
    module = convert(plan).module
    return [v.numpy() for k, v in module.state_dict().items() if "frozen" in k]


class Pointwise(nn.Module):
    """One linear layer without a bias and without anything else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fc = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[:, :, :2, :2].flatten(1))


def rounded(x: np.ndarray, scale: np.ndarray, zero: int, lo: int, hi: int) -> np.ndarray:
    return ((np.rint(x / scale) + zero).clip(lo, hi) - zero) * scale


def by_hand(plan: Plan, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of Pointwise in numpy, float and rounded: (images, 5)."""
    (layer,) = plan.layers
    w = graphs.parameter(plan.graph, layer.weight).detach().double().numpy()
    source, weight = graphs.input_observer(plan.graph, layer), graphs.weight_observer(plan.graph, layer)
    assert source is not None
    assert weight is not None
    (sx, zx), (sw, _) = source.calculate_qparams(), weight.calculate_qparams()
    flat = x[:, :, :2, :2].flatten(1).double().numpy()
    xq = rounded(flat, sx.double().numpy(), int(zx), -128, 127)
    return flat @ w.T, xq @ rounded(w, sw.double().numpy()[:, None], 0, -7, 7).T


def test_a_layer_without_a_bias_gets_the_one_that_numpy_finds() -> None:
    plan, x = planned(Pointwise()), images(40, seed=8)[0]
    real, quantized = by_hand(plan, x)
    (done,) = correct_empirical(plan, x.split(16))
    bias = graphs.parameter(plan.graph, plan.layers[0].bias or "").detach().numpy()
    np.testing.assert_allclose(bias, (real - quantized).mean(0), atol=1e-6)
    assert done.shift == pytest.approx(np.abs((real - quantized).mean(0)).max(), abs=1e-6)
    got = convert(plan).module(x).detach().numpy()
    np.testing.assert_allclose(got, quantized + bias, atol=1e-5)


def test_gain_and_shift_are_those_that_numpy_finds() -> None:
    plan, x = planned(Pointwise()), images(40, seed=8)[0]
    real, quantized = by_hand(plan, x)
    reestimate(plan, x.split(16))
    gain = real.std(0) / quantized.std(0)
    wanted = gain * quantized + real.mean(0) - gain * quantized.mean(0)
    got = convert(plan).module(x).detach().double().numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(got.mean(0), real.mean(0), atol=1e-6)
    np.testing.assert_allclose(got.std(0), real.std(0), rtol=1e-5)


@pytest.mark.parametrize("correct", [correct_empirical, reestimate])
@pytest.mark.parametrize("device", [PLAIN, PER_TENSOR])
@pytest.mark.parametrize("name", ["small", "mobile"])
def test_what_is_converted_has_the_means_of_the_float_network(name: str, device: Device, correct: Correct) -> None:
    model, x = net(name), torch.cat(calibration())
    real = outputs(graphs.fold(model, SHAPE), x)

    def worst(plan: Plan) -> float:
        got = outputs(convert(plan).module, x)
        assert got.keys() == real.keys()
        return max(float(np.abs(got[k].mean(0) - real[k].mean(0)).max() / real[k].std()) for k in real)

    plan = planned(model, device=device)
    done = correct(plan, calibration(), active=False)
    assert len(done) == len(real)
    assert worst(planned(model, device=device)) > 0.05
    assert worst(plan) < 1e-3


def test_spreads_are_matched_and_integers_stay() -> None:
    model, x = net("small"), torch.cat(calibration())
    real = outputs(graphs.fold(model, SHAPE), x)
    plan = planned(model)
    done = reestimate(plan, calibration(), active=False)
    assert any(d.gains[1] > 1.01 for d in done)
    before, after = integers(planned(model)), integers(plan)
    assert len(before) == len(after) == 7
    assert all(np.array_equal(a, b) for a, b in zip(before, after))

    plan = planned(model)
    reestimate(plan, calibration(), active=False)
    got = outputs(convert(plan).module, x)
    for name, values in real.items():
        live = values.std(0) > 1e-3 * values.std(0).max()
        np.testing.assert_allclose(got[name].std(0)[live], values.std(0)[live], rtol=1e-3)


def test_one_scale_a_layer_gets_no_gain() -> None:
    for device in (PER_TENSOR, replace(PLAIN, power_of_two_scales=True)):
        assert {d.gains for d in reestimate(planned(net("small"), device=device), calibration())} == {(1.0, 1.0)}


def test_dead_channels_get_no_gain_and_gains_are_bounded() -> None:
    model = Pointwise()
    with torch.no_grad():
        model.fc.weight[1] = 0
        model.fc.weight[2] = torch.tensor([1.0] + [0.07] * 11)  # 4 bits keep the first alone
        model.fc.weight[3] *= 1e-7
    plan = planned(model, Precision("int4", "int8"))
    found = graphs.weight_observer(plan.graph, plan.layers[0])
    assert found is not None
    before = found.calculate_qparams()[0].clone()
    reestimate(plan, calibration())
    gains = (found.calculate_qparams()[0] / before).numpy()
    assert gains[1] == gains[3] == 1
    assert 0.5 <= gains.min() <= gains.max() <= 2
    assert np.isfinite(convert(plan).module(images(4)[0]).detach().numpy()).all()


def test_shared_weights_keep_their_scale_and_each_layer_gets_its_own_bias() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.twice = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(self.stem(x).relu()).relu()).mean((2, 3))

    plan, x = planned(Tied()), torch.cat(calibration())
    real = outputs(graphs.fold(Tied().eval(), SHAPE), x)
    done = reestimate(plan, calibration(), active=False)
    assert [d.gains == (1.0, 1.0) for d in done] == [False, True, True]
    assert len({layer.bias for layer in plan.layers}) == 3
    got = outputs(convert(plan).module, x)
    for name in real:
        np.testing.assert_allclose(got[name].mean(0), real[name].mean(0), atol=1e-3 * real[name].std())


def test_what_a_clip_lets_through_has_the_mean_of_the_float_network() -> None:
    model, x = net("small"), torch.cat(calibration())
    real = outputs(graphs.fold(model, SHAPE), x)

    def worst(plan: Plan) -> float:
        got, errors = outputs(convert(plan).module, x), []
        for name, hi in (("conv2d", np.inf), ("conv2d_2", 6), ("conv2d_3", 6), ("conv2d_4", np.inf)):
            kept = (real[name] > 0) & (real[name] < hi)
            error = ((got[name] - real[name]) * kept).sum(0) / kept.sum(0).clip(1)
            errors.append(np.abs(error).max() / real[name].std())
        return float(max(errors))

    plan = planned(model)
    correct_empirical(plan, calibration(), active=True)
    assert worst(plan) < 1e-3 < 0.05 < worst(planned(model))


@pytest.mark.parametrize("correct", [correct_empirical, reestimate])
def test_the_file_in_its_runtime_carries_the_correction(correct: Correct, tmp_path: Path) -> None:
    from lighten.formats import onnx as fmt

    x = torch.cat(calibration())
    with torch.inference_mode():
        real = net("small")(x).numpy()

    def error(plan: Plan, file: Path) -> float:
        fmt.export(convert(plan).module, SHAPE, file, W8, PLAIN)
        return float(np.abs((fmt.load(file, 1)(x.numpy()) - real).mean(0)).max())

    plan = planned(net("small"))
    correct(plan, calibration())
    assert error(plan, tmp_path / "b.onnx") < 0.1 * error(planned(net("small")), tmp_path / "a.onnx")


def test_observers_are_left_as_they_were() -> None:
    plan = planned(net("small"))
    every = graphs.observers(plan.graph)
    every[0].stand_in = kept = nn.Identity()
    correct_empirical(plan, calibration())
    assert every[0].stand_in is kept
    assert all(o.stand_in is None for o in every[1:])


@pytest.mark.parametrize("correct", [correct_empirical, reestimate])
def test_images_that_are_missing_or_broken_are_refused(correct: Correct) -> None:
    plan = planned(Pointwise())
    with pytest.raises(BadData, match="no calibration images"):
        correct(plan, [])
    with pytest.raises(BadData, match="NaN"):
        correct(plan, [torch.full((2, *SHAPE), float("nan"))])


def test_moments_are_those_of_numpy() -> None:
    parts = [torch.randn(n, 5, 3, generator=torch.Generator().manual_seed(n)) * 1e-3 + 100 for n in (4, 9)]
    whole = torch.cat(parts).double().numpy()
    got = moments(parts, 1, [torch.ones_like(p) for p in parts])
    np.testing.assert_allclose(got.mean, whole.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(got.std, whole.std((0, 2)), rtol=1e-9)
    some = moments(parts, 1, [p > 100 for p in parts])
    chosen = [whole[:, c][whole[:, c] > 100] for c in range(5)]
    np.testing.assert_allclose(some.mean, [c.mean() for c in chosen], rtol=1e-12)
    np.testing.assert_allclose(some.std, [c.std() for c in chosen], rtol=1e-9)
    assert moments(parts, 1, [torch.zeros_like(p) for p in parts]).mean.tolist() == [0] * 5


# --- without images -----------------------------------------------------------------------------------


def integrated(f: Callable[[np.ndarray], np.ndarray], mean: float, std: float) -> float:
    """E[f(x)] for normal x by the trapezoid rule."""
    x = np.linspace(mean - 12 * std, mean + 12 * std, 400_001)
    p = np.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi))
    return float(np.trapezoid(f(x) * p, x))


@pytest.mark.parametrize("lo, hi", [(0, np.inf), (0, 6), (-1, 1), (-np.inf, 2), (-np.inf, np.inf)])
def test_the_mean_of_a_clipped_normal_is_its_integral(lo: float, hi: float) -> None:
    cases = [(0.0, 1.0), (-3.0, 0.5), (5.0, 2.0), (1.0, 10.0), (30.0, 0.01), (-30.0, 0.01)]
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in zip(*cases))
    wanted = [integrated(lambda x: np.clip(x, lo, hi), m, s) for m, s in cases]
    np.testing.assert_allclose(clipped_normal_mean(mean, std, lo, hi), wanted, rtol=1e-7, atol=1e-9)


def test_a_constant_channel_has_the_clip_of_its_mean() -> None:
    mean, std = torch.tensor([-1.0, 3.0, 9.0]), torch.zeros(3)
    assert clipped_normal_mean(mean, std, 0, 6).tolist() == [0, 3, 6]


def test_other_activations_are_integrated() -> None:
    mean, std = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([1.0, 2.0, 0.1])
    wanted = [integrated(lambda x: x * np.clip(x + 3, 0, 6) / 6, float(m), float(s)) for m, s in zip(mean, std)]
    np.testing.assert_allclose(normal_mean(nn.functional.hardswish, mean, std), wanted, rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    """conv-bn-relu6, then what is corrected: grouped, and a linear layer behind a pool that has no batch norm before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.two, self.fc = nn.Conv2d(6, 4, 3, groups=2), nn.Linear(4, 3)
        nn.init.normal_(self.bn.weight, 1, 1)
        nn.init.normal_(self.bn.bias, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(nn.functional.relu6(self.bn(self.one(x))))
        return self.fc(x.relu().mean((2, 3)))


def test_the_analytic_correction_is_the_papers_by_hand() -> None:
    model = Two().eval()
    plan = planned(model)
    layer = plan.layers[1]
    found = graphs.weight_observer(plan.graph, layer)
    assert found is not None
    w = model.two.weight.detach().double().numpy()
    scale = found.calculate_qparams()[0].double().numpy()[:, None, None, None]
    error = (rounded(w, scale, 0, -7, 7) - w).sum((2, 3))
    beta, gamma = model.bn.bias.tolist(), model.bn.weight.abs().tolist()
    mean = np.array([integrated(lambda x: np.clip(x, 0, 6), b, g) for b, g in zip(beta, gamma)])
    shift = np.concatenate([error[:2] @ mean[:3], error[2:] @ mean[3:]])
    done = correct_analytic(plan, model)
    got = graphs.parameter(plan.graph, layer.bias or "").detach().numpy()
    np.testing.assert_allclose(got, model.two.bias.detach().numpy() - shift, atol=1e-6)
    assert [bool(d.reason) for d in done] == [True, False, True]


def test_equalized_channels_have_their_mean_divided_too() -> None:
    model = Two().eval()
    with torch.no_grad():
        model.bn.bias.clamp_(max=2)  # so that ReLU6 leaves channels to scale
        model.bn.weight.clamp_(-1, 1)
    graph = graphs.fold(copy.deepcopy(model), SHAPE)
    done = cross_layer(graph, calibration(), per_channel=False)
    scales = np.array(done[0].scales)
    assert scales.max() / scales.min() > 1.2
    plan = prepare(graph, W4, PLAIN)
    calibrate(plan, calibration())
    layer = plan.layers[1]
    found = graphs.weight_observer(plan.graph, layer)
    assert found is not None
    w, before = (
        graphs.parameter(plan.graph, n or "").detach().double().numpy().copy() for n in (layer.weight, layer.bias)
    )
    error = (rounded(w, found.calculate_qparams()[0].double().numpy()[:, None, None, None], 0, -7, 7) - w).sum((2, 3))
    moved = zip(np.array(model.bn.bias.tolist()) / scales, np.abs(model.bn.weight.tolist()) / scales)
    mean = np.array([integrated(lambda x: np.clip(x, 0, 6), m, s) for m, s in moved])
    correct_analytic(plan, model, done)
    wanted = before - np.concatenate([error[:2] @ mean[:3], error[2:] @ mean[3:]])
    np.testing.assert_allclose(graphs.parameter(plan.graph, layer.bias or "").detach().numpy(), wanted, atol=1e-6)


def test_batch_norms_that_tell_the_truth_bring_the_mean_back() -> None:
    """Outputs of `one` really are normal with the batch norm's moments, so the mean error must all but vanish."""

    class Gaussian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.one, self.bn = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, affine=True)
            self.two, self.skip, self.three = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
            nn.init.uniform_(self.bn.weight, 0.5, 2)
            nn.init.normal_(self.bn.bias, 0, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.bn(self.one(x)).relu()).mean((2, 3))

    x = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(0))
    model = Gaussian()
    with torch.no_grad():
        variance = model.one.weight.square().sum((1, 2, 3))
        model.bn.running_var.copy_(variance)
    model.eval()

    def error(correct: bool) -> float:
        plan = prepare(graphs.fold(copy.deepcopy(model), SHAPE), Precision("int4", "float32"), PLAIN)
        calibrate(plan, [x])
        if correct:
            # The first layer's own error is not the second's: leave it float.
            correct_analytic(plan, model)
        layer = plan.layers[1]
        found = graphs.weight_observer(plan.graph, layer)
        assert found is not None
        w = found.rounding()(graphs.parameter(plan.graph, layer.weight).detach())
        seen = model.bn(model.one(x)).relu()
        got = nn.functional.conv2d(seen, w, graphs.parameter(plan.graph, layer.bias or ""))
        return float((got - model.two(seen)).mean((0, 2, 3)).detach().abs().max())

    assert error(True) < 0.05 * error(False)


def test_layers_whose_input_is_not_known_are_named_with_the_reason() -> None:
    plan = planned(net("small"))
    before = {n: p.clone() for n, p in plan.graph.named_parameters()}
    done = {d.layer: d.reason for d in correct_analytic(plan, net("small"))}
    assert list(done) == ["stem.0", "inner.0", "depthwise.0", "left.0", "right.0", "skip", "fc"]
    assert [name for name, reason in done.items() if not reason] == ["inner.0", "left.0", "right.0", "skip"]
    assert all("not known" in done[name] for name in ("stem.0", "depthwise.0", "fc"))
    for name in ("stem.0.weight_bias", "depthwise.0.weight_bias", "fc.bias", "left.0.weight"):
        assert torch.equal(before[name], dict(plan.graph.named_parameters())[name])


def test_float_layers_are_not_corrected_without_images() -> None:
    precision = Precision("int4", "int8", (("left.0", "float32", "float32"),))
    done = {d.layer: d.reason for d in correct_analytic(planned(net("small"), precision), net("small"))}
    assert "not rounded" in done["left.0"]


def test_outputs_of_a_scaled_weight_are_scaled() -> None:
    """scale_outputs, which re-estimation stands on, for a grouped transposed convolution."""
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
    graph = graphs.fold(nn.Sequential(nn.Conv2d(3, 6, 1), layer).eval(), SHAPE)
    x, factor = images(3)[0], torch.tensor([2.0, -1.0, 0.5, 3.0])
    before, mine = graph(x), graphs.layers(graph)[1]
    stored = copy.deepcopy(graphs.parameter(graph, mine.weight).detach())
    graphs.overwrite(graph, mine.weight, scale_outputs(stored, mine, factor))
    torch.testing.assert_close(graph(x), before * factor.view(1, -1, 1, 1), rtol=1e-4, atol=1e-5)
