"""ncnn's two files (.param, .bin) as layers with tensors, and the pass that makes layers of a plan compute in int8."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lighten.errors import BadBundle

MAGIC = "7767517"
TAGS = {0: np.float32, 0x01306B47: np.float16, 0x000D4B38: np.int8, 0x0002C056: np.float32}
"""The word before a tensor that may be stored in several types (ncnn, src/modelbin.cpp)."""
TAG_OF = {"float32": 0, "float16": 0x01306B47, "int8": 0x000D4B38}

MARK = "LightenMark"
"""Where the plan rounds an activation: a layer that only lives between pnnx and `integer_layers`."""
ROUNDING, SHIFTING = "round_", "shift_"
"""How the layers are named that round or shift what other layers read."""
INT8_TERM, REQUANTIZE, PAD_VALUE, FEATURE_MASK = 8, 100, 18, 31
NO_WINOGRAD = 64
"""Layer::featmask bit. ncnn's int8 Winograd F(4, 3) scales a weight by 576 in 16 bits: right for 6-bit weights only."""
REACH = 127
"""ncnn's integers end at -127 and 127."""

CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
TRANSPOSED = ("Deconvolution", "DeconvolutionDepthWise")
NO_ACTIVATION, RELU, CLIP = 0, 1, 3
SUBTRACT, MULTIPLY, SUBTRACT_FROM = 1, 2, 7
"""BinaryOp's numbers for them."""
ROUND = 18
"""UnaryOp's, to the nearest even."""
PASSING = ("Reshape", "Flatten", "Permute", "Squeeze", "ExpandDims", "Crop", "Slice")


@dataclass(frozen=True)
class Layer:
    """One line of the .param and what the .bin holds for it. `params` are ncnn's numbered settings as written."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Mapping[int, str]
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)

    def number(self, key: int, default: int = 0) -> int:
        return int(float(self.params.get(key, default)))

    def array(self, key: int) -> tuple[float, ...]:
        """A setting that is a list: written "-233KK=count,value,..."."""
        return tuple(map(float, self.params.get(-23300 - key, "0").split(",")[1:]))

    def having(self, *, tensors: Mapping[str, np.ndarray] | None = None, **params: Any) -> Layer:
        """This layer with other tensors beside or instead of its own."""
        return replace(self, tensors={**self.tensors, **(tensors or {})}, **params)


@dataclass(frozen=True)
class Grid:
    """An activation's grid in the plan: value = (q - zero) x scale, q in -128..127."""

    scale: float
    zero: int

    @property
    def middle(self) -> int:
        """n of the value n x scale that ncnn's integer 0 stands for.

        Of the plan's 256 levels ncnn has 255: it gives up the last, or the first where zero lies above the middle."""
        return -1 - self.zero if self.zero < 0 else -self.zero

    @property
    def shift(self) -> float:
        """What is subtracted from a value before it is rounded, so that a symmetric grid is the plan's affine one."""
        return self.middle * self.scale

    @property
    def sign(self) -> int:
        """-1 where ncnn's integers run the other way: the one of zero, which pads, is then never negative. Negative
        padding of packed int8 comes out wrong in ncnn 1.0.20261020 on x86."""
        return -1 if self.middle > 0 else 1


@dataclass(frozen=True, eq=False)
class Integers:
    """A layer's weight in the plan: value = q x scale, one scale an output channel (C,)."""

    q: np.ndarray
    scale: np.ndarray


# --- the two files ------------------------------------------------------------------------------------


def read(param: str, raw: bytes) -> tuple[Layer, ...]:
    """The layers of a .param text with their tensors from the .bin. Raises BadBundle where the two do not fit."""
    try:
        bare, tail = _lines(param), memoryview(raw)
        found = []
        for layer in bare:
            tensors = {}
            for name, shape, flagged in _stored(layer):
                tensors[name], tail = _take(tail, shape, flagged)
            found.append(layer.having(tensors=tensors))
    except (ValueError, IndexError, OverflowError, ZeroDivisionError) as e:
        raise BadBundle(f"not the files of an ncnn network: {e}", "Fetch or build both files again.") from e
    if len(tail):
        raise BadBundle(f"the .bin holds {len(tail)} bytes that no layer reads", "Fetch or build both files again.")
    return tuple(found)


