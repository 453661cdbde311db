"""Cutting a network into blocks: nothing is lost, nothing is run twice, each piece gives what the whole gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lighten.quant.blocks import before, blocks, run, section
from lighten.quant.graph import fold, layers
from lighten.quant.plan import calibrate, prepare
from lighten.types import Device, Precision
from nets import SHAPE, images, net

PLAIN = Device("plain", "plain", "plain", ("onnx",))
INT8 = Precision("int8", "int8")


class Forked(nn.Module):
    """A convolution, then two branches that are added: only the whole fork is a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, 1, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(self.b(x).relu() + self.c(x)).mean((2, 3))


@pytest.mark.parametrize("kind", ["small", "mobile"])
def test_every_layer_is_in_exactly_one_block(kind: str) -> None:
    graph = fold(net(kind), SHAPE)
    held = [layer.name for block in blocks(graph) for layer in block.layers]
    assert held == [layer.name for layer in layers(graph)]


@pytest.mark.parametrize("kind", ["small", "mobile"])
@pytest.mark.parametrize("observed", [False, True])
def test_the_blocks_one_after_another_give_what_the_network_gives(kind: str, observed: bool) -> None:
    graph = fold(net(kind), SHAPE)
    if observed:
        plan = prepare(graph, INT8, PLAIN)
        calibrate(plan, images(8, seed=1)[0].split(8))
        graph = plan.graph
    x, _ = images(6, seed=3)
    with torch.no_grad():
        wanted = net(kind)(x)
    found = blocks(graph)
    given = run(section(graph, next(iter(n for n in graph.graph.nodes if n.op == "placeholder")), found[0].start), x)
    for block in found:
        given = run(section(graph, block.start, block.end), given, batch=4)
    assert torch.allclose(given, wanted, atol=1e-4)


def test_a_fork_is_not_cut_open() -> None:
    found = blocks(fold(Forked().eval(), (3, 8, 8)), span=1)
    assert [[layer.name for layer in block.layers] for block in found] == [["a"], ["b", "c"], ["d"]]


def test_a_row_of_layers_is_taken_in_groups() -> None:
    row = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(5)), nn.Flatten()).eval()
    found = blocks(fold(row, (3, 4, 4)), span=2)
    assert [len(block.layers) for block in found] == [2, 2, 1]


def test_a_section_that_needs_a_second_tensor_is_refused() -> None:
    graph = fold(Forked().eval(), (3, 8, 8))
    by_name = {layer.name: layer for layer in layers(graph)}
    with pytest.raises(ValueError, match="alone"):
        section(graph, by_name["b"].last, by_name["d"].node)


def test_what_a_layer_reads_is_found_behind_its_observer() -> None:
    plan = prepare(fold(Forked().eval(), (3, 8, 8)), INT8, PLAIN)
    layer = {layer.name: layer for layer in plan.layers}["b"]
    assert before(plan.graph, layer).name == "conv2d"
