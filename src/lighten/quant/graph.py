"""The network as the numerical core sees it: a flat graph with folded batch norms, and its layers with weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lighten.kit.quiet import quiet
from lighten.kit.trace import trace
from lighten.quant import policy
from lighten.quant.observers import ActivationObserver, WeightObserver


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer. `last` is the clip that is fused into it (ReLU, ReLU6), or its own node.

    `weight` and `bias` name attributes of the graph module; `axis` is the weight's axis of output channels.
    """

    name: str
    node: Node
    last: Node
    weight: str
    bias: str | None
    axis: int

    @property
    def kind(self) -> Any:
        """The operator: aten.conv2d, aten.linear, ..."""
        return policy.packet(self.node)

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for a linear layer."""
        at = {policy.aten.conv1d: 6, policy.aten.conv2d: 6, policy.aten.conv_transpose2d: 6}.get(self.kind)
        return int(self.node.args[at]) if at is not None and len(self.node.args) > at else 1


def fold(model: nn.Module, shape: tuple[int, ...]) -> GraphModule:
    """`model` as a flat graph with every batch norm folded into the convolution or linear layer before it.

    Jacob et al., 2018, eq. 14: w' = w * gamma / sigma, b' = beta + (b - mu) * gamma / sigma. `shape` is (C, H, W).
    `model` is not changed. Raises BadModel where the graph cannot be captured.
    """
    with quiet():
        from torchao.quantization.pt2e.utils import _fuse_conv_bn_, _fuse_linear_bn_

        graph = trace(copy.deepcopy(model), shape).module(check_guards=False)  # a trace shares its parameters
        _fuse_conv_bn_(graph)
        _fuse_linear_bn_(graph)
    _write_apart(graph)
    return graph


def _write_apart(graph: GraphModule) -> None:
    """In-place operators write to a tensor of their own, so that a kept value stays what it was."""
    for node in list(graph.graph.nodes):
        kind = policy.packet(node)
        name = str(getattr(kind, "__name__", ""))
        if not name.endswith("_") or name.startswith("_") or not hasattr(policy.aten, name[:-1]):
            continue
        node.target = getattr(getattr(policy.aten, name[:-1]), node.target._overloadname)
        written = node.args[0]
        written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)
    graph.recompile()


def layers(graph: GraphModule) -> tuple[Layer, ...]:
    """Every layer with a stored weight, in the order they run; works before and after observers are put in."""
    return tuple(_layers(graph))


def _layers(graph: GraphModule) -> Iterator[Layer]:
    for node in graph.graph.nodes:
        kind = policy.packet(node)
        if kind not in policy.COMPUTE:
            continue
        weight = stored(graph, node.args[1])
        bias = stored(graph, node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
        if weight is not None:
            yield Layer(layer_name(node), node, fused_after(node), weight, bias, policy.COMPUTE[kind])


def stored(graph: GraphModule, node: Any) -> str | None:
    """The attribute that `node` reads, seen through an observer; None where its value is computed."""
    while isinstance(node, Node) and observer(graph, node) is not None:
        node = node.args[0]
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None


def parameter(graph: GraphModule, name: str) -> Tensor:
    """The tensor of an attribute ("layer1.0.conv1.weight")."""
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part)
    return value


@torch.no_grad()
def overwrite(graph: GraphModule, name: str, value: Tensor) -> None:
    """Copy `value` into the tensor of an attribute; shapes must agree."""
    parameter(graph, name).copy_(value)


def layer_name(node: Node) -> str:
    """The module the node came from ("layer1.0.conv1"), or the node's own name in a flat graph."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [str(v[0]) for v in stack.values()]
    return path[-1] if path and path[-1] else node.name


def fused_after(node: Node) -> Node:
    """The clip that alone reads `node` and that every runtime folds into it; else `node`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and policy.packet(users[0]) in policy.FUSED else node


def observer(graph: GraphModule, node: Any) -> ActivationObserver | WeightObserver | None:
    """What sits at `node` of a prepared graph."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    found = graph.get_submodule(str(node.target))
    return found if isinstance(found, ActivationObserver | WeightObserver) else None


def weight_observer(graph: GraphModule, layer: Layer) -> WeightObserver | None:
    """What watches a layer's weight; None where the layer stays float."""
    found = observer(graph, layer.node.args[1])
    return found if isinstance(found, WeightObserver) else None


def input_observer(graph: GraphModule, layer: Layer) -> ActivationObserver | None:
    """What watches a layer's input."""
    found = observer(graph, layer.node.args[0])
    return found if isinstance(found, ActivationObserver) else None


def observers(graph: GraphModule) -> tuple[ActivationObserver | WeightObserver, ...]:
    """Every observer, once each (some are shared between tensors)."""
    found = (m for m in graph.modules() if isinstance(m, ActivationObserver | WeightObserver))
    return tuple(dict.fromkeys(found))
