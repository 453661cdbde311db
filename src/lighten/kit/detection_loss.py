"""What a detector's raw outputs cost against labels, and against a teacher's; one assignment and loss for each kind of head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy_of_bits
from torch.nn.functional import cross_entropy, kl_div, smooth_l1_loss

from lighten.errors import BadData, BadModel
from lighten.heads import Head
from lighten.kit.raw_boxes import (
    Places,
    Truth,
    boxes_of,
    check,
    least_margin,
    overlap_loss,
    pairs,
    parts_of,
    places,
    silenced_by,
    taken,
    truth_of,
)
from lighten.kit.torchvision_losses import fcos, multibox, retinanet

ALPHA, BETA, CANDIDATES = 1.0, 6.0, 13
"""Task alignment: score ** ALPHA * overlap ** BETA, the best CANDIDATES of each box (Feng et al., 2021, section 3.2)."""
SCORES, BOXES, SHAPE = 1.0, 2.0, 0.5
"""Weights of the scores, of the overlap, and of the distributions (or of the distances where there are none)."""
NEGATIVE = 0.75
"""Weight of what is no object in the varifocal loss (Zhang et al., 2021, section 4.1)."""
TEMPERATURE = 10.0
"""Of distributions in distillation (Zheng et al., 2022, section 4.1)."""


def loss(raw: Tensor, labels: Tensor, head: Head) -> Tensor:
    """The loss of a batch, a scalar: what the head was designed to be trained by.

    `raw` (N, places, values) as `head` says, `labels` (N, M, 6): class (-1: no box), x1, y1, x2, y2 in pixels of the
    input, ignore. What lies in an ignored box is neither right nor wrong; boxes without an area are passed over.
    Raises BadModel for a kind of head that no loss is known for, or outputs that the head does not describe; BadData for
    a class that it does not have.
    """
    check(raw, head)
    raw, truth = raw.float(), truth_of(labels.to(raw.device))
    if (highest := int(truth.classes.max())) >= head.classes:
        raise BadData(
            f"A box has class {highest}; the detector has {head.classes}, counted from 0.", "Check --classes."
        )
    if head.box == "offsets":
        return multibox(raw, truth, head) if head.score == "softmax" else retinanet(raw, truth, head)
    if head.score == "sigmoid" and not head.centerness:
        return task_aligned(raw, truth, head)
    if head.score == "sigmoid" and head.box == "distances":
        return fcos(raw, truth, head)
    raise BadModel(
        f"No loss is known for a head of {head.box}, {head.score}{', centerness' if head.centerness else ''}.",
        "Train it with its own loss; compress it without training.",
    )


def distill_loss(student: Tensor, teacher: Tensor, head: Head) -> Tensor:
    """How far the student's raw outputs (N, places, values) are from the teacher's, most where the teacher sees objects.

    Weights are the teacher's highest scores (Du et al., 2021, "Distilling Object Detectors with Feature Richness",
    equation 3). Scores: quality focal loss with the teacher's as soft labels (Li et al., 2020, equation 5), or the KL
    divergence where they are a softmax. Boxes: KL divergence of softened distributions (Zheng et al., 2022, "Localization
    Distillation", equation 4), of the overlap where they are distances, smooth L1 of offsets (Chen et al., 2017).
    """
    check(student, head)
    student, teacher = student.float(), teacher.detach().float()
    ours, theirs = parts_of(student, head), parts_of(teacher, head)
    seen = _seen(theirs.scores, head)
    total = seen.sum().clamp_min(1.0)
    value = SCORES * _score_distance(ours.scores, theirs.scores, seen, head)
    if ours.centre is not None and theirs.centre is not None:
        value = value + (_bits_apart(ours.centre, theirs.centre) * seen).sum()
    return (value + BOXES * (_box_distance(ours.numbers, theirs.numbers, head) * seen).sum()) / total


# --- our own: task-aligned ------------------------------------------------------------------------


def task_aligned(raw: Tensor, truth: Truth, head: Head) -> Tensor:
    """Task-aligned assignment (Feng et al., 2021, "TOOD"), varifocal loss of the scores (Zhang et al., 2021,
    "VarifocalNet", equation 2), generalized overlap (Rezatofighi et al., 2019) and distribution focal loss (Li et al.,
    2020, equation 6) of the boxes, all weighted by the alignment."""
    parts, at = parts_of(raw, head), places(head, raw.device)
    boxes = boxes_of(parts.numbers, head, at)
    owner, quality, positive = align(parts.scores.detach().sigmoid(), boxes.detach(), truth, at)
    wanted = torch.zeros_like(parts.scores).scatter_(2, taken(truth.classes, owner)[..., None], quality[..., None])
    total = quality.sum().clamp_min(1.0)
    value = SCORES * varifocal(parts.scores, wanted, silenced_by(truth, at), positive)
    goal, weight = taken(truth.boxes, owner)[positive], quality[positive]
    value = value + BOXES * (overlap_loss(boxes[positive], goal) * weight).sum()
    points, steps = (t.expand(len(raw), -1, -1)[positive] for t in (at.points, at.sizes))
    far = torch.cat([(points - goal[:, :2]) / steps, (goal[:, 2:] - points) / steps], 1)
    return (value + SHAPE * (_shape_loss(parts.numbers[positive], far, head) * weight).sum()) / total


@torch.no_grad()
def align(scores: Tensor, boxes: Tensor, truth: Truth, at: Places) -> tuple[Tensor, Tensor, Tensor]:
    """Which label each place is for (N, P), how well it does (N, P), and whether it is for any (N, P).

    Of the places inside a box, the CANDIDATES that score and fit it best; a place that two boxes want goes to the one
    that it fits better. Quality is the alignment, scaled so that the best place of a box has the best overlap of its
    places (TOOD, section 3.2). A box smaller than the finest step is taken for one as large, so that it has a place.
    """
    room = at.sizes[:1].unsqueeze(1) - (truth.boxes[..., 2:] - truth.boxes[..., :2])
    grown = torch.cat([-room.clamp(min=0), room.clamp(min=0)], -1) * 0.501
    wide = Truth(truth.classes, truth.boxes + grown, truth.real, truth.ignored)
    inside = (least_margin(wide, at) > 0) & truth.real[..., None]
    overlap = pairs(truth, boxes)
    score = scores.transpose(1, 2).gather(1, truth.classes[..., None].expand(-1, -1, scores.shape[1]))
    metric = torch.where(inside, score.pow(ALPHA) * overlap.pow(BETA), -1.0)
    best = metric.topk(min(CANDIDATES, metric.shape[2]), 2).indices
    chosen = torch.zeros_like(inside).scatter_(2, best, True) & inside
    fit, owner = torch.where(chosen, overlap, -1.0).max(1)
    positive = fit >= 0
    mine = torch.arange(metric.shape[1], device=metric.device)[:, None] == owner[:, None]
    metric = torch.where(chosen & mine, metric, 0.0)
    top = torch.where(chosen & mine, overlap, 0.0).amax(2, keepdim=True)
    quality = (metric / metric.amax(2, keepdim=True).clamp_min(1e-30) * top).amax(1)
    return owner, quality, positive


def varifocal(scores: Tensor, wanted: Tensor, silenced: Tensor | None, positive: Tensor) -> Tensor:
    """Sum over logits (N, P, C): what is an object weighs as its quality `wanted`, what is none as its own score."""
    weight = torch.where(wanted > 0, wanted, NEGATIVE * scores.sigmoid().square())
    if silenced is not None:
        weight = weight.masked_fill((silenced & ~positive)[..., None], 0.0)
    return (cross_entropy_of_bits(scores, wanted, reduction="none") * weight).sum()


def _shape_loss(numbers: Tensor, far: Tensor, head: Head) -> Tensor:
    """(K,): how far the numbers (K, 4 or 4 * bins) are from distances `far` (K, 4) in steps; mean over the four sides.

    Plain distances are compared before they are cut off at 0, where no gradient would bring them back.
    """
    if head.box == "distances":
        return smooth_l1_loss(numbers, far, reduction="none").mean(1)
    far = far.clamp(0, head.bins - 1 - 1e-3).flatten()
    low = far.long()
    share = far - low
    logs = numbers.unflatten(-1, (4, head.bins)).flatten(0, 1)
    near = cross_entropy(logs, low, reduction="none") * (1 - share)
    return (near + cross_entropy(logs, low + 1, reduction="none") * share).unflatten(0, (-1, 4)).mean(1)


# --- distillation ---------------------------------------------------------------------------------


def _seen(scores: Tensor, head: Head) -> Tensor:
    """How sure the teacher is (N, P) that something is there."""
    if head.score == "softmax":
        return 1 - scores.softmax(-1)[..., 0]
    return scores.sigmoid().amax(-1)


def _score_distance(ours: Tensor, theirs: Tensor, seen: Tensor, head: Head) -> Tensor:
    """Sum over all places. Where only the student sees something, that is held against it too."""
    if head.score == "softmax":
        each = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return (each * torch.maximum(seen, _seen(ours.detach(), head))).sum()
    apart = (theirs.sigmoid() - ours.detach().sigmoid()).square()
    return (_bits_apart(ours, theirs) * apart).sum()


def _bits_apart(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cross-entropy of each logit with the teacher's as soft label, less the entropy that no student can go under."""
    goal = theirs.sigmoid()
    ours, theirs = (cross_entropy_of_bits(z, goal, reduction="none") for z in (ours, theirs))
    return ours - theirs


def _box_distance(ours: Tensor, theirs: Tensor, head: Head) -> Tensor:
    """(N, P): how far the boxes are from the teacher's."""
    if head.box == "offsets":
        return smooth_l1_loss(ours, theirs, reduction="none").mean(-1)
    if head.box == "distances":
        at = places(head, ours.device)
        pair = [boxes_of(numbers, head, at).flatten(0, 1) for numbers in (ours, theirs)]
        far = smooth_l1_loss(ours, theirs.clamp(min=0), reduction="none").mean(-1)
        return overlap_loss(*pair).view_as(far) + SHAPE * far
    soft, goal = ((n.unflatten(-1, (4, head.bins)) / TEMPERATURE).log_softmax(-1) for n in (ours, theirs))
    return kl_div(soft, goal, reduction="none", log_target=True).sum(-1).mean(-1) * TEMPERATURE**2
