"""Static post-training quantization from start to end: which of the parts run, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lighten.errors import BadConfig, BadData
from lighten.quant import equalize
from lighten.quant import graph as graphs
from lighten.quant.bias import correct_analytic, correct_empirical, reestimate, simulated, with_biases
from lighten.quant.graph import fold, layers
from lighten.quant.observers import WeightObserver
from lighten.quant.plan import Plan, Quantized, calibrate, convert, prepare
from lighten.quant.range_search import search_ranges
from lighten.quant.ranges import ALL_METHODS, METHODS
from lighten.quant.rounding import Rounding, reconstruct
from lighten.types import Device, Precision

Told = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

RANGES = ("auto", *ALL_METHODS, "reconstruction")
BIASES = ("auto", "none", "analytic", "empirical", "reestimate")
FEWEST = 32
STATISTICS = 160
"""Images on which biases and scales are corrected; the rest (at most as many) judge whether that helped."""


@dataclass(frozen=True)
class Parts:
    """Which parts run. `bias` "auto" re-estimates means and spreads, and takes that back where it does not help. `ranges` "auto" takes for each tensor the method of least error; `split` is the share of outlier
    channels that are split in two; `rounding` None rounds to the nearest."""

    ranges: str = "auto"
    equalize: bool = False
    split: float = 0.0
    bias: str = "auto"
    rounding: Rounding | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise BadConfig(f"ranges is {self.ranges!r}.", f"Choose one of {', '.join(RANGES)}.")
        if self.bias not in BIASES:
            raise BadConfig(f"bias is {self.bias!r}.", f"Choose one of {', '.join(BIASES)}.")


def calibrated(
    model: nn.Module, images: Tensor, precision: Precision, device: Device, parts: Parts, told: Told = lambda *_: None
) -> Plan:
    """Fold, equalize, watch `images` (N, C, H, W) pass, choose ranges: a plan whose scales are decided."""
    check_images(images)
    graph = fold(model, tuple(images.shape[1:]))
    if parts.split:
        equalize.split_outliers(graph, parts.split)
    if parts.equalize:
        equalize.cross_layer(graph, images.split(parts.batch), device.per_channel_weights)
    plan = prepare(graph, precision, device, methods(parts.ranges))
    calibrate(plan, images.split(parts.batch), lambda done: told("calibrating", done, len(images)))
    if parts.ranges == "reconstruction":
        search_ranges(plan, images)
    return plan


def quantize(
    model: nn.Module,
    images: Tensor,
    precision: Precision,
    device: Device,
    parts: Parts,
    told: Told = lambda *_: None,
    checkpoint: Path | None = None,
) -> Quantized:
    """Everything, to integers. `model` is not changed; `checkpoint` keeps finished units of the learned rounding."""
    plan = calibrated(model, images, precision, device, parts, told)
    real = with_biases(plan)
    if parts.rounding is not None:
        reconstruct(plan, images, parts.rounding, told, checkpoint)
    correct(plan, model, images, real, parts)
    return convert(plan)


def correct(plan: Plan, model: nn.Module, images: Tensor, real: dict[str, Tensor], parts: Parts) -> None:
    """Correct biases and scales of a calibrated plan as `parts.bias` says; `real` are the parameters before rounding."""
    batches = images[:STATISTICS].split(parts.batch)
    if parts.bias == "analytic":
        correct_analytic(plan, model)
    elif parts.bias == "empirical":
        correct_empirical(plan, batches, real=real)
    elif parts.bias == "reestimate":
        reestimate(plan, batches, real=real)
    elif parts.bias == "auto" and len(images) >= FEWEST:
        _reestimate_where_it_helps(plan, images, real, parts.batch)


def _reestimate_where_it_helps(plan: Plan, images: Tensor, real: dict[str, Tensor], batch: int) -> None:
    """Re-estimate on some images; keep it where the answers on others come nearer to the float network's."""
    fit = min(STATISTICS, len(images) // 2)
    judge = images[fit : fit + STATISTICS]
    kept = _state(plan)
    _restore(plan, real, {})
    target = _answers(plan, judge, rounded=False)
    _restore(plan, *kept)
    before = float((_answers(plan, judge) - target).square().mean())
    reestimate(plan, images[:fit].split(batch), real=real)
    after = float((_answers(plan, judge) - target).square().mean())
    if not after < before:
        _restore(plan, *kept)


State = tuple[dict[str, Tensor], dict[WeightObserver, tuple[Tensor, Tensor] | None]]


def _state(plan: Plan) -> State:
    """Weights, biases and pinned scales, to come back to."""
    pins = {o: o.pinned for o in graphs.observers(plan.graph) if isinstance(o, WeightObserver)}
    return with_biases(plan), pins


def _restore(plan: Plan, values: dict[str, Tensor], pins: dict[WeightObserver, tuple[Tensor, Tensor] | None]) -> None:
    for name, value in values.items():
        graphs.overwrite(plan.graph, name, value)
    for observer, pinned in pins.items():
        observer.pinned = pinned


@torch.no_grad()
def _answers(plan: Plan, images: Tensor, rounded: bool = True) -> Tensor:
    """What the network answers with everything rounded, or with nothing."""
    with simulated(plan.graph):
        if not rounded:
            for observer in graphs.observers(plan.graph):
                observer.stand_in = nn.Identity()
        return torch.cat([plan.graph(x) for x in images.split(64)])


def methods(ranges: str) -> tuple[str, ...]:
    """The range methods that compete under a name."""
    return METHODS if ranges in ("auto", "reconstruction") else (ranges,)


def check_images(images: Tensor) -> None:
    """Raises BadData where there are none, or a value is NaN or infinite."""
    if not len(images):
        raise BadData("There are no calibration images.", "Give at least a few dozen.")
    bad = [k for k, image in enumerate(images) if not torch.isfinite(image).all()]
    if bad:
        raise BadData(
            f"The calibration images hold NaN or infinity ({len(bad)} images, the first is image {bad[0]}).",
            "Check the preprocessing.",
        )


def ends(model: nn.Module, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the first and the last layer, which are spared in low precisions: they see the image and the answer."""
    names = [layer.name for layer in layers(fold(model, shape))]
    return tuple(dict.fromkeys((names[0], names[-1]))) if names else ()
