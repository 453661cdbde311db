"""From a module to an ONNX graph that runtimes like: the exporter's output, then a few exact rewrites."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lighten.errors import RefusedFormat
from lighten.kit.quiet import quiet
from lighten.kit.trace import trace

INPUT, OUTPUT = "input", "output"
INT4_OPSET = 21
"""The first ONNX operator set whose tensors may be 4-bit integers."""

WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
WIDER, WIDER_REDUCED = 16, 8
"""4-bit weights times this still fit 8 bits, or the 7 of processors that add two u8 x s8 products in 16."""

NARROW = 15
"""A grid of 4 bits reaches this far from its first integer to its last."""

FLOAT, UINT8, INT8, FLOAT16, UINT4, INT4 = 1, 2, 3, 10, 21, 22
"""Numbers of TensorProto.DataType (onnx.proto)."""


@dataclass(frozen=True, eq=False)
class Packed:
    """The integers of one float weight: value = q x scale.

    `q` is int8 in the weight's shape. `scale` is float32: one value a slice along `axis` (C,), or with `block` > 0 one
    for each `block` consecutive values of a slice, (C, ceil(K / block)); the last block may be shorter. `dynamic`: the
    layer's input is quantized as it runs.
    """

    q: np.ndarray
    scale: np.ndarray
    axis: int
    bits: int
    block: int = 0
    dynamic: bool = False

    @property
    def value(self) -> np.ndarray:
        """The weight that a runtime computes with, float32."""
        if not self.block:
            return self.q.astype(np.float32) * self.spread
        rows = self.blocks.astype(np.float32) * self.scale[..., None]
        return self.in_place(rows.reshape(len(rows), -1)[:, : self.row_length])

    @property
    def spread(self) -> np.ndarray:
        """One scale a slice, shaped to multiply the weight."""
        return self.scale.reshape([-1 if d == self.axis else 1 for d in range(self.q.ndim)])

    @property
    def moved(self) -> tuple[int, ...]:
        """The weight's shape with `axis` in front."""
        return np.moveaxis(self.q, self.axis, 0).shape

    @property
    def row_length(self) -> int:
        """K: input weights of one output channel."""
        return int(np.prod(self.moved[1:]))

    @property
    def blocks(self) -> np.ndarray:
        """The integers as (C, blocks, block); a last block that is shorter is filled up with zeros."""
        rows = np.moveaxis(self.q, self.axis, 0).reshape(self.moved[0], -1)
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % self.block)))
        return rows.reshape(len(rows), -1, self.block)

    def in_place(self, rows: np.ndarray) -> np.ndarray:
        """Rows (C, K) in the weight's shape."""
        return np.moveaxis(rows.reshape(self.moved), 0, self.axis)


def to_onnx(module: nn.Module, shape: tuple[int, ...], opset: int | None = None) -> Any:
    """The ONNX ModelProto of a float or Q/DQ module, with a dynamic batch; `opset` None is the exporter's own.

    Raises RefusedFormat naming the operator.
    """
    import torch

    program = trace(with_clamps(module), shape)
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                verbose=False,
            )
    except Exception as e:
        reason = next((line for line in str(e).splitlines() if "aten." in line or "Error" in line), str(e)[:200])
        raise RefusedFormat(f"onnx cannot hold this model: {reason.strip()[:300]}", "Replace that operator.") from e
    return pool_globally(exported.model_proto)


def with_clamps(module: nn.Module) -> nn.Module:
    """`module` with a clamp before each activation whose grid is narrower than its integers (4 of 8 bits).

    QuantizeLinear knows no ends of its own: without the clamp a 4-bit activation would saturate at 8 bits. A copy,
    where there is anything to do.
    """
    import torch

    if not isinstance(module, torch.fx.GraphModule) or not any(map(_is_narrow, module.graph.nodes)):
        return module
    module = copy.deepcopy(module)
    for node in filter(_is_narrow, list(module.graph.nodes)):
        x, scale, zero, qmin, qmax = node.args[:5]
        with module.graph.inserting_before(node):
            ends = (qmin - zero) * scale, (qmax - zero) * scale
            node.update_arg(0, module.graph.call_function(torch.ops.aten.clamp.default, (x, *ends)))
    module.recompile()
    return module


def _is_narrow(node: Any) -> bool:
    import torch

    if getattr(node.target, "__name__", "") != "quantize_per_tensor.default":
        return False
    held = torch.iinfo(node.args[5])
    return bool(node.args[3] > held.min or node.args[4] < held.max)


