"""Which narrowed recipe comes next, from made-up measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_widths import costs

from conftest import trial
from lighten.search import reach
from lighten.search.widths import predict
from lighten.types import Beside, Budget, Failure, Precision, Recipe, Step, Trial

BASE = trial(Recipe(), top1=90.0, error=0.5, size=120_000, ms=8.0)
INT8 = Precision("int8", "int8")
BUDGET = Budget(max_drop=0.5, min_shrink=85, min_speedup=4)


def means(budget: Budget = BUDGET, left_s: float | None = 1000.0, tail_s: float = 50.0) -> reach.Means:
    known = {"onnx": costs(), "openvino": costs(other_ms=0.5)}
    return reach.Means(known, ("onnx", "openvino"), BASE, budget, (), left_s, tail_s)


def measured(recipe: Recipe, **numbers: float) -> Trial:
    """A trial inside the budget unless told otherwise."""
    return trial(recipe, **{"top1": 80.0, "drop": 10.0, "size": 17_000, "ms": 1.5, **numbers})


def probed(found: reach.Means) -> list[Trial]:
    """The probes, and the extra files of the best of them."""
    done = [measured(r) for r in reach.next_recipes(found, ())]
    return [*done, *(measured(r) for r in reach.next_recipes(found, done) if reach.is_probe(r))]


def test_the_goal_is_the_tighter_of_each_pair_of_limits() -> None:
    base = BASE.evidence
    assert base is not None
    got = reach.goal(Budget(max_size_mb=0.05, min_shrink=85, max_latency_ms=1.0, min_speedup=4), base, 1.0, 1.0)
    assert got.bytes == pytest.approx(18_000)
    assert got.latency_ms == 1.0
    assert reach.goal(Budget(max_drop=1), base).bytes is None


def test_narrowing_is_needed_only_where_size_or_time_is_missed() -> None:
    small = trial(Recipe((Step("quantize"),), INT8), size=17_000, ms=1.0)
    large = trial(Recipe((Step("quantize"),), INT8), size=30_000, ms=1.0)
    assert reach.needed([large], BASE, BUDGET)
    assert not reach.needed([large, small], BASE, BUDGET)
    assert not reach.needed([large], BASE, Budget(max_drop=0.1))
    assert reach.needed([Trial(Recipe(), failure=Failure("", ""))], BASE, BUDGET)


def test_first_come_probes_of_measured_and_even_widths_in_the_fastest_format() -> None:
    probes = reach.next_recipes(means(), ())
    assert len(probes) == 2
    assert all(reach.is_probe(r) and r.format == "onnx" and r.precision == INT8 for r in probes)
    assert len({reach.widths_of(r) for r in probes}) == 2
    assert all(dict(r.steps[1].settings)["seconds"] == reach.PROBE_SHARE * 1000 for r in probes)
    for r in probes:
        expected = reach.expected(means(), r)
        assert expected.bytes <= 18_000 * reach.ROOM
        assert expected.latency_ms is not None
        assert expected.latency_ms <= 2.0 * reach.ROOM


def test_the_better_probe_gets_the_long_training_in_every_format_and_all_the_time_there_is() -> None:
    first, second = reach.next_recipes(means(), ())
    long = reach.next_recipes(means(), [measured(first, top1=70.0), measured(second, top1=75.0)])
    assert [r.format for r in long] == ["onnx", "openvino"]
    assert {reach.widths_of(r) for r in long} == {reach.widths_of(second)}
    assert not any(map(reach.is_probe, long))
    assert dict(long[0].steps[1].settings)["seconds"] == 950.0


def test_a_probe_outside_the_limits_never_gets_the_long_training() -> None:
    first, second = reach.next_recipes(means(), ())
    long = reach.next_recipes(means(), [measured(first, top1=74.5), measured(second, top1=75.0, ms=2.5)])
    assert {reach.widths_of(r) for r in long} == {reach.widths_of(first)}


def test_between_a_far_better_probe_that_broke_a_limit_and_a_worse_one_that_kept_it_a_plan_is_tried() -> None:
    """Of 2.0 ms allowed the better took 2.6 where 1.7 were expected; the next is planned for what is left after that."""
    found = means()
    first, second = reach.next_recipes(found, ())
    done = [measured(first, top1=88.0, ms=2.6), measured(second, top1=82.0)]
    again = reach.next_recipes(found, done)
    assert again
    assert all(map(reach.is_probe, again))
    assert not {reach.plan_of(r) for r in again} & {reach.plan_of(first), reach.plan_of(second)}
    wrong = (reach.expected(found, first).latency_ms or 0) / 2.6
    assert all((reach.expected(found, r).latency_ms or 9) <= 2.0 * reach.ROOM * reach.TIME_ROOM * wrong for r in again)
    done += [measured(r, top1=86.0, ms=1.8) for r in again]
    long = [r for r in reach.next_recipes(found, done) if not reach.is_probe(r)]
    extra = [r for r in reach.next_recipes(found, done) if reach.is_probe(r)]
    assert {reach.plan_of(r) for r in (*long, *extra)} == {reach.plan_of(again[0])}


def test_a_plan_that_went_too_far_is_followed_by_one_half_way_back_once() -> None:
    """Of 2.0 ms allowed the better probe took 2.6, the plan after it only 1.2 and answers six points worse."""
    found = means()
    first, second = reach.next_recipes(found, ())
    done = [measured(first, top1=88.0, ms=2.6), measured(second, top1=81.0)]
    far = reach.next_recipes(found, done)[0]
    done.append(measured(far, top1=82.0, ms=1.2))
    (back,) = (r for r in reach.next_recipes(found, done))
    assert reach.is_probe(back)
    ms = [reach.expected(found, r).latency_ms or 0 for r in (far, back, first)]
    assert ms[0] < ms[1] < ms[2]
    done.append(measured(back, top1=86.0, ms=1.6))
    assert {reach.plan_of(r) for r in reach.next_recipes(found, done)} == {reach.plan_of(back)}


def test_limits_are_tightened_by_the_ratio_to_the_original_and_not_by_a_busy_minute() -> None:
    """All times are doubled by other work, the original's too: nothing was overrun."""
    found = means()
    first, second = reach.next_recipes(found, ())
    busy = Beside((3.0,), (16.0,))
    done = [measured(first, top1=88.0, ms=3.0), measured(second, top1=82.0)]
    done[0] = replace(done[0], evidence=replace(done[0].evidence, beside=busy))
    chosen = reach.next_recipes(found, done)
    assert {reach.plan_of(r) for r in chosen} == {reach.plan_of(first)}


