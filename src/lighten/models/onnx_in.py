"""A trained network that comes as an ONNX file: checked as hostile in a child process, turned into torch, proven equal."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lighten.errors import BadModel, LightenError
from lighten.plugins import require

MOST_BYTES = 2 << 30
MOST_MEMORY, MOST_SECONDS = 24 << 30, 300
"""Address space (torch alone maps several GB) and CPU seconds of the child that opens the file first."""
NEWEST, OPSET = 18, 17
"""Newer files are converted to the first; what it has over the second, which onnx2torch reads whole, is rewritten."""
ALIKE = 1e-3
"""Of the largest answer: how far torch may be from ONNX Runtime."""
LOOPS = ("Loop", "Scan", "If")
QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "ConvInteger",
    "MatMulInteger",
)
STANDARD = ("", "ai.onnx")


def load(path: Path) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The network of an ONNX file as an eval-mode torch module, and (C, H, W) where the file fixes it.

    A child process with limits on memory and time reads, converts and proves it first (the same answers as ONNX Runtime
    within 1e-3 of the largest); only then is it read here. Raises BadModel naming the operator or what is wrong.
    """
    require("onnx2torch", "onnx", "read ONNX files")
    with tempfile.TemporaryDirectory(prefix="lighten-") as room:
        reply = Path(room) / "reply.json"
        command = [sys.executable, "-m", "lighten.models.onnx_in", str(path.resolve()), str(reply)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=2 * MOST_SECONDS, cwd=room)
        except subprocess.TimeoutExpired as e:
            raise _refused(path, f"reading it takes longer than {2 * MOST_SECONDS} s") from e
        if not reply.exists():
            raise _refused(path, _ending(done))
        said = json.loads(reply.read_text())
    if said["what"]:
        raise BadModel(said["what"], said["to_do"])
    return converted(read(path)), tuple(said["shape"]) if said["shape"] else None


def _ending(done: Any) -> str:
    dead = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    return f"the process that read it died ({dead}): {' '.join(done.stderr.strip().splitlines()[-1:])[-200:]}"


def _refused(path: Path, why: str) -> BadModel:
    return BadModel(
        f"{path} is not safe to read, or needs too much: {why}.", "Export the network anew, from its source."
    )


def read(path: Path) -> Any:
    """The checked onnx.ModelProto with its tensors inside. Raises BadModel."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    if not path.is_file() or not path.stat().st_size:
        raise BadModel(f"{path} is missing or empty.", "Check the path.")
    if path.stat().st_size > MOST_BYTES:
        raise _refused(path, f"it is larger than {MOST_BYTES >> 30} GB")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as e:
        raise BadModel(f"{path} is no ONNX file: {type(e).__name__}: {str(e)[:200]}", "Check the file.") from e
    check_operators(model, path)
    check_external(model, path)
    load_external_data_for_model(model, str(path.parent))
    try:
        onnx.checker.check_model(model)
    except Exception as e:
        raise BadModel(f"{path} breaks the ONNX standard: {str(e).splitlines()[0][:200]}", "Export it anew.") from e
    return model


def check_operators(model: Any, path: Path) -> None:
    """Raises BadModel naming the first operator that is not standard, loops, or is quantized already."""
    if model.functions:
        raise BadModel(f"{path} holds functions of its own ({model.functions[0].name}).", "Inline them (onnx.inliner).")
    for node in model.graph.node:
        if node.domain not in STANDARD:
            raise BadModel(
                f"{path}: {node.op_type} of the domain {node.domain} is no standard operator.",
                "Export the network with standard operators.",
            )
        if node.op_type in LOOPS or any(a.HasField("g") or a.graphs for a in node.attribute):
            raise BadModel(f"{path}: {node.op_type} runs other graphs; such files are not read.", "Export without it.")
        if node.op_type in QUANTIZED:
            raise BadModel(f"{path} is quantized already ({node.op_type}).", "Give the float network.")


def check_external(model: Any, path: Path) -> None:
    """Raises BadModel where tensors lie in files that are not plain ones inside the model's own folder."""
    home, total = path.resolve().parent, 0
    for one in model.graph.initializer:
        if not one.external_data:
            continue
        told = {e.key: e.value for e in one.external_data}
        name = told.get("location", "")
        file = home / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not name:
            raise _refused(path, f"the tensor {one.name} lies outside its folder ({name!r})")
        inside = [file, *file.parents][: len(Path(name).parts)]
        if any(p.is_symlink() for p in inside):
            raise _refused(path, f"the tensor {one.name} lies behind a link ({name!r})")
        if not file.is_file():
            raise BadModel(
                f"{path}: the file {name!r} with the tensor {one.name} is missing.", "Copy it beside the model."
            )
        if file.stat().st_nlink > 1:
            raise _refused(path, f"the tensor {one.name} lies in a file with other names, too ({name!r}: a hard link)")
        total += int(told.get("length", 0) or 0)
        if total > MOST_BYTES or file.stat().st_size > MOST_BYTES:
            raise _refused(path, f"its tensors are larger than {MOST_BYTES >> 30} GB")


def converted(model: Any) -> nn.Module:
    """The graph as torch modules. Raises BadModel naming the operator that has no counterpart."""
    import onnx2torch
    from onnx import version_converter

    try:
        if next(o.version for o in model.opset_import if o.domain in STANDARD) > NEWEST:
            model = version_converter.convert_version(model, NEWEST)
        _older_forms(model)
        module = onnx2torch.convert(_free_batch(model))
    except Exception as e:
        reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise BadModel(f"The ONNX file cannot be turned into torch: {reason}", "Give the network's own weights.") from e
    return _with_fixed_shapes(module).eval()


