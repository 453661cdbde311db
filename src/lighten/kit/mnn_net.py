"""An .mnn file (a FlatBuffer of MNN's schema) as bytes: its stored tensors, and integers written over them in place."""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lighten.errors import BadBundle

OPS, OUTPUTS, TENSOR_NAMES, SUBGRAPHS, UUID = 3, 4, 7, 10, 11
"""Fields of table Net (schema/default/MNN.fbs)."""
OP_MAIN_TYPE, OP_MAIN, OP_NAME = 1, 2, 3
SUBGRAPH_NODES = 3
BLOB, CONVOLUTION, PRELU, SCALE, LAYER_NORM = 7, 9, 32, 58, 88
"""Numbers of union OpParameter that hold tensors."""
COMMON, WEIGHT, BIAS, QUANTIZED = 0, 1, 2, 3
KERNEL_X, KERNEL_Y, GROUP, OUT, IN = 2, 3, 9, 10, 11
BUFFER, ALPHA, CODING, BITS, WIDE = 0, 1, 2, 7, 11
TABLE, HALF, PLAIN = 1, 3, 4
"""IDSTQuan.type: a table of values and their indexes; float16; bytes."""
BLOB_VECTORS = {3: "uint8", 4: "int8", 5: "int32", 6: "int64", 7: "float32"}
MOST_OPS = 1_000_000


