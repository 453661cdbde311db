"""Boxes go where their objects go: held to the pixels themselves."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch

from lighten.kit.augment import GREY, with_boxes

SIDE = 64


def scene(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """White rectangles of known boxes on black, and one row without a box."""
    dice = torch.Generator().manual_seed(4)
    pixels = torch.zeros(n, SIDE, SIDE, 3, dtype=torch.uint8)
    labels = torch.zeros(n, 2, 6)
    labels[:, 1, 0] = -1
    for k in range(n):
        x, y = torch.randint(0, 40, (2,), generator=dice).tolist()
        w, h = torch.randint(8, 24, (2,), generator=dice).tolist()
        pixels[k, y : y + h, x : x + w] = 255
        labels[k, 0] = torch.tensor([3.0, x, y, x + w, y + h, 0])
    return pixels, labels


def test_a_box_is_where_its_pixels_are() -> None:
    pixels, labels = scene(200)
    moved, boxes = with_boxes(pixels, labels, 0.2, True, torch.Generator().manual_seed(1))
    checked = turned = 0
    for k in range(200):
        kind, x1, y1, x2, y2, ignored = boxes[k, 0].tolist()
        white = (moved[k] == 255).all(-1)
        if not white.any():
            assert kind < 0 or (x2 - x1) < 2 or (y2 - y1) < 2
            continue
        rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
        seen = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
        assert seen == pytest.approx([x1, y1, x2, y2], abs=1.0)
        assert kind == 3
        assert ignored in (0, 1)
        checked += 1
        turned += abs((x1 + x2) - (labels[k, 0, 1] + labels[k, 0, 3]).item()) > 30
    assert checked > 150
    assert turned > 10  # mirrored ones are far from where they were
    assert (boxes[:, 1, 0] == -1).all()


def test_without_shift_and_flip_nothing_changes() -> None:
    pixels, labels = scene(5)
    moved, boxes = with_boxes(pixels, labels, 0.0, False, torch.Generator())
    assert moved.equal(pixels)
    assert boxes.equal(labels)


def test_what_is_uncovered_is_grey_and_what_hardly_shows_is_ignored() -> None:
    pixels = torch.full((300, SIDE, SIDE, 3), 255, dtype=torch.uint8)
    labels = torch.tensor([[[0.0, 0, 0, 8, 8, 0]]]).repeat(300, 1, 1)
    moved, boxes = with_boxes(pixels, labels, 0.3, True, torch.Generator().manual_seed(2))
    assert set(moved.unique().tolist()) == {GREY, 255}
    gone, kept = boxes[:, 0, 0] < 0, boxes[:, 0, 0] == 0
    assert gone.any()
    assert kept.any()
    area = (boxes[..., 3] - boxes[..., 1]) * (boxes[..., 4] - boxes[..., 2])
    assert (boxes[:, 0, 5][kept & (area[:, 0] < 64 * 0.25 / 1.69)] == 1).all()
    assert (boxes[..., 1:5] >= 0).all()
    assert (boxes[..., 1:5] <= SIDE).all()


def test_the_same_dice_give_the_same_views() -> None:
    pixels, labels = scene(8)
    first, second = (with_boxes(pixels, labels, 0.2, True, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
