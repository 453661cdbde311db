"""Reading ONNX graphs: whether they hold integers, and what of them computes in float all the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
MOVES = (
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Gather", "Pad",
    "Identity", "Expand", "ReorderInput", "ReorderOutput",
)  # fmt: skip
"""Operators that only pass values on: they run on whatever their first input is."""
NO_WORK = (*MOVES, *QUANTIZING, "Shape", "Constant", "ConstantOfShape", "Cast", "Range")
INTEGER_WORK = (
    "QLinear",
    "QGemm",
    "QAttention",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulNBits",
)
"""Beginnings of the names of ONNX Runtime's operators that multiply integers, or read integer weights."""
FLOATS = (1, 10, 16)
"""TensorProto.FLOAT, FLOAT16, BFLOAT16."""


def is_integer(model: Any) -> bool:
    """Whether any tensor of the graph is quantized."""
    return any(n.op_type in QUANTIZING for n in model.graph.node)


def float_work(model: Any) -> dict[str, int]:
    """How many nodes of each kind compute in float, in a graph (onnx.ModelProto) that a runtime has fused."""
    floats = {i.name for i in model.graph.input} | {
        i.name for i in model.graph.initializer if i.data_type in FLOATS and len(i.dims) > 0
    }
    counted: Counter[str] = Counter()
    for node in model.graph.node:
        on_integers = node.op_type.startswith(INTEGER_WORK)
        reads_float = any(name in floats for name in node.input)
        if node.op_type == "DequantizeLinear" or (reads_float and node.op_type != "QuantizeLinear" and not on_integers):
            floats.update(node.output)
            if node.op_type not in NO_WORK:
                counted[node.op_type] += 1
    return dict(counted)
