"""OpenVINO IR (.xml and .bin): the fastest runtime on Intel and AMD processors."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle
from lighten.types import Device, Precision, Weight

REQUIRES = ("openvino", "onnx", "onnxscript")
RUNS_ON = ("openvino",)
EXTRA = "openvino"
SUFFIX = ".xml"
DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
}


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    if precision.weights not in ("float32", "float16", "int8"):
        return f"{precision.weights} weights are not written to OpenVINO IR yet"
    return None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` to `path` by way of the same ONNX graph; returns the weights file beside it."""
    import onnx
    import openvino as ov

    from lighten.kit.onnx_graph import lower, to_onnx

    model = to_onnx(module, shape)
    if precision.quantized:
        model = lower(model, unsigned=device.activations == "uint8")
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "model.onnx"
        onnx.save(model, str(file))
        converted = ov.convert_model(str(file))
    _name_constants(converted)
    ov.save_model(converted, str(path), compress_to_fp16=precision.weights == "float16")
    return (path.with_suffix(".bin"),)


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
        kind = op.get_element_type().get_type_name()
        zeros = float(np.mean(array == 0)) if array.size else 0.0
        rows.append(Weight(op.get_friendly_name(), DTYPES.get(kind, kind), tuple(array.shape), array.nbytes, zeros))
    return tuple(rows)
