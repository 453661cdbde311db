"""Each layer alone: the damage is that of a network written out by hand, and a scan can stop and go on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parents[1]))
from lighten.advice import guilty
from lighten.errors import BadConfig, BadData, BadModel
from lighten.quant import graph as graphs
from lighten.quant import sensitivity, timing
from lighten.quant.sensitivity import divergences, scan
from lighten.types import Device, LayerCost, from_json, to_json
from nets import SHAPE, images, net

DEVICE = Device("x86", "x86", "x86", ("onnx",))
INTS = (("int4", "int8"), ("int8", "int8"))
ALL = (*INTS, ("int4", "int4"), ("float16", "float16"), ("float32", "float32"))


class Two(nn.Module):
    """conv-relu, a branch around a second conv, linear: small enough to write out in numpy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu_()
        return self.fc((self.second(y) + y).mean((2, 3)))


@cache
def folded(name: str) -> GraphModule:
    """Captured once for all tests; a scan works on its own copy."""
    return graphs.fold(Two() if name == "two" else net(name), SHAPE)


def batches(n: int = 48, batch: int = 16) -> list[Tensor]:
    return list(images(n, 3)[0].split(batch))


def rows_of(rows: tuple[LayerCost, ...]) -> dict[tuple[str, str, str], LayerCost]:
    return {row.key: row for row in rows}


# --- against numpy ------------------------------------------------------------------------------------


def fake(x: np.ndarray, scale: np.ndarray, zero: int, low: int, high: int) -> np.ndarray:
    return (np.clip(np.round(x / scale) + zero, low, high) - zero) * scale


def min_max_weight(w: np.ndarray, bits: int) -> np.ndarray:
    """Symmetric, one scale an output channel, the whole range."""
    top = 2 ** (bits - 1) - 1
    flat = np.abs(w.reshape(len(w), -1)).max(1)
    scale = (flat / top).astype(np.float32).astype(np.float64).reshape(-1, *[1] * (w.ndim - 1))
    return fake(w, scale, 0, -top, top)


def min_max_input(x: np.ndarray, bits: int) -> np.ndarray:
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = np.float64(np.float32((high - low) / (qmax - qmin)))
    return fake(x, scale, int(np.clip(np.round(qmin - low / ((high - low) / (qmax - qmin))), qmin, qmax)), qmin, qmax)


Rounder = Callable[[np.ndarray], np.ndarray]


def numpy_two(model: Two, x: np.ndarray, guilty: str = "", w: Rounder = np.array, a: Rounder = np.array) -> np.ndarray:
    """`Two` in float64 with one layer's weight and input rounded; the branch beside `second` stays float."""
    p = {k: v.detach().double().numpy() for k, v in model.named_parameters()}

    def layer(name: str, given: np.ndarray) -> np.ndarray:
        weight = p[f"{name}.weight"]
        weight, given = (w(weight), a(given)) if name == guilty else (weight, given)
        bias = p.get(f"{name}.bias", np.zeros(len(weight)))
        if weight.ndim == 2:
            return given @ weight.T + bias
        return np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], given) + bias[:, None, None]

    y = np.maximum(layer("first", x), 0)
    return layer("fc", (layer("second", y) + y).mean((2, 3)))


def numpy_kl(before: np.ndarray, after: np.ndarray) -> float:
    p, q = (np.exp(z - z.max(1, keepdims=True)) for z in (before, after))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("name", ["first", "second", "fc"])
