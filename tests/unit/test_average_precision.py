"""Average precision: a case worked out by hand, pycocotools and the evaluator on random ones, errors by resampling."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest

from lighten.errors import BadData, MissingBackend
from lighten.kit import average_precision as ap

Case = tuple[tuple[np.ndarray, ...], np.ndarray]


def labels_of(*images: list[tuple[float, ...]]) -> np.ndarray:
    """Rows of (class, x1, y1, x2, y2, ignore) for each image, filled up with rows of class -1."""
    out = np.zeros((len(images), max(1, *map(len, images)), 6), np.float32)
    out[..., 0] = -1
    for n, rows in enumerate(images):
        for m, row in enumerate(rows):
            out[n, m] = row
    return out


def found_of(*images: list[tuple[float, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(rows, np.float32).reshape(-1, 6) for rows in images)


def random_case(seed: int, images: int = 12, classes: int = 4, crowds: bool = True, ties: bool = True) -> Case:
    """Objects of many sizes, detections near some of them and some anywhere; the last class is never an object."""
    dice = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        n = int(dice.integers(0, 7))
        corner, side = dice.uniform(0, 150, (n, 2)), np.exp(dice.uniform(2, 5.2, (n, 2)))
        kind = dice.integers(0, classes - 1, n)
        ignore = (dice.random(n) < 0.2) & crowds
        objects = np.column_stack([kind, corner, corner + side, ignore])
        truth.append([tuple(row) for row in objects])
        near = objects[dice.integers(0, n, 2 * n)] if n else objects
        moved = near[:, 1:5] + dice.normal(0, 0.08, (len(near), 4)) * np.tile(near[:, 3:5] - near[:, 1:3], 2)
        stray = dice.uniform(0, 120, (int(dice.integers(0, 6)), 2))
        boxes = np.concatenate([moved, np.column_stack([stray, stray + dice.uniform(5, 130, stray.shape)])])
        kinds = np.concatenate([near[:, 0], dice.integers(0, classes, len(stray))])
        scores = dice.random(len(boxes))
        rows = np.column_stack([boxes, scores.round(1) if ties else scores, kinds])
        found.append(rows[np.argsort(-rows[:, 4], kind="stable")].astype(np.float32))
    return tuple(found), labels_of(*truth)


def by_pycocotools(found: tuple[np.ndarray, ...], labels: np.ndarray, classes: int) -> Any:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ap.as_coco(labels, classes)
        truth.createIndex()
        seen = COCO()
        rows = [
            {**row, "id": i + 1, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
            for i, row in enumerate(ap.as_results(found))
        ]
        seen.dataset = {**ap.as_coco(labels, classes), "annotations": rows}
        seen.createIndex()
        run = COCOeval(truth, seen, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


# --- one case by hand ---------------------------------------------------------------------------------


TRUTH = labels_of([(0, 0, 0, 10, 10, 0), (0, 20, 20, 30, 30, 0)], [(0, 0, 0, 10, 10, 0)])
SEEN = found_of([(0, 0, 10, 10, 0.9, 0), (50, 50, 60, 60, 0.8, 0)], [(0, 0, 10, 8.25, 0.7, 0)])
"""A hit, a stray box, a hit that overlaps by 0.825, and one object that nobody saw.

