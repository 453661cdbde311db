"""The rewrites of an ONNX graph are exact, and leave nothing behind that a runtime would trip over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lighten.errors import RefusedFormat
from lighten.kit.onnx_graph import lower, nibbles, pool_globally, to_onnx

SHAPE = (3, 16, 16)


def run(model: Any, x: np.ndarray, *, optimised: bool = False) -> np.ndarray:
    """ONNX Runtime's answer; without graph optimisations each Q and DQ is computed as it stands."""
    model = copy_of(model)
    del model.graph.value_info[:]  # as the formats do; the exporter's types are those from before the shift
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def copy_of(model: Any) -> Any:
    return onnx.ModelProto.FromString(model.SerializeToString())


def arrays(model: Any) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def makers(model: Any) -> dict[str, Any]:
    return {out: node for node in model.graph.node for out in node.output}


@dataclass(frozen=True)
class Lowered:
    """The exporter's graph of a converted network, and both lowerings of it."""

    plain: Any
    signed: Any
    unsigned: Any
    x: np.ndarray


@pytest.fixture(scope="module", params=["small", "mobile"])
def lowered(request: pytest.FixtureRequest, module_of: Callable[[str, str], Any]) -> Lowered:
    from nets import images

    plain = to_onnx(module_of(request.param, "int8"), SHAPE)
    signed, unsigned = (lower(copy_of(plain), unsigned=u) for u in (False, True))
    return Lowered(plain, signed, unsigned, images(16, 7)[0].numpy())


# --- uint8 and int8 -----------------------------------------------------------------------------------


def test_uint8_and_int8_files_answer_bit_for_bit_the_same(lowered: Lowered) -> None:
    np.testing.assert_array_equal(run(lowered.unsigned, lowered.x), run(lowered.signed, lowered.x))


def test_every_activation_is_shifted_by_128_and_no_weight_is(lowered: Lowered) -> None:
    def zeros(model: Any) -> list[np.ndarray]:
        held = arrays(model)
        nodes = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        return [held[n.input[2]] for n in nodes if n.input[0] not in held]

    signed, unsigned = zeros(lowered.signed), zeros(lowered.unsigned)
    assert len(signed) == len(unsigned) > 10
    assert {z.dtype for z in signed} == {np.dtype("int8")}
    assert {z.dtype for z in unsigned} == {np.dtype("uint8")}
    assert [int(z) + 128 for z in signed] == [int(z) for z in unsigned]
    weights = [a for a in arrays(lowered.unsigned).values() if a.ndim >= 2]
    assert {w.dtype for w in weights} == {np.dtype("int8")}


def test_lowering_changes_answers_by_no_more_than_the_rounded_biases(lowered: Lowered) -> None:
    got, want = run(lowered.signed, lowered.x), run(lowered.plain, lowered.x)
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
    # A bias moves by half an accumulator step at most, 256 times finer than an activation's; a value that lay on the
    # edge of a step may still go over it.
    assert np.abs(got - want).mean() < 0.01 * np.abs(want).max()


def test_lowered_graphs_pass_onnx_own_checker(lowered: Lowered) -> None:
    for model in (lowered.signed, lowered.unsigned):
        onnx.checker.check_model(model, full_check=True)


def test_nodes_stand_after_what_they_read(lowered: Lowered) -> None:
    for model in (lowered.signed, lowered.unsigned):
        known = {i.name for i in (*model.graph.initializer, *model.graph.input)} | {""}
        for node in model.graph.node:
            assert set(node.input) <= known, node.name
            known |= set(node.output)


# --- biases -------------------------------------------------------------------------------------------


def test_biases_are_int32_on_the_accumulators_scale(lowered: Lowered) -> None:
    held, made = arrays(lowered.unsigned), makers(lowered.unsigned)
    before = {n.output[0]: n for n in lowered.plain.graph.node}
    floats = arrays(lowered.plain)
    checked = 0
    for node in lowered.unsigned.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        x_scale = held[made[node.input[0]].input[1]].astype(np.float64)
        w_scale = held[made[node.input[1]].input[1]].astype(np.float64)
        q, scale = (held[name] for name in made[node.input[2]].input)  # without a zero point it is 0
        bias = floats[before[node.output[0]].input[2]].astype(np.float64)
        assert q.dtype == np.int32
        ordinary = w_scale > 1e-9  # a filter of zeros has no scale of its own
        np.testing.assert_allclose(scale[ordinary], (x_scale * w_scale)[ordinary], rtol=1e-6)
        np.testing.assert_array_equal(q, np.rint(bias / scale.astype(np.float64)))
        assert (np.abs(q * scale.astype(np.float64) - bias) <= scale.astype(np.float64) / 2 * (1 + 1e-6)).all()
        checked += 1
    assert checked >= 7


