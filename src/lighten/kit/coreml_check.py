"""What is in a Core ML package, read from its files: nothing here can run it, so its parts are compared instead."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle
from lighten.kit import palettes as tables_of

INPUT, OUTPUT = "input", "output"
MODEL, BLOB = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
TO_DO = "Fetch or build the whole folder again."

BITS = {"FLOAT32": 32, "FLOAT16": 16, "INT32": 32, "INT16": 16, "UINT16": 16, "INT8": 8, "UINT8": 8, "INT4": 4,
        "UINT4": 4, "UINT6": 6, "UINT3": 3, "UINT2": 2, "UINT1": 1}  # fmt: skip

PALETTE = "constexpr_lut_to_dense"
CONSTANT = ("const", "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", PALETTE)
CHANNELS_OUT = {"conv": 0, "conv_transpose": 1, "linear": 0}
"""Layers, and the axis of output channels of their weights."""
LAYERS = tuple(CHANNELS_OUT)
CLIPS = ("relu", "relu6", "clip")
INTEGER = (*LAYERS, *CLIPS, "add", "mul", "concat", "max_pool", "avg_pool", "reduce_mean", "matmul", "pad")
"""Operators that have integer kernels, or only move values, where their inputs are dequantized."""
MOVING = (
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "slice_by_index",
    "slice_by_size",
    "split",
    "identity",
    "cast",
)
SAME = {"FLOAT32": 1e-6, "FLOAT16": 1e-3}
"""How far a weight may be off, relative to the largest of its tensor: scales are rounded to the type of the program."""
SMALLEST = {"FLOAT32": 1e-18, "FLOAT16": 2.0**-24}
"""And in itself: the smallest step of float16, where all weights of a tensor are next to nothing."""


@dataclass(frozen=True, eq=False)
class Constant:
    """One tensor in weight.bin: the operator it belongs to, its role there, its type and values (integers unpacked)."""

    owner: str
    role: str
    dtype: str
    value: np.ndarray

    @property
    def bytes(self) -> int:
        """What it takes in the file, without padding."""
        return -(-self.value.size * BITS[self.dtype] // 8)


@dataclass(frozen=True, eq=False)
class Package:
    """A parsed package: its specification, its operators, and its constants."""

    spec: Any
    operators: tuple[Any, ...]
    constants: tuple[Constant, ...]

    @property
    def kinds(self) -> Counter[str]:
        """How many operators there are of each type, constants left out."""
        return Counter(op.type for op in self.operators if op.type not in CONSTANT)

    @property
    def quantized(self) -> bool:
        """Whether activations are integers somewhere."""
        return "quantize" in self.kinds


def read(manifest: Path) -> Package:
    """The package that `manifest` belongs to. Raises BadBundle naming a missing or damaged file."""
    for file in (manifest, manifest.parent / MODEL, manifest.parent / BLOB):
        if not file.is_file() or not file.stat().st_size:
            raise BadBundle(f"{file} ({manifest.name} of {manifest.parent.name}) is missing or empty.", TO_DO)
    try:
        entries = json.loads(manifest.read_text("utf-8"))
        entries["itemInfoEntries"][entries["rootModelIdentifier"]]
        spec = _specification((manifest.parent / MODEL).read_bytes())
        function = spec.mlProgram.functions["main"]
        operators = tuple(function.block_specializations[function.opset].operations)
        return Package(spec, operators, tuple(_constants(operators, manifest.parent / BLOB)))
    except Exception as e:
        raise BadBundle(f"{manifest} is no readable Core ML package: {str(e)[:300]}", TO_DO) from e


def _specification(raw: bytes) -> Any:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString(raw)
    if spec.WhichOneof("Type") != "mlProgram" or "main" not in spec.mlProgram.functions:
        raise ValueError("the specification holds no ML program")
    return spec


def _constants(operators: tuple[Any, ...], blob: Path) -> Iterator[Constant]:
    """Weights, and all that turns integers into them; small ones lie in the specification itself."""
    from coremltools.converters.mil.frontend.milproto.load import TranscriptionContext, _load_value
    from coremltools.proto import MIL_pb2

    context, size = TranscriptionContext(str(blob.parent)), blob.stat().st_size
    for op in operators:
        for role, value in _values(op) if op.type in CONSTANT else ():
            kind = value.type.tensorType
            dtype, shape = MIL_pb2.DataType.Name(kind.dataType), tuple(d.constant.size for d in kind.dimensions)
            stored = value.WhichOneof("value") == "blobFileValue"
            if dtype not in BITS or (op.type == "const" and not stored and not (shape and dtype in SAME)):
                continue
            if stored and value.blobFileValue.offset + int(np.prod(shape)) * BITS[dtype] // 8 > size:
                raise ValueError(f"{blob.name} is too short for {op.outputs[0].name}")
            yield Constant(op.outputs[0].name, role, dtype, np.asarray(_load_value(context, value)).reshape(shape))


def _values(op: Any) -> Iterator[tuple[str, Any]]:
    """Stored values of an operator with their roles: attributes, or inputs that are given in place."""
    yield from ((name, op.attributes[name]) for name in sorted(op.attributes))
    for name in sorted(op.inputs):
        yield from ((name, one.value) for one in op.inputs[name].arguments if one.WhichOneof("binding") == "value")


def tensors(package: Package) -> dict[str, np.ndarray]:
    """What the stored tensors mean, float32 by name of operator: integers times scales, as Core ML computes them."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for one in package.constants:
        parts.setdefault(one.owner, {})[one.role] = one.value.astype(np.float32)
    own = palettes(package)
    return {name: own[name].dense if name in own else _meaning(part) for name, part in parts.items()}


