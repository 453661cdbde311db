"""Scales, zero points and ranges against numpy in float64 and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lighten.quant.ranges import (
    ALL_METHODS,
    PERCENTILES,
    Grid,
    Histogram,
    choose,
    divergence,
    least_squares,
    min_max,
    percentile,
    signal_to_noise,
    weight_scales,
)

torch.set_num_threads(1)
INT8 = Grid(-128, 127)
UINT8 = Grid(0, 255)
SYMMETRIC = Grid(-128, 127, symmetric=True)
WEIGHTS = Grid(-127, 127, symmetric=True)
SEVEN = Grid(-63, 63, symmetric=True)
INT4 = Grid(-8, 7)
GRIDS = {"int8": INT8, "uint8": UINT8, "symmetric": SYMMETRIC, "weights": WEIGHTS, "7 bit": SEVEN, "int4": INT4}
INTERVALS = {
    "both sides": (-1.5, 3.25), "positive": (0.5, 6.0), "negative": (-9.0, -2.0), "constant": (2.0, 2.0),
    "constant below": (-2.0, -2.0), "zero": (0.0, 0.0), "tiny": (-1e-6, 2e-6), "huge": (-3e6, 1e6), "lopsided": (-1e-3, 700.0),
}  # fmt: skip


def qparams(lo: float, hi: float, grid: Grid) -> tuple[float, int]:
    """The formulas of Jacob et al. (2018), written down again."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if grid.symmetric:
        return max(-lo, hi, 0.0) / grid.qmax, 0
    scale = (hi - lo) / (grid.qmax - grid.qmin)
    return scale, (grid.qmin if scale == 0 else int(np.clip(np.rint(grid.qmin - lo / scale), grid.qmin, grid.qmax)))


def rounded(x: np.ndarray, scale: float, zero: int, grid: Grid) -> np.ndarray:
    """To the grid and back, in float64."""
    return (np.clip(np.rint(x / scale) + zero, grid.qmin, grid.qmax) - zero) * scale


def mse(x: np.ndarray, lo: float, hi: float, grid: Grid) -> float:
    """Of the values themselves, not of a histogram."""
    scale, zero = qparams(lo, hi, grid)
    return float(((rounded(x, max(scale, 1e-10), zero, grid) - x) ** 2).mean())


def data(kind: str, n: int = 20_000) -> np.ndarray:
    dice = np.random.default_rng(0)
    values = {
        "gaussian": lambda: dice.normal(0.3, 1, n),
        "laplace": lambda: dice.laplace(0, 1, n),
        "outliers": lambda: np.concatenate([dice.normal(0, 1, n), [60.0, -25.0, 80.0]]),
        "relu": lambda: np.maximum(dice.normal(0, 1, n), 0),
        "negative": lambda: -np.abs(dice.normal(2, 1, n)),
        "two values": lambda: dice.choice([0.0, 5.0], n),
        "uniform": lambda: dice.uniform(-1, 1, n),
    }[kind]()
    return values.astype(np.float32).astype(np.float64)


KINDS = ("gaussian", "laplace", "outliers", "relu", "negative", "two values", "uniform")


def histogram(x: np.ndarray, parts: int = 1) -> Histogram:
    h = Histogram()
    for part in np.array_split(x, parts):
        h.add(torch.from_numpy(part.astype(np.float32)))
    return h


# --- grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", GRIDS)
def test_scale_and_zero_point_are_the_formulas(name: str, interval: str) -> None:
    grid, (lo, hi) = GRIDS[name], INTERVALS[interval]
    scale, zero = grid.qparams(torch.tensor(lo, dtype=torch.float64), torch.tensor(hi, dtype=torch.float64))
    want_scale, want_zero = qparams(lo, hi, grid)
    assert scale.dtype == torch.float32
    assert zero.dtype == torch.int64
    assert float(scale) == pytest.approx(max(want_scale, 1e-10), rel=1e-6)
    assert int(zero) == want_zero


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", GRIDS)
def test_zero_is_always_exact_and_the_ends_within_a_step(name: str, interval: str) -> None:
    grid, (lo, hi) = GRIDS[name], INTERVALS[interval]
    scale, zero = grid.qparams(torch.tensor(lo), torch.tensor(hi))
    assert grid.qmin <= int(zero) <= grid.qmax
    x = torch.tensor([0.0, lo, hi])
    got = grid.fake(x, scale, zero)
    assert float(got[0]) == 0.0
    np.testing.assert_allclose(got.numpy(), x.numpy(), atol=float(scale) * 0.501, rtol=1e-5)


