"""Losses of detectors: torchvision's own values on the same raw outputs, a slow reference of the assignment, hostile labels."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou, generalized_box_iou_loss

from lighten.errors import BadData, BadModel
from lighten.heads import Head, Level
from lighten.kit import detection_loss as dl
from lighten.kit import raw_boxes, torchvision_losses

torch.set_num_threads(1)

SIZE, CLASSES = 128, 4
LEVELS = tuple(Level(SIZE // s, SIZE // s, (s, s)) for s in (8, 16, 32))
OWN = Head(LEVELS, CLASSES, "distribution", bins=8)
PLAIN = Head(LEVELS, CLASSES, "distances")
CPU = torch.device("cpu")


def labels(n: int = 4, rows: int = 6, seed: int = 0, low: int = 6, high: int = 90) -> Tensor:
    """`n` images with 0 to `rows` - 1 boxes, the first with none; rows that are not used are scattered among them."""
    dice = np.random.default_rng(seed)
    made = np.full((n, rows, 6), -1, np.float32)
    for k in range(1, n):
        for row in dice.permutation(rows)[: dice.integers(1, rows)]:
            w, h = dice.uniform(low, high, 2)
            x, y = dice.uniform(0, SIZE - w), dice.uniform(0, SIZE - h)
            made[k, row] = (dice.integers(0, CLASSES), x, y, x + w, y + h, 0)
    return torch.from_numpy(made)


def noise(head: Head, n: int = 4, seed: int = 0, scale: float = 1.0) -> Tensor:
    raw = scale * torch.randn(n, head.places, head.values, generator=torch.Generator().manual_seed(seed))
    return raw.requires_grad_()


def targets(rows: Tensor, first: int = 0) -> list[dict[str, Tensor]]:
    """As torchvision takes them, classes counted from `first`."""
    real = [r[r[:, 0] >= 0] for r in rows]
    return [{"boxes": r[:, 1:5], "labels": r[:, 0].long() + first} for r in real]


# --- held to torchvision --------------------------------------------------------------------------


class Maps(nn.Module):
    out_channels = 32

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(s), torch.zeros(len(x), 32, SIZE // s, SIZE // s)) for s in (8, 16, 32, 64, 128))


def anchors_of(model: Any) -> Tensor:
    x = torch.zeros(1, 3, SIZE, SIZE)
    return model.anchor_generator(ImageList(x, [(SIZE, SIZE)]), list(model.backbone(x).values()))[0]


def head_of(model: Any) -> Head:
    from lighten.models.detectors import TorchvisionRaw

    return TorchvisionRaw(model, skip=0).head((3, SIZE, SIZE))


def compare(ours: Tensor, our_raw: Tensor, theirs: Tensor, their_raw: Tensor) -> None:
    """The same value, and the same gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(our_raw.grad, their_raw.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "giou"])
def test_retinanet_costs_what_it_costs_in_torchvision(kind: str) -> None:
    torch.manual_seed(0)
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (16, 32, 48, 64, 128))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    model: Any = RetinaNet(Maps(), CLASSES, anchor_generator=generator)
    model.head.regression_head._loss_type = kind
    head, rows = head_of(model), labels()
    a, b = noise(head), noise(head)
    answers = {"bbox_regression": b[..., :4], "cls_logits": b[..., 4:]}
    theirs = model.compute_loss(targets(rows), answers, [anchors_of(model)] * len(rows))
    ours = torchvision_losses.retinanet(a, raw_boxes.truth_of(rows), head, kind)
    compare(ours, a, sum(theirs.values()), b)
    if kind == "l1":
        torch.testing.assert_close(dl.loss(a, rows, head), ours)


