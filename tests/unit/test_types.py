"""The nouns: limits by hand, plain data and back, names that never change."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from conftest import evidence, trial
from lighten.types import (
    Agreement,
    Artifact,
    Budget,
    ClassChange,
    Device,
    Estimate,
    Evidence,
    Failure,
    Final,
    Latency,
    Miss,
    Precision,
    Preprocess,
    Recipe,
    Size,
    Step,
    Trial,
    Weight,
    from_json,
    shrink,
    speedup,
    to_json,
)

MIXED = Recipe(
    (Step("channel_prune", (("layers", ("a", "b")), ("share", 0.25))), Step("quantize", (("images", 64),))),
    Precision("int8", "int8", (("fc", "float32", "float32"),)),
    "openvino",
)
MIXED_ID = "0be34f29d4"  # a constant: runs resume by it, on every machine and in every version

FULL = Evidence(
    metric_name="top1",
    metric=Estimate(91.25, 0.42, 5000),
    drop=Estimate(-0.125, 0.11, 5000),
    extra=(("top5", Estimate(99.5, 0.1, 5000)),),
    flipped=17,
    classes=(ClassChange("猫", 88.0, 87.5, 500), ClassChange("ship", 95.0, 96.0, 500)),
    latency=(Latency(1, (3.5, 3.25, 3.75)), Latency(8, (1.0,))),
    throughput=812.5,
    memory_mb=61.5,
    size=Size(270_123, 201_456, (Weight("conv.weight", "int8", (64, 3, 3, 3), 1728, 0.015625),)),
    fidelity=Agreement(256, 100.0, 1e-3, 2e-2, 41.5),
    drift=Agreement(5000, 98.5, 1e-2, 2e-1, 27.25),
    runtime="ONNX Runtime 1.31.1",
)
WHOLE = Trial(
    MIXED,
    Artifact("artifacts/x/model.xml", "openvino", "ab" * 32, ("model.bin",)),
    FULL,
    None,
    12.5,
    ({"layer": "stem.0", "weights": "int8", "shape": (64, 3, 3, 3), "input_range": (-0.5, 2.25)},),
)


# --- budget -------------------------------------------------------------------------------------------

BASE = evidence(size=1_000_000, ms=10.0, memory_mb=100.0)
GOT = evidence(size=400_000, ms=4.0, memory_mb=80.0, drop=0.75)


@pytest.mark.parametrize(
    "limit, met, missed, got",
    [
        ("max_drop", 0.75, 0.74, 0.75),
        ("max_size_mb", 0.4, 0.39, 0.4),
        ("min_shrink", 60.0, 60.1, 60.0),
        ("max_latency_ms", 4.0, 3.9, 4.0),
        ("min_speedup", 2.5, 2.6, 2.5),
        ("max_memory_mb", 80.0, 79.0, 80.0),
    ],
)
def test_each_limit_is_met_at_its_value_and_missed_beyond(limit: str, met: float, missed: float, got: float) -> None:
    assert Budget(**{limit: met}).misses(GOT, BASE) == ()
    (miss,) = Budget(**{limit: missed}).misses(GOT, BASE)
    assert miss == Miss(limit, missed, pytest.approx(got), miss.unit)
    assert limit in str(miss)


def test_no_limit_is_never_missed_and_all_can_be_at_once() -> None:
    assert Budget().misses(GOT, BASE) == ()
    every = Budget(0.0, 0.1, 99.0, 1.0, 9.0, 1.0)
    assert [m.limit for m in every.misses(GOT, BASE)] == [
        f.name for f in dataclasses.fields(Budget) if f.name != "time_s"
    ]


def test_a_limit_of_zero_is_a_limit() -> None:
    assert [m.limit for m in Budget(max_drop=0.0).misses(evidence(drop=0.01), BASE)] == ["max_drop"]
    assert Budget(max_drop=0.0).misses(evidence(drop=-0.5), BASE) == ()
    assert [m.limit for m in Budget(min_shrink=0.0).misses(evidence(size=1_000_001), BASE)] == ["min_shrink"]


def test_a_better_measured_drop_replaces_the_select_one() -> None:
    assert [m.got for m in Budget(max_drop=1.0).misses(GOT, BASE, drop=1.5)] == [1.5]
    assert Budget(max_drop=0.5).misses(GOT, BASE, drop=0.0) == ()


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Budget)])
def test_nonsense_budgets_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Budget(**{name: value})


def test_a_shrink_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="min_shrink"):
        Budget(min_shrink=100)


def test_shrink_and_speedup_by_hand() -> None:
    assert shrink(GOT, BASE) == pytest.approx(60.0)
    assert speedup(GOT, BASE) == pytest.approx(2.5)


# --- latency ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 19, 20, 21, 60, 101])
def test_percentiles_are_numpys(n: int) -> None:
    samples = np.random.default_rng(n).gamma(2, 3, n)
    row = Latency(1, tuple(samples.tolist()))
    assert row.p50 == pytest.approx(np.median(samples))
    assert row.p95 == np.percentile(samples, 95, method="inverted_cdf")


def test_p50_takes_the_nearest_thread_count() -> None:
    assert FULL.p50() == 3.5
    assert FULL.p50(6) == 1.0


# --- plain data and back ------------------------------------------------------------------------------


def test_a_whole_trial_survives_json() -> None:
    text = json.dumps(to_json(WHOLE), allow_nan=False)
    assert from_json(Trial, json.loads(text)) == WHOLE
    failed = Trial(MIXED, failure=Failure("being built", "why"))
    assert from_json(Trial, json.loads(json.dumps(to_json(failed), allow_nan=False))) == failed


def test_every_noun_survives_json() -> None:
    nouns = (
        Budget(max_drop=1), Device("a", "b", "c", ("onnx",), features=("avx2",)), Preprocess(8, 8, "crop", 9), MIXED,
        Final(Estimate(1, 2, 3), Estimate(1, 2, 3), Estimate(1, 2, 3), 0, FULL.classes, FULL.extra), FULL,
    )  # fmt: skip
    for noun in nouns:
        assert from_json(type(noun), json.loads(json.dumps(to_json(noun), allow_nan=False))) == noun


def test_nan_and_infinity_become_null_and_come_back_as_nan() -> None:
    for odd in (math.nan, math.inf, -math.inf):
        text = json.dumps(to_json(Estimate(odd, 0.0, 0)), allow_nan=False)
        assert json.loads(text)["value"] is None
        assert math.isnan(from_json(Estimate, json.loads(text)).value)


def test_what_is_unknown_to_this_version_is_left_out() -> None:
    assert from_json(Estimate, {"value": 1, "error": 2, "n": 3, "later": 4}) == Estimate(1.0, 2.0, 3)


@pytest.mark.parametrize("bad", [3, "text", [], None, {"value": 1}, {"value": "x", "error": 1, "n": 1}])
def test_data_of_another_shape_is_refused_as_documented(bad: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_json(Estimate, bad)


def test_a_recipe_is_replayed_whole() -> None:
    again = from_json(Recipe, json.loads(json.dumps(to_json(MIXED))))
    assert again == MIXED
    assert hash(again) == hash(MIXED)
    assert again.id == MIXED.id


# --- names --------------------------------------------------------------------------------------------


def test_the_id_of_a_recipe_never_changes() -> None:
    assert MIXED.id == MIXED_ID
    code = "from test_types import MIXED; print(MIXED.id)"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"},
    )  # fmt: skip
    assert found.stdout.strip() == MIXED_ID


def test_different_recipes_have_different_ids() -> None:
    recipes = [
        Recipe(), Recipe(format="openvino"), Recipe(precision=Precision("float16", "float16")), MIXED,
        Recipe((Step("quantize"),), Precision("int8", "int8")), Recipe((Step("quantize"),), Precision("int8", "float32")),
        Recipe((Step("quantize", (("images", 64),)),), Precision("int8", "int8")),
        Recipe((Step("quantize", (("images", 65),)),), Precision("int8", "int8")),
        Recipe((), Precision("int8", "int8", (("fc", "float32", "float32"),))),
        Recipe(MIXED.steps[::-1], MIXED.precision, MIXED.format),
    ]  # fmt: skip
    assert len({r.id for r in recipes}) == len(recipes)
    assert trial(MIXED).id == MIXED.id


def test_complexity_counts_methods_but_not_quantizing() -> None:
    assert (Recipe().complexity, Recipe((Step("quantize"),)).complexity, MIXED.complexity) == (0, 0, 1)
    assert "channel prune" in MIXED.title
    assert "openvino" in MIXED.title


@pytest.mark.parametrize(
    "bad",
    [
        {"height": 0}, {"width": 9000}, {"mode": "pad"}, {"mode": "crop"}, {"mode": "crop", "resize": 7},
        {"interpolation": "area"}, {"channel_order": "RGBA"}, {"mean": (0.5,)}, {"std": (1.0, 0.0, 1.0)},
        {"std": (1.0, -1.0, 1.0)}, {"mean": (math.nan, 0.0, 0.0)}, {"channel_order": "GRAY"},
    ],
)  # fmt: skip
def test_nonsense_preprocessing_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|need|finite"):
        Preprocess(**{"height": 8, "width": 8, **bad})  # type: ignore[arg-type]
