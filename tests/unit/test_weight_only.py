"""Weight-only and dynamic quantization against float64 arithmetic and ONNX's own reference implementation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lighten.errors import BadConfig, BadModel
from lighten.formats import onnx as onnx_format
from lighten.kit.onnx_graph import Packed
from lighten.quant.graph import parameter
from lighten.quant.weight_only import DynamicRound, pack, quantize_weights
from lighten.types import Device, Precision
from nets import SHAPE, images, net

PLAIN = Device("plain", "plain", "plain", ("onnx",))
INT8, INT4 = Precision("int8", "float32"), Precision("int4", "float32")


class Odd(nn.Module):
    """Grouped, one-dimensional and transposed convolutions, and linear layers on three axes, one of them square."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.inner = nn.Linear(8, 8, bias=False)
        self.row = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.patch(x).flatten(2).transpose(1, 2)).transpose(1, 2)
        y = self.up(self.row(y).reshape(-1, 8, 4, 4))
        return self.fc(torch.relu(y).mean((2, 3)))


def by_hand(packed: Packed) -> np.ndarray:
    """q x scale in float64, one value after the other."""
    rows = np.moveaxis(packed.q.astype(np.float64), packed.axis, 0)
    flat = rows.reshape(len(rows), -1).copy()
    for o in range(flat.shape[0]):
        for k in range(flat.shape[1]):
            flat[o, k] *= packed.scale[o, k // packed.block] if packed.block else packed.scale[o]
    return np.moveaxis(flat.reshape(rows.shape), 0, packed.axis)


@pytest.mark.parametrize("weights, reach", [("int8", 127), ("int4", 8)])
@pytest.mark.parametrize("axis, block", [(0, 0), (1, 0), (0, 5), (1, 5), (0, 100)])
def test_integers_times_scales_are_the_weight(weights: str, reach: int, axis: int, block: int) -> None:
    weight = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    got = pack(weight, axis, weights, block, False, PLAIN)
    length = weight.numel() // weight.shape[axis]
    assert got.q.dtype == np.int8
    assert np.abs(got.q.astype(int)).max() <= reach
    assert got.scale.shape == (weight.shape[axis], *([-(-length // min(block, length))] if block else []))
    np.testing.assert_allclose(got.value, by_hand(got), rtol=1e-6)


def test_scales_lose_no_more_than_the_range_would() -> None:
    """Absolute-maximum scales in float64, written out; smaller blocks lose less."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).double()
    losses = []
    for block in (0, 32, 8):
        got = pack(weight.float(), 0, "int4", block, False, PLAIN)
        parts = weight.numpy().reshape(8, -1, block or 64)
        scale = np.abs(parts).max(2, keepdims=True) / 7
        plain = ((np.clip(np.rint(parts / scale), -7, 7) * scale - parts) ** 2).sum()
        losses.append(((by_hand(got) - weight.numpy()) ** 2).sum())
        assert losses[-1] <= plain * (1 + 1e-6)
    assert losses[0] > losses[1] > losses[2]


def test_scales_of_powers_of_two_where_the_device_wants_them() -> None:
    got = pack(torch.randn(4, 9), 0, "int8", 0, False, replace(PLAIN, power_of_two_scales=True))
    assert set(np.frexp(got.scale)[0]) == {0.5}


# --- the module -----------------------------------------------------------------------------------------


def test_the_model_is_left_alone_and_the_module_holds_the_rounded_weights() -> None:
    model = net("small")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = quantize_weights(model, SHAPE, INT8, PLAIN)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert len(done.layers) == len(done.module.meta["packed"]) == 7
    for name, packed in done.module.meta["packed"].items():
        np.testing.assert_allclose(parameter(done.module, name).detach(), by_hand(packed), rtol=1e-6)


def test_exceptions_are_honoured() -> None:
    precision = replace(
        INT4, exceptions=(("fc", "float16", "float16"), ("skip", "float32", "float32"), ("stem.0", "int8", "float32"))
    )
    done = quantize_weights(net("small"), SHAPE, precision, PLAIN, block=16)
    rows = {row["layer"]: row for row in done.layers}
    assert {n: rows[n]["weights"] for n in ("fc", "skip", "stem.0", "left.0")} == {
        "fc": "float16", "skip": "float32", "stem.0": "int8", "left.0": "int4",
    }  # fmt: skip
    assert "reason" in rows["skip"]
    half = parameter(done.module, "fc.weight").detach()
    assert half.equal(half.half().float())


def test_dynamic_rounding_is_onnx_dynamic_quantize_linear() -> None:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    outs = [helper.make_tensor_value_info(n, t, None) for n, t in (("q", 2), ("s", 1), ("z", 2))]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])], outs)
    session = ReferenceEvaluator(helper.make_model(graph))
    dice = np.random.default_rng(0)
    for x in (dice.normal(size=99), dice.uniform(1, 3, 50), -dice.uniform(1, 3, 50)):
        x = x.astype(np.float32)
        q, scale, zero = session.run(None, {"x": x})
        want = (q.astype(np.float64) - float(zero)) * float(scale)
        np.testing.assert_allclose(DynamicRound()(torch.from_numpy(x)), want, atol=1e-6)
    assert not DynamicRound()(torch.zeros(5)).any()


# --- the file -------------------------------------------------------------------------------------------


def written(tmp_path: Path, model: nn.Module, precision: Precision, block: int = 0) -> tuple[Any, Any, np.ndarray]:
    """The module, the file's graph, and the file's answers to 16 images."""
    done = quantize_weights(model, SHAPE, precision, PLAIN, block)
    path = tmp_path / "model.onnx"
    onnx_format.export(done.module, SHAPE, path, precision, PLAIN)
    onnx.checker.check_model(str(path), full_check=True)
    return done, onnx.load(str(path)), onnx_format.load(path, 1)(images(16, 7)[0].numpy())


@pytest.mark.parametrize("block", [0, 10])
@pytest.mark.parametrize("precision", [INT8, INT4, Precision("int8", "dynamic"), Precision("int4", "dynamic")])
@pytest.mark.parametrize("make", [Odd, lambda: net("small")])
def test_file_computes_what_the_module_computes(tmp_path: Path, make: Any, precision: Precision, block: int) -> None:
    done, graph, got = written(tmp_path, make().eval(), precision, block)
    with torch.inference_mode():
        want = done.module(images(16, 7)[0]).numpy()
    step = 0.02 if precision.activations == "dynamic" else 1e-5  # a value on the edge of a step may fall to either side
    assert np.abs(got - want).max() <= step * np.abs(want).max()
    packed = done.module.meta["packed"]
    floats = [i for i in graph.graph.initializer if i.data_type == 1]
    shapes = {tuple(sorted(p.q.shape)) for p in packed.values()}
    assert not [i.name for i in floats if tuple(sorted(i.dims)) in shapes]


def test_nibbles_in_the_file_are_the_integers_of_the_plan(tmp_path: Path) -> None:
    done, graph, _ = written(tmp_path, net("small"), INT4)
    held = {i.name: i for i in graph.graph.initializer}
    for name, packed in done.module.meta["packed"].items():
        raw = np.frombuffer(held[f"{name}_int4"].raw_data, np.uint8)
        both = np.stack([raw & 15, raw >> 4], 1).reshape(-1)[: packed.q.size].astype(int)
        np.testing.assert_array_equal(np.where(both > 7, both - 16, both), packed.q.reshape(-1))
        assert numpy_helper.to_array(held[f"{name}_int4"]).shape == packed.q.shape


def test_dynamic_layers_run_on_integers(tmp_path: Path) -> None:
    _, graph, _ = written(tmp_path, net("small"), Precision("int8", "dynamic"))
    kinds = [n.op_type for n in graph.graph.node]
    assert kinds.count("ConvInteger") == 6
    assert kinds.count("MatMulInteger") == 1
    assert not {"Conv", "Gemm"} & set(kinds)
    # right and skip read one tensor, which is quantized once
    assert kinds.count("DynamicQuantizeLinear") == 6


def test_transposed_convolutions_say_why_their_input_stays_float() -> None:
    done = quantize_weights(Odd(), SHAPE, Precision("int8", "dynamic"), PLAIN)
    (row,) = [r for r in done.layers if r["layer"] == "up"]
    assert row["activations"] == "float32"
    assert "transposed" in row["reason"]


def test_int4_file_is_an_eighth_of_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 10))
    quarter = tmp_path / "float.onnx"
    onnx_format.export(wide, SHAPE, quarter, Precision(), PLAIN)
    written(tmp_path, wide, INT4)
    assert (tmp_path / "model.onnx").stat().st_size < quarter.stat().st_size / 7.5


# --- bad input ------------------------------------------------------------------------------------------


def test_bad_requests_are_refused_by_name() -> None:
    model = net("small")
    with pytest.raises(BadModel, match="nobody"):
        quantize_weights(model, SHAPE, replace(INT8, exceptions=(("nobody", "int8", "float32"),)), PLAIN)
    with pytest.raises(BadConfig, match="no weight-only"):
        quantize_weights(model, SHAPE, Precision("int8", "int8"), PLAIN)
    with pytest.raises(BadConfig, match="block"):
        quantize_weights(model, SHAPE, INT8, PLAIN, block=-1)
    with pytest.raises(BadModel, match="no layer"):
        quantize_weights(nn.Sequential(nn.Flatten(), nn.ReLU()), SHAPE, INT8, PLAIN)
    model.fc.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(BadModel, match="fc"):
        quantize_weights(model, SHAPE, INT8, PLAIN)


def test_a_filter_of_zeros_stays_zero() -> None:
    got = pack(torch.zeros(3, 4), 0, "int4", 2, False, PLAIN)
    assert not got.value.any()
    assert np.isfinite(got.scale).all()
