"""Two layers for one: the best of their rank by numpy's SVD, the same at full rank, cheaper by a count done by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.errors import BadConfig, UnknownName
from lighten.kit import factors
from lighten.methods.low_rank import Step
from lighten.types import Data, Device, Job
from nets import CLASSES, images, net


@pytest.fixture(scope="module")
def job(here: Device) -> Job:
    from lighten.data.splits import ArrayImages, Split

    x, labels = images(192, seed=2)
    held = ArrayImages(x.numpy(), labels.numpy())
    splits = dict(zip(("train", "calibrate", "select"), (Split(held, r) for r in np.split(np.arange(192), (64, 128)))))
    names = tuple(f"class {k}" for k in range(CLASSES))
    data = Data("made up", names, names, **splits, report=splits["select"], fingerprint="f")
    return Job(data, "classification", dataclasses.replace(here, channel_multiple=4), None, net("small"))


@pytest.fixture
def told(job: Job) -> tuple[Job, list[str]]:
    lines: list[str] = []
    return dataclasses.replace(job, say=lines.append), lines


def answers(model: nn.Module, x: Tensor) -> np.ndarray:
    """(places, outputs) float64."""
    with torch.no_grad():
        out = model(x).double().numpy()
    return (np.moveaxis(out, 1, -1) if out.ndim == 4 else out).reshape(-1, out.shape[1])


LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (50, 40)),
    "conv": (lambda: nn.Conv2d(8, 24, 3, stride=2, padding=1), (6, 8, 12, 12)),
    "dilated, no bias": (lambda: nn.Conv2d(8, 24, 3, padding=(2, 1), dilation=(2, 1), bias=False), (4, 8, 9, 9)),
    "reflecting": (lambda: nn.Conv2d(8, 24, 3, padding=1, padding_mode="reflect"), (4, 8, 9, 9)),
    "one by one": (lambda: nn.Conv2d(30, 24, 1, stride=2), (6, 30, 8, 8)),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, shape = LAYERS[request.param]
    x = torch.randn(shape) + 0.5
    x[..., : shape[-1] // 2] *= 3  # inputs that are not white, so that responses and weights disagree
    return make(), x


# --- against numpy's SVD ------------------------------------------------------------------------------


def test_the_response_error_is_the_sum_of_the_discarded_eigenvalues(layer: tuple[nn.Module, Tensor]) -> None:
    """Eckart & Young: no affine map of rank 5 comes nearer to these responses than their SVD."""
    module, x = layer
    seen = factors.responses(module, [""], x.split(2))[""]
    done = factors.factorise(module, factors.of_responses(seen), 5, seen.mean)
    y = answers(module, x)
    discarded = np.linalg.svd(y - y.mean(0), compute_uv=False)[5:] ** 2
    error = ((answers(done, x) - y) ** 2).sum()
    assert error == pytest.approx(discarded.sum(), rel=1e-4)


def test_the_weight_error_is_the_sum_of_the_discarded_squared_singular_values(layer: tuple[nn.Module, Tensor]) -> None:
    module, _ = layer
    weight = module.weight.detach().double().numpy().reshape(24, -1)
    done = factors.factorise(module, factors.of_weight(module.weight), 7)
    first, second = (m.weight.detach().double().numpy() for m in done)
    product = second.reshape(24, 7) @ first.reshape(7, -1)
    assert np.linalg.matrix_rank(product, tol=1e-4) == 7
    discarded = np.linalg.svd(weight, compute_uv=False)[7:] ** 2
    assert ((product - weight) ** 2).sum() == pytest.approx(discarded.sum(), rel=1e-4)


@pytest.mark.parametrize("data", [True, False])
def test_full_rank_answers_as_the_layer_does(layer: tuple[nn.Module, Tensor], data: bool) -> None:
    module, x = layer
    seen = factors.responses(module, [""], [x])[""]
    basis = factors.of_responses(seen) if data else factors.of_weight(module.weight)
    done = factors.factorise(module, basis, 24, seen.mean if data else None)
    assert np.abs(answers(done, x) - answers(module, x)).max() < 1e-5


def test_responses_beat_weights_on_the_images_they_were_taken_from(layer: tuple[nn.Module, Tensor]) -> None:
    module, x = layer
    seen = factors.responses(module, [""], [x])[""]
    y = answers(module, x)
    by_data = answers(factors.factorise(module, factors.of_responses(seen), 6, seen.mean), x)
    by_weight = answers(factors.factorise(module, factors.of_weight(module.weight), 6), x)
    assert ((by_data - y) ** 2).sum() < 0.95 * ((by_weight - y) ** 2).sum()


def test_mean_and_scatter_batch_by_batch_are_those_of_all_rows_at_once() -> None:
    rows = (
        np.random.default_rng(0).normal(50, 1, (90, 6)).astype(np.float32)
    )  # far from zero: a sum of squares would fail
    seen = factors.Responses()
    for part in np.split(rows, (7, 40)):
        seen.add(torch.from_numpy(part))
    assert seen.mean.numpy() == pytest.approx(rows.astype(np.float64).mean(0), rel=1e-12)
    assert (seen.scatter / 90).numpy() == pytest.approx(
        np.cov(rows.astype(np.float64).T, bias=True), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("share, rank", [(0.5, 1), (0.60, 1), (0.61, 2), (0.9, 2), (0.95, 3), (1.0, 4)])
def test_the_rank_is_the_fewest_directions_that_hold_the_energy(share: float, rank: int) -> None:
    assert factors.rank_for_energy(torch.tensor([6.0, 3.0, 0.5, 0.5]).double(), share) == rank


def test_a_layer_that_never_answers_anything_else_has_rank_one() -> None:
    assert factors.rank_for_energy(torch.zeros(5), 0.95) == 1


# --- what pays ----------------------------------------------------------------------------------------


def test_what_pays_is_counted_in_weights_and_multiplications() -> None:
    """64 -> 96 channels, 3 x 3: 55,296 weights; a rank costs 64 * 9 + 96 = 672, so 82 pay (55,104) and 83 do not."""
    weight = torch.empty(96, 64, 3, 3)
    assert factors.per_rank(weight) == 672
    assert factors.pays(weight, 82)
    assert not factors.pays(weight, 83)
    assert not factors.pays(torch.empty(10, 10), 5)  # 100 weights either way: nothing gained
    assert factors.rank_for_ratio(weight, 0.5) == 41  # 27,648 / 672 = 41.1


FREE = ("stem", "inner", "left", "right", "skip")


class Wide(nn.Module):
    """A wide linear layer after a convolution; its weight has rank 12 at most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.ModuleDict({"conv": nn.Conv2d(3, 64, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(64)})
        self.wide = nn.Linear(64, 96)
        self.fc = nn.Linear(96, CLASSES)
        with torch.no_grad():
            self.wide.weight.copy_(torch.randn(96, 12) @ torch.randn(12, 64) / 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body["norm"](self.body["conv"](x)).relu().mean((2, 3))
        return self.fc(self.wide(y).relu())


def test_only_the_layer_that_pays_is_replaced_and_counted_by_hand(told: tuple[Job, list[str]]) -> None:
    """Rank 12: 64 * 12 + 12 * 96 = 1,920 of 6,144 weights, each used once an image."""
    job, lines = told
    model = Wide().eval()
    done = Step(energy=1.0, data=False, keep=("body",)).apply(copy.deepcopy(model), job)
    assert isinstance(done.wide, nn.Sequential)
    assert [tuple(m.weight.shape) for m in done.wide] == [(12, 64), (96, 12)]
    assert done.wide[0].bias is None
    assert isinstance(done.fc, nn.Linear)
    assert lines == [
        "1 of 1 layers are two of lower rank now: 6,144 -> 1,920 weights, 0.0 -> 0.0 million multiplications an image"
        " (wide 96 -> 12)."
    ]
    x = torch.from_numpy(job.data.calibrate.inputs(None))
    features = model.body["norm"](model.body["conv"](x)).relu().mean((2, 3))
    assert (done.wide(features) - model.wide(features)).abs().max() < 1e-5


def test_multiplications_are_counted_at_the_places_of_the_output(told: tuple[Job, list[str]]) -> None:
    """Small's right: 64 -> 80, 3 x 3, to 4 x 4 places. Half of 46,080 weights at 656 a rank is 35.1, so 32 in fours."""
    job, lines = told
    done = Step(ratio=0.5, keep=("stem", "inner", "left", "skip", "fc")).apply(copy.deepcopy(job.original), job)
    assert [tuple(m.weight.shape) for m in done.right[0]] == [(32, 64, 3, 3), (80, 32, 1, 1)]
    assert done.right[0][0].stride == (2, 2)
    assert done.right[0][1].bias is not None
    assert "46,080 -> 20,992 weights, 0.7 -> 0.3 million multiplications" in lines[0]  # 16 places each


def test_ranks_are_multiples_of_what_the_device_likes_or_of_what_was_asked(job: Job) -> None:
    for step, device, multiple in ((Step(), 16, 16), (Step(round_to=5), 16, 5)):
        there = dataclasses.replace(job, device=dataclasses.replace(job.device, channel_multiple=device))
        done = step.apply(copy.deepcopy(job.original), there)
        pairs = [m for m in done.modules() if isinstance(m, nn.Sequential) and isinstance(m[-1], nn.Conv2d)]
        assert pairs
        assert all(p[0].out_channels % multiple == 0 for p in pairs)


def test_where_nothing_pays_the_network_is_left_and_that_is_said(told: tuple[Job, list[str]]) -> None:
    job, lines = told
    done = Step(energy=1.0, round_to=128).apply(copy.deepcopy(job.original), job)
    before, after = job.original.state_dict(), done.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert "No layer pays" in lines[0]


# --- the step on networks -----------------------------------------------------------------------------


def test_all_energy_answers_as_the_original_does(job: Job) -> None:
    """The filters of `right` that are zero cost no rank: it pays at no loss."""
    done = Step(energy=1.0, round_to=1).apply(copy.deepcopy(job.original), job)
    x, _ = images(20, seed=9)
    assert isinstance(done.right[0], nn.Sequential)
    for norms in (m for m in done.modules() if isinstance(m, nn.BatchNorm2d)):
        norms.load_state_dict(
            next(m for n, m in job.original.named_modules() if done.get_submodule(n) is norms).state_dict()
        )
    with torch.no_grad():
        assert (done(x) - job.original(x)).abs().max() < 1e-3


@pytest.mark.parametrize("data", [True, False])
def test_less_energy_gives_fewer_weights_and_answers_that_are_further_off(job: Job, data: bool) -> None:
    x, _ = images(40, seed=9)
    counts, errors = [], []
    with torch.no_grad():
        for energy in (0.999, 0.95, 0.7):
            done = Step(energy=energy, data=data, round_to=2).apply(copy.deepcopy(job.original), job)
            counts.append(sum(p.numel() for p in done.parameters()))
            errors.append(float((done(x) - job.original(x)).square().mean()))
    assert counts == sorted(counts, reverse=True)
    assert errors == sorted(errors)


def test_grouped_layers_attention_and_weights_read_by_others_are_left_alone(job: Job) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(3, 48, 3, groups=3)
            self.attend = nn.MultiheadAttention(48, 2, batch_first=True)
            self.read = nn.Linear(48, 48)
            self.one = nn.Linear(48, 48)
            self.two = nn.Linear(48, 48)
            self.two.weight = self.one.weight
            self.fc = nn.Linear(48, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = self.grouped(x).flatten(2).transpose(1, 2)[:, :8]
            y = self.attend(y, y, y)[0].mean(1)
            y = nn.functional.linear(y, self.read.weight, self.read.bias)
            return self.fc(self.two(self.one(y)))

    model = Odd().eval()
    x, _ = images(4, seed=1)
    done = Step(ratio=0.2, keep=("fc",)).apply(copy.deepcopy(model), job)
    assert done.state_dict().keys() == model.state_dict().keys()
    assert done(x).shape == (4, CLASSES)


def test_the_end_is_left_alone_unless_asked_for(job: Job) -> None:
    """96 -> 10: rank 4 of fours has 424 of 960 weights."""
    alone = Step(ratio=0.5, keep=FREE).apply(copy.deepcopy(job.original), job)
    asked = Step(ratio=0.5, keep=FREE, ends=True).apply(copy.deepcopy(job.original), job)
    assert isinstance(alone.fc, nn.Linear)
    assert [tuple(m.weight.shape) for m in asked.fc] == [(4, 96), (10, 4)]


def test_a_self_describing_checkpoint_holds_the_pairs(job: Job, tmp_path: Path) -> None:
    from lighten.models import saved

    done = Step(energy=0.9).apply(copy.deepcopy(job.original), job)
    x, _ = images(8, seed=4)
    saved.save(tmp_path / "m.safetensors", done, None, classes=CLASSES, original=net("small"), example=x)
    again = saved.load(tmp_path / "m.safetensors", model=net("small"))
    with torch.no_grad():
        assert torch.equal(again(x), done(x))


def test_a_layer_used_under_two_names_is_replaced_under_both(job: Job) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3)
            self.a = nn.Linear(32, 32)
            self.b = self.a
            self.fc = nn.Linear(32, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(self.stem(x).mean((2, 3))).relu()))

    done = Step(ratio=0.3, keep=("stem", "fc")).apply(Twice().eval(), job)
    assert isinstance(done.a, nn.Sequential)
    assert done.a is done.b


def test_training_on_brings_answers_nearer_to_the_original(job: Job) -> None:
    x, _ = images(64, seed=9)
    errors = []
    for epochs in (0.0, 6.0):
        step = Step(ratio=0.2, keep=("stem",), epochs=epochs, lr=0.01, distill=1.0)
        done = step.apply(copy.deepcopy(job.original), job)
        assert not done.training
        with torch.no_grad():
            errors.append(float((done(x).softmax(1) - job.original(x).softmax(1)).square().mean()))
    assert errors[1] < errors[0]


def test_training_keeps_to_the_time(job: Job) -> None:
    said: list[str] = []
    step = Step(ratio=0.2, keep=("stem",), epochs=1e5, seconds=1.0)
    step.apply(copy.deepcopy(job.original), dataclasses.replace(job, say=said.append))
    (found,) = (found for line in said if (found := re.fullmatch(r"trained ([\d.]+) epochs in (\d+) s", line)))
    assert 0 < float(found[1]) < 1e5
    assert int(found[2]) <= 2


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [{"energy": 0.0}, {"energy": 1.1}, {"energy": math.nan}, {"ratio": 1.0}, {"ratio": -0.5}, {"round_to": -8},
     {"images": 0}, {"epochs": -1.0}, {"seconds": -1.0}, {"lr": 0.0}, {"distill": -0.1}],
)  # fmt: skip
def test_a_bad_setting_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=next(iter(bad))):
        Step(**bad)


def test_a_layer_to_keep_that_is_not_there_is_told_with_the_nearest(job: Job) -> None:
    with pytest.raises(UnknownName, match=r"right\.0"):
        Step(keep=("rihgt.0",)).apply(copy.deepcopy(job.original), job)


def test_recovery_without_training_images_is_refused(job: Job) -> None:
    without = dataclasses.replace(job, data=dataclasses.replace(job.data, train=None))
    with pytest.raises(BadConfig, match="no training images"):
        Step(ratio=0.3, epochs=1.0).apply(copy.deepcopy(job.original), without)