def qdq_conv(bias: np.ndarray, weight: np.ndarray, w_scale: np.ndarray, *, rounded: bool = False) -> Any:
    """A 1x1 convolution after Q/DQ pairs, by hand; `rounded` puts one after it too, so that runtimes fuse it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["yd" if rounded else "y"]),
    ]
    if rounded:
        nodes += [
            helper.make_node("QuantizeLinear", ["yd", "xs", "xz"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "xs", "xz"], ["y"]),
        ]
    held = {
        "xs": np.float32(0.05), "xz": np.int8(-10), "w": weight, "ws": w_scale,
        "wz": np.zeros(len(w_scale), np.int8), "b": bias, "left over": np.zeros(1000, np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_quantized_convolution_is_what_integers_give() -> None:
    dice = np.random.default_rng(0)
    weight = dice.integers(-127, 128, (3, 2, 1, 1), dtype=np.int8)
    w_scale = np.array([0.01, 0.003, 0.0007], np.float32)
    bias = np.array([0.31, -2.0, 0.0], np.float32)
    x = dice.normal(size=(2, 2, 4, 4)).astype(np.float32)
    x_int = np.clip(np.rint(x / np.float32(0.05)) - 10, -128, 127).astype(np.int64) + 10
    accumulated = np.einsum("nchw,oc->nohw", x_int, weight[:, :, 0, 0].astype(np.int64))
    scale = np.float64(np.float32(0.05)) * w_scale.astype(np.float64)
    want = (accumulated + np.rint(bias / scale).astype(np.int64)[:, None, None]) * scale[:, None, None]
    for unsigned in (False, True):
        model = lower(qdq_conv(bias, weight, w_scale), unsigned=unsigned)
        np.testing.assert_allclose(run(model, x), want, rtol=1e-5, atol=1e-6)


def test_unused_initializers_are_gone(lowered: Lowered) -> None:
    by_hand = lower(
        qdq_conv(np.zeros(3, np.float32), np.ones((3, 2, 1, 1), np.int8), np.ones(3, np.float32)), unsigned=True
    )
    assert "left over" not in arrays(by_hand)
    assert "xz" not in arrays(by_hand)
    for model in (lowered.signed, lowered.unsigned, by_hand):
        used = {name for node in model.graph.node for name in node.input}
        assert {i.name for i in model.graph.initializer} <= used


def test_no_float_weight_is_left_in_a_quantized_network(lowered: Lowered) -> None:
    for model in (lowered.signed, lowered.unsigned):
        held = arrays(model)
        convolutions = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
        assert convolutions
        for node in convolutions:
            stored = held[makers(model)[node.input[1]].input[0]]
            assert stored.dtype == np.int8
        assert not [n for n, a in held.items() if a.dtype == np.float32 and a.ndim > 1]


def test_float_layers_keep_their_float_bias() -> None:
    bias, weight = np.array([0.31, -2.0, 0.0], np.float32), np.ones((3, 2, 1, 1), np.int8)
    plain = qdq_conv(bias, weight, np.full(3, 0.01, np.float32))
    next(n for n in plain.graph.node if n.op_type == "Conv").input[0] = "x"  # its input is float now
    model = lower(plain, unsigned=True)
    np.testing.assert_array_equal(arrays(model)["b"], bias)


# --- 4 bits -------------------------------------------------------------------------------------------


def four_bits(weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, *, clipped: bool) -> Any:
    """The convolution by hand at opset 21, its input on the grid -8..7 where it is clipped."""
    model = qdq_conv(bias, weight, scale)
    model.opset_import[0].version, model.ir_version = 21, 10
    if clipped:
        ends = [numpy_helper.from_array(np.float32((q + 10) * 0.05), k) for q, k in ((-8, "lo"), (7, "hi"))]
        model.graph.initializer.extend(ends)
        model.graph.node.insert(0, helper.make_node("Clip", ["x", "lo", "hi"], ["xc"]))
        model.graph.node[1].input[0] = "xc"
    return model


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_4_bit_convolution_is_what_integers_give(unsigned: bool, clipped: bool, reduced: bool) -> None:
    dice = np.random.default_rng(0)
    weight = dice.integers(-8, 8, (3, 2, 1, 1), dtype=np.int8)
    weight[2] = 0  # a pruned filter: its bias is far too large for a finer scale
    scale = np.array([0.1, 0.03, 1e-9], np.float32)
    bias = np.array([0.31, -2.0, 0.04], np.float32)
    x = dice.normal(size=(2, 2, 4, 4)).astype(np.float32)
    lo, hi = (-8, 7) if clipped else (-128, 127)
    x_int = np.clip(np.rint(x / np.float32(0.05)) - 10, lo, hi).astype(np.int64) + 10
    real = np.einsum("nchw,oc->nohw", x_int, weight[:, :, 0, 0].astype(np.int64)) * 0.05 * scale[:, None, None]
    model = lower(four_bits(weight, bias, scale, clipped=clipped), unsigned=unsigned, reduce_range=reduced)
    onnx.checker.check_model(model, full_check=True)
    # The bias is off by half a step of the accumulator at most, which is finer by the factor the weights were widened.
    step = 0.05 * scale.max() / (8 if reduced else 16)
    for optimised in (False, True):
        assert np.abs(run(model, x, optimised=optimised) - (real + bias[:, None, None])).max() <= step / 2 + 1e-5
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("Clip") == clipped
    stored = {i.name: i for i in model.graph.initializer}
    assert stored["w_int4"].data_type == TensorProto.INT4
    assert len(stored["w_int4"].raw_data) == 3
    assert "w" not in stored


def test_clips_of_integers_keep_the_integer_kernel() -> None:
    """ONNX Runtime still fuses the convolution before a 4-bit activation."""
    weight = np.ones((3, 2, 1, 1), np.int8)
    model = qdq_conv(np.zeros(3, np.float32), weight, np.full(3, 0.1, np.float32), rounded=True)
    ends = [numpy_helper.from_array(np.float32((q + 10) * 0.05), k) for q, k in ((-8, "lo"), (7, "hi"))]
    model.graph.initializer.extend(ends)
    at = next(k for k, n in enumerate(model.graph.node) if list(n.output) == ["yq"])
    model.graph.node.insert(at, helper.make_node("Clip", ["yd", "lo", "hi"], ["yc"]))
    model.graph.node[at + 1].input[0] = "yc"
    model = lower(model, unsigned=True)
    after = {n.op_type: n for n in model.graph.node if n.op_type in ("Clip", "QuantizeLinear")}
    held = arrays(model)
    assert [held[i].item() for i in after["Clip"].input[1:]] == [120, 135]
    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    got = run(model, x, optimised=True)
    np.testing.assert_allclose(got, run(model, x), atol=1e-6)
    assert got.min() / 0.05 >= -8 + 10 - 1e-3
    assert got.max() / 0.05 <= 7 + 10 + 1e-3


def test_int4_needs_its_opset() -> None:
    weight = np.ones((3, 2, 1, 1), np.int8)
    model = lower(qdq_conv(np.zeros(3, np.float32), weight, np.ones(3, np.float32)), unsigned=True)
    assert {i.data_type for i in model.graph.initializer} & {TensorProto.INT4} == set()


@pytest.mark.parametrize("values", [[-8, 7, 0], [1, -1], [5], list(range(-8, 8))])
def test_nibbles_are_two_a_byte_the_first_in_the_low_half(values: list[int]) -> None:
    raw = nibbles(np.array(values, np.int8))
    assert len(raw) == -(-len(values) // 2)
    digits = [d for b in raw for d in (b % 16, b // 16)][: len(values)]
    assert [d - 16 if d > 7 else d for d in digits] == values


# --- pooling ------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """The mean over some axes of a shifted input."""

    def __init__(self, axes: tuple[int, ...], keep: bool) -> None:
        super().__init__()
        self.axes, self.keep = axes, keep

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).mean(self.axes, keepdim=self.keep)


def reduce_mean(axes: list[int], keep: int) -> Any:
    shape: list[Any] = ["n", 3, 8, 6]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keep)], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(axes, np.int64), "axes")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [-2, -1], [3, 2]])
def test_global_mean_becomes_a_pool_with_equal_answers(axes: list[int]) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 6)).astype(np.float32)
    model = pool_globally(reduce_mean(axes, 1))
    assert [n.op_type for n in model.graph.node] == ["GlobalAveragePool"]
    assert not model.graph.initializer
    np.testing.assert_allclose(run(model, x), x.astype(np.float64).mean((2, 3), keepdims=True), atol=1e-6)


@pytest.mark.parametrize("axes, keep", [([2, 3], 0), ([1], 1), ([1, 2, 3], 1), ([0, 1], 1), ([3], 1)])
def test_other_means_are_left_alone(axes: list[int], keep: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 6)).astype(np.float32)
    model = pool_globally(reduce_mean(axes, keep))
    assert [n.op_type for n in model.graph.node] == ["ReduceMean"]
    np.testing.assert_allclose(run(model, x), x.astype(np.float64).mean(tuple(axes), keepdims=bool(keep)), atol=1e-6)


def test_adaptive_pool_of_a_real_network_is_a_pool(lowered: Lowered) -> None:
    kinds = [n.op_type for n in lowered.plain.graph.node]
    assert "GlobalAveragePool" in kinds


# --- the exporter -------------------------------------------------------------------------------------


def test_operator_that_onnx_has_not_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j1(x.flatten(1))

    with pytest.raises(RefusedFormat, match="bessel_j1"):
        to_onnx(Odd(), SHAPE)
