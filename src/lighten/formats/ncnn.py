"""ncnn (.param and .bin): small, made for ARM phones; converted by pnnx, int8 by a writer of our own."""

from __future__ import annotations

import copy
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.errors import BadBundle, RefusedFormat
from lighten.types import Device, Precision, Weight

if TYPE_CHECKING:
    from lighten.kit.ncnn_graph import Grid, Integers, Layer

REQUIRES = ("pnnx", "ncnn")
RUNS_ON = ("ncnn",)
EXTRA = "ncnn"
SUFFIX = ".ncnn.param"
BATCH = "one"
STATIC = ("int8", "int8")
KEPT = (STATIC, ("float32", "float32"), ("float16", "float16"))
INPUT, OUTPUT = "in0", "out0"
PATIENCE_S = 600
UNKNOWN = (
    "remainder",
    "sort",
    "topk",
    "gather",
    "index_select",
    "var",
    "std",
    "channel_shuffle",
    "_fft_r2c",
    "_fft_c2c",
    "_fft_c2r",
)
"""ATen operators that pnnx 20261020 leaves without an ncnn layer, or with wrong answers (remainder), of 95 that were
converted, run and compared. Those that also make constants, which pnnx computes (where, index, tril), are not here:
`export` names them."""
MOVING = (
    "Input",
    "Split",
    "Reshape",
    "Flatten",
    "Permute",
    "Squeeze",
    "ExpandDims",
    "Concat",
    "Slice",
    "Crop",
    "Padding",
)
"""Layers that compute nothing: not worth a word where they run in float."""


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import FLOAT, impossible

    if reason := impossible(precision):
        return reason
    default = precision.weights, precision.activations
    if default in FLOAT:
        return None
    for layer, pair in (("", default), *((name, (w, a)) for name, w, a in precision.exceptions)):
        if pair not in KEPT:
            where = f"{layer}: " if layer else ""
            return f"{where}ncnn computes int8 weights with int8 activations alone, not {pair[0]} with {pair[1]}"
    return None


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The first operator that pnnx has no ncnn layer for, or None."""
    missing = sorted(name for name in operators if name.startswith("aten.") and name.split(".")[1] in UNKNOWN)
    return f"ncnn has no layer for {missing[0]}" if missing else None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` to `path` and the weights beside it, for a batch of one. Raises RefusedFormat naming the layer."""
    from lighten.kit.ncnn_graph import write
    from lighten.quant.weight_only import half_weights

    layers = _integer(module, shape) if precision.quantized else _converted(copy.deepcopy(module).eval(), shape)
    half = {value.tobytes() for value in half_weights(module, precision).values()}
    everything = precision.weights == "float16"
    text, raw = write(tuple(_halved(layer, lambda w: everything or w.tobytes() in half) for layer in layers))
    path.write_text(text, "utf-8")
    _weights_file(path).write_bytes(raw)
    return (_weights_file(path),)


def _weights_file(path: Path) -> Path:
    return path.with_suffix(".bin")


def _halved(layer: Layer, chosen: Callable[[np.ndarray], bool]) -> Layer:
    """`layer` with its chosen weights in float16. ncnn makes them float32 again where it has no float16 kernels."""
    from lighten.kit.ncnn_graph import tagged
    from lighten.kit.onnx_graph import fits_half

    def small(value: np.ndarray) -> bool:
        return value.dtype == np.float32 and chosen(value) and fits_half(value)

    return layer.having(tensors={n: v.astype(np.float16) for n, v in tagged(layer).items() if small(v)})


