"""The chosen mix is the best of all mixes, found by trying every one; impossible budgets say what is possible."""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest

from lighten.errors import BadConfig, MissingBackend
from lighten.quant.allocate import Allocation, allocate, frontier
from lighten.types import LayerCost

pytest.importorskip("scipy")

CHOICES = (("int4", "int8"), ("int8", "int8"), ("float32", "float32"))


def cost(
    layer: str, weights: str, damage: float, size: int, ms: float | None = None, activations: str | None = None
) -> LayerCost:
    given = activations or ("int8" if weights.startswith("int") else weights)
    return LayerCost(layer, "conv2d", weights, given, damage, damage, None, size, ms)


def random_costs(n: int, seed: int, timed: bool = True) -> list[LayerCost]:
    """`n` layers at three precisions: fewer bits mean fewer bytes and, mostly, more damage; time is anyone's guess."""
    dice = random.Random(seed)
    rows = []
    for k in range(n):
        size, harm = dice.randint(100, 100_000), 10 ** dice.uniform(-5, 0)
        for (weights, activations), bits, factor in zip(CHOICES, (4, 8, 32), (1.0, dice.uniform(0.001, 0.3), 0.0)):
            ms = dice.uniform(0.1, 2.0) if timed else None
            rows.append(cost(f"layer{k}", weights, harm * factor, size * bits, ms, activations))
    return rows


def every_mix(costs: list[LayerCost]) -> list[tuple[LayerCost, ...]]:
    names = list(dict.fromkeys(row.layer for row in costs))
    return list(itertools.product(*([row for row in costs if row.layer == name] for name in names)))


def totals(mix: tuple[LayerCost, ...]) -> tuple[float, int, float]:
    return math.fsum(r.damage for r in mix), sum(r.bytes for r in mix), math.fsum(r.latency_ms or 0 for r in mix)


def assigned(got: Allocation, names: list[str]) -> dict[str, tuple[str, str]]:
    """Weights and activations of each layer, as a Precision says them."""
    default = (got.precision.weights, got.precision.activations)
    return dict.fromkeys(names, default) | {name: (w, a) for name, w, a in got.precision.exceptions}


@pytest.mark.parametrize("seed", range(12))
def test_least_damage_within_bytes_and_time_is_that_of_trying_every_mix(seed: int) -> None:
    costs = random_costs(6, seed)
    mixes = every_mix(costs)
    dice = random.Random(seed + 100)
    _, some_bytes, some_ms = totals(dice.choice(mixes))
    got = allocate(costs, max_bytes=some_bytes, max_latency_ms=some_ms)
    allowed = [m for m in mixes if totals(m)[1] <= some_bytes and totals(m)[2] <= some_ms * (1 + 1e-12)]
    best = min(allowed, key=totals)
    assert (got.damage, got.bytes, got.latency_ms) == pytest.approx(totals(best), rel=1e-9)
    names = [row.layer for row in best]
    assert assigned(got, names) == {row.layer: (row.weights, row.activations) for row in best}


@pytest.mark.parametrize("seed", range(8))
def test_fewest_bytes_within_a_damage_is_that_of_trying_every_mix(seed: int) -> None:
    costs = random_costs(6, seed)
    mixes = every_mix(costs)
    damage = totals(random.Random(seed).choice(mixes))[0]
    got = allocate(costs, max_damage=damage)
    best = min((m for m in mixes if totals(m)[0] <= damage * (1 + 1e-12)), key=lambda m: (totals(m)[1], totals(m)[2]))
    assert got.bytes == totals(best)[1]
    assert got.latency_ms == pytest.approx(totals(best)[2], rel=1e-9)


def test_a_budget_that_one_mix_meets_to_the_byte_is_met() -> None:
    """Ten layers of millions of bytes: a byte is far below a solver's usual tolerance."""
    rows = [cost(f"l{k}", w, d, 9_000_001 + k + b) for k in range(10) for w, d, b in (("int4", 1.0, 0), ("int8", 0, 1))]
    least = sum(9_000_001 + k for k in range(10))
    for extra in range(4):
        got = allocate(rows, max_bytes=least + extra)
        assert got.bytes == least + extra
        assert got.damage == 10 - extra


