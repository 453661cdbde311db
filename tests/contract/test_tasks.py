"""Every task: numbers that can be worked out by hand, and losses that are torch's own."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest

from lighten.heads import Head, Level
from lighten.plugins import get, names
from lighten.types import ClassChange, Estimate

HEAD = Head((Level(4, 4, (8.0, 8.0)),), 3)
CONTRACT = (
    "METRIC",
    "score",
    "drop",
    "flipped",
    "agreement",
    "drift",
    "damage",
    "per_class",
    "extra",
    "decode",
    "loss",
    "distill_loss",
    "protect",
)


@pytest.mark.parametrize("name", names("tasks"))
def test_has_every_name_of_the_contract(name: str) -> None:
    """In the file itself, or in what its `bind` gives for a detector's head."""
    task = get("tasks", name)
    task = task.bind(HEAD) if hasattr(task, "bind") else task
    assert not [part for part in CONTRACT if not hasattr(task, part)]
    assert isinstance(task.METRIC, str)


# --- classification -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> ModuleType:
    return get("tasks", "classification")


def one_hot(answers: list[int], classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


LABELS = np.array([0, 0, 1, 1, 2, 2, 0, 1])
BEFORE = one_hot([0, 0, 1, 1, 2, 0, 1, 1])  # 6 of 8
AFTER = one_hot([0, 1, 1, 2, 2, 2, 1, 1])  # 5 of 8: two lost, one won


def test_score_is_the_share_in_percent_with_its_binomial_error(task: ModuleType) -> None:
    got = task.score(BEFORE, LABELS)
    assert got == Estimate(75.0, pytest.approx(100 * math.sqrt(0.75 * 0.25 / 8)), 8)
    assert task.score(one_hot([0, 1]), np.array([0, 1])) == Estimate(100.0, 0.0, 2)
    assert task.score(one_hot([0, 1]), np.array([1, 0])) == Estimate(0.0, 0.0, 2)


def test_score_of_nothing_is_not_a_number(task: ModuleType) -> None:
    got = task.score(np.zeros((0, 3), np.float32), np.zeros(0, int))
    assert math.isnan(got.value)
    assert math.isnan(got.error)
    assert got.n == 0


def test_drop_counts_only_images_that_changed_sides(task: ModuleType) -> None:
    # Lost: images 1 and 3 (right before, wrong after). Won: image 5. So (2 - 1) / 8.
    got = task.drop(BEFORE, AFTER, LABELS)
    moved = np.array([0, 1, 0, 1, 0, -1, 0, 0], float)
    assert got.value == pytest.approx(12.5)
    assert got.error == pytest.approx(100 * math.sqrt(moved.var(ddof=1) / 8))
    assert got.n == 8
    by_hand = math.sqrt((3 - 1 / 8) / 7 / 8)  # the sum of squares is 3, the mean 1/8
    assert got.error == pytest.approx(100 * by_hand)


def test_drop_error_is_that_of_a_bootstrap_over_images(task: ModuleType) -> None:
    dice = np.random.default_rng(0)
    labels = dice.integers(0, 3, 400)
    before, after = dice.normal(size=(2, 400, 3))
    after = before + 0.7 * after
    got = task.drop(before, after, labels)
    right = (before.argmax(1) == labels).astype(float) - (after.argmax(1) == labels)
    draws = right[dice.integers(0, 400, (4000, 400))].mean(1)
    assert got.error == pytest.approx(100 * draws.std(), rel=0.06)


def test_drop_of_equal_answers_is_nothing(task: ModuleType) -> None:
    assert task.drop(BEFORE, BEFORE, LABELS) == Estimate(0.0, 0.0, 8)
    assert task.drop(BEFORE[:1], BEFORE[:1], LABELS[:1]) == Estimate(0.0, 0.0, 1)


def test_drop_is_the_difference_of_the_scores(task: ModuleType) -> None:
    want = task.score(BEFORE, LABELS).value - task.score(AFTER, LABELS).value
    assert task.drop(BEFORE, AFTER, LABELS).value == pytest.approx(want)


def test_flipped_names_the_rows_whose_answer_changed(task: ModuleType) -> None:
    assert task.flipped(BEFORE, AFTER).tolist() == [1, 3, 5]
    assert task.flipped(BEFORE, 2 * BEFORE + 1).tolist() == []


def test_per_class_is_accuracy_of_each_and_leaves_out_the_empty(task: ModuleType) -> None:
    got = task.per_class(BEFORE, AFTER, LABELS, ("a", "b", "c", "nobody"))
    assert got == (
        ClassChange("a", pytest.approx(200 / 3), pytest.approx(100 / 3), 3),
        ClassChange("b", 100.0, pytest.approx(200 / 3), 3),
        ClassChange("c", 50.0, 100.0, 2),
    )


def test_top5_appears_above_twenty_classes(task: ModuleType) -> None:
    assert task.extra(np.zeros((2, 20)), np.array([0, 0])) == ()
    dice = np.random.default_rng(0)
    outputs, labels = dice.normal(size=(50, 21)), dice.integers(0, 21, 50)
    ((name, got),) = task.extra(outputs, labels)
    right = [int(label in np.argsort(-row)[:5]) for row, label in zip(outputs, labels)]
    assert name == "top5"
    assert got.value == pytest.approx(100 * np.mean(right))
    assert got.n == 50


def test_decode_is_softmax_in_order(task: ModuleType) -> None:
    got = task.decode(np.array([math.log(1), math.log(5), math.log(2), math.log(2) - 1e-9]), ("a", "b", "c", "d"), 3)
    assert [name for name, _ in got] == ["b", "c", "d"]
    assert [p for _, p in got] == pytest.approx([0.5, 0.2, 0.2])


def test_decode_stands_large_scores_and_few_classes(task: ModuleType) -> None:
    got = task.decode(np.array([1000.0, -1000.0], np.float32), ("a", "b"))
    assert got == [("a", 1.0), ("b", 0.0)]


def test_loss_is_cross_entropy(task: ModuleType) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 4), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 1])
    rows = model(x).detach().double().numpy()
    logs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    plain = -logs[np.arange(5), y.numpy()].mean()
    assert task.loss(model, x, y).item() == pytest.approx(plain, rel=1e-6)
    smooth = 0.9 * plain + 0.1 * -logs.mean()
    assert task.loss(model, x, y, label_smoothing=0.1).item() == pytest.approx(smooth, rel=1e-6)
    assert task.loss(model, x, y).requires_grad


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_distill_loss_is_kl_of_softened_answers_times_t_squared(task: ModuleType, t: float) -> None:
    import torch

    dice = np.random.default_rng(0)
    student, teacher = dice.normal(size=(2, 6, 5)) * 3

    def softened(x: np.ndarray) -> np.ndarray:
        e = np.exp(x / t)
        return e / e.sum(1, keepdims=True)

    p, q = softened(teacher), softened(student)
    want = t * t * (p * np.log(p / q)).sum(1).mean()
    got = task.distill_loss(torch.from_numpy(student), torch.from_numpy(teacher), t)
    assert float(got) == pytest.approx(want, rel=1e-5)
    assert float(task.distill_loss(torch.from_numpy(teacher), torch.from_numpy(teacher), t)) == pytest.approx(
        0, abs=1e-6
    )


def test_protect_names_the_layer_that_answers(task: ModuleType) -> None:
    from torch import nn

    from nets import net

    for name in ("small", "mobile"):
        model = net(name)
        (found,) = task.protect(model)
        assert dict(model.named_modules())[found].out_features == 10
    ends_in_conv = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert task.protect(ends_in_conv) == ("2",)
    assert task.protect(nn.ReLU()) == ()
