"""Channel counts and bits for a budget: bytes and times by hand, the greedy walk against brute force."""

from __future__ import annotations

import itertools
import math

import pytest

from lighten.search.widths import (
    SCALE_BYTES,
    Costs,
    Limits,
    bits_harm,
    damage,
    even,
    fitted,
    harms,
    layer_bytes,
    predict,
    steps_of,
)
from lighten.types import ChannelGroup, LayerCost, LayerShape, Precision, Predicted, WidthCost


def conv(name: str, inputs: int, outputs: int, kernel: int = 3, size: int = 8) -> LayerShape:
    one = (1, 1)
    return LayerShape(name, "conv", inputs, outputs, (kernel, kernel), one, (kernel // 2,) * 2, one, 1, (size, size))


SHAPES = {s.name: s for s in (conv("a", 3, 32), conv("b", 32, 64), conv("c", 64, 32), conv("d", 32, 16, 1))}
GROUPS = (
    ChannelGroup("a", 32, (("a", 1),), (("b", 1),)),
    ChannelGroup("b", 64, (("b", 1),), (("c", 1),)),
    ChannelGroup("c", 32, (("c", 1),), (("d", 1),)),
)
HARM = {"a": 1.0, "b": 0.2, "c": 0.6}


def costs(**other: object) -> Costs:
    settings = {"layer_ms": lambda s: s.macs / 1e6, "other_ms": 0.1, "other_bytes": 1000.0, **other}
    return Costs(SHAPES, GROUPS, HARM, **settings)  # type: ignore[arg-type]


def test_bytes_and_ms_are_those_of_the_narrowed_layers() -> None:
    """a 3->16, b 16->64, c 64->32, d 32->16: weights 432, 9216, 18432, 512; 128 outputs."""
    got = predict(costs(), {"a": 16})
    assert got.bytes == 1000 + (432 + 9216 + 18432 + 512) + 128 * SCALE_BYTES
    assert got.latency_ms == pytest.approx(0.1 + 64 * (432 + 9216 + 18432 + 512) / 1e6)


def test_four_bits_halve_the_weights_but_not_the_scales() -> None:
    whole, halved = predict(costs(), {}), predict(costs(), {}, ["c"])
    assert whole.bytes - halved.bytes == 64 * 32 * 9 / 2
    assert layer_bytes(SHAPES["c"], 8) == 64 * 32 * 9 + 32 * SCALE_BYTES


def test_limits_name_the_worse_overrun() -> None:
    limits = Limits(100.0, 2.0)
    assert limits.met(Predicted(100.0, 2.0))
    assert limits.excess(Predicted(110.0, 3.0)) == pytest.approx(0.5)
    assert Limits().met(Predicted(1e12, 1e12))
    assert Limits(bytes=100.0).met(Predicted(90.0))


def test_widths_are_multiples_of_kernel_and_heads() -> None:
    assert steps_of(ChannelGroup("g", 64, (), ()), 16, 0.25) == (64, 48, 32, 16)
    assert steps_of(ChannelGroup("g", 96, (), (), multiple=12), 8, 0.3) == (96, 72, 48)
    assert steps_of(ChannelGroup("g", 10, (), ()), 8, 0.1) == (10, 8)
    assert steps_of(ChannelGroup("g", 8, (), ()), 8) == (8,)
    wide = steps_of(ChannelGroup("g", 2048, (), ()), 8, 0.1)
    assert len(wide) <= 27
    assert wide[-1] == 208
    assert all(w % 8 == 0 for w in wide)


def test_the_damage_curve_goes_through_what_was_measured() -> None:
    """32 of 64 is x = 1, 16 of 64 is x = 3: least squares through the origin of (1, 0.2), (3, 0.4) is 1.4 / 10."""
    rows = [WidthCost("b", 32, 0.2), WidthCost("b", 16, 0.4)]
    found = harms(rows, GROUPS)
    assert found["b"] == pytest.approx(0.14)
    assert found["a"] == found["c"] == pytest.approx(0.14)  # not measured: the mean


def test_saturated_damage_is_left_out_where_there_is_other() -> None:
    rows = [WidthCost("b", 32, 0.5), WidthCost("b", 16, 2.0), WidthCost("a", 8, 2.5)]
    found = harms(rows, GROUPS)
    assert found["b"] == pytest.approx(0.5)
    assert found["a"] == pytest.approx(2.5 / 3)


def test_a_group_that_seems_free_is_only_almost_free() -> None:
    found = harms([WidthCost("a", 16, 0.0), WidthCost("b", 32, 1.0)], GROUPS)
    assert 0 < found["a"] < found["b"] / 50


def test_bits_harm_is_beyond_that_of_eight() -> None:
    rows = [
        LayerCost(n, "conv", w, "int8", d, 0.0, None, 1)
        for n, w, d in (
            ("a", "int8", 0.1),
            ("a", "int4", 0.4),
            ("b", "int8", 0.2),
            ("b", "int4", 0.1),
            ("c", "int4", 1),
        )
    ]
    assert bits_harm(rows) == {"a": pytest.approx(0.3), "b": 0.0}


def brute_force(given: Costs, limits: Limits) -> float:
    """The least damage of all widths that fit."""
    ladders = [steps_of(g, given.multiple) for g in GROUPS]
    fits = (dict(zip(HARM, w)) for w in itertools.product(*ladders))
    return min((damage(given, w) for w in fits if limits.met(predict(given, w))), default=math.inf)


@pytest.mark.parametrize(
    "limits",
    [Limits(bytes=20_000), Limits(latency_ms=1.0), Limits(25_000, 1.5), Limits(12_000, 2.0), Limits(9_000, 0.6)],
)
def test_greedy_widths_fit_and_come_near_the_best_there_are(limits: Limits) -> None:
    plan = fitted(costs(), limits)
    assert plan is not None
    assert limits.met(predict(costs(), dict(plan.widths)))
    assert plan.predicted == predict(costs(), dict(plan.widths))
    assert plan.damage <= 1.25 * brute_force(costs(), limits) + 1e-9


def test_measured_widths_beat_even_ones() -> None:
    limits = Limits(bytes=20_000)
    measured, control = fitted(costs(), limits), even(costs(), limits)
    assert measured is not None
    assert control is not None
    assert limits.met(control.predicted)
    assert measured.damage < control.damage
    shares = {n: w / {"a": 32, "b": 64, "c": 32}[n] for n, w in control.widths}
    assert max(shares.values()) - min(shares.values()) <= 0.25


def test_nothing_is_narrowed_where_everything_fits() -> None:
    plan = fitted(costs(), Limits(bytes=1e9))
    assert plan is not None
    assert plan.widths == ()
    assert plan.damage == 0


def test_what_cannot_be_met_is_none() -> None:
    assert fitted(costs(), Limits(bytes=2_000)) is None
    assert even(costs(), Limits(bytes=2_000)) is None


def test_cheap_bits_go_before_dear_channels_and_come_back_where_time_decides() -> None:
    """4-bit weights of c are nearly free: bytes alone take them; a limit on time narrows c anyway, and with it bytes
    have room again."""
    given = costs(bits={"c": 0.001, "b": 0.002})
    small = fitted(given, Limits(bytes=30_000))
    assert small is not None
    assert small.int4
    assert small.widths == ()
    fast = fitted(given, Limits(30_000, 0.8))
    assert fast is not None
    assert fast.int4 == ()
    assert fast.widths


def test_a_plan_gives_the_precision_of_its_layers() -> None:
    plan = fitted(costs(bits={"c": 0.001, "b": 0.002}), Limits(bytes=24_000))
    assert plan is not None
    assert plan.precision() == Precision("int8", "int8", (("b", "int4", "int8"), ("c", "int4", "int8")))
    assert plan.precision(ends=("b", "c")) == Precision("int8", "int8")