def lower(
    model: Any,
    *,
    unsigned: bool,
    reduce_range: bool = False,
    biases: bool = True,
    packed: Mapping[str, Packed] | None = None,
    half: Mapping[str, np.ndarray] | None = None,
) -> Any:
    """The plan as runtimes fuse it: 32-bit integer biases, with `unsigned` uint8 activations, narrow grids clipped as
    integers; the weights of `packed` as integers, those of `half` as float16, int8 that fits 4 bits as INT4 (from opset
    21 on).

    All of it is exact but the bias, which is rounded to the scale of the accumulator it is added to (Jacob et al.,
    2018, eq. 11), and float16. A shift of zero point and integers by 128 leaves every real value where it was.
    Raises RefusedFormat where a weight of `packed` is not in the graph.
    """
    graph = _Graph(model)
    if next(o.version for o in model.opset_import if not o.domain) >= INT4_OPSET:
        store_nibbles(graph, WIDER_REDUCED if reduce_range else WIDER)
    if biases:
        quantize_biases(graph)
    if unsigned:
        shift_activations(graph)
    clip_integers(graph)
    store_integers(graph, packed or {})
    store_half(graph, half or {})
    graph.drop_unused()
    del model.graph.value_info[:]  # the exporter's types are those from before
    return model


class _Graph:
    """Lookups over a GraphProto that the rewrites share."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.proto, self._read, self._write = model.graph, numpy_helper.to_array, numpy_helper.from_array
        self.made_by = {out: node for node in self.proto.node for out in node.output}
        self.constants = {init.name: init for init in self.proto.initializer}

    def array(self, name: str) -> np.ndarray | None:
        return self._read(self.constants[name]) if name in self.constants else None

    def add_constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            self.proto.initializer.append(self._write(value, name))
            self.constants[name] = self.proto.initializer[-1]
        return name

    def add_nibbles(self, name: str, value: np.ndarray, kind: int) -> str:
        """An initializer of 4-bit integers (`kind` INT4 or UINT4), two a byte."""
        from onnx import helper

        self.proto.initializer.append(helper.make_tensor(name, kind, value.shape, nibbles(value), raw=True))
        self.constants[name] = self.proto.initializer[-1]
        return name

    def add_node(self, before: Any, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node in front of another (None: of all); returns its output's name."""
        from onnx import helper

        node = helper.make_node(kind, inputs, [output], name=output, **attributes)
        self.proto.node.insert(0 if before is None else list(self.proto.node).index(before), node)
        self.made_by[output] = node
        return output

    def is_stored(self, name: str) -> bool:
        """Whether `name` is an initializer, or INT4 that is made int8."""
        maker = self.made_by.get(name)
        return name in self.constants or (maker is not None and maker.op_type == "Cast")

    def readers(self, name: str) -> list[Any]:
        return [node for node in self.proto.node if name in node.input]

    def rename_reads(self, old: str, new: str) -> None:
        """Everything that reads `old` reads `new`."""
        for node in self.readers(old):
            for k, name in enumerate(node.input):
                node.input[k] = new if name == old else name

    def scale_of(self, name: str) -> np.ndarray | None:
        """The scale of the DequantizeLinear that makes `name`."""
        node = self.made_by.get(name)
        return self.array(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None

    def drop_unused(self) -> None:
        used = {value.name for value in self.proto.output}
        for node in reversed(list(self.proto.node)):
            if used.isdisjoint(node.output):
                self.proto.node.remove(node)
            else:
                used.update(node.input)
        for init in [i for i in self.proto.initializer if i.name not in used]:
            self.proto.initializer.remove(init)


def quantize_biases(graph: _Graph) -> None:
    """Float biases of quantized Conv and Gemm become int32 with scale = input scale x weight scale."""
    from onnx import helper

    for node in list(graph.proto.node):
        if node.op_type not in WITH_BIAS or len(node.input) < 3:
            continue
        x_scale, w_scale = graph.scale_of(node.input[0]), graph.scale_of(node.input[1])
        bias = graph.array(node.input[2])
        if x_scale is None or w_scale is None or bias is None:
            continue
        scale = (x_scale.astype(np.float64) * w_scale.astype(np.float64)).astype(np.float32)
        scale = np.broadcast_to(scale.reshape(-1), bias.shape).copy()
        q = np.round(bias.astype(np.float64) / scale).clip(-(2**31), 2**31 - 1).astype(np.int32)
        name = f"{node.output[0]}_bias"
        # No zero point: that of int32 is always 0, and one a channel is a quarter of what the biases themselves take.
        inputs = [graph.add_constant(f"{name}_q", q), graph.add_constant(f"{name}_scale", scale)]
        dq = helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}_dq", axis=0)
        graph.proto.node.insert(list(graph.proto.node).index(node), dq)
        graph.made_by[dq.output[0]] = dq
        node.input[2] = dq.output[0]