def test_where_every_probe_broke_a_limit_narrower_ones_are_planned() -> None:
    probes = reach.next_recipes(means(), ())
    again = reach.next_recipes(means(), [measured(r, ms=2.6) for r in probes])
    assert again
    assert all(map(reach.is_probe, again))
    tightest = min(reach.expected(means(), r).latency_ms or 0 for r in probes)
    assert all((reach.expected(means(), r).latency_ms or 0) < tightest for r in again)


# --- formats that the probes were not made in ------------------------------------------------------------

MORE = ("onnx", "openvino", "c", "d", "e", "f")


def several(asked: tuple[str, ...] = (), left_s: float | None = 1000.0, **file_s: float) -> reach.Means:
    """`means` with six formats, each slower than the one before; a file takes 10 s unless told otherwise."""
    known = {f: costs(other_ms=0.1 * k) for k, f in enumerate(MORE)}
    seconds = {**dict.fromkeys(MORE, 10.0), **file_s}
    return replace(means(left_s=left_s), costs=known, formats=MORE, file_s=seconds, asked=asked)


def test_the_best_probe_is_written_in_a_few_other_formats_before_its_long_training() -> None:
    found = several()
    first, second = reach.next_recipes(found, ())
    done = [measured(first, top1=70.0), measured(second, top1=75.0)]
    extra = reach.next_recipes(found, done)
    assert extra == tuple(replace(second, format=f) for f in ("openvino", "c", "d"))
    assert all(map(reach.is_probe, extra))  # the same training, which is there already
    done += [measured(r, top1=75.0) for r in extra]
    long = reach.next_recipes(found, done)
    assert [r.format for r in long] == list(MORE)
    assert {reach.plan_of(r) for r in long} == {reach.plan_of(second)}
    assert not any(map(reach.is_probe, long))


