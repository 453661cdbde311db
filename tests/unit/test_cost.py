"""The cost model: curves, calibration and the cache against cases worked out by hand, the files against torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lighten import cost, devices
from lighten.cost import CostModel, Curve, Point, calibrated, layer_ms, predict
from lighten.errors import BadConfig, RefusedFormat
from lighten.types import Device, LayerShape

INT8 = ("int8", "int8")


def conv(name: str = "a", inputs: int = 64, outputs: int = 64, groups: int = 1, size: int = 4) -> LayerShape:
    """3 x 3 over size x size, padded."""
    return LayerShape(name, "conv", inputs, outputs, (3, 3), (1, 1), (1, 1), (1, 1), groups, (size, size), clip=True)


def line(layer: LayerShape, *points: tuple[int, float]) -> Curve:
    return Curve(layer, tuple(Point(*p) for p in points))


def model(*curves: Curve, call_ms: float = 0.0) -> CostModel:
    return CostModel("onnx", INT8, "runtime 1", curves, call_ms)


@pytest.fixture
def device() -> Device:
    return dataclasses.replace(devices.load("x86-vnni"), channel_multiple=8)


# --- predicting ---------------------------------------------------------------------------------------


def test_between_two_widths_time_follows_the_multiplications() -> None:
    curve = line(conv(), (100, 1.0), (200, 3.0), (400, 4.0))
    assert [curve.ms(m) for m in (50, 100, 150, 200, 300, 400, 800)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 8.0]


def test_a_network_takes_its_call_and_every_layer() -> None:
    a, b = conv("a"), conv("b", 32, 32)
    costs = model(line(a, (a.macs, 2.0)), line(b, (b.macs, 0.5)), call_ms=0.25)
    assert predict(costs, [a, b]) == pytest.approx(2.75)
    scaled = dataclasses.replace(costs, factor=2.0, overhead_ms=0.1)
    assert predict(scaled, [a, b]) == pytest.approx(0.25 + 5.0 + 0.2)
    fetched = dataclasses.replace(costs, fetch_ms=1e-5)
    assert predict(fetched, [a, b]) == pytest.approx(2.75 + 1e-5 * (64 * 64 * 9 + 32 * 32 * 9))


def test_a_layer_of_another_name_takes_what_its_like_takes_and_a_stranger_the_mean_rate() -> None:
    a, wide = conv("a"), conv("wide", 128, 128)
    costs = model(line(a, (a.macs, 2.0)), line(wide, (wide.macs, 3.0)))
    assert layer_ms(costs, conv("new", 64, 64)) == 2.0
    assert layer_ms(costs, conv("new", 128, 120)) == 3.0
    stranger = conv("new", 64, 64, size=8)
    assert layer_ms(costs, stranger) == pytest.approx(stranger.macs * 5.0 / (a.macs + wide.macs))
    assert layer_ms(costs, dataclasses.replace(stranger, name="a")) == layer_ms(costs, stranger)


def test_measured_times_are_made_to_rise() -> None:
    """Pools worked out by hand: 3 and 1 share 2, then 5, 4 and 3 share 4."""
    points = [Point(k, ms) for k, ms in enumerate((3.0, 1.0, 5.0, 4.0, 3.0, 9.0))]
    assert [p.ms for p in cost.rising(points)] == [2.0, 2.0, 4.0, 4.0, 4.0, 9.0]


# --- calibrating --------------------------------------------------------------------------------------


def two_layers() -> tuple[CostModel, LayerShape, LayerShape]:
    a, b = conv("a"), conv("b", 32, 32)
    return model(line(a, (a.macs // 4, 0.5), (a.macs, 2.0)), line(b, (b.macs, 1.0)), call_ms=0.5), a, b


def test_with_nothing_seen_the_model_is_plain_again() -> None:
    costs, _, _ = two_layers()
    assert calibrated(dataclasses.replace(costs, factor=2.0, overhead_ms=1.0, fetch_ms=1.0), []) == costs


def test_one_file_moves_the_prediction_of_itself_to_what_was_measured() -> None:
    """0.5 + 3.0 alone, 6.5 measured. In closed form: one equation u.x = t of variance NOISE^2 under priors of variance
    SPREAD^2 leaves t - u.x0 times NOISE^2 / (NOISE^2 + sum (u SPREAD)^2)."""
    costs, a, b = two_layers()
    held = calibrated(costs, [([a, b], 6.5)])
    weights = a.weights + b.weights
    u = np.array([3.0, 2 * 0.5, weights * (3.0 / weights)]) / 6.5
    left = (1 - 3.5 / 6.5) * cost.NOISE**2 / (cost.NOISE**2 + float(np.sum((u * cost.SPREAD) ** 2)))
    assert predict(held, [a, b]) == pytest.approx(6.5 * (1 - left))
    assert min(held.factor - 1, held.overhead_ms, held.fetch_ms) > 0


def test_many_files_decide_the_coefficients() -> None:
    """Networks that take 0.5 + 1.4 a layer's time + 0.02 a layer exactly."""
    costs, a, b = two_layers()
    truth = dataclasses.replace(costs, factor=1.4, overhead_ms=0.02)
    nets = [[a], [b], [a, b], [b, b, b], [a, a, b]]
    held = calibrated(costs, [(n, predict(truth, n)) for n in nets * 200])
    assert (held.factor, held.overhead_ms, held.fetch_ms) == pytest.approx((1.4, 0.02, 0.0), abs=0.01)