def test_qparams_work_on_each_channel_apart() -> None:
    lo, hi = torch.tensor([-1.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 3.0, 0.0])
    scale, zero = INT8.qparams(lo, hi)
    for k in range(4):
        want_scale, want_zero = qparams(float(lo[k]), float(hi[k]), INT8)
        assert float(scale[k]) == pytest.approx(max(want_scale, 1e-10), rel=1e-6)
        assert int(zero[k]) == want_zero


def test_fake_rounds_ties_to_even_and_clips() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1000.0, -1000.0])
    got = INT8.fake(x, torch.tensor(1.0), torch.tensor(3))
    assert got.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, 124.0, -131.0]


# --- histogram ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_counts_are_numpys(kind: str) -> None:
    x = data(kind)
    h = histogram(x)
    want, _ = np.histogram(x.astype(np.float32), bins=h.bins, range=(h.lo, h.hi))
    got = h.counts.numpy()
    assert got.sum() == len(x)
    # A value on the edge between two bins may go to either in float32.
    assert np.abs(np.cumsum(got) - np.cumsum(want)).max() <= 0.001 * len(x) + 5
    assert (h.smallest, h.largest) == (x.min(), x.max())


@pytest.mark.parametrize("kind", KINDS)
def test_growing_on_both_sides_loses_no_count(kind: str) -> None:
    x = np.sort(data(kind))
    middle = len(x) // 2
    batches = [x[middle - 50 : middle + 50], x[middle + 50 : middle + 500], x[: middle - 50], x[middle + 500 :]]
    h = Histogram()
    for part in batches:
        h.add(torch.from_numpy(part.astype(np.float32)))
    assert h.seen == len(x)
    assert float(h.counts.sum()) == len(x)
    assert h.lo <= x.min()
    assert h.hi >= x.max()
    assert (h.smallest, h.largest) == (x.min(), x.max())
    edges = h.lo + (h.hi - h.lo) / h.bins * np.arange(1, h.bins)
    below = np.searchsorted(x, edges)
    got = np.cumsum(h.counts.numpy())[:-1]
    width = (h.hi - h.lo) / h.bins
    near = np.searchsorted(x, edges + width) - np.searchsorted(x, edges - width)
    assert (np.abs(got - below) <= near + 1).all()  # no value further off than its neighbouring bin


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-12, -1e30])
def test_constant_then_other_values(value: float) -> None:
    h = Histogram()
    h.add(torch.full((10,), value))
    assert float(h.counts.sum()) == 10
    h.add(torch.tensor([value - 1, value + 1]))
    assert float(h.counts.sum()) == 12


def test_empty_tensors_change_nothing() -> None:
    h = Histogram()
    h.add(torch.zeros(0))
    assert h.seen == 0
    with pytest.raises(ValueError, match="no values"):
        choose(h, INT8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 57, 99])
def test_nan_and_infinity_are_refused_wherever_they_stand(bad: float, at: int) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    x[at] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        Histogram().add(x)


def test_power_is_the_mean_square() -> None:
    x = data("gaussian")
    assert histogram(x).power == pytest.approx(float((x**2).mean()), rel=1e-4)


# --- ranges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_min_max_is_exact_whatever_the_batches(kind: str) -> None:
    x = data(kind)
    assert min_max(histogram(x, 7)) == (x.min(), x.max())


@pytest.mark.parametrize("percent", PERCENTILES)
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform", "relu"])
def test_percentile_is_numpys_within_a_bin(kind: str, percent: float) -> None:
    x = data(kind, 200_000)
    h = histogram(x)
    lo, hi = percentile(h, percent)
    tail = (100 - percent) / (2 if x.min() < 0 < x.max() else 1)
    bins = 2 * (h.hi - h.lo) / h.bins
    assert x.min() <= lo < hi <= x.max()
    ordered = np.sort(x)
    for got, q in ((lo, tail), (hi, 100 - tail)):
        if (q < 50 and x.min() >= 0) or (q > 50 and x.max() <= 0):
            continue
        # In the tail values lie far apart: the answer is between the neighbours of numpy's.
        at = q / 100 * len(x)
        low, high = ordered[max(0, int(at) - 2)], ordered[min(len(x) - 1, int(at) + 2)]
        assert low - bins <= got <= high + bins


