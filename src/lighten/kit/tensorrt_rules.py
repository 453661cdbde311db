"""What TensorRT asks of a Q/DQ graph, and the rewrite that makes one so.

Source: TensorRT documentation, "Working with Quantized Types", explicit quantization: int8 only, zero points of 0, one
scale a tensor for activations, one an output channel for weights, biases in float, weights constant before their Q/DQ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": 1}
"""Along which axis the weight of an operator has its scales; Gemm with transB = 1, as torch writes it."""


def make_symmetric(model: Any) -> int:
    """Rewrite in place: activations get zero point 0 and the scale that still covers their range; how many changed.

    A range [lo, hi] on 256 levels becomes [-m, m] on 255, m = max(|lo|, |hi|): after a ReLU one bit is lost.
    """
    from onnx import numpy_helper

    constants = {i.name: i for i in model.graph.initializer}
    done: dict[tuple[str, str], tuple[str, str]] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        scale, zero = (numpy_helper.to_array(constants[n]) for n in list(node.input)[1:3])
        if zero.dtype not in (np.int8, np.uint8) or zero.size != 1 or not int(zero):
            continue
        key = (node.input[1], node.input[2])
        if key not in done:
            held = np.iinfo(zero.dtype)
            most = max(abs(held.min - int(zero)), abs(held.max - int(zero))) * float(scale) / 127
            names = (f"{key[0]}_{key[1]}_symmetric", "zero_point_0")
            model.graph.initializer.append(numpy_helper.from_array(np.array(most, np.float32), names[0]))
            if names[1] not in constants:
                model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), names[1]))
                constants[names[1]] = model.graph.initializer[-1]
            constants[names[0]] = next(i for i in reversed(model.graph.initializer) if i.name == names[0])
            done[key] = names
        node.input[1], node.input[2] = done[key]
    return len(done)


def broken_rules(model: Any) -> tuple[str, ...]:
    """Every rule that the graph (onnx.ModelProto) breaks, naming the node; () where TensorRT can take it."""
    return tuple(_broken(model))


def _broken(model: Any) -> Iterator[str]:
    from onnx import numpy_helper

    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    made_by = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _of_scale(node, constants, made_by)
        elif node.op_type in CHANNEL_AXIS and len(node.input) > 1:
            yield from _of_layer(node, constants, made_by)
        elif node.op_type in ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"):
            yield f"{node.name}: TensorRT has no {node.op_type}"


def _of_scale(node: Any, constants: dict[str, np.ndarray], made_by: dict[str, Any]) -> Iterator[str]:
    scale = constants.get(node.input[1])
    zero = constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(1, np.int8)
    if scale is None or zero is None:
        yield f"{node.name}: scale and zero point must be constants"
        return
    if zero.dtype not in (np.dtype(np.int8),):
        yield f"{node.name}: integers must be int8, not {zero.dtype}"
    if np.any(zero.astype(np.int64)):
        yield f"{node.name}: the zero point must be 0"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"{node.name}: scales must be positive and finite"
    if scale.size > 1 and node.op_type == "QuantizeLinear" and node.input[0] not in constants:
        yield f"{node.name}: an activation has one scale, not {scale.size}"


def _of_layer(node: Any, constants: dict[str, np.ndarray], made_by: dict[str, Any]) -> Iterator[str]:
    makers = [made_by.get(i) for i in node.input]
    integer = [m is not None and m.op_type == "DequantizeLinear" for m in makers]
    if not any(integer[:2]):
        return
    weight = makers[1]
    if weight is not None and weight.op_type == "DequantizeLinear":
        scale = constants.get(weight.input[1])
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
        wanted = CHANNEL_AXIS[node.op_type]
        if scale is not None and scale.size > 1 and axis != wanted:
            yield f"{node.name}: the weight's scales lie along axis {axis}, not {wanted}"
    if len(integer) > 2 and integer[2]:
        yield f"{node.name}: the bias must stay float"