def test_the_fit_is_that_of_lawson_and_hanson() -> None:
    from scipy.optimize import nnls

    dice = np.random.default_rng(0)
    for _ in range(100):
        a, b = dice.normal(size=(6, 3)), dice.normal(size=6)
        assert cost.non_negative(a, b) == pytest.approx(nnls(a, b)[0], abs=1e-9)


def test_files_faster_than_the_empty_call_teach_nothing() -> None:
    costs, a, _ = two_layers()
    assert calibrated(costs, [([a], 0.4)]) == costs


# --- widths and files ---------------------------------------------------------------------------------


def test_widths_are_rounded_to_what_the_device_likes_and_colours_stay(device: Device) -> None:
    rows = cost.widths(conv(inputs=3, outputs=64), device)
    assert [(r.inputs, r.outputs) for r in rows] == [(3, 64), (3, 48), (3, 32), (3, 24), (3, 16), (3, 8)]
    assert [r.inputs for r in cost.widths(conv(inputs=40, outputs=40), device)] == [40, 32, 16, 8]


def test_a_depthwise_layer_keeps_one_filter_a_channel_and_other_groups_their_number(device: Device) -> None:
    assert all(r.groups == r.inputs == r.outputs for r in cost.widths(conv(groups=64), device))
    rows = cost.widths(conv(inputs=96, outputs=192, groups=6), device)
    assert all(r.groups == 6 and r.inputs % 24 == 0 and r.outputs % 24 == 0 for r in rows)


def torch_output(shape: LayerShape) -> tuple[int, ...]:
    """Of torch's own layer."""
    import torch
    from torch import nn

    if shape.op == "linear":
        layer: nn.Module = nn.Linear(shape.inputs, shape.outputs)
        return tuple(layer(torch.zeros(1, *shape.source, shape.inputs)).shape)
    kind = nn.ConvTranspose2d if shape.op == "conv_transpose" else nn.Conv2d
    layer = kind(
        shape.inputs,
        shape.outputs,
        shape.kernel,
        shape.stride,
        shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
    )  # type: ignore[arg-type]
    return tuple(layer(torch.zeros(1, shape.inputs, *shape.source)).shape)


