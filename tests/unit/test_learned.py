"""Learned step sizes against the equations of the LSQ paper, written out in numpy float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.quant import graph as graphs
from lighten.quant.graph import fold
from lighten.quant.learned import LearnedScale, LearnedWeightScale, Trainable, learn, settle
from lighten.quant.observers import ActivationObserver
from lighten.quant.plan import Plan, calibrate, convert, prepare
from lighten.quant.ranges import Grid
from lighten.types import Device, Precision
from nets import SHAPE, calibration, images, net

torch.set_num_threads(1)
PLAIN = Device("plain", "plain", "plain", ("onnx",))
FOUR = Precision("int4", "int4", (("stem.0", "int8", "int8"), ("fc", "int8", "int8")))
SIGNED, UNSIGNED = Grid(-7, 7, symmetric=True), Grid(-8, 7)


def paper(v: np.ndarray, s: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eqs. 1-2, 3 and 5: the value, its derivative by s and by v."""
    steps = v / s
    inside = (steps > low) & (steps < high)
    value = np.clip(np.rint(steps), low, high) * s
    by_s = np.where(inside, np.rint(steps) - steps, np.where(steps <= low, low, high))
    return value, by_s, inside.astype(float)


def one(value: float) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize("zero", [-8, -3, 0, 7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradients_of_an_activation_are_those_of_the_paper(zero: int, layout: torch.memory_format) -> None:
    dice = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 6, 7, 3, generator=dice) * 2).to(memory_format=layout).requires_grad_()
    weight = torch.randn(5, 6, 7, 3, generator=dice)
    learned = LearnedScale(one(0.31), torch.tensor([zero]), UNSIGNED)
    out = learned(x)
    (out * weight).sum().backward()
    low, high = -8 - zero, 7 - zero
    value, by_s, by_v = paper(x.detach().double().numpy(), np.float64(np.float32(0.31)), low, high)
    g = 1 / np.sqrt(6 * 7 * 3 * max(high, -low))
    np.testing.assert_allclose(out.detach().numpy(), value, rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), weight.numpy() * by_v)  # type: ignore[union-attr]
    want = float((weight.double().numpy() * by_s).sum() * g * np.float32(0.31))  # by the ratio: ds / dratio = start
    assert float(learned.ratio.grad) == pytest.approx(want, rel=1e-4, abs=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradients_of_a_weight_are_those_of_the_paper(axis: int | None, layout: torch.memory_format) -> None:
    """Channels a thousandfold apart; stored in units of another scale than the one they start at."""
    dice = torch.Generator().manual_seed(1)
    shape = (4, 5, 3, 2)
    channels = 1 if axis is None else shape[axis]
    view = [-1 if d == axis else 1 for d in range(4)]
    sizes = torch.logspace(-2, 1, channels).view(view if axis is not None else [1])
    w, weight = torch.randn(shape, generator=dice) * sizes, torch.randn(shape, generator=dice)
    scale, unit = sizes.reshape(-1) * 0.21, sizes.reshape(-1) * 0.5
    spread = (lambda t: t.view(view)) if axis is not None else (lambda t: t)
    stored = (w / spread(unit)).to(memory_format=layout).requires_grad_()
    learned = LearnedWeightScale(scale, torch.zeros(channels, dtype=torch.int64), SIGNED, axis, unit)
    out = learned(stored)
    (out * weight).sum().backward()
    s = spread(scale).double().numpy()
    value, by_s, by_v = paper(stored.detach().double().numpy() * spread(unit).double().numpy(), s, -7, 7)
    kept = None if axis is None else tuple(d for d in range(4) if d != axis)
    g = 1 / np.sqrt(w.numel() / channels * 7)
    np.testing.assert_allclose(out.detach().numpy(), value, rtol=2e-6)
    want = (weight.double().numpy() * by_s).sum(kept) * g * scale.double().numpy()
    np.testing.assert_allclose(learned.ratio.grad.numpy().reshape(-1), want.reshape(-1), rtol=1e-4)  # type: ignore[union-attr]
    by_stored = weight.double().numpy() * by_v * spread(unit).double().numpy()
    np.testing.assert_allclose(stored.grad.numpy(), by_stored, rtol=1e-5)  # type: ignore[union-attr]


def test_by_hand() -> None:
    """Step 2, levels 0 to 3: eq. 3 gives 0 below (low is 0), 1 - 0.8, 2 - 2.2, 3 above."""
    learned = LearnedScale(one(2.0), torch.tensor([0]), Grid(0, 3))
    x = torch.tensor([[-1.0, 1.6, 4.4, 9.0]], requires_grad=True)
    out = learned(x)
    assert out.tolist() == [[0.0, 2.0, 4.0, 6.0]]
    out.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]  # type: ignore[union-attr]
    g = 1 / (4 * 3) ** 0.5
    assert float(learned.ratio.grad) == pytest.approx((0 + 0.2 - 0.2 + 3) * g * 2)  # type: ignore[arg-type]


