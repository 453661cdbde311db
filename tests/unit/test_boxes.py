"""Boxes: decoding and suppression as torchvision has them, geometry by hand, and raw outputs that hold anything."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from lighten.data.preprocess import Frame, frame_of, to_pixels
from lighten.errors import BadModel
from lighten.heads import Head, Level
from lighten.kit import boxes
from lighten.types import Preprocess

POINTS = (Level(4, 6, (8.0, 8.0)), Level(2, 3, (16.0, 16.0)))
ANCHORED = (
    Level(3, 4, (20.0, 25.0), 0.5, ((16.0, 32.0), (40.0, 20.0))),
    Level(2, 2, (40.0, 50.0), 0.0, ((64.0, 64.0),)),
)
DISTANCES = Head(POINTS, 5)
CENTERED = Head(POINTS, 5, centerness=True)
DISTRIBUTION = Head(POINTS, 5, "distribution", bins=7)
SSD = Head(ANCHORED, 5, "offsets", "softmax", weights=(10.0, 10.0, 5.0, 5.0))
RETINA = Head(ANCHORED, 5, "offsets")
HEADS = {"distances": DISTANCES, "centered": CENTERED, "distribution": DISTRIBUTION, "ssd": SSD, "retina": RETINA}


def outputs_of(head: Head, images: int = 3, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (images, head.places, head.values)).astype(np.float32)


def squares(head: Head) -> Any:
    """Every place as a box (places, 4), by loops: what torchvision's coders take."""
    import torch

    rows = []
    for level in head.levels:
        for r, c in itertools.product(range(level.rows), range(level.columns)):
            x, y = (c + level.offset) * level.step[0], (r + level.offset) * level.step[1]
            for w, h in level.shapes or (level.step,):
                rows.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return torch.tensor(rows)


# --- decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distances", "centered"])
def test_distances_are_torchvisions_linear_coder(name: str) -> None:
    import torch
    from torchvision.models.detection._utils import BoxLinearCoder

    head, raw = HEADS[name], outputs_of(HEADS[name])
    reach = torch.from_numpy(raw[..., :4]).relu()  # its FCOS head ends in a ReLU
    for got, one in zip(boxes.decode(raw, head)[0], reach):
        wanted = BoxLinearCoder(normalize_by_size=True).decode(one, squares(head))
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["ssd", "retina"])
def test_offsets_are_torchvisions_box_coder(name: str) -> None:
    import torch
    from torchvision.models.detection._utils import BoxCoder

    head, raw = HEADS[name], outputs_of(HEADS[name], spread=6.0)  # some log sizes are above the clip
    assert (raw[..., 2:4] / head.weights[2] > head.clip).any() == (name == "retina")
    for got, one in zip(boxes.decode(raw, head)[0], raw):
        wanted = BoxCoder(head.weights).decode_single(torch.from_numpy(one[:, :4]), squares(head))
        np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-6, atol=1e-4)


def test_a_distribution_is_the_mean_of_its_bins() -> None:
    raw = outputs_of(DISTRIBUTION)
    logits = raw[..., :28].astype(np.float64).reshape(3, -1, 4, 7)
    weight = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    far = sum(k * weight[..., k] for k in range(7))
    centres, step = boxes.anchors(DISTRIBUTION)
    wanted = np.concatenate([centres - far[..., :2] * step, centres + far[..., 2:] * step], -1)
    np.testing.assert_allclose(boxes.decode(raw, DISTRIBUTION)[0], wanted, rtol=1e-5, atol=1e-4)
    sure = np.full((1, DISTRIBUTION.places, DISTRIBUTION.values), -50, np.float32)
    sure[..., [2, 7 + 3, 14 + 0, 21 + 6]] = 50
    np.testing.assert_allclose(boxes.decode(sure, DISTRIBUTION)[0][0, 0], [4 - 16, 4 - 24, 4, 4 + 48])