@pytest.mark.parametrize("weights, activations", [("int4", "int8"), ("int8", "int8"), ("int4", "int4")])
def test_damage_is_that_of_one_rounded_layer_in_numpy(name: str, weights: str, activations: str) -> None:
    model, (x, labels) = Two(), images(48, 3)
    got = rows_of(scan(folded("two"), SHAPE, list(x.split(16)), DEVICE, ALL, labels=labels, methods=("min-max",)))
    bits = {"int4": 4, "int8": 8}
    before = numpy_two(model, x.double().numpy())
    after = numpy_two(
        model, x.double().numpy(), name,
        lambda w: min_max_weight(w, bits[weights]), lambda v: min_max_input(v, bits[activations]),
    )  # fmt: skip
    row = got[(name, weights, activations)]
    assert row.damage == pytest.approx(numpy_kl(before, after), rel=0.02, abs=1e-9)
    assert row.mse == pytest.approx(((after - before) ** 2).sum() / (before**2).sum(), rel=0.02)
    lost = (before.argmax(1) == labels.numpy()) * 1.0 - (after.argmax(1) == labels.numpy())
    assert row.drop is not None
    assert row.drop.value == pytest.approx(100 * lost.mean(), abs=1e-6)
    assert row.drop.n == 48


def test_float_rows_do_no_damage_and_half_precision_next_to_none() -> None:
    got = rows_of(scan(folded("two"), SHAPE, batches(), DEVICE, ALL, labels=images(48, 3)[1]))
    for name in ("first", "second", "fc"):
        row = got[(name, "float32", "float32")]
        assert (row.damage, row.mse, row.drop.value) == (0.0, 0.0, 0.0)  # type: ignore[union-attr]
        assert 0 < got[(name, "float16", "float16")].mse < got[(name, "int8", "int8")].mse


def test_bytes_are_weights_scales_and_bias() -> None:
    got = rows_of(scan(folded("two"), SHAPE, batches(), DEVICE, ALL))
    assert got[("first", "float32", "float32")].bytes == 4 * (3 * 4 + 4)
    assert got[("first", "float16", "float16")].bytes == 2 * (3 * 4 + 4)
    assert got[("first", "int8", "int8")].bytes == 3 * 4 + 4 * 4 + 4 * 4
    assert got[("first", "int4", "int8")].bytes == 6 + 4 * 4 + 4 * 4
    assert got[("second", "int4", "int8")].bytes == 8 + 4 * 4
    assert got[("fc", "int4", "int8")].bytes == 10 + 4 * 5 + 4 * 5
    one_scale = replace(DEVICE, per_channel_weights=False)
    assert rows_of(scan(folded("two"), SHAPE, batches(), one_scale, INTS))[("second", "int8", "int8")].bytes == 16 + 4


@pytest.mark.parametrize("name", ["small", "mobile"])
def test_a_rerun_from_the_layer_is_the_whole_network_with_that_layer_rounded(name: str) -> None:
    """The weight written into a copy and the input rounded by a hook: the module runs from its start."""
    whole, x = folded(name), images(32, 3)[0]
    got = rows_of(scan(whole, SHAPE, [x[:16], x[16:]], DEVICE, (("int4", "float32"),)))
    with torch.no_grad():
        before = whole(x)
        for layer in graphs.layers(whole):
            other = copy.deepcopy(whole)
            weight = graphs.parameter(other, layer.weight)
            scale, _ = sensitivity.with_bits(_watched(weight), 4).calculate_qparams()
            view = [-1] + [1] * (weight.ndim - 1)
            rounded = torch.clamp(torch.round(weight / scale.view(view)), -7, 7) * scale.view(view)
            graphs.overwrite(other, layer.weight, rounded)
            expected = float(divergences(before, other(x)).mean())
            assert got[(layer.name, "int4", "float32")].damage == pytest.approx(expected, rel=1e-3, abs=1e-9)


def _watched(weight: Tensor) -> sensitivity.WeightObserver:
    seen = sensitivity.WeightObserver(torch.int8, torch.per_channel_symmetric, -127, 127, 0)
    seen(weight)
    return seen