def _lines(param: str) -> tuple[Layer, ...]:
    lines = [line for line in param.splitlines() if line.strip()]
    if len(lines) < 3 or lines[0].strip() != MAGIC:
        raise ValueError("the first line is not 7767517")
    layers = tuple(map(_line, lines[2:]))
    blobs = {b for layer in layers for b in layer.outputs}
    if list(map(int, lines[1].split())) != [len(layers), len(blobs)]:
        raise ValueError("the counts of layers and blobs are wrong")
    made: set[str] = set()
    for layer in layers:
        if missing := set(layer.inputs) - made:
            raise ValueError(f"{layer.name} reads {min(missing)} before it is made")
        made |= set(layer.outputs)
    return layers


def _line(line: str) -> Layer:
    kind, name, inputs, outputs, *rest = re.findall(r'(?:[^\s"]|"[^"]*")+', line)
    first, last = int(inputs), int(inputs) + int(outputs)
    params = dict(part.split("=", 1) for part in rest[last:])
    return Layer(
        kind, name, tuple(rest[:first]), tuple(rest[first:last]), {int(key): value for key, value in params.items()}
    )


def _take(raw: memoryview, shape: tuple[int, ...], flagged: bool) -> tuple[np.ndarray, memoryview]:
    """The next tensor of the .bin and what follows it. Tensors with a tag are filled up to whole words of 4 bytes."""
    count, dtype = int(np.prod(shape, dtype=np.int64)), np.dtype(np.float32)
    if flagged:
        tag = int(np.frombuffer(raw[:4], "<u4")[0]) if len(raw) >= 4 else -1
        if tag not in TAGS:
            raise ValueError(f"a tensor of unknown type {tag:#x}")
        dtype, raw = np.dtype(TAGS[tag]), raw[4:]
    size = count * dtype.itemsize
    if count < 0 or len(raw) < size:
        raise ValueError("the .bin ends too early")
    return np.frombuffer(raw[:size], dtype).reshape(shape), raw[size + -size % 4 :]