def test_scores_are_sigmoid_softmax_without_background_or_rooted_by_centerness() -> None:
    raw = {name: outputs_of(head).astype(np.float64) for name, head in HEADS.items()}
    scores = {name: boxes.decode(raw[name], head)[1] for name, head in HEADS.items()}

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    for name, first in (("distances", 4), ("retina", 4), ("distribution", 28)):
        np.testing.assert_allclose(scores[name], sigmoid(raw[name][..., first:]), rtol=1e-5)
    both = sigmoid(raw["centered"][..., 5:]) * sigmoid(raw["centered"][..., 4:5])
    np.testing.assert_allclose(scores["centered"], np.sqrt(both), rtol=1e-5)
    e = np.exp(raw["ssd"][..., 4:])
    np.testing.assert_allclose(scores["ssd"], (e / e.sum(-1, keepdims=True))[..., 1:], rtol=1e-5)


def test_ssds_anchors_lie_where_torchvision_puts_them() -> None:
    import torch
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.image_list import ImageList

    maker = DefaultBoxGenerator([[2, 3], [2]], min_ratio=0.2, max_ratio=0.9)
    grids = ((10, 10), (5, 5))
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    (wanted,) = maker(ImageList(torch.zeros(1, 3, 320, 320), [(320, 320)]), maps)
    levels = tuple(
        Level(r, c, (320 / c, 320 / r), 0.5, tuple((320 * w, 320 * h) for w, h in pairs.clamp(0, 1).tolist()))
        for (r, c), pairs in zip(grids, maker._wh_pairs)
    )
    centres, sizes = boxes.anchors(Head(levels, 3, "offsets", "softmax"))
    np.testing.assert_allclose(np.concatenate([centres - sizes / 2, centres + sizes / 2], 1), wanted.numpy(), atol=1e-3)


def test_outputs_of_another_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(BadModel, match=r"\(2, 30, 8\).*30 places, 9 values"):
        boxes.decode(np.zeros((2, 30, 8)), DISTANCES)
    with pytest.raises(BadModel, match="30 places"):
        boxes.detections(np.zeros((30, 9)), DISTANCES)


# --- overlap and suppression ----------------------------------------------------------------------------


