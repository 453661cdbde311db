"""LiteRT (.tflite), run by ai-edge-litert: Android, microcontrollers, Coral; NHWC, one image at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle
from lighten.kit import tflite
from lighten.types import Device, Precision, Weight

REQUIRES = ("litert_torch", "ai_edge_litert")
RUNS_ON = ("ai_edge_litert",)
EXTRA = "litert"
SUFFIX = ".tflite"
BATCH = "one"


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible, is_dynamic

    if "int4" in (precision.activations, *(activations for *_, activations in precision.exceptions)):
        return "LiteRT has no 4-bit activations"
    if is_dynamic(precision):
        return "LiteRT rounds dynamic activations row by row on a grid of its own, which is not this plan"
    return impossible(precision)


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The operator that litert-torch has no lowering for, or None."""
    from lighten.kit.pt2e import lacking, silent

    def lowered(op: Any) -> bool:
        with silent():  # costly to import: asked only for what is not taken apart anyway
            from litert_torch.backend.lowerings import registry
        return registry.lookup(op) is not None

    missing = lacking(operators, lowered)
    return f"LiteRT has no lowering of {missing}" if missing else None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` (float, or made by the plan) to `path`; returns companion files (none).

    Raises RefusedFormat where the converter cannot take the network, or a weight cannot be stored as asked.
    """
    from lighten.kit.pt2e import integer_weights
    from lighten.quant.weight_only import half_weights, packed_weights

    static = precision.activations == "int8"
    model = tflite.read(_converted(module, shape, static), path)
    packed = packed_weights(module) or (integer_weights(module) if static else {})
    tflite.store(model, packed, half_weights(module, precision), everything=not static)
    if precision.weights == "float16":
        tflite.halve(model)
    tflite.float_ends(model)
    tflite.rename(model)
    path.write_bytes(tflite.file_bytes(model))
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
            made = litert_torch.convert(
                last, example, quant_config=QuantConfig(pt2e_quantizer=asked) if static else None
            )
        return bytes(made.model_content())


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
    tflite.read(raw, path)
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
    model = tflite.read(path.read_bytes(), path)
    rows = []
    for tensor in (t for graph in model.subgraphs for t in graph.tensors):
        data = tflite.data_of(model, tensor)
        if data is not None:
            dtype, shape = tflite.DTYPES[tensor.type], tflite.shape_of(tensor)
            rows.append(Weight(tflite.text(tensor.name), dtype, shape, len(data), _zeros(data, dtype, shape)))
    return tuple(rows)


def _zeros(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> float:
    if dtype == "int4":
        values = np.stack([data & 15, data >> 4], 1).reshape(-1)[: int(np.prod(shape))]
    else:
        values = data.view("uint16" if dtype == "bfloat16" else dtype)
    return float(np.mean(values == 0)) if values.size else 0.0


def fallbacks(path: Path) -> tuple[str, ...]:
    """What computes in float32 in a file whose layers compute in integers."""
    model = tflite.read(path.read_bytes(), path)
    graph = model.subgraphs[0]
    computed = [t for t in graph.tensors if tflite.data_of(model, t) is None]
    if not any(tflite.DTYPES[t.type] == "int8" for t in computed):
        return ()
    found: Counter[str] = Counter()
    for op in graph.operators:
        kinds = {tflite.DTYPES[graph.tensors[i].type] for i in tflite.tensors_of(op)}
        if "float32" in kinds and tflite.kind_of(model, op) not in ("QUANTIZE", "DEQUANTIZE"):
            found[tflite.kind_of(model, op)] += 1
    return tuple(f"{n} x {kind} in float32" for kind, n in found.items())
