"""One quantization plan: ranges and bits decided on calibration images, written into the graph as Q/DQ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lighten.errors import BadData, BadModel
from lighten.kit.quiet import quiet
from lighten.quant import graph as graphs
from lighten.quant.graph import Layer
from lighten.quant.observers import ActivationObserver, WeightObserver
from lighten.quant.quantizer import PolicyQuantizer
from lighten.quant.ranges import METHODS, signal_to_noise
from lighten.types import Device, Precision

Told = Callable[[int], None]
"""Called with the number of images that have passed."""


@dataclass(frozen=True)
class Plan:
    """A folded graph with an observer on everything that will be quantized, and what the quantizer decided."""

    graph: GraphModule
    quantizer: PolicyQuantizer

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer with weights, quantized or not, in the order they run."""
        return graphs.layers(self.graph)


@dataclass(frozen=True)
class Quantized:
    """The converted graph (integer weights, Q/DQ around each operator) and what was decided for each layer."""

    module: GraphModule
    layers: tuple[dict[str, Any], ...]


def quantize(
    model: nn.Module,
    shape: tuple[int, ...],
    batches: Iterable[Tensor],
    precision: Precision,
    device: Device,
    methods: tuple[str, ...] = METHODS,
    step: Told = lambda done: None,
) -> Quantized:
    """Fold batch norms, watch the calibration `batches` pass, choose every range, convert.

    `shape` is (C, H, W); `model` is not changed. `step` is told how many images have passed. Raises BadData on NaN
    or no images, BadModel where the graph cannot be captured or holds nothing to quantize.
    """
    plan = prepare(graphs.fold(model, shape), precision, device, methods)
    calibrate(plan, batches, step)
    return convert(plan)


def prepare(graph: GraphModule, precision: Precision, device: Device, methods: tuple[str, ...] = METHODS) -> Plan:
    """Put an observer on every tensor of a folded `graph` (which is used up) that the precision quantizes.

    Raises BadModel where there is nothing to quantize, or the precision names a layer that is not there.
    """
    quantizer = PolicyQuantizer(precision, device, methods)
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        prepared = prepare_pt2e(graph, quantizer)
    if not any(isinstance(m, WeightObserver) for m in prepared.modules()):
        raise BadModel(
            "The model holds no layer that can be quantized (convolution or linear).",
            "Choose a float precision.",
        )
    if strangers := sorted(set(quantizer.exceptions) - set(quantizer.layers.values())):
        raise BadModel(
            f"The precision names layers that are not there: {', '.join(strangers[:3])}.",
            f"Layers: {', '.join(sorted(set(quantizer.layers.values()))[:40])}",
        )
    return Plan(prepared, quantizer)


def convert(plan: Plan) -> Quantized:
    """Replace the observers by Q/DQ with the scales they decided (or were pinned to), and the weights by integers."""
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        _halve(plan)
        layers = tuple(_describe(plan))
        done = convert_pt2e(plan.graph, use_reference_representation=False, fold_quantize=True)
    return Quantized(done, layers)


def _halve(plan: Plan) -> None:
    """Weights that will be stored as float16 take the values they will have."""
    for layer in plan.layers:
        if plan.quantizer.exceptions.get(layer.name, ("", ""))[0] == "float16":
            weight = graphs.parameter(plan.graph, layer.weight)
            graphs.overwrite(plan.graph, layer.weight, weight.half().float())


def calibrate(plan: Plan, batches: Iterable[Tensor], step: Told = lambda done: None) -> None:
    """Let the calibration images pass. Raises BadData on NaN or no images, BadModel where an activation overflows."""
    done = 0
    with torch.no_grad():
        for x in batches:
            if not torch.isfinite(x).all():
                raise BadData(
                    f"The calibration images hold NaN or infinity (images {done} to {done + len(x) - 1}).",
                    "Check the preprocessing.",
                )
            try:
                plan.graph(x)
            except ValueError as e:
                raise BadModel(f"An activation {e} on the calibration images.", "Check the weights.") from e
            done += len(x)
            step(done)
    if not done:
        raise BadData("There are no calibration images.", "Give at least a few dozen.")
    _leave_room_for_biases(plan)


def _leave_room_for_biases(plan: Plan) -> None:
    """Widen the scale of weights that are all but zero, so that the bias fits 32 bits at input scale x weight scale.

    Pruned filters, and those whose batch norm went to zero, would get the smallest scale there is. Runtimes fuse the
    bias at exactly that product (Jacob et al., 2018, eq. 11), whatever else is written beside it.
    """
    for layer in plan.layers:
        source = graphs.input_observer(plan.graph, layer)
        if source is not None:
            leave_room(plan.graph, layer, source.calculate_qparams()[0])


def leave_room(graph: GraphModule, layer: Layer, input_scale: Tensor) -> None:
    """The same for one layer whose input has this scale."""
    weight = graphs.weight_observer(graph, layer)
    if layer.bias and weight is not None:
        bias = graphs.parameter(graph, layer.bias).detach().abs().double()
        weight.keep_above((bias / 2**30 / input_scale.double()).float())


def _describe(plan: Plan) -> Iterable[dict[str, Any]]:
    """One row a layer: shape, bits, the input's range and how it was chosen, signal over noise of weight and input."""
    for node in plan.graph.graph.nodes:
        if not (name := plan.quantizer.layers.get(node.name)):
            continue
        weight = graphs.observer(plan.graph, node.args[1])
        source = graphs.observer(plan.graph, node.args[0])
        row: dict[str, Any] = {"layer": name, "op": str(node.target).split(".")[1]}
        if isinstance(weight, WeightObserver) and weight.weight is not None:
            row |= _weight_row(weight)
        else:
            row |= {"weights": "float32", "reason": plan.quantizer.left_float.get(name, "not quantized")}
        if isinstance(source, ActivationObserver):
            row |= _activation_row(source)
        yield row


def _weight_row(observer: WeightObserver) -> dict[str, Any]:
    assert observer.weight is not None
    weight = observer.weight.detach()
    scale, zero = observer.calculate_qparams()
    view = [-1 if d == (observer.ch_axis or 0) else 1 for d in range(weight.ndim)]
    rounded = observer.grid.fake(weight, scale.view(view), zero.view(view))
    bits = math.ceil(math.log2(observer.quant_max - observer.quant_min + 1))
    return {
        "weights": f"int{bits}",
        "shape": tuple(weight.shape),
        "weight_sqnr_db": round(signal_to_noise(weight, rounded), 2),
    }


def _activation_row(observer: ActivationObserver) -> dict[str, Any]:
    chosen = observer.chosen()
    scale, zero = observer.calculate_qparams()
    noise = max(chosen.error, 1e-30)
    return {
        "input_range": (round(chosen.lo, 5), round(chosen.hi, 5)),
        "input_seen": (round(observer.histogram.smallest, 5), round(observer.histogram.largest, 5)),
        "range_method": chosen.method,
        "input_scale": float(scale),
        "input_zero_point": int(zero),
        "input_sqnr_db": round(10 * math.log10(max(observer.histogram.power, 1e-30) / noise), 2),
    }