def test_what_is_rounded_already_is_left_alone_and_passes_its_gradient() -> None:
    learned = LearnedScale(one(0.37), torch.tensor([-8]), UNSIGNED)
    x = learned(torch.randn(1000) * 3).detach().requires_grad_()
    again = learned(x)
    again.sum().backward()
    np.testing.assert_allclose(again.detach().numpy(), x.detach().numpy(), rtol=1e-6)
    assert bool((x.grad == 1).all())  # type: ignore[union-attr]
    assert float(learned.ratio.grad) == pytest.approx(0, abs=0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [-3.0, 0.0, 1e-9])
def test_a_scale_stays_positive_whatever_the_optimizer_does(ratio: float) -> None:
    learned = LearnedScale(one(0.5), torch.tensor([0]), SIGNED)
    with torch.no_grad():
        learned.ratio.fill_(ratio)
    assert bool((learned.scale > 0).all())
    assert torch.isfinite(learned(torch.randn(9))).all()


def test_a_device_that_shifts_gets_powers_of_two_and_the_gradient_goes_through() -> None:
    learned = LearnedScale(one(0.25), torch.tensor([0]), Grid(-7, 7, symmetric=True, power_of_two=True))
    for ratio, want in ((1.0, 0.25), (1.3, 0.25), (1.5, 0.5), (0.6, 0.125)):
        with torch.no_grad():
            learned.ratio.fill_(ratio)
        assert float(learned.scale) == want
    learned.scale.sum().backward()
    assert float(learned.ratio.grad) == 0.25  # type: ignore[arg-type]


# --- in a graph -----------------------------------------------------------------------------------------


def planned(name: str = "small", precision: Precision = FOUR, model: nn.Module | None = None) -> Plan:
    plan = prepare(fold(net(name) if model is None else model, SHAPE), precision, PLAIN)
    calibrate(plan, calibration())
    return plan


def weights(plan: Plan) -> dict[str, Tensor]:
    return {x.name: graphs.parameter(plan.graph, x.weight).detach().clone() for x in plan.layers}


@pytest.mark.parametrize("name", ["small", "mobile"])
def test_before_the_first_step_it_answers_like_the_calibrated_network(name: str) -> None:
    plan, other = planned(name), planned(name)
    learn(plan.graph)
    for found in graphs.observers(other.graph):
        found.stand_in = found.rounding()
    x, _ = images(16, seed=8)
    with torch.no_grad():
        got, want = plan.graph(x), other.graph(x)
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_settling_without_a_step_gives_back_weights_and_scales() -> None:
    plan = planned()
    before, scales = weights(plan), [o.calculate_qparams() for o in graphs.observers(plan.graph)]
    learn(plan.graph)
    inside = weights(plan)
    assert all(float(v.abs().max()) < 200 for v in inside.values())  # in steps
    settle(plan.graph)
    after = weights(plan)
    for name in before:
        np.testing.assert_allclose(after[name].numpy(), before[name].numpy(), rtol=1e-5, atol=1e-8)
    for found, (scale, zero) in zip(graphs.observers(plan.graph), scales):
        assert found.stand_in is None
        np.testing.assert_allclose(found.calculate_qparams()[0].numpy(), scale.numpy(), rtol=1e-6)
        assert torch.equal(found.calculate_qparams()[1], zero)


def moved(plan: Plan) -> None:
    """Scales and weights as some training could leave them."""
    dice = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in plan.graph.named_parameters():
            by = torch.rand(p.shape, generator=dice)
            p.mul_(0.8 + 0.4 * by) if name.endswith("ratio") else p.add_(0.02 * (by - 0.5))


def test_what_was_learned_is_what_is_converted() -> None:
    plan = planned()
    learn(plan.graph)
    moved(plan)
    x, _ = images(16, seed=8)
    with torch.no_grad():
        want = plan.graph(x)
    learned = {id(o): o.stand_in.scale.detach() for o in graphs.observers(plan.graph)}  # type: ignore[union-attr, operator]
    settle(plan.graph)
    for found in graphs.observers(plan.graph):
        alive = learned[id(found)] > 1e-6  # a dead filter's scale makes room for its bias
        assert torch.equal(found.calculate_qparams()[0][alive], learned[id(found)][alive])
    done = convert(plan)
    with torch.no_grad():
        got = done.module(x)
    # A value within a rounding error of a tie may fall to the other side.
    assert (got - want).abs().median() < 1e-4
    assert (got.argmax(1) == want.argmax(1)).all()
    assert {r["range_method"] for r in done.layers} == {"learned"}
    assert all(np.isfinite(r["weight_sqnr_db"]) for r in done.layers)


