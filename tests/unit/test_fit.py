"""Training goes on after a kill as if nothing had happened; augmentation and averages are what they say."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.data.splits import ArrayImages, Split
from lighten.errors import BadConfig
from lighten.kit import fit as fitting
from lighten.kit.augment import crop_and_flip, cut_out, to_input
from lighten.kit.fit import FitSettings, fit, gains_from_bf16, one_cycle
from lighten.tasks.classification import loss
from lighten.types import Data, Device, Job, Preprocess, silent

torch.set_num_threads(1)
HOW = Preprocess(8, 8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SETTINGS = FitSettings(epochs=4, batch=32, lr=0.05, shift=0.125, cutout=0.25, ema=0.9)


def job(progress: Callable[[str, int, int], None] = silent, how: Preprocess | None = HOW) -> Job:
    """160 images of four colours under noise."""
    dice = np.random.default_rng(0)
    labels = dice.integers(0, 4, 160)
    colours = dice.integers(40, 216, (4, 1, 1, 3))
    pixels = np.clip(colours[labels] + dice.normal(0, 25, (160, 8, 8, 3)), 0, 255).astype(np.uint8)
    split = Split(ArrayImages(pixels, labels), np.arange(160))
    data = Data("made up", ("a", "b", "c", "d"), ("甲", "乙", "丙", "丁"), split, split, split, split, "f")
    return Job(data, "classification", Device("d", "d", "d", ()), how, progress=progress)


def model(dropout: float = 0.0, norm: bool = True) -> nn.Module:
    torch.manual_seed(5)
    layers = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(32, 4))


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class Killed(Exception):
    """Stands for the power cut."""


def test_the_loss_falls_and_the_answers_become_right() -> None:
    losses: list[float] = []
    work = job()
    done = fit(model(), replace(SETTINGS, epochs=8), loss, work, after_epoch=lambda k, m, v: losses.append(v))
    assert len(losses) == 8
    assert losses[-1] < 0.5 * losses[0]
    assert not done.training
    x, y = torch.from_numpy(work.data.train.inputs(HOW)), work.data.train.labels
    with torch.no_grad():
        assert (done(x).argmax(1).numpy() == y).mean() > 0.9


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    first, again = (fit(model(), SETTINGS, loss, job()) for _ in range(2))
    assert same(first, again)
    assert not same(first, fit(model(), replace(SETTINGS, seed=1), loss, job()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("k", [1, 3])
def test_interrupted_after_an_epoch_and_resumed_gives_the_same_bits(
    tmp_path: Path, k: int, dropout: float, optimizer: str
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 3e-3)
    whole = fit(model(dropout), settings, loss, job())

    def cut(epoch: int, _model: nn.Module, _loss: float) -> None:
        if epoch == k:
            raise Killed

    file = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fit(model(dropout), settings, loss, job(), checkpoint=file, after_epoch=cut)
    epochs: list[int] = []
    resumed = fit(model(dropout), settings, loss, job(), checkpoint=file, after_epoch=lambda e, m, v: epochs.append(e))
    assert epochs == list(range(k + 1, 5))
    assert same(resumed, whole)


def test_interrupted_inside_an_epoch_repeats_that_epoch_alone(tmp_path: Path) -> None:
    whole = fit(model(), SETTINGS, loss, job())

    def cut(what: str, _done: int, _total: int) -> None:
        if what.startswith("epoch 3/"):
            raise Killed

    with pytest.raises(Killed):
        fit(model(), SETTINGS, loss, job(cut), checkpoint=tmp_path / "state.pt")
    assert same(fit(model(), SETTINGS, loss, job(), checkpoint=tmp_path / "state.pt"), whole)


@pytest.mark.parametrize("epochs, batch", [(1, 32), (1, 160), (1, 500), (2, 160), (5, 160), (10, 80)])
def test_short_trainings_work_too(epochs: int, batch: int) -> None:
    """Few images make few steps: one, or as many as make the warm-up a single step, must not stop the schedule."""
    done = fit(model(), replace(SETTINGS, epochs=epochs, batch=batch), loss, job())
    assert all(torch.isfinite(v).all() for v in done.state_dict().values())
    assert not same(done, model())


def test_a_finished_training_is_read_back_without_a_step(tmp_path: Path) -> None:
    done = fit(model(), SETTINGS, loss, job(), checkpoint=tmp_path / "state.pt")
    again = fit(model(), SETTINGS, lambda *a: pytest.fail("it trained"), job(), checkpoint=tmp_path / "state.pt")
    assert same(done, again)


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    fit(model(), replace(SETTINGS, epochs=2), loss, job(), checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(BadConfig, match=r"state\.pt.*other settings"):
        fit(model(), replace(SETTINGS, epochs=2, lr=0.06), loss, job(), checkpoint=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_advice_and_is_not_saved(tmp_path: Path, bad: float) -> None:
    def broken(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss(m, x, y) * bad

    with pytest.raises(BadConfig, match="epoch 1") as e:
        fit(model(), SETTINGS, broken, job(), checkpoint=tmp_path / "state.pt")
    assert "learning rate" in e.value.to_do
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"batch": 1}, {"lr": 0.0}, {"lr": -1.0}, {"optimizer": "lion"}, {"warmup": 0.0}, {"warmup": 1.0},
        {"ema": 1.0}, {"ema": -0.1}, {"shift": 1.0}, {"cutout": -0.1}, {"lr": float("nan")},
        {"epochs": float("nan")}, {"epochs": float("inf")}, {"seconds": 0.0}, {"seconds": -1.0}, {"seconds": float("nan")},
        {"weight_decay": -1e-4}, {"lr": float("inf")},
    ],
)  # fmt: skip
def test_nonsense_settings_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(BadConfig, match=next(iter(bad))):
        FitSettings(**bad)  # type: ignore[arg-type]


# --- average ------------------------------------------------------------------------------------------


class Falling(nn.Module):
    """One weight whose gradient is always 1, so that its path is the sum of learning rates."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0]))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.w


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.999])
def test_the_average_is_what_it_is_by_hand(ema: float) -> None:
    s = FitSettings(epochs=3, batch=32, lr=0.1, momentum=0.0, weight_decay=0.0, ema=ema)
    done = fit(Falling(), s, lambda m, x, y: m(x).sum(), job())
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        probe, 0.1, total_steps=15, pct_start=s.warmup, cycle_momentum=False, div_factor=10, final_div_factor=1e3
    )
    w, average = 3.0, 3.0
    for step in range(1, 16):
        w -= schedule.get_last_lr()[0]
        probe.step()
        if step < 15:
            schedule.step()
        decay = min(ema, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * w
    assert done.w.item() == pytest.approx(average, rel=1e-5)  # type: ignore[union-attr, operator]
    assert done.seen.item() == 15  # type: ignore[union-attr, operator]


class Shared(nn.Module):
    """One part under two names, listed in another order by every other copy."""

    copies = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.a.weight + 3 * self.b.weight

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        twin = Shared()
        twin.load_state_dict(self.state_dict())
        for name in ("b", "a", "again"):
            twin._modules[name] = twin._modules.pop(name)
        return twin


def test_the_average_goes_by_name_and_takes_what_is_shared_once() -> None:
    torch.manual_seed(0)
    net = Shared()
    start = {k: v.item() for k, v in net.state_dict().items()}
    s = FitSettings(epochs=1, batch=80, lr=0.1, momentum=0.0, weight_decay=0.0, ema=0.5)
    done = fit(net, s, lambda m, x, y: m(x).sum(), job()).state_dict()
    steps = {"a": 1.0, "b": 3.0}
    clip = min(1.0, 5.0 / 10**0.5)
    first, second = (start_lr * clip for start_lr in _rates(s, 2))
    for name, gradient in steps.items():
        one = start[f"{name}.weight"] - first * gradient
        two = one - second * gradient
        average = start[f"{name}.weight"]
        for step, value in ((1, one), (2, two)):
            keep = min(0.5, (1 + step) / (10 + step))
            average = keep * average + (1 - keep) * value
        assert done[f"{name}.weight"].item() == pytest.approx(average, rel=1e-5)


def _rates(s: FitSettings, total: int) -> list[float]:
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=s.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        probe, s.lr, total_steps=total, pct_start=0.75, cycle_momentum=False, div_factor=10, final_div_factor=1e3
    )
    rates = []
    for k in range(total):
        rates.append(schedule.get_last_lr()[0])
        probe.step()
        if k + 1 < total:
            schedule.step()
    return rates