@dataclass(frozen=True, eq=False)
class Palette:
    """A weight as indices, and float32 tables of 2^bits values: as many dimensions as the weight, one more of values."""

    indices: np.ndarray
    tables: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        """The weight."""
        return tables_of.dense(self.indices, self.tables)


def palettes(package: Package) -> dict[str, Palette]:
    """Weights that are held in tables, by name of operator (constexpr_lut_to_dense, of iOS 18). Raises BadBundle where
    indices and tables do not fit each other."""
    parts: dict[str, dict[str, Constant]] = {}
    for one in package.constants:
        if one.role in ("indices", "lut"):
            parts.setdefault(one.owner, {})[one.role] = one
    return {name: _palette(name, part) for name, part in parts.items()}


def _palette(name: str, part: dict[str, Constant]) -> Palette:
    try:
        indices, lut = part["indices"], part["lut"]
        if lut.value.shape[-2:] != (2 ** BITS[indices.dtype], 1):
            raise ValueError(f"tables of shape {lut.value.shape} for {indices.dtype.lower()} indices")
        found = Palette(indices.value.astype(np.intp), lut.value[..., 0].astype(np.float32))
        found.dense  # noqa: B018  # raises where shapes do not fit
    except (KeyError, ValueError) as e:
        raise BadBundle(f"{name} in the Core ML package cannot be read: {e}", TO_DO) from e
    return found


def without_table(package: Package) -> Counter[str]:
    """Layers whose weights are in no table, by type."""
    own = palettes(package)
    layers = [op for op in package.operators if op.type in LAYERS]
    return Counter(op.type for op in layers if op.inputs["weight"].arguments[0].name not in own)


