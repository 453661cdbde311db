"""Networks for tools that take a torch.export program of one image: silence, errors, and exact rewrites of their Q/DQ."""

from __future__ import annotations

import contextlib
import copy
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lighten.errors import LightenError, RefusedFormat
from lighten.kit.quiet import quiet

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from lighten.kit.onnx_graph import Packed

NIBBLE = 15
"""A grid of 4 bits reaches this far from its first integer to its last."""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Like `quiet`, and C++ libraries that write to the process's own stdout and stderr are silent as well."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd in kept:
            os.dup2(nowhere, fd)
        with quiet():
            yield
    finally:
        for fd, copy_of in kept.items():
            os.dup2(copy_of, fd)
            os.close(copy_of)
        os.close(nowhere)


@contextlib.contextmanager
def converting(tool: str) -> Iterator[None]:
    """Silence, and what the converter cannot do as a RefusedFormat with its own first words."""
    with silent():
        try:
            yield
        except LightenError:
            raise
        except Exception as e:
            lines = [line.strip() for line in str(e).splitlines() if line.strip()]
            raise RefusedFormat(
                f"{tool} cannot convert this network: {type(e).__name__}: {(lines or ['no message'])[0][:300]}",
                "Try another format.",
            ) from e


def _quantized() -> Any:
    """The operators that PT2E writes; they are known to torch once torchao or this module is loaded."""
    import torch
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


def _stored(graph: GraphModule, node: Any) -> Any:
    """The tensor that a get_attr node reads."""
    return operator.attrgetter(str(node.target))(graph)


def _is(node: Any, packet: Callable[..., Any]) -> bool:
    return getattr(node.target, "overloadpacket", None) is packet


def is_quantize(node: Any) -> bool:
    q = _quantized()
    return _is(node, q.quantize_per_tensor) or _is(node, q.quantize_per_channel)


def _weight_dequantizes(graph: GraphModule) -> list[Node]:
    """Nodes that make a float weight of stored integers."""
    q = _quantized()
    kinds = (q.dequantize_per_tensor, q.dequantize_per_channel)
    found = [n for n in graph.graph.nodes if any(_is(n, kind) for kind in kinds)]
    return [n for n in found if n.args[0].op == "get_attr"]


def integer_weights(graph: GraphModule) -> dict[str, Packed]:
    """The integers and scales of every weight of a converted graph, by the name of its buffer."""
    return {str(n.args[0].target): _packed(graph, n) for n in _weight_dequantizes(graph)}


def _packed(graph: GraphModule, node: Node) -> Packed:
    import numpy as np

    from lighten.kit.onnx_graph import Packed

    whole = _stored(graph, node.args[0]).numpy()
    low, high = node.args[-3:-1]
    bits = 4 if high - low <= NIBBLE else 8
    if _is(node, _quantized().dequantize_per_channel):
        return Packed(whole, _stored(graph, node.args[1]).float().numpy(), int(node.args[3]), bits)
    return Packed(whole, np.full(whole.shape[0], node.args[1], np.float32), 0, bits)


def with_float_weights(graph: GraphModule) -> GraphModule:
    """A copy whose weights are float, rounded by a quantize node to the very integers that were stored.

    For LiteRT's converter, which knows a weight only as float -> quantize -> dequantize.
    """
    import torch

    q, graph = _quantized(), copy.deepcopy(graph)
    for k, node in enumerate(_weight_dequantizes(graph)):
        packed = _packed(graph, node)
        name = f"float_weight_{k}"
        graph.register_buffer(name, torch.from_numpy(packed.value))
        channels = _is(node, q.dequantize_per_channel)
        rounding = q.quantize_per_channel.default if channels else q.quantize_per_tensor.default
        with graph.graph.inserting_before(node):
            whole = graph.graph.get_attr(name)
            node.update_arg(0, graph.graph.call_function(rounding, (whole, *node.args[1:])))
    graph.recompile()
    return graph


def with_aligned_cats(graph: GraphModule) -> GraphModule:
    """A copy in which every input of a concatenation is on the grid of its output: the rounding is only done earlier.

    For XNNPACK, which copies the bytes of a concatenation and refuses scales that differ.
    """
    import torch

    q, graph = _quantized(), copy.deepcopy(graph)
    for node in [n for n in graph.graph.nodes if _is(n, torch.ops.aten.cat)]:
        users = list(node.users)
        if len(users) != 1 or not _is(users[0], q.quantize_per_tensor):
            continue
        grid, inputs = users[0].args[1:], []
        for x in node.args[0]:
            if _is(x, q.dequantize_per_tensor) and x.args[1:] == grid:
                inputs.append(x)
                continue
            with graph.graph.inserting_before(node):
                rounded = graph.graph.call_function(q.quantize_per_tensor.default, (x, *grid))
                inputs.append(graph.graph.call_function(q.dequantize_per_tensor.default, (rounded, *grid)))
        node.update_arg(0, inputs)
    graph.recompile()
    return graph