def test_a_module_that_runs_twice_is_one_layer_rounded_both_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(self.conv(self.stem(x)).relu()).mean((2, 3)))

    model, x = Twice(), images(16, 3)[0]
    got = rows_of(scan(model, SHAPE, [x], DEVICE, (("int4", "float32"),), methods=("min-max",)))
    assert [key[0] for key in got] == ["stem", "conv", "fc"]
    other = copy.deepcopy(model)
    rounded = min_max_weight(model.conv.weight.detach().double().numpy(), 4)
    with torch.no_grad():
        before = model(x)
        other.conv.weight.copy_(torch.from_numpy(rounded).float())
        expected = float(divergences(before, other(x)).mean())
    assert got[("conv", "int4", "float32")].damage == pytest.approx(expected, rel=1e-3)


# --- how it runs ----------------------------------------------------------------------------------------


def test_memory_only_changes_how_often_it_starts_again() -> None:
    plenty, some, none = (
        scan(folded("small"), SHAPE, batches(), DEVICE, (("int4", "int8"),), methods=("min-max",), memory=memory)
        for memory in (1 << 30, 200_000, 0)
    )
    assert plenty == some == none


def test_a_scan_goes_on_where_it_was_stopped() -> None:
    whole = scan(folded("two"), SHAPE, batches(), DEVICE, INTS)
    made: list[LayerCost] = []

    class Stop(Exception):
        pass

    def write(row: LayerCost) -> None:
        made.append(row)
        if len(made) == 3:
            raise Stop

    with pytest.raises(Stop):
        scan(folded("two"), SHAPE, batches(), DEVICE, INTS, made=write)
    assert tuple(made) == whole[:3]
    known = [replace(row, damage=7.0) for row in made]  # so that a row that is measured again would show
    rest: list[LayerCost] = []
    steps: list[tuple[int, int]] = []
    got = scan(
        folded("two"), SHAPE, batches(), DEVICE, INTS,
        known=known, made=rest.append, step=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert got == (*known, *whole[3:])
    assert tuple(rest) == whole[3:]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_when_all_is_known_no_image_is_looked_at() -> None:
    whole = scan(folded("two"), SHAPE, batches(), DEVICE, INTS)
    assert scan(folded("two"), SHAPE, [], DEVICE, INTS, known=reversed(whole)) == whole


def test_rows_survive_json() -> None:
    for row in scan(folded("two"), SHAPE, batches(), DEVICE, INTS, labels=images(48, 3)[1]):
        assert from_json(LayerCost, to_json(row)) == row


def test_the_model_and_a_folded_graph_stay_as_they_were() -> None:
    model, graph = Two(), folded("two")
    before = {k: v.clone() for k, v in model.state_dict().items()}, len(graph.graph.nodes)
    assert scan(graph, SHAPE, batches(), DEVICE, INTS) == scan(model, SHAPE, batches(), DEVICE, INTS)
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert len(graph.graph.nodes) == before[1]


def test_kernels_without_vnni_harm_more_at_8_bits() -> None:
    """7-bit weights there; 4-bit weights are the same."""
    usual, seven = (
        rows_of(scan(folded("two"), SHAPE, batches(), d, INTS, methods=("min-max",)))
        for d in (DEVICE, replace(DEVICE, reduce_range=True))
    )
    assert seven[("second", "int8", "int8")].mse > usual[("second", "int8", "int8")].mse
    assert seven[("second", "int4", "int8")] == usual[("second", "int4", "int8")]


# --- bad input ----------------------------------------------------------------------------------------------


def test_dead_channels_and_constant_inputs_are_weighed() -> None:
    """A filter of zeros and a channel that never fires: finite numbers, and one image is enough."""
    model = Two()
    with torch.no_grad():
        model.first.weight[1], model.first.bias[1] = 0.0, -1.0
        model.second.weight[2] = 0.0
    for x in (batches(), [torch.full((1, *SHAPE), 0.5)], [torch.zeros(1, *SHAPE)]):
        rows = scan(model, SHAPE, x, DEVICE, INTS)
        assert len(rows) == 6
        assert all(np.isfinite([row.damage, row.mse]).all() for row in rows)


def test_bad_images_are_named() -> None:
    nan = batches()
    nan[1][3, 0, 0, 0] = float("nan")
    with pytest.raises(BadData, match="images 16 to 31"):
        scan(folded("two"), SHAPE, nan, DEVICE, INTS)
    with pytest.raises(BadData, match="no calibration images"):
        scan(folded("two"), SHAPE, [], DEVICE, INTS)
    with pytest.raises(BadData, match=r"\(3, 8, 8\), not \(3, 16, 16\)"):
        scan(folded("two"), SHAPE, [torch.zeros(2, 3, 8, 8)], DEVICE, INTS)
    with pytest.raises(BadData, match="48 calibration images and 5 labels"):
        scan(folded("two"), SHAPE, batches(), DEVICE, INTS, labels=torch.zeros(5))


def test_bad_questions_are_refused() -> None:
    with pytest.raises(BadConfig, match="int3"):
        scan(folded("two"), SHAPE, batches(), DEVICE, (("int3", "int8"),))
    with pytest.raises(BadConfig, match="no precision"):
        scan(folded("two"), SHAPE, batches(), DEVICE, ())
    with pytest.raises(BadModel, match="answers shape"):
        scan(nn.Sequential(nn.Conv2d(3, 4, 1)), SHAPE, batches(), DEVICE, INTS)


def test_a_layer_that_runtimes_cannot_store_has_float_rows_only() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    torch.nn.init.normal_(model[1].weight)  # type: ignore[arg-type]
    got = rows_of(scan(model, SHAPE, batches(), DEVICE, ALL))
    assert [key[1] for key in got if key[0] == "1"] == ["float16", "float32"]
    assert [key[1] for key in got if key[0] == "0"] == ["int4", "int8", "int4", "float16", "float32"]


# --- time -------------------------------------------------------------------------------------------------------


def alone(name: str = "small") -> set[timing.Alone]:
    graph = folded(name)
    shapes = timing.input_shapes(graph, SHAPE)
    return {timing.describe(graph, layer, shapes[layer.node]) for layer in graphs.layers(graph)}


def test_a_layer_alone_is_what_it_is_in_the_network() -> None:
    found = {a.weight: a for a in alone()}
    deep = found[(16, 1, 3, 3)]
    assert deep.source == (1, 16, 8, 8)
    assert deep.clip == (0.0, 6.0)
    assert dict(deep.attributes) == {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "group": 16}
    assert found[(10, 96)].op == "Gemm"
    assert found[(10, 96)].source == (1, 96)


@pytest.mark.parametrize("activations, number", [("uint8", 2), ("int8", 3)])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_integer_layers_run_as_one_integer_kernel(tmp_path: Path, weights: str, activations: str, number: int) -> None:
    """What ONNX Runtime makes of the file: nothing is dequantized on the way, and INT4 is really stored in 4 bits. (On x86
    it has no kernels for int8 activations, which is why devices there ask for uint8.)"""
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    for k, one in enumerate(alone()):
        file = timing.network(one, weights, "int8", replace(DEVICE, activations=activations))
        onnx.checker.check_model(onnx.load_from_string(file), full_check=True)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{k}.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        made = onnx.load(str(tmp_path / f"{k}.onnx")).graph
        if activations == "uint8":
            assert [n.op_type for n in made.node if n.op_type not in timing.EDGES] in (["QLinearConv"], ["QGemm"])
        assert made.input[0].type.tensor_type.elem_type == number
        given = {i.name: i for i in onnx.load_from_string(file).graph.initializer}["weight"]
        assert len(given.raw_data) == -(-int(np.prod(one.weight)) // (2 if weights == "int4" else 1))


def test_every_layer_is_timed_at_every_precision_and_equal_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Conv1d(256, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)).flatten(2).transpose(1, 2)).mean(2)

    made: list[str] = []
    real = timing._session

    def counted(one: timing.Alone, choice: tuple[str, str], device: Device) -> timing._Session | None:
        made.append("/".join(choice))
        return real(one, choice, device)

    monkeypatch.setattr(timing, "_session", counted)
    choices = (*INTS, ("float16", "float16"), ("float32", "float32"), ("int8", "float32"))
    got = timing.time_layers(graphs.fold(Same(), SHAPE), SHAPE, choices, DEVICE, runs=3)
    assert set(got) == {(name, *choice) for name in "abc" for choice in choices}
    assert all(ms is not None and 0 < ms < 1000 for ms in got.values())
    assert sorted(made) == sorted(2 * ["/".join(c) for c in choices])  # two shapes
    assert [got[("a", *c)] for c in choices] == [got[("b", *c)] for c in choices]


