"""Rounding that is learned: each weight up or down, so that the outputs of a layer or a block stay what they were."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lighten.data.cache import write_whole
from lighten.errors import BadConfig
from lighten.quant import graph as graphs
from lighten.quant.blocks import Block, before, blocks, run, section
from lighten.quant.graph import Layer
from lighten.quant.observers import ActivationObserver, Watcher, WeightObserver
from lighten.quant.plan import Plan
from lighten.quant.ranges import Grid
from lighten.types import digest, to_json

METHODS = ("nearest", "adaround", "brecq", "qdrop")
GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid (AdaRound, eq. 23)."""

Told = Callable[[str, int, int], None]
"""Called with (what, done, total) after steps of learning."""


@dataclass(frozen=True)
class Rounding:
    """How rounding is learned. `iterations` are those of one unit (a layer, or a block); `weight` is that of the term
    which drives each weight to up or down, relative to the error; `warmup` the share of steps before it sets in."""

    method: str = "brecq"
    iterations: int = 600
    batch: int = 32
    lr: float = 0.01
    lr_bias: float = 1e-3
    weight: float = 0.02
    warmup: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadConfig(f"rounding is {self.method!r}.", f"Choose one of {', '.join(METHODS)}.")
        if self.iterations < 1 or self.batch < 1:
            raise BadConfig("rounding: iterations and batch must be 1 or more.")


class SoftRound(nn.Module):
    """A weight on the way to its grid: floor(w / s) + h(v), h between 0 (down) and 1 (up).

    Nagel et al., 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", eqs. 22 and 23: h is a sigmoid
    stretched to [-0.1, 1.1] and clipped, started so that the weight is what it was.
    """

    def __init__(self, weight: Tensor, scale: Tensor, grid: Grid, axis: int | None) -> None:
        super().__init__()
        self.grid = grid
        shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
        self.register_buffer("scale", scale.reshape(shape))
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
        return (self.floor + self.up()).clamp(self.grid.qmin, self.grid.qmax) * self.scale

    def undecided(self, beta: float) -> Tensor:
        """Mean of 1 - |2h - 1|^beta (eq. 24): 0 when every weight is up or down."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).mean()

    def decided(self) -> Tensor:
        """The weight with each value on its grid."""
        up = (self.up() >= 0.5).to(self.floor.dtype)
        return (self.floor + up).clamp(self.grid.qmin, self.grid.qmax) * self.scale


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


@dataclass(frozen=True)
class Unit:
    """What is learned together: the layers between two tensors."""

    name: str
    graph: GraphModule
    layers: tuple[Layer, ...]


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
        self.blocks = blocks(plan.graph)
        self.units = sum(len(self._split(block)) for block in self.blocks)
        self.layers = tuple(layer for block in self.blocks for layer in block.layers)
        self.rounders: dict[Watcher, nn.Module] = {o: o.rounding() for o in graphs.observers(plan.graph)}
        self.float_bias = {la.name: self._bias(la).clone() for la in self.layers if la.bias}
        self.bias = {name: value.clone() for name, value in self.float_bias.items()}
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
            self.rounders[self._weight_observer(layer)] = Constant(found["weight"])
            if layer.bias:
                self.bias[layer.name] = found["bias"]
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
        drops = self._enter(rounded=True, part=part, generator=generator if s.method == "qdrop" else None)
        for layer, module in soft.items():
            self._weight_observer(layer).stand_in = module
        biases = [self._bias(la) for la in layers if la.bias]
        optimizer = torch.optim.Adam(
            [
                {"params": [m.v for m in soft.values()], "lr": s.lr},
                *({"params": [b], "lr": s.lr_bias * max(float(b.abs().mean()), 1e-3)} for b in biases),
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.iterations, eta_min=s.lr * 0.05)
        power = float((target - target.mean()).square().mean().clamp(min=1e-12))
        for b in biases:
            b.requires_grad_(True)
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
        found = {la.name: {"weight": m.decided().detach()} for la, m in soft.items()}
        for layer in layers:
            if layer.bias:
                found[layer.name]["bias"] = self._bias(layer).detach().clone()
        return found

    def _soften(self, layer: Layer) -> SoftRound:
        observer = self._weight_observer(layer)
        scale, _ = observer.calculate_qparams()
        weight = graphs.parameter(self.graph, layer.weight)
        return SoftRound(weight, scale, observer.grid, observer.ch_axis)

    def _enter(self, rounded: bool, part: GraphModule, generator: torch.Generator | None = None) -> list[Dropped]:
        """Let the observers pass everything, or round; with a generator activations are rounded half of the time."""
        drops = []
        inside = {m for m in part.modules() if isinstance(m, Watcher)}
        for observer, rounder in self.rounders.items():
            module = rounder if rounded else nn.Identity()
            if rounded and generator is not None and observer in inside and isinstance(observer, ActivationObserver):
                module = Dropped(rounder, generator)
                drops.append(module)
            observer.stand_in = module
        for layer in self.layers:
            if layer.bias:
                graphs.overwrite(self.graph, layer.bias, (self.bias if rounded else self.float_bias)[layer.name])
        return drops

    def _float(self, part: GraphModule, x: Tensor) -> Tensor:
        self._enter(rounded=False, part=part)
        return run(part, x)

    def _rounded(self, part: GraphModule, x: Tensor) -> Tensor:
        self._enter(rounded=True, part=part)
        return run(part, x)

    def _finish(self) -> None:
        """Write weights and biases into the plan; the observers see them once, with their scales pinned."""
        for layer in self.layers:
            if layer.bias:
                graphs.overwrite(self.graph, layer.bias, self.bias[layer.name])
            observer = graphs.weight_observer(self.graph, layer)
            if observer is not None:
                observer.pin(*observer.calculate_qparams())
                rounder = self.rounders[observer]
                if isinstance(rounder, Constant):
                    graphs.overwrite(self.graph, layer.weight, rounder.value)
        for observer in self.rounders:
            observer.stand_in = None

    def _bias(self, layer: Layer) -> Tensor:
        assert layer.bias is not None
        return graphs.parameter(self.graph, layer.bias)

    def _weight_observer(self, layer: Layer) -> WeightObserver:
        found = graphs.weight_observer(self.graph, layer)
        assert found is not None
        return found


class Constant(nn.Module):
    """Stands for a weight that is decided."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def _beta(progress: float, warmup: float, start: float = 20.0, end: float = 2.0) -> float | None:
    """The exponent of the term that decides, falling from `start` to `end` (AdaRound, section 4.1); None in warm-up."""
    if progress < warmup:
        return None
    share = (progress - warmup) / (1 - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(share * math.pi))


