"""OpenVINO IR (.xml and .bin): the fastest runtime on Intel and AMD processors."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.errors import BadBundle, RefusedFormat
from lighten.types import Device, Precision, Preprocess, Weight

if TYPE_CHECKING:
    from lighten.kit.onnx_graph import Packed

REQUIRES = ("openvino", "onnx", "onnxscript")
RUNS_ON = ("openvino",)
EXTRA = "openvino"
SUFFIX = ".xml"
BATCH = "any"
DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "i4": "int4",
    "u4": "uint4",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
}


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible, is_dynamic

    if is_dynamic(precision):
        return "OpenVINO computes dynamically quantized convolutions in float: no gain over weight-only"
    return impossible(precision)


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """Why a network of these ATen operators cannot be written, or None: it goes by way of ONNX."""
    from lighten.kit.operators import lacks_onnx

    return lacks_onnx(operators)


def not_here() -> str | None:
    """Why the runtime cannot run on this machine, or None."""
    return None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` to `path` by way of the same ONNX graph; returns the weights file beside it."""
    import onnx
    import openvino as ov

    from lighten.kit.onnx_graph import lower, to_onnx
    from lighten.kit.precisions import has_int4
    from lighten.quant.weight_only import half_weights, packed_weights

    model = to_onnx(module, shape)
    if precision.quantized:
        # OpenVINO adds biases in float; at 4 bits one that is rounded to the accumulator's scale is off by whole steps.
        model = lower(model, unsigned=device.activations == "uint8", biases=not has_int4(precision))
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "model.onnx"
        onnx.save(model, str(file))
        converted = ov.convert_model(str(file))
    if precision.quantized:
        _store(converted, packed_weights(module), half_weights(module, precision))
    _name_constants(converted)
    ov.save_model(converted, str(path), compress_to_fp16=precision.weights == "float16")
    return (path.with_suffix(".bin"),)


def bake(path: Path, how: Preprocess) -> None:
    """Put normalisation and layout inside a written file: it takes uint8 pixels (N, H, W, C) from then on."""
    import openvino as ov

    from lighten.kit.inside import into_openvino

    with tempfile.TemporaryDirectory() as room:  # the weights are mapped from the file that is replaced
        ov.save_model(
            into_openvino(ov.Core().read_model(path), how), str(Path(room) / path.name), compress_to_fp16=False
        )
        for file in (path, path.with_suffix(".bin")):
            shutil.copyfile(Path(room) / file.name, file)


def _store(model: Any, packed: Mapping[str, Packed], half: Mapping[str, np.ndarray]) -> None:
    """Constants as the plan stores them, put in after the reader, which would fold them back to wider ones.

    A Convert to int8 behind int4 is folded at load, so that layers still run on integers. Raises RefusedFormat where a
    weight is not in the graph.
    """
    from lighten.kit.onnx_graph import fits_half, fits_nibbles

    missing = {*packed, *half}
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]:
        kind, data = op.get_element_type().get_type_name(), op.get_data()
        if kind == "i8" and data.ndim > 1 and fits_nibbles(data):
            _replace(op, _convert(_constant(data, 4), "i8"))
        for name in [n for n, p in packed.items() if kind == "f32" and _is(data, p.value)]:
            _replace(op, _integers(packed[name], data))
            missing.discard(name)
        for name in [n for n, value in half.items() if kind == "f32" and _is(data, value)]:
            if fits_half(data):
                _replace(op, _convert(_constant(data.astype(np.float16)), "f32"))
            missing.discard(name)
    if missing:
        raise RefusedFormat(f"OpenVINO's reader changed the weight {min(missing)}.", "Leave that layer at its default.")


def _is(data: np.ndarray, value: np.ndarray) -> bool:
    """Whether a constant holds a weight, perhaps with split groups or, of a linear layer, turned."""
    if data.size != value.size:
        return False
    straight = np.array_equal(data.reshape(-1), value.reshape(-1))
    return straight or (value.ndim == 2 and data.shape == value.T.shape and np.array_equal(data, value.T))


def _replace(op: Any, output: Any) -> None:
    for reader in op.output(0).get_target_inputs():
        reader.replace_source_output(output)


def _convert(output: Any, kind: str) -> Any:
    from openvino import opset13

    return opset13.convert(output, kind).output(0)