def _integer(module: Any, shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """The layers of a plan's module, those that the plan quantized in int8."""
    from lighten.kit.ncnn_graph import integer_layers

    marked, grids, integers = _marked(module)
    layers = _converted(marked, shape)
    stored = {layer.tensors["weight"].tobytes() for layer in layers if "weight" in layer.tensors}
    if not stored.issuperset(integers):
        raise RefusedFormat("pnnx changed a weight that the plan quantized.", "Leave that layer in float.")
    return integer_layers(layers, grids, lambda weight: integers.get(weight.tobytes()))


def _marked(module: Any) -> tuple[Any, dict[str, Grid], dict[bytes, Integers]]:
    """A float copy of a plan's module with a mark wherever it rounds an activation; the marks' grids by name, and the
    integers of its weights by the bytes of their float32 values."""
    import torch

    from lighten.kit.ncnn_graph import MARK, Grid

    mark_type = type(MARK, (torch.nn.Module,), {"forward": lambda self, x: x * 1.0, "__module__": "__main__"})
    graph = copy.deepcopy(module)
    grids: dict[str, Grid] = {}
    integers: dict[bytes, Integers] = {}
    for node in list(graph.graph.nodes):
        kind = str(getattr(node.target, "__name__", ""))
        if kind.startswith("quantize_per_tensor"):
            name = f"mark_{len(grids)}"
            grids[name] = Grid(float(node.args[1]), int(node.args[2]))
            graph.add_submodule(name, mark_type())
            with graph.graph.inserting_before(node):
                put = graph.graph.call_module(name, (node.args[0],))
        elif kind.startswith("dequantize_per") and node.args[0].op == "get_attr":
            value, held = _dequantized(graph, node)
            integers |= {value.numpy().tobytes(): held} if held else {}
            graph.register_buffer(f"float_{node.name}", value)
            with graph.graph.inserting_before(node):
                put = graph.graph.get_attr(f"float_{node.name}")
        elif kind.startswith("dequantize_per"):
            put = node.args[0]
        else:
            continue
        node.replace_all_uses_with(put)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, grids, integers


def _dequantized(graph: Any, node: Any) -> tuple[Any, Integers | None]:
    """A stored weight in float32, and its integers where their scales are one an output channel (axis 0)."""
    import torch

    from lighten.kit.ncnn_graph import Integers
    from lighten.quant.graph import parameter

    q, scale, *_ = (parameter(graph, a.target) if hasattr(a, "target") else a for a in node.args)
    value = node.target(*(parameter(graph, a.target) if hasattr(a, "target") else a for a in node.args), **node.kwargs)
    per_channel = "channel" in node.target.__name__
    if q.ndim < 2 or (per_channel and node.args[3] != 0):
        return value, None
    spread = torch.as_tensor(scale, dtype=torch.float32).reshape(-1).expand(len(q))
    return value, Integers(q.numpy(), spread.numpy())


def _converted(module: Any, shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """What pnnx makes of a float module, batch norms folded. pnnx is a program of its own: it may crash, or hang."""
    import pnnx
    import torch

    from lighten.kit.ncnn_graph import MARK, read
    from lighten.kit.quiet import quiet
    from lighten.kit.trace import example_input

    with tempfile.TemporaryDirectory() as room:
        with quiet(), torch.no_grad():
            torch.jit.trace(module, example_input(shape, batch=1), check_trace=False).save(f"{room}/net.pt")
        size = ",".join(map(str, (1, *shape)))
        command = [pnnx.EXEC_PATH, "net.pt", f"inputshape=[{size}]f32", "fp16=0", f"moduleop={MARK}"]
        try:
            done = subprocess.run(command, cwd=room, capture_output=True, text=True, timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as e:
            raise RefusedFormat(f"pnnx did not finish in {PATIENCE_S} s.", "Choose another format.") from e
        param, raw = Path(room, "net.ncnn.param"), Path(room, "net.ncnn.bin")
        if done.returncode or not param.exists() or not raw.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RefusedFormat(f"pnnx cannot convert this model: {last[:300]}", "Choose another format.")
        text = param.read_text("utf-8")
        if strange := sorted(set(re.findall(r"^(\S*(?:\.|::)\S+)\s", text, re.MULTILINE))):
            raise RefusedFormat(
                f"ncnn has no layer for {strange[0]}.", "Replace that operator, or choose another format."
            )
        return read(text, raw.read_bytes())


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, image by image, on `threads` CPU threads. Raises BadBundle."""
    import ncnn

    _read(path)
    net = ncnn.Net()
    net.opt.num_threads = threads
    for option in (
        "use_fp16_packed",
        "use_fp16_storage",
        "use_fp16_arithmetic",
        "use_bf16_storage",
        "use_vulkan_compute",
    ):
        setattr(net.opt, option, False)
    if net.load_param(str(path)) or net.load_model(str(_weights_file(path))):
        raise BadBundle(f"{path} cannot be loaded by ncnn.", "Fetch or build both files again.")

    def one(image: np.ndarray) -> np.ndarray:
        work = net.create_extractor()
        if work.input(INPUT, ncnn.Mat(np.ascontiguousarray(image)).clone()):
            raise BadBundle(f"{path} takes no input of shape {image.shape}.", "Fetch or build both files again.")
        code, answer = work.extract(OUTPUT)
        if code:
            raise BadBundle(f"{path} gives no answer (ncnn's code {code}).", "Fetch or build both files again.")
        found = np.array(answer, np.float32)
        return found if found.ndim == 2 and min(found.shape) > 1 else found.reshape(-1)  # a detector's places x values

    return lambda x: np.stack([one(image) for image in np.asarray(x, np.float32)])


def _read(path: Path) -> tuple[Layer, ...]:
    """Both files, checked against each other: ncnn itself would read past the end of a short one."""
    from lighten.kit.ncnn_graph import read

    try:
        layers = read(path.read_text("utf-8"), _weights_file(path).read_bytes())
    except (OSError, UnicodeDecodeError) as e:
        raise BadBundle(f"{path} or its .bin cannot be read: {e}", "Fetch or build both files again.") from e
    except BadBundle as e:
        raise BadBundle(f"{path}: {e.what}", e.to_do) from e
    if INPUT not in layers[0].outputs or not any(OUTPUT in layer.outputs for layer in layers):
        raise BadBundle(f"{path} does not go from {INPUT} to {OUTPUT}.", "Fetch or build both files again.")
    return layers


def runtime() -> str:
    """The runtime and its version."""
    import ncnn

    return f"ncnn {ncnn.__version__}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor with its true type, from the two files themselves."""
    return tuple(
        Weight(f"{layer.name}.{name}", str(v.dtype), v.shape, v.nbytes, float(np.mean(v == 0)) if v.size else 0.0)
        for layer in _read(path)
        for name, v in layer.tensors.items()
    )


def fallbacks(path: Path) -> tuple[str, ...]:
    """What computes in float beside int8 layers; nothing for float files."""
    from lighten.kit.ncnn_graph import ROUNDING, SHIFTING

    layers = _read(path)
    if not any("weight_scales" in layer.tensors for layer in layers):
        return ()
    counts = Counter(
        "step of rounding" if layer.name.startswith((ROUNDING, SHIFTING)) else layer.kind
        for layer in layers
        if "weight_scales" not in layer.tensors and layer.kind not in MOVING
    )
    return tuple(f"{count} x {kind} in float32" for kind, count in sorted(counts.items()))


def not_here() -> str | None:
    """ncnn runs on every machine that its package installs on."""
    return None