def with_outer_biases(graph: GraphModule) -> GraphModule:
    """A copy in which a linear layer of integer weights and a float output adds its bias in a node of its own, and has
    one scale a channel, if all the same.

    For XNNPACK, whose one layer of integer weights with float activations is given to its partitioner in that form.
    """
    import torch

    aten, graph = torch.ops.aten, copy.deepcopy(graph)
    weights = set(_weight_dequantizes(graph))
    for node in [n for n in graph.graph.nodes if _is(n, aten.linear)]:
        if node.args[1] not in weights or any(is_quantize(user) for user in node.users):
            continue
        node.update_arg(1, _by_channel(graph, node.args[1]))
        if len(node.args) < 3:
            continue
        bias = node.args[2]
        with graph.graph.inserting_after(node):
            added = graph.graph.call_function(aten.add.Tensor, (node, bias))
        node.replace_all_uses_with(added)
        added.update_arg(0, node)
        node.args = node.args[:2]
    graph.recompile()
    return graph


def _by_channel(graph: GraphModule, node: Node) -> Node:
    """A weight's dequantize node with a scale for each output channel; what has them is itself."""
    import torch

    if _is(node, _quantized().dequantize_per_channel):
        return node
    whole, (scale, zero, *grid) = node.args[0], node.args[1:]
    channels, stored = len(_stored(graph, whole)), []
    for what, value in (("scale", torch.full((channels,), scale)), ("zero", torch.full((channels,), zero))):
        graph.register_buffer(f"{node.name}_{what}", value)
        with graph.graph.inserting_before(node):
            stored.append(graph.graph.get_attr(f"{node.name}_{what}"))
    with graph.graph.inserting_before(node):
        arguments = (whole, *stored, 0, *grid)
        return graph.graph.call_function(_quantized().dequantize_per_channel.default, arguments)


def one_image(module: Any, shape: tuple[int, ...]) -> GraphModule:
    """The graph of `module` for a batch of one image (C, H, W), its averages over height and width pooled in place.

    The module itself is not changed. Raises BadModel where the graph cannot be captured.
    """
    import torch

    from lighten.errors import BadModel
    from lighten.kit.trace import example_input

    try:
        with torch.no_grad():
            program = torch.export.export(module, (example_input(shape, 1),), strict=False)
    except Exception as e:
        lines = str(e).strip().splitlines() or ["no message"]
        raise BadModel(
            f"The graph of the model cannot be captured with input (1, {', '.join(map(str, shape))}): {lines[0][:300]}",
            "Look for Python branches on tensor values, for .item(), and for a wrong --input-size.",
        ) from e
    return with_pooled_means(program.module(check_guards=False))


def with_pooled_means(graph: GraphModule) -> GraphModule:
    """Averages over height and width keep those dimensions, and are flattened behind their rounding: `graph` itself.

    A mean that drops them leaves LiteRT with a transpose and XNNPACK without a kernel.
    """
    import torch

    q, aten = _quantized(), torch.ops.aten
    for node in [n for n in graph.graph.nodes if _is(n, aten.mean) and len(n.args) > 1 and not _keeps(n)]:
        value = node.args[0].meta.get("val")
        if value is None or value.ndim != 4 or sorted(d % 4 for d in node.args[1]) != [2, 3]:
            continue
        users = list(node.users)
        rounding = users[0] if len(users) == 1 and _is(users[0], q.quantize_per_tensor) else None
        last, readers = rounding or node, list((rounding or node).users)
        node.args, node.kwargs = (node.args[0], [2, 3], True), {}
        with graph.graph.inserting_after(last):
            grid = rounding.args[1:] if rounding else ()
            flat = graph.graph.call_function(aten.flatten.using_ints, (last, 1))
        if rounding:
            with graph.graph.inserting_before(flat):
                flat.update_arg(0, graph.graph.call_function(q.dequantize_per_tensor.default, (last, *grid)))
            with graph.graph.inserting_after(flat):
                flat = graph.graph.call_function(q.quantize_per_tensor.default, (flat, *grid))
        for reader in readers:
            reader.replace_input_with(last, flat)
    graph.recompile()
    return graph


def _keeps(mean: Node) -> bool:
    return bool(mean.kwargs.get("keepdim", mean.args[2] if len(mean.args) > 2 else False))


def with_open_hardsigmoids(graph: GraphModule) -> GraphModule:
    """A copy in which a hard sigmoid is (clip(x + 3, 0, 6) / 6), as torch defines it.

    ExecuTorch takes it apart by integer constants that it converts anew at every run, outside the delegate.
    """
    import torch

    aten, graph = torch.ops.aten, copy.deepcopy(graph)
    for node in [n for n in graph.graph.nodes if _is(n, aten.hardsigmoid) or _is(n, aten.hardsigmoid_)]:
        with graph.graph.inserting_before(node):
            moved = graph.graph.call_function(aten.add.Tensor, (node.args[0], 3.0))
            clipped = graph.graph.call_function(aten.hardtanh.default, (moved, 0.0, 6.0))
            node.replace_all_uses_with(graph.graph.call_function(aten.div.Tensor, (clipped, 6.0)))
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def lacking(operators: Mapping[str, int], has: Callable[[Any], bool]) -> str | None:
    """The first of the ATen operators ("aten.conv2d.default": 20) that a tool neither `has` nor gets taken apart."""
    from torch._decomp import core_aten_decompositions

    from lighten.kit.operators import AHEAD, overload

    parts = core_aten_decompositions()
    for name, count in operators.items():
        op = None if name.startswith(AHEAD) else overload(name)
        if not name.startswith(AHEAD) and (op is None or not (op in parts or op._can_decompose() or has(op))):
            return f"{name} ({count} in this network)"
    return None