def shift_activations(graph: _Graph) -> None:
    """int8 activations become uint8: zero point + 128, so the real values are the same."""
    for node in graph.proto.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or graph.is_stored(_rounded(graph, node)):
            continue
        zero = graph.array(node.input[2])
        if zero is not None and zero.dtype == np.int8:
            value = np.array(int(zero) + 128, np.uint8)
            node.input[2] = graph.add_constant(f"zero_point_u8_{int(value)}", value)


def _rounded(graph: _Graph, node: Any) -> str:
    """What a QuantizeLinear, alone or in front of this DequantizeLinear, reads: both must agree on their integers."""
    maker = graph.made_by.get(node.input[0])
    if maker is not None and node.op_type == "DequantizeLinear" and maker.op_type == "QuantizeLinear":
        return str(maker.input[0])
    return str(node.input[0])


def clip_integers(graph: _Graph) -> None:
    """Clips before a QuantizeLinear that leave it 4 bits become one clip of the integers.

    Rounding keeps order, so round(clip(x)) = clip(round(x)): exact. Runtimes then still fuse the operator before with
    its QuantizeLinear, and clip bytes instead of floats.
    """
    for node in [n for n in graph.proto.node if n.op_type == "QuantizeLinear"]:
        scale, zero = graph.array(node.input[1]), graph.array(node.input[2])
        source, lo, hi = _clipped(graph, node.input[0])
        if scale is None or zero is None or scale.size != 1 or source == node.input[0]:
            continue
        held = np.iinfo(zero.dtype)
        ends = np.rint(np.float32([lo, hi]) / np.float32(scale)) + np.float32(zero)
        first, last = (int(v) for v in np.clip(ends, held.min, held.max))
        if last - first > NARROW:
            continue
        whole = node.output[0]
        names = [graph.add_constant(f"{zero.dtype}_{k}", np.array(k, zero.dtype)) for k in (first, last)]
        node.input[0] = source
        first_reader = graph.readers(whole)[0]
        graph.rename_reads(whole, f"{whole}_clip")
        graph.add_node(first_reader, "Clip", [whole, *names], f"{whole}_clip")


def _clipped(graph: _Graph, name: str) -> tuple[str, float, float]:
    """What lies before the clips that make `name`, and the ends of all of them together."""
    node = graph.made_by.get(name)
    if node is None or node.op_type not in ("Relu", "Clip"):
        return name, -np.inf, np.inf
    ends = [graph.array(i) if i else None for i in list(node.input)[1:]]
    if node.op_type == "Clip" and any(e is None for e in ends):
        return name, -np.inf, np.inf
    low, high = (0.0, np.inf) if node.op_type == "Relu" else (float(e) for e in ends if e is not None)
    source, lo, hi = _clipped(graph, node.input[0])
    return source, min(max(lo, low), high), min(max(hi, low), high)