@pytest.mark.parametrize("grid", [INT8, SYMMETRIC, INT4], ids=["int8", "symmetric", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_finds_what_brute_force_finds(kind: str, grid: Grid) -> None:
    x = data(kind, 4000)
    lo, hi = least_squares(histogram(x), grid)
    fractions = np.linspace(1, 0.02, 60)
    best = min(mse(x, x.min() * a, x.max() * b, grid) for a in fractions for b in fractions)
    assert x.min() <= lo <= hi <= max(x.max(), 0)
    assert mse(x, lo, hi, grid) <= 1.15 * best + 1e-12


@pytest.mark.parametrize("grid", [INT8, SYMMETRIC, INT4], ids=["int8", "symmetric", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_choose_is_never_worse_than_min_max_on_the_values_themselves(kind: str, grid: Grid) -> None:
    x = data(kind)
    found = choose(histogram(x, 5), grid)
    plain = mse(x, x.min(), x.max(), grid)
    assert mse(x, found.lo, found.hi, grid) <= plain * 1.02 + 1e-15


@pytest.mark.parametrize("grid", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_choose_takes_the_candidate_of_smallest_true_error(kind: str, grid: Grid) -> None:
    x = data(kind)
    h = histogram(x, 5)
    ranges = [min_max(h), least_squares(h, grid), *(percentile(h, p) for p in PERCENTILES)]
    found = choose(h, grid)
    assert mse(x, found.lo, found.hi, grid) <= 1.02 * min(mse(x, lo, hi, grid) for lo, hi in ranges) + 1e-15
    # The histogram knows each value to half a bin: its estimate is good to about 1 dB.
    assert found.error == pytest.approx(mse(x, found.lo, found.hi, grid), rel=0.26, abs=((h.hi - h.lo) / h.bins) ** 2)


def test_outliers_are_clipped_at_4_bits_and_the_method_is_named() -> None:
    found = choose(histogram(data("outliers")), INT4)
    assert found.hi < 20
    assert found.method != "min-max"


def test_only_methods_asked_for_are_used_and_unknown_ones_refused() -> None:
    h = histogram(data("outliers"))
    for method in ALL_METHODS:
        assert choose(h, INT4, (method,)).method.startswith(method)
    with pytest.raises(ValueError, match="entropie"):
        choose(h, INT8, ("entropie",))


def test_the_moving_average_is_numpys_over_the_batches() -> None:
    rng, h, lo, hi = np.random.default_rng(3), Histogram(), 0.0, 0.0
    for k, batch in enumerate(rng.normal(size=(7, 50))):
        keep = 0.9 if k else 0.0
        lo, hi = keep * lo + (1 - keep) * batch.min(), keep * hi + (1 - keep) * batch.max()
        h.add(torch.from_numpy(batch))
    found = choose(h, INT8, ("moving-average",))
    assert (found.lo, found.hi) == pytest.approx((lo, hi), rel=1e-6)
    assert h.smallest < lo < 0 < hi < h.largest


def divergence_by_hand(h: Histogram, lo: float, hi: float, grid: Grid) -> float:
    """The same KL, bin by bin in plain Python."""
    scale, zero = (float(v) for v in grid.qparams(torch.tensor(lo), torch.tensor(hi)))
    x, counts = h.centres.numpy(), h.counts.numpy()
    inside = [k for k in range(len(x)) if lo <= x[k] <= hi]
    real = {k: float(counts[k]) for k in inside}
    real[inside[0]] += counts[x < lo].sum()
    real[inside[-1]] += counts[x > hi].sum()
    groups: dict[int, list[int]] = {}
    for k in inside:
        groups.setdefault(int(np.clip(np.round(x[k] / scale) + zero, grid.qmin, grid.qmax)), []).append(k)
    rounded = dict.fromkeys(inside, 0.0)
    for members in groups.values():
        full = [k for k in members if counts[k] > 0]
        for k in full:
            rounded[k] = sum(counts[m] for m in members) / len(full)
    p = {k: v / sum(real.values()) for k, v in real.items()}
    q = {k: v / sum(rounded.values()) for k, v in rounded.items()}
    q = {k: 1e-4 if p[k] > 0 and q[k] == 0 else q[k] for k in q}
    return sum(p[k] * np.log(p[k] / (q[k] / sum(q.values()))) for k in p if p[k] > 0)


@pytest.mark.parametrize("ends", [(-3.0, 3.0), (-2.0, 2.5), (-1.0, 1.0)])
def test_the_divergence_is_that_of_plain_python(ends: tuple[float, float]) -> None:
    h = histogram(np.random.default_rng(0).normal(size=20_000))
    assert divergence(h, *ends, INT4) == pytest.approx(divergence_by_hand(h, *ends, INT4), rel=1e-9)


def test_values_that_lie_on_the_grid_diverge_by_nothing() -> None:
    h = histogram(np.repeat(np.arange(-8, 8) * 0.5, 10))
    assert divergence(h, *min_max(h), INT4) == pytest.approx(0, abs=1e-12)


def test_entropy_takes_the_least_divergence_and_clips_far_outliers() -> None:
    h = histogram(data("outliers"))
    found = choose(h, INT8, ("entropy",))
    assert found.hi < h.largest / 2
    assert divergence(h, found.lo, found.hi, INT8) <= divergence(h, *min_max(h), INT8)


@pytest.mark.parametrize("symmetric", [False, True])
def test_power_of_two_scales_cover_the_range_and_are_the_smallest_that_do(symmetric: bool) -> None:
    lo, hi = torch.tensor([-1.0, -0.3, 0.0, -4.0]), torch.tensor([1.0, 5.0, 0.7, 4.0 * 127 / 128])
    plain, shifted = Grid(-128, 127, symmetric), Grid(-128, 127, symmetric, power_of_two=True)
    scale, zero = shifted.qparams(lo, hi)
    mantissa, _ = np.frexp(scale.numpy())
    assert (mantissa == 0.5).all()
    least = plain.qparams(lo, hi)[0]
    assert ((scale >= least * (1 - 1e-6)) & (scale < 2 * least * (1 + 1e-6))).all()
    for end in (lo, hi):
        assert ((shifted.fake(end, scale, zero) - end).abs() <= scale / 2 * (1 + 1e-6)).all()


def test_a_tie_goes_to_the_simplest() -> None:
    assert choose(histogram(np.zeros(10)), INT8).method == "min-max"


# --- weights ------------------------------------------------------------------------------------------


def weight(shape: tuple[int, ...]) -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=dice) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=dice)
    w[0].view(-1)[0] *= 20  # an outlier in one channel
    w[1] = 0
    return w


@pytest.mark.parametrize("grid", [WEIGHTS, SEVEN, Grid(-7, 7, True)], ids=["8 bit", "7 bit", "4 bit"])
def test_weight_scales_are_as_good_as_brute_force_in_each_channel(grid: Grid) -> None:
    w = weight((6, 4, 3, 3))
    scale, zero = weight_scales(w, 0, grid)
    assert scale.shape == zero.shape == (6,)
    assert not zero.any()
    for k, channel in enumerate(w.double().numpy().reshape(6, -1)):
        top = np.abs(channel).max()
        candidates = [top * f / grid.qmax for f in np.linspace(0.5, 1, 400)] if top else [1e-10]
        best = min(((rounded(channel, s, 0, grid) - channel) ** 2).sum() for s in candidates)
        got = ((rounded(channel, float(scale[k]), 0, grid) - channel) ** 2).sum()
        plain = ((rounded(channel, max(top / grid.qmax, 1e-10), 0, grid) - channel) ** 2).sum()
        assert got <= 1.1 * best + 1e-12
        assert got <= plain * (1 + 1e-5) + 1e-15
        assert float(scale[k]) <= max(top / grid.qmax, 1e-10) * (1 + 1e-6)


def test_weight_scales_by_min_max_alone() -> None:
    w = weight((6, 4, 3, 3))
    scale, _ = weight_scales(w, 0, WEIGHTS, ("min-max",))
    want = np.maximum(np.abs(w.numpy()).reshape(6, -1).max(1) / 127, 1e-10)
    np.testing.assert_allclose(scale.numpy(), want, rtol=1e-6)


def test_weight_scales_follow_their_axis() -> None:
    w = weight((6, 4, 3, 3))
    turned, _ = weight_scales(w.transpose(0, 1), 1, WEIGHTS)
    straight, _ = weight_scales(w, 0, WEIGHTS)
    np.testing.assert_array_equal(turned.numpy(), straight.numpy())
    whole, _ = weight_scales(w, None, WEIGHTS, ("min-max",))
    assert whole.shape == (1,)
    assert float(whole) == pytest.approx(float(w.abs().max()) / 127, rel=1e-6)


# --- signal over noise ----------------------------------------------------------------------------------


def test_signal_to_noise_by_hand() -> None:
    assert signal_to_noise(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20.0)
    assert signal_to_noise(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 0.0])) == pytest.approx(0.0)
    assert signal_to_noise(torch.ones(3), torch.ones(3)) == math.inf


def test_signal_to_noise_is_numpys() -> None:
    a = data("gaussian", 1000)
    b = np.round(a * 8) / 8
    want = 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())
    assert signal_to_noise(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(want, rel=1e-9)
