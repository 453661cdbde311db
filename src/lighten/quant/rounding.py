"""Rounding that is learned: each weight up or down, so that the outputs of a layer or a block stay what they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lighten.errors import BadConfig
from lighten.kit import checkpoint as checkpoint_of
from lighten.quant import graph as graphs
from lighten.quant.bias import scalable, with_biases
from lighten.quant.blocks import Block, before, blocks, run, section
from lighten.quant.graph import Layer
from lighten.quant.observers import ActivationObserver, Watcher, WeightObserver
from lighten.quant.plan import Plan
from lighten.quant.ranges import Grid
from lighten.types import digest, to_json

METHODS = ("nearest", "adaround", "brecq", "qdrop")
FINE = 255
"""Levels from which on an activation's rounding is left out while weights are learned."""
GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid (AdaRound, eq. 23)."""

Told = Callable[[str, int, int], None]
"""Called with (what, done, total) after steps of learning."""


@dataclass(frozen=True)
class Rounding:
    """How rounding is learned. `iterations` are those of one unit (a layer, or a block); `weight` is that of the term
    which drives each weight to up or down, relative to the error; `warmup` the share of steps before it sets in."""

    method: str = "brecq"
    iterations: int = 300
    batch: int = 32
    lr: float = 0.03
    lr_gain: float = 0.01
    weight: float = 0.02
    warmup: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadConfig(f"rounding is {self.method!r}.", f"Choose one of {', '.join(METHODS)}.")
        if self.iterations < 1 or self.batch < 1:
            raise BadConfig("rounding: iterations and batch must be 1 or more.")


class SoftRound(nn.Module):
    """A weight on the way to its grid: floor(w / s) + h(v), h between 0 (down) and 1 (up), times s and a gain.

    Nagel et al., 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", eqs. 22 and 23: h is a sigmoid
    stretched to [-0.1, 1.1] and clipped, started so that the weight is what it was. The `gain` of a channel, learned
    along, gives its output the strength back that rounding took; it costs nothing, since it ends in the scale.
    """

    def __init__(self, weight: Tensor, scale: Tensor, grid: Grid, axis: int | None) -> None:
        super().__init__()
        self.grid = grid
        shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
        self.register_buffer("scale", scale.reshape(shape))
        self.gain = nn.Parameter(torch.ones_like(self.scale))
        steps = weight.detach() / self.scale
        self.register_buffer("floor", torch.floor(steps))
        part = (steps - self.floor).clamp(1e-3, 1 - 1e-3)
        stretched = (part - GAMMA) / (ZETA - GAMMA)
        self.v = nn.Parameter(torch.log(stretched / (1 - stretched)))

    scale: Tensor
    floor: Tensor

    def up(self) -> Tensor:
        """h(v): how far each weight is rounded up."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return (self.floor + self.up()).clamp(self.grid.qmin, self.grid.qmax) * (self.scale * self.gain)

    def undecided(self, beta: float) -> Tensor:
        """Mean of 1 - |2h - 1|^beta (eq. 24): 0 when every weight is up or down."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).mean()

    def decided(self) -> tuple[Tensor, Tensor]:
        """The weight with each value on its grid, and the scale of that grid."""
        up = (self.up() >= 0.5).to(self.floor.dtype)
        scale = (self.scale * self.gain).detach()
        return (self.floor + up).clamp(self.grid.qmin, self.grid.qmax) * scale, scale.reshape(-1)


class Dropped(nn.Module):
    """Rounds each value of an activation with probability 1/2 (Wei et al., 2022, "QDrop", eq. 9): flatter minima.

    The coin tosses are read from one pool at a random place: tossing anew for every value costs more than a convolution.
    """

    def __init__(self, rounding: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.rounding, self.generator = rounding, generator
        self.pool = torch.empty(0, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.coins(x), x, self.rounding(x))

    def coins(self, x: Tensor) -> Tensor:
        spare = 65_536
        if self.pool.numel() < x.numel() + spare:
            self.pool = torch.rand(x.numel() + spare, generator=self.generator) < 0.5
        at = int(torch.randint(spare, (1,), generator=self.generator))
        return self.pool[at : at + x.numel()].view(x.shape)


def reconstruct(
    plan: Plan, images: Tensor, settings: Rounding, told: Told = lambda *_: None, checkpoint: Path | None = None
) -> None:
    """Learn the rounding of every quantized weight of a calibrated `plan` on `images` (N, C, H, W), no labels needed.

    "adaround" goes layer by layer (Nagel et al., 2020), "brecq" block by block (Li et al., 2021, "BRECQ: Pushing the
    Limit of Post-Training Quantization by Block Reconstruction"), "qdrop" as well, with activations rounded half of
    the time. Each unit sees what the rounded network before it gives and is fitted to what the float network gave.
    Biases, which have 32 bits, are learned along. At the end weights lie on their grids and scales are pinned.

    With `checkpoint` each finished unit is written, and the same call goes on from there; the result is the same.
    """
    if settings.method == "nearest":
        return
    _Reconstruction(plan, images, settings, told, checkpoint).run(images)


class _Reconstruction:
    """The state of one reconstruction: what the float and the rounded network give at the start of the block."""

    def __init__(self, plan: Plan, images: Tensor, settings: Rounding, told: Told, checkpoint: Path | None) -> None:
        self.graph, self.settings, self.told = plan.graph, settings, told
        self.real = with_biases(plan)
        self.blocks = blocks(plan.graph)
        self.units = sum(len(self._split(block)) for block in self.blocks)
        self.layers = tuple(layer for block in self.blocks for layer in block.layers)
        self.rounders: dict[Watcher, nn.Module] = {o: o.rounding() for o in graphs.observers(plan.graph)}
        self.now = dict(self.real)
        self.book = _Book.open(checkpoint, _mark(plan, images, settings))
        self.done = 0

    def run(self, images: Tensor) -> None:
        given_float = given = images
        for block in self.blocks:
            part = section(self.graph, block.start, block.end)
            for start, end, layers in self._split(block):
                self._unit(block.start, start, end, layers, given_float, given)
            given_float, given = self._float(part, given_float), self._rounded(part, given)
        self._finish()

    def _split(self, block: Block) -> list[tuple[Node, Node, tuple[Layer, ...]]]:
        """The units of a block: itself, or each of its layers."""
        quantized = tuple(la for la in block.layers if graphs.weight_observer(self.graph, la) is not None)
        if self.settings.method != "adaround":
            return [(block.start, block.end, quantized)] if quantized else []
        return [(before(self.graph, la), la.last, (la,)) for la in quantized]

    def _unit(
        self, first: Node, start: Node, end: Node, layers: tuple[Layer, ...], given_float: Tensor, given: Tensor
    ) -> None:
        name = layers[0].name if len(layers) == 1 else f"{layers[0].name} to {layers[-1].name}"
        if name not in self.book.units:
            if start is not first:
                lead = section(self.graph, first, start)
                given_float, given = self._float(lead, given_float), self._rounded(lead, given)
            part = section(self.graph, start, end)
            target = self._float(part, given_float)
            self.book.write(name, self._learn(name, part, layers, given_float, given, target))
        for layer in layers:
            found = self.book.units[name][layer.name]
            observer = self._weight_observer(layer)
            observer.pin(found["scale"], torch.zeros_like(found["scale"], dtype=torch.int64))
            self.rounders[observer] = observer.rounding()
            self.now |= {layer.weight: found["weight"]} | ({layer.bias: found["bias"]} if layer.bias else {})
        self.done += 1
        self.told(f"rounding {name}", self.done * self.settings.iterations, self.units * self.settings.iterations)

    def _learn(
        self,
        name: str,
        part: GraphModule,
        layers: tuple[Layer, ...],
        given_float: Tensor,
        given: Tensor,
        target: Tensor,
    ) -> dict[str, dict[str, Tensor]]:
        """Weights and biases of one unit that bring its outputs nearest to `target`."""
        s = self.settings
        generator = torch.Generator().manual_seed(s.seed * 100_003 + self.done)
        soft = {la: self._soften(la) for la in layers}
        drops = self._begin(part, soft, generator)
        biases = [self._bias(la).requires_grad_(True) for la in layers if la.bias]
        optimizer, schedule = self._optimizer(list(soft.values()), biases)
        power = float((target - target.mean()).square().mean().clamp(min=1e-12))
        for k in range(s.iterations):
            rows = torch.randint(len(given), (min(s.batch, len(given)),), generator=generator)
            x = given[rows]
            if drops:
                x = torch.where(drops[0].coins(x), x, given_float[rows])
            loss = (part(x) - target[rows]).square().mean() / power
            beta = _beta(k / s.iterations, s.warmup)
            if beta is not None:
                loss = loss + s.weight * sum((m.undecided(beta) for m in soft.values()), torch.zeros(()))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if k % 20 == 19:
                self.told(f"rounding {name}", self.done * s.iterations + k + 1, self.units * s.iterations)
        for b in biases:
            b.requires_grad_(False)
        return {la.name: self._decided(la, module) for la, module in soft.items()}

    def _optimizer(self, soft: list[SoftRound], biases: list[Tensor]) -> tuple[Any, Any]:
        """Adam for roundings, gains and biases (those at a rate relative to their size), falling along a cosine."""
        s = self.settings
        groups: list[dict[str, Any]] = [
            {"params": [m.v for m in soft], "lr": s.lr},
            {"params": [m.gain for m in soft], "lr": s.lr_gain},
        ]
        groups += [{"params": [b], "lr": s.lr_gain * max(float(b.detach().abs().mean()), 1e-3)} for b in biases]
        optimizer = torch.optim.Adam(groups)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _cosine(k / s.iterations, 1.0, 0.05))

    def _decided(self, layer: Layer, module: SoftRound) -> dict[str, Tensor]:
        weight, scale = module.decided()
        bias = {"bias": self._bias(layer).detach().clone()} if layer.bias else {}
        return {"weight": weight, "scale": scale, **bias}

    def _soften(self, layer: Layer) -> SoftRound:
        observer = self._weight_observer(layer)
        return SoftRound(self.real[layer.weight], observer.calculate_qparams()[0], observer.grid, observer.ch_axis)

    def _enter(self, rounded: bool, part: GraphModule, drop: torch.Generator | None = None) -> list[Dropped]:
        """Let the observers pass everything, or round; with `drop` activations are rounded half of the time."""
        drops = []
        inside = {m for m in part.modules() if isinstance(m, Watcher)}
        for observer, rounder in self.rounders.items():
            observer.stand_in = rounder if rounded else nn.Identity()
            if drop is not None and observer in inside and isinstance(observer, ActivationObserver):
                observer.stand_in = Dropped(rounder, drop)
                drops.append(observer.stand_in)
        self._write(self.now if rounded else self.real)
        return drops

    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            graphs.overwrite(self.graph, name, value)

    def _begin(self, part: GraphModule, soft: dict[Layer, SoftRound], generator: torch.Generator) -> list[Dropped]:
        """Let the weights of a unit be learned. Activations of 8 bits pass: their rounding costs time and tells
        nothing, beside weights of 4 bits (BRECQ learns weights with float activations, section 4)."""
        drops = self._enter(True, part, generator if self.settings.method == "qdrop" else None)
        for observer in {m for m in part.modules() if isinstance(m, ActivationObserver)}:
            if observer.quant_max - observer.quant_min >= FINE and not drops:
                observer.stand_in = nn.Identity()
        for layer, module in soft.items():
            self._weight_observer(layer).stand_in = module
            module.gain.requires_grad_(scalable(self.graph, layer))
        return drops

    def _float(self, part: GraphModule, x: Tensor) -> Tensor:
        self._enter(rounded=False, part=part)
        return run(part, x)

    def _rounded(self, part: GraphModule, x: Tensor) -> Tensor:
        self._enter(rounded=True, part=part)
        return run(part, x)

    def _finish(self) -> None:
        """Write weights and biases into the plan, whose observers watch again, with the weights' scales pinned."""
        self._write(self.now)
        for observer in self.rounders:
            observer.stand_in = None

    def _bias(self, layer: Layer) -> Tensor:
        assert layer.bias is not None
        return graphs.parameter(self.graph, layer.bias)

    def _weight_observer(self, layer: Layer) -> WeightObserver:
        found = graphs.weight_observer(self.graph, layer)
        assert found is not None
        return found


def _beta(progress: float, warmup: float, start: float = 20.0, end: float = 2.0) -> float | None:
    """The exponent of the term that decides, falling from `start` to `end` (AdaRound, section 4.1); None in warm-up."""
    if progress < warmup:
        return None
    return _cosine((progress - warmup) / (1 - warmup), start, end)


def _cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(progress * math.pi))


@dataclass
class _Book:
    """Finished units, on disk after each where a file is given. `mark` says which reconstruction they belong to."""

    file: Path | None
    mark: str
    units: dict[str, dict[str, dict[str, Tensor]]]

    @classmethod
    def open(cls, file: Path | None, mark: str) -> _Book:
        return cls(file, mark, (file and checkpoint_of.load(file, mark)) or {})

    def write(self, name: str, found: dict[str, dict[str, Tensor]]) -> None:
        self.units[name] = found
        if self.file is not None:
            checkpoint_of.save(self.file, self.mark, self.units)


def _mark(plan: Plan, images: Tensor, settings: Rounding) -> str:
    """What makes two reconstructions the same: settings, images, weights and their scales."""
    sums = [float(images.double().sum()), list(images.shape)]
    for layer in plan.layers:
        observer = graphs.weight_observer(plan.graph, layer)
        weight = graphs.parameter(plan.graph, layer.weight).detach().double()
        scale = observer.calculate_qparams()[0].double() if observer is not None else torch.zeros(1)
        sums.append([layer.name, float(weight.sum()), float((weight**2).sum()), float(scale.sum())])
    return digest([to_json(settings), sums])
