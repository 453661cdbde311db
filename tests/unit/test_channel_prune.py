"""The pruning step: widths worked out by hand, rounds that stop in time, and settings that make no sense."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lighten.errors import BadConfig, BadData, BadModel
from lighten.kit import channels
from lighten.methods.channel_prune import Step, narrowed, rounded, toward
from lighten.types import ChannelGroup, Data, Device, Job
from nets import CLASSES, SHAPE, images, net

torch.set_num_threads(1)


def group(name: str, channels: int, multiple: int = 1) -> ChannelGroup:
    return ChannelGroup(name, channels, ((name, 1),), (), multiple)


# --- widths, by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "multiple", "width", "device", "wanted"),
    [
        (64, 1, 30, 8, 32),  # up to the next 8
        (64, 1, 32, 8, 32),
        (64, 1, 0.1, 8, 8),  # never none
        (20, 1, 18, 8, 20),  # never above what there is
        (48, 6, 20, 8, 24),  # a multiple of 6 and of 8
        (440, 55, 100, 8, 110),  # 440 would be the only multiple of both: the convolution's own
        (12, 1, 5, 16, 12),  # one channel at a time, but the device wants 16
    ],
)
def test_widths_are_rounded_up_to_what_kernels_like(
    channels: int, multiple: int, width: float, device: int, wanted: int
) -> None:
    assert rounded(group("g", channels, multiple), width, device) == wanted


def test_local_takes_the_share_from_each_group() -> None:
    groups = [group("a", 64), group("b", 20), group("c", 8)]
    originals = {"a": 64, "b": 20, "c": 8}
    assert narrowed(groups, {}, originals, 0.5, "local", 4, 0.1) == {"a": 32, "b": 12, "c": 4}
    assert narrowed(groups, {}, originals, 0.9, "local", 1, 0.25) == {"a": 16, "b": 5, "c": 2}


def test_global_removes_the_lowest_relative_scores_wherever_they_are() -> None:
    """a over its mean 2.5: .4 .8 1.2 1.6; b over 100: .1 .1 1.9 1.9. Half of 8 are .1 .1 .4 .8."""
    groups = [group("a", 4), group("b", 4)]
    scores = {"a": (1.0, 2.0, 3.0, 4.0), "b": (190.0, 10.0, 190.0, 10.0)}
    originals = {"a": 4, "b": 4}
    assert narrowed(groups, scores, originals, 0.5, "global", 1, 0.0) == {"a": 2, "b": 2}
    assert narrowed(groups, scores, originals, 0.25, "global", 1, 0.0) == {"a": 4, "b": 2}


def test_global_leaves_each_group_its_floor_and_takes_the_rest_elsewhere() -> None:
    groups = [group("a", 4), group("b", 4)]
    scores = {"a": (1.0, 1.1, 1.2, 1.3), "b": (0.001, 0.002, 0.003, 4.0)}
    assert narrowed(groups, scores, {"a": 4, "b": 4}, 0.5, "global", 1, 0.5) == {"a": 2, "b": 2}


def test_global_counts_atoms_by_their_channels_and_what_went_before() -> None:
    """Of 16 original channels 4 are gone; a share of a half asks for 4 more: two atoms of two."""
    groups = [group("a", 8, 2), group("b", 4)]
    scores = {"a": (0.1, 0.2, 1.0, 2.7), "b": (1.0, 1.0, 1.0, 1.0)}
    assert narrowed(groups, scores, {"a": 12, "b": 4}, 0.5, "global", 1, 0.0) == {"a": 4, "b": 4}


def test_scores_of_zero_are_no_division() -> None:
    assert narrowed([group("a", 4)], {"a": (0.0,) * 4}, {"a": 4}, 0.5, "global", 1, 0.0) == {"a": 2}


def test_rounds_walk_to_exact_widths_in_geometric_steps() -> None:
    """64 to 16 in two: by half each. 20 to 5 with multiples of 8: 10 becomes 16. The end is exact."""
    first = [group("a", 64), group("b", 20)]
    goal = {"a": 16, "b": 5}
    assert toward(goal, first, first, 0.5, 8) == {"a": 32, "b": 16}
    assert toward(goal, first, first, 1.0, 8) == goal


# --- the step -----------------------------------------------------------------------------------------


@pytest.fixture
def job(here: Device) -> Job:
    from lighten.data.splits import ArrayImages, Split

    x, labels = images(512, seed=2)
    held = ArrayImages(x.numpy(), labels.numpy())
    rows = np.split(np.arange(512), [128, 384, 448])
    names = tuple(f"class {k}" for k in range(CLASSES))
    splits = {k: Split(held, r) for k, r in zip(("train", "calibrate", "select", "report"), rows)}
    data = Data("made up", names, names, **splits, fingerprint="f")
    return Job(data, "classification", dataclasses.replace(here, channel_multiple=8), None, net("small"))


@pytest.fixture
def said(job: Job) -> tuple[Job, list[str]]:
    lines: list[str] = []
    return dataclasses.replace(job, say=lines.append), lines


def widths(model: Any) -> dict[str, int]:
    return {g.name: g.channels for g in channels.groups(model, SHAPE, ("fc",))}


def size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def top1(model: Any, seed: int = 9) -> float:
    x, y = images(256, seed)
    with torch.inference_mode():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def run(step: Step, job: Job) -> Any:
    return step.apply(copy.deepcopy(job.original), job)


def test_half_of_every_group_goes_and_the_classes_stay(job: Job) -> None:
    done = run(Step(ratio=0.5, scope="local"), job)
    assert widths(done) == {"stem.0": 8, "left.0": 32, "right.0": 40, "skip": 8}
    assert done.fc.out_features == CLASSES
    assert size(done) < 0.4 * size(job.original)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_the_share_is_met_up_to_rounding(job: Job, scope: str, ratio: float) -> None:
    """At multiples of one channel, exactly (rounded up in every group for local)."""
    done = run(Step(ratio=ratio, scope=scope, round_to=1), job)
    left = sum(widths(done).values())
    assert math.ceil(176 * (1 - ratio)) - 1 <= left <= math.ceil(176 * (1 - ratio)) + (4 if scope == "local" else 0)


def test_multiples_are_the_devices_unless_told_otherwise(job: Job) -> None:
    assert all(w % 8 == 0 for w in widths(run(Step(ratio=0.6), job)).values())
    odd = run(Step(ratio=0.6, scope="local", round_to=5), job)
    assert widths(odd) == {"stem.0": 10, "left.0": 30, "right.0": 35, "skip": 10}


def test_filters_of_zeros_are_found_and_cost_nothing(job: Job) -> None:
    """`right` of the small network has twenty filters of zeros: they answer a constant, which batch norms see to."""
    done = run(Step(widths=(("right.0", 60),), importance="l1"), job)
    kept = done.right[0].weight.flatten(1).abs().sum(1)
    assert len(kept) == 60
    assert (kept > 0).all()


def test_importance_beats_chance(job: Job) -> None:
    """Held to the control: the same width by second-order importance and by chance."""
    taken = {"right.0": 24}
    informed = top1(run(Step(widths=tuple(taken.items()), importance="hessian"), job))
    chance = [
        top1(run(Step(widths=tuple(taken.items()), importance="random"), dataclasses.replace(job, seed=s)))
        for s in range(5)
    ]
    assert informed > np.mean(chance)


@pytest.mark.parametrize("importance", ["l1", "l2", "bn-scale", "taylor", "hessian", "random"])
def test_every_importance_prunes(job: Job, importance: str) -> None:
    done = run(Step(importance=importance, images=32), job)
    assert size(done) < size(job.original)
    assert not done.training


def test_exact_widths_are_exact_whatever_the_device_likes(job: Job) -> None:
    done = run(Step(widths=(("left.0", 33), ("skip", 5))), job)
    assert widths(done) == {"stem.0": 16, "left.0": 33, "right.0": 80, "skip": 5}


def test_rounds_end_where_one_round_does(job: Job) -> None:
    goal = (("left.0", 21), ("right.0", 20))
    assert widths(run(Step(widths=goal, rounds=3), job)) == widths(run(Step(widths=goal), job))
    at_once, slowly = (widths(run(Step(ratio=0.5, scope="local", rounds=n, round_to=1), job)) for n in (1, 3))
    assert at_once == slowly


def test_batch_norms_are_measured_anew(job: Job) -> None:
    done = run(Step(ratio=0.5, scope="local", images=64), job)
    x = torch.from_numpy(job.data.calibrate.take(64).inputs(None))
    seen: list[torch.Tensor] = []
    done.stem[0].register_forward_hook(lambda m, a, out: seen.append(out))
    done(x)
    torch.testing.assert_close(done.stem[1].running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_recovery_between_rounds_learns(job: Job) -> None:
    step = Step(ratio=0.8, scope="local", rounds=2, images=64)
    bare, trained = run(step, job), run(dataclasses.replace(step, recover=1024), job)
    assert widths(bare) == widths(trained)
    assert top1(trained) > top1(bare)


def test_damage_stops_pruning_and_keeps_the_round_before(said: tuple[Job, list[str]]) -> None:
    job, lines = said
    step = Step(widths=(("left.0", 1), ("right.0", 1), ("skip", 1)), rounds=3, max_damage=1e-6)
    done = run(dataclasses.replace(step, max_damage=20.0), job)
    (line,) = lines
    assert "stopped at round" in line
    kept = int(line.split("; round ")[1][0])
    steps = widths(done)
    assert steps["right.0"] == [80, 24, 8][kept]
    assert top1(done) > top1(run(dataclasses.replace(step, max_damage=0.0), job))


def test_sparse_training_shrinks_what_goes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The push comes once a step, on the network that trains."""
    pushes = []
    made: Callable[..., Any] = channels.regularizer

    def counted(*a: Any) -> Callable[[], None]:
        push = made(*a)
        return lambda: pushes.append(push())

    monkeypatch.setattr(channels, "regularizer", counted)
    done = run(Step(ratio=0.5, scope="local", sparse=2.0), job)
    assert len(pushes) == 2  # two epochs of one batch of 128
    assert widths(done)["left.0"] == 32