def test_kernels_are_added_up_by_run_without_the_edges() -> None:
    def event(name: str, us: int, op: str) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": op}}

    one_run = [event("t", 40, "Transpose"), event("c", 700, "QLinearConv"), event("d", 300, "DequantizeLinear")]
    end = {"cat": "Session", "name": "model_run", "dur": 9000}
    start = {"cat": "Session", "name": "session_initialization", "dur": 5}
    assert timing.kernel_ms([start, *one_run, end, *one_run[:2], end]) == [1.0, 0.7]
    assert timing.middle([9.0, 1.0, 2.0, 0.0]) == 1.5


def test_linear_on_sequences_and_transposed_convolutions_are_timed() -> None:
    pytest.importorskip("onnxruntime")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 6, 3, 2, 1, output_padding=1)
            self.fc, self.same = nn.Linear(6, 4), nn.Conv2d(6, 6, 3, padding="same")

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.same(self.up(x)).flatten(2).transpose(1, 2)).mean(1)

    got = timing.time_layers(graphs.fold(Odd(), SHAPE), SHAPE, (*INTS, ("float32", "float32")), DEVICE, runs=1)
    assert set(got) == {(n, *c) for n in ("up", "fc", "same") for c in (*INTS, ("float32", "float32"))}
    assert [key for key, ms in got.items() if ms is None] == []