class Reshape(nn.Module):
    """ONNX Reshape with sizes that are known: 0 keeps a dimension, -1 is what is left."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape([x.shape[k] if n == 0 else n for k, n in enumerate(self.sizes)])

    def extra_repr(self) -> str:
        return str(self.sizes)


def _with_fixed_shapes(module: Any) -> nn.Module:
    """onnx2torch reads the sizes of a Reshape from a tensor as it runs, which no exporter can follow."""
    for node in [n for n in module.graph.nodes if n.op == "call_module" and len(n.args) == 2]:
        sizes = node.args[1]
        if type(module.get_submodule(node.target)).__name__ == "OnnxReshape" and sizes.op == "get_attr":
            owner, _, name = str(sizes.target).rpartition(".")
            value = getattr(module.get_submodule(owner), name)
            module.set_submodule(node.target, Reshape([int(v) for v in value]))
            node.args = node.args[:1]
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _older_forms(model: Any) -> None:
    """Operators of set 18 as set 17 writes them. The proof that follows shows whether anything was lost.

    Reduce* took their axes as an attribute, Split counted its outputs by itself. `allowzero` says what a 0 in the sizes
    of a Reshape means: without a 0 it says nothing, and onnx2torch does not know it.
    """
    constants = _constants(model)
    for node in model.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) == 2 and node.input[1] in constants:
            if node.op_type != "ReduceSum":  # which had it so before
                _set(node, "axes", [int(v) for v in constants[node.input[1]].reshape(-1)])
                del node.input[1]
        elif node.op_type == "Split":
            _drop(node, "num_outputs")
        elif node.op_type == "Reshape" and np.all(constants.get(node.input[1], np.zeros(1))):
            _drop(node, "allowzero")
    for one in model.opset_import:
        if one.domain in STANDARD:
            one.version = min(one.version, OPSET)


def _constants(model: Any) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "Constant"]
    return stored | {n.output[0]: numpy_helper.to_array(a.t) for n in nodes for a in n.attribute if a.name == "value"}


def _drop(node: Any, name: str) -> None:
    for one in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(one)


def _set(node: Any, name: str, value: list[int]) -> None:
    from onnx import helper

    _drop(node, name)
    node.attribute.append(helper.make_attribute(name, value))


def _free_batch(model: Any) -> Any:
    """The graph with a named batch: what was exported for one image may take more (the proof says whether it does)."""
    for value in (*_inputs(model), *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) and dims[0].HasField("dim_value"):
            dims[0].dim_param = "batch"
    del model.graph.value_info[:]
    return model


def _inputs(model: Any) -> list[Any]:
    stored = {i.name for i in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in stored]


def input_shape(model: Any, path: Path) -> tuple[int, ...] | None:
    """(C, H, W) of the one image input, None where the file leaves it open. Raises BadModel on any other input."""
    inputs = _inputs(model)
    if len(inputs) != 1 or len(model.graph.output) != 1:
        count = f"{len(inputs)} inputs and {len(model.graph.output)} outputs"
        raise BadModel(f"{path} has {count}; one image in and one answer out are needed.", "Export such a network.")
    kind = inputs[0].type.tensor_type
    if kind.elem_type != 1 or len(kind.shape.dim) != 4:
        raise BadModel(f"{path}: its input is not float32 (batch, channels, height, width).", "Export it so.")
    sizes = tuple(int(d.dim_value) for d in kind.shape.dim[1:])
    return sizes if all(sizes) else None


def prove(model: Any, module: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    """Raises BadModel where torch and ONNX Runtime differ on four images, alone or together."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    name = session.get_inputs()[0].name
    want = np.concatenate([session.run(None, {name: x[k : k + 1].numpy()})[0] for k in range(len(x))])
    with torch.inference_mode():
        try:
            got = module(x).numpy()
        except Exception as e:
            raise BadModel(
                f"{path} takes one batch size only: {str(e).splitlines()[0][:200]}", "Export it with a dynamic batch."
            ) from e
    if got.shape != want.shape or not np.isfinite(want).all():
        raise BadModel(
            f"{path} answers {want.shape}, or not with numbers; torch answers {got.shape}.", "Export it anew."
        )
    far = float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-6))
    if far > ALIKE:
        raise BadModel(f"{path}: in torch its answers differ by {100 * far:.2g} % of the largest.", "Give the weights.")


def _child(path: Path) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        model = read(path)
        shape = input_shape(model, path)
        sizes = shape or (3, 224, 224)
        before = type(model).FromString(model.SerializeToString())
        prove(before, converted(model), path, sizes)
    except LightenError as e:
        return {"what": e.what, "to_do": e.to_do, "shape": None}
    except MemoryError:
        return {"what": f"{path} needs more than {MOST_MEMORY >> 30} GB.", "to_do": "Check the file.", "shape": None}
    except Exception as e:  # noqa: BLE001 - ONNX Runtime raises its own kinds
        what = f"{path} cannot be run: {type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
        return {"what": what, "to_do": "Export it anew.", "shape": None}
    return {"what": "", "to_do": "", "shape": shape}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_child(Path(sys.argv[1]))))
