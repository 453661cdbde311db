"""Zeros: exactly as many as asked, the smallest ones, held through training, and told honestly."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import math
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lighten.errors import BadConfig, UnknownName
from lighten.kit import masks
from lighten.methods.sparsify import Step
from lighten.types import Data, Device, Job
from nets import CLASSES, images, net


@pytest.fixture(scope="module")
def job(here: Device) -> Job:
    from lighten.data.splits import ArrayImages, Split

    x, labels = images(192, seed=2)
    held = ArrayImages(x.numpy(), labels.numpy())
    rows = np.split(np.arange(192), (128, 160))
    splits = dict(zip(("train", "calibrate", "select"), (Split(held, r) for r in rows)))
    names = tuple(f"class {k}" for k in range(CLASSES))
    data = Data("made up", names, names, **splits, report=splits["select"], fingerprint="f")
    return Job(data, "classification", here, None, net("small"))


@pytest.fixture
def told(job: Job) -> tuple[Job, list[str]]:
    lines: list[str] = []
    return dataclasses.replace(job, say=lines.append), lines


def zeros_of(model: nn.Module, name: str) -> np.ndarray:
    return (model.get_submodule(name).weight.detach() == 0).numpy()


FREE = ("stem.0", "inner.0", "left.0", "right.0", "skip")
"""Layers of the small net that may get zeros: neither the depthwise convolution nor the last layer."""


# --- masks against numpy ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 17, 60, 119, 120])
def test_the_smallest_are_those_a_stable_sort_puts_first(count: int) -> None:
    values = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    wanted = np.zeros(120, bool)
    wanted[np.argsort(values.ravel(), kind="stable")[:count]] = True
    assert np.array_equal(masks.smallest(torch.from_numpy(values), count).numpy().ravel(), wanted)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_among_equal_values_exactly_as_many_as_asked_go_the_first_ones(count: int) -> None:
    values = torch.tensor([[0.5, 0.1, 0.5, 0.5], [0.5, 0.9, 0.5, 0.5]])
    wanted = np.zeros(8, bool)
    wanted[np.argsort(values.numpy().ravel(), kind="stable")[:count]] = True
    assert np.array_equal(masks.smallest(values, count).numpy().ravel(), wanted)


def test_one_threshold_over_all_layers_takes_from_the_small_layer_what_the_large_one_keeps() -> None:
    rng = np.random.default_rng(1)
    arrays = {"a": rng.normal(size=(8, 3)), "b": 0.1 * rng.normal(size=(10, 4))}
    gone = masks.over_all({k: torch.from_numpy(v) for k, v in arrays.items()}, 0.4)
    together = np.concatenate([np.abs(v).ravel() for v in arrays.values()])
    threshold = np.sort(together)[round(0.4 * 64) - 1]
    for name, array in arrays.items():
        assert np.array_equal(gone[name].numpy(), np.abs(array) <= threshold)
    assert sum(int(g.sum()) for g in gone.values()) == round(0.4 * 64)


def test_each_layer_alone_loses_its_own_share() -> None:
    tensors = {"a": torch.randn(8, 3), "b": 100 * torch.randn(10, 4)}
    gone = masks.each_alone(tensors, 0.25)
    assert {k: int(g.sum()) for k, g in gone.items()} == {"a": 6, "b": 10}


@pytest.mark.parametrize("kept, of", [(2, 4), (1, 4), (4, 8), (3, 4)])
def test_n_of_m_keeps_the_largest_of_every_block_of_input_channels(kept: int, of: int) -> None:
    weight = np.random.default_rng(2).normal(size=(5, 16, 3, 2)).astype(np.float32)
    gone = masks.n_of_m(torch.from_numpy(weight), kept, of).numpy()
    for o in range(5):
        for y in range(3):
            for x in range(2):
                for start in range(0, 16, of):
                    block = np.abs(weight[o, start : start + of, y, x])
                    lost = np.argsort(block, kind="stable")[: of - kept]
                    assert set(np.flatnonzero(gone[o, start : start + of, y, x])) == set(lost)


def test_n_of_m_of_equal_weights_still_keeps_exactly_n() -> None:
    gone = masks.n_of_m(torch.ones(3, 8), 2, 4)
    assert gone.reshape(3, 2, 4).sum(2).unique().tolist() == [2]


def test_n_of_m_refuses_inputs_that_are_no_multiple() -> None:
    with pytest.raises(ValueError, match="6 inputs"):
        masks.n_of_m(torch.ones(3, 6), 2, 4)


def test_the_schedule_is_the_cubic_one() -> None:
    """Zhu & Gupta, eq. 1, with s_i = 0, by hand for s_f = 0.8 and four rounds."""
    got = [masks.schedule(0.8, k, 4) for k in range(1, 5)]
    assert got == pytest.approx([0.8 * (1 - 27 / 64), 0.8 * (1 - 8 / 64), 0.8 * (1 - 1 / 64), 0.8])


def test_every_kind_of_weight_is_found_once_with_inputs_on_axis_1() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 8, 2)
            self.grouped_up = nn.ConvTranspose2d(8, 8, 2, groups=2)
            self.attend, self.fc = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
            self.tied = nn.Linear(8, 8)
            self.tied.weight = self.fc.weight

    found = masks.weights(Mixed())
    assert {k: tuple(w.shape[:2]) for k, w in found.items()} == {
        "conv.weight": (6, 4),
        "up.weight": (8, 6),
        "attend.in_proj_weight": (24, 8),
        "attend.out_proj.weight": (8, 8),
        "fc.weight": (8, 8),
    }


def test_holding_writes_through_to_a_transposed_convolution() -> None:
    model = nn.ConvTranspose2d(8, 5, 2)
    gone = {"weight": masks.n_of_m(masks.weights(model)["weight"], 2, 4)}
    masks.hold(model, gone)
    assert np.array_equal((model.weight == 0).numpy().transpose(1, 0, 2, 3), gone["weight"].numpy())


def test_packed_sizes_are_those_of_gzip_and_of_int8_by_numpy() -> None:
    weights = [torch.randn(16, 8, 3, 3), torch.randn(10, 16)]
    weights[0][torch.rand(weights[0].shape) < 0.7] = 0
    weights[1][3] = 0  # an output with no weight at all
    got = masks.packed(weights)
    arrays = [w.numpy() for w in weights]
    whole = []
    for a in arrays:
        rows = a.reshape(len(a), -1)
        peak = np.abs(rows).max(1, keepdims=True)
        whole.append(np.rint(rows / np.where(peak > 0, peak, 1) * 127).astype(np.int8).tobytes())
    floats, integers = b"".join(a.tobytes() for a in arrays), b"".join(whole)
    assert (got.float32, got.int8) == (len(floats), len(integers))
    assert got.float32_gzip == pytest.approx(len(gzip.compress(floats, 6)), abs=32)
    assert got.int8_gzip == pytest.approx(len(gzip.compress(integers, 6)), abs=32)


# --- the step -----------------------------------------------------------------------------------------


def test_global_zeros_are_the_smallest_of_the_network_and_exactly_as_many(job: Job) -> None:
    done = Step(ratio=0.6).apply(copy.deepcopy(job.original), job)
    before = np.concatenate([job.original.get_submodule(n).weight.detach().abs().numpy().ravel() for n in FREE])
    after = np.concatenate([zeros_of(done, n).ravel() for n in FREE])
    assert after.sum() == round(0.6 * len(before))
    assert before[after].max() <= before[~after].min()


def test_local_zeros_are_the_same_share_of_every_layer(job: Job) -> None:
    done = Step(ratio=0.75, scope="local").apply(copy.deepcopy(job.original), job)
    for name in FREE:
        held = zeros_of(done, name)
        assert held.sum() == round(0.75 * held.size), name


def test_what_survives_is_untouched_and_the_ends_are_left_alone(job: Job) -> None:
    done = Step(ratio=0.5, keep=("right",)).apply(copy.deepcopy(job.original), job)
    for name in (*FREE, "depthwise.0", "fc"):
        was, now = (m.get_submodule(name).weight.detach().numpy() for m in (job.original, done))
        if name in ("right.0", "depthwise.0", "fc"):
            assert np.array_equal(now, was), name
        else:
            assert np.array_equal(now[now != 0], was[now != 0]), name
            assert (now == 0).any(), name


def test_two_of_four_leaves_a_layer_of_three_inputs_alone_and_names_it(told: tuple[Job, list[str]]) -> None:
    job, lines = told
    done = Step(pattern="2:4").apply(copy.deepcopy(job.original), job)
    for name in ("inner.0", "left.0", "right.0", "skip"):
        weight = done.get_submodule(name).weight.detach().numpy()
        blocks = np.moveaxis(weight, 1, -1).reshape(-1, 4)
        assert ((blocks != 0).sum(1) <= 2).all(), name
    assert zeros_of(done, "skip").mean() == 0.5
    assert not zeros_of(done, "stem.0").any()
    assert "Left alone (3 inputs are no multiple of 4): stem.0." in lines
    assert "Left alone (depthwise): depthwise.0." in lines
    assert "Left alone (protected by the task): fc." in lines


def test_it_says_plainly_what_zeros_bring_with_the_size_that_gzip_really_gives(told: tuple[Job, list[str]]) -> None:
    job, lines = told
    done = Step(ratio=0.9).apply(copy.deepcopy(job.original), job)
    floats = b"".join(m.weight.detach().numpy().tobytes() for m in done.modules() if type(m) in (nn.Conv2d, nn.Linear))
    saved = 100 * (1 - len(gzip.compress(floats, 6)) / len(floats))
    sentence = next(line for line in lines if line.startswith("Zeros do not shrink a dense file nor speed it up"))
    assert f"Gzip makes the float32 weights {saved:.1f} % smaller" in sentence
    assert saved > 50


def test_an_emptied_layer_is_named(told: tuple[Job, list[str]]) -> None:
    job, lines = told
    model = copy.deepcopy(job.original)
    with torch.no_grad():
        model.skip.weight *= 1e-6
    Step(ratio=0.5).apply(model, job)
    assert "Nothing is left of skip: lower the ratio, or choose scope local." in lines


def test_batch_norms_are_re_estimated(job: Job) -> None:
    done = Step(ratio=0.8).apply(copy.deepcopy(job.original), job)
    inputs = torch.from_numpy(job.data.calibrate.inputs(None))
    with torch.no_grad():
        out = done.stem[0](inputs)
    assert torch.allclose(done.stem[1].running_mean, out.mean((0, 2, 3)), atol=1e-4)
    assert not done.training


def test_zeros_stay_zeros_through_recovery_in_the_network_and_in_its_average(job: Job) -> None:
    step = Step(ratio=0.5, rounds=2, epochs=8.0, lr=0.05)
    done = step.apply(copy.deepcopy(job.original), job)
    held = np.concatenate([zeros_of(done, n).ravel() for n in FREE])
    assert held.sum() == round(0.5 * held.size)
    moved = done.right[0].weight.detach() - job.original.right[0].weight
    assert moved[done.right[0].weight != 0].abs().max() > 1e-4  # it did learn
    assert not any(hasattr(m, "parametrizations") or m._forward_pre_hooks for m in done.modules())
    assert done.state_dict().keys() == job.original.state_dict().keys()


def test_after_each_step_of_training_the_live_weights_are_zero_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = masks.hold

    def spy(model: nn.Module, gone: dict[str, Any]) -> None:
        real(model, gone)
        seen.append(float(sum((masks.weights(model)[n] == 0).sum() for n in gone)))

    monkeypatch.setattr(masks, "hold", spy)
    Step(ratio=0.5, epochs=3.0).apply(copy.deepcopy(job.original), job)
    total = sum(job.original.get_submodule(n).weight.numel() for n in FREE)
    assert len(seen) > 2  # before, in each step, after
    assert min(seen) == round(0.5 * total)


def test_rounds_without_training_end_where_one_round_does(job: Job) -> None:
    for pattern in ("unstructured", "1:4"):
        one, four = (Step(pattern=pattern, rounds=r).apply(copy.deepcopy(job.original), job) for r in (1, 4))
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), four.state_dict().values()))


def test_a_network_without_labels_recovers_from_its_teacher_alone(job: Job) -> None:
    done = Step(ratio=0.9, epochs=1.0, distill=1.0).apply(
        copy.deepcopy(job.original), dataclasses.replace(job, original=None)
    )
    assert all(torch.isfinite(v).all() for v in done.state_dict().values() if v.is_floating_point())


def test_all_rounds_together_keep_to_the_time(job: Job) -> None:
    said: list[str] = []
    began = time.monotonic()
    step = Step(ratio=0.5, rounds=2, epochs=1e5, seconds=2.0)
    step.apply(copy.deepcopy(job.original), dataclasses.replace(job, say=said.append))
    assert time.monotonic() - began < 2.0 + 3.0
    trained = [re.fullmatch(r"trained ([\d.]+) epochs in 1 s", line) for line in said if line.startswith("trained")]
    assert len(trained) == 2
    assert all(found and float(found[1]) > 0 for found in trained)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_ratio_of_nothing_or_everything_is_refused(ratio: float) -> None:
    with pytest.raises(BadConfig, match="ratio"):
        Step(ratio=ratio)


@pytest.mark.parametrize("pattern", ["", "2", "4:4", "5:4", "0:4", "-1:4", "2:4:8", "two:four", "2.0:4"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(BadConfig, match="pattern"):
        Step(pattern=pattern)


@pytest.mark.parametrize(
    "bad", [{"scope": "layer"}, {"rounds": 0}, {"epochs": -1.0}, {"seconds": -1.0}, {"lr": 0.0}, {"distill": 2.0}]
)
def test_a_bad_setting_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=next(iter(bad))):
        Step(**bad)


def test_a_layer_to_keep_that_is_not_there_is_told_with_the_nearest(job: Job) -> None:
    with pytest.raises(UnknownName, match=r"right\.0"):
        Step(keep=("rihgt.0",)).apply(copy.deepcopy(job.original), job)


def test_a_network_with_nothing_to_take_is_refused_with_the_reasons(job: Job) -> None:
    with pytest.raises(BadConfig, match="kept on request"):
        Step(keep=("stem", "inner", "left", "right", "skip")).apply(copy.deepcopy(job.original), job)


def test_recovery_without_training_images_is_refused(job: Job) -> None:
    without = dataclasses.replace(job, data=dataclasses.replace(job.data, train=None))
    with pytest.raises(BadConfig, match="no training images"):
        Step(epochs=1.0).apply(copy.deepcopy(job.original), without)
