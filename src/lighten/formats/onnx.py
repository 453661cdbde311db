"""ONNX, run by ONNX Runtime: the file every other tool reads."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.errors import BadBundle
from lighten.types import Device, Precision, Preprocess, Weight

if TYPE_CHECKING:
    from lighten.kit.onnx_boxes import BoxRules

REQUIRES = ("onnx", "onnxscript")
RUNS_ON = ("onnxruntime",)
EXTRA = "onnx"
SUFFIX = ".onnx"
BATCH = "any"
DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    21: "uint4",
    22: "int4",
}


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible

    return impossible(precision)


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """Why a network of these ATen operators cannot be written, or None."""
    from lighten.kit.operators import lacks_onnx

    return lacks_onnx(operators)


def not_here() -> str | None:
    """Why the runtime cannot run on this machine, or None: it runs everywhere."""
    return None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` (float, or made by the plan) to `path`; returns companion files (none)."""
    import onnx

    from lighten.kit.onnx_graph import INT4_OPSET, lower, to_onnx
    from lighten.kit.precisions import has_int4
    from lighten.quant.weight_only import float_graph, half_weights, packed_weights

    model = to_onnx(float_graph(module), shape, INT4_OPSET if has_int4(precision) else None)
    if precision.quantized:
        model = lower(
            model,
            unsigned=device.activations == "uint8",
            reduce_range=device.reduce_range,
            packed=packed_weights(module),
            half=half_weights(module, precision),
        )
    elif precision.weights == "float16":
        model = _in_float16(model)
    strip(model)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return ()


def _in_float16(model: Any) -> Any:
    """The model computing in float16, by ONNX Runtime's converter; inputs and outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = convert_float_to_float16(model, keep_io_types=True)
    # Two Resize nodes that share their scales get the same cast twice.
    nodes = list({tuple(node.output): node for node in model.graph.node}.values())
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    OnnxModel.graph_topological_sort(model.graph)  # the converter appends its casts at the end
    return model


def bake(path: Path, how: Preprocess) -> None:
    """Put normalisation and layout inside a written file: it takes uint8 pixels (N, H, W, C) from then on."""
    import onnx

    from lighten.kit.inside import into_onnx

    model = into_onnx(onnx.load(str(path)), how)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def put_boxes_in(path: Path, rules: BoxRules) -> None:
    """Put decoding and suppression inside a detector's written file: it gives boxes (found, 7) from then on, see
    `kit.onnx_boxes`. Raises BadModel where its outputs are not the head's."""
    import onnx

    from lighten.kit.onnx_boxes import into_onnx

    model = into_onnx(onnx.load(str(path)), rules)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def take_boxes_out(path: Path, into: Path) -> None:
    """Write the file that `path` was before boxes were put inside, with raw outputs. Raises BadModel where none are."""
    import onnx

    from lighten.kit.onnx_boxes import out_of_onnx

    into.write_bytes(out_of_onnx(onnx.load(str(path))).SerializeToString())


def strip(model: Any, keep_names: bool = False) -> None:
    """Take out what only the exporter needs: stack traces, value infos, doc strings, and unless `keep_names` the names of
    nodes and of what lies between them; a tenth of a small file. Inputs, outputs and stored tensors keep their names."""
    model.graph.doc_string = model.doc_string = ""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    if any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute):
        return  # inner graphs read the outer one's values by name
    _store_once(model.graph)
    if not keep_names:
        _short_names(model.graph)


def _store_once(graph: Any) -> None:
    """Tensors of the same kind, shape and bytes under one name: an integer file repeats zero points and scales."""
    outside = {v.name for v in (*graph.input, *graph.output)}
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for init in graph.initializer:
        key = init.data_type, tuple(init.dims), init.raw_data
        if init.raw_data and init.name not in outside and first.setdefault(key, init.name) != init.name:
            same[init.name] = first[key]
    kept = [init for init in graph.initializer if init.name not in same]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]


def _short_names(graph: Any) -> None:
    """Number the values that only pass between nodes: their names are most of a small node."""
    taken = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    free = (name for k in itertools.count() if (name := f"{k:x}") not in taken)
    short = {name: next(free) for node in graph.node for name in node.output if name and name not in taken}
    for node in graph.node:
        node.name = ""
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads. Raises BadBundle on a damaged file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads halve the speed of everything where cores are shared.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BadBundle(
            f"{path} cannot be loaded by ONNX Runtime: {str(e)[:300]}", "Fetch or build the file again."
        ) from e
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def runtime() -> str:
    """The runtime and its version."""
    import onnxruntime as ort

    return f"ONNX Runtime {ort.__version__}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor with its true type. Needs the `onnx` package."""
    import onnx
    from onnx import numpy_helper

    rows = []
    for init in onnx.load(str(path), load_external_data=False).graph.initializer:
        array = numpy_helper.to_array(init)
        stored = len(init.raw_data) or array.nbytes
        zeros = float(np.mean(array == 0)) if array.size else 0.0
        rows.append(
            Weight(init.name, DTYPES.get(init.data_type, str(init.data_type)), tuple(array.shape), stored, zeros)
        )
    return tuple(rows)


def fallbacks(path: Path) -> tuple[str, ...]:
    """What ONNX Runtime runs in float in an integer file, read off the graph that it made of the file.

    Needs the `onnx` package.
    """
    import onnx
    import onnxruntime as ort

    from lighten.kit.onnx_reading import float_work, is_integer

    if not is_integer(onnx.load(str(path), load_external_data=False)):
        return ()
    with tempfile.TemporaryDirectory() as room:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(room) / "optimized.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        counted = float_work(onnx.load(options.optimized_model_filepath))
    return tuple(f"{n} x {kind} in float32" for kind, n in counted.items())