# --- schedule and time -----------------------------------------------------------------------------------


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "epochs, batch, warmup", [(1, 80, 0.2), (3, 32, 0.2), (4, 16, 0.55), (1, 32, 0.05), (1, 160, 0.2)]
)
def test_without_a_time_limit_the_rates_are_those_of_torchs_one_cycle(epochs: int, batch: int, warmup: float) -> None:
    s = FitSettings(epochs=epochs, batch=batch, lr=0.1, momentum=0.0, weight_decay=0.0, ema=0.0, warmup=warmup)
    path = [3.0]
    fit(Falling(), s, lambda m, x, y: m(x).sum(), job(), after_step=lambda m: path.append(m.w.item()))  # type: ignore[union-attr, operator, arg-type]
    total = epochs * (160 // batch)
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    start = max(warmup, 1.5 / total) if total > 1 else warmup
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        probe, 0.1, total_steps=total, pct_start=start, cycle_momentum=False, div_factor=10, final_div_factor=1e3
    )
    want = []
    for k in range(total):
        want.append(schedule.get_last_lr()[0])
        probe.step()
        if k + 1 < total:
            schedule.step()
    np.testing.assert_allclose(-np.diff(path), want, atol=5e-7)


def test_one_cycle_at_its_corners() -> None:
    got = [one_cycle(p, 0.25) for p in (0.0, 0.125, 0.25, 0.625, 1.0)]
    np.testing.assert_allclose(got, [0.1, 0.55, 1.0, 0.50005, 1e-4], rtol=1e-12)


