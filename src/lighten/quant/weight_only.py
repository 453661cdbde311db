"""Weights as integers while activations stay float, or are quantized as the network runs: no calibration images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lighten.errors import BadConfig, BadModel
from lighten.kit.onnx_graph import Packed, fits_half
from lighten.quant import graph as graphs
from lighten.quant import policy
from lighten.quant.graph import Layer
from lighten.quant.plan import Quantized
from lighten.quant.ranges import METHODS, Grid, signal_to_noise, weight_scales
from lighten.types import FLOATS, Device, Precision

GRIDS = {"int8": (8, -127, 127), "int4": (4, -8, 7)}
"""Bits and ends. 8 bits keep to -127 as integer kernels like; 4 bits need every level they have."""

ACTIVATIONS = ("float32", "dynamic")
NO_KERNEL = "transposed convolutions have no kernel for dynamic activations: float ones, integer weights"


def quantize_weights(
    model: nn.Module,
    shape: tuple[int, ...],
    precision: Precision,
    device: Device,
    block: int = 0,
    methods: tuple[str, ...] = METHODS,
) -> Quantized:
    """Fold batch norms and round every layer's weight to symmetric integers, `model` itself unchanged.

    One scale an output channel, or with `block` > 0 one for each `block` consecutive input weights of a channel
    (Dettmers & Zettlemoyer, 2023, "The case for 4-bit precision", section 2); each range is shrunk where that lowers
    its squared error. With "dynamic" activations a layer's input is rounded to uint8 as it runs, with the range of that
    very tensor (ONNX DynamicQuantizeLinear). The module computes with the rounded weights in float;
    `module.meta["packed"]` holds their integers by attribute name. `shape` is (C, H, W). Raises BadConfig on a precision
    that needs calibration or a bad block, BadModel where the graph cannot be captured, holds no such layer, has weights
    that are not finite, or the precision names a layer that is not there.
    """
    if block < 0 or block == 1:
        raise BadConfig(f"A block of {block} weights.", "Give 0 (one scale a channel), or 2 and more.")
    graph = graphs.fold(copy.deepcopy(model), shape)  # what is folded may share parameters with it
    wanted = _wanted(graph, precision)
    packed: dict[str, Packed] = {}
    rows = []
    for node in [n for n in graph.graph.nodes if policy.packet(n) in policy.COMPUTE]:
        layer = next((one for one in graphs.layers(graph) if one.node is node), None)
        weights, activations = wanted[graphs.layer_name(node)]
        rows.append(_round(graph, node, layer, weights, activations, device, block, methods, packed))
    if not packed and not any(w == "float16" for w, _ in wanted.values()):
        raise BadModel("The model holds no layer that can be quantized (convolution or linear).", "Choose float.")
    graph.recompile()
    graph.meta["packed"] = packed
    return Quantized(graph, tuple(rows))


def _wanted(graph: GraphModule, precision: Precision) -> dict[str, tuple[str, str]]:
    """Weights and activations of each layer by name; refuses what cannot be had without calibration."""
    names = [graphs.layer_name(n) for n in graph.graph.nodes if policy.packet(n) in policy.COMPUTE]
    exceptions = {name: (w, a) for name, w, a in precision.exceptions}
    if strangers := sorted(set(exceptions) - set(names)):
        raise BadModel(
            f"The precision names layers that are not there: {', '.join(strangers[:3])}.",
            f"Layers: {', '.join(sorted(set(names))[:40])}",
        )
    default = precision.weights, precision.activations
    for weights, activations in (default, *exceptions.values()):
        if weights not in FLOATS and (weights not in GRIDS or activations not in ACTIVATIONS):
            raise BadConfig(
                f"{weights} weights with {activations} activations are no weight-only or dynamic precision.",
                f"Weights {', '.join(GRIDS)} with activations {' or '.join(ACTIVATIONS)}; others need calibration.",
            )
    return {name: exceptions.get(name, default) for name in names}


def _round(
    graph: GraphModule,
    node: Node,
    layer: Layer | None,
    weights: str,
    activations: str,
    device: Device,
    block: int,
    methods: tuple[str, ...],
    packed: dict[str, Packed],
) -> dict[str, Any]:
    """Overwrite one layer's weight with its rounded values, put the rounding of its input in; the report's row."""
    row: dict[str, Any] = {"layer": graphs.layer_name(node), "op": str(node.target).split(".")[1]}
    if layer is None:
        return row | {"weights": "float32", "reason": "its weight is computed, not stored"}
    weight = graphs.parameter(graph, layer.weight).detach().clone()
    row["shape"] = tuple(weight.shape)
    if not torch.isfinite(weight).all():
        raise BadModel(f"The weight of {layer.name} holds NaN or infinity.", "Train the model again.")
    if weights in FLOATS:
        return row | _float_row(graph, layer, weight, weights)
    moving = activations == "dynamic" and layer.kind is not policy.aten.conv_transpose2d
    if layer.weight not in packed:
        one = pack(weight, layer.axis, weights, 0 if moving else block, moving, device, methods)
        packed[layer.weight] = one
        graphs.overwrite(graph, layer.weight, torch.from_numpy(np.ascontiguousarray(one.value)))
    if moving:
        _round_input(graph, layer)
    held = packed[layer.weight]
    row |= {"weights": f"int{held.bits}", "activations": "dynamic" if moving else "float32"}
    row |= {"block": held.block} if held.block else {}
    row |= {"reason": NO_KERNEL} if activations == "dynamic" and not moving else {}
    noise = signal_to_noise(weight, graphs.parameter(graph, layer.weight).detach())
    return row | {"weight_sqnr_db": round(noise, 2)}


def _float_row(graph: GraphModule, layer: Layer, weight: Tensor, weights: str) -> dict[str, Any]:
    if weights == "float16" and fits_half(weight.numpy()):
        graphs.overwrite(graph, layer.weight, weight.half().float())
        return {"weights": "float16", "reason": "the precision keeps it in float"}
    late = "a value is too large for float16" if weights == "float16" else "the precision keeps it in float"
    return {"weights": "float32", "reason": late}


def pack(
    weight: Tensor,
    axis: int,
    weights: str,
    block: int,
    dynamic: bool,
    device: Device,
    methods: tuple[str, ...] = METHODS,
) -> Packed:
    """The integers and scales of one weight: per slice along `axis`, or per `block` values of a slice."""
    bits, qmin, qmax = GRIDS[weights]
    grid = Grid(qmin, qmax, symmetric=True, power_of_two=device.power_of_two_scales)
    rows = weight.movedim(axis, 0).flatten(1)
    block = min(block, rows.shape[1])
    filled = nn.functional.pad(rows, (0, -rows.shape[1] % block)) if block else rows
    parts = filled.reshape(-1, block) if block else rows
    scale, _ = weight_scales(parts, 0, grid, methods)
    q = torch.round(parts / scale[:, None]).clamp(qmin, qmax).to(torch.int8)
    q = q.reshape(len(rows), -1)[:, : rows.shape[1]]
    moved = weight.movedim(axis, 0).shape
    scale = scale.reshape(len(rows), -1) if block else scale
    whole = np.ascontiguousarray(q.reshape(moved).movedim(0, axis).numpy())
    return Packed(whole, scale.numpy(), axis, bits, block, dynamic)


class DynamicRound(nn.Module):
    """Rounds a tensor to the 256 levels of its own range and back: ONNX DynamicQuantizeLinear, then dequantized."""

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.round(-low / scale).clamp(0, 255)
        return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


def _round_input(graph: GraphModule, layer: Layer) -> None:
    """Put a DynamicRound in front of a layer (one for all layers that read the same tensor)."""
    x = layer.node.args[0]
    assert isinstance(x, Node)
    rounded = next((u for u in x.users if _is_rounding(graph, u)), None)
    if rounded is None:
        if not hasattr(graph, "dynamic_round"):
            graph.add_submodule("dynamic_round", DynamicRound())
        with graph.graph.inserting_before(layer.node):
            rounded = graph.graph.call_module("dynamic_round", (x,))
        rounded.meta["val"] = x.meta.get("val")
    layer.node.update_arg(0, rounded)


def _is_rounding(graph: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), DynamicRound)


def float_graph(module: nn.Module) -> nn.Module:
    """What an exporter is given: a copy without the rounding of inputs, which each format writes in its own way."""
    if not isinstance(module, GraphModule) or not any(_is_rounding(module, n) for n in module.graph.nodes):
        return module
    module = copy.deepcopy(module)
    for node in [n for n in module.graph.nodes if _is_rounding(module, n)]:
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.recompile()
    return module


def packed_weights(module: nn.Module) -> dict[str, Packed]:
    """What `quantize_weights` left for the exporter; nothing for other modules."""
    return dict(getattr(module, "meta", {}).get("packed", {}))


def half_weights(module: nn.Module, precision: Precision) -> dict[str, np.ndarray]:
    """The weights that a quantized precision keeps in float16, by attribute name."""
    return dict(_half(module, {name for name, w, _ in precision.exceptions if w == "float16"}))


def _half(module: nn.Module, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(module, GraphModule) and names:
        for layer in graphs.layers(module):
            if layer.name in names:
                yield layer.weight, graphs.parameter(module, layer.weight).detach().numpy()
