"""From a module to an ONNX graph that runtimes like: the exporter's output, then a few exact rewrites."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from lighten.errors import RefusedFormat
from lighten.kit.quiet import quiet
from lighten.kit.trace import trace

INPUT, OUTPUT = "input", "output"


def to_onnx(module: nn.Module, shape: tuple[int, ...]) -> Any:
    """The ONNX ModelProto of a float or Q/DQ module, with a dynamic batch. Raises RefusedFormat naming the operator."""
    import torch

    program = trace(module, shape)
    try:
        with quiet():
            exported = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    except Exception as e:
        reason = next((line for line in str(e).splitlines() if "aten." in line or "Error" in line), str(e)[:200])
        raise RefusedFormat(f"onnx cannot hold this model: {reason.strip()[:300]}", "Replace that operator.") from e
    return pool_globally(exported.model_proto)


def lower(model: Any, *, unsigned: bool) -> Any:
    """The plan's Q/DQ as runtimes fuse it: 32-bit integer biases and, with `unsigned`, uint8 activations.

    Both are exact: the bias is rounded to the scale of the accumulator it is added to (Jacob et al., 2018, eq. 11),
    and a shift of zero point and integers by 128 leaves every real value where it was.
    """
    graph = _Graph(model)
    quantize_biases(graph)
    if unsigned:
        shift_activations(graph)
    graph.drop_unused()
    del model.graph.value_info[:]  # the exporter's types are those from before
    return model


class _Graph:
    """Lookups over a GraphProto that the rewrites share."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.proto, self._read, self._write = model.graph, numpy_helper.to_array, numpy_helper.from_array
        self.made_by = {out: node for node in self.proto.node for out in node.output}
        self.constants = {init.name: init for init in self.proto.initializer}

    def array(self, name: str) -> np.ndarray | None:
        return self._read(self.constants[name]) if name in self.constants else None

    def add_constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.proto.initializer.append(self._write(value, name))
            self.constants[name] = self.proto.initializer[-1]
        return name

    def scale_of(self, name: str) -> np.ndarray | None:
        """The scale of the DequantizeLinear that makes `name`."""
        node = self.made_by.get(name)
        return self.array(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None

    def drop_unused(self) -> None:
        used = {name for node in self.proto.node for name in node.input}
        for init in [i for i in self.proto.initializer if i.name not in used]:
            self.proto.initializer.remove(init)


def quantize_biases(graph: _Graph) -> None:
    """Float biases of quantized Conv and Gemm become int32 with scale = input scale x weight scale."""
    from onnx import helper

    for node in list(graph.proto.node):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 3:
            continue
        x_scale, w_scale = graph.scale_of(node.input[0]), graph.scale_of(node.input[1])
        bias = graph.array(node.input[2])
        if x_scale is None or w_scale is None or bias is None:
            continue
        scale = (x_scale.astype(np.float64) * w_scale.astype(np.float64)).astype(np.float32)
        scale = np.broadcast_to(scale.reshape(-1), bias.shape).copy()
        q = np.round(bias.astype(np.float64) / scale).clip(-(2**31), 2**31 - 1).astype(np.int32)
        name = f"{node.output[0]}_bias"
        inputs = [
            graph.add_constant(f"{name}_q", q),
            graph.add_constant(f"{name}_scale", scale),
            graph.add_constant(f"{name}_zero", np.zeros(q.shape, np.int32)),
        ]
        dq = helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}_dq", axis=0)
        graph.proto.node.insert(list(graph.proto.node).index(node), dq)
        graph.made_by[dq.output[0]] = dq
        node.input[2] = dq.output[0]


def shift_activations(graph: _Graph) -> None:
    """int8 activations become uint8: zero point + 128, so the real values are the same."""
    for node in graph.proto.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[0] in graph.constants:
            continue
        zero = graph.array(node.input[2])
        if zero is not None and zero.dtype == np.int8:
            value = np.array(int(zero) + 128, np.uint8)
            node.input[2] = graph.add_constant(f"zero_point_u8_{int(value)}", value)


def pool_globally(model: Any) -> Any:
    """ReduceMean over height and width becomes GlobalAveragePool, which runtimes have integer kernels for."""
    from onnx import helper

    graph = _Graph(model)
    for k, node in enumerate(list(graph.proto.node)):
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes, keep = (
            graph.array(node.input[1]),
            next((a.i for a in node.attribute if a.name == "keepdims"), 1),
        )
        if axes is not None and sorted(int(a) for a in axes) in ([-2, -1], [2, 3]) and keep:
            pool = helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), name=node.name)
            graph.proto.node.remove(node)
            graph.proto.node.insert(k, pool)
    graph.drop_unused()
    return model