def test_fcos_costs_what_it_costs_in_torchvision() -> None:
    torch.manual_seed(0)
    model: Any = FCOS(Maps(), CLASSES)
    head, rows = head_of(model), labels(6)
    a, b = noise(head, 6), noise(head, 6)
    answers = {"bbox_regression": b[..., :4].relu(), "bbox_ctrness": b[..., 4:5], "cls_logits": b[..., 5:]}
    counts = [level.places for level in head.levels]
    theirs = model.compute_loss(targets(rows), answers, [anchors_of(model)] * len(rows), counts)
    compare(dl.loss(a, rows, head), a, sum(theirs.values()), b)


def test_ssd_costs_what_it_costs_in_torchvision() -> None:
    torch.manual_seed(0)
    model: Any = SSD(
        Maps(), DefaultBoxGenerator([[2], [2, 3], [2, 3], [2], [2]]), (SIZE, SIZE), CLASSES + 1, head=Answers()
    )
    head, rows = head_of(model), labels()
    a, b = noise(head), noise(head)
    anchors, wanted = anchors_of(model), targets(rows, 1)
    matched = [
        model.proposal_matcher(box_iou(t["boxes"], anchors)) if len(t["boxes"]) else torch.full((len(anchors),), -1)
        for t in wanted
    ]
    answers = {"bbox_regression": b[..., :4], "cls_logits": b[..., 4:]}
    theirs = model.compute_loss(wanted, answers, [anchors] * len(rows), matched)
    compare(dl.loss(a, rows, head), a, sum(theirs.values()), b)


class Answers(nn.Module):
    """Stands in for SSD's head: as many answers as anchors."""

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        counts = [m.shape[2] * m.shape[3] * k for m, k in zip(maps, (4, 6, 6, 4, 4))]
        zeros = [torch.zeros(1, sum(counts), k) for k in (4, CLASSES + 1)]
        return {"bbox_regression": zeros[0], "cls_logits": zeros[1]}


def test_overlaps_are_torchvisions() -> None:
    a, b = (labels(2, 40, seed)[1, :, 1:5] for seed in (1, 2))
    a, b = a[a[:, 0] >= 0], b[b[:, 0] >= 0]
    torch.testing.assert_close(raw_boxes.overlaps(a[:, None], b[None]), box_iou(a, b))
    n = min(len(a), len(b))
    torch.testing.assert_close(raw_boxes.overlap_loss(a[:n], b[:n]), generalized_box_iou_loss(a[:n], b[:n]))


# --- our own --------------------------------------------------------------------------------------


def slow_alignment(
    scores: np.ndarray, boxes: np.ndarray, rows: np.ndarray, head: Head
) -> tuple[dict[int, int], dict[int, float]]:
    """TOOD's assignment of one image, box by box and place by place, in double precision."""
    points = [
        ((c + 0.5) * level.step[0], (r + 0.5) * level.step[1])
        for level in head.levels
        for r in range(level.rows)
        for c in range(level.columns)
    ]
    wants: dict[int, list[tuple[float, float, int]]] = {}
    for k, (kind, x1, y1, x2, y2, _) in enumerate(rows):
        found = []
        for p, (x, y) in enumerate(points):
            if kind >= 0 and x1 < x < x2 and y1 < y < y2:
                bx1, by1, bx2, by2 = boxes[p]
                both = max(0, min(x2, bx2) - max(x1, bx1)) * max(0, min(y2, by2) - max(y1, by1))
                u = both / ((x2 - x1) * (y2 - y1) + (bx2 - bx1) * (by2 - by1) - both)
                found.append((scores[p, int(kind)] * u**6, u, p))
        for metric, u, p in sorted(found, reverse=True)[:13]:
            wants.setdefault(p, []).append((u, metric, k))
    owner = {p: max(rows)[2] for p, rows in wants.items()}
    kept = {
        k: [(m, u) for p, rows in wants.items() for u, m, j in rows if j == k == owner[p]] for k in set(owner.values())
    }
    quality = {}
    for p, rows in wants.items():
        _, metric, k = max(rows)
        quality[p] = metric / max(m for m, _ in kept[k]) * max(u for _, u in kept[k])
    return owner, quality