@dataclass(frozen=True)
class Vector:
    """Where a vector's values lie: the first byte and how many values."""

    start: int
    count: int


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: `dtype` "float32", "float16", "int8", "int4", ... and the bytes of its values in the file."""

    op: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    alpha: Vector | None = None

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        return -(-self.count // 2) if self.dtype == "int4" else self.count * np.dtype(self.dtype).itemsize


class Net:
    """Reads tables by field number. Raises BadBundle where an offset leaves the file."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        try:
            if len(raw) < 64:
                raise ValueError("the file is too short")
            self.root = self._number("I", 0)
            self.ops = tuple(self._all_ops())
            self.tensors = tuple(t for op in self.ops for t in self._tensors(op))
            for field in (OUTPUTS, TENSOR_NAMES):
                for place in self._tables(self.root, field):
                    self._text(place)
            if not self.ops or self._vector(self.root, OUTPUTS, 4) is None:
                raise ValueError("the file holds no network")
            if any(t.start + t.bytes > len(raw) for t in self.tensors):
                raise ValueError("the file ends too early")
        except (struct.error, ValueError, UnicodeDecodeError, OverflowError, ZeroDivisionError) as e:
            raise BadBundle(f"not an MNN network: {e}", "Fetch or build the file again.") from e

    def array(self, tensor: Tensor) -> np.ndarray:
        """The values as they are stored; 4-bit integers as int8."""
        raw = np.frombuffer(self.raw, np.uint8, tensor.bytes, tensor.start)
        if tensor.dtype == "int4":
            return (np.stack([raw >> 4, raw & 15], 1).reshape(-1)[: tensor.count].astype(np.int8) - 8).reshape(
                tensor.shape
            )
        if tensor.dtype == "int8" and tensor.alpha is not None:
            return (raw.astype(np.int16) - 128).astype(np.int8).reshape(tensor.shape)
        return raw.view(tensor.dtype).reshape(tensor.shape)

    def _number(self, kind: str, at: int) -> int:
        if at < 0:
            raise ValueError("an offset before the file")
        return int(struct.unpack_from(f"<{kind}", self.raw, at)[0])

    def _field(self, table: int, field: int) -> int | None:
        """Where a table keeps a field; None where it has the default."""
        fields = table - self._number("i", table)
        size = self._number("H", fields)
        at = 4 + 2 * field
        inside = self._number("H", fields + at) if at + 2 <= size else 0
        return table + inside if inside else None

    def _value(self, table: int, field: int, default: int, kind: str = "i") -> int:
        at = self._field(table, field)
        return default if at is None else self._number(kind, at)

    def _child(self, table: int, field: int) -> int | None:
        at = self._field(table, field)
        return None if at is None else at + self._number("I", at)

    def _vector(self, table: int, field: int, width: int) -> Vector | None:
        at = self._child(table, field)
        if at is None:
            return None
        found = Vector(at + 4, self._number("I", at))
        if found.start + found.count * width > len(self.raw):
            raise ValueError("a vector leaves the file")
        return found

    def _tables(self, table: int, field: int) -> Iterator[int]:
        found = self._vector(table, field, 4)
        if found is not None and found.count > MOST_OPS:
            raise ValueError("too many entries")
        for k in range(found.count if found else 0):
            at = found.start + 4 * k if found else 0
            yield at + self._number("I", at)

    def _text(self, at: int) -> str:
        size = self._number("I", at)
        if at + 4 + size > len(self.raw):
            raise ValueError("a name leaves the file")
        return self.raw[at + 4 : at + 4 + size].decode("utf-8")

    def _all_ops(self) -> Iterator[int]:
        yield from self._tables(self.root, OPS)
        for graph in self._tables(self.root, SUBGRAPHS):
            yield from self._tables(graph, SUBGRAPH_NODES)

    def _tensors(self, op: int) -> Iterator[Tensor]:
        kind, main, named = self._value(op, OP_MAIN_TYPE, 0, "B"), self._child(op, OP_MAIN), self._child(op, OP_NAME)
        name = self._text(named) if named is not None else ""
        if main is None:
            return
        if kind == CONVOLUTION:
            yield from self._convolution(main, name)
        elif kind == BLOB:
            dims = self._vector(main, 0, 4)
            shape = tuple(struct.unpack_from(f"<{dims.count}i", self.raw, dims.start)) if dims else ()
            for field, dtype in BLOB_VECTORS.items():
                found = self._vector(main, field, np.dtype(dtype).itemsize)
                if found and found.count:
                    fits = int(np.prod(shape, dtype=np.int64)) == found.count
                    yield Tensor(name, "data", dtype, shape if fits else (found.count,), found.start)
        else:
            fields = {PRELU: {1: "slope"}, SCALE: {1: "scale", 2: "bias"}, LAYER_NORM: {2: "gamma", 3: "beta"}}
            for field, part in fields.get(kind, {}).items():
                found = self._vector(main, field, 4)
                if found:
                    yield Tensor(name, part, "float32", (found.count,), found.start)

    def _convolution(self, main: int, name: str) -> Iterator[Tensor]:
        common, weight, bias = self._child(main, COMMON), self._vector(main, WEIGHT, 4), self._vector(main, BIAS, 4)
        if common is None:
            raise ValueError(f"{name} has no sizes")
        out, kernel = self._value(common, OUT, 0), [self._value(common, k, 1) for k in (KERNEL_Y, KERNEL_X)]
        packed = self._child(main, QUANTIZED)
        if weight and weight.count:
            yield Tensor(name, "weight", "float32", _shape(weight.count, out, kernel), weight.start)
        elif packed is not None:
            yield from self._packed(packed, name, out, kernel)
        if bias and bias.count:
            yield Tensor(name, "bias", "float32", (bias.count,), bias.start)

    def _packed(self, table: int, name: str, out: int, kernel: list[int]) -> Iterator[Tensor]:
        coding, buffer, alpha = (
            self._value(table, CODING, 0),
            self._vector(table, BUFFER, 1),
            self._vector(table, ALPHA, 4),
        )
        if buffer is None:
            raise ValueError(f"{name} has no weight")
        if coding == HALF:
            yield Tensor(name, "weight", "float16", _shape(buffer.count // 2, out, kernel), buffer.start)
            return
        if coding != TABLE or alpha is None:
            raise ValueError(f"{name} is stored in a way ({coding}) that is not known here")
        wide = bool(self._value(table, WIDE, 0, "B"))
        dims = struct.unpack_from("<2I" if wide else "<2H", self.raw, buffer.start + 1)
        at = buffer.start + (9 if wide else 5)
        values = self.raw[at] or 256
        bits = self._value(table, BITS, 8)
        if values != 1 << bits or bits not in (4, 8):
            raise ValueError(f"{name} holds {values} values at {bits} bits")
        shape = _shape(dims[0] * dims[1], out, kernel)
        yield Tensor(name, "weight", f"int{bits}", shape, at + 1 + values, alpha)
        yield Tensor(name, "scales", "float32", (alpha.count,), alpha.start)

    @property
    def identity(self) -> int:
        """Where the network's random id is kept, 36 letters."""
        at = self._child(self.root, UUID)
        if at is None or self._number("I", at) != 36:
            raise BadBundle("an MNN network without an id", "Fetch or build the file again.")
        return at + 4


def _shape(count: int, out: int, kernel: list[int]) -> tuple[int, ...]:
    inner = count // (out * kernel[0] * kernel[1])
    return (out, inner, *kernel) if out * inner * kernel[0] * kernel[1] == count else (count,)


def overwritten(raw: bytes, weights: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """The file with a convolution's integers and scales, by name, in place of those that MNN's converter chose.

    A weight is (q int8, scale float32 one an output channel). MNN keeps a pair for each channel, the value of its
    lowest integer and the scale: value = lowest + (q + 2**(bits - 1)) x scale.
    """
    net, out = Net(raw), bytearray(raw)
    for tensor in net.tensors:
        if tensor.alpha is None or tensor.op not in weights:
            continue
        q, scale = weights[tensor.op]
        lowest = -8 if tensor.dtype == "int4" else -128
        index: np.ndarray = (q.reshape(-1).astype(np.int16) - lowest).astype(np.uint8)
        if tensor.dtype == "int4":
            index = np.append(index, 0) if index.size % 2 else index
            index = index[0::2] << 4 | index[1::2]
        pairs = np.stack([np.float32(lowest) * scale, scale], 1).astype("<f4")
        if index.size != tensor.bytes or pairs.size != tensor.alpha.count:
            raise ValueError(f"{tensor.op}: {q.shape} does not fit {tensor.shape}")
        out[tensor.start : tensor.start + tensor.bytes] = index.tobytes()
        out[tensor.alpha.start : tensor.alpha.start + pairs.nbytes] = pairs.tobytes()
    return bytes(out)


def halved(raw: bytes, whole: bytes) -> bytes:
    """The float16 file with its weights rounded to nearest from those of the float32 file: MNN's own truncates."""
    half, full, out = Net(raw), Net(whole), bytearray(raw)
    values = {t.op: full.array(t) for t in full.tensors if t.name == "weight"}
    for tensor in [t for t in half.tensors if t.dtype == "float16"]:
        rounded: np.ndarray = values[tensor.op].astype("<f2")
        if rounded.nbytes != tensor.bytes or not np.isfinite(rounded).all():
            raise ValueError(f"{tensor.op} does not fit float16")
        out[tensor.start : tensor.start + tensor.bytes] = rounded.tobytes()
    return bytes(out)


def settled(raw: bytes) -> bytes:
    """The file with an id made from what it holds: MNN's converter rolls dice."""
    at = Net(raw).identity
    blank = raw[:at] + bytes(36) + raw[at + 36 :]
    return raw[:at] + str(uuid.UUID(bytes=hashlib.sha256(blank).digest()[:16])).encode() + raw[at + 36 :]
