"""What groups cost alone, held to networks narrowed by hand; measuring ends when told to, and nothing is measured twice."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import nn

from conftest import evidence, trial
from lighten import cost, scout
from lighten.data.splits import ArrayImages, Split
from lighten.errors import RefusedFormat
from lighten.kit import channels, importance, norms
from lighten.plugins import get
from lighten.search.widths import layer_bytes
from lighten.types import ChannelGroup, Data, Device, Job, LayerCost, LayerShape, Precision, Recipe, Step, WidthCost
from nets import CLASSES, SHAPE, images, net

PROTECT = ("fc",)
TASK = get("tasks", "classification")
BASE = evidence()
DEVICE = Device("pc", "PC", "电脑", ("onnx",), channel_multiple=8)


@pytest.fixture(scope="module")
def job() -> Job:
    x, y = images(96, seed=3)
    split = Split(ArrayImages(x.numpy(), y.numpy()), np.arange(96))
    split = dataclasses.replace(split, ready=x.numpy())
    names = tuple(map(str, range(CLASSES)))
    data = Data("made up", names, names, split, split, split, split, "0")
    return Job(data, "classification", DEVICE, None, net("small"))


@pytest.fixture(scope="module")
def groups(job: Job) -> tuple[ChannelGroup, ...]:
    return channels.groups(job.original, SHAPE, PROTECT)


# --- divergence -------------------------------------------------------------------------------------


def test_divergence_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 5, (20, 7)).astype(np.float32), rng.normal(0, 5, (20, 7)).astype(np.float32)
    by_hand = rel_entr(softmax(a.astype(np.float64), 1), softmax(b.astype(np.float64), 1)).sum(1).mean()
    assert scout.damage(TASK, a, b) == pytest.approx(by_hand, rel=1e-12)


def test_divergence_of_two_classes_by_hand() -> None:
    even, sure = np.zeros((1, 2)), np.log([[0.8, 0.2]])  # 0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2)
    assert scout.damage(TASK, even, sure) == pytest.approx(0.5 * math.log(0.25 / 0.16))
    assert scout.damage(TASK, even, even + 3) == pytest.approx(0)  # softmax does not know a constant


def test_divergence_takes_large_outputs_and_says_infinite_where_there_is_none() -> None:
    assert scout.damage(TASK, np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])) == pytest.approx(1e4)
    assert scout.damage(TASK, np.zeros((1, 2)), np.array([[0.0, np.nan]])) == math.inf


# --- which widths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels_", "own", "multiple", "want"),
    [
        (64, 1, 8, (32, 16)),
        (16, 1, 8, (8,)),  # a quarter would be 4: the nearest is 8 again
        (8, 1, 8, ()),
        (48, 1, 32, (32,)),
        (96, 12, 8, (48, 24)),  # multiples of 24
        (24, 1, 1, (12, 6)),
    ],
)
def test_half_and_a_quarter_are_measured_where_the_kernels_like_them(
    channels_: int, own: int, multiple: int, want: tuple[int, ...]
) -> None:
    assert scout.measured_widths(ChannelGroup("g", channels_, (("g", 1),), (), own), multiple) == want


# --- what each costs --------------------------------------------------------------------------------


def test_a_group_costs_what_the_network_narrowed_by_hand_says(job: Job, groups: tuple[ChannelGroup, ...]) -> None:
    before_state = {k: v.clone() for k, v in job.original.state_dict().items()}
    found = scout.width_costs(job, groups, PROTECT)
    assert {row.group for row in found} == {g.name for g in groups if scout.measured_widths(g, 8)}
    x, y = torch.from_numpy(job.data.calibrate.ready), job.data.calibrate.labels
    for row in (found[0], found[-1]):
        model = copy.deepcopy(job.original)
        channels.prune(model, SHAPE, {row.group: row.width}, importance.scorer("l2", model), PROTECT)
        norms.reestimate(model, x.split(64))
        with torch.no_grad():
            a, b = job.original(x), model(x)
        kl = nn.functional.kl_div(
            b.double().log_softmax(1), a.double().log_softmax(1), log_target=True, reduction="sum"
        )
        assert row.damage == pytest.approx(float(kl) / len(x), rel=1e-4)
        lost = (a.argmax(1).numpy() == y).mean() - (b.argmax(1).numpy() == y).mean()
        assert row.drop is not None
        assert row.drop.value == pytest.approx(100 * lost)
    assert all(v.equal(before_state[k]) for k, v in job.original.state_dict().items())


def test_every_group_is_known_before_any_is_measured_again(job: Job, groups: tuple[ChannelGroup, ...]) -> None:
    found = scout.width_costs(job, groups, PROTECT)
    count = len({row.group for row in found})
    assert len({row.group for row in found[:count]}) == count
    assert all(
        narrow.width < wide.width for wide in found[:count] for narrow in found[count:] if narrow.group == wide.group
    )


def test_measuring_ends_when_there_is_enough(job: Job, groups: tuple[ChannelGroup, ...]) -> None:
    seen: list[WidthCost] = []
    found = scout.width_costs(job, groups, PROTECT, made=seen.append, enough=lambda: len(seen) == 3)
    assert list(found) == seen
    assert len(found) == 3


def test_what_is_known_is_not_measured_again(
    job: Job, groups: tuple[ChannelGroup, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scout.width_costs(job, groups, PROTECT)
    seen: list[WidthCost] = []
    again = scout.width_costs(job, groups, PROTECT, known=whole[:-2], made=seen.append)
    assert again == whole
    assert seen == list(whole[-2:])
    monkeypatch.setattr(channels, "prune", lambda *a, **k: pytest.fail("measured again"))
    assert scout.width_costs(job, groups, PROTECT, known=whole) == whole
    assert scout.width_costs(job, groups, PROTECT, known=whole, enough=lambda: True) == whole


def test_a_row_of_another_width_is_no_row_of_this_one(job: Job, groups: tuple[ChannelGroup, ...]) -> None:
    strange = WidthCost(groups[0].name, 3, 0.5)
    seen: list[WidthCost] = []
    found = scout.width_costs(job, groups[:1], PROTECT, known=[strange], made=seen.append)
    assert strange not in found
    assert list(found) == seen


# --- everything together ----------------------------------------------------------------------------


def plain(shapes: Any, precision: Any, format: str) -> cost.CostModel:
    """Half a millisecond a layer, whatever its width."""
    curves = tuple(cost.Curve(s, (cost.Point(s.macs, 0.5),)) for s in shapes)
    return cost.CostModel(format, precision, "none", curves, 0.25)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Formats whose layers were asked to be timed; nothing is timed."""
    asked: list[str] = []

    def measure(shapes: Any, precision: Any, format: str, device: Device, **_: Any) -> cost.CostModel:
        asked.append(format)
        return plain(shapes, precision, format)

    monkeypatch.setattr(cost, "measure", measure)
    return asked