def random_boxes(seed: int, n: int = 200, side: float = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores, all different, and classes."""
    dice = np.random.default_rng(seed)
    corner = dice.uniform(0, 100, (n, 2))
    rows = np.concatenate([corner, corner + dice.uniform(1, side, (n, 2))], 1).astype(np.float32)
    return rows, dice.permutation(n).astype(np.float32) / n, dice.integers(0, 4, n)


def test_overlaps_are_torchvisions_and_those_done_by_hand() -> None:
    import torch
    from torchvision.ops import box_iou

    a, b = random_boxes(0, 40)[0], random_boxes(1, 30)[0]
    np.testing.assert_allclose(boxes.overlaps(a, b), box_iou(torch.from_numpy(a), torch.from_numpy(b)), atol=1e-6)
    one, two = np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4], [3, 3, 3, 3]])
    assert boxes.overlaps(one, two)[0].tolist() == [50 / 150, 0, 0.04, 0]
    assert boxes.overlaps(two[3:], two[3:]).tolist() == [[0.0]]


@pytest.mark.parametrize("iou", [0.1, 0.45, 0.7])
@pytest.mark.parametrize("seed", range(6))
def test_suppression_is_torchvisions(seed: int, iou: float) -> None:
    import torch
    from torchvision.ops import batched_nms

    rows, scores, classes = random_boxes(seed, n=(1, 20, 200, 400, 700, 1300)[seed])
    wanted = batched_nms(*map(torch.from_numpy, (rows, scores, classes)), iou)
    np.testing.assert_array_equal(boxes.nms(rows, scores, classes, iou), wanted.numpy())


def test_suppression_of_one_class_larger_than_a_block_is_torchvisions() -> None:
    import torch
    from torchvision.ops import nms

    rows, scores, _ = random_boxes(0, n=2000, side=20)
    got = boxes.nms(rows, scores, np.zeros(2000, int), 0.3)
    np.testing.assert_array_equal(got, nms(torch.from_numpy(rows), torch.from_numpy(scores), 0.3).numpy())


def test_a_suppressed_box_suppresses_none() -> None:
    chain = np.array([[k, 0, k + 10, 10] for k in range(0, 30, 3)], np.float32)  # neighbours overlap by 7/13
    scores = np.linspace(0.9, 0.1, len(chain))
    assert boxes.nms(chain, scores, np.zeros(len(chain), int), 0.5).tolist() == [0, 2, 4, 6, 8]
    assert boxes.nms(chain, scores, np.arange(len(chain)), 0.5).tolist() == list(range(10))


def test_equal_scores_stay_in_order() -> None:
    same = np.tile(np.array([[0, 0, 10, 10]], np.float32), (4, 1))
    assert boxes.nms(same, np.full(4, 0.5), np.zeros(4, int), 0.5).tolist() == [0]
    assert boxes.nms(same, np.full(4, 0.5), np.arange(4)[::-1], 0.5).tolist() == [0, 1, 2, 3]
    assert boxes.best(np.array([0.5, 0.7, 0.5, 0.7, 0.5]), most=4).tolist() == [1, 3, 0, 2]
    assert boxes.best(np.array([0.5, 0.7, 0.2]), 0.2, 0).tolist() == []


def test_threshold_and_candidates_come_before_suppression() -> None:
    rows, scores, classes = random_boxes(3)
    first = np.argsort(-scores)[:50]
    got = boxes.nms(rows, scores, classes, 0.3, threshold=0.5, candidates=50)
    np.testing.assert_array_equal(got, first[boxes.nms(rows[first], scores[first], classes[first], 0.3)])
    assert (scores[boxes.nms(rows, scores, classes, 0.3, threshold=0.5)] > 0.5).all()
    assert boxes.nms(rows, scores, classes, 0.3, threshold=2.0).tolist() == []


# --- detections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_detections_are_decoded_places_suppressed_by_torchvision(name: str) -> None:
    import torch
    from torchvision.ops import batched_nms

    head, raw = HEADS[name], outputs_of(HEADS[name], seed=4)
    found = boxes.detections(raw, head, 0.2, 0.5, 20, size=(48, 32))
    for got, box, score in zip(found, *boxes.decode(raw, head)):
        place, kind = np.nonzero(score > 0.2)
        rows, values = boxes.clipped(box[place], 48, 32), score[place, kind]
        whole = (rows[:, 2:] > rows[:, :2]).all(1)
        rows, values, kind = rows[whole], values[whole], kind[whole]
        kept = batched_nms(*map(torch.from_numpy, (rows, values, kind)), 0.5).numpy()[:20]
        assert len(kept) > 5
        np.testing.assert_array_equal(got, np.column_stack([rows, values, kind])[kept].astype(np.float32))


def test_a_quiet_image_gives_no_rows() -> None:
    (got,) = boxes.detections(np.full((1, DISTANCES.places, DISTANCES.values), -9.0), DISTANCES)
    assert got.shape == (0, 6)
    assert boxes.detections(np.zeros((0, DISTANCES.places, DISTANCES.values)), DISTANCES) == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("name", HEADS)
def test_values_that_are_not_finite_are_never_kept(name: str, bad: float) -> None:
    head = HEADS[name]
    raw = outputs_of(head, images=2, seed=1)
    clean = boxes.detections(raw, head, 0.0, 0.5, 1000)
    dice = np.random.default_rng(2)
    for image, place, value in zip(*(dice.integers(0, n, 12) for n in raw.shape)):
        raw[image, place, value] = bad
    raw[0, 0, 0], raw[1, 1, -1] = bad, bad
    found = boxes.detections(raw, head, 0.0, 0.5, 1000)
    assert all(np.isfinite(one).all() for one in found)
    assert sum(map(len, found)) > 0.3 * sum(map(len, clean))
    everything = boxes.detections(np.full_like(raw, bad), head, 0.0, 0.5, 1000)
    assert all(np.isfinite(one).all() for one in everything)
    if not math.isfinite(bad):
        assert [len(one) for one in everything] == [0, 0]
        assert not boxes.decode(np.full_like(raw, bad), head)[1].any()


def test_suppression_drops_boxes_and_scores_that_are_not_finite() -> None:
    rows = np.array([[0, 0, 9, 9], [math.nan, 0, 9, 9], [50, 50, 60, 60], [0, 0, math.inf, 9]])
    assert boxes.nms(rows, np.array([0.5, 0.9, math.nan, 0.8]), np.zeros(4, int), 0.5).tolist() == [0]


def test_boxes_outside_the_frame_or_without_area_are_no_detections() -> None:
    head = Head((Level(1, 4, (8.0, 8.0)),), 1)
    raw = np.zeros((1, 4, 5), np.float32)
    raw[0, :, :4], raw[0, :, 4] = 1.0, 5.0
    raw[0, 1, :4] = 0.0  # all distances 0: a point
    assert len(boxes.detections(raw, head, iou=1.0)[0]) == 3
    (got,) = boxes.detections(raw, head, iou=1.0, size=(12, 8))  # the places at 20 and 28 reach 12 and 20
    assert got[:, :4].tolist() == [[0, 0, 12, 8]]


# --- letterbox ---------------------------------------------------------------------------------------------


def test_to_the_input_and_back_by_hand() -> None:
    frame = frame_of(200, 100, Preprocess(100, 100, mode="letterbox"))
    assert frame == Frame(0.5, 0.5, 0, 25)
    box = np.array([[20.0, 10, 120, 90]])
    assert boxes.to_input(box, frame).tolist() == [[10, 30, 60, 70]]
    assert boxes.to_image(boxes.to_input(box, frame), frame, 200, 100).tolist() == box.tolist()


@pytest.mark.parametrize("mode", ["letterbox", "stretch", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (97, 31)])
def test_to_the_input_and_back_is_where_it_was(mode: str, size: tuple[int, int]) -> None:
    frame = frame_of(*size, Preprocess(160, 160, mode=mode, resize=160 if mode == "crop" else None))
    box = np.random.default_rng(0).uniform(0, 1, (9, 4)) * [*size, *size]
    np.testing.assert_allclose(boxes.to_image(boxes.to_input(box, frame), frame, *size), box, atol=1e-9)


def test_boxes_in_the_grey_are_cut_to_the_image() -> None:
    frame = frame_of(200, 100, Preprocess(100, 100, mode="letterbox"))
    assert boxes.to_image(np.array([[-5.0, 0, 110, 100]]), frame, 200, 100).tolist() == [[0, 0, 200, 100]]


def test_a_square_painted_in_the_image_lies_where_its_box_says() -> None:
    pixels = np.zeros((90, 240, 3), np.uint8)
    pixels[30:60, 120:180] = 255
    how = Preprocess(160, 160, mode="letterbox", interpolation="nearest")
    ((x1, y1, x2, y2),) = boxes.to_input(np.array([[120.0, 30, 180, 60]]), frame_of(240, 90, how))
    rows, columns = np.nonzero(to_pixels(pixels, how)[..., 0] == 255)
    assert (columns.min(), columns.max() + 1) == (pytest.approx(x1, abs=1), pytest.approx(x2, abs=1))
    assert (rows.min(), rows.max() + 1) == (pytest.approx(y1, abs=1), pytest.approx(y2, abs=1))


# --- pairs -------------------------------------------------------------------------------------------------


def test_pairs_are_of_one_class_and_the_largest_overlap_comes_first() -> None:
    a = np.array([[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 8, 0.8, 0], [50, 50, 60, 60, 0.7, 1]])
    b = np.array([[0, 0, 10, 9, 0.5, 0], [0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.7, 0]])
    i, j, iou = boxes.pairs(a, b, 0.5)
    assert list(zip(i.tolist(), j.tolist())) == [(0, 1), (1, 0)]
    assert iou == pytest.approx([1, 8 / 9])
    assert [k.tolist() for k in boxes.pairs(a, b, 0.5, score=0.1)] == [[0], [1], [1.0]]
    assert [len(k) for k in boxes.pairs(a[:0], b, 0.5)] == [0, 0, 0]