@dataclass
class _Book:
    """Finished units, on disk after each where a file is given. `mark` says which reconstruction they belong to."""

    file: Path | None
    mark: str
    units: dict[str, dict[str, dict[str, Tensor]]]

    @classmethod
    def open(cls, file: Path | None, mark: str) -> _Book:
        book = cls(file, mark, {})
        if file is not None and file.exists():
            kept = torch.load(file, weights_only=True)
            book.units = kept["units"] if kept["mark"] == mark else {}
        return book

    def write(self, name: str, found: dict[str, dict[str, Tensor]]) -> None:
        self.units[name] = found
        if self.file is not None:
            buffer = io.BytesIO()
            torch.save({"mark": self.mark, "units": self.units}, buffer)
            write_whole(self.file, buffer.getvalue())


def _mark(plan: Plan, images: Tensor, settings: Rounding) -> str:
    """What makes two reconstructions the same: settings, images, weights and their scales."""
    sums = [float(images.double().sum()), list(images.shape)]
    for layer in plan.layers:
        observer = graphs.weight_observer(plan.graph, layer)
        weight = graphs.parameter(plan.graph, layer.weight).detach().double()
        scale = observer.calculate_qparams()[0].double() if observer is not None else torch.zeros(1)
        sums.append([layer.name, float(weight.sum()), float((weight**2).sum()), float(scale.sum())])
    return digest([to_json(settings), sums])
