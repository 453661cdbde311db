"""Ranges: from what a tensor held to the scale and zero point that lose least of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 2048
METHODS = ("min-max", "percentile", "mse")
"""The methods that compete by their squared error; the others are for those who ask for one of them."""
ALL_METHODS = (*METHODS, "moving-average", "entropy")
PERCENTILES = (99.999, 99.99, 99.9)
SMALLEST_SCALE = 1e-10
AVERAGE_KEEPS = 0.9
UNSEEN = 1e-4


@dataclass(frozen=True)
class Grid:
    """The integers qmin..qmax; symmetric grids have their zero point in the middle."""

    qmin: int
    qmax: int
    symmetric: bool = False
    power_of_two: bool = False

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64) that cover [lo, hi] and represent 0 exactly.

        Jacob et al., 2018, "Quantization and Training of Neural Networks", section 2: x = scale * (q - zero_point).
        The range is widened to hold 0. Works elementwise for per-channel bounds. With `power_of_two` the scale is the
        next power of two that covers the range: kernels that only shift cannot multiply by anything else.
        """
        lo, hi = lo.double().clamp(max=0), hi.double().clamp(min=0)
        if self.symmetric:
            reach = torch.maximum(-lo, hi)
            middle = (self.qmin + self.qmax + 1) // 2
            scale = self._allowed(reach / min(self.qmax - middle, middle - self.qmin))
            return scale.float(), torch.full_like(scale, middle, dtype=torch.int64)
        scale = self._allowed((hi - lo) / (self.qmax - self.qmin))
        zero = (self.qmin - torch.round(lo / scale)).clamp(self.qmin, self.qmax)
        return scale.float(), zero.to(torch.int64)

    def _allowed(self, scale: Tensor) -> Tensor:
        scale = scale.clamp(min=SMALLEST_SCALE)
        return torch.exp2(torch.ceil(torch.log2(scale) - 1e-9)) if self.power_of_two else scale

    def fake(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """`x` rounded to the grid and back. Ties go to even, as in ONNX's QuantizeLinear."""
        q = torch.round(x / scale) + zero
        return (q.clamp(self.qmin, self.qmax) - zero) * scale


@dataclass(frozen=True)
class Range:
    """A chosen interval, the method that gave it, and the mean squared error it causes."""

    lo: float
    hi: float
    method: str
    error: float


class Histogram:
    """Counts of a tensor's values, in one pass: the bins double in width when a value falls outside.

    Merging two neighbours loses nothing but resolution, so no value is ever clipped away before a range is chosen.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.lo = self.hi = 0.0
        self.smallest, self.largest = float("inf"), float("-inf")
        self.average_lo = self.average_hi = 0.0
        self.seen = 0

    def add(self, x: Tensor) -> None:
        """Count the values of `x`. Raises ValueError on NaN or infinity."""
        x = x.detach().float().reshape(-1)
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):  # NaN compares false as well
            raise ValueError("holds NaN or infinity")
        self.smallest, self.largest = min(self.smallest, low), max(self.largest, high)
        keep = AVERAGE_KEEPS if self.seen else 0.0
        self.average_lo = keep * self.average_lo + (1 - keep) * low
        self.average_hi = keep * self.average_hi + (1 - keep) * high
        if self.seen == 0:
            width = max(high - low, abs(high), abs(low), 1e-8) if high == low else high - low
            self.lo, self.hi = low, low + width
        self._stretch(low, high)
        self.counts += torch.histc(x, self.bins, self.lo, self.hi).double()
        self.seen += x.numel()

    def _stretch(self, low: float, high: float) -> None:
        half = self.bins // 2
        while high > self.hi:
            merged = self.counts.reshape(half, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros(half, dtype=torch.float64)])
            self.hi = self.lo + 2 * (self.hi - self.lo)
        while low < self.lo:
            merged = self.counts.reshape(half, 2).sum(1)
            self.counts = torch.cat([torch.zeros(half, dtype=torch.float64), merged])
            self.lo = self.hi - 2 * (self.hi - self.lo)

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, float64."""
        width = (self.hi - self.lo) / self.bins
        return self.lo + width * (torch.arange(self.bins, dtype=torch.float64) + 0.5)

    @property
    def power(self) -> float:
        """Mean square of the values."""
        return float((self.counts * self.centres**2).sum() / self.counts.sum().clamp(min=1))


def min_max(h: Histogram) -> tuple[float, float]:
    """All that was seen."""
    return h.smallest, h.largest


def moving_average(h: Histogram) -> tuple[float, float]:
    """Ends of each batch, averaged exponentially (Jacob et al., 2018, section 3.1): one odd batch moves them little."""
    return h.average_lo, h.average_hi


def entropy(h: Histogram, grid: Grid, steps: int = 80) -> tuple[float, float]:
    """The interval whose rounded values have the distribution nearest to the real one, by Kullback-Leibler divergence.

    Migacz, 2017, "8-bit Inference with TensorRT": what is clipped is counted at the edge in the reference, and each
    rounded value's mass is spread over the bins it came from that were not empty. Both ends shrink together.
    """
    lo, hi = torch.tensor(min_max(h), dtype=torch.float64)
    candidates = [(float(lo * f), float(hi * f)) for f in torch.linspace(1.0, 0.2, steps, dtype=torch.float64)]
    return min(candidates, key=lambda ends: divergence(h, ends[0], ends[1], grid))


def divergence(h: Histogram, lo: float, hi: float, grid: Grid) -> float:
    """KL(real || rounded) in nats of the values clipped to [lo, hi].

    An edge bin that held nothing but takes the clipped mass would make it infinite: it counts as UNSEEN of the whole.
    """
    x = h.centres
    inside = (x >= lo) & (x <= hi)
    if not bool(inside.any()):
        return float("inf")
    kept = h.counts[inside]
    reference = kept.clone()
    reference[0] += h.counts[x < lo].sum()
    reference[-1] += h.counts[x > hi].sum()
    scale, zero = grid.qparams(torch.tensor(lo), torch.tensor(hi))
    level = (torch.round(x[inside] / scale.double()) + zero).clamp(grid.qmin, grid.qmax).long() - grid.qmin
    levels = grid.qmax - grid.qmin + 1
    used = (kept > 0).double()
    mass, bins = torch.bincount(level, kept, levels), torch.bincount(level, used, levels)
    spread = torch.where(used > 0, mass[level] / bins[level].clamp(min=1), 0.0)
    p, q = reference / reference.sum(), spread / spread.sum().clamp(min=1e-300)
    real = p > 0
    q = torch.where(real & (q == 0), UNSEEN, q)
    q = q / q.sum()
    return float((p[real] * torch.log(p[real] / q[real])).sum())


def percentile(h: Histogram, percent: float) -> tuple[float, float]:
    """The interval that leaves (100 - percent) / 2 % of the values out on each side (all of it, on a side without
    negative or positive values)."""
    share = torch.cumsum(h.counts, 0) / h.counts.sum()
    tail = (1 - percent / 100) / (2 if h.smallest < 0 < h.largest else 1)
    edges = torch.linspace(h.lo, h.hi, h.bins + 1, dtype=torch.float64)
    first = int(torch.searchsorted(share, torch.tensor(tail, dtype=torch.float64), right=True))
    last = int(torch.searchsorted(share, torch.tensor(1 - tail, dtype=torch.float64)))
    lo = h.smallest if h.smallest >= 0 else float(edges[min(first, h.bins - 1)])
    hi = h.largest if h.largest <= 0 else float(edges[min(last + 1, h.bins)])
    return max(lo, h.smallest), min(hi, h.largest)


def errors(h: Histogram, lo: Tensor, hi: Tensor, grid: Grid) -> Tensor:
    """Mean squared error of each candidate interval (K,), over the histogram; clipping and rounding both count."""
    scale, zero = grid.qparams(lo, hi)
    used = h.counts > 0
    x, weight = h.centres[used], h.counts[used] / h.counts.sum()
    rounded = grid.fake(x[None], scale.double()[:, None], zero[:, None])
    return ((rounded - x[None]) ** 2 * weight[None]).sum(1)


def least_squares(h: Histogram, grid: Grid, steps: int = 80) -> tuple[float, float]:
    """The interval of least mean squared error: both ends shrunk together, then each on its own.

    Banner et al., 2019, "Post training 4-bit quantization", derive this optimum for known distributions; on a
    histogram it is found by search (as in Nagel et al., 2021, "A White Paper on NN Quantization", section 3.1).
    """
    fractions = torch.linspace(1.0, 0.2, steps, dtype=torch.float64)
    lo, hi = torch.tensor(min_max(h), dtype=torch.float64)
    for moved in ("both", "hi", "lo"):
        los = lo * fractions if moved in ("both", "lo") else lo.expand(steps)
        his = hi * fractions if moved in ("both", "hi") else hi.expand(steps)
        best = int(errors(h, los, his, grid).argmin())
        lo, hi = los[best], his[best]
    return float(lo), float(hi)


def choose(h: Histogram, grid: Grid, methods: Iterable[str] = METHODS) -> Range:
    """The candidate with the smallest error; on a tie, the simplest (the order of METHODS). Raises ValueError when
    nothing was seen, or on an unknown method."""
    if h.seen == 0:
        raise ValueError("saw no values")
    candidates: list[tuple[str, float, float]] = []
    for method in methods:
        if method == "min-max":
            candidates.append((method, *min_max(h)))
        elif method == "percentile":
            candidates += [(f"percentile {p}", *percentile(h, p)) for p in PERCENTILES]
        elif method == "mse":
            candidates.append((method, *least_squares(h, grid)))
        elif method == "moving-average":
            candidates.append((method, *moving_average(h)))
        elif method == "entropy":
            candidates.append((method, *entropy(h, grid)))
        else:
            raise ValueError(f"unknown range method {method!r}; known: {', '.join(ALL_METHODS)}")
    lo, hi = (torch.tensor([c[k] for c in candidates], dtype=torch.float64) for k in (1, 2))
    loss = errors(h, lo, hi, grid)
    best = int(loss.argmin())
    return Range(candidates[best][1], candidates[best][2], candidates[best][0], float(loss[best]))


def weight_scales(
    weight: Tensor, axis: int | None, grid: Grid, methods: Iterable[str] = METHODS, steps: int = 41
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each slice along `axis` (of the whole tensor where it is None).

    With "mse" each channel's range is shrunk by up to half where that lowers its squared error; else min-max.
    """
    rows = weight.detach().reshape(1, -1) if axis is None else weight.detach().movedim(axis, 0).flatten(1)
    rows = rows.float()
    lo, hi = rows.amin(1), rows.amax(1)
    best_scale, zero = grid.qparams(lo, hi)
    if "mse" not in tuple(methods):
        return best_scale, zero
    least = ((grid.fake(rows, best_scale[:, None], zero[:, None]) - rows) ** 2).sum(1)
    for fraction in torch.linspace(0.98, 0.5, steps - 1):
        scale, z = grid.qparams(lo * fraction, hi * fraction)
        loss = ((grid.fake(rows, scale[:, None], z[:, None]) - rows) ** 2).sum(1)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, zero = torch.where(better, scale, best_scale), torch.where(better, z, zero)
    return best_scale, zero


def signal_to_noise(signal: Tensor, changed: Tensor) -> float:
    """10 log10 of signal power over noise power, in dB; infinite where nothing changed."""
    noise = float(((signal.double() - changed.double()) ** 2).sum())
    return float("inf") if noise == 0 else float(10 * torch.log10((signal.double() ** 2).sum() / noise))
