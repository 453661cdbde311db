"""Ranges by local reconstruction: the choice is the one that brute force in numpy finds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lighten.quant import graph as graphs
from lighten.quant.graph import fold
from lighten.quant.plan import calibrate, prepare
from lighten.quant.range_search import FRACTIONS, search_ranges
from lighten.types import Device, Precision
from nets import SHAPE, images, net

PLAIN = Device("plain", "plain", "plain", ("onnx",))
A4 = Precision("int8", "int4")


class Picky(nn.Module):
    """A linear layer that hardly reads its one wild input: its range may be clipped without harm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)
        self.fc.weight.data = torch.tensor([[1.0, -2.0, 0.5, 1e-4], [0.3, 1.0, -1.0, 0.0], [2.0, 0.1, 0.7, -1e-4]])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def wild(n: int = 64) -> Tensor:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    x[:, 3] *= 10
    return x


def test_an_input_that_meets_no_weight_does_not_widen_the_range() -> None:
    x = wild()
    plan = prepare(fold(Picky().eval(), (4,)), A4, PLAIN)
    calibrate(plan, [x])
    observer = graphs.input_observer(plan.graph, plan.layers[0])
    assert observer is not None
    search_ranges(plan, x)
    chosen = observer.chosen()
    assert chosen.method.startswith("reconstruction")
    lo, hi = float(x.min()), float(x.max())
    weight = Picky().fc.weight.detach().double().numpy()
    real = x.double().numpy()

    def harm(low: float, high: float) -> float:
        scale = np.float32((max(high, 0) - min(low, 0)) / 15)
        zero = np.clip(-8 - np.round(min(low, 0) / scale), -8, 7)
        q = np.clip(np.round(real / scale) + zero, -8, 7)
        return float((((q - zero) * scale - real) @ weight.T).__pow__(2).mean())

    shrunk = min(harm(lo * f, hi * f) for f in (1.0, *FRACTIONS))
    assert harm(chosen.lo, chosen.hi) <= shrunk * 1.001
    assert harm(chosen.lo, chosen.hi) < 0.5 * harm(lo, hi)


def test_every_layer_of_a_network_gets_a_range_and_the_plan_watches_again() -> None:
    x, _ = images(16, seed=1)
    plan = prepare(fold(net("small"), SHAPE), Precision("int8", "int8"), PLAIN)
    calibrate(plan, x.split(8))
    search_ranges(plan, x)
    seen = {id(o): o for la in plan.layers if (o := graphs.input_observer(plan.graph, la)) is not None}
    assert all(o.chosen().method.startswith("reconstruction") for o in seen.values())
    assert all(o.stand_in is None for o in graphs.observers(plan.graph))