def _stored(layer: Layer) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it has a tag, of each tensor that a layer reads, in order (ncnn's `load_model`)."""
    n = layer.number
    if layer.kind in (*CONVOLUTIONS, *TRANSPOSED, "Convolution1D", "DeconvolutionDepthWise1D", "InnerProduct"):
        yield from _computing(layer)
    elif layer.kind == "BatchNorm":
        yield from ((name, (n(0),), False) for name in ("slope", "mean", "variance", "bias"))
    elif layer.kind == "Scale" and n(0) != -233:
        yield from ((name, (n(0),), False) for name in ("scale", *(("bias",) if n(1) else ())))
    elif layer.kind == "Normalize":
        yield "scale", (n(3),), False
    elif layer.kind == "PReLU":
        yield "slope", (n(0),), False
    elif layer.kind in ("LayerNorm", "RMSNorm", "InstanceNorm", "GroupNorm"):
        size, affine = (n(1), n(3, 1)) if layer.kind == "GroupNorm" else (n(0), n(2, 1))
        if affine:
            yield from ((name, (size,), False) for name in ("gamma", "beta")[: 1 + (layer.kind != "RMSNorm")])
    elif layer.kind == "MemoryData":
        shape = tuple(v for v in (n(2), n(11), n(1), n(0)) if v)
        yield "data", shape, n(21, 1) == 0
    elif layer.kind == "MultiHeadAttention":
        yield from _attending(layer)
    elif layer.kind == "Gemm":
        yield from _multiplying(layer)
    elif layer.kind == "Embed":
        yield "weight", (n(1), n(0)), True
        if n(2):
            yield "bias", (n(0),), False


def _computing(layer: Layer) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Weight, bias and, in int8, the scales: of the weight, of the input, of the output where that leaves as int8."""
    n, out = layer.number, layer.number(0)
    dense = layer.kind == "InnerProduct"
    size, bias = (n(2), n(1)) if dense else (n(6), n(5))
    kernel: tuple[int, ...] = () if dense else (n(1),) if layer.kind.endswith("1D") else (n(11, n(1)), n(1))
    inner = size // (out * int(np.prod(kernel, dtype=np.int64)))
    yield "weight", (out, inner, *kernel), True
    if bias:
        yield "bias", (out,), False
    if term := n(INT8_TERM):
        one_each = n(7, 1) if layer.kind.endswith("DepthWise") else out
        yield "weight_scales", (1 if term % REQUANTIZE == 2 else one_each,), False
        yield "input_scale", (1,), False
        if term > REQUANTIZE:
            yield "output_scale", (1,), False


def _attending(layer: Layer) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    width = layer.number(0)
    inner = layer.number(2) // width
    for name, shape in (
        ("q", (width, inner)),
        ("k", (width, layer.number(3, width))),
        ("v", (width, layer.number(4, width))),
        ("out", (inner, width)),
    ):
        yield f"{name}_weight", shape, True
        yield f"{name}_bias", shape[:1], False


def _multiplying(layer: Layer) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    n = layer.number
    rows, columns, inner = n(7), n(8), n(9)
    if n(4):
        yield "a", (inner, rows) if n(2) else (rows, inner), True
    if n(5):
        yield "b", (columns, inner) if n(3) else (inner, columns), True
    if n(6) and n(10) != -1:
        shapes = ((1,), (rows,), (1, rows), (rows, columns), (1, columns))
        yield "c", shapes[n(10)], True


def tagged(layer: Layer) -> dict[str, np.ndarray]:
    """The tensors of a layer that may be stored in another type."""
    return {name: layer.tensors[name] for name, _, flagged in _stored(layer) if flagged}


def write(layers: tuple[Layer, ...]) -> tuple[str, bytes]:
    """The .param text and the .bin of `layers`; a blob with several readers gets the Split that ncnn wants."""
    whole = tuple(_with_splits(layers))
    blobs = sum(len(layer.outputs) for layer in whole)
    text = "\n".join([MAGIC, f"{len(whole)} {blobs}", *map(_text, whole)])
    return f"{text}\n", b"".join(part for layer in whole for part in _bytes(layer))


def _text(layer: Layer) -> str:
    settings = [f"{key}={value}" for key, value in layer.params.items()]
    names = [str(len(layer.inputs)), str(len(layer.outputs)), *layer.inputs, *layer.outputs]
    return " ".join([f"{layer.kind:<24} {layer.name:<24}", *names, *settings])


def _bytes(layer: Layer) -> Iterator[bytes]:
    for name, _, flagged in _stored(layer):
        value = np.ascontiguousarray(layer.tensors[name])
        if flagged:
            yield TAG_OF[str(value.dtype)].to_bytes(4, "little")
        yield value.tobytes() + bytes(-value.nbytes % 4)


def without_splits(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Every reader reads the blob itself."""
    same = {out: layer.inputs[0] for layer in layers if layer.kind == "Split" for out in layer.outputs}
    return tuple(_renamed(layer, same) for layer in layers if layer.kind != "Split")


def _renamed(layer: Layer, same: Mapping[str, str]) -> Layer:
    def source(blob: str) -> str:
        while blob in same:
            blob = same[blob]
        return blob

    return replace(layer, inputs=tuple(map(source, layer.inputs)))


def _with_splits(layers: tuple[Layer, ...]) -> Iterator[Layer]:
    reads = Counter(blob for layer in layers for blob in layer.inputs)
    left = {blob: [f"{blob}_{k}" for k in range(count)] for blob, count in reads.items() if count > 1}
    splits = {blob: tuple(names) for blob, names in left.items()}
    for layer in layers:
        yield replace(layer, inputs=tuple(left[b].pop(0) if b in left else b for b in layer.inputs))
        for blob in [b for b in layer.outputs if b in splits]:
            yield Layer("Split", f"split_{blob}", (blob,), splits[blob], {})


# --- from a plan to int8 ------------------------------------------------------------------------------


def integer_layers(
    layers: tuple[Layer, ...], grids: Mapping[str, Grid], weights: Callable[[np.ndarray], Integers | None]
) -> tuple[Layer, ...]:
    """Layers whose weights and input the plan rounds, computing on the plan's very integers.

    `grids` names the marks' grids, `weights` finds the integers of a float weight. ncnn's activations are symmetric,
    the plan's affine: x is replaced by sign x (x - shift), which the layer before does with its weights where it can,
    and a layer that reads it turns its weights, adds shift x (their sum) to its bias and pads with the integer of zero.
    All of it is exact, so the plan's integers are computed with, but for one level of 256 (`Grid.middle`). Where only
    such layers read a value, it leaves its layer as int8; layers that compute in float read it rounded in float.
    """
    graph = _Rewrite(without_splits(layers), grids)
    for layer in graph.layers:
        graph.to_integers(layer, weights)
    for mark in [layer for layer in graph.layers if layer.kind == MARK]:
        graph.resolve(mark)
    return graph.finished()


class _Rewrite:
    """Layers by name while they change; `same` says which blob stands for a dropped mark's."""

    def __init__(self, layers: tuple[Layer, ...], grids: Mapping[str, Grid]) -> None:
        self.layers, self.grids = layers, grids
        self.now = {layer.name: layer for layer in layers}
        self.maker = {blob: layer.name for layer in layers for blob in layer.outputs}
        self.readers: dict[str, list[str]] = {}
        for layer in layers:
            for blob in layer.inputs:
                self.readers.setdefault(blob, []).append(layer.name)
        self.same: dict[str, str] = {}
        self.extra: dict[str, tuple[Layer, ...]] = {}

    def to_integers(self, layer: Layer, weights: Callable[[np.ndarray], Integers | None]) -> None:
        """Give a layer its integers, the scales and the bias for shifted input."""
        grid = self.grids.get(self.maker[layer.inputs[0]]) if layer.inputs else None
        if grid is None or layer.kind not in (*CONVOLUTIONS, "InnerProduct"):
            return
        found = weights(layer.tensors["weight"])
        if found is None or not has_kernel(layer):
            return
        sums = found.q.reshape(len(found.q), -1).sum(1, dtype=np.int64)
        bias = _bias(layer) + grid.shift * found.scale.astype(np.float64) * sums
        settings = dict(layer.params) | {INT8_TERM: "1", 1 if layer.kind == "InnerProduct" else 5: "1"}
        if layer.kind != "InnerProduct":
            settings |= {PAD_VALUE: f"{abs(grid.middle):.1f}"} if grid.middle else {}
            settings |= {FEATURE_MASK: str(NO_WINOGRAD)} if layer.kind == "Convolution" else {}
        tensors = {
            "weight": (grid.sign * found.q).reshape(layer.tensors["weight"].shape),
            "bias": bias.astype(np.float32),
            "weight_scales": (1 / found.scale.astype(np.float64)).astype(np.float32),
            "input_scale": np.array([1 / grid.scale], np.float32),
        }
        self.now[layer.name] = layer.having(tensors=tensors, params=settings)

    def resolve(self, mark: Layer) -> None:
        """Take a mark out: what it rounds is shifted, and leaves its layer as int8 where all readers want that."""
        source, made = mark.inputs[0], mark.outputs[0]
        grid, maker = self.grids[mark.name], self.now[self.maker[source]]
        readers = [self.now[name] for name in self.readers.get(made, [])]
        integer = [r for r in readers if "weight_scales" in r.tensors]
        alone = len(integer) == len(readers) and len(self.readers[source]) == 1
        self.same[made] = source
        if len(integer) < len(readers) and not self.on_grid(source, grid):
            self.same[made] = f"{made}_rounded"
            self.extra[mark.name] = tuple(_rounding(source, made, grid))
        if not integer:
            return
        if alone and (moved := _shifted(maker, grid)) is not None:
            requantized = moved.kind in CONVOLUTIONS and bool(moved.number(INT8_TERM))
            self.now[maker.name] = _leaving_int8(moved, grid) if requantized else moved
        elif grid.middle:
            blob = f"{made}_shifted"
            settings = {
                0: str(SUBTRACT if grid.sign > 0 else SUBTRACT_FROM),
                1: "1",
                2: f"{np.float32(grid.shift):.9e}",
            }
            shift = Layer("BinaryOp", f"{SHIFTING}{mark.name}", (source,), (blob,), settings)
            self.extra[mark.name] = (*self.extra.get(mark.name, ()), shift)
            for reader in integer:
                self.now[reader.name] = replace(self.now[reader.name], inputs=(blob,))

    def on_grid(self, blob: str, grid: Grid) -> bool:
        """Whether a value is already on the grid: rounded there, and since then only moved."""
        layer = self.now[self.maker[blob]]
        while layer.kind in PASSING or (layer.kind == "Pooling" and not layer.number(0)):
            layer = self.now[self.maker[layer.inputs[0]]]
        return self.grids.get(layer.name) == grid

    def finished(self) -> tuple[Layer, ...]:
        rows = [
            one
            for layer in self.layers
            for one in (self.extra.get(layer.name, ()) if layer.kind == MARK else (self.now[layer.name],))
        ]
        return tuple(_renamed(layer, self.same) for layer in rows)


def _rounding(source: str, made: str, grid: Grid) -> Iterator[Layer]:
    """The plan's rounding in float, for layers that compute in float."""
    low, high = -128 - grid.zero, 127 - grid.zero
    steps = {
        "scaled": ("BinaryOp", {0: str(MULTIPLY), 1: "1", 2: f"{1 / grid.scale:.9e}"}),
        "whole": ("UnaryOp", {0: str(ROUND)}),
        "clipped": ("Clip", {0: f"{low:.1f}", 1: f"{high:.1f}"}),
        "rounded": ("BinaryOp", {0: str(MULTIPLY), 1: "1", 2: f"{grid.scale:.9e}"}),
    }
    for step, (kind, settings) in steps.items():
        blob = f"{made}_{step}"
        yield Layer(kind, f"{ROUNDING}{blob}", (source,), (blob,), settings)
        source = blob


def has_kernel(layer: Layer) -> bool:
    """Whether ncnn has the plan's scales for it: a grouped convolution has one a group, the plan one a channel."""
    return layer.kind != "ConvolutionDepthWise" or layer.number(0) == layer.number(7, 1)


def _bias(layer: Layer) -> np.ndarray:
    """float64 (C,), zeros where the layer has none."""
    return np.asarray(layer.tensors.get("bias", np.zeros(layer.number(0))), np.float64)


def _shifted(layer: Layer, grid: Grid) -> Layer | None:
    """`layer` giving sign x (its output - shift); None where it cannot. What is clipped beyond the grid's ends anyway
    is not clipped by an activation first."""
    if not grid.middle:
        return layer
    key = 9
    ends = {NO_ACTIVATION: (-np.inf, np.inf), RELU: (0.0, np.inf), CLIP: layer.array(10) or (-np.inf, np.inf)}
    if layer.kind not in (*CONVOLUTIONS, "InnerProduct") or layer.number(key) not in ends:
        return None
    lowest, highest = (np.array([-REACH, REACH]) + grid.middle) * grid.scale
    low, high = ends[layer.number(key)]
    settings = {k: v for k, v in layer.params.items() if k not in (key, -23310)}
    settings[1 if layer.kind == "InnerProduct" else 5] = "1"
    if low - lowest > 1e-3 * grid.scale or highest - high > 1e-3 * grid.scale:
        low, high = sorted(float(np.clip(grid.sign * (v - grid.shift), -3e38, 3e38)) for v in (low, high))
        settings |= {key: str(CLIP), -23310: f"2,{low:.9e},{high:.9e}"}
    bias = (grid.sign * (_bias(layer) - grid.shift)).astype(np.float32)
    weight: np.ndarray = grid.sign * layer.tensors["weight"]
    return layer.having(tensors={"weight": weight, "bias": bias}, params=settings)


def _leaving_int8(layer: Layer, grid: Grid) -> Layer:
    settings = dict(layer.params) | {INT8_TERM: str(REQUANTIZE + 1)}
    return layer.having(tensors={"output_scale": np.array([1 / grid.scale], np.float32)}, params=settings)
