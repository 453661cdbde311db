"""Learned rounding against brute force and against numpy; the same by seed, resumed, and only ever on the grid."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.errors import BadConfig
from lighten.quant import graph as graphs
from lighten.quant.graph import fold
from lighten.quant.observers import Round
from lighten.quant.plan import Plan, calibrate, convert, prepare
from lighten.quant.ranges import Grid
from lighten.quant.rounding import Dropped, Rounding, SoftRound, reconstruct
from lighten.types import Device, Precision
from nets import SHAPE, images, net

PLAIN = Device("plain", "plain", "plain", ("onnx",))
W4A8 = Precision("int4", "int8")
GRID = Grid(-7, 7, symmetric=True)


def plan_of(model: nn.Module, x: Tensor, precision: Precision = W4A8) -> Plan:
    plan = prepare(fold(model, tuple(x.shape[1:])), precision, PLAIN)
    calibrate(plan, x.split(16))
    return plan


def weights(plan: Plan) -> dict[str, Tensor]:
    return {la.name: graphs.parameter(plan.graph, la.weight).detach().clone() for la in plan.layers}


def scales(plan: Plan) -> dict[str, Tensor]:
    """Of each layer's weight, in the shape that divides it."""
    found = {la: graphs.weight_observer(plan.graph, la) for la in plan.layers}
    return {
        la.name: o.calculate_qparams()[0].double().reshape(-1, *[1] * (o.weight.ndim - 1))
        for la, o in found.items()
        if o is not None and o.weight is not None
    }


def answers(plan: Plan, x: Tensor) -> Tensor:
    """What the quantized network answers, in simulation."""
    for observer in graphs.observers(plan.graph):
        observer.stand_in = observer.rounding()
    with torch.no_grad():
        return plan.graph(x)


class Dot(nn.Module):
    """One linear layer of six weights: every way to round it can be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 1, bias=False)
        self.fc.weight.data = torch.tensor([[0.61, -0.37, 0.93, 0.44, -0.75, 0.18]])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


# --- against brute force ------------------------------------------------------------------------------


def test_of_all_ways_to_round_six_weights_the_learned_one_is_among_the_best() -> None:
    """Correlated inputs: there rounding to the nearest is far from the best (AdaRound, section 3.1)."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(256, 1, generator=generator)
    x = shared + 0.3 * torch.randn(256, 6, generator=generator)
    plan = plan_of(Dot().eval(), x, Precision("int4", "float32"))
    w = plan.graph.fc.weight.detach().double().numpy()[0]
    observer = graphs.weight_observer(plan.graph, plan.layers[0])
    assert observer is not None
    scale = float(observer.calculate_qparams()[0])

    def error(rounded: np.ndarray) -> float:
        return float(((x.double().numpy() @ (rounded - w)) ** 2).mean())

    low = np.floor(w / scale)
    every = [error(scale * np.clip(low + ups, -7, 7)) for ups in itertools.product((0, 1), repeat=6)]
    nearest = error(scale * np.clip(np.round(w / scale), -7, 7))
    reconstruct(plan, x, Rounding("adaround", iterations=400, batch=64, lr=0.01, lr_gain=0))
    learned = error(plan.graph.fc.weight.detach().double().numpy()[0])
    assert learned <= sorted(every)[2]
    assert learned < nearest / 2


# --- the relaxation -----------------------------------------------------------------------------------


def test_the_start_is_the_weight_itself() -> None:
    weight = torch.linspace(-0.6, 0.6, 24).reshape(4, 6)
    soft = SoftRound(weight, torch.full((4,), 0.1), GRID, axis=0)
    assert torch.allclose(soft(weight), weight, atol=2e-4)


def test_h_is_the_stretched_sigmoid_of_the_paper() -> None:
    soft = SoftRound(torch.zeros(1, 5), torch.ones(1), GRID, axis=0)
    soft.v.data = torch.tensor([[-9.0, -1.0, 0.0, 1.0, 9.0]])
    v = np.array([-9.0, -1.0, 0.0, 1.0, 9.0])
    h = np.clip(1 / (1 + np.exp(-v)) * 1.2 - 0.1, 0, 1)
    assert np.allclose(soft.up().detach().numpy()[0], h, atol=1e-6)
    for beta in (2.0, 20.0):
        wanted = (1 - np.abs(2 * h - 1) ** beta).mean()
        assert float(soft.undecided(beta).detach()) == pytest.approx(wanted, abs=1e-6)