def test_without_onnx_runtime_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    rows = scan(folded("two"), SHAPE, batches(), DEVICE, INTS, timed=True)
    assert {row.latency_ms for row in rows} == {None}


def test_a_timed_scan_carries_the_times() -> None:
    pytest.importorskip("onnxruntime")
    assert all((row.latency_ms or 0) > 0 for row in scan(folded("two"), SHAPE, batches(16), DEVICE, INTS, timed=True))


# --- advice ------------------------------------------------------------------------------------------------------


def cost(layer: str, weights: str, damage: float, size: int) -> LayerCost:
    return LayerCost(layer, "conv2d", weights, "int8", damage, damage, None, size)


def test_advice_names_the_guilty_their_share_and_the_price_of_sparing_them() -> None:
    rows = [cost(f"l{k}", "int4", 0.6 if k == 4 else 0.2 if k == 7 else 0.025, 500 + k) for k in range(10)]
    rows += [cost(f"l{k}", "int8", 1e-6, 1000 + k) for k in range(10)]
    (said,) = guilty(rows)  # int8 harms nobody
    assert "int4 (int8 activations)" in said.en
    assert "l4 (0.6), l7 (0.2), l0 (0.025): 82% of 1 nats" in said.en
    assert "at int8 costs 1.5 kB more and leaves <0.0001 nats" in said.en
    assert "l4（0.6）" in said.zh
    assert "82%" in said.zh


def test_advice_accuses_nobody_without_a_reason() -> None:
    (said,) = guilty([cost(f"l{k}", "int4", 0.1, 500) for k in range(30)])
    assert "no layer is much guiltier" in said.en
    assert "10%" in said.en
    assert guilty([]) == ()
    assert guilty([cost("fc", "int4", 0.5, 10)]) == ()
    assert guilty([cost(f"l{k}", "float32", 0.5, 10) for k in range(9)]) == ()
    assert len(guilty([cost("x", "int4", float("inf"), 1), *(cost(f"l{k}", "int4", 0.1, 5) for k in range(30))])) == 1
