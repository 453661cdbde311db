"""A LiteRT file as objects: read with care, edited exactly, written aligned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.errors import BadBundle, RefusedFormat

if TYPE_CHECKING:
    from lighten.kit.onnx_graph import Packed

MAGIC = b"TFL3"
ALIGNMENT = 16
"""Bytes, of every stored tensor: schema.fbs, `table Buffer`."""
DTYPES = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8", 10: "float64",
    15: "uint32", 16: "uint16", 17: "int4", 18: "bfloat16",
}  # fmt: skip
"""Numbers of TensorType (schema.fbs)."""
NUMBERS = {name: number for number, name in DTYPES.items()}
BITS = {"int4": 4, "bool": 8, "bfloat16": 16}
TAKE_INT4 = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "DEQUANTIZE")
"""Operators with a kernel for weights of 4 bits."""
SMALL = 64
"""Constants of fewer values stay float32: the node that widens a float16 one takes more bytes than it saves."""


def read(raw: bytes, path: Path) -> Any:
    """The flatbuffer as objects. Raises BadBundle naming `path` where it is no LiteRT model or not whole."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        if raw[4:8] != MAGIC:
            raise ValueError("it does not begin as a LiteRT file does")
        model = schema.ModelT.InitFromPackedBuf(raw, 0)
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                _check(model, tensor)
            used = [i for op in graph.operators for i in tensors_of(op)]
            if not all(0 <= i < len(graph.tensors) for i in (*used, *graph.inputs, *graph.outputs)):
                raise ValueError("an operator names a tensor that is not there")
            if not all(0 <= op.opcodeIndex < len(model.operatorCodes) for op in graph.operators):
                raise ValueError("an operator has no kind")
        if not model.subgraphs or (len(model.subgraphs[0].inputs), len(model.subgraphs[0].outputs)) != (1, 1):
            raise ValueError("it is no network of one input and one output")
    except Exception as e:
        raise BadBundle(f"{path} cannot be loaded by LiteRT: {str(e)[:200]}", "Fetch or build the file again.") from e
    return model