def test_half_of_the_values_are_dropped_and_the_others_rounded() -> None:
    grid = Grid(0, 15)
    rounding = Round(torch.tensor(0.5), torch.tensor(0), grid, None)
    x = torch.full((100, 100), 0.6)
    got = Dropped(rounding, torch.Generator().manual_seed(0))(x)
    assert set(got.unique().tolist()) == {0.5, x[0, 0].item()}
    assert float((got == 0.5).float().mean()) == pytest.approx(0.5, abs=0.03)


# --- whole networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
@pytest.mark.parametrize("kind", ["small", "mobile"])
def test_learned_rounding_is_nearer_to_float_than_the_nearest(method: str, kind: str) -> None:
    x, _ = images(64, seed=1)
    fresh, _ = images(64, seed=9)
    with torch.no_grad():
        wanted = net(kind)(fresh)
    nearest = answers(plan_of(net(kind), x), fresh)
    plan = plan_of(net(kind), x)
    reconstruct(plan, x, Rounding(method, iterations=150, batch=16, lr=0.01))
    learned = answers(plan, fresh)
    share = 1.0 if method == "qdrop" else 0.8  # it learns to bear dropped roundings, too
    assert float((learned - wanted).square().mean()) < share * float((nearest - wanted).square().mean())


def test_every_weight_ends_on_its_grid_at_most_one_step_from_where_it_was() -> None:
    x, _ = images(32, seed=1)
    plan = plan_of(net("small"), x)
    start, before = weights(plan), scales(plan)
    reconstruct(plan, x, Rounding("brecq", iterations=30, batch=16))
    after = scales(plan)
    for name, value in weights(plan).items():
        steps = value.double() / after[name]
        assert float((steps - steps.round()).abs().max()) < 1e-4
        assert float(steps.abs().max()) < 7.001
        inside = (start[name].double() / before[name]).clamp(-7, 7)
        assert float((steps - inside).abs().max()) < 1.001


def test_the_converted_network_is_the_one_that_was_learned() -> None:
    x, _ = images(48, seed=1)
    plan = plan_of(net("mobile"), x)
    reconstruct(plan, x, Rounding("brecq", iterations=30, batch=16))
    simulated = answers(plan, x)
    for observer in graphs.observers(plan.graph):
        observer.stand_in = None
    with torch.no_grad():
        converted = convert(plan).module(x)
    step = float((simulated - converted).abs().mean() / simulated.abs().mean())
    assert step < 0.01


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    x, _ = images(32, seed=1)

    def learned(seed: int) -> dict[str, Tensor]:
        plan = plan_of(net("small"), x)
        reconstruct(plan, x, Rounding("qdrop", iterations=20, batch=8, seed=seed))
        return weights(plan)

    first, again, other = learned(0), learned(0), learned(1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_an_interrupted_reconstruction_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    x, _ = images(32, seed=1)
    settings = Rounding("brecq", iterations=20, batch=8)
    whole = plan_of(net("small"), x)
    reconstruct(whole, x, settings)

    class Stop(Exception):
        pass

    told: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        if done >= 45:
            raise Stop

    file = tmp_path / "rounding.pt"
    with pytest.raises(Stop):
        reconstruct(plan_of(net("small"), x), x, settings, stop, file)
    plan = plan_of(net("small"), x)
    reconstruct(plan, x, settings, lambda what, done, total: told.append(done), file)
    a, b = weights(whole), weights(plan)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(told) < len(whole.layers) * 2


def test_the_state_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    x, _ = images(32, seed=1)
    file = tmp_path / "rounding.pt"
    reconstruct(plan_of(net("small"), x), x, Rounding("brecq", iterations=20, batch=8), checkpoint=file)
    alone, after = plan_of(net("small"), x), plan_of(net("small"), x)
    settings = Rounding("brecq", iterations=20, batch=8, seed=5)
    reconstruct(alone, x, settings)
    reconstruct(after, x, settings, checkpoint=file)
    a, b = weights(alone), weights(after)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("bad", [{"method": "best"}, {"iterations": 0}, {"batch": 0}])
def test_a_bad_setting_is_named(bad: dict[str, object]) -> None:
    with pytest.raises(BadConfig, match="rounding"):
        Rounding(**bad)  # type: ignore[arg-type]


def test_one_calibration_image_is_enough_to_run() -> None:
    x, _ = images(1, seed=1)
    plan = plan_of(net("small"), x)
    reconstruct(plan, x, Rounding("brecq", iterations=5))
    assert tuple(x.shape[1:]) == SHAPE
    assert torch.isfinite(answers(plan, x)).all()