def test_layers_to_keep_are_kept_with_what_is_inside_them(job: Job) -> None:
    done = run(Step(ratio=0.7, scope="local", keep=("right", "left.0")), job)
    assert widths(done)["right.0"] == 80
    assert widths(done)["left.0"] == 64
    assert widths(done)["skip"] == 8


def test_nothing_removed_is_said(said: tuple[Job, list[str]]) -> None:
    job, lines = said
    done = run(Step(ratio=0.01, scope="local"), job)
    assert size(done) == size(job.original)
    assert "removed nothing" in lines[0]


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ratio": 0}, "Leave the step out"),
        ({"ratio": 1.0}, "everything"),
        ({"ratio": math.nan}, "ratio must be"),
        ({"ratio": -0.1}, "ratio must be"),
        ({"scope": "layer"}, "global, local"),
        ({"importance": "l3"}, "l2"),
        ({"widths": (("a", 0),)}, "widths"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 1.5}, "rounds"),
        ({"recover": -1}, "recover"),
        ({"least": 2.0}, "least"),
        ({"max_damage": math.inf}, "max_damage"),
        ({"sparse": -1.0}, "sparse"),
    ],
)
def test_bad_settings_are_refused_at_birth(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadConfig, match=f"(?i){says}"):
        Step(**settings)


