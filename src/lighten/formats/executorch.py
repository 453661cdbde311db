"""ExecuTorch (.pte) with the XNNPACK delegate: PyTorch Mobile's successor on phones; one image at a time."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle
from lighten.types import Device, Precision, Weight

REQUIRES = ("executorch", "torchao")
RUNS_ON = ("executorch",)
EXTRA = "executorch"
SUFFIX = ".pte"
BATCH = "one"
MAGIC, HEADER, XNNPACK_HEADER = b"ET12", b"eh00", b"XH00"
"""Where bytes 4 to 8, and 8 to 12, of a program and of an XNNPACK blob begin (program.fbs, `XNNHeader`)."""
DTYPES = {
    "fp32": "float32", "fp16": "float16", "qint8": "int8", "qcint8": "int8", "qint32": "int32", "qcint32": "int32",
    "qcint4": "int4", "qbint4": "int4", "int32": "int32", "bf16": "bfloat16",
}  # fmt: skip
SCALARS = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}
"""Numbers of ScalarType (scalar_type.fbs)."""
INTEGER = ("qint8", "qcint8")
MOVES = ("Convert", "StaticTranspose", "Copy", "StaticReshape", "StaticSlice")


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible

    if reason := impossible(precision):
        return reason
    pairs = {(precision.weights, precision.activations), *((w, a) for _, w, a in precision.exceptions)}
    if strange := sorted(pairs - {("float32", "float32"), ("int8", "int8")}):
        weights, activations = strange[0]
        return f"XNNPACK has no convolution of {weights} weights with {activations} activations"
    return None


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The operators that are neither in the delegate nor among ExecuTorch's portable kernels, in one line, or None."""
    from lighten.kit.pt2e import lacking

    missing = lacking(operators, lambda op: f"{op._schema.name}" in _portable())
    return f"ExecuTorch has no {', '.join(missing)}" if missing else None


@cache
def _portable() -> frozenset[str]:
    """Names of the runtime's own kernels without their overloads: "aten::add"."""
    return frozenset(name.split(".")[0] for name in _runtime()._get_operator_names())


