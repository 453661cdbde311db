"""What sits on a tensor while the calibration images pass, and answers with its scale and zero point."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.observer import ObserverBase

from lighten.quant.ranges import METHODS, Grid, Histogram, Range, choose, weight_scales


class Watcher(ObserverBase):
    """What both kinds share: `stand_in` takes over what passes (rounding, learning); `pin` ends the choosing."""

    grid: Grid

    def __init__(self, dtype: torch.dtype, is_dynamic: bool) -> None:
        super().__init__(dtype, is_dynamic)
        self.stand_in: nn.Module | None = None
        self.pinned: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.watch(x) if self.stand_in is None else self.stand_in(x)

    @abstractmethod
    def watch(self, x: Tensor) -> Tensor:
        """Take note of what passes; gives it back."""

    @abstractmethod
    def decide(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, from what was seen."""

    def pin(self, scale: Tensor, zero: Tensor) -> None:
        """From now on these are the scale and zero point, whatever was seen."""
        self.pinned = scale.detach().float(), zero.detach().to(torch.int64)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), one value or one a channel."""
        return self.decide() if self.pinned is None else self.pinned

    def rounding(self) -> Round:
        """The module that rounds as the runtime will."""
        scale, zero = self.calculate_qparams()
        return Round(scale, zero, self.grid, getattr(self, "ch_axis", None))


class Round(nn.Module):
    """Quantize and dequantize; the gradient passes where the value is inside the range (straight through)."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, grid: Grid, axis: int | None) -> None:
        super().__init__()
        self.grid, self.axis = grid, axis
        self.register_buffer("scale", scale.reshape(-1) if axis is not None else scale.reshape(()))
        self.register_buffer("zero", zero.to(torch.int32).reshape(self.scale.shape))

    def forward(self, x: Tensor) -> Tensor:
        ends = self.grid.qmin, self.grid.qmax
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, *ends)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero, self.axis, *ends)


class ActivationObserver(Watcher):
    """Histogram of one activation tensor; the range is chosen when it is asked for."""

    def __init__(
        self,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        quant_min: int,
        quant_max: int,
        methods: tuple[str, ...] = METHODS,
        power_of_two: bool = False,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.qscheme, self.quant_min, self.quant_max, self.methods = qscheme, quant_min, quant_max, methods
        self.grid = Grid(quant_min, quant_max, qscheme == torch.per_tensor_symmetric, power_of_two)
        self.histogram = Histogram()
        self._chosen: Range | None = None

    def watch(self, x: Tensor) -> Tensor:
        self.histogram.add(x)
        self._chosen = None
        return x

    def chosen(self) -> Range:
        """The range with the smallest error so far."""
        if self._chosen is None:
            self._chosen = choose(self.histogram, self.grid, self.methods)
        return self._chosen

    def take(self, chosen: Range) -> None:
        """Use this range, found elsewhere."""
        self._chosen = chosen

    def decide(self) -> tuple[Tensor, Tensor]:
        got = self.chosen()
        return self.grid.qparams(torch.tensor([got.lo]), torch.tensor([got.hi]))


class WeightObserver(Watcher):
    """Keeps the weight it sees; one scale for all of it, or with `ch_axis` one for each output channel."""

    def __init__(
        self,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        quant_min: int,
        quant_max: int,
        ch_axis: int | None = None,
        methods: tuple[str, ...] = METHODS,
        power_of_two: bool = False,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.qscheme, self.quant_min, self.quant_max = qscheme, quant_min, quant_max
        self.ch_axis, self.methods = ch_axis, methods
        self.grid = Grid(quant_min, quant_max, symmetric=True, power_of_two=power_of_two)
        self.weight: Tensor | None = None
        self.least: Tensor | None = None
        self._qparams: tuple[Tensor, Tensor] | None = None

    def keep_above(self, least: Tensor) -> None:
        """Let no channel's scale fall under `least` (one value a channel)."""
        least = least.max().reshape(1) if self.ch_axis is None else least
        self.least = least if self.least is None else torch.maximum(self.least, least)
        self._qparams = None

    def watch(self, x: Tensor) -> Tensor:
        if self.weight is not x:
            self.weight, self._qparams = x, None
        return x

    def decide(self) -> tuple[Tensor, Tensor]:
        if self.weight is None:
            raise ValueError("saw no weight")
        if self._qparams is None:
            scale, zero = weight_scales(self.weight, self.ch_axis, self.grid, self.methods)
            self._qparams = (self._wide_enough(scale), zero)
        return self._qparams

    def _wide_enough(self, scale: Tensor) -> Tensor:
        if self.least is None:
            return scale
        least = (
            torch.exp2(torch.ceil(torch.log2(self.least.clamp(min=1e-30)))) if self.grid.power_of_two else self.least
        )
        return torch.maximum(scale, least)


class PerChannelWeightObserver(WeightObserver):
    """The same by another name: torchao hands `ch_axis` only to classes that are called PerChannel."""
