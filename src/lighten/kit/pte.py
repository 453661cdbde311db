"""An ExecuTorch file as objects: its header checked first, XNNPACK's graphs and constants taken out of it."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle
from lighten.types import Weight

MAGIC, HEADER, XNNPACK_HEADER = b"ET12", b"eh00", b"XH00"
"""Where bytes 4 to 8, and 8 to 12, of a program and of an XNNPACK blob begin (program.fbs, `XNNHeader`)."""
DTYPES = {
    "fp32": "float32", "fp16": "float16", "qint8": "int8", "qcint8": "int8", "qint32": "int32", "qcint32": "int32",
    "qcint4": "int4", "qbint4": "int4", "int32": "int32", "bf16": "bfloat16",
}  # fmt: skip
SCALARS = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
"""Numbers of ScalarType (scalar_type.fbs)."""
INTEGER = ("qint8", "qcint8")
MOVES = ("Convert", "StaticTranspose", "Copy", "StaticReshape", "StaticSlice")


def damaged(path: Path, why: str) -> BadBundle:
    return BadBundle(f"{path} cannot be loaded by ExecuTorch: {why[:300]}", "Fetch or build the file again.")


def read(path: Path) -> bytes:
    """The file, where its header is one and the file is as long as that says. Raises BadBundle."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise damaged(path, str(e.strerror)) from e
    if raw[4:8] != MAGIC or raw[8:12] != HEADER or len(raw) < 32:
        raise damaged(path, "it does not begin as an ExecuTorch file does")
    length = int.from_bytes(raw[12:16], "little")
    program, segments = (int.from_bytes(raw[k : k + 8], "little") for k in (16, 24))
    held = int.from_bytes(raw[32:40], "little") if length >= 32 else 0
    if len(raw) < max(program, segments + held):
        raise damaged(path, f"it has {len(raw)} bytes of {max(program, segments + held)}")
    return raw


def parsed(path: Path) -> Any:
    """The program as objects, and the tensors that it names. Raises BadBundle."""
    raw = read(path)
    from lighten.kit.pt2e import silent

    try:
        with silent():
            from executorch.exir._serialize import _deserialize_pte_binary

            return _deserialize_pte_binary(raw)
    except Exception as e:
        raise damaged(path, str(e)) from e


def delegates(file: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
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


def stored(graph: dict[str, Any], constants: bytes, named: Any) -> Iterator[Weight]:
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
    found: dict[int, str] = {}
    for k, node in enumerate(graph.get("xnodes", ())):
        kind = str(node["xnode_union_type"]).removeprefix("XNN").lower()
        for field, value in node["xnode_union"].items():
            if field.endswith("_id") and field != "output_id":
                found.setdefault(int(value), f"{kind}_{k}.{field.removesuffix('_id')}")
    return found


def portable_tensors(program: Any) -> Iterator[Weight]:
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


def is_kernel(instruction: Any) -> bool:
    return type(instruction.instr_args).__name__ == "KernelCall"


def float_work(graph: dict[str, Any]) -> Counter[str]:
    """What computes in float in a graph that has integer activations."""
    values = [v["xvalue_union"] for v in graph.get("xvalues", ())]
    kinds = [_kind(v.get("tensor_value", v)) for v in values]
    stored = [bool(v.get("tensor_value", v).get("constant_buffer_idx", 0)) for v in values]
    if not any(kind in INTEGER and not held for kind, held in zip(kinds, stored)):
        return Counter()
    nodes = [(str(n["xnode_union_type"]).removeprefix("XNN"), n["xnode_union"]) for n in graph["xnodes"]]
    return Counter(k for k, n in nodes if k not in MOVES and kinds[n.get("output_id", 0)] not in INTEGER)