LAYERS = {
    "conv": LayerShape("a", "conv", 16, 24, (3, 5), (2, 1), (1, 0), (1, 2), source=(9, 12), clip=True),
    "depthwise": conv(inputs=16, outputs=16, groups=16),
    "turned": LayerShape("a", "conv_transpose", 16, 8, (4, 4), (2, 2), (1, 1), (1, 1), source=(5, 6), bias=False),
    "pooled": LayerShape("a", "linear", 32, 10),
    "tokens": LayerShape("a", "linear", 32, 24, source=(7,)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("precision", [INT8, ("int4", "int8"), ("float32", "float32"), ("int8", "float32")])
def test_the_file_of_a_layer_answers_in_the_shape_of_torchs_own(
    name: str, precision: cost.Choice, device: Device
) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from lighten.quant.timing import network

    layer = cost.alone(LAYERS[name])
    file = network(layer, *precision, device)
    flows = "uint8" if precision[1] == "int8" else "float32"
    for raw in (file, cost.twin(file)):
        session = ort.InferenceSession(raw, providers=["CPUExecutionProvider"])
        (answer,) = session.run(None, {"input": np.ones(layer.source, flows)})
        assert answer.shape == torch_output(LAYERS[name])


def test_the_twin_adds_two_layers_of_the_same_values_in_another_order(device: Device) -> None:
    """In float64: x (W + W moved by one place)."""
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    from lighten.quant.timing import network

    file = network(cost.alone(LAYERS["pooled"]), "float32", "float32", device)
    kept = onnx.load_from_string(file).graph.initializer
    weight = next(onnx.numpy_helper.to_array(c) for c in kept if c.name == "weight").astype(np.float64)
    x = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    session = ort.InferenceSession(cost.twin(file), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"input": x})
    moved = np.roll(weight.reshape(-1), -1).reshape(weight.shape)
    np.testing.assert_allclose(answer, x @ (weight + moved).T, rtol=1e-4, atol=1e-5)


# --- measuring ----------------------------------------------------------------------------------------


class Bench:
    """A clock that only the layers advance, each by a time of its own; `refuse` says which file does not load."""

    def __init__(self, refuse: Callable[[int], bool] = lambda _macs: False) -> None:
        self.now, self.loads, self.refuse = 0.0, 0, refuse

    def load(self, raw: bytes, image: np.ndarray) -> Callable[[], None]:
        import onnx

        self.loads += 1
        layers = [c for c in onnx.load_from_string(raw).graph.initializer if c.name in ("weight", "weight_twin")]
        macs = math.prod(layers[0].dims) * 16
        if self.refuse(macs):
            raise RuntimeError("no such kernel")

        def run() -> None:
            self.now += (5.0 + len(layers) * macs / 1e3) * 1e-3

        return run

    def clock(self) -> float:
        return self.now

    def measure(self, shapes: list[LayerShape], device: Device, cache: Path, **more: object) -> CostModel:
        precision = more.pop("precision", INT8)
        return cost.measure(shapes, precision, "onnx", device, cache, load=self.load, clock=self.clock, **more)  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    pytest.importorskip("onnx")
    return tmp_path / "deep" / "times.json"


def test_a_layer_takes_its_call_less_that_of_an_empty_network(device: Device, cache: Path) -> None:
    a = conv("a")
    costs = Bench().measure([a], device, cache)
    assert costs.call_ms == pytest.approx(5.0 + 8 * 16 / 1e3)
    assert [(p.macs, pytest.approx(p.ms)) for p in costs.curves[0].points] == [
        (n * n * 9 * 16, n * n * 9 * 16 / 1e3) for n in (8, 16, 24, 32, 48, 64)
    ]
    assert costs.guessed == ()
    assert predict(costs, [a, a]) == pytest.approx(costs.call_ms + 2 * a.macs / 1e3)


def test_layers_of_one_shape_are_timed_once_and_later_read_from_the_cache(device: Device, cache: Path) -> None:
    bench = Bench()
    first = bench.measure([conv("a"), conv("b")], device, cache)
    assert bench.loads == 13  # six widths once and side by side, and the empty network
    again = Bench()
    assert again.measure([conv("b"), conv("a")], device, cache).by_name == first.by_name
    assert again.loads == 0
    again.measure([conv("a"), conv("c", 32, 32, size=8)], device, cache)
    assert again.loads == 9  # 32, 24, 16 and 8 wide, and the empty network
    again.measure([conv("a")], device, cache, precision=("float32", "float32"))
    assert again.loads == 9 + 13
    assert len(json.loads(cache.read_text())["times"]) == 2


def test_four_bit_weights_beside_integer_activations_run_the_kernels_of_eight(device: Device, cache: Path) -> None:
    bench = Bench()
    eight = bench.measure([conv()], device, cache)
    four = bench.measure([conv()], device, cache, precision=("int4", "int8"))
    assert bench.loads == 13
    assert (four.curves, four.precision) == (eight.curves, ("int4", "int8"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": ', '"version": 9'),
        lambda text: "[1, 2]",
        lambda text: text.replace("5.0", '"5"', 1) if "5.0" in text else "{}",
        lambda text: '{"version": 1, "times": {"x": {"y": -1.0}}}',
        lambda text: "\x00",
    ],
)
def test_a_damaged_cache_is_measured_again(damage: Callable[[str], str], device: Device, cache: Path) -> None:
    first = Bench().measure([conv()], device, cache)
    whole = cache.read_text()
    cache.write_text(damage(whole))
    bench = Bench()
    assert bench.measure([conv()], device, cache) == first
    assert bench.loads == 13
    assert json.loads(cache.read_text()) == json.loads(whole)


def test_a_layer_that_the_runtime_refuses_is_guessed_from_the_others_and_named(device: Device, cache: Path) -> None:
    a, b = conv("a"), LayerShape("b", "linear", 512, 1000)
    known = {8 * 16, *(n * n * 9 * 16 for n in (8, 16, 24, 32, 48, 64))}
    shy = Bench(refuse=lambda macs: macs not in known)
    costs = shy.measure([a, b], device, cache)
    assert costs.guessed == ("b",)
    assert layer_ms(costs, b) == pytest.approx(b.macs / 1e3)  # the stub's rate


def test_where_no_layer_can_be_timed_the_format_is_refused(device: Device, cache: Path) -> None:
    with pytest.raises(RefusedFormat, match=r"no layer .* int8/int8"):
        Bench(refuse=lambda _macs: True).measure([conv()], device, cache)


@pytest.mark.parametrize("precision", [("int8", "dynamic"), ("int3", "int8"), ("int8", "int16")])
def test_a_precision_without_layers_of_its_own_is_refused(precision: cost.Choice, device: Device, cache: Path) -> None:
    with pytest.raises(BadConfig):
        Bench().measure([conv()], device, cache, precision=precision)


class Patience:
    """There is enough once it was asked `n` times."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def in_cache(cache: Path, device: Device, *layers: LayerShape) -> list[tuple[str, int]]:
    """(layer, width) whose time is there."""
    (times,) = json.loads(cache.read_text())["times"].values()
    return [(s.name, w.outputs) for s in layers for w in cost.widths(s, device) if cost.key(w) in times]


def assert_alike(one: CostModel, other: CostModel) -> None:
    for a, b in zip(one.curves, other.curves, strict=True):
        assert [p.macs for p in a.points] == [p.macs for p in b.points]
        assert [p.ms for p in a.points] == pytest.approx([p.ms for p in b.points])


def test_without_time_one_layer_is_timed_and_all_else_takes_its_rate(device: Device, cache: Path) -> None:
    a, b = conv("a", 32, 32), conv("b")
    costs = Bench().measure([a, b], device, cache, enough=lambda: True)
    assert in_cache(cache, device, a, b) == [("b", 64)]
    assert costs.guessed == ("a",)
    assert layer_ms(costs, a) == pytest.approx(a.macs / 1e3)
    narrow = conv("b", 8, 8)
    assert layer_ms(costs, narrow) == pytest.approx(narrow.macs / 1e3)  # and not what the whole layer takes


def test_whole_layers_come_first_and_the_next_call_goes_on_with_the_rest(device: Device, cache: Path) -> None:
    a, b = conv("a", size=8), conv("b")
    first, second = Bench(), Bench()
    first.measure([b, a], device, cache, enough=Patience(2))
    assert in_cache(cache, device, a, b) == [("a", 64), ("a", 8), ("b", 64)]
    assert first.loads == 1 + 2 * 3
    whole = second.measure([b, a], device, cache)
    assert second.loads == 1 + 2 * 9
    assert_alike(whole, Bench().measure([b, a], device, cache.with_name("fresh.json")))


def test_layers_that_are_refused_do_not_use_up_the_time(device: Device, cache: Path) -> None:
    a, b = conv("a"), LayerShape("b", "linear", 1024, 1000)  # b has more work, so that it comes first
    costs = Bench(refuse=lambda macs: macs > 64 * 64 * 9 * 16).measure([a, b], device, cache, enough=lambda: True)
    assert costs.guessed == ("b",)
    assert layer_ms(costs, a) == pytest.approx(a.macs / 1e3)


def test_time_that_ends_while_layers_take_turns_ends_the_turns(device: Device, cache: Path) -> None:
    patient, hasty = Bench(), Bench()
    layer = LayerShape("a", "linear", 16, 16)  # timed at 16 and 8
    whole = patient.measure([layer], device, cache)
    short = hasty.measure([layer], device, cache.with_name("fresh.json"), enough=Patience(2))
    assert hasty.now < patient.now / 4
    assert_alike(short, whole)  # the stub's layers always take the same


def test_times_of_another_format_are_corrected_by_one_whole_file() -> None:
    costs, a, b = two_layers()
    lent = cost.borrowed(costs, "litert")
    assert (lent.format, lent.curves) == ("litert", costs.curves)
    assert predict(calibrated(lent, [([a, b], 30.0)]), [a, b]) == pytest.approx(30.0, rel=0.02)
    assert predict(calibrated(costs, [([a, b], 30.0)]), [a, b]) < 25.0


def test_wider_is_never_predicted_faster(device: Device, cache: Path) -> None:
    dice = np.random.default_rng(1)
    bench = Bench()
    still = bench.clock
    bench.clock = lambda: still() * dice.uniform(0.7, 1.3)  # type: ignore[method-assign]
    costs = bench.measure([conv(inputs=128, outputs=128)], device, cache)
    times = [predict(costs, [conv(inputs=n, outputs=m)]) for n in range(8, 200, 8) for m in (n,)]
    assert times == sorted(times)


def test_the_faster_half_does_not_hear_the_neighbours() -> None:
    assert cost.faster([1.0, 1.2, 50.0, 1.1, 70.0, 1.0]) == 1.0
    assert cost.faster([3.0]) == 3.0


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_real_runtimes_time_real_layers(format: str, device: Device, cache: Path) -> None:
    pytest.importorskip("onnxruntime" if format == "onnx" else "openvino")
    small, large = conv("small", 8, 8), conv("large", 64, 64, size=32)
    costs = cost.measure([small, large], INT8, format, device, cache)
    assert costs.guessed == ()
    assert layer_ms(costs, large) > layer_ms(costs, small) >= 0
    assert 0 < predict(costs, [small, large]) < 1000