def test_lists_from_json_are_the_same_settings() -> None:
    again = Step(widths=[["a", 3]], keep=["fc"])  # type: ignore[arg-type]
    assert again == Step(widths=(("a", 3),), keep=("fc",))
    assert hash(again) == hash(Step(widths=(("a", 3),), keep=("fc",)))


def test_names_that_are_not_there_bring_up_the_nearest(job: Job) -> None:
    with pytest.raises(BadConfig, match=r"'left'(.|\n)*left\.0"):
        run(Step(widths=(("left", 8),)), job)
    with pytest.raises(BadConfig, match=r"'rigth'(.|\n)*right"):
        run(Step(keep=("rigth",)), job)


def test_a_width_that_a_group_cannot_have_is_refused(job: Job) -> None:
    with pytest.raises(BadConfig, match="between 1 and 64"):
        run(Step(widths=(("left.0", 65),)), job)


def test_a_model_without_channels_to_prune_says_so(job: Job) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, CLASSES)).eval()
    with pytest.raises(BadModel, match="no channels"):
        Step().apply(model, job)


def test_missing_images_are_named(job: Job) -> None:
    none = dataclasses.replace(job, data=dataclasses.replace(job.data, calibrate=None))
    with pytest.raises(BadData, match="calibration images"):
        run(Step(), none)
    untrained = dataclasses.replace(job, data=dataclasses.replace(job.data, train=None))
    with pytest.raises(BadConfig, match="recover needs training images"):
        run(Step(recover=64), untrained)
    with pytest.raises(BadConfig, match="sparse needs training images"):
        run(Step(sparse=1.0), untrained)