def rates_within(seconds: float, step_s: float, epochs: float = 1000, **more: object) -> tuple[list[float], Clock]:
    """Learning rates of a training whose every step takes `step_s`, and its clock."""
    clock, path = Clock(), [3.0]

    def step(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        clock.now += step_s
        return m(x).sum()

    s = FitSettings(epochs=epochs, batch=32, lr=1.0, momentum=0.0, weight_decay=0.0, ema=0.0, seconds=seconds)
    keep = lambda m: path.append(m.w.item())  # noqa: E731
    fit(Falling(), s, step, job(), after_step=keep, clock=clock, **more)  # type: ignore[arg-type]
    return list(-np.diff(path)), clock


@pytest.mark.parametrize("seconds, step_s", [(60.0, 1.0), (60.0, 0.37), (10.0, 3.0), (7.0, 2.0)])
def test_a_time_limit_ends_training_within_a_step_and_annealed(seconds: float, step_s: float) -> None:
    rates, clock = rates_within(seconds, step_s)
    assert abs(clock.now - 100 - seconds) <= step_s
    assert len(rates) == round((clock.now - 100) / step_s)
    assert rates[-1] < 2e-3  # of a peak of 1
    if len(rates) > 20:
        assert max(rates) > 0.98
        assert 0.12 < np.argmax(rates) / len(rates) < 0.28  # the warm-up's share of the time


def test_where_the_steps_end_first_the_time_limit_changes_nothing() -> None:
    free, _ = rates_within(1e6, 1.0, epochs=4)
    s = FitSettings(epochs=4, batch=32, lr=1.0, warmup=0.2)
    assert len(free) == 20
    np.testing.assert_allclose(free, [one_cycle(k / 19, (0.2 * 20 - 1) / 19) * s.lr for k in range(20)], atol=1e-6)


def test_a_limit_shorter_than_a_step_still_makes_one() -> None:
    rates, _ = rates_within(0.5, 30.0)
    assert len(rates) == 1


def test_a_resumed_training_has_only_the_rest_of_its_time(tmp_path: Path) -> None:
    file, clock, taken = tmp_path / "state.pt", Clock(), []

    def step(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        clock.now += 1.0
        taken.append(clock.now)
        return loss(m, x, y)

    def cut(epoch: int, _m: nn.Module, _v: float) -> None:
        if epoch == 2:
            raise Killed

    s = replace(SETTINGS, epochs=500, seconds=25.0)
    with pytest.raises(Killed):
        fit(model(), s, step, job(), checkpoint=file, after_epoch=cut, clock=clock)
    assert len(taken) == 10
    clock.now += 1000  # nobody trained
    fit(model(), s, step, job(), checkpoint=file, clock=clock)
    assert 24 <= len(taken) <= 26
    again = fit(model(), s, lambda *a: pytest.fail("it trained"), job(), checkpoint=file, clock=clock)
    assert not again.training


def test_inside_a_long_epoch_the_state_is_saved_and_gone_on_from_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "KEEP_EVERY", 2)
    monkeypatch.setattr(fitting, "SAVE_EVERY_S", 0.0)
    whole = fit(model(0.3), SETTINGS, loss, job())
    seen: list[int] = []

    def dying(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(1)
        if len(seen) == 9:  # the fourth step of the second epoch
            raise Killed
        return loss(m, x, y)

    file = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fit(model(0.3), SETTINGS, dying, job(), checkpoint=file)
    rest: list[int] = []

    def counted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rest.append(1)
        return loss(m, x, y)

    assert same(fit(model(0.3), SETTINGS, counted, job(), checkpoint=file), whole)
    assert len(rest) == 20 - 8


@pytest.mark.parametrize("epochs, images", [(0.5, 64), (0.2, 32), (1.6, 256), (2, 320)])
def test_a_fraction_of_an_epoch_sees_that_share_of_the_images_once(epochs: float, images: int) -> None:
    s = replace(SETTINGS, epochs=epochs, shift=0.0, flip=False, cutout=0.0)
    seen: list[bytes] = []

    def watching(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.extend(row.tobytes() for row in x.numpy())
        return loss(m, x, y)

    ended: list[int] = []
    fit(model(), s, watching, job(), after_epoch=lambda k, m, v: ended.append(k))
    assert len(seen) == images
    assert len(set(seen)) == min(160, images)
    assert ended == list(range(1, int(np.ceil(epochs)) + 1))


# --- a loss that is not finite ---------------------------------------------------------------------------


def failing(at: set[int], bad: float = float("nan")) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A loss that is `bad` in the calls that `at` lists."""
    calls = [0]

    def one(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return loss(m, x, y) * (bad if calls[0] in at else 1.0)

    return one


@pytest.mark.parametrize("bad, word", [(float("nan"), "NaN"), (float("inf"), "infinite")])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_not_finite_rolls_back_and_goes_on_at_half_the_rate(
    optimizer: str, bad: float, word: str
) -> None:
    """At the start nothing is lost: the rest is a training at half the learning rate, bit by bit."""
    said: list[str] = []
    s = replace(SETTINGS, epochs=2, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 3e-3)
    done = fit(model(0.3), s, failing({1}, bad), replace(job(), say=said.append))
    half = fit(model(0.3), replace(s, lr=s.lr / 2), loss, job())
    assert same(done, half)
    assert said[:-1] == [f"The loss was {word} in epoch 1; rolled back to step 0 of 10 and halved the learning rate."]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_goes_back_to_the_last_good_state_each_time(optimizer: str) -> None:
    """Two failures in the second epoch go back to its start; what is replayed does not depend on where they struck."""
    said: list[str] = []
    s = replace(SETTINGS, epochs=3, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 3e-3)
    # 5 steps, then 3 of which the last fails, then 4 of which the last fails.
    done = fit(model(0.3), s, failing({8, 12}), replace(job(), say=said.append))
    other = fit(model(0.3), s, failing({6, 10}), job())
    assert same(done, other)
    assert all(torch.isfinite(v).all() for v in done.state_dict().values())
    assert [line.split(";")[1] for line in said[:-1]] == [
        " rolled back to step 5 of 15 and halved the learning rate."
    ] * 2


def test_the_third_time_ends_the_training() -> None:
    said: list[str] = []
    with pytest.raises(BadConfig, match="NaN in epoch 2, the 3rd time") as e:
        fit(model(), SETTINGS, failing({3, 9, 12}), replace(job(), say=said.append))
    assert "learning rate" in e.value.to_do
    assert len(said) == 2


def test_gradients_that_are_not_finite_count_as_the_loss() -> None:
    said: list[str] = []
    struck: list[int] = []

    def poison(m: nn.Module) -> None:
        struck.append(1)
        if len(struck) == 2:
            next(iter(m.parameters())).grad.fill_(float("inf"))  # type: ignore[union-attr]

    done = fit(model(), SETTINGS, loss, replace(job(), say=said.append), before_step=poison)
    assert len(said[:-1]) == 1
    assert all(torch.isfinite(v).all() for v in done.state_dict().values())


def test_a_network_that_is_broken_already_is_refused() -> None:
    net = model()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    with pytest.raises(BadConfig, match="weights are not finite"):
        fit(net, SETTINGS, loss, job())


# --- hooks and optimizer ---------------------------------------------------------------------------------


def test_hooks_see_gradients_before_the_step_and_weights_after_it() -> None:
    order: list[tuple[str, float]] = []

    def before(m: nn.Module) -> None:
        order.append(("before", m.w.item()))  # type: ignore[operator, union-attr]
        assert m.w.grad.item() == 1.0  # type: ignore[operator, union-attr]
        m.w.grad.mul_(2.0)  # type: ignore[operator, union-attr]

    def after(m: nn.Module) -> None:
        order.append(("after", m.w.item()))  # type: ignore[operator, union-attr]
        with torch.no_grad():
            m.w.fill_(1.5)  # type: ignore[operator, union-attr]

    s = FitSettings(epochs=1, batch=80, lr=0.1, momentum=0.0, weight_decay=0.0, ema=0.0)
    done = fit(Falling(), s, lambda m, x, y: m(x).sum(), job(), before_step=before, after_step=after)
    assert [name for name, _ in order] == ["before", "after"] * 2
    assert order[0][1] - order[1][1] == pytest.approx(2 * 0.01, rel=1e-4)  # twice the gradient, at a tenth of the peak
    assert order[2][1] == 1.5
    assert done.w.item() == pytest.approx(1.5)  # type: ignore[operator, union-attr]


def test_weights_move_as_the_plain_update_rule_says() -> None:
    """Nesterov momentum and weight decay by hand, on channels-last convolutions: the optimizer's fast kernel reads bare
    memory."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    weights = {k: v.detach().clone() for k, v in net.named_parameters()}
    slopes: list[dict[str, Tensor]] = []
    keep = lambda m: slopes.append({k: p.grad.clone() for k, p in m.named_parameters()})  # noqa: E731
    s = FitSettings(epochs=2, batch=32, lr=0.05, weight_decay=1e-2, ema=0.0)
    done = fit(net, s, loss, job(), before_step=keep, autocast=False).state_dict()
    speed = {k: torch.zeros_like(v) for k, v in weights.items()}
    for step, slope in enumerate(slopes):
        rate = 0.05 * one_cycle(step / 9, (0.2 * 10 - 1) / 9)
        norm = torch.stack([g.norm() for g in slope.values()]).norm()
        for k, w in weights.items():
            g = slope[k] * min(1.0, 5.0 / (float(norm) + 1e-6)) + (1e-2 * w if w.ndim > 1 else 0)
            speed[k] = 0.9 * speed[k] + g
            weights[k] = w - rate * (g + 0.9 * speed[k])
    for k, w in weights.items():
        torch.testing.assert_close(done[k].contiguous(), w.contiguous(), rtol=1e-4, atol=1e-6)


# --- what a method may ask for ---------------------------------------------------------------------------


def test_each_group_has_its_own_learning_rate() -> None:
    """Adam's first steps are as long as its rate: the bias moves a hundredth of what the weights do."""
    net, before = model(norm=False), model(norm=False).state_dict()

    def groups(m: nn.Module) -> list[dict[str, object]]:
        big = [p for p in m.parameters() if p.ndim > 1]
        return [{"params": big, "lr": 1e-3}, {"params": [p for p in m.parameters() if p.ndim == 1], "lr": 1e-5}]

    s = replace(SETTINGS, epochs=1, optimizer="adamw", ema=0.0, weight_decay=0.0)
    done = fit(net, s, loss, job(), groups=groups).state_dict()
    by = {k: float((done[k] - before[k]).abs().max()) for k in before}
    for name, moved in by.items():
        peak = 1e-3 if before[name].ndim > 1 else 1e-5
        assert 0.3 * peak < moved < 5 * peak, name  # five steps, at most as long as the peak


@pytest.mark.parametrize("autocast", [True, False])
def test_without_autocast_everything_is_float32(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "has_bf16", lambda device: True)
    seen = set()

    def watching(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        seen.add(out.dtype)
        return nn.functional.cross_entropy(out.float(), y)

    fit(model(), replace(SETTINGS, epochs=1), watching, job(), autocast=autocast)
    assert seen == {torch.bfloat16 if autocast else torch.float32}


def test_a_processor_trains_depthwise_networks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    for hardware, net, device, want in (
        (True, model(), "cpu", True),
        (True, depthwise, "cpu", False),
        (True, depthwise, "cuda", True),
        (False, model(), "cpu", False),
    ):
        monkeypatch.setattr(fitting, "has_bf16", lambda device, hardware=hardware: hardware)
        assert gains_from_bf16(net, torch.device(device)) is want


# --- augmentation -------------------------------------------------------------------------------------


def variants(image: np.ndarray, reach: int, flip: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of the mirrored-edge image, by numpy's own reflection."""
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    found = {}
    for dy in range(2 * reach + 1):
        for dx in range(2 * reach + 1):
            moved = padded[dy : dy + image.shape[0], dx : dx + image.shape[1]]
            found[moved.tobytes()] = (dy - reach, dx - reach, False)
            if flip:
                found[np.ascontiguousarray(moved[:, ::-1]).tobytes()] = (dy - reach, dx - reach, True)
    return found


@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_gives_crops_of_the_mirrored_image_and_all_of_them(flip: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    many = torch.from_numpy(np.repeat(image[None], 3000, 0))
    got = crop_and_flip(many, 0.125, flip, torch.Generator().manual_seed(0)).numpy()
    # 1 of 8 rows up or down; 2 of 16 columns left or right.
    wide = variants(image, 2, flip)
    seen = [wide[np.ascontiguousarray(one).tobytes()] for one in got]
    assert {dy for dy, _, _ in seen} == {-1, 0, 1}
    assert {dx for _, dx, _ in seen} == {-2, -1, 0, 1, 2}
    assert len(set(seen)) == 15 * (2 if flip else 1)
    if flip:
        assert 0.45 < np.mean([turned for *_, turned in seen]) < 0.55


def test_no_shift_and_no_flip_change_nothing_and_ready_inputs_pass() -> None:
    dice = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(x, 0.0, False, dice), x)
    ready = torch.randn(4, 3, 8, 8)
    assert crop_and_flip(ready, 0.5, True, dice) is ready


@pytest.mark.parametrize("size, side", [(0.25, 4), (0.3, 4), (0.2, 3), (0.01, 1), (0.5, 8)])
def test_cut_out_zeroes_one_square_and_nothing_else(size: float, side: int) -> None:
    x = torch.rand(400, 2, 16, 16, generator=torch.Generator().manual_seed(1)) + 1
    got = cut_out(x, size, torch.Generator().manual_seed(0))
    heights, widths = set(), set()
    for before, after in zip(x.numpy(), got.numpy()):
        gone = after == 0
        assert (gone[0] == gone[1]).all()
        rows, columns = np.flatnonzero(gone[0].any(1)), np.flatnonzero(gone[0].any(0))
        assert gone[0][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert gone[0].sum() == len(rows) * len(columns)
        np.testing.assert_array_equal(after[~gone], before[~gone])
        heights.add(len(rows))
        widths.add(len(columns))
    assert max(heights) == max(widths) == side  # smaller only where the edge cuts it


def test_training_inputs_are_those_of_the_device() -> None:
    from lighten.data.preprocess import normalize

    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    how = replace(HOW, mean=(0.1, 0.2, 0.3), std=(0.9, 0.5, 0.3))
    np.testing.assert_allclose(to_input(torch.from_numpy(x), how).numpy(), normalize(x, how), rtol=1e-6, atol=1e-6)


# --- several processes ----------------------------------------------------------------------------------

WORKER = """
import json, os, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
import torch
from test_fit import SETTINGS, job, loss, model, replace, fit
settings = replace(SETTINGS, epochs=2, shift=0.0, flip=False, cutout=0.0)
done = fit(model(norm=False), settings, loss, job(), checkpoint=Path(sys.argv[1]) / "state.pt")
torch.save(done.state_dict(), Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """Half of each batch each: both end with the same weights, which are those of one process but for rounding."""
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
        f"--master_port={port}", str(tmp_path / "worker.py"), str(tmp_path), json.dumps(sys.path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    zero, one = (torch.load(tmp_path / f"rank{k}.pt", weights_only=True) for k in (0, 1))
    start = model(norm=False).state_dict()
    alone = fit(
        model(norm=False), replace(SETTINGS, epochs=2, shift=0.0, flip=False, cutout=0.0), loss, job()
    ).state_dict()
    for name in alone:
        assert torch.isfinite(zero[name]).all()
        assert torch.equal(zero[name], one[name])
    moved = max((alone[k] - start[k]).abs().max().item() for k in alone)
    apart = max((alone[k] - zero[k]).abs().max().item() for k in alone)
    assert apart < 0.05 * moved