Up to level 0.8 the hits are first and third: precision 1 up to recall 1/3 (recalls 0 to 0.33, 34 of 101) and 2/3 up to
recall 2/3 (0.34 to 0.66, 33 of them). At the last three levels only the first is a hit.
"""
LOW, HIGH = (34 + 33 * 2 / 3) / 101, 34 / 101
MEAN = 100 * (7 * LOW + 3 * HIGH) / 10


@pytest.mark.parametrize("how", ["evaluator", "ours"])
def test_a_case_worked_out_by_hand(how: str) -> None:
    got = ap.coco(SEEN, TRUTH, 2) if how == "evaluator" else ap.summary(ap.matches(SEEN, TRUTH, 2))
    assert got.mean == pytest.approx(MEAN, abs=1e-9)
    assert got.at50 == got.at75 == pytest.approx(100 * LOW, abs=1e-9)
    assert got.small == pytest.approx(MEAN, abs=1e-9)
    assert math.isnan(got.medium)
    assert math.isnan(got.large)
    assert got.classes == (pytest.approx(MEAN, abs=1e-9), pytest.approx(math.nan, nan_ok=True))


@pytest.mark.parametrize("how", [ap.coco, lambda *a: ap.summary(ap.matches(*a))])
def test_what_lies_in_an_ignored_box_is_neither_right_nor_wrong(how: Any) -> None:
    crowd = labels_of([(0, 0, 0, 10, 10, 0), (0, 100, 100, 200, 200, 1)])
    swarm = [(100 + k, 100, 120 + k, 130, 0.95, 0) for k in range(5)]
    assert how(found_of([*swarm, (0, 0, 10, 10, 0.5, 0)]), crowd, 1).mean == pytest.approx(100)
    outside = [(300 + k, 100, 320 + k, 130, 0.95, 0) for k in range(5)]
    assert how(found_of([*outside, (0, 0, 10, 10, 0.5, 0)]), crowd, 1).mean == pytest.approx(100 / 6)


# --- against pycocotools and the evaluator ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_every_number_is_that_of_pycocotools(seed: int) -> None:
    found, labels = random_case(seed)
    run = by_pycocotools(found, labels, 4)
    precision = run.eval["precision"][..., -1]
    hits = ap.matches(found, labels, 4)
    for a, size in enumerate(ap.SIZES):
        wanted = precision[..., a].mean(1)
        ours = ap.averages(hits, np.ones((1, len(found)), np.int32), size)[0]
        np.testing.assert_allclose(np.nan_to_num(ours, nan=-1), wanted, atol=1e-12, err_msg=size)
    for got in (ap.summary(hits), ap.coco(found, labels, 4)):
        numbers = [got.mean, got.at50, got.at75, got.small, got.medium, got.large]
        np.testing.assert_allclose(np.nan_to_num(numbers, nan=-100), 100 * run.stats[:6], atol=1e-9)
        assert math.isnan(got.classes[3])  # never an object


def test_ours_and_the_evaluator_agree_on_every_class() -> None:
    found, labels = random_case(99, images=60, classes=9)
    np.testing.assert_allclose(ap.summary(ap.matches(found, labels, 9)).classes, ap.coco(found, labels, 9).classes)


def test_only_the_best_hundred_of_a_class_in_an_image_count() -> None:
    stray = [(500, 500, 510, 510, 0.9, 0)] * 100
    rows = found_of([*stray, (0, 0, 10, 10, 0.5, 0)])
    truth = labels_of([(0, 0, 0, 10, 10, 0)])
    assert ap.coco(rows, truth, 1).mean == ap.summary(ap.matches(rows, truth, 1)).mean == 0
    fewer = (rows[0][1:],)
    assert ap.coco(fewer, truth, 1).mean == pytest.approx(1)
    assert ap.summary(ap.matches(fewer, truth, 1)).mean == pytest.approx(1)


def test_boxes_at_the_very_edge_of_a_level_fall_as_with_pycocotools() -> None:
    objects = [(0, 50 * k, 0, 50 * k + 20, 20, 0) for k in range(10)]
    seen = [(50 * k, 0, 50 * k + 20, 20 * level, 0.9 - k / 100, 0) for k, level in enumerate(ap.LEVELS)]
    found, labels = found_of(seen), labels_of(objects)
    run = by_pycocotools(found, labels, 1)
    assert ap.summary(ap.matches(found, labels, 1)).mean == pytest.approx(100 * run.stats[0], abs=1e-9)


# --- resampling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["all", "medium"])
def test_a_resample_is_what_pycocotools_says_of_the_images_drawn(size: str) -> None:
    found, labels = random_case(5, ties=False)
    hits = ap.matches(found, labels, 4)
    copies = ap.resamples(len(found), 4, seed=3)
    ours = ap.averages(hits, copies, size)
    for row, times in zip(ours, copies):
        drawn = np.repeat(np.arange(len(found)), times)
        run = by_pycocotools(tuple(found[n] for n in drawn), labels[drawn], 4)
        wanted = run.eval["precision"][..., list(ap.SIZES).index(size), -1].mean(1)
        np.testing.assert_allclose(np.nan_to_num(row, nan=-1), wanted, atol=1e-12)


def test_resamples_draw_as_many_images_as_there_are_and_always_the_same() -> None:
    draws = ap.resamples(50, 200, seed=1)
    assert (draws.sum(1) == 50).all()
    assert draws.mean(0) == pytest.approx(np.ones(50), abs=0.35)
    np.testing.assert_array_equal(draws, ap.resamples(50, 200, seed=1))
    assert not np.array_equal(draws, ap.resamples(50, 200, seed=2))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, labels = random_case(7)
    hits, copies = ap.matches(found, labels, 4), ap.resamples(len(found), 20)
    whole = ap.averages(hits, copies)
    monkeypatch.setattr(ap, "_CHUNK", 1)
    np.testing.assert_array_equal(ap.averages(hits, copies), whole)


def test_the_error_is_binomial_where_every_image_is_right_or_wrong() -> None:
    # One object an image, 60 % seen, no strays: average precision is the share that is seen.
    n, share = 500, 0.6
    labels = labels_of(*[[(0, 0, 0, 10, 10, 0)]] * n)
    found = found_of(*([[(0, 0, 10, 10, 0.9, 0)]] * int(n * share) + [[]] * int(n * (1 - share))))
    draws = ap.mean(ap.averages(ap.matches(found, labels, 1), ap.resamples(n)))
    assert draws.mean() == pytest.approx(share, abs=0.01)
    assert ap.spread(draws) == pytest.approx(math.sqrt(share * (1 - share) / n), rel=0.15)


def test_means_leave_out_what_has_no_objects() -> None:
    rows = np.array([[[0.5, np.nan], [0.1, np.nan]], [[np.nan, np.nan], [np.nan, np.nan]]])
    np.testing.assert_allclose(ap.mean(rows), [0.3, np.nan])
    assert ap.spread(np.array([0.1, np.nan, 0.3])) == pytest.approx(math.sqrt(0.02))
    assert math.isnan(ap.spread(np.array([np.nan, 0.2])))


# --- the empty and the broken ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [ap.coco, lambda *a: ap.summary(ap.matches(*a))])
def test_nothing_found_is_zero_and_no_objects_is_not_a_number(how: Any) -> None:
    assert how(found_of([], []), TRUTH, 1).mean == 0
    assert math.isnan(how(SEEN, labels_of([], []), 1).mean)
    assert math.isnan(how(found_of([], []), labels_of([], []), 1).mean)


def test_boxes_without_area_are_missed_objects() -> None:
    flat = labels_of([(0, 5, 5, 5, 5, 0), (0, 0, 0, 10, 10, 0)])
    rows = found_of([(0, 0, 10, 10, 0.9, 0), (5, 5, 5, 5, 0.8, 0)])
    run = by_pycocotools(rows, flat, 1)
    assert ap.coco(rows, flat, 1).mean == pytest.approx(100 * run.stats[0])
    assert ap.summary(ap.matches(rows, flat, 1)).mean == pytest.approx(100 * run.stats[0])


@pytest.mark.parametrize("how", [ap.coco, ap.matches])
def test_labels_that_do_not_fit_are_refused(how: Any) -> None:
    with pytest.raises(BadData, match="2 images do not fit"):
        how(SEEN, TRUTH[:1], 1)
    with pytest.raises(BadData, match="Class 3"):
        how(SEEN, labels_of([(3, 0, 0, 9, 9, 0)], []), 3)
    with pytest.raises(BadData, match="Class 2"):
        how(found_of([(0, 0, 9, 9, 0.5, 2)], []), TRUTH, 2)
    with pytest.raises(BadData, match="not finite"):
        how(SEEN, labels_of([(0, 0, math.nan, 9, 9, 0)], []), 1)


def test_a_missing_evaluator_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingBackend, match=r"faster-coco-eval.*\n.*lighten\[detection\]"):
        ap.coco(SEEN, TRUTH, 1)
