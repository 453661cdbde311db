"""Activation ranges by what they do to the layer that reads them, not to the tensor itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lighten.quant import graph as graphs
from lighten.quant.blocks import before, blocks, run, section
from lighten.quant.observers import ActivationObserver, Round
from lighten.quant.plan import Plan
from lighten.quant.ranges import METHODS, Range, choose, errors, min_max

IMAGES = 64
FRACTIONS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""How far the range of all that was seen is shrunk, beside what each range method proposes."""


def search_ranges(plan: Plan, images: Tensor) -> None:
    """Choose each layer's input range by the squared error of that layer's own float output (local reconstruction).

    Nagel et al., 2021, "A White Paper on Neural Network Quantization", section 3.1, with the loss taken behind the
    layer: an input that meets small weights may be clipped, one that meets large ones may not. `plan` is calibrated;
    of `images` (N, C, H, W) the first 64 are used. Where several layers read one tensor, the first decides.
    """
    for each in graphs.observers(plan.graph):
        each.stand_in = nn.Identity()
    decided: set[ActivationObserver] = set()
    given = images[:IMAGES]
    for block in blocks(plan.graph):
        for layer in block.layers:
            observer = graphs.input_observer(plan.graph, layer)
            if observer is None or observer in decided:
                continue
            start = before(plan.graph, layer)
            x = given if start is block.start else run(section(plan.graph, block.start, start), given)
            _decide(observer, section(plan.graph, start, layer.last), x)
            decided.add(observer)
        given = run(section(plan.graph, block.start, block.end), given)
    for each in graphs.observers(plan.graph):
        each.stand_in = None


def _decide(observer: ActivationObserver, part: GraphModule, x: Tensor) -> None:
    """Take the candidate whose rounding changes the output of `part` least; on a tie the first."""
    target = run(part, x)
    scored = []
    for one in _candidates(observer):
        scale, zero = observer.grid.qparams(torch.tensor([one.lo]), torch.tensor([one.hi]))
        observer.stand_in = Round(scale, zero, observer.grid, None)
        scored.append((float((run(part, x) - target).double().square().mean()), one))
    best = min(scored, key=lambda pair: pair[0])[1]
    ends = torch.tensor([best.lo], dtype=torch.float64), torch.tensor([best.hi], dtype=torch.float64)
    error = float(errors(observer.histogram, *ends, observer.grid)[0])
    observer.take(Range(best.lo, best.hi, f"reconstruction ({best.method})", error))
    observer.stand_in = nn.Identity()


def _candidates(observer: ActivationObserver) -> Iterator[Range]:
    for method in METHODS:
        yield choose(observer.histogram, observer.grid, (method,))
    lo, hi = min_max(observer.histogram)
    for fraction in FRACTIONS:
        yield Range(lo * fraction, hi * fraction, f"{fraction:g} of the range", float("nan"))