def nibbles(value: np.ndarray) -> bytes:
    """4-bit integers two a byte, the first in the low half, as ONNX and OpenVINO store them."""
    flat = value.reshape(-1).astype(np.int16) & 15
    flat = np.append(flat, 0) if flat.size % 2 else flat
    return bytes((flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes())


def store_nibbles(graph: _Graph, factor: int) -> None:
    """int8 weights whose values are all -8..7 become INT4, and int8 again by nodes that runtimes fold at load.

    A DequantizeLinear that reads INT4 itself would keep ONNX Runtime from its integer kernels. Where the layer has a
    bias, the integers are multiplied by `factor` on the way (their scale divided): the same values, but the bias that
    is rounded to input scale x weight scale comes out that much finer. At 4 bits it would be off by whole steps.
    """
    for node in [n for n in graph.proto.node if n.op_type == "DequantizeLinear"]:
        name = node.input[0]
        value = graph.array(name)
        if value is None or value.dtype != np.int8 or value.ndim < 2 or not fits_nibbles(value):
            continue
        stored, wider = graph.add_nibbles(f"{name}_int4", value, INT4), _wider(graph, node, factor)
        first = graph.proto.node[0]
        if np.any(wider != 1):
            scale = graph.array(node.input[1])
            assert scale is not None
            finer = (scale / wider.reshape(scale.shape)).astype(np.float32)
            node.input[1] = graph.add_constant(f"{name}_finer_scale", finer)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            spread = wider.reshape([-1 if d == axis else 1 for d in range(value.ndim)])
            by = graph.add_constant(f"{name}_wider", spread.astype(np.float32))
            stored = graph.add_node(first, "Cast", [stored], f"{name}_float", to=FLOAT)
            stored = graph.add_node(first, "Mul", [stored, by], f"{name}_product")
        node.input[0] = graph.add_node(first, "Cast", [stored], f"{name}_int8", to=INT8)


def _wider(graph: _Graph, dequantize: Any, factor: int) -> np.ndarray:
    """What each scale may be divided by (`factor` or 1), so that the biases still fit 32 bits."""
    scale, readers = graph.array(dequantize.input[1]), graph.readers(dequantize.output[0])
    assert scale is not None
    ones = np.ones(scale.size)
    if len(readers) != 1 or readers[0].op_type not in WITH_BIAS or len(readers[0].input) < 3:
        return ones
    x_scale, bias = graph.scale_of(readers[0].input[0]), graph.array(readers[0].input[2])
    zero = graph.array(dequantize.input[2]) if len(dequantize.input) > 2 else None
    if x_scale is None or bias is None or (zero is not None and zero.any()):
        return ones
    steps = np.abs(bias.astype(np.float64)) / (x_scale.astype(np.float64) * scale.reshape(-1).astype(np.float64))
    steps = steps if scale.size > 1 else steps.max().reshape(1)
    return np.where(steps * factor < 2**30, factor, ones)


def fits_nibbles(value: np.ndarray) -> bool:
    """Whether every value is -8..7."""
    return bool(value.size) and int(value.min()) >= -8 and int(value.max()) <= 7


def store_half(graph: _Graph, weights: Mapping[str, np.ndarray]) -> None:
    """These float32 weights become float16 with a Cast behind; what float16 cannot hold stays as it is."""
    for attribute, value in weights.items():
        name, turned = _held_as(graph, attribute, value)
        if graph.readers(name) and fits_half(value):
            graph.add_constant(f"{name}_half", (value.T if turned else value).astype(np.float16))
            graph.rename_reads(name, graph.add_node(None, "Cast", [f"{name}_half"], f"{name}_float", to=FLOAT))


def fits_half(value: np.ndarray) -> bool:
    """Whether float16 holds every value without overflow."""
    return bool(value.size) and float(np.abs(value).max()) <= float(np.finfo(np.float16).max)


def store_integers(graph: _Graph, packed: Mapping[str, Packed]) -> None:
    """Float weights become the integers they were rounded to.

    Weight-only: Cast and Mul in front of the layer, which ONNX Runtime folds at load, where it would compute a
    DequantizeLinear at every run. Dynamic: the layer itself becomes ConvInteger or MatMulInteger.
    """
    found = {attribute: _held_as(graph, attribute, p.value) for attribute, p in packed.items()}
    for attribute, (name, turned) in found.items():
        if name not in graph.constants or not graph.readers(name):
            continue  # the exporter keeps one of two equal weights
        for node in graph.readers(name) if packed[attribute].dynamic else ():
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                _compute_dynamically(graph, node, name, packed[attribute])
        if graph.readers(name):
            graph.rename_reads(name, _dequantized(graph, name, packed[attribute], turned))


def _held_as(graph: _Graph, attribute: str, value: np.ndarray) -> tuple[str, bool]:
    """The initializer that holds a weight, and whether it is turned (K, O): exporters rename and transpose."""
    for name in [attribute, *graph.constants] if attribute in graph.constants else list(graph.constants):
        init = graph.constants[name]
        if init.data_type != FLOAT or sorted(init.dims) != sorted(value.shape):
            continue
        held = graph.array(name)
        if held is not None and np.array_equal(held, value):
            return name, False
        if held is not None and value.ndim == 2 and np.array_equal(held, value.T):
            return name, True
    raise RefusedFormat(f"the weight {attribute} is not in the exported graph.", "Leave that layer in float.")


def _dequantized(graph: _Graph, name: str, packed: Packed, turned: bool) -> str:
    """Nodes in front of all others that make the float weight of its integers; returns the last one's output."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = [("Cast", [_integers(graph, name, packed)], {"to": FLOAT})]
    scale = packed.scale[..., None] if packed.block else packed.spread
    steps.append(("Mul", [graph.add_constant(f"{name}_scale", scale)], {}))
    if packed.block:
        steps += _unblocked(graph, name, packed)
    if turned:
        steps.append(("Transpose", [], {"perm": [1, 0]}))
    first, last = None if not graph.proto.node else graph.proto.node[0], ""
    for k, (kind, inputs, attributes) in enumerate(steps):
        read = inputs if not k else [last, *inputs]
        last = graph.add_node(first, kind, read, f"{name}_{kind.lower()}_{k}", **attributes)
    return last


def _unblocked(graph: _Graph, name: str, packed: Packed) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(C, blocks, block) back to the weight's shape."""

    def ints(what: str, *values: int) -> str:
        return graph.add_constant(f"{name}_{what}", np.array(values, np.int64))

    if packed.row_length % packed.block:
        yield "Reshape", [ints("rows", packed.moved[0], -1)], {}
        yield "Slice", [ints("start", 0), ints("end", packed.row_length), ints("axis", 1)], {}
    yield "Reshape", [ints("shape", *packed.moved)], {}
    if packed.axis:
        order = list(range(1, packed.q.ndim))
        yield "Transpose", [], {"perm": [*order[: packed.axis], 0, *order[packed.axis :]]}


def _integers(graph: _Graph, name: str, packed: Packed) -> str:
    value = packed.blocks if packed.block else packed.q
    if packed.bits == 4:
        return graph.add_nibbles(f"{name}_int4", value, INT4)
    return graph.add_constant(f"{name}_int8", value)


def _compute_dynamically(graph: _Graph, node: Any, name: str, packed: Packed) -> None:
    """Conv, Gemm or MatMul becomes its integer form on an input that is quantized as it runs; float behind.

    Weights are unsigned: ONNX Runtime's ConvInteger is several times slower on signed ones, and on x86 without VNNI
    u8 x s8 saturates where u8 x u8 does not.
    """
    x, y, conv = node.input[0], node.output[0], node.op_type == "Conv"
    if f"{x}_u8" not in graph.made_by:
        _quantize_dynamically(graph, node, x)
    weight, zero = _unsigned(graph, name, packed, turned=not conv)
    around = [1] * (packed.q.ndim - 2) if conv else []
    scale = graph.add_constant(f"{name}_scale", packed.scale.reshape(-1, *around))
    kind = "ConvInteger" if conv else "MatMulInteger"
    kept = {a.name: _attribute(a) for a in node.attribute} if conv else {}
    graph.add_node(node, kind, [f"{x}_u8", weight, f"{x}_zero", zero], f"{y}_int32", **kept)
    graph.add_node(node, "Cast", [f"{y}_int32"], f"{y}_sum", to=FLOAT)
    graph.add_node(node, "Mul", [f"{x}_scale", scale], f"{y}_scale")
    bias = graph.array(node.input[2]) if len(node.input) > 2 else None
    last = graph.add_node(node, "Mul", [f"{y}_sum", f"{y}_scale"], y if bias is None else f"{y}_product")
    if bias is not None:
        spread = graph.add_constant(f"{y}_bias", bias.reshape(-1, *around))
        graph.add_node(node, "Add", [last, spread], y)
    graph.proto.node.remove(node)


def _attribute(attribute: Any) -> Any:
    from onnx import helper

    return helper.get_attribute_value(attribute)


def _quantize_dynamically(graph: _Graph, before: Any, x: str) -> None:
    from onnx import helper

    outputs = [f"{x}_u8", f"{x}_scale", f"{x}_zero"]
    node = helper.make_node("DynamicQuantizeLinear", [x], outputs, name=outputs[0])
    graph.proto.node.insert(list(graph.proto.node).index(before), node)
    graph.made_by |= dict.fromkeys(outputs, node)


def _unsigned(graph: _Graph, name: str, packed: Packed, *, turned: bool) -> tuple[str, str]:
    """The integers as uint8 with their zero point (8 where 4 bits are stored, else 128)."""
    middle, held = 2 ** (packed.bits - 1), f"{name}_u8"
    if held not in graph.constants and held not in graph.made_by:
        value = (packed.q.astype(np.int16) + middle).astype(np.uint8)
        value = np.ascontiguousarray(value.T) if turned else value
        if packed.bits == 4:
            graph.add_node(None, "Cast", [graph.add_nibbles(f"{name}_uint4", value, UINT4)], held, to=UINT8)
        else:
            graph.add_constant(held, value)
    return held, graph.add_constant(f"middle_{middle}", np.array(middle, np.uint8))


def pool_globally(model: Any) -> Any:
    """ReduceMean over height and width becomes GlobalAveragePool, which runtimes have integer kernels for."""
    from onnx import helper

    graph = _Graph(model)
    for k, node in enumerate(list(graph.proto.node)):
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes, keep = (
            graph.array(node.input[1]),
            next((a.i for a in node.attribute if a.name == "keepdims"), 1),
        )
        if axes is not None and sorted(int(a) for a in axes) in ([-2, -1], [2, 3]) and keep:
            pool = helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), name=node.name)
            graph.proto.node.remove(node)
            graph.proto.node.insert(k, pool)
    graph.drop_unused()
    return model
