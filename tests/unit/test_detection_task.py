"""The detection task: scores with honest errors, changes that can be checked by eye, heads that are protected."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from lighten.errors import BadConfig, BadModel
from lighten.heads import Head, Level
from lighten.kit import average_precision as ap
from lighten.kit import boxes
from lighten.tasks import detection
from lighten.tasks.detection import Found, bind
from lighten.types import BoxDrift as Drift
from lighten.types import ClassChange, Estimate

pytest.importorskip("faster_coco_eval")

HEAD = Head((Level(16, 16, (8.0, 8.0)),), 3)
SIZE = (128, 128)
Row = tuple[float, float, float, float, float, int]
NAMES = ("cat", "dog", "truck")


def raw(*images: list[Row]) -> np.ndarray:
    """Outputs that hold these detections (x1, y1, x2, y2, score, class) at the place nearest to each box's centre."""
    out = np.zeros((len(images), HEAD.places, HEAD.values), np.float32)
    out[..., 4:] = -12
    for n, rows in enumerate(images):
        for x1, y1, x2, y2, score, kind in rows:
            c, r = int((x1 + x2) / 16), int((y1 + y2) / 16)
            x, y, place = c * 8 + 4, r * 8 + 4, r * 16 + c
            out[n, place, :4] = np.array([x - x1, y - y1, x2 - x, y2 - y]) / 8
            out[n, place, 4 + kind] = math.log(score / (1 - score))
    return out


def labels_of(*images: list[tuple[float, ...]]) -> np.ndarray:
    """Rows of class, x1, y1, x2, y2 and, if they are ignored, 1."""
    out = np.full((len(images), max(1, *map(len, images)), 6), -1, np.float32)
    for n, rows in enumerate(images):
        for m, row in enumerate(rows):
            out[n, m] = (*row, *[0] * (6 - len(row)))
    return out


A, B, C = (10, 10, 40, 40), (60, 60, 110, 120), (80, 8, 100, 28)
TRUTH = labels_of([(0, *A), (1, *B)], [(0, *A)], [(1, *B)], [])
GOOD = raw([(*A, 0.9, 0), (*B, 0.8, 1)], [(*A, 0.7, 0)], [(*B, 0.9, 1)], [])
WORSE = raw([(*A, 0.9, 0)], [(*A, 0.7, 0)], [(*B, 0.9, 2)], [])
TASK = bind(HEAD, SIZE)


# --- score and drop ---------------------------------------------------------------------------------------


def test_all_found_is_100_with_no_error() -> None:
    assert TASK.score(GOOD, TRUTH) == Estimate(pytest.approx(100), pytest.approx(0), 4)
    assert TASK.extra(GOOD, TRUTH) == (
        ("AP50", Estimate(pytest.approx(100), pytest.approx(0), 4)),
        ("AP75", Estimate(pytest.approx(100), pytest.approx(0), 4)),
        ("APsmall", Estimate(pytest.approx(100), pytest.approx(0), 4)),
        ("APmedium", Estimate(pytest.approx(100), pytest.approx(0), 4)),
    )


def test_what_is_lost_is_lost_by_class() -> None:
    # Class 0 stays at 100; of class 1 one box is gone and one has become class 2: 0. Class 2 is nobody.
    assert TASK.per_class(GOOD, WORSE, TRUTH, NAMES) == (
        ClassChange("cat", pytest.approx(100), pytest.approx(100), 2),
        ClassChange("dog", pytest.approx(100), pytest.approx(0), 2),
    )
    assert TASK.score(WORSE, TRUTH).value == pytest.approx(50)
    lost = TASK.drop(GOOD, WORSE, TRUTH)
    assert (lost.value, lost.n) == (pytest.approx(50), 4)
    assert lost.error > 0


def test_score_is_the_evaluators_number_of_what_is_found() -> None:
    dice = np.random.default_rng(0)
    outputs = dice.normal(-3, 2, (6, HEAD.places, HEAD.values)).astype(np.float32)
    outputs[..., :4] = dice.uniform(0, 3, outputs[..., :4].shape)
    labels = labels_of(*[[(k % 3, 10 * k, 10, 10 * k + 30, 45), (1, 50, 50, 90, 80)] for k in range(6)])
    found = boxes.detections(outputs, HEAD, TASK.floor, TASK.iou, TASK.most, size=SIZE)
    assert TASK.score(outputs, labels).value == ap.coco(found, labels, 3).mean > 0
    assert dict(TASK.extra(outputs, labels))["AP50"].value == ap.coco(found, labels, 3).at50


def test_drop_of_equal_outputs_is_nothing() -> None:
    assert TASK.drop(WORSE, WORSE.copy(), TRUTH) == Estimate(0.0, 0.0, 4)