def held(package: Package, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each of the float32 `weights` of a network what the file holds for it: the nearest tensor of its shape.

    Names do not survive the conversion. A weight is left out where no tensor has its shape.
    """
    stored = tensors(package)
    found = {name: _nearest(stored, value) for name, value in weights.items()}
    return {name: stored[one] for name, one in found.items() if one is not None}


def _nearest(stored: dict[str, np.ndarray], value: np.ndarray) -> str | None:
    same = [name for name, one in stored.items() if one.shape == value.shape]
    return min(same, key=lambda name: float(np.square(stored[name] - value).sum()), default=None)


def _meaning(part: dict[str, np.ndarray]) -> np.ndarray:
    if "val" in part:
        return part["val"]
    if "quantized_data" in part:  # constexpr_affine_dequantize, of the iOS 16 operator set
        q, axis = part["quantized_data"], int(part["axis"])
        view = [-1 if d == axis else 1 for d in range(q.ndim)]
        affine: np.ndarray = (q - part["zero_point"].reshape(view)) * part["scale"].reshape(view)
        return affine
    q, scale = part["data"], part["scale"]  # constexpr_blockwise_shift_scale, of iOS 18
    offset = part.get("offset", np.zeros_like(scale))
    for d in range(q.ndim):
        scale, offset = (np.repeat(v, q.shape[d] // v.shape[d], d) for v in (scale, offset))
    whole: np.ndarray = (q - offset) * scale
    return whole


def makers(package: Package) -> dict[str, Any]:
    """The operator that makes each value."""
    return {out.name: op for op in package.operators for out in op.outputs}


def data_inputs(op: Any, made_by: dict[str, Any]) -> tuple[str, ...]:
    """The values an operator reads that are not constants."""
    names = (one.name for key in op.inputs for one in op.inputs[key].arguments if one.WhichOneof("binding") == "name")
    return tuple(n for n in names if n not in made_by or made_by[n].type not in CONSTANT)


def in_float(package: Package) -> Counter[str]:
    """Operators of a quantized program that compute in float: at least one input is not dequantized at once."""
    made_by = makers(package)
    return Counter(op.type for op in package.operators if _computes_in_float(op, made_by))


def _computes_in_float(op: Any, made_by: dict[str, Any]) -> bool:
    if op.type in (*CONSTANT, *MOVING, "quantize", "dequantize"):
        return False
    sources = [made_by[n] for n in data_inputs(op, made_by) if n in made_by]
    if op.type in CLIPS and sources and sources[0].type in (*LAYERS, "add"):
        return _computes_in_float(sources[0], made_by)
    return op.type not in INTEGER or not sources or any(s.type != "dequantize" for s in sources)


def compare(
    package: Package, wanted: dict[str, np.ndarray], shape: tuple[int, ...], answer: tuple[int, ...], rounded: int
) -> tuple[str, ...]:
    """Every difference between a package and the module it was written from, one line each; nothing where there is none.

    `wanted` are the float32 values of the module's weights by name, `shape` is (C, H, W), `answer` that of one
    image's answer, `rounded` how many layers read a quantized input.
    """
    return (
        *_interface(package, shape, answer),
        *_operators(package, len(wanted), rounded),
        *_weights(package, wanted),
    )


def _interface(package: Package, shape: tuple[int, ...], answer: tuple[int, ...]) -> Iterator[str]:
    description = package.spec.description
    for side, name, want in ((description.input, INPUT, (1, *shape)), (description.output, OUTPUT, (1, *answer))):
        names = [one.name for one in side]
        if names != [name]:
            yield f"the package has {', '.join(names)} where {name} was to be"
            continue
        array = side[0].type.multiArrayType
        if tuple(array.shape) != want:
            yield f"{name} has shape {tuple(array.shape)}, not {want}"
        if array.dataType != array.FLOAT32:
            yield f"{name} is not float32"


def _operators(package: Package, layers: int, rounded: int) -> Iterator[str]:
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    if strange := sorted(set(package.kinds) - set(SSAOpRegistry.core_ops)):
        yield f"{strange[0]} is no operator of Core ML"
    there = [op for op in package.operators if op.type in LAYERS]
    if len(there) != layers:
        yield f"{len(there)} layers with weights where the network has {layers}"
    made_by = makers(package)
    reading = [made_by.get(next(iter(data_inputs(op, made_by)), "")) for op in there]
    quantized = sum(maker is not None and maker.type == "dequantize" for maker in reading)
    if quantized != rounded:
        yield f"{quantized} layers read integers where the plan has {rounded}"


def _weights(package: Package, wanted: dict[str, np.ndarray]) -> Iterator[str]:
    there, own = tensors(package), palettes(package)
    kind = "FLOAT16" if any(one.dtype == "FLOAT16" for one in package.constants) else "FLOAT32"
    for name, value in wanted.items():
        nearest, slack = _nearest(there, value), SAME[kind] * float(np.abs(value).max()) + SMALLEST[kind]
        if nearest is None:
            yield f"{name}: no tensor of shape {value.shape} is stored"
        elif nearest in own:
            if problem := tables_of.problem(value, own[nearest].indices, own[nearest].tables, slack):
                yield f"{name}: {problem}"
        elif (off := float(np.abs(there[nearest] - value).max())) > slack:
            yield f"{name}: the stored values are off by {off:.3g}"