def test_each_format_is_timed_and_every_row_is_handed_out_at_once(job: Job, timed: list[str]) -> None:
    kept: list[tuple[str, Any]] = []
    found = scout.scout(job, ("onnx", "openvino"), keep=lambda kind, row: kept.append((kind, row)))
    assert timed == ["onnx", "openvino"]
    assert [row for kind, row in kept if kind == "width"] == list(found.widths)
    assert [row for kind, row in kept if kind == "cost"] == list(found.bits)
    layers = {n for n, m in job.original.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(found.shapes) == layers
    assert {(r.weights, r.activations) for r in found.bits} == {("int8", "int8"), ("int4", "int8")}
    kept.clear()
    again = scout.scout(
        job, ("onnx",), widths=found.widths, costs=found.bits, keep=lambda kind, row: kept.append((kind, row))
    )
    assert kept == []
    assert (again.widths, set(again.bits)) == (found.widths, set(found.bits))


def test_bits_are_measured_only_where_they_matter_and_there_is_time(job: Job, timed: list[str]) -> None:
    assert scout.scout(job, ("onnx",), bits=False).bits == ()
    known = (LayerCost("fc", "linear", "int8", "int8", 0.1, 0.1, None, 10),)
    short = scout.scout(job, ("onnx",), costs=known, share=lambda part: lambda: True)
    assert short.bits == known
    assert len(short.widths) == 1


def test_each_format_has_an_equal_part_of_the_time_for_its_layers(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def share(part: float) -> Any:
        shares.append(part)
        return lambda: part

    def measure(shapes: Any, precision: Any, format: str, device: Device, *, enough: Any, **_: Any) -> cost.CostModel:
        assert enough() == pytest.approx(scout.TIMES_SHARE / 2)  # the very one of this format
        return plain(shapes, precision, format)

    monkeypatch.setattr(cost, "measure", measure)
    scout.layer_times(job, (), ("onnx", "openvino"), share)
    assert shares == [scout.TIMES_SHARE / 2] * 2
    assert scout.TIMES_SHARE < scout.SCAN_SHARE


def test_a_format_that_takes_no_single_layers_borrows_their_times_and_whole_files_correct_them(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(shapes: Any, precision: Any, format: str, device: Device, **_: Any) -> cost.CostModel:
        if format != "onnx":
            raise RefusedFormat(f"{format} runs no layer of this network alone.")
        return plain(shapes, precision, format)

    monkeypatch.setattr(cost, "measure", measure)
    found = scout.scout(job, ("litert", "onnx"), bits=False)
    whole, recipe = tuple(found.shapes.values()), Recipe((Step("quantize"),), Precision("int8", "int8"), "litert")
    assert cost.predict(found.times["litert"], whole) == cost.predict(found.times["onnx"], whole)
    errors = []
    for format in ("litert", "onnx"):
        seen = dataclasses.replace(trial(dataclasses.replace(recipe, format=format), ms=60.0), network=whole)
        held = scout.costs(found, format, [seen], job, BASE)
        assert held.layer_ms is not None
        errors.append(1 - (held.other_ms + sum(map(held.layer_ms, whole))) / 60.0)
    assert abs(errors[0]) < 0.05  # one file decides where the times are borrowed
    assert errors[1] > 0.3
    with pytest.raises(RefusedFormat):
        scout.layer_times(job, whole, ("litert",))


def test_bits_stop_in_the_middle_and_keep_what_there_is(job: Job) -> None:
    seen: list[LayerCost] = []
    found = scout.bit_costs(job, made=seen.append, enough=lambda: len(seen) == 3)
    assert list(found) == seen
    assert len(found) == 3


def test_costs_hold_what_files_take_beside_their_layers_and_ends_keep_their_bits(job: Job, timed: list[str]) -> None:
    found = scout.scout(job, ("onnx",), bits=False)
    rows = [
        LayerCost(n, "conv", w, "int8", d, 0.0, None, 1)
        for n in found.shapes
        for w, d in (("int8", 0.1), ("int4", 0.4))
    ]
    found = dataclasses.replace(found, bits=tuple(rows), ends=("fc",))
    weights = sum(layer_bytes(s, 8) for s in found.shapes.values())
    recipe = Recipe((Step("quantize"),), Precision("int8", "int8"))
    got = scout.costs(found, "onnx", [trial(recipe, size=int(weights) + 5000)], job, BASE)
    assert got.other_bytes == pytest.approx(5000, abs=1)
    assert "fc" not in got.bits
    assert set(got.bits) == set(found.shapes) - {"fc"}
    assert all(harm == pytest.approx(0.3) for harm in got.bits.values())
    strangers = [trial(Recipe(), size=10**7), trial(dataclasses.replace(recipe, format="openvino"), size=10**7)]
    assert scout.costs(found, "onnx", strangers, job, BASE).other_bytes == 0


def test_a_narrowed_file_is_held_to_the_layers_that_it_has(job: Job, timed: list[str]) -> None:
    found = scout.scout(job, ("onnx",), bits=False)
    layer = LayerShape("a", "conv", 8, 8, (1, 1), (1, 1), (0, 0), (1, 1), source=(4, 4))
    recipe = Recipe((Step("channel_prune"), Step("quantize")), Precision("int8", "int8", (("a", "int4", "int8"),)))
    one = dataclasses.replace(trial(recipe, size=1000), network=(layer,))
    assert scout.costs(found, "onnx", [one], job, BASE).other_bytes == pytest.approx(
        1000 - 32 - 72
    )  # 4 bits, 9 bytes a channel
