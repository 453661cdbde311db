"""MNN (.mnn): Alibaba's runtime for phones; float, and weights of 8 or 4 bits, converted from our ONNX graph."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lighten.errors import BadBundle, RefusedFormat
from lighten.types import Device, Precision, Weight

if TYPE_CHECKING:
    from lighten.kit.onnx_graph import Packed

REQUIRES = ("MNN", "onnx", "onnxscript")
RUNS_ON = ("MNN",)
EXTRA = "mnn"
SUFFIX = ".mnn"
BATCH = "any"
KEPT = ("float32", "float16")
"""Activations of layers with integer weights, and of those that stay float."""
PATIENCE_S = 600
UNKNOWN = {
    "_fft_r2c": "DFT",
    "_fft_c2c": "DFT",
    "_fft_c2r": "DFT",
    "isinf": "IsInf",
    "isnan": "IsNaN",
    "bernoulli": "Bernoulli",
}
"""ATen operators whose ONNX operator is not among those that `mnnconvert -f ONNX --OP` lists (3.6.1)."""
CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
"""The converter in a process of its own: it ends the process on what it cannot read. The command-line tools of the
package are left alone, because they install packages when they are imported."""


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible, is_dynamic

    if reason := impossible(precision):
        return reason
    if is_dynamic(precision):
        return "MNN's dynamic quantization is a switch of the program that runs the file, not of the file"
    pairs = ((precision.weights, precision.activations), *((w, a) for _, w, a in precision.exceptions))
    if not precision.quantized:
        return None
    if any(a not in KEPT for _, a in pairs):
        return "MNN's converter crashes on a graph with quantized activations: int8 and int4 weights only"
    if any(w == "float16" for w, _ in pairs):
        return "MNN's converter stores float16 weights in all layers or in none"
    return None


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The first operator that MNN's ONNX reader does not know, or None."""
    missing = next(
        (name for name in sorted(operators) if name.startswith("aten.") and name.split(".")[1] in UNKNOWN), None
    )
    return f"MNN cannot read {missing} (ONNX {UNKNOWN[missing.split('.')[1]]})" if missing else None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` to `path` by way of ONNX; no companions. Raises RefusedFormat naming the layer."""
    import onnx

    from lighten.kit.mnn_net import halved, overwritten, settled
    from lighten.kit.onnx_graph import to_onnx
    from lighten.quant.weight_only import float_graph, packed_weights

    packed = packed_weights(module)
    if any(one.block for one in packed.values()):
        raise RefusedFormat(
            "MNN's blocks of weights are laid out otherwise than the plan's.", "Use one scale a channel."
        )
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        onnx.save(to_onnx(float_graph(module), shape), str(room / "net.onnx"))
        raw = _converted(room)
        if precision.weights == "float16":
            raw = halved(_converted(room, "--fp16"), raw)
        elif packed:
            named = _by_operator(raw, packed)
            (room / "bits.json").write_text(json.dumps(_bits(named)), "utf-8")
            raw = _converted(room, "--compressionParamsFile", "bits.json")
            raw = overwritten(raw, {op: (one.q, one.scale) for op, one in named.items()})
    path.write_bytes(settled(raw))
    return ()


def _converted(room: Path, *options: str) -> bytes:
    """What MNN's converter makes of net.onnx in `room`."""
    words = ["-f", "ONNX", "--modelFile", "net.onnx", "--MNNModel", "net.mnn", "--bizCode", "lighten", *options]
    made = room / "net.mnn"
    made.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [sys.executable, "-c", CONVERT, *words], cwd=room, capture_output=True, text=True, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired as e:
        raise RefusedFormat(f"MNN's converter did not finish in {PATIENCE_S} s.", "Choose another format.") from e
    if done.returncode or not made.exists() or not made.stat().st_size:
        said = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise RefusedFormat(f"MNN cannot convert this model: {' / '.join(said[-3:])[:300]}", "Choose another format.")
    return made.read_bytes()


def _by_operator(raw: bytes, packed: Mapping[str, Packed]) -> dict[str, Packed]:
    """The plan's integers by the name of MNN's operator, found by the float values. Raises RefusedFormat."""
    from lighten.kit.mnn_net import Net

    net = Net(raw)
    held = {net.array(t).tobytes(): t.op for t in net.tensors if t.name == "weight"}
    named = {}
    for layer, one in packed.items():
        op = held.get(np.ascontiguousarray(one.value, np.float32).tobytes())
        if op is None or one.axis != 0:
            raise RefusedFormat(
                f"MNN's converter stores the weight {layer} in another way.", "Leave that layer in float."
            )
        named[op] = one
    return named


def _bits(named: Mapping[str, Packed]) -> dict[str, Any]:
    """MNN's compression parameters: how many bits each operator's weight gets; others stay float."""
    rows = [
        {"opName": op, "weight": [{"name": op, "bits": one.bits, "asymmetric": True, "blockSize": -1}]}
        for op, one in named.items()
    ]
    return {"version": "3.6.1", "algo": [{"type": "QUANTIZE", "quantParams": {"layer": rows}}]}


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Nothing on the process's own stdout and stderr, where MNN greets and where our workers report."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.devnull, "w") as nothing:
        kept = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(nothing.fileno(), fd)
            yield
        finally:
            for fd, old in zip((1, 2), kept):
                os.dup2(old, fd)
                os.close(old)


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads. Raises BadBundle on a damaged file."""
    _net(path)
    with _muted():
        from MNN import expr, nn

        settings = {"precision_mode": expr.PrecisionMode.High, "thread_num": threads, "backend": expr.Backend.CPU}
        try:
            module = nn.load_module_from_file(str(path), ["input"], ["output"], **settings)
        except Exception as e:
            raise BadBundle(f"{path} cannot be loaded by MNN: {str(e)[:300]}", "Fetch or build the file again.") from e
    if module is None:
        raise BadBundle(f"{path} cannot be loaded by MNN.", "Fetch or build the file again.")

    def run(x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        given = expr.const(x, list(x.shape), expr.NCHW)
        answer = expr.convert(module.forward([given])[0], expr.NCHW)
        shape = [d for d in answer.shape[1:] if d != 1] or [-1]  # (N, classes, 1, 1) is flat; a detector's is not
        return np.array(answer.read(), np.float32).reshape(len(x), *shape)

    return run


def _net(path: Path) -> Any:
    from lighten.kit.mnn_net import Net

    try:
        return Net(path.read_bytes())
    except OSError as e:
        raise BadBundle(f"{path} cannot be read: {e}", "Fetch or build the file again.") from e
    except BadBundle as e:
        raise BadBundle(f"{path}: {e.what}", e.to_do) from e


def runtime() -> str:
    """The runtime and its version."""
    from importlib.metadata import version

    return f"MNN {version('MNN')}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor with its true type, from the file itself."""
    net = _net(path)
    rows = ((t, net.array(t)) for t in net.tensors)
    return tuple(
        Weight(f"{t.op}.{t.name}", t.dtype, t.shape, t.bytes, float(np.mean(v == 0)) if v.size else 0.0)
        for t, v in rows
    )


def fallbacks(path: Path) -> tuple[str, ...]:
    """Nothing: every file that this format writes computes in float."""
    return ()


def not_here() -> str | None:
    """MNN runs on every machine that its package installs on."""
    return None