def many(dice: np.random.Generator, n: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs before and after of `n` images with one object: after, one in eight of those found is lost."""
    seen, lost, stray = dice.random(n) < 0.8, dice.random(n) < 1 / 8, dice.random(n) < 0.3
    rows = [
        ([(*A, p, 0)] if s else []) + ([(*B, q, 0)] if x else [])
        for s, x, p, q in zip(seen, stray, dice.uniform(0.3, 0.99, n), dice.uniform(0.3, 0.99, n))
    ]
    after = [row[1:] if s and gone else row for row, s, gone in zip(rows, seen, lost)]
    return raw(*rows), raw(*after), labels_of(*[[(0, *A)]] * n)


def test_the_error_of_the_drop_is_its_spread_over_fresh_images() -> None:
    dice = np.random.default_rng(0)
    drops = []
    for _ in range(60):
        before, after, labels = many(dice)
        old, new = (ap.summary(ap.matches(TASK.found(o), labels, 3)).mean for o in (before, after))
        drops.append(old - new)
    reported = [TASK.drop(*many(dice)) for _ in range(4)]
    assert np.mean([r.error for r in reported]) == pytest.approx(np.std(drops), rel=0.3)
    assert [r.n for r in reported] == [50] * 4


def test_the_error_of_the_drop_is_smaller_than_that_of_two_scores() -> None:
    before, after, labels = many(np.random.default_rng(1))
    apart = math.hypot(TASK.score(before, labels).error, TASK.score(after, labels).error)
    assert 0 < TASK.drop(before, after, labels).error < 0.8 * apart


def test_no_images_and_no_objects_are_not_a_number() -> None:
    nothing = TASK.score(GOOD[:0], TRUTH[:0])
    assert math.isnan(nothing.value)
    assert nothing.n == 0
    assert math.isnan(TASK.drop(GOOD[:0], GOOD[:0], TRUTH[:0]).value)
    assert math.isnan(TASK.score(GOOD, labels_of([], [], [], [])).value)
    assert TASK.extra(GOOD, labels_of([], [], [], [])) == ()
    assert TASK.extra(GOOD[:0], TRUTH[:0]) == ()
    assert TASK.per_class(GOOD[:0], GOOD[:0], TRUTH[:0], NAMES) == ()


def test_ignored_objects_neither_count_nor_are_they_wrong() -> None:
    labels = labels_of([(0, *A), (1, *B, 1)], [(0, *A)])
    assert TASK.score(GOOD[:2], labels).value == pytest.approx(100)
    assert [c.name for c in TASK.per_class(GOOD[:2], GOOD[:2], labels, NAMES)] == ["cat"]


def test_finding_happens_once_for_the_same_outputs_and_anew_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    find = boxes.detections
    monkeypatch.setattr(boxes, "detections", lambda *a, **k: calls.append(1) or find(*a, **k))
    outputs = raw([(*A, 0.77, 0)], [(*B, 0.66, 1)], [], [])
    TASK.score(outputs, TRUTH), TASK.extra(outputs, TRUTH), TASK.flipped(outputs, outputs.copy())
    assert len(calls) == 1
    outputs[0, 0, :5] = 3.0
    assert len(TASK.found(outputs)[0]) == 2
    bind(HEAD).found(outputs)
    assert len(calls) == 3


# --- what changed ------------------------------------------------------------------------------------------


def shifted(by: float, score: float = 0.8) -> np.ndarray:
    x1, y1, x2, y2 = B
    return raw([(x1 + by, y1, x2 + by, y2, score, 1)])


def test_flipped_names_images_that_are_shown_otherwise() -> None:
    assert TASK.flipped(GOOD, WORSE).tolist() == [0, 2]
    assert TASK.flipped(GOOD, GOOD).tolist() == []
    assert TASK.flipped(raw([(*A, 0.31, 0)]), raw([(*A, 0.29, 0)])).tolist() == [0]  # fell below the threshold
    assert TASK.flipped(raw([(*A, 0.29, 0)]), raw([(*A, 0.02, 0)])).tolist() == []  # was not shown before
    assert TASK.flipped(raw([]), raw([(*A, 0.9, 0)])).tolist() == [0]
    assert TASK.flipped(shifted(0), shifted(15)).tolist() == []  # overlap 35/65
    assert TASK.flipped(shifted(0), shifted(20)).tolist() == [0]  # overlap 30/70


def test_drift_tells_boxes_and_scores_apart() -> None:
    near = pytest.approx
    assert TASK.drift(GOOD, GOOD) == Drift(near(1.0), near(0.0), near(100.0), 4)
    assert TASK.drift(shifted(0), shifted(10)) == Drift(near(40 / 60, abs=1e-5), near(0.0, abs=1e-6), near(100.0), 1)
    moved = TASK.drift(shifted(0), shifted(0, 0.6))
    assert moved == Drift(near(1.0), near(0.2, abs=1e-5), near(100.0), 1)
    # Of 4 and 3 detections, 2 pairs are left.
    assert TASK.drift(GOOD, WORSE) == Drift(near(1.0), near(0.0), near(400 / 7), 4)


def test_drift_of_nothing() -> None:
    empty = raw([])
    assert TASK.drift(empty, empty).matched == 100
    assert TASK.drift(shifted(0), empty).matched == 0
    assert math.isnan(TASK.drift(shifted(0), empty).iou)


def test_agreement_is_what_is_found_again_in_place_and_score() -> None:
    assert TASK.agreement(GOOD, GOOD) == 100
    assert TASK.agreement(GOOD, WORSE) == 50
    assert TASK.agreement(shifted(0), shifted(2)) == 100  # overlap 48/52
    assert TASK.agreement(shifted(0), shifted(4)) == 0  # overlap 46/54
    assert TASK.agreement(shifted(0), shifted(0, 0.76)) == 100
    assert TASK.agreement(shifted(0), shifted(0, 0.74)) == 0
    assert TASK.agreement(shifted(0, 0.31), shifted(0, 0.28)) == 100  # as near, though no longer shown
    assert TASK.agreement(raw([]), raw([])) == 100
    assert TASK.agreement(raw([]), shifted(0)) == 0


def test_decode_names_what_is_shown_best_first() -> None:
    got = TASK.decode(raw([(*A, 0.6, 2), (*B, 0.8, 1), (*C, 0.2, 0)])[0], NAMES)
    assert got == [
        Found("dog", pytest.approx(0.8), tuple(map(pytest.approx, B))),
        Found("truck", pytest.approx(0.6), tuple(map(pytest.approx, A))),
    ]
    assert [f.name for f in TASK.decode(GOOD[0], NAMES, top=1)] == ["cat"]
    with pytest.raises(BadModel, match="2 names"):
        TASK.decode(GOOD[0], NAMES[:2])


def test_boxes_are_cut_to_the_size_that_the_task_is_bound_with() -> None:
    over = raw([(90, 90, 150, 140, 0.9, 0)])[0]
    assert TASK.decode(over, NAMES)[0].box == (90, 90, 128, 128)
    assert bind(HEAD).decode(over, NAMES)[0].box == (90, 90, 150, 140)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="floor <= threshold"):
        bind(HEAD, threshold=0.1, floor=0.2)
    with pytest.raises(ValueError, match="iou"):
        bind(HEAD, iou=0.0)


# --- training ------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_kit_with_this_head() -> None:
    import torch

    from lighten.kit import detection_loss

    x, y = torch.from_numpy(GOOD), torch.from_numpy(TRUTH)
    got = TASK.loss(lambda x: x, x, y)
    assert float(got) == float(detection_loss.loss(x, y, HEAD))
    student = torch.from_numpy(WORSE)
    assert float(TASK.distill_loss(student, x)) == float(detection_loss.distill_loss(student, x, HEAD))
    with pytest.raises(BadConfig, match="label_smoothing"):
        TASK.loss(lambda x: x, x, y, 0.1)
    with pytest.raises(BadConfig, match="dkd"):
        TASK.dkd_loss(student, x, None, 4.0)


def test_protects_what_the_detector_names() -> None:
    from torch import nn

    class Own(nn.Module):
        def head_layers(self) -> tuple[str, ...]:
            return "a", "b"

    assert TASK.protect(Own()) == ("a", "b")


def test_protects_the_last_layers_of_each_branch_of_any_network() -> None:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Conv2d(8, 8, 3, 2)
            self.box = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))
            self.scale = nn.Parameter(torch.ones(1))
            self.score = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = []
            for y in (z := self.body(x), self.deep(z)):
                near = (self.box(y) * self.scale).flatten(2).mT.exp()
                rows.append(torch.cat([near, self.score(y.flatten(2).mT)], 2))
            return torch.cat(rows, 1)

    model = Net().train().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert TASK.protect(model) == ("box.2", "score")
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    with pytest.raises(BadModel, match="head_layers"):
        bind(HEAD).protect(model)


def test_the_walk_to_the_last_layers_finds_those_that_our_own_detector_names() -> None:
    import torch

    from lighten.models.nano_detector import NanoDetector

    model = NanoDetector(3, widths=(8, 8, 8, 8, 8), depths=(0, 0, 0, 0), neck=8, towers=1).eval()
    assert sorted(detection.last_layers(model, (64, 64))) == sorted(model.head_layers())
    with torch.no_grad():
        head = model.head((3, 64, 64))
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, head.places, head.values)


def test_a_device_needs_no_torch_for_it() -> None:
    code = "import lighten.tasks.detection, sys; print([m for m in ('torch', 'faster_coco_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