def test_the_bias_of_a_dead_filter_still_fits_32_bits() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias.copy_(torch.tensor([0.1, 3.0, -2.0, 0.2]))
    plan = planned(precision=Precision("int8", "int8"), model=model)
    learn(plan.graph)
    with torch.no_grad():
        for name, p in plan.graph.named_parameters():
            p.mul_(0.01) if name.endswith("ratio") else None
    settle(plan.graph)
    for layer in plan.layers:
        source, weight = graphs.input_observer(plan.graph, layer), graphs.weight_observer(plan.graph, layer)
        assert source is not None
        assert weight is not None
        product = source.calculate_qparams()[0].double() * weight.calculate_qparams()[0].double()
        bias = graphs.parameter(plan.graph, str(layer.bias)).detach().double()
        assert float((bias.abs() / product).max()) < 2**31


def test_every_scale_and_every_weight_gets_a_gradient_and_a_copy_is_its_own() -> None:
    plan = planned("mobile")
    learn(plan.graph)
    student = Trainable(plan.graph)
    twin = copy.deepcopy(student)
    assert twin.train().eval() is twin
    x, _ = images(8, seed=3)
    twin(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in twin.parameters())
    assert sum(float(p.grad.abs().sum()) > 0 for p in twin.parameters()) > 0.9 * len(list(twin.parameters()))  # type: ignore[union-attr]
    assert all(p.grad is None for p in student.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
        assert not torch.allclose(student(x), twin(x))
    assert student.state_dict().keys() == twin.state_dict().keys()


# --- where four bits are ----------------------------------------------------------------------------------


def read_by(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """Levels of every rounding between a layer and what made its input, the nearest first."""
    found = {}
    for layer in plan.layers:
        node, chain = layer.node.args[0], []
        while isinstance(sits := graphs.observer(plan.graph, node), ActivationObserver):
            chain.append((sits.grid.qmin, sits.grid.qmax))
            node = node.args[0]  # type: ignore[union-attr]
        found[layer.name] = chain
    return found


NIBBLE, BYTE = (-8, 7), (-128, 127)


def test_only_a_tensor_that_something_reads_at_8_bits_is_made_at_8_bits() -> None:
    """stem is read by the residual add as well; left by two convolutions at 4 bits; depthwise's input comes through a
    pool; the skip and right outputs go to a concat."""
    assert read_by(planned()) == {
        "stem.0": [BYTE],
        "inner.0": [NIBBLE, BYTE],
        "depthwise.0": [NIBBLE],
        "left.0": [NIBBLE],
        "right.0": [NIBBLE],
        "skip": [NIBBLE],
        "fc": [BYTE],
    }


def test_a_pool_passes_four_bits_on() -> None:
    plan = planned()
    (pool,) = [n for n in plan.graph.graph.nodes if "max_pool2d" in str(n.target)]
    before, after = (graphs.observer(plan.graph, n) for n in (pool.args[0], next(iter(pool.users))))
    assert before is after
    assert (before.grid.qmin, before.grid.qmax) == NIBBLE  # type: ignore[union-attr]


def test_a_reader_that_stays_float_keeps_its_input_at_8_bits() -> None:
    kept = Precision("int4", "int4", (*FOUR.exceptions, ("skip", "float32", "float32")))
    assert read_by(planned(precision=kept))["right.0"] == [NIBBLE, BYTE]


@pytest.mark.parametrize("name", ["small", "mobile"])
@pytest.mark.parametrize("bits", ["int8/int8", "int4/int8"])
def test_nothing_is_at_4_bits_where_nothing_reads_at_4_bits(name: str, bits: str) -> None:
    plan = planned(name, Precision(*bits.split("/")))
    grids = {(o.grid.qmin, o.grid.qmax) for o in graphs.observers(plan.graph) if isinstance(o, ActivationObserver)}
    assert grids == {BYTE}


def test_an_8_bit_exception_inside_keeps_what_it_reads() -> None:
    kept = Precision("int4", "int4", (*FOUR.exceptions, ("left.0", "int8", "int8")))
    found = read_by(planned(precision=kept))
    assert found["left.0"] == [BYTE]
    assert found["right.0"] == [NIBBLE]
