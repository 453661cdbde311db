"""Who wins and what is advised, from made-up measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from conftest import trial
from lighten import search
from lighten.types import Asked, Budget, Device, Failure, Miss, Precision, Recipe, Step, Trial

INT8, FLOAT16 = Precision("int8", "int8"), Precision("float16", "float16")
QUANTIZE = (Step("quantize"),)
PRUNE = (Step("channel_prune", (("share", 0.5),)),)
DEVICE = Device("pi", "Raspberry Pi", "树莓派", ("onnx",))

BASE = trial(Recipe(), top1=90.0, error=0.5, size=1_000_000, ms=10.0)


def float16(**measured: float) -> Trial:
    return trial(Recipe((), FLOAT16), **{"size": 500_000, **measured})


def int8(**measured: float) -> Trial:
    return trial(Recipe(QUANTIZE, INT8), **{"size": 270_000, "ms": 5.0, **measured})


def pruned(**measured: float) -> Trial:
    return trial(Recipe((*PRUNE, *QUANTIZE), INT8), **{"size": 150_000, "ms": 3.0, **measured})


NO_LIMIT = Budget()


def won(trials: Sequence[Trial], budget: Budget = NO_LIMIT, same_machine: bool = True) -> Trial:
    """The winner among the trials and the original, which must not hang on their order."""
    first = search.judge([*trials, BASE], BASE, budget, same_machine)
    assert search.judge([BASE, *reversed(trials)], BASE, budget, same_machine) == first
    return first


# --- judge --------------------------------------------------------------------------------------------


def test_inside_the_budget_beats_more_accurate_outside() -> None:
    inside, outside = int8(top1=85.0), float16(top1=91.0)
    assert won([outside, inside], Budget(max_size_mb=0.3)) == inside


def test_far_less_accurate_loses_though_it_is_smaller() -> None:
    assert won([int8(top1=88.0), float16(top1=90.0)]) == float16(top1=90.0)


def test_within_one_standard_error_the_smaller_wins() -> None:
    near = int8(top1=89.51)
    assert won([near, float16(top1=90.0)]) == near


def test_exactly_one_standard_error_is_still_equal_and_a_hair_more_is_not() -> None:
    assert won([int8(top1=89.5)]) == int8(top1=89.5)
    assert won([int8(top1=89.49)]) == BASE


def test_the_error_is_that_of_the_best() -> None:
    """A candidate cannot make itself equal by being badly measured."""
    assert won([int8(top1=85.0, error=10.0)]) == BASE


def test_simpler_wins_before_smaller() -> None:
    assert won([pruned(top1=90.0), int8(top1=90.0)]) == int8(top1=90.0)


def test_a_precision_alone_is_no_step() -> None:
    assert won([int8(top1=90.0)]) == int8(top1=90.0)


def test_not_slower_than_the_original_wins_before_smaller() -> None:
    slow = int8(ms=15.0)
    assert won([slow, float16(ms=10.0)]) == float16(ms=10.0)


def test_noise_is_not_slowness() -> None:
    assert won([int8(ms=10.4), float16(ms=10.0)]) == int8(ms=10.4)
    assert won([int8(ms=10.6), float16(ms=10.0)]) == float16(ms=10.0)


def test_on_another_machine_speed_says_nothing() -> None:
    slow = int8(ms=15.0)
    assert won([slow, float16(ms=10.0)], same_machine=False) == slow


def test_faster_wins_among_equals_in_size() -> None:
    other = trial(Recipe(QUANTIZE, INT8, "openvino"), size=270_000, ms=4.0)
    assert won([int8(ms=5.0), other]) == other


def test_the_original_wins_where_nothing_else_is_inside() -> None:
    assert won([int8(drop=5.0)], Budget(max_drop=1.0)) == BASE


def test_the_original_does_not_win_where_it_was_not_asked_for() -> None:
    assert search.judge([int8(drop=5.0)], BASE, Budget(max_drop=1.0)) == int8(drop=5.0)
    assert search.judge([], BASE, Budget(max_drop=1.0)) == BASE


def test_without_a_file_inside_the_nearest_is_named() -> None:
    near, far = int8(), float16()
    budget = Budget(max_size_mb=0.1)
    assert budget.misses(near.evidence, BASE.evidence)
    assert won([far, near], budget) == near


def test_distance_is_relative_to_each_limit() -> None:
    # 0.27 MB over 0.2 is 35 %; a drop of 4 points over 1 is 300 %.
    small_but_wrong, large_but_right = int8(size=200_000, drop=4.0), float16(size=270_000, drop=0.5)
    assert won([small_but_wrong, large_but_right], Budget(max_size_mb=0.2, max_drop=1.0)) == large_but_right
    misses = (Miss("max_size_mb", 0.2, 0.27, " MB"), Miss("max_drop", 1.0, 4.0, " pt"))
    assert search.distance(misses) == pytest.approx(0.35 + 3.0)
    assert search.distance(()) == 0


def test_a_limit_of_zero_can_be_missed_without_dividing_by_it() -> None:
    assert search.distance([Miss("max_drop", 0.0, 0.1, " pt")]) > 1


def test_failed_trials_never_win() -> None:
    failed = Trial(Recipe(QUANTIZE, INT8), failure=Failure("being built", "no"))
    assert won([failed]) == BASE


def test_min_speedup_and_shrink_are_measured_against_the_original() -> None:
    assert won([int8(ms=5.0), float16(ms=9.0)], Budget(min_speedup=2.0)) == int8(ms=5.0)
    assert won([int8(size=270_000), float16()], Budget(min_shrink=73.0)) == int8(size=270_000)
    assert Budget(min_shrink=73.1).misses(int8(size=270_000).evidence, BASE.evidence)


# --- advise -------------------------------------------------------------------------------------------


def advice(trials: Sequence[Trial], *, same: bool = True, misses: Sequence[Miss] = ()) -> list[str]:
    rows = search.advise(trials, BASE, DEVICE, same, misses)
    assert all(re.search(r"[\u4e00-\u9fff]", row.zh) for row in rows)
    assert not any(re.search(r"[\u4e00-\u9fff]", row.en) for row in rows)
    return [row.en for row in rows]


def test_a_good_run_needs_no_advice() -> None:
    assert advice([BASE, int8(), float16(ms=9.0)]) == []


def test_a_quantized_file_that_is_not_faster_is_told_with_both_times() -> None:
    (row,) = advice([BASE, int8(ms=12.34)])
    assert "12.34 ms" in row
    assert "10.00 ms" in row
    assert "int8 · onnx" in row


def test_slowness_is_judged_against_the_same_format() -> None:
    other = trial(Recipe((), Precision(), "openvino"), ms=4.0)
    assert advice([BASE, other, int8(ms=6.0)]) == []


def test_times_of_another_machine_are_called_so_and_not_judged() -> None:
    (row,) = advice([BASE, int8(ms=12.0)], same=False)
    assert "Raspberry Pi" in row
    assert "lighten bench" in row


def test_a_failure_is_told_with_its_reason() -> None:
    failed = Trial(Recipe(QUANTIZE, INT8, "openvino"), failure=Failure("being measured", "it died"))
    (row,) = advice([BASE, failed])
    assert "openvino" in row
    assert "being measured" in row
    assert "it died" in row


@pytest.mark.parametrize("limit", [f for f in Budget.__dataclass_fields__ if f != "time_s"])
def test_every_limit_of_a_budget_has_its_hint(limit: str) -> None:
    (row,) = advice([], misses=[Miss(limit, 2.0, 3.5, " u")])
    assert limit in row
    assert "1.5 u" in row
    assert len(row) > len(f"{limit} is missed by 1.5 u. ") + 10


# --- menu, next, pareto ---------------------------------------------------------------------------------


def test_menu_is_every_format_at_every_precision_once() -> None:
    rows = search.menu(["onnx", "openvino"], [Precision(), FLOAT16, INT8])
    assert len(rows) == len({r.id for r in rows}) == 6
    assert {(r.format, r.precision.weights) for r in rows} == {
        (f, p) for f in ("onnx", "openvino") for p in ("float32", "float16", "int8")
    }
    for row in rows:
        assert row.steps == (QUANTIZE if row.precision == INT8 else ())


def test_next_is_the_first_that_was_not_tried_and_failures_count_as_tried() -> None:
    menu = search.menu(["onnx"], [Precision(), FLOAT16, INT8])
    done: list[Trial] = []
    for recipe in menu:
        assert search.next_recipe(menu, done) == recipe
        done.append(Trial(recipe, failure=Failure("being built", "no")))
    assert search.next_recipe(menu, done) is None
    assert search.next_recipe(menu, [done[1]]) == menu[0]


def test_pareto_leaves_out_what_another_beats_in_all_three() -> None:
    beaten = trial(Recipe(QUANTIZE, INT8, "openvino"), top1=89.0, size=300_000, ms=6.0)
    failed = Trial(Recipe((), FLOAT16, "openvino"), failure=Failure("being built", "no"))
    rows = [BASE, int8(top1=89.5), float16(top1=90.0, ms=20.0), beaten, failed]
    assert search.pareto(rows) == (BASE.id, rows[1].id, rows[2].id)


def test_pareto_keeps_exact_ties() -> None:
    twin = trial(Recipe((), Precision(), "openvino"), top1=90.0, size=1_000_000, ms=10.0)
    assert search.pareto([BASE, twin]) == (BASE.id, twin.id)


def test_summary_is_shrink_and_speedup() -> None:
    shrink, speedup = search.summary(int8(size=250_000, ms=4.0), BASE)
    assert shrink == pytest.approx(75.0)
    assert speedup == pytest.approx(2.5)


def test_judging_needs_the_originals_evidence() -> None:
    with pytest.raises(AssertionError):
        search.judge([int8()], replace(BASE, evidence=None), Budget())


# --- one way to quantize ------------------------------------------------------------------------------


def test_bits_below_8_spare_the_first_and_the_last_layer() -> None:
    ends = ("conv1", "fc")
    assert search.uniform(Asked("ptq", "w8a8"), ends) == Precision("int8", "int8")
    spared = (("conv1", "int8", "int8"), ("fc", "int8", "int8"))
    assert search.uniform(Asked("ptq", "w4a8"), ends) == Precision("int4", "int8", spared)
    assert search.uniform(Asked("qat", "w4a4"), ends) == Precision("int4", "int4", spared)
    weights = (("conv1", "int8", "float32"), ("fc", "int8", "float32"))
    assert search.uniform(Asked("weight-only", "w4"), ends) == Precision("int4", "float32", weights)
    assert search.uniform(Asked("dynamic", "w8"), ends) == Precision("int8", "dynamic")


def test_a_method_that_cannot_give_the_bits_says_what_it_gives() -> None:
    assert search.cannot(Asked("ptq", "mixed")) is None
    reason = search.cannot(Asked("weight-only", "w4a8"))
    assert reason is not None
    assert "w8, w4" in reason
    assert "ptq, qat, dynamic, weight-only" in str(search.cannot(Asked("qta", "w8a8")))


def test_the_menu_of_one_way_is_that_way_in_every_format() -> None:
    asked = Asked("qat", "w4a4", (("epochs", 2),))
    menu = search.asked_menu(("onnx", "openvino"), asked, [Precision("int4", "int4")])
    assert [r.format for r in menu] == ["onnx", "openvino"]
    assert {r.steps for r in menu} == {(Step("qat", (("epochs", 2),)),)}


@pytest.mark.parametrize(("method", "bits"), [(m, b) for m, every in search.WAYS.items() for b in every])
def test_every_way_that_lost_too_much_says_what_to_try_next_unless_nothing_is_left(method: str, bits: str) -> None:
    missed = [Miss("max_drop", 1.0, 3.0, " pt")]
    got = search.next_step(Asked(method, bits), missed)
    assert search.next_step(Asked(method, bits), []) == ()
    assert search.next_step(None, missed) == ()
    assert all(a.en and a.zh for a in got)
    assert got or method == "dynamic" or (method, bits) == ("weight-only", "w8")


# --- what is worth a trial --------------------------------------------------------------------------


def worthwhile(budget: Budget) -> set[str]:
    base = BASE.evidence
    assert base is not None
    every = [Precision(), FLOAT16, INT8, Precision("int4", "int8"), Precision("int8", "float32")]
    return {p.title for p in search.worth_a_trial(every, budget, base)}


EVERY = {"float32", "float16", "int8", "int4/int8", "int8/weights only"}


@pytest.mark.parametrize(
    ("budget", "left_out"),
    [
        (NO_LIMIT, set()),
        (Budget(max_drop=0.1, min_speedup=50), set()),  # whether a file is fast is not known before
        (Budget(min_shrink=0), set()),
        (Budget(min_shrink=40), {"float32"}),
        (Budget(max_size_mb=0.6), {"float32"}),
        (Budget(min_shrink=50), {"float32"}),  # half of the bytes are gone with 16 bits
        (Budget(min_shrink=60), {"float32", "float16"}),
        (Budget(max_size_mb=0.4), {"float32", "float16"}),
        (Budget(min_shrink=10, max_size_mb=0.4), {"float32", "float16"}),
        (Budget(min_shrink=99), {"float32", "float16"}),
        (Budget(max_size_mb=5), set()),  # more than the original takes
    ],
)
def test_floats_that_cannot_be_small_enough_are_not_tried(budget: Budget, left_out: set[str]) -> None:
    assert worthwhile(budget) == EVERY - left_out


def test_the_menu_puts_the_steps_before_every_precision() -> None:
    got = search.menu(("onnx", "openvino"), (Precision(), INT8), steps=PRUNE)
    assert [(r.format, r.precision, r.steps) for r in got] == [
        ("onnx", Precision(), PRUNE),
        ("openvino", Precision(), PRUNE),
        ("onnx", INT8, (*PRUNE, *QUANTIZE)),
        ("openvino", INT8, (*PRUNE, *QUANTIZE)),
    ]
    assert len({r.id for r in got}) == 4


def test_the_menu_without_steps_is_the_same_as_ever() -> None:
    ranges = Step("quantize", (("ranges", "mse"),))
    (float_, int8_) = search.menu(("onnx",), (FLOAT16, INT8), ranges)
    assert float_ == Recipe((), FLOAT16)
    assert int8_ == Recipe((ranges,), INT8)
