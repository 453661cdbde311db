"""What each ATen operator is to quantization: one table, read by the quantizer and by nothing else."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

COMPUTE = {aten.conv1d: 0, aten.conv2d: 0, aten.conv_transpose2d: 1, aten.linear: 0}
"""Operators with a weight as second argument, and the weight's axis of output channels."""

FUSED = (aten.relu, aten.relu_, aten.relu6, aten.hardtanh, aten.hardtanh_, aten.clamp, aten.clamp_)
"""Clips that every runtime folds into the operator before; what lies between the two is never quantized."""

ELEMENTWISE = (aten.add, aten.add_, aten.mul, aten.mul_, aten.cat)
"""Operators on two or more activations, each quantized on its own, with an integer kernel in most runtimes."""

AVERAGE = (aten.adaptive_avg_pool2d, aten.avg_pool2d, aten.mean)
"""Operators whose output is narrower than their input, and gets a range of its own."""

CURVED = (
    aten.hardswish,
    aten.hardswish_,
    aten.hardsigmoid,
    aten.hardsigmoid_,
    aten.silu,
    aten.silu_,
    aten.sigmoid,
    aten.leaky_relu,
    aten.leaky_relu_,
)
"""Activations that most runtimes compute in float or by table between two quantized tensors."""

PASSING = (
    aten.max_pool2d,
    aten.flatten,
    aten.view,
    aten.reshape,
    aten.permute,
    aten.transpose,
    aten.squeeze,
    aten.unsqueeze,
    aten.slice,
    aten.pad,
    aten.constant_pad_nd,
    aten.pixel_shuffle,
    aten.channel_shuffle,
    aten.upsample_nearest2d,
)
"""Operators that only move values: output and input share one scale, so nothing is rounded twice."""

NOTHING = (aten.dropout, aten.dropout_, aten.contiguous, aten.clone, aten.alias)
"""Operators that do nothing at inference."""

JOINING = (aten.cat,)
MOVING = (*PASSING, *NOTHING, *JOINING)
"""Operators behind which an answer is still the answer of the layer before."""


def packet(node: Any) -> Any:
    """The operator of an fx node without its overload (aten.add for aten.add.Tensor); None for other nodes."""
    return getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
