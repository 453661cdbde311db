"""How torchvision trains its detectors of one stage, on raw outputs: the assignment and loss of FCOS, RetinaNet and SSD."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy_of_bits
from torch.nn.functional import cross_entropy, smooth_l1_loss

from lighten.heads import Head
from lighten.kit.raw_boxes import (
    Places,
    Truth,
    boxes_of,
    margins_of,
    overlap_loss,
    pairs,
    parts_of,
    places,
    silenced_by,
    taken,
)

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
"""Lin et al., 2017, section 5.1."""


def fcos(raw: Tensor, truth: Truth, head: Head) -> Tensor:
    """FCOS (Tian et al., 2019) as torchvision trains it: places near the centre of a box whose size suits their level,
    the smallest box first; focal loss, generalized overlap, centerness."""
    parts, at = parts_of(raw, head), places(head, raw.device)
    owner, positive = _fcos_owners(truth, at)
    count = positive.sum().clamp_min(1)
    value = _focal(parts.scores, _one_hot(truth, owner, positive, head), silenced_by(truth, at), positive).sum()
    goal = taken(truth.boxes, owner)[positive]
    value = value + overlap_loss(boxes_of(parts.numbers, head, at)[positive], goal).sum()
    points = at.points.expand(len(raw), -1, -1)[positive]
    pair = torch.stack([points - goal[:, :2], goal[:, 2:] - points])
    central = (pair.amin(0) / pair.amax(0)).prod(1).sqrt()
    assert parts.centre is not None
    return (value + cross_entropy_of_bits(parts.centre[positive], central, reduction="sum")) / count


def _fcos_owners(truth: Truth, at: Places) -> tuple[Tensor, Tensor]:
    """Label of each place (N, P), and whether there is one (N, P); radius 1.5 steps, four to eight steps a level."""
    size = at.sizes[:, 0]
    centre = (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2
    near = (at.points - centre[:, :, None]).abs().amax(-1) < 1.5 * size
    margins = margins_of(truth, at)
    reach = margins.amax(-1)
    suits = (reach > size * 4 * ~at.first) & ((reach < size * 8) | at.last)
    match = near & (margins.amin(-1) > 0) & suits & truth.real[..., None]
    area = (truth.boxes[..., 2:] - truth.boxes[..., :2]).prod(-1)
    value, owner = (match * (1e8 - area[..., None])).max(1)
    return owner, value >= 1e-5


def retinanet(raw: Tensor, truth: Truth, head: Head, box_loss: str = "l1") -> Tensor:
    """RetinaNet (Lin et al., 2017) as torchvision trains it: anchors that overlap a box by half, or best of all, are for
    it, those under 0.4 for none; focal loss and L1 of the offsets (`box_loss` "giou", as its second version has it)."""
    parts, at = parts_of(raw, head), places(head, raw.device)
    owner, positive, between = _retina_owners(truth, at)
    counts = positive.sum(1).clamp_min(1)
    silenced = silenced_by(truth, at)
    silenced = between if silenced is None else between | silenced
    by_image = _focal(parts.scores, _one_hot(truth, owner, positive, head), silenced, positive).sum((1, 2)) / counts
    image, place = positive.nonzero(as_tuple=True)
    goal = taken(truth.boxes, owner)[positive]
    if box_loss == "giou":
        each = overlap_loss(boxes_of(parts.numbers, head, at)[positive], goal)
    else:
        each = (parts.numbers[positive] - _offsets(goal, at.corners[place], head)).abs().sum(1)
    return (by_image.sum() + (each / counts[image]).sum()) / len(raw)


@torch.no_grad()
def _retina_owners(truth: Truth, at: Places) -> tuple[Tensor, Tensor, Tensor]:
    """Label of each anchor (N, P), whether it is for it, and whether it is neither for one nor for none."""
    overlap = torch.where(truth.real[..., None], pairs(truth, at.corners), -1.0)
    value, owner = overlap.max(1)
    best = overlap.amax(2, keepdim=True)
    forced = ((overlap == best) & (best > 0)).any(1)
    positive = (value >= 0.5) | forced
    return owner, positive, (value >= 0.4) & ~positive


def multibox(raw: Tensor, truth: Truth, head: Head) -> Tensor:
    """SSD (Liu et al., 2016) as torchvision trains it: anchors that overlap a box by half, and the best of each box;
    softmax with the three hardest negatives for each positive, smooth L1 of the offsets."""
    parts, at = parts_of(raw, head), places(head, raw.device)
    owner, positive = _multibox_owners(truth, at)
    wanted = torch.where(positive, taken(truth.classes, owner) + 1, 0)
    each = cross_entropy(parts.scores.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    silenced = silenced_by(truth, at)
    out = positive if silenced is None else positive | silenced
    hard = each.detach().masked_fill(out, -torch.inf)
    rank = hard.argsort(1, descending=True).argsort(1)
    negative = (rank < 3 * positive.sum(1, keepdim=True)) & ~out
    goal = _offsets(taken(truth.boxes, owner)[positive], at.corners[positive.nonzero()[:, 1]], head)
    value = smooth_l1_loss(parts.numbers[positive], goal, reduction="sum")
    return (value + each[positive | negative].sum()) / positive.sum().clamp_min(1)


@torch.no_grad()
def _multibox_owners(truth: Truth, at: Places) -> tuple[Tensor, Tensor]:
    """Label of each anchor (N, P), and whether it has one. The best anchor of several boxes is the last one's."""
    overlap = torch.where(truth.real[..., None], pairs(truth, at.corners), -1.0)
    value, owner = overlap.max(1)
    forced = torch.zeros_like(overlap, dtype=torch.bool).scatter_(2, overlap.argmax(2, keepdim=True), True)
    number = torch.arange(overlap.shape[1], device=overlap.device)[:, None]
    last = torch.where(forced & truth.real[..., None], number, -1).amax(1)
    return torch.where(last >= 0, last, owner), (value >= 0.5) | (last >= 0)


def _offsets(boxes: Tensor, anchors: Tensor, head: Head) -> Tensor:
    """What `boxes_of` makes into `boxes` (K, 4) at `anchors` (K, 4)."""
    size, goal = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    moved = (boxes[:, :2] + 0.5 * goal - anchors[:, :2] - 0.5 * size) / size
    return torch.cat([moved, (goal / size).log()], 1) * boxes.new_tensor(head.weights)


def _one_hot(truth: Truth, owner: Tensor, positive: Tensor, head: Head) -> Tensor:
    wanted = torch.zeros(*owner.shape, head.classes, device=owner.device)
    return wanted.scatter_(2, taken(truth.classes, owner)[..., None], positive[..., None].float())


def _focal(scores: Tensor, wanted: Tensor, silenced: Tensor | None, positive: Tensor) -> Tensor:
    """Focal loss of each logit (N, P, C) (Lin et al., 2017, equation 5)."""
    p = scores.sigmoid()
    missed = p + wanted - 2 * p * wanted
    alpha = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
    each = alpha * missed**FOCAL_GAMMA * cross_entropy_of_bits(scores, wanted, reduction="none")
    return each if silenced is None else each.masked_fill((silenced & ~positive)[..., None], 0.0)