def test_extra_files_come_in_the_formats_asked_for_first() -> None:
    found = several(asked=("e", "f"))
    probes = [measured(r) for r in reach.next_recipes(found, ())]
    assert [r.format for r in reach.next_recipes(found, probes)] == ["e", "f", "openvino"]


def test_extra_files_take_little_of_the_time_for_training() -> None:
    """950 s are left for training: 47.5 s of them."""
    slow = several(openvino=50.0, c=20.0, d=26.0)
    probes = [measured(r) for r in reach.next_recipes(slow, ())]
    assert [r.format for r in reach.next_recipes(slow, probes)] == ["c", "d"]
    assert not reach.is_probe(reach.next_recipes(several(left_s=200.0), probes)[0])  # 7.5 s
    free = several(left_s=None, openvino=1e9)
    assert [r.format for r in reach.next_recipes(free, probes)] == ["openvino", "c", "d"]


def test_a_format_that_failed_gets_no_second_extra_file() -> None:
    found = several()
    done = [measured(r) for r in reach.next_recipes(found, ())]
    done += [Trial(r, failure=Failure("being built", "no")) for r in reach.next_recipes(found, done)]
    assert not any(map(reach.is_probe, reach.next_recipes(found, done)))


def two(asked: tuple[str, ...], openvino_ms: float) -> tuple[reach.Means, list[Trial]]:
    """Two formats; probes inside the limits in onnx, the better one's file measured in openvino, whose costs have
    learnt of it."""
    known = {"onnx": costs(), "openvino": costs(other_ms=max(openvino_ms - 1.5, 0.0))}
    found = replace(means(left_s=None), costs=known, asked=asked)
    first, second = reach.next_recipes(found, ())
    done = [measured(first, top1=75.0), measured(second, top1=70.0)]
    (extra,) = reach.next_recipes(found, done)
    assert (extra.format, reach.plan_of(extra)) == ("openvino", reach.plan_of(first))
    return found, [*done, measured(extra, top1=75.0, ms=openvino_ms)]


def test_an_asked_format_in_which_the_limit_breaks_gets_probes_of_its_own_once() -> None:
    """2 ms are allowed."""
    found, done = two(("onnx", "openvino"), 2.3)
    again = reach.next_recipes(found, done)
    assert again
    assert all(reach.is_probe(r) and r.format == "openvino" for r in again)
    for r in again:
        assert (reach.expected(found, r).latency_ms or 9.0) <= 2.0
        assert (reach.expected(found, replace(r, format="onnx")).latency_ms or 9.0) <= 2.0
    near = [*done, *(measured(r, top1=74.5) for r in again)]
    assert {reach.plan_of(r) for r in reach.next_recipes(found, near)} <= {reach.plan_of(r) for r in again}
    missed = [*done, *(measured(r, top1=74.5, ms=2.1) for r in again)]
    assert {reach.plan_of(r) for r in reach.next_recipes(found, missed)} == {reach.plan_of(done[0].recipe)}


def test_far_worse_answers_are_no_price_for_the_limit_in_every_format() -> None:
    found, done = two(("onnx", "openvino"), 2.3)
    again = [measured(r, top1=75.0 - reach.SACRIFICE - 0.5) for r in reach.next_recipes(found, done)]
    long = reach.next_recipes(found, [*done, *again])
    assert {reach.plan_of(r) for r in long} == {reach.plan_of(done[0].recipe)}


def test_where_nobody_asked_for_formats_one_that_keeps_the_limits_is_enough() -> None:
    found, done = two((), 2.3)
    assert not any(map(reach.is_probe, reach.next_recipes(found, done)))


def test_an_asked_format_that_keeps_the_limits_changes_nothing() -> None:
    found, done = two(("onnx", "openvino"), 1.9)
    long = reach.next_recipes(found, done)
    assert not any(map(reach.is_probe, long))
    assert {reach.plan_of(r) for r in long} == {reach.plan_of(done[0].recipe)}


def test_planning_anew_comes_to_an_end() -> None:
    done: list[Trial] = []
    for _ in range(20):
        todo = reach.next_recipes(means(), done)
        if not todo:
            break
        done += [measured(r, ms=3.0) for r in todo]
    else:
        pytest.fail("it never ends")
    assert all(reach.is_probe(t.recipe) for t in done)


