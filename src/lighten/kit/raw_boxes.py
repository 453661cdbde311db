"""What a detector's raw outputs and labels mean in torch, with gradients: the parts, places and boxes of `lighten.heads`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lighten.errors import BadModel
from lighten.heads import Head
from lighten.kit.boxes import anchors

# --- raw outputs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Raw outputs taken apart: box numbers (N, P, 4 or 4 * bins), centerness (N, P) or None, class scores (N, P, C)."""

    numbers: Tensor
    centre: Tensor | None
    scores: Tensor


@dataclass(frozen=True)
class Places:
    """Where predictions are made: centres (P, 2) and sizes (P, 2) in pixels, of anchors, or of a step where there are
    none; `corners` (P, 4) of both. `first` and `last`: whether it is of the first level, or of the last (P,)."""

    points: Tensor
    sizes: Tensor
    corners: Tensor
    first: Tensor
    last: Tensor


@lru_cache(maxsize=8)
def places(head: Head, device: torch.device) -> Places:
    """The places of a head, in the order of its raw outputs."""
    with torch.inference_mode(False):  # they are kept, and must serve training too
        points, sizes = (torch.tensor(part, device=device) for part in anchors(head))
        level = torch.cat([torch.full((one.places,), k) for k, one in enumerate(head.levels)]).to(device)
        corners = torch.cat([points - sizes / 2, points + sizes / 2], 1)
        return Places(points, sizes, corners, level == 0, level == len(head.levels) - 1)


def boxes_of(numbers: Tensor, head: Head, at: Places) -> Tensor:
    """Boxes (..., P, 4) in pixels of the input, not cut at its edges."""
    if head.box == "offsets":
        moved = numbers / numbers.new_tensor(head.weights)
        centre = at.points + moved[..., :2] * at.sizes
        half = moved[..., 2:].clamp(max=head.clip).exp() * at.sizes / 2
        return torch.cat([centre - half, centre + half], -1)
    far = distances(numbers, head)
    return torch.cat([at.points - far[..., :2] * at.sizes, at.points + far[..., 2:] * at.sizes], -1)


def distances(numbers: Tensor, head: Head) -> Tensor:
    """Left, top, right, bottom (..., 4) in steps."""
    if head.box == "distances":
        return numbers.clamp(min=0)
    return numbers.unflatten(-1, (4, head.bins)).softmax(-1) @ torch.arange(head.bins, device=numbers.device).float()


def parts_of(raw: Tensor, head: Head) -> Parts:
    n = head.numbers
    centre = raw[..., n] if head.centerness else None
    return Parts(raw[..., :n], centre, raw[..., n + head.centerness :])


def check(raw: Tensor, head: Head) -> None:
    if raw.ndim != 3 or tuple(raw.shape[1:]) != (head.places, head.values):
        raise BadModel(
            f"The detector answers {tuple(raw.shape)}, its head describes (batch, {head.places}, {head.values}).",
            "Ask the model for the head of the input size that it is given.",
        )


# --- labels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Labels taken apart: classes (N, M), 0 where there is no box; boxes (N, M, 4); which are real, which ignored (N, M)."""

    classes: Tensor
    boxes: Tensor
    real: Tensor
    ignored: Tensor


def truth_of(labels: Tensor) -> Truth:
    """Rows that no image of the batch uses are left out; one row there always is."""
    boxes = labels[..., 1:5].float()
    sound = boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1) & (labels[..., 0] >= 0)
    used = sound.any(0)
    if not bool(used.any()):
        none = torch.zeros(len(labels), 1, dtype=torch.bool, device=labels.device)
        return Truth(none.long(), none[..., None].expand(-1, -1, 4).float(), none, none)
    labels, boxes, sound = labels[:, used], boxes[:, used], sound[:, used]
    ignored = labels[..., 5] > 0.5
    boxes = torch.where(sound[..., None], boxes, 0.0)
    return Truth(torch.where(sound, labels[..., 0], 0).long(), boxes, sound & ~ignored, sound & ignored)


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, elementwise with broadcasting: (..., 4) and (..., 4) to (...); 0 for two empty boxes."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    both = width.mul_(height)
    area = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both
    return both / area.clamp_(min=1e-9)


def pairs(truth: Truth, boxes: Tensor) -> Tensor:
    """Overlaps (N, M, P) of the labels with boxes (P, 4) or (N, P, 4)."""
    return overlaps(truth.boxes[:, :, None], boxes[:, None] if boxes.ndim == 3 else boxes)


def margins_of(truth: Truth, at: Places) -> Tensor:
    """How far (N, M, P, 4) each place lies inside the left, top, right and bottom edge of each box, in pixels."""
    box = truth.boxes[:, :, None]
    return torch.cat([at.points - box[..., :2], box[..., 2:] - at.points], -1)


def least_margin(truth: Truth, at: Places) -> Tensor:
    """The least of the margins (N, M, P)."""
    x, y = at.points.unbind(-1)
    x1, y1, x2, y2 = truth.boxes[:, :, None].unbind(-1)
    return torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y))


def silenced_by(truth: Truth, at: Places) -> Tensor | None:
    """Places (N, P) in an ignored box; None where there is no such box."""
    if not bool(truth.ignored.any()):
        return None
    return ((least_margin(truth, at) > 0) & truth.ignored[..., None]).any(1)


def taken(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `values` (N, M, ...) by `index` (N, P)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def overlap_loss(boxes: Tensor, goals: Tensor) -> Tensor:
    """1 - generalized intersection over union of boxes (K, 4), each (K,) (Rezatofighi et al., 2019, algorithm 1)."""
    low, high = torch.maximum(boxes[:, :2], goals[:, :2]), torch.minimum(boxes[:, 2:], goals[:, 2:])
    both = torch.where((high > low).all(1), (high - low).prod(1), 0.0)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (goals[:, 2:] - goals[:, :2]).prod(1) - both
    hull = (torch.maximum(boxes[:, 2:], goals[:, 2:]) - torch.minimum(boxes[:, :2], goals[:, :2])).prod(1)
    return 1 - both / (area + 1e-7) + (hull - area) / (hull + 1e-7)
