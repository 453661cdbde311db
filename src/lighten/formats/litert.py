"""LiteRT (.tflite), run by ai-edge-litert: Android, microcontrollers, Coral; NHWC, one image at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.errors import BadBundle, RefusedFormat
from lighten.types import Device, Precision, Weight

if TYPE_CHECKING:
    from lighten.kit.onnx_graph import Packed

REQUIRES = ("litert_torch", "ai_edge_litert")
RUNS_ON = ("ai_edge_litert",)
EXTRA = "litert"
SUFFIX = ".tflite"
BATCH = "one"
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


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible, is_dynamic

    if "int4" in (precision.activations, *(activations for *_, activations in precision.exceptions)):
        return "LiteRT has no 4-bit activations"
    if is_dynamic(precision):
        return "LiteRT rounds dynamic activations row by row on a grid of its own, which is not this plan"
    return impossible(precision)


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The operators that litert-torch has no lowering for, in one line, or None."""
    from lighten.kit.pt2e import lacking, silent

    def lowered(op: Any) -> bool:
        with silent():  # costly to import: asked only for what is not taken apart anyway
            from litert_torch.backend.lowerings import registry
        return registry.lookup(op) is not None

    missing = lacking(operators, lowered)
    return f"LiteRT has no {', '.join(missing)}" if missing else None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` (float, or made by the plan) to `path`; returns companion files (none).

    Raises RefusedFormat where the converter cannot take the network, or a weight cannot be stored as asked.
    """
    from lighten.kit.pt2e import integer_weights
    from lighten.quant.weight_only import half_weights, packed_weights

    static = precision.activations in ("int8",)
    model = _read(_converted(module, shape, static), path)
    graph = model.subgraphs[0]
    packed = packed_weights(module) or (integer_weights(module) if static else {})
    _store(model, packed, half_weights(module, precision), everything=not static)
    if precision.weights == "float16":
        _halve(model)
    _float_ends(model)
    _name(model, graph)
    path.write_bytes(_bytes(model))
    return ()


def _converted(module: Any, shape: tuple[int, ...], static: bool) -> bytes:
    """litert-torch's file, with channels last so that no transposes stay between the layers."""
    from lighten.kit.pt2e import converting, one_image, with_float_weights
    from lighten.quant.weight_only import float_graph

    with converting("LiteRT"):
        import litert_torch
        import torch
        from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
        from litert_torch.quantize.quant_config import QuantConfig

        litert_torch.config.show_progress = False
        # Only says that Q/DQ pairs are to become integer operators; the grids are those in the graph.
        asked = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        graph = one_image(float_graph(module), shape)
        graph = with_float_weights(graph) if static else graph
        last = litert_torch.to_channel_last_io(graph, args=[0])
        example = (torch.zeros(1, *shape[1:], shape[0]),)
        with torch.no_grad():
            made = litert_torch.convert(last, example, quant_config=QuantConfig(pt2e_quantizer=asked) if static else None)
        return bytes(made.model_content())


# --- the file as objects ----------------------------------------------------------------------------


def _read(raw: bytes, path: Path) -> Any:
    """The flatbuffer as objects. Raises BadBundle naming `path` where it is no LiteRT model or not whole."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        if raw[4:8] != MAGIC:
            raise ValueError("it does not begin as a LiteRT file does")
        model = schema.ModelT.InitFromPackedBuf(raw, 0)
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                _check(model, tensor)
            used = [i for op in graph.operators for i in (*_list(op.inputs), *_list(op.outputs))]
            if not all(-1 <= i < len(graph.tensors) for i in (*used, *graph.inputs, *graph.outputs)):
                raise ValueError("an operator names a tensor that is not there")
            if not all(0 <= op.opcodeIndex < len(model.operatorCodes) for op in graph.operators):
                raise ValueError("an operator has no kind")
        if not model.subgraphs or (len(model.subgraphs[0].inputs), len(model.subgraphs[0].outputs)) != (1, 1):
            raise ValueError("it is no network of one input and one output")
    except Exception as e:
        raise BadBundle(f"{path} cannot be loaded by LiteRT: {str(e)[:200]}", "Fetch or build the file again.") from e
    return model


def _check(model: Any, tensor: Any) -> None:
    data = _data(model, tensor)
    if data is not None and len(data) != _bytes_of(DTYPES[tensor.type], _shape(tensor)):
        raise ValueError(f"the tensor {_text(tensor.name)} has {len(data)} bytes")


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    bits = BITS.get(dtype) or np.dtype(dtype).itemsize * 8
    return -(-int(np.prod(shape, dtype=np.int64)) * bits // 8)


def _data(model: Any, tensor: Any) -> np.ndarray | None:
    """The bytes of a stored tensor, or None for what is computed."""
    if not 0 <= tensor.buffer < len(model.buffers):
        raise ValueError("a tensor names a buffer that is not there")
    data = model.buffers[tensor.buffer].data
    return None if data is None or not len(data) else np.asarray(data, np.uint8)


def _list(array: Any) -> list[int]:
    return [] if array is None else [int(i) for i in array]


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(_list(tensor.shape))


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _floats(model: Any, graph: Any) -> list[tuple[int, np.ndarray]]:
    """Every stored float32 tensor by its index."""
    found = []
    for k, tensor in enumerate(graph.tensors):
        data = _data(model, tensor) if DTYPES[tensor.type] == "float32" else None
        if data is not None:
            found.append((k, data.view(np.float32).reshape(_shape(tensor))))
    return found


def _bytes(model: Any) -> bytes:
    """The file. The object interface forgets that stored tensors are aligned, which fast kernels rely on."""
    import flatbuffers

    for buffer in model.buffers:
        buffer.Pack = partial(_pack_aligned, buffer)
    builder = flatbuffers.Builder(1 << 16)
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


def _store(model: Any, packed: Mapping[str, Packed], half: Mapping[str, np.ndarray], *, everything: bool) -> None:
    """Float weights become the integers (or halves) they were rounded to, and a DEQUANTIZE that runs once, at load.

    Weights of integer layers are integers already. With `everything`, a weight that is not there is an error.
    """
    graph, missing = model.subgraphs[0], {**(packed if everything else {}), **half}
    for k, value in _floats(model, graph):
        for name, one in packed.items():
            if one.block:
                raise RefusedFormat("LiteRT takes one scale a channel, not blocks of weights.", "Leave out the blocks.")
            if placed := _placed(one, value):
                _widen(model, graph, k, *placed, one)
                missing.pop(name, None)
                break
        for name, wanted in half.items():
            if _same(wanted.size, value) and np.array_equal(np.sort(wanted, None), np.sort(value, None)):
                _widen(model, graph, k, value.astype(np.float16))
                missing.pop(name, None)
                break
    if missing:
        raise RefusedFormat(f"LiteRT's converter changed the weight {min(missing)}.", "Leave that layer at its default.")
    _narrow(model, graph)


def _same(size: int, value: np.ndarray) -> bool:
    return bool(value.size == size and value.ndim > 1)


def _placed(packed: Packed, value: np.ndarray) -> tuple[np.ndarray, int] | None:
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


def _widen(
    model: Any, graph: Any, k: int, stored: np.ndarray, axis: int = 0, packed: Packed | None = None
) -> None:
    """Tensor `k` is computed by a DEQUANTIZE from `stored`."""
    from ai_edge_litert import schema_py_generated as schema

    held, tensor = schema.TensorT(), graph.tensors[k]
    held.shape, held.buffer, held.name = tensor.shape, tensor.buffer, f"{_text(tensor.name)}_stored"
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

    read = {i: _kind(model, op) for op in graph.operators for i in _list(op.inputs)}
    for tensor in [graph.tensors[i] for i, kind in read.items() if i >= 0 and kind in TAKE_INT4]:
        data = _data(model, tensor) if DTYPES[tensor.type] == "int8" else None
        if data is not None and len(_shape(tensor)) > 1 and fits_nibbles(data.view(np.int8)):
            model.buffers[tensor.buffer].data = np.frombuffer(nibbles(data.view(np.int8)), np.uint8)
            tensor.type = NUMBERS["int4"]


def _halve(model: Any) -> None:
    """Float constants as float16, where none overflows."""
    from lighten.kit.onnx_graph import fits_half

    graph = model.subgraphs[0]
    for k, value in _floats(model, graph):
        if value.size >= SMALL and fits_half(value):
            _widen(model, graph, k, value.astype(np.float16))


def _float_ends(model: Any) -> None:
    """Input and output are float32, whatever the layers are: every device prepares the same pixels."""
    graph, float32 = model.subgraphs[0], NUMBERS["float32"]
    for end, kind, first in (("inputs", "QUANTIZE", True), ("outputs", "DEQUANTIZE", False)):
        (inner,) = _list(getattr(graph, end))
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


def _name(model: Any, graph: Any) -> None:
    """Names by place: the converter's are long, and count on through the process."""
    for k, op in enumerate(graph.operators):
        kind = _kind(model, op).lower()
        for place, i in enumerate(_list(op.inputs)):
            if i >= 0 and _data(model, graph.tensors[i]) is not None:
                graph.tensors[i].name = f"{kind}_{k}_{place}"
        for i in _list(op.outputs):
            graph.tensors[i].name = f"{kind}_{k}"
    graph.tensors[int(graph.inputs[0])].name = "input"
    graph.tensors[int(graph.outputs[0])].name = "output"


def _kind(model: Any, op: Any) -> str:
    """An operator's name as the schema has it: CONV_2D."""
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    code = model.operatorCodes[op.opcodeIndex]
    return names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")


# --- running it -----------------------------------------------------------------------------------------


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads, image by image.

    Raises BadBundle on a damaged file.
    """
    from ai_edge_litert.interpreter import Interpreter

    from lighten.kit.pt2e import silent

    try:
        raw = path.read_bytes()
    except OSError as e:
        raise BadBundle(f"{path} cannot be read: {e.strerror}.", "Fetch or build the file again.") from e
    _read(raw, path)
    try:
        with silent():
            interpreter = Interpreter(model_content=raw, num_threads=threads)
            interpreter.allocate_tensors()
    except Exception as e:
        raise BadBundle(f"{path} cannot be loaded by LiteRT: {str(e)[:300]}", "Fetch or build the file again.") from e
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(x: np.ndarray) -> np.ndarray:
        rows = []
        for image in np.asarray(x, np.float32).transpose(0, 2, 3, 1):
            interpreter.set_tensor(source, np.ascontiguousarray(image[None]))
            interpreter.invoke()
            rows.append(interpreter.get_tensor(target)[0])
        return np.stack(rows)

    return run


def runtime() -> str:
    """The runtime and its version."""
    from importlib.metadata import version

    return f"LiteRT {version('ai-edge-litert')}"


def not_here() -> str | None:
    """Nothing: it runs wherever its package is."""
    return None


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor with its true type; convolutions' are (O, H, W, I). Raises BadBundle on a damaged file."""
    model = _read(path.read_bytes(), path)
    rows = []
    for tensor in (t for graph in model.subgraphs for t in graph.tensors):
        data = _data(model, tensor)
        if data is not None:
            dtype, shape = DTYPES[tensor.type], _shape(tensor)
            rows.append(Weight(_text(tensor.name), dtype, shape, len(data), _zeros(data, dtype, shape)))
    return tuple(rows)


def _zeros(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> float:
    if dtype == "int4":
        values = np.stack([data & 15, data >> 4], 1).reshape(-1)[: int(np.prod(shape))]
    else:
        values = data.view("uint16" if dtype == "bfloat16" else dtype)
    return float(np.mean(values == 0)) if values.size else 0.0


def fallbacks(path: Path) -> tuple[str, ...]:
    """What computes in float32 in a file whose layers compute in integers."""
    model = _read(path.read_bytes(), path)
    graph = model.subgraphs[0]
    computed = [t for t in graph.tensors if _data(model, t) is None]
    if not any(DTYPES[t.type] == "int8" for t in computed):
        return ()
    found: Counter[str] = Counter()
    for op in graph.operators:
        kinds = {DTYPES[graph.tensors[i].type] for i in (*_list(op.inputs), *_list(op.outputs)) if i >= 0}
        if "float32" in kinds and _kind(model, op) not in ("QUANTIZE", "DEQUANTIZE"):
            found[_kind(model, op)] += 1
    return tuple(f"{n} x {kind} in float32" for kind, n in found.items())