def _check(model: Any, tensor: Any) -> None:
    data = data_of(model, tensor)
    if data is not None and len(data) != _bytes_of(DTYPES[tensor.type], shape_of(tensor)):
        raise ValueError(f"the tensor {text(tensor.name)} has {len(data)} bytes")


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    bits = BITS.get(dtype) or np.dtype(dtype).itemsize * 8
    return -(-int(np.prod(shape, dtype=np.int64)) * bits // 8)


def data_of(model: Any, tensor: Any) -> np.ndarray | None:
    """The bytes of a stored tensor, or None for what is computed."""
    if not 0 <= tensor.buffer < len(model.buffers):
        raise ValueError("a tensor names a buffer that is not there")
    data = model.buffers[tensor.buffer].data
    return None if data is None or not len(data) else np.asarray(data, np.uint8)


def numbers(array: Any) -> list[int]:
    """A vector of the file, which the reader gives as an array or as None."""
    return [] if array is None else [int(i) for i in array]


def tensors_of(op: Any) -> list[int]:
    """Indices of what an operator reads and writes; -1, an input left out, is not among them."""
    return [i for i in (*numbers(op.inputs), *numbers(op.outputs)) if i != -1]


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The dimensions as plain numbers."""
    return tuple(numbers(tensor.shape))


def text(name: Any) -> str:
    """A string of the file, which the reader gives as bytes."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _floats(model: Any, graph: Any) -> list[tuple[int, np.ndarray]]:
    """Every stored float32 tensor by its index."""
    found: list[tuple[int, np.ndarray]] = []
    for k, tensor in enumerate(graph.tensors):
        data = data_of(model, tensor) if DTYPES[tensor.type] == "float32" else None
        if data is not None:
            found.append((k, data.view(np.float32).reshape(shape_of(tensor))))
    return found


def file_bytes(model: Any) -> bytes:
    """The file. The object interface forgets that stored tensors are aligned, which fast kernels rely on."""
    import flatbuffers

    class Sharing(flatbuffers.Builder):
        """Writes equal arrays once: a zero point of 8 bytes a channel is a tenth of a small integer file."""

        def CreateNumpyVector(self, x: np.ndarray) -> int:
            key = x.dtype.str, x.tobytes()
            if key not in written:
                written[key] = super().CreateNumpyVector(x)
            return written[key]

    written: dict[tuple[str, bytes], int] = {}
    for buffer in model.buffers:
        buffer.Pack = partial(_pack_aligned, buffer)
    builder = Sharing(1 << 16)
    builder.Finish(model.Pack(builder), MAGIC)
    return bytes(builder.Output())


def _pack_aligned(buffer: Any, builder: Any) -> int:
    from ai_edge_litert import schema_py_generated as schema

    data = None
    if buffer.data is not None and len(buffer.data):
        raw = np.asarray(buffer.data, np.uint8).tobytes()
        builder.StartVector(1, len(raw), ALIGNMENT)
        builder.head = builder.head - len(raw)
        builder.Bytes[builder.head : builder.head + len(raw)] = raw
        data = builder.EndVector()
    schema.BufferStart(builder)
    if data is not None:
        schema.BufferAddData(builder, data)
    return int(schema.BufferEnd(builder))


# --- edits --------------------------------------------------------------------------------------------


def store(model: Any, packed: Mapping[str, Packed], half: Mapping[str, np.ndarray], *, everything: bool) -> None:
    """Float weights become the integers (or halves) they were rounded to, and a DEQUANTIZE that runs once, at load.

    Weights of integer layers are integers already. With `everything`, a weight that is not there is an error; what
    float16 cannot hold stays as it is. Raises RefusedFormat.
    """
    from lighten.kit.onnx_graph import fits_half

    graph, missing = model.subgraphs[0], {**(packed if everything else {}), **half}
    for k, value in _floats(model, graph):
        for name, one in packed.items():
            if one.block:
                raise RefusedFormat("LiteRT takes one scale a channel, not blocks of weights.", "Leave out the blocks.")
            if found := placed(one, value):
                _widen(model, graph, k, *found, one)
                missing.pop(name, None)
                break
        for name, wanted in half.items():
            if _same(wanted.size, value) and np.array_equal(np.sort(wanted, None), np.sort(value, None)):
                if fits_half(value):
                    _widen(model, graph, k, value.astype(np.float16))
                missing.pop(name, None)
                break
    if missing:
        raise RefusedFormat(
            f"LiteRT's converter changed the weight {min(missing)}.", "Leave that layer at its default."
        )
    _narrow(model, graph)


def _same(size: int, value: np.ndarray) -> bool:
    return bool(value.size == size and value.ndim > 1)


def placed(packed: Packed, value: np.ndarray) -> tuple[np.ndarray, int] | None:
    """The integers in the layout of the constant `value` that they make, and the axis of their scales; or None."""
    if not _same(packed.q.size, value):
        return None
    inner = tuple(n for n in value.shape if n != 1)
    near = 1e-6 * float(np.abs(value).max())
    for order in itertools.permutations(range(packed.q.ndim)):
        turned = packed.value.transpose(order)
        if tuple(n for n in turned.shape if n != 1) != inner:
            continue
        if np.allclose(turned.reshape(value.shape), value, rtol=0, atol=near):
            before = int(np.prod(turned.shape[: order.index(packed.axis)], dtype=np.int64))
            return packed.q.transpose(order).reshape(value.shape), _axis_after(value.shape, before, len(packed.scale))
    return None


def _axis_after(shape: tuple[int, ...], before: int, size: int) -> int:
    """The axis of `size` channels that has `before` values in front of it."""
    fits = [k for k, n in enumerate(shape) if n == size and int(np.prod(shape[:k], dtype=np.int64)) == before]
    return fits[0]


def _widen(model: Any, graph: Any, k: int, stored: np.ndarray, axis: int = 0, packed: Packed | None = None) -> None:
    """Tensor `k` is computed by a DEQUANTIZE from `stored`."""
    from ai_edge_litert import schema_py_generated as schema

    held, tensor = schema.TensorT(), graph.tensors[k]
    held.shape, held.buffer, held.name = tensor.shape, tensor.buffer, f"{text(tensor.name)}_stored"
    held.type = NUMBERS[str(stored.dtype)]
    if packed is not None:
        held.quantization = schema.QuantizationParametersT()
        held.quantization.scale = packed.scale.astype(np.float32)
        held.quantization.zeroPoint = np.zeros(len(packed.scale), np.int64)
        held.quantization.quantizedDimension = axis
    raw = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    model.buffers[tensor.buffer].data = raw
    tensor.buffer = 0
    _add_operator(model, graph, "DEQUANTIZE", len(graph.tensors), k, first=True)
    graph.tensors.append(held)


def _add_operator(model: Any, graph: Any, kind: str, source: int, target: int, *, first: bool) -> None:
    from ai_edge_litert import schema_py_generated as schema

    number = getattr(schema.BuiltinOperator, kind)
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    if number not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
        model.operatorCodes.append(code)
        codes.append(number)
    code = model.operatorCodes[codes.index(number)]
    code.version = max(code.version, 5 if kind == "DEQUANTIZE" else 2)
    op = schema.OperatorT()
    op.opcodeIndex, op.inputs, op.outputs = codes.index(number), np.array([source]), np.array([target])
    graph.operators.insert(0 if first else len(graph.operators), op)


def _narrow(model: Any, graph: Any) -> None:
    """Integer weights that keep to 4 bits are stored so, two a byte."""
    from lighten.kit.onnx_graph import fits_nibbles, nibbles

    read = {i: kind_of(model, op) for op in graph.operators for i in numbers(op.inputs)}
    for tensor in [graph.tensors[i] for i, kind in read.items() if i >= 0 and kind in TAKE_INT4]:
        data = data_of(model, tensor) if DTYPES[tensor.type] == "int8" else None
        if data is not None and len(shape_of(tensor)) > 1 and fits_nibbles(data.view(np.int8)):
            model.buffers[tensor.buffer].data = np.frombuffer(nibbles(data.view(np.int8)), np.uint8)
            tensor.type = NUMBERS["int4"]


def halve(model: Any) -> None:
    """Float constants as float16, where none overflows."""
    from lighten.kit.onnx_graph import fits_half

    graph = model.subgraphs[0]
    for k, value in _floats(model, graph):
        if value.size >= SMALL and fits_half(value):
            _widen(model, graph, k, value.astype(np.float16))


def float_ends(model: Any) -> None:
    """Input and output are float32, whatever the layers are: every device prepares the same pixels."""
    graph, float32 = model.subgraphs[0], NUMBERS["float32"]
    for end, kind, first in (("inputs", "QUANTIZE", True), ("outputs", "DEQUANTIZE", False)):
        (inner,) = numbers(getattr(graph, end))
        if graph.tensors[inner].type == float32:
            continue
        outer = _twin(graph, inner, float32)
        _add_operator(model, graph, kind, *((outer, inner) if first else (inner, outer)), first=first)
        setattr(graph, end, np.array([outer]))
        for signature in model.signatureDefs or ():
            getattr(signature, end)[0].tensorIndex = outer


def _twin(graph: Any, k: int, kind: int) -> int:
    from ai_edge_litert import schema_py_generated as schema

    twin = schema.TensorT()
    twin.shape, twin.type, twin.buffer, twin.name = graph.tensors[k].shape, kind, 0, "end"
    twin.shapeSignature, twin.hasRank = graph.tensors[k].shapeSignature, graph.tensors[k].hasRank
    graph.tensors.append(twin)
    return len(graph.tensors) - 1


def rename(model: Any) -> None:
    """Names by place: the converter's are long, and count on through the process."""
    graph = model.subgraphs[0]
    for k, op in enumerate(graph.operators):
        kind = kind_of(model, op).lower()
        for place, i in enumerate(numbers(op.inputs)):
            if i >= 0 and data_of(model, graph.tensors[i]) is not None:
                graph.tensors[i].name = f"{kind}_{k}_{place}"
        for i in numbers(op.outputs):
            graph.tensors[i].name = f"{kind}_{k}"
    graph.tensors[int(graph.inputs[0])].name = "input"
    graph.tensors[int(graph.outputs[0])].name = "output"


def kind_of(model: Any, op: Any) -> str:
    """An operator's name as the schema has it: CONV_2D."""
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    code = model.operatorCodes[op.opcodeIndex]
    return names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")