def test_failed_probes_end_the_search() -> None:
    probes = reach.next_recipes(means(), ())
    assert reach.next_recipes(means(), [Trial(r, failure=Failure("being built", "no")) for r in probes]) == ()


def test_with_no_time_left_for_training_nothing_is_begun() -> None:
    probes = reach.next_recipes(means(), ())
    assert reach.next_recipes(means(left_s=52.0), [measured(r) for r in probes]) == ()


def test_a_finished_long_training_ends_a_search_with_limited_time() -> None:
    probes = reach.next_recipes(means(), ())
    done = [measured(r) for r in probes]
    long = [measured(r, drop=3.0) for r in reach.next_recipes(means(), done)]
    assert reach.next_recipes(means(), [*done, *long]) == ()


def test_without_a_limit_on_time_a_missed_drop_is_trained_twice_as_long_but_not_forever() -> None:
    free = means(left_s=None)
    done = probed(free)
    epochs = []
    while todo := reach.next_recipes(free, done):
        epochs.append(dict(todo[0].steps[1].settings)["epochs"])
        assert dict(todo[0].steps[1].settings)["seconds"] == 0.0
        done += [measured(r, drop=2.0) for r in todo]
    assert epochs == [reach.EPOCHS, 2 * reach.EPOCHS, 4 * reach.EPOCHS]


def test_a_met_budget_ends_the_search() -> None:
    free = means(left_s=None)
    done = probed(free)
    done += [measured(r, drop=0.2) for r in reach.next_recipes(free, done)]
    assert reach.next_recipes(free, done) == ()


def test_a_limit_that_no_width_can_keep_gives_no_recipe() -> None:
    assert reach.next_recipes(means(Budget(max_size_mb=0.001)), ()) == ()


def test_a_probe_and_its_long_training_are_told_apart() -> None:
    first = reach.next_recipes(means(), ())[0]
    assert reach.narrows(first)
    assert not reach.is_probe(replace(first, steps=first.steps[2:]))
    assert not reach.is_probe(Recipe((Step("distill", (("epochs", 1.0),)), Step("quantize")), INT8))


def test_a_plan_of_fewer_bits_alone_names_no_channels_and_is_trained_on_like_any_other() -> None:
    """The step without widths would choose some by a ratio."""
    known = replace(costs(), bits={"b": 1e-6, "c": 1e-6}, harm=dict.fromkeys("abc", 1e6), layer_ms=None)
    whole = predict(known, {})
    budget = Budget(max_drop=0.5, max_size_mb=0.8 * whole.bytes / 1e6 / reach.ROOM)
    found = replace(means(budget, None), costs={"onnx": known, "openvino": known})
    fewer = next(r for r in reach.next_recipes(found, ()) if not reach.widths_of(r))
    assert [s.method for s in fewer.steps] == ["distill", "quantize"]
    assert {name for name, weights, _ in fewer.precision.exceptions if weights == "int4"} <= {"b", "c"}
    assert reach.expected(found, fewer).bytes <= 0.8 * whole.bytes
    probe = measured(fewer, size=int(0.8 * whole.bytes))
    (extra,) = reach.next_recipes(found, [probe])
    assert extra == replace(fewer, format="openvino")
    both = [probe, measured(extra, size=int(0.8 * whole.bytes))]
    long = reach.next_recipes(found, both)
    assert [[s.method for s in r.steps] for r in long] == [["distill", "quantize"]] * 2
    assert not any(map(reach.is_probe, long))
    assert reach.next_recipes(found, [*both, *(measured(r, size=int(0.8 * whole.bytes), drop=0.1) for r in long)]) == ()


def test_an_unchanged_network_is_no_plan_although_it_is_expected_to_fit() -> None:
    """It was measured outside the limit that it is predicted to keep."""
    whole = predict(costs(), {}).bytes
    found = replace(means(Budget(max_size_mb=1.1 * whole / 1e6)), costs={"onnx": costs(), "openvino": costs()})
    plans = reach.candidates(found, reach.Tighter(), "onnx")
    assert plans
    assert all(p.widths and p.predicted.bytes < whole for p in plans)
    loose = replace(found, budget=Budget(max_size_mb=100 * whole / 1e6))
    assert reach.candidates(loose, reach.Tighter(), "onnx") == []