def test_many_layers_are_solved() -> None:
    costs = random_costs(80, 5)
    best = allocate(costs)
    got = allocate(costs, max_bytes=best.bytes // 5)
    assert got.bytes <= best.bytes // 5
    assert got.damage >= best.damage == 0


def test_without_limits_every_layer_is_as_accurate_as_it_can_be() -> None:
    got = allocate(random_costs(4, 1))
    assert (got.precision.weights, got.precision.exceptions) == ("float32", ())
    assert got.damage == 0


def test_one_layer() -> None:
    rows = [cost("fc", "int4", 0.5, 10), cost("fc", "int8", 0.1, 20), cost("fc", "float32", 0.0, 80)]
    got = allocate(rows, max_bytes=79)
    assert (got.precision.weights, got.precision.activations, got.precision.exceptions) == ("int8", "int8", ())
    assert (got.damage, got.bytes, got.latency_ms) == (0.1, 20, None)


def test_equal_mixes_have_one_answer_the_earlier_layer_is_the_more_accurate() -> None:
    rows = [cost(f"l{k}", w, d, b) for k in range(4) for w, d, b in (("int4", 0.25, 10), ("int8", 0.0, 20))]
    got = allocate(rows, max_bytes=60)
    assert assigned(got, ["l0", "l1", "l2", "l3"]) == {
        "l0": ("int8", "int8"), "l1": ("int8", "int8"), "l2": ("int4", "int8"), "l3": ("int4", "int8"),
    }  # fmt: skip
    assert allocate(rows, max_bytes=60) == got


def test_equal_damage_goes_to_the_smaller() -> None:
    got = allocate([cost("a", "int4", 0.0, 10), cost("a", "int8", 0.0, 20)])
    assert (got.precision.weights, got.bytes) == ("int4", 10)


def test_exceptions_are_the_rarer_pairs_sorted_by_layer() -> None:
    rows = [cost(name, "int4", d, 10) for name, d in (("z", 1.0), ("m", 0.0), ("a", 1.0), ("b", 0.0), ("c", 0.0))]
    rows += [cost(name, "int8", 0.0, 20) for name in ("z", "a", "m", "b", "c")]
    got = allocate(rows, max_bytes=70)
    assert got.precision.weights == "int4"
    assert got.precision.exceptions == (("a", "int8", "int8"), ("z", "int8", "int8"))


def test_what_is_beside_the_layers_counts() -> None:
    rows = [cost("fc", "int4", 0.5, 10, 1.0), cost("fc", "int8", 0.1, 20, 2.0)]
    got = allocate(rows, max_bytes=115, other_bytes=100, other_ms=5.0)
    assert (got.precision.weights, got.bytes, got.latency_ms) == ("int4", 110, 6.0)
    assert allocate(rows, max_latency_ms=6.5, other_ms=5.0).precision.weights == "int4"


def test_a_fixed_layer_keeps_its_choice() -> None:
    costs = random_costs(3, 2)
    got = allocate(costs, max_damage=100.0, fixed={"layer1": ("int8", "int8")})
    assert assigned(got, ["layer0", "layer1", "layer2"])["layer1"] == ("int8", "int8")
    assert ("int4", "int8") in assigned(got, ["layer0", "layer1", "layer2"]).values()


def test_what_was_not_measured_finite_is_not_chosen() -> None:
    rows = [cost("fc", "int4", math.inf, 10), cost("fc", "int8", 0.1, 20), cost("fc", "float16", math.nan, 40)]
    assert allocate(rows, max_damage=1.0).precision.weights == "int8"
    with pytest.raises(BadConfig, match="finite"):
        allocate(rows[:1])


def test_impossible_budgets_name_the_limit_and_what_can_be_reached() -> None:
    rows = [cost("a", "int4", 0.5, 1000, 1.0), cost("a", "int8", 0.1, 2000, 0.5)]
    rows += [cost("b", "int4", 0.25, 3000, 2.0), cost("b", "int8", 0.2, 6000, 3.0)]
    with pytest.raises(BadConfig, match=r"max_bytes = 3,999 bytes.* it is 4,100 bytes"):
        allocate(rows, max_bytes=3999, other_bytes=100)
    with pytest.raises(BadConfig, match=r"max_damage = 0.29 nats.* it is 0.3 nats(.|\n)*float32"):
        allocate(rows, max_damage=0.29)
    with pytest.raises(BadConfig, match=r"max_latency_ms = 3.4 ms.* it is 3.5 ms"):
        allocate(rows, max_latency_ms=3.4, other_ms=1.0)


def test_limits_that_exclude_each_other_say_what_the_second_can_be() -> None:
    rows = [cost("a", "int4", 0.5, 1000), cost("a", "int8", 0.1, 2000)]
    rows += [cost("b", "int4", 0.25, 3000), cost("b", "int8", 0.2, 6000)]
    with pytest.raises(BadConfig, match=r"max_bytes = 5,500 bytes and max_damage = 0.3 nats together.*is 0.35 nats"):
        allocate(rows, max_bytes=5500, max_damage=0.3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_bytes": -1}, "max_bytes must be"),
        ({"max_damage": math.nan}, "max_damage must be"),
        ({"max_latency_ms": 3.0}, "was not timed"),
        ({"fixed": {"nowhere": ("int8", "int8")}}, "nowhere"),
        ({"fixed": {"layer0": ("int2", "int8")}}, "int2/int8, which was not measured"),
    ],
)
def test_questions_that_make_no_sense_are_refused(more: dict[str, object], says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        allocate(random_costs(2, 0, timed=False), **more)  # type: ignore[arg-type]


def test_no_costs_and_contradicting_costs_are_refused() -> None:
    with pytest.raises(BadConfig, match="no layer costs"):
        allocate([])
    with pytest.raises(BadConfig, match="two costs"):
        allocate([cost("a", "int8", 0.1, 20), cost("a", "int8", 0.2, 20)])


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingBackend, match=r"lighten\[compress\]"):
        allocate(random_costs(2, 0))


