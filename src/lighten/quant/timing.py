"""What one layer takes: a network of that layer alone, at each precision, timed in ONNX Runtime on this machine."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from lighten.quant import graph as graphs
from lighten.quant import policy
from lighten.quant.graph import Layer
from lighten.types import FLOATS, Device

Key = tuple[str, str, str]
"""Layer, weights, activations."""
Choice = tuple[str, str]
EDGES = ("Transpose", "ReorderInput", "ReorderOutput", "Cast")
"""What ONNX Runtime puts around a layer alone, and between layers cancels."""
RUNS, WARM_UP = 21, 3
OPSET, IR = 21, 10
"""The first opset with INT4, and the file version that goes with it."""
REFUSALS = ("Fail", "EPFail", "InvalidGraph", "InvalidArgument", "NotImplemented", "RuntimeException")


@dataclass(frozen=True)
class Alone:
    """All that decides what a layer takes: layers that agree in it are timed once."""

    op: str
    weight: tuple[int, ...]
    source: tuple[int, ...]
    axis: int
    bias: bool
    clip: tuple[float, float] | None
    attributes: tuple[tuple[str, Any], ...]


def time_layers(
    graph: GraphModule,
    shape: tuple[int, ...],
    choices: Sequence[Choice],
    device: Device,
    *,
    runs: int = RUNS,
) -> dict[Key, float | None]:
    """ms of the kernel of every layer of a folded `graph` at every choice: one image of `shape`, one thread.

    Layers of one shape are timed once, the precisions in turns, so that a busy machine harms all alike. Integer layers
    take and give integers, as between two layers of a whole network. Alone, a layer's weights stay in the processor's
    cache, so the sum is less than the network takes: compare precisions by it, do not promise it. None where ONNX Runtime (or the `onnx` package) is
    missing or cannot run such a layer.
    """
    inputs = input_shapes(graph, shape)
    found: dict[Alone, Mapping[Choice, float | None]] = {}
    times: dict[Key, float | None] = {}
    for layer in graphs.layers(graph):
        alone = describe(graph, layer, inputs[layer.node])
        if alone not in found:
            found[alone] = _time(alone, choices, device, runs)
        for choice, ms in found[alone].items():
            key = (layer.name, *choice)
            times[key] = _sum(times.get(key, 0.0), ms)
    return times


def _sum(a: float | None, b: float | None) -> float | None:
    """A module that runs twice takes both times."""
    return None if a is None or b is None else a + b


def input_shapes(graph: GraphModule, shape: tuple[int, ...]) -> dict[Node, tuple[int, ...]]:
    """The shape of each layer's input for one image."""
    found: dict[Node, tuple[int, ...]] = {}

    class Shapes(Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            seen[n] = tuple(value.shape) if isinstance(value, Tensor) else ()
            return value

    seen: dict[Node, tuple[int, ...]] = {}
    with torch.no_grad():
        Shapes(graph).run(torch.zeros(1, *shape))
    for layer in graphs.layers(graph):
        source = layer.node.args[0]
        found[layer.node] = seen[source] if isinstance(source, Node) else ()
    return found


def describe(graph: GraphModule, layer: Layer, source: tuple[int, ...]) -> Alone:
    """A layer without its values."""
    weight = tuple(graphs.parameter(graph, layer.weight).shape)
    linear = layer.kind is policy.aten.linear
    op = "ConvTranspose" if layer.kind is policy.aten.conv_transpose2d else "MatMul" if linear else "Conv"
    if linear and len(source) == 2:
        op = "Gemm"
    attributes = () if linear else tuple(sorted(_attributes(layer, len(weight) - 2).items()))
    return Alone(op, weight, source, layer.axis, layer.bias is not None, _clip(layer), attributes)


def _attributes(layer: Layer, dims: int) -> dict[str, Any]:
    """ONNX attributes of aten.conv*(x, w, b, stride, padding, dilation, groups) and of the transposed order."""
    turned = layer.kind is policy.aten.conv_transpose2d
    names = ("stride", "padding", "output_padding", "groups", "dilation") if turned else _CONV
    given = dict(zip(names, layer.node.args[3:])) | dict(layer.node.kwargs)
    padding = given.get("padding", 0)
    found: dict[str, Any] = {
        "strides": _each(given.get("stride", 1), dims),
        "dilations": _each(given.get("dilation", 1), dims),
        "group": int(given.get("groups", 1)),
    }
    if isinstance(padding, str):
        return found | {"auto_pad": "SAME_UPPER" if padding == "same" else "VALID"}
    found["pads"] = _each(padding, dims) * 2
    return found | ({"output_padding": _each(given.get("output_padding", 0), dims)} if turned else {})


_CONV = ("stride", "padding", "dilation", "groups")


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number a dimension from a number, or a list of one or of all."""
    given = tuple(int(v) for v in value) if isinstance(value, Iterable) else (int(value),)
    return given * dims if len(given) == 1 else given


def _clip(layer: Layer) -> tuple[float, float] | None:
    """The bounds of the clip that runtimes fold into the layer."""
    if layer.last is layer.node:
        return None
    kind = policy.packet(layer.last)
    if kind in (policy.aten.relu, policy.aten.relu_):
        return 0.0, float("inf")
    if kind is policy.aten.relu6:
        return 0.0, 6.0
    low, high = (*layer.last.args[1:3], None, None)[:2]
    return (-1.0 if low is None else float(low)), (1.0 if high is None else float(high))


# --- the file ---------------------------------------------------------------------------------------


def network(alone: Alone, weights: str, activations: str, device: Device) -> bytes:
    """An ONNX file that holds one layer: input and output are of the type that flows between layers there.

    int4 weights are INT4 initializers, cast to INT8 before DequantizeLinear: ONNX Runtime folds the cast when it loads.
    """
    return _Writer(alone, weights, activations, device).file()


class _Writer:
    def __init__(self, alone: Alone, weights: str, activations: str, device: Device) -> None:
        from onnx import TensorProto, helper

        self.alone, self.weights, self.h, self.t = alone, weights, helper, TensorProto
        self.quantized = activations not in FLOATS and weights not in FLOATS
        self.integers = np.uint8 if device.activations == "uint8" else np.int8
        self.real: Any = np.float16 if weights == "float16" else np.float32
        self.flows: Any = self.integers if self.quantized else self.real
        self.dice = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def file(self) -> bytes:
        """input -> (DequantizeLinear) -> layer -> clip -> (QuantizeLinear) -> output."""
        kind = self.h.np_dtype_to_tensor_dtype(np.dtype(self.flows))
        last = self._clip(self._layer(self._input()))
        self._add("QuantizeLinear" if self.quantized else "Identity", [last, *self._flow()], "output")
        given = self.h.make_tensor_value_info("input", kind, list(self.alone.source))
        out = self.h.make_tensor_value_info("output", kind, [None] * len(self.alone.source))
        graph = self.h.make_graph(self.nodes, "layer", [given], [out], self.constants)
        opset = [self.h.make_opsetid("", OPSET)]
        return bytes(self.h.make_model(graph, opset_imports=opset, ir_version=IR).SerializeToString())

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.h.make_node(op, inputs, [output], **attributes))
        return output

    def _keep(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        if all(c.name != name for c in self.constants):
            self.constants.append(numpy_helper.from_array(value, name))
        return name

    def _flow(self) -> list[str]:
        """Scale and zero point of what goes in and out."""
        if not self.quantized:
            return []
        zero = np.array(np.iinfo(self.integers).min, self.integers)  # where a ReLU has put it: then the clip is folded
        return [self._keep("scale", np.array(0.02, np.float32)), self._keep("zero", zero)]

    def _input(self) -> str:
        return self._add("DequantizeLinear", ["input", *self._flow()], "x") if self.quantized else "input"

    def _layer(self, x: str) -> str:
        bias = self._bias() if self.alone.bias else []
        if self.alone.op == "MatMul":
            product = self._add("MatMul", [x, self._weight()], "product")
            return self._add("Add", [product, *bias], "y") if bias else product
        attributes = {"transB": 1} if self.alone.op == "Gemm" else dict(self.alone.attributes)
        return self._add(self.alone.op, [x, self._weight(), *bias], "y", **attributes)

    def _weight(self) -> str:
        turned = self.alone.op == "MatMul"
        shape = self.alone.weight[::-1] if turned else self.alone.weight
        if self.weights in FLOATS:
            return self._keep("weight", self.dice.normal(0, 0.05, shape).astype(self.real))
        reach = 7 if self.weights == "int4" else 127
        q = self.dice.integers(-reach, reach + 1, shape).astype(np.int8)
        stored = self._pack(q) if self.weights == "int4" else self._keep("weight", q)
        axis = 1 if turned else self.alone.axis
        scale: np.ndarray = np.full(shape[axis], 0.05 / reach, np.float32)
        zero: np.ndarray = np.zeros(shape[axis], np.int8)
        scales = [self._keep("weight_scale", scale), self._keep("weight_zero", zero)]
        return self._add("DequantizeLinear", [stored, *scales], "weight_real", axis=axis)

    def _pack(self, q: np.ndarray) -> str:
        """Two to a byte, the first in the low half."""
        nibbles = np.append(q.reshape(-1), [0] * (q.size % 2)).astype(np.int8).view(np.uint8) & 0xF
        packed = (nibbles[0::2] | (nibbles[1::2] << 4)).tobytes()
        self.constants.append(self.h.make_tensor("weight", self.t.INT4, q.shape, packed, raw=True))
        return self._add("Cast", ["weight"], "weight_int8", to=self.t.INT8)

    def _bias(self) -> list[str]:
        """int32 at input scale x weight scale where both are integers (Jacob et al., 2018, eq. 11)."""
        axis = self.alone.axis
        channels = self.alone.weight[axis] * (dict(self.alone.attributes).get("group", 1) if axis else 1)
        if not self.quantized or self.alone.op == "MatMul":
            return [self._keep("bias", np.zeros(channels, self.real))]
        reach = 7 if self.weights == "int4" else 127
        scale = self._keep("bias_scale", np.full(channels, 0.02 * 0.05 / reach, np.float32))
        zeros = self._keep("bias_zero", np.zeros(channels, np.int32))
        given = [self._keep("bias", np.zeros(channels, np.int32)), scale, zeros]
        return [self._add("DequantizeLinear", given, "bias_real", axis=0)]

    def _clip(self, y: str) -> str:
        if self.alone.clip is None:
            return y
        low, high = self.alone.clip
        if (low, high) == (0.0, float("inf")):
            return self._add("Relu", [y], "clipped")
        ends = [self._keep("low", np.array(low, self.real)), self._keep("high", np.array(high, self.real))]
        return self._add("Clip", [y, *ends], "clipped")


# --- the clock ----------------------------------------------------------------------------------------


def _time(alone: Alone, choices: Sequence[Choice], device: Device, runs: int) -> dict[Choice, float | None]:
    """ms of each choice, the precisions in turns; None for those that cannot be run."""
    sessions = {c: _session(alone, c, device) for c in choices}
    for _ in range(WARM_UP + runs):
        for session in sessions.values():
            if session is not None:
                session.run()
    return {c: None if session is None else session.ms(runs) for c, session in sessions.items()}


class _Session:
    """One file under ONNX Runtime's own profiler: its kernels are timed one by one, so what only the edges of so small
    a network need (a change of layout, the call from Python) is not counted."""

    def __init__(self, alone: Alone, choice: Choice, device: Device) -> None:
        import onnxruntime as ort

        self.folder = tempfile.TemporaryDirectory(prefix="lighten-")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = f"{self.folder.name}/layer"
        writer = _Writer(alone, *choice, device)
        self.session = ort.InferenceSession(writer.file(), options, providers=["CPUExecutionProvider"])
        self.image = {"input": np.ones(alone.source, writer.flows)}

    def run(self) -> None:
        self.session.run(None, self.image)

    def ms(self, runs: int) -> float:
        """Mean of the middle half of the last `runs` (the profiler counts whole microseconds); the session is over."""
        events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
        self.folder.cleanup()
        return middle(kernel_ms(events)[-runs:])


def _session(alone: Alone, choice: Choice, device: Device) -> _Session | None:
    try:
        session = _Session(alone, choice, device)
        session.run()
    except _refusals():
        return None  # a layer that cannot be timed has no time; the scan goes on without it
    return session


def kernel_ms(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """ms of each run in a profile: its kernels added up, those at the EDGES left out."""
    runs: list[float] = []
    kernels = 0.0
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kernels += 0.0 if event["args"]["op_name"] in EDGES else event["dur"] / 1e3
        elif event.get("name") == "model_run":
            runs.append(kernels)
            kernels = 0.0
    return runs


def middle(samples: Sequence[float]) -> float:
    """Mean of the middle half."""
    ordered, out = sorted(samples), len(samples) // 4
    return statistics.fmean(ordered[out : len(ordered) - out])


def _refusals() -> tuple[type[Exception], ...]:
    """What a missing package raises, and ONNX Runtime on what it does not take: its errors share no base of their own."""
    usual: tuple[type[Exception], ...] = (ImportError, RuntimeError, ValueError)
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return usual
    return (*usual, *(getattr(state, name) for name in REFUSALS))