def _constant(value: np.ndarray, bits: int = 0) -> Any:
    """A constant of the array's own type, or of packed 4-bit integers. OpenVINO's own copy."""
    import openvino as ov
    from openvino import opset13

    from lighten.kit.onnx_graph import nibbles

    if bits != 4:
        return opset13.constant(np.ascontiguousarray(value)).output(0)
    # A tensor with memory of its own: one that shares numpy's is left with freed memory.
    tensor = ov.Tensor(ov.Type.i4, ov.Shape(list(value.shape)))
    tensor.data[:] = np.frombuffer(nibbles(value), tensor.data.dtype)
    return opset13.constant(tensor).output(0)


def _integers(packed: Packed, data: np.ndarray) -> Any:
    """The subgraph that makes a float weight of its integers, in the shape of the constant it replaces."""
    from openvino import opset13

    value = packed.blocks if packed.block else packed.q
    scale = packed.scale[..., None] if packed.block else packed.spread
    made = opset13.multiply(_convert(_constant(value, packed.bits), "f32"), _constant(scale))
    if packed.block:
        made = opset13.reshape(made, _constant(np.array([packed.moved[0], -1])), False)
        if packed.row_length % packed.block:
            ends = [_constant(np.array([n])) for n in (0, packed.row_length, 1, 1)]
            made = opset13.slice(made, *ends)
        made = opset13.reshape(made, _constant(np.array(packed.moved)), False)
        order = list(range(1, packed.q.ndim))
        made = opset13.transpose(made, _constant(np.array([*order[: packed.axis], 0, *order[packed.axis :]])))
    if data.shape == packed.q.shape[::-1] and not np.array_equal(data.reshape(-1), packed.value.reshape(-1)):
        return opset13.transpose(made, _constant(np.array([1, 0]))).output(0)
    return opset13.reshape(made, _constant(np.array(data.shape)), False).output(0)


def _name_constants(model: Any) -> None:
    """Names that OpenVINO makes up count on through the process; numbered anew, the same model is the same file."""
    for k, op in enumerate(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if re.fullmatch(r"[A-Za-z]+_\d+", name):
            op.set_friendly_name(f"{name.rpartition('_')[0]}_{k}_auto")


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads. Raises BadBundle on a damaged file."""
    import openvino as ov

    # Left to itself OpenVINO computes in bf16 where the processor has it, and answers change.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        # On by default for compressed linear layers: their inputs would be rounded to 8 bits in groups of 32.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    try:
        compiled = ov.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError as e:
        raise BadBundle(
            f"{path} cannot be loaded by OpenVINO: {str(e)[:300]}", "Fetch or build both files again."
        ) from e
    request = compiled.create_infer_request()
    out = compiled.output(0)
    return lambda x: np.array(request.infer({0: x}, share_inputs=True)[out])


def runtime() -> str:
    """The runtime and its version."""
    import openvino as ov

    return f"OpenVINO {ov.__version__.split('-')[0]}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored constant with its true type."""
    import openvino as ov

    rows = []
    for op in ov.Core().read_model(str(path)).get_ordered_ops():
        if op.get_type_name() != "Constant":
            continue
        array = op.get_data()
        kind, shape = op.get_element_type().get_type_name(), tuple(op.get_output_shape(0))
        values = _unpacked(array, int(np.prod(shape))) if kind in ("i4", "u4") else array
        zeros = float(np.mean(values == 0)) if values.size else 0.0
        rows.append(Weight(op.get_friendly_name(), DTYPES.get(kind, kind), shape, array.nbytes, zeros))
    return tuple(rows)


def _unpacked(raw: np.ndarray, count: int) -> np.ndarray:
    """The bit patterns of `count` 4-bit integers that are stored two a byte."""
    both: np.ndarray = raw.view(np.uint8).reshape(-1)
    return np.stack([both & 15, both >> 4], 1).reshape(-1)[:count]


WORK = ("Convolution", "FullyConnected", "MatMul", "Eltwise", "Pooling", "Deconvolution", "Softmax", "MVN", "Reduce")
"""Layers of OpenVINO's compiled graph that compute; the others move or convert."""


def fallbacks(path: Path) -> tuple[str, ...]:
    """What the CPU plugin runs in float in an integer file, as its compiled graph says."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    if not any(op.get_type_name() == "FakeQuantize" or _is_integer(op) for op in model.get_ordered_ops()):
        return ()
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    rows = [(str(i["layerType"].value), str(i["runtimePrecision"].value)) for i in infos]
    counted = Counter(kind for kind, precision in rows if kind in WORK and precision in ("f32", "f16", "bf16"))
    return tuple(f"{n} x {kind} in float32" for kind, n in counted.items())


def _is_integer(op: Any) -> bool:
    if op.get_type_name() != "Constant" or len(op.get_output_shape(0)) < 2:
        return False
    return op.get_element_type().get_type_name() in ("i8", "u8", "i4", "u4")