def test_the_alignment_is_that_of_a_slow_reference() -> None:
    rows = labels(5, 8, seed=3, low=10)
    raw, at = noise(OWN, 5, seed=4), raw_boxes.places(OWN, CPU)
    parts = raw_boxes.parts_of(raw.detach(), OWN)
    scores, boxes = parts.scores.sigmoid(), raw_boxes.boxes_of(parts.numbers, OWN, at)
    truth = raw_boxes.truth_of(rows)
    owner, quality, positive = dl.align(scores, boxes, truth, at)
    assert bool(positive.any())
    for n in range(5):
        want, worth = slow_alignment(*(t[n].double().numpy() for t in (scores, boxes, rows)), OWN)
        mine = {int(p): truth.boxes[n, owner[n, p]].tolist() for p in positive[n].nonzero()[:, 0]}
        assert mine == {p: rows[n, k, 1:5].tolist() for p, k in want.items()}
        for p, q in worth.items():
            assert float(quality[n, p]) == pytest.approx(q, rel=1e-3)
        assert float(quality[n][~positive[n]].abs().sum()) == 0


def test_every_box_has_a_place_however_small() -> None:
    rows = torch.tensor(
        [[[1, 40.5, 40.5, 42.0, 43.0, 0], [2, 0, 0, 1, 1, 0], [0, 63, 63, 65, 65, 0]]], dtype=torch.float32
    )
    raw = noise(OWN, 1)
    parts, at = raw_boxes.parts_of(raw.detach(), OWN), raw_boxes.places(OWN, CPU)
    owner, _, positive = dl.align(
        parts.scores.sigmoid(), raw_boxes.boxes_of(parts.numbers, OWN, at), raw_boxes.truth_of(rows), at
    )
    assert set(owner[positive].tolist()) == {0, 1, 2}


