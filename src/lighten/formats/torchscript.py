"""TorchScript (.ptl): one file that LibTorch and PyTorch Mobile's lite interpreter both load; deprecated, still asked for."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle, RefusedFormat
from lighten.types import Device, Precision, Weight

REQUIRES = ("torch", "torchao")
RUNS_ON = ("torch",)
EXTRA = "compress"
SUFFIX = ".ptl"
BATCH = "any"

OWN = ("aten.", "prim.", "_operator.", "operator.")
"""Beginnings of the operators that every LibTorch has."""

MEMBERS = ("data.pkl", "constants.pkl", "version", "bytecode.pkl")
MAX_MEMBERS = 100_000
MAX_TEXT = 256 << 20
"""Bytes that the compressed members (code, never tensors) may unpack to."""


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible

    if precision.quantized and not impossible(precision):
        return "TorchScript is written in float32 and float16 only: its integer kernels cannot hold the plan"
    return impossible(precision)


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The operator that LibTorch does not have, or None. TorchScript takes all of torch's own."""
    strange = sorted(name for name in operators if not name.startswith(OWN))
    return f"{strange[0]} is not one of torch's own operators: LibTorch does not have it" if strange else None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` to `path`; no companions. Raises RefusedFormat where the tracer cannot follow it."""
    import torch

    from lighten.kit.quiet import quiet
    from lighten.kit.trace import example_input
    from lighten.quant.graph import fold

    flat = _flat(fold(module, shape), half=precision.weights == "float16")
    raw = io.BytesIO()
    try:
        with quiet(), torch.no_grad():
            torch.jit.save(torch.jit.trace(flat, example_input(shape), check_trace=False), raw)
            again = torch.jit.load(io.BytesIO(_unmangled(raw.getvalue())))
            written = again._save_to_buffer_for_lite_interpreter()
    except Exception as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise RefusedFormat(f"TorchScript cannot hold this model: {reason[:300]}", "Choose another format.") from e
    path.write_bytes(written)
    return ()


def _flat(graph: Any, half: bool) -> Any:
    """The same graph with its tensors in one module ("stem.0.weight" is "stem_0_weight"), halves widened as they are read.

    PyTorch computes float16 on processors slowly and roughly; stored halves that are widened lose nothing more.
    """
    import torch

    from lighten.kit.onnx_graph import fits_half
    from lighten.quant.graph import parameter

    root = torch.nn.Module()
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value, name = parameter(graph, str(node.target)).detach(), str(node.target).replace(".", "_")
        narrow = half and value.dtype == torch.float32 and fits_half(value.numpy())
        if not hasattr(root, name):
            root.register_buffer(name, value.half() if narrow else value.clone())
        node.target = name
        if narrow:
            with graph.graph.inserting_after(node):
                wide = graph.graph.call_method("float", (node,))
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
    return torch.fx.GraphModule(root, graph.graph).eval()


def _unmangled(raw: bytes) -> bytes:
    """Without the numbers that count this process's traces in the names of classes, and without stack traces."""
    done = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(done, "w") as new:
        for name in old.namelist():
            if name.endswith(".debug_pkl"):
                continue
            data = old.read(name)
            if name.endswith((".py", ".pkl")):
                data = re.sub(rb"\.___torch_mangle_\d+", b"", data)
            new.writestr(re.sub(r"/___torch_mangle_\d+", "", name), data)
    return done.getvalue()


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads (a setting of the whole process).

    Raises BadBundle on a damaged file. A TorchScript file is a program, though one without Python and without files:
    what is not laid out like one is refused before torch reads it.
    """
    import torch

    from lighten.kit.quiet import quiet

    module = _read(path)
    torch.set_num_threads(threads)
    with quiet():
        network = torch.jit.optimize_for_inference(torch.jit.freeze(module.eval()))

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            out: np.ndarray = network(torch.tensor(x, dtype=torch.float32)).float().numpy()
            return out

    return run


def _read(path: Path) -> Any:
    """The module of a file whose layout and checksums are right."""
    import torch

    from lighten.kit.quiet import quiet

    to_do = "Fetch or build the file again."
    try:
        problem = _damage(path)
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error) as e:
        raise BadBundle(f"{path} is not a TorchScript file: {str(e)[:300]}", to_do) from e
    if problem:
        raise BadBundle(f"{path} is not a TorchScript file: {problem}", to_do)
    try:
        with quiet():
            return torch.jit.load(str(path), map_location="cpu")
    except Exception as e:
        raise BadBundle(f"{path} cannot be loaded by torch: {str(e)[:300]}", to_do) from e


def _damage(path: Path) -> str | None:
    """What is wrong with the archive; reads it whole, so that every checksum is compared."""
    with zipfile.ZipFile(path) as archive:
        rows = archive.infolist()
        roots = {row.filename.split("/")[0] for row in rows}
        if len(rows) > MAX_MEMBERS or len(roots) != 1:
            return "its archive has several folders, or too many files"
        if any(".." in row.filename.split("/") for row in rows):
            return "a name in it leads out of its folder"
        names = {row.filename.partition("/")[2] for row in rows}
        if lost := [name for name in MEMBERS if name not in names]:
            return f"{lost[0]} is missing"
        packed = [row for row in rows if row.compress_type != zipfile.ZIP_STORED]
        if any(not row.filename.endswith((".py", ".debug_pkl")) for row in packed):
            return "a tensor in it is compressed"
        if sum(row.file_size for row in packed) > MAX_TEXT:
            return "it unpacks to too much"
        broken = archive.testzip()
        return f"{broken} is damaged" if broken else None


def runtime() -> str:
    """The runtime and its version."""
    from importlib.metadata import version

    return f"TorchScript {version('torch').split('+')[0]}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor with its true type."""
    return tuple(_row(name, value) for name, value in _read(path).state_dict().items())


def _row(name: str, value: Any) -> Weight:
    dtype = str(value.dtype).removeprefix("torch.")
    zeros = float((value == 0).float().mean()) if value.numel() else 0.0
    return Weight(name, dtype, tuple(value.shape), value.numel() * value.element_size(), zeros)


def fallbacks(path: Path) -> tuple[str, ...]:
    """Nothing: float files only."""
    return ()


def not_here() -> str | None:
    """Nothing keeps LibTorch from running here."""
    return None