@cache
def _runtime() -> Any:
    """ExecuTorch's bindings, imported in silence."""
    from lighten.kit.pt2e import silent

    with silent():
        from executorch.extension.pybindings import portable_lib

        portable_lib._threadpool_get_thread_count()  # reads the processor, and says so, the first time
    return portable_lib


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` (float, or made by the plan) to `path`; returns companion files (none).

    Raises RefusedFormat where the converter cannot take the network.
    """
    from lighten.kit.pt2e import converting, one_image, with_aligned_cats, with_outer_biases
    from lighten.kit.trace import example_input

    with converting("ExecuTorch"):
        import torch

        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        graph = one_image(module, shape)
        graph = with_outer_biases(with_aligned_cats(graph)) if precision.quantized else graph
        with torch.no_grad():
            program = torch.export.export(graph, (example_input(shape, 1),), strict=False)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=_delegate_config())])
            path.write_bytes(bytes(lowered.to_executorch().buffer))
    return ()


@cache
def _delegate_config() -> Any:
    """XNNPACK's partitioner, which also takes a linear layer of integer weights whose input and output are float.

    XNNPACK has that kernel (f32-qc8w); ExecuTorch's own partitioner would leave a network's last layer, whose answer
    is not rounded, to a portable kernel that widens the weights at every run.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, LinearConfig
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_quant, tag_as_implicit_q_dq

    class FloatOutput(LinearConfig):  # type: ignore[misc]
        def get_deps(self, node: Any, ep: Any) -> tuple[bool, list[Any]]:
            weight = node.args[1]
            if len(node.args) > 2 or not is_dequant(weight) or any(is_quant(user) for user in node.users):
                return super().get_deps(node, ep)  # type: ignore[no-any-return]
            tag_as_implicit_q_dq(weight)
            return True, [weight, *weight.all_input_nodes]

    return [FloatOutput if one is LinearConfig else one for one in ALL_PARTITIONER_CONFIGS]


# --- running it -----------------------------------------------------------------------------------------


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads, image by image.

    The threads are one pool of the whole process: a function that finds another number sets its own, and what it
    loaded is loaded again. Raises BadBundle on a damaged file.
    """
    raw = _bytes(path)
    method = _Method(raw, threads, path)

    def run(x: np.ndarray) -> np.ndarray:
        import torch

        images = torch.from_numpy(np.ascontiguousarray(x, np.float32))
        return np.concatenate([method((image[None],)) for image in images])

    return run


class _Method:
    """A loaded program that is loaded anew where the pool of threads it was given is gone."""

    pools = 0
    """How many pools this process has had."""

    def __init__(self, raw: bytes, threads: int, path: Path) -> None:
        self.raw, self.threads, self.path, self.pool = raw, threads, path, -1
        self._load()

    def __call__(self, inputs: tuple[Any, ...]) -> np.ndarray:
        self._load()
        (out,) = self.method.call(inputs)
        answer: np.ndarray = out.numpy().copy()
        return answer

    def _load(self) -> None:
        from lighten.kit.pt2e import silent

        runtime = _runtime()
        if runtime._threadpool_get_thread_count() != self.threads:
            with silent():
                runtime._unsafe_reset_threadpool(self.threads)
            _Method.pools += 1
        if self.pool == _Method.pools:
            return
        try:
            with silent():
                check = runtime.Verification.InternalConsistency
                self.program = runtime._load_program_from_buffer(self.raw, program_verification=check)
                self.method = self.program.load_method("forward")
        except Exception as e:
            raise _damaged(self.path, str(e)) from e
        self.pool = _Method.pools


def _damaged(path: Path, why: str) -> BadBundle:
    return BadBundle(f"{path} cannot be loaded by ExecuTorch: {why[:300]}", "Fetch or build the file again.")


def _bytes(path: Path) -> bytes:
    """The file, where its header is one and the file is as long as that says. Raises BadBundle."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise _damaged(path, str(e.strerror)) from e
    if raw[4:8] != MAGIC or raw[8:12] != HEADER or len(raw) < 32:
        raise _damaged(path, "it does not begin as an ExecuTorch file does")
    length = int.from_bytes(raw[12:16], "little")
    program, segments = (int.from_bytes(raw[k : k + 8], "little") for k in (16, 24))
    held = int.from_bytes(raw[32:40], "little") if length >= 32 else 0
    if len(raw) < max(program, segments + held):
        raise _damaged(path, f"it has {len(raw)} bytes of {max(program, segments + held)}")
    return raw


def runtime() -> str:
    """The runtime and its version."""
    from importlib.metadata import version

    return f"ExecuTorch {version('executorch')}"


def not_here() -> str | None:
    """Nothing: it runs wherever its package is."""
    return None


# --- what is in a file ------------------------------------------------------------------------------------


def _parsed(path: Path) -> Any:
    """The program as objects, and the tensors that it names. Raises BadBundle."""
    raw = _bytes(path)
    from lighten.kit.pt2e import silent

    try:
        with silent():
            from executorch.exir._serialize import _deserialize_pte_binary

            return _deserialize_pte_binary(raw)
    except Exception as e:
        raise _damaged(path, str(e)) from e


def _delegates(file: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each XNNPACK graph (as its schema's JSON), and the constants that lie behind it."""
    for delegate in file.program.execution_plan[0].delegates:
        blob = bytes(file.program.backend_delegate_data[delegate.processed.index].data)
        if delegate.id == "XnnpackBackend" and blob[4:8] == XNNPACK_HEADER:
            offset, size = (int.from_bytes(blob[k : k + 4], "little") for k in (10, 14))
            constants = int.from_bytes(blob[18:22], "little")
            yield _graph(blob[offset : offset + size]), blob[constants:]


def _graph(flatbuffer: bytes) -> dict[str, Any]:
    import importlib.resources
    import json

    import executorch.backends.xnnpack.serialization as package
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory() as room:
        schema, binary = Path(room) / "schema.fbs", Path(room) / "graph.bin"
        schema.write_bytes(importlib.resources.files(package).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(flatbuffer)
        _flatc_decompile(room, str(schema), str(binary))
        text = (Path(room) / "graph.json").read_text()
    # flatc writes the ends of an unbounded clip as no JSON reader takes them.
    found: dict[str, Any] = json.loads(re.sub(r"(:\s*)-?(inf|nan)\b", r"\1null", text))
    return found


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor with its true type: XNNPACK's (scales too) and those of the portable kernels."""
    file = _parsed(path)
    rows = [row for graph, constants in _delegates(file) for row in _stored(graph, constants, file.named_data)]
    return (*rows, *_portable_tensors(file.program))


def _stored(graph: dict[str, Any], constants: bytes, named: Any) -> Iterator[Weight]:
    places, seen = _places(graph), set()
    for k, value in enumerate(graph.get("xvalues", ())):
        one = value["xvalue_union"]
        tensor, grid = one.get("tensor_value", one), one.get("quant_params", {})
        name, dtype = places.get(k, f"value_{k}"), DTYPES.get(_kind(tensor), _kind(tensor))
        for index, what, kind, shape in (
            (tensor.get("constant_buffer_idx", 0), name, dtype, tuple(tensor.get("dims", ()))),
            (grid.get("scale_buffer_idx", 0), f"{name}.scale", "float32", (grid.get("num_scales", 0),)),
        ):
            if index and index not in seen:
                seen.add(index)
                data = _constant(graph["constant_data"][index], constants, named)
                yield Weight(what, kind, shape, len(data), _zeros(data, kind, shape))


def _kind(tensor: dict[str, Any]) -> str:
    return str(tensor.get("datatype", "xnn_datatype_invalid")).removeprefix("xnn_datatype_")


def _constant(entry: dict[str, Any], constants: bytes, named: Any) -> bytes:
    """The bytes of a constant: behind the graph, or by name in the file."""
    if not entry.get("named_key"):
        return constants[entry.get("offset", 0) : entry.get("offset", 0) + entry["size"]]
    held = named.buffers[named.pte_data[entry["named_key"]].buffer_index]
    return bytes(held)[: entry["size"]]


def _places(graph: dict[str, Any]) -> dict[int, str]:
    """Values by who reads them: "conv2d_3.filter"."""
    found = {}
    for k, node in enumerate(graph.get("xnodes", ())):
        kind = str(node["xnode_union_type"]).removeprefix("XNN").lower()
        for field, value in node["xnode_union"].items():
            if field.endswith("_id") and field != "output_id":
                found.setdefault(int(value), f"{kind}_{k}.{field.removesuffix('_id')}")
    return found


def _portable_tensors(program: Any) -> Iterator[Weight]:
    for k, value in enumerate(program.execution_plan[0].values):
        index = getattr(value.val, "data_buffer_idx", 0)
        if index and value.val.allocation_info is None:
            data, shape = bytes(program.constant_buffer[index].storage), tuple(value.val.sizes)
            dtype = SCALARS.get(int(value.val.scalar_type), str(value.val.scalar_type))
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            yield Weight(f"constant_{k}", dtype, shape, size, _zeros(data[:size], dtype, shape))


def _zeros(data: bytes, dtype: str, shape: tuple[int, ...]) -> float:
    if dtype in ("int4", "bfloat16"):
        both = np.frombuffer(data, np.uint8)
        values = np.stack([both & 15, both >> 4], 1).reshape(-1) if dtype == "int4" else both.view(np.uint16)
    else:
        values = np.frombuffer(data, dtype)
    return float(np.mean(values == 0)) if values.size else 0.0


def fallbacks(path: Path) -> tuple[str, ...]:
    """Operators outside the delegate, and those that compute in float32 in a file whose layers compute in integers."""
    file = _parsed(path)
    plan = file.program.execution_plan[0]
    kernels = [i.instr_args.op_index for chain in plan.chains for i in chain.instructions if _is_kernel(i)]
    outside = Counter(plan.operators[k].name.removeprefix("aten::") for k in kernels)
    inside: Counter[str] = Counter()
    for graph, _ in _delegates(file):
        inside += _float_work(graph)
    rows = [f"{n} x {kind} outside the delegate" for kind, n in outside.items()]
    return (*rows, *(f"{n} x {kind} in float32" for kind, n in inside.items()))


def _is_kernel(instruction: Any) -> bool:
    return type(instruction.instr_args).__name__ == "KernelCall"


def _float_work(graph: dict[str, Any]) -> Counter[str]:
    """What computes in float in a graph that has integer activations."""
    values = [v["xvalue_union"] for v in graph.get("xvalues", ())]
    kinds = [_kind(v.get("tensor_value", v)) for v in values]
    stored = [bool(v.get("tensor_value", v).get("constant_buffer_idx", 0)) for v in values]
    if not any(kind in INTEGER and not held for kind, held in zip(kinds, stored)):
        return Counter()
    nodes = [(str(n["xnode_union_type"]).removeprefix("XNN"), n["xnode_union"]) for n in graph["xnodes"]]
    return Counter(k for k, n in nodes if k not in MOVES and kinds[n.get("output_id", 0)] not in INTEGER)
