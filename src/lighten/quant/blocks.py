"""Where a network can be cut in pieces that are seen through one tensor in and one out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lighten.quant.graph import Layer, layers, observer

SPAN = 3
"""Layers in a row are taken together up to this many: an inverted residual has three."""


@dataclass(frozen=True)
class Block:
    """The nodes after `start` up to `end`, the only tensors that pass in and out; the layers between, in order."""

    start: Node
    end: Node
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """First and last layer."""
        first, last = self.layers[0].name, self.layers[-1].name
        return first if first == last else f"{first} to {last}"


def blocks(graph: GraphModule, span: int = SPAN) -> tuple[Block, ...]:
    """The network as a chain of blocks (residual blocks whole, plain rows of layers in groups of up to `span`).

    Li et al., 2021, "BRECQ", section 3.2: the block is the unit whose inner layers depend on each other most. A cut is
    a node after which nothing else is still to be read; observers behind it belong to the block that reads them.
    """
    found = {layer.node: layer for layer in layers(graph)}
    groups: list[tuple[Node, Node, list[Layer]]] = []
    cuts = _cuts(graph)
    for start, end, inside in _segments(graph, cuts):
        held = [found[n] for n in inside if n in found]
        if not groups or (held and not _joins(groups[-1][2], held, span)):
            groups.append((groups[-1][1] if groups else start, end, held))
        else:
            first, _, before = groups[-1]
            groups[-1] = (first, end, [*before, *held])
    return tuple(Block(start, end, tuple(held)) for start, end, held in groups if held)


def _joins(before: list[Layer], held: list[Layer], span: int) -> bool:
    return not before or (len(held) == 1 and len(before) < span)


def _segments(graph: GraphModule, cuts: list[Node]) -> list[tuple[Node, Node, list[Node]]]:
    order = list(graph.graph.nodes)
    place = {node: k for k, node in enumerate(order)}
    return [(a, b, order[place[a] + 1 : place[b] + 1]) for a, b in itertools.pairwise(cuts)]


def _cuts(graph: GraphModule) -> list[Node]:
    """The input, then every node (no observer) after which it is the only value of the image that is still read."""
    data = _depends_on_input(graph)
    place = {node: k for k, node in enumerate(graph.graph.nodes)}
    until = {n: max((place[u] for u in n.users), default=place[n]) for n in data}
    cuts: list[Node] = []
    live: set[Node] = set()
    for node in data:
        live = {n for n in live if until[n] > place[node]} | {node}
        if live == {node} and node.op != "output" and observer(graph, node) is None:
            cuts.append(node)
    return cuts


def _depends_on_input(graph: GraphModule) -> list[Node]:
    """Nodes whose value is another for every image, in order."""
    found: dict[Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found[node] = None
    return list(found)


def section(graph: GraphModule, start: Node, end: Node) -> GraphModule:
    """The part of `graph` that makes `end` from `start` alone; weights and observers are shared, not copied.

    Raises ValueError where `end` needs another tensor of the image too.
    """
    needed, todo = set(), [end]
    while todo:
        node = todo.pop()
        if node in needed or node is start:
            continue
        if node.op == "placeholder":
            raise ValueError(f"{end} is not made from {start} alone")
        needed.add(node)
        todo += node.all_input_nodes
    part = Graph()
    copied = {start: part.placeholder("x")}
    for node in graph.graph.nodes:
        if node in needed:
            copied[node] = part.node_copy(node, lambda n: copied[n])
    part.output(copied[end])
    return GraphModule(graph, part)


def before(graph: GraphModule, layer: Layer) -> Node:
    """The node that a layer reads, seen through the observer of its input."""
    node = layer.node.args[0]
    while isinstance(node, Node) and observer(graph, node) is not None:
        node = node.args[0]
    assert isinstance(node, Node)
    return node


@torch.no_grad()
def run(part: GraphModule, x: Tensor, batch: int = 64) -> Tensor:
    """What a section makes of `x`, some images at a time."""
    return torch.cat([part(rows) for rows in x.split(batch)])