def test_the_varifocal_loss_of_a_few_logits_is_as_written_in_the_paper() -> None:
    scores, wanted = torch.tensor([[[0.5, -1.0], [2.0, 0.0]]]), torch.tensor([[[0.8, 0.0], [0.0, 0.3]]])
    p, q = scores.sigmoid().double().numpy(), wanted.double().numpy()
    entropy = -(q * np.log(p) + (1 - q) * np.log(1 - p))
    expected = (np.where(q > 0, q * entropy, -0.75 * p**2 * np.log(1 - p))).sum()
    got = dl.varifocal(scores, wanted, None, (wanted > 0).any(2))
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_a_distance_is_shared_by_the_two_bins_beside_it() -> None:
    numbers = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    far = torch.tensor([[0.0, 2.25, 6.5, 90.0]])
    logs = numbers.view(4, 8).log_softmax(1).double()
    expected = (
        -(
            logs[0, 0]
            + (0.75 * logs[1, 2] + 0.25 * logs[1, 3])
            + (0.5 * logs[2, 6] + 0.5 * logs[2, 7])
            + (0.001 * logs[3, 6] + 0.999 * logs[3, 7])
        )
        / 4
    )
    assert float(dl._shape_loss(numbers, far, OWN)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("head", [OWN, PLAIN], ids=["distribution", "distances"])
def test_raw_values_that_follow_the_loss_find_the_boxes(head: Head) -> None:
    """The outputs themselves are trained: after some steps the best place of every box has its class and its edges."""
    rows = labels(4, 5, seed=5, low=20)
    raw = (noise(head).detach() * 0.1 + 0.5).requires_grad_()
    optimizer = torch.optim.Adam([raw], 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        value = dl.loss(raw, rows, head)
        value.backward()
        optimizer.step()
    parts = raw_boxes.parts_of(raw.detach(), head)
    boxes = raw_boxes.boxes_of(parts.numbers, head, raw_boxes.places(head, CPU))
    for n in range(4):
        best = parts.scores[n].amax(1)
        assert (best > 0).any() == (rows[n, :, 0] >= 0).any()
        for kind, *box, _ in rows[n][rows[n, :, 0] >= 0].tolist():
            fits = box_iou(torch.tensor([box]), boxes[n])[0]
            sure = (parts.scores[n, :, int(kind)] > 0) & (parts.scores[n].argmax(1) == int(kind))
            assert float(fits[sure].max()) > 0.9


# --- labels that are not there, or not to be counted ----------------------------------------------

RETINA = Head(tuple(Level(n, n, (SIZE / n, SIZE / n), 0.0, ((SIZE / n, SIZE / n), (SIZE / n, 2 * SIZE / n))) for n in (16, 8)), CLASSES, "offsets")  # fmt: skip
MULTIBOX = Head(RETINA.levels, CLASSES, "offsets", "softmax", weights=(10, 10, 5, 5))
CENTRAL = Head(LEVELS, CLASSES, "distances", centerness=True)
HEADS = {"own": OWN, "plain": PLAIN, "retinanet": RETINA, "ssd": MULTIBOX, "fcos": CENTRAL}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    "rows",
    [
        torch.full((4, 3, 6), -1.0),
        torch.zeros(4, 0, 6),
        torch.tensor([0.0, 50, 50, 50, 60, 0]).expand(4, 2, 6),
        torch.tensor([0.0, torch.nan, 50, 60, 60, 0]).expand(4, 1, 6),
        torch.tensor([0.0, 10, 10, 90, 90, 1]).expand(4, 1, 6),
        torch.tensor([0.0, 500, 500, 600, 600, 0]).expand(4, 1, 6),
    ],
    ids=["none", "no row", "no width", "nan", "ignored", "outside"],
)
def test_a_batch_without_objects_has_a_finite_loss_and_finite_gradients(head: Head, rows: Tensor) -> None:
    raw = noise(head)
    value = dl.loss(raw, rows, head)
    value.backward()
    assert bool(value.isfinite())
    assert raw.grad is not None
    assert bool(raw.grad.isfinite().all())


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_rows_without_a_box_change_nothing(head: Head) -> None:
    rows, raw = labels(4, 6), noise(head)
    padded = torch.full((4, 11, 6), -1.0)
    padded[:, 2:8] = rows
    torch.testing.assert_close(dl.loss(raw, rows, head), dl.loss(raw, padded, head))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_what_lies_in_an_ignored_box_is_neither_right_nor_wrong(head: Head) -> None:
    """Scores there get no gradient; those elsewhere the same as before, where nothing chooses among them."""
    rows = torch.full((1, 2, 6), -1.0)
    rows[0, 0] = torch.tensor([1.0, 70, 70, 120, 120, 0])
    before, after = noise(head, 1), noise(head, 1)
    dl.loss(before, rows, head).backward()
    rows[0, 1] = torch.tensor([2.0, 0, 0, 60, 60, 1])
    dl.loss(after, rows, head).backward()
    points = raw_boxes.places(head, CPU).points
    inside = ((points > 0) & (points < 60)).all(1)
    assert before.grad is not None
    assert after.grad is not None
    assert bool(inside.any())
    scores = slice(head.numbers + head.centerness, None)
    assert float(after.grad[0, inside, scores].abs().sum()) == 0
    if head.score == "sigmoid":
        torch.testing.assert_close(after.grad[0, ~inside], before.grad[0, ~inside])


def test_a_head_without_a_loss_says_so() -> None:
    strange = Head(LEVELS, CLASSES, "distances", "softmax")
    with pytest.raises(BadModel, match="distances, softmax"):
        dl.loss(noise(strange), labels(), strange)


def test_a_class_that_the_head_does_not_have_is_named() -> None:
    rows = labels()
    rows[1][rows[1, :, 0] >= 0] = torch.tensor([float(CLASSES), 10, 10, 50, 50, 0])
    with pytest.raises(BadData, match=f"class {CLASSES}"):
        dl.loss(noise(OWN), rows, OWN)


def test_a_loss_that_was_measured_first_can_be_trained_by_later() -> None:
    head, rows = Head(LEVELS[:2], CLASSES), labels()
    with torch.inference_mode():
        dl.loss(noise(head), rows, head)
    raw = noise(head)
    dl.loss(raw, rows, head).backward()
    assert raw.grad is not None


def test_outputs_of_another_size_are_refused() -> None:
    with pytest.raises(BadModel, match="head describes"):
        dl.loss(noise(OWN)[:, 1:], labels(), OWN)


# --- distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_equal_answers_cost_nothing_and_others_something(head: Head) -> None:
    teacher = noise(head).detach()
    if head.box == "distances":
        teacher[..., :4] = teacher[..., :4].abs() + 0.1
    same = dl.distill_loss(teacher.clone(), teacher, head)
    assert float(same) == pytest.approx(0, abs=1e-4)
    assert float(dl.distill_loss(noise(head, seed=9).detach(), teacher, head)) > 0.05


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_student_that_follows_comes_to_answer_as_its_teacher_where_that_sees_something(head: Head) -> None:
    student, teacher = noise(head, 1, seed=1), noise(head, 1, seed=2).detach()
    scores = slice(head.numbers + head.centerness, None)
    teacher[..., : head.numbers] = teacher[..., : head.numbers].abs()
    teacher[:, ::2, scores] = -12.0
    if head.score == "softmax":
        teacher[:, ::2, scores.start] = 12.0
    optimizer = torch.optim.Adam([student], 0.05)
    first = float(dl.distill_loss(student.detach(), teacher, head))
    for _ in range(300):
        optimizer.zero_grad()
        value = dl.distill_loss(student, teacher, head)
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.05 * first
    at = raw_boxes.places(head, CPU)
    ours, theirs = (raw_boxes.boxes_of(t.detach()[..., : head.numbers], head, at)[0, 1::2] for t in (student, teacher))
    assert float((ours - theirs).abs().mean()) < 0.5


def test_boxes_where_the_teacher_sees_nothing_are_free() -> None:
    student, teacher = noise(OWN, seed=1), noise(OWN, seed=2).detach()
    teacher[:, ::2, OWN.numbers :] = -40.0
    dl.distill_loss(student, teacher, OWN).backward()
    assert student.grad is not None
    assert float(student.grad[:, ::2, : OWN.numbers].abs().max()) < 1e-12
    assert float(student.grad[:, 1::2, : OWN.numbers].abs().max()) > 1e-6


def test_the_distance_of_distributions_is_their_divergence() -> None:
    a, b = (noise(OWN, 1, seed).detach()[..., :32] for seed in (1, 2))
    p, q = ((t.double().view(1, -1, 4, 8) / 10).softmax(-1) for t in (b, a))
    expected = 100 * (p * (p / q).log()).sum(-1).mean(-1)
    torch.testing.assert_close(dl._box_distance(a, b, OWN).double(), expected, rtol=1e-3, atol=1e-5)


def test_the_loss_of_hard_labels_stays_what_cross_entropy_says() -> None:
    """One anchor, one box that is it: SSD's loss is the cross-entropy of its class and the three hardest others."""
    head = Head((Level(1, 8, (16.0, 16.0), 0.5, ((16.0, 16.0),)),), CLASSES, "offsets", "softmax")
    raw = noise(head, 1).detach()
    raw[..., :4] = 0
    rows = torch.tensor([[[2.0, 32, 0, 48, 16, 0]]])
    each = [float(cross_entropy(raw[0, k, 4:], torch.tensor(3 if k == 2 else 0))) for k in range(8)]
    hardest = sorted((v for k, v in enumerate(each) if k != 2), reverse=True)[:3]
    assert float(dl.loss(raw, rows, head)) == pytest.approx(each[2] + sum(hardest), rel=1e-5)
