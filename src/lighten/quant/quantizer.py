"""Marks each node of an exported graph with what is to be quantized there, by the policy and the precision."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from lighten.quant import policy
from lighten.quant.graph import fused_after, layer_name
from lighten.quant.observers import ActivationObserver, PerChannelWeightObserver, WeightObserver
from lighten.quant.ranges import METHODS
from lighten.types import Device, Precision

KEY = "quantization_annotation"
BITS = {"int8": 8, "int4": 4}


class PolicyQuantizer(Quantizer):
    """Weights symmetric, activations per tensor, as fine as the device has kernels for; `left_float` names layers kept out, with the reason."""

    def __init__(self, precision: Precision, device: Device, methods: tuple[str, ...] = METHODS) -> None:
        self.precision, self.device, self.methods = precision, device, methods
        self.exceptions = {name: (w, a) for name, w, a in precision.exceptions}
        self.left_float: dict[str, str] = {}
        self.layers: dict[str, str] = {}
        self.made: dict[Node, int] = {}
        self.fixed: set[Node] = set()

    def annotate(self, model: GraphModule) -> GraphModule:
        self.fixed = constants(model)
        for node in model.graph.nodes:
            if node.op == "call_function" and KEY not in node.meta and _is_float(node) and node not in self.fixed:
                self._annotate(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: what cannot be quantized stays float and is named."""

    def _annotate(self, node: Node) -> None:
        kind = policy.packet(node)
        if kind in policy.JOINING and _is_answer(node):
            return
        if kind in policy.COMPUTE:
            self._compute(node, policy.COMPUTE[kind])
        elif kind in (*policy.ELEMENTWISE, *policy.AVERAGE, *policy.CURVED) and not self._reads_constant(node):
            self._many(node)
        elif kind in (*policy.PASSING, *policy.NOTHING):
            self._passing(node)

    def _reads_constant(self, node: Node) -> bool:
        return any(a in self.fixed for a in _tensor_inputs(node))

    def _compute(self, node: Node, axis: int) -> None:
        x, weight = node.args[0], node.args[1]
        name = layer_name(node)
        self.layers[node.name] = name
        weights, activations = self._wanted(node)
        if reason := self._left_float(node):
            self.left_float[name] = reason
            return
        inputs: dict[Node, Any] = {weight: self._weight(BITS[weights], axis)}
        if isinstance(x, Node) and activations in BITS:
            inputs[x] = self._activation(BITS[activations])
        last = fused_after(node)
        output = None if _is_answer(last) else self._output(last)
        annotate(node, inputs, output if last is node else None)
        if last is not node:
            annotate(last, {}, output)

    def _wanted(self, node: Node) -> tuple[str, str]:
        """Precision of a layer's weights and of the activations it reads."""
        return self.exceptions.get(layer_name(node), (self.precision.weights, self.precision.activations))

    def _left_float(self, node: Node) -> str | None:
        """Why a layer is not quantized; None where it is."""
        weight = node.args[1]
        if self._wanted(node)[0] not in BITS:
            return "the precision keeps it in float"
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return "its weight is computed, not stored"
        if policy.packet(node) is policy.aten.conv_transpose2d and len(node.args) > 6 and node.args[6] != 1:
            return "grouped transposed convolution"
        return None

    def _many(self, node: Node) -> None:
        inputs = [a for a in _tensor_inputs(node) if _is_float(a)]
        if not inputs:
            return
        last = fused_after(node) if policy.packet(node) in policy.ELEMENTWISE else node
        output = None if _is_answer(last) else self._output(last)
        annotate(node, {a: self._activation(8) for a in inputs}, output if last is node else None)
        if last is not node:
            annotate(last, {}, output)

    def _passing(self, node: Node) -> None:
        x = node.args[0]
        # Only values that are quantized already are passed on; a Q/DQ pair around a float tensor would be pure loss.
        if isinstance(x, Node) and _gives_quantized(x) and not _is_answer(node):
            shared = SharedQuantizationSpec((x, node))
            self.made[node] = self.made.get(x, 8)
            annotate(node, {x: self._activation(self.made[node])}, shared)

    def _output(self, node: Node) -> QuantizationSpec:
        """The grid a tensor is made on: the finest that a reader asks for, so that nothing is rounded to 8 bits first
        when only layers at 4 bits read it. Where one reader needs 8, the others round again behind it."""
        self.made[node] = self._asked(node)
        return self._activation(self.made[node])

    def _asked(self, node: Node) -> int:
        return max((self._asks(user, node) for user in node.users), default=8)

    def _asks(self, reader: Node, node: Node) -> int:
        kind = policy.packet(reader)
        if kind in (*policy.PASSING, *policy.NOTHING):
            return self._asked(reader)
        if kind in policy.COMPUTE and reader.args[0] is node and not self._left_float(reader):
            return BITS.get(self._wanted(reader)[1], 8)
        return 8

    def _activation(self, bits: int) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-(2 ** (bits - 1)),
            quant_max=2 ** (bits - 1) - 1,
            qscheme=torch.per_tensor_symmetric if self.device.symmetric_activations else torch.per_tensor_affine,
            observer_or_fake_quant_ctr=ActivationObserver.with_args(
                methods=self.methods, power_of_two=self.device.power_of_two_scales
            ),
        )

    def _weight(self, bits: int, axis: int) -> QuantizationSpec:
        # Without VNNI, x86 adds two u8*s8 products in 16 bits; 7-bit weights keep that sum from saturating.
        reach = 63 if self.device.reduce_range and bits == 8 else 2 ** (bits - 1) - 1
        per_channel = self.device.per_channel_weights
        observer = PerChannelWeightObserver if per_channel else WeightObserver
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-reach,
            quant_max=reach,
            qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
            ch_axis=axis if per_channel else None,
            observer_or_fake_quant_ctr=observer.with_args(
                methods=self.methods, power_of_two=self.device.power_of_two_scales
            ),
        )


def annotate(node: Node, inputs: dict[Node, Any], output: Any) -> None:
    """Write torchao's annotation on a node."""
    node.meta[KEY] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=output, _annotated=True)


def _is_answer(node: Node) -> bool:
    """Whether the value leaves the network, perhaps moved and joined with others: those stay float, so that answers are
    not rounded. Box numbers and class scores that a detector joins would else share one scale."""
    return any(
        user.op == "output" or (policy.packet(user) in policy.MOVING and _is_answer(user)) for user in node.users
    )


def _gives_quantized(node: Node) -> bool:
    note = node.meta.get(KEY)
    return note is not None and note.output_qspec is not None


def _tensor_inputs(node: Node) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(node.args, found.append)
    return list(dict.fromkeys(found))


def constants(model: GraphModule) -> set[Node]:
    """Nodes that no input of the network reaches: weights, and what is computed from them or from nothing (the tables of a
    rotary position embedding). Runtimes compute those once, in float."""
    fixed: set[Node] = set()
    for node in model.graph.nodes:
        if node.op in ("get_attr", "call_function") and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
    return fixed


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 1