def test_reasons_name_every_layer_that_is_kept_larger_with_its_damage() -> None:
    rows = [cost("stem", "int4", 0.31, 1000), cost("stem", "int8", 0.01, 2000), cost("stem", "float32", 0.0, 8000)]
    rows += [cost("mid", "int4", 0.004, 500_000), cost("mid", "int8", 0.001, 1_000_000)]
    rows += [cost("head", "int4", 0.02, 1000), cost("head", "int8", 0.001, 2000)]
    got = allocate(rows, max_bytes=512_000)
    reasons = dict(got.reasons)
    assert set(reasons) == {"stem", "head"}
    assert reasons["stem"].en == "int4 alone costs 0.31 nats, the most of all layers, and would save 7.0 kB"
    assert reasons["head"].en == "int4 alone costs 0.02 nats, number 2 of 3 layers, and would save 1.0 kB"
    assert "0.31" in reasons["stem"].zh
    held = allocate(rows, fixed={"mid": ("int8", "int8")}, max_bytes=1_002_000)
    assert "asked" in dict(held.reasons)["mid"].en
    only = allocate([cost("fc", "int8", 0.1, 20)])
    assert only.reasons[0][1].en == "nothing smaller than int8 was measured"


def test_the_frontier_runs_from_the_smallest_to_the_most_accurate() -> None:
    costs = random_costs(6, 3)
    mixes = frontier(costs, 7)
    assert 5 <= len(mixes) <= 7
    sizes, harms = [m.bytes for m in mixes], [m.damage for m in mixes]
    assert sizes == sorted(sizes)
    assert harms == sorted(harms, reverse=True)
    assert sizes[0] == min(totals(m)[1] for m in every_mix(costs))
    assert harms[-1] == min(totals(m)[0] for m in every_mix(costs))
    for mix in mixes[1:-1]:
        best = min(totals(m)[0] for m in every_mix(costs) if totals(m)[1] <= mix.bytes)
        assert mix.damage == pytest.approx(best, rel=1e-9)
    with pytest.raises(BadConfig):
        frontier(costs, 1)


def test_a_frontier_of_equal_mixes_holds_one() -> None:
    assert len(frontier([cost("fc", "int8", 0.1, 20)], 5)) == 1
