"""Recovery: the losses are those of the papers, labels and teacher are read only where asked for, and it helps."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.data.splits import ArrayImages, Split
from lighten.errors import BadConfig
from lighten.kit.features import attention_loss, watched
from lighten.kit.recover import Recovery, _answers, _loss, _with_labels, checkpoint_file, recover
from lighten.tasks import classification as task
from lighten.types import Data, Device, Job, Precision
from nets import CLASSES, images, net

torch.set_num_threads(1)
PLAIN = Device("plain", "plain", "plain", ("onnx",))
QUICK = Recovery(epochs=6, batch=32, ema=0.9)


@cache
def job(nonsense: bool = False) -> Job:
    x, labels = images(320, seed=2)
    labels = torch.full_like(labels, 10**6) if nonsense else labels
    split = Split(ArrayImages(x.numpy(), labels.numpy()), np.arange(320))
    names = tuple(f"class {k}" for k in range(CLASSES))
    data = Data("made up", names, names, split, split, split, split, "f")
    return Job(data, "classification", PLAIN, None, net("small"))


def damaged() -> nn.Module:
    """A network that has lost a third of its answers: noise on its convolutions."""
    torch.manual_seed(3)
    model = net("small")
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight += 1.5 * m.weight.std() * torch.randn_like(m.weight)
    return model


def top1(model: nn.Module) -> float:
    x, labels = images(1000, seed=77)
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == labels).float().mean())


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- the losses, in float64 -----------------------------------------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def numpy_kd(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    return t * t * float(np.mean([kl(softmax(b / t), softmax(a / t)) for a, b in zip(student, teacher)]))


def numpy_dkd(
    student: np.ndarray, teacher: np.ndarray, target: np.ndarray, t: float, alpha: float, beta: float
) -> float:
    """Equations 4 to 7 of the paper, image by image."""
    rows = []
    for a, b, k in zip(student, teacher, target):
        p, q = softmax(b / t), softmax(a / t)
        others = np.arange(len(a)) != k
        tckd = kl(np.array([p[k], p[others].sum()]), np.array([q[k], q[others].sum()]))
        nckd = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        rows.append(alpha * tckd + beta * nckd)
    return t * t * float(np.mean(rows))


@cache
def logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dice = np.random.default_rng(0)
    return dice.normal(0, 4, (16, 10)), dice.normal(0, 4, (16, 10)), dice.integers(0, 10, 16)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_and_dkd_are_the_papers(temperature: float) -> None:
    a, b, labels = logits()
    student, teacher = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    got = task.distill_loss(student, teacher, temperature).item()
    assert got == pytest.approx(numpy_kd(a, b, temperature), rel=1e-5)
    for alpha, beta in ((1.0, 8.0), (0.5, 2.0)):
        got = task.dkd_loss(student, teacher, torch.from_numpy(labels), temperature, alpha, beta).item()
        assert got == pytest.approx(numpy_dkd(a, b, labels, temperature, alpha, beta), rel=1e-5)
    got = task.dkd_loss(student, teacher, None, temperature).item()
    assert got == pytest.approx(numpy_dkd(a, b, b.argmax(1), temperature, 1.0, 8.0), rel=1e-5)


def test_dkd_with_beta_of_each_image_would_be_kd() -> None:
    """Equation 5: KD = TCKD + (1 - p_t) NCKD, so for one image beta = 1 - p_t gives KD."""
    a, b, labels = logits()
    for row in range(4):
        p = softmax(b[row] / 4.0)[labels[row]]
        one = [torch.tensor(v[row : row + 1], dtype=torch.float32) for v in (a, b)]
        got = task.dkd_loss(*one, torch.tensor([labels[row]]), 4.0, 1.0, float(1 - p))
        assert got.item() == pytest.approx(task.distill_loss(*one, 4.0).item(), rel=1e-4)


def test_dkd_stays_finite_where_one_class_takes_all() -> None:
    student = torch.tensor([[500.0, 0, 0], [0, -500, 3]], requires_grad=True)
    teacher = torch.tensor([[0.0, 400, 0], [900, 0, 0]])
    value = task.dkd_loss(student, teacher, torch.tensor([1, 0]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", ["kd", "dkd"])
def test_the_parts_add_up_by_their_weights(kind: str) -> None:
    """(1 - d) * cross-entropy with smoothing + d * distillation + f * attention transfer."""
    from lighten.kit.features import pairs

    student, teacher = net("small", 1).eval(), net("small").eval()
    x, y = images(16, seed=4)
    found = pairs(student, teacher, x)
    s = Recovery(distill=0.7, temperature=2.0, loss=kind, features=3.0, label_smoothing=0.1)
    got = _loss(student, teacher, s, task, found)(student, x, y).item()
    with torch.no_grad(), watched(student, [p.student for p in found]) as ours:
        a = student(x).double().numpy()
    with torch.no_grad(), watched(teacher, [p.teacher for p in found]) as theirs:
        b = teacher(x).double().numpy()
    wanted = np.full((16, 10), 0.01)
    wanted[np.arange(16), y.numpy()] += 0.9
    entropy = -(wanted * np.log(softmax(a))).sum(1).mean()
    near = numpy_kd(a, b, 2.0) if kind == "kd" else numpy_dkd(a, b, y.numpy(), 2.0, 1.0, 8.0)
    maps = attention_loss([(ours[p.student], theirs[p.teacher]) for p in found]).item()
    assert len(found) == 3
    assert got == pytest.approx(0.3 * entropy + 0.7 * near + 3.0 * maps, rel=1e-4)


# --- what is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kd", "dkd"])
def test_with_the_teacher_alone_no_label_is_read(kind: str) -> None:
    """Labels that no loss could take, the same weights."""
    s = replace(QUICK, epochs=1, distill=1.0, loss=kind, features=0.5)
    done = [recover(damaged(), net("small"), s, job(nonsense), task=task) for nonsense in (False, True)]
    assert same(*done)
    with pytest.raises((IndexError, RuntimeError)):
        recover(damaged(), net("small"), replace(s, distill=0.9), job(True), task=task)


class Untouchable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the teacher was asked")


def test_with_labels_alone_the_teacher_is_not_run_or_not_there() -> None:
    s = replace(QUICK, epochs=1, distill=0.0)
    assert same(*(recover(damaged(), t, s, job(), task=task) for t in (None, Untouchable())))


def test_the_teacher_is_not_changed_and_the_student_carries_no_hooks() -> None:
    teacher = net("small").train()
    before = copy.deepcopy(teacher.state_dict())
    done = recover(damaged(), teacher, replace(QUICK, epochs=1, features=1.0), job(), task=task)
    assert teacher.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks for m in done.modules())
    assert not done.training
    assert {p.device.type for p in done.parameters()} == {"cpu"}


def test_hooks_around_the_step_hold_a_mask() -> None:
    mask = (torch.rand(96, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    seen: list[bool] = []

    def before(m: Any) -> None:
        seen.append(m.fc.weight.grad is not None)

    def after(m: Any) -> None:
        with torch.no_grad():
            m.fc.weight.mul_(mask)

    start = damaged()
    after(start)
    done: Any = recover(
        start, net("small"), replace(QUICK, epochs=1), job(), task=task, before_step=before, after_step=after
    )
    assert seen == [True] * 10
    assert not done.fc.weight[:, mask == 0].any()
    assert done.fc.weight[:, mask == 1].all()


# --- does it help, does it go on ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [{"distill": 0.0}, {"distill": 1.0}, {"distill": 0.9, "features": 1.0}, {"distill": 1.0, "loss": "dkd"}],
    ids=["labels", "teacher", "both and features", "dkd without labels"],
)
def test_a_damaged_network_wins_back_most_of_what_it_lost(changed: dict[str, Any]) -> None:
    """On images it never saw: half of the loss, at least."""
    whole, hurt = top1(net("small")), top1(damaged())
    assert whole - hurt > 10
    done = recover(damaged(), net("small"), replace(QUICK, **changed), job(), task=task)
    assert top1(done) > hurt + 0.5 * (whole - hurt)


def test_interrupted_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    s = replace(QUICK, epochs=3, features=0.5)
    whole = recover(damaged(), net("small"), s, job(), task=task)
    steps: list[int] = []

    def cut(_model: nn.Module) -> None:
        steps.append(1)
        if len(steps) == 14:
            raise KeyboardInterrupt

    file = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        recover(damaged(), net("small"), s, job(), task=task, checkpoint=file, after_step=cut)
    rest: list[int] = []
    done = recover(damaged(), net("small"), s, job(), task=task, checkpoint=file, after_step=lambda m: rest.append(1))
    assert len(rest) == 20
    assert same(done, whole)


def test_a_checkpoint_belongs_to_settings_network_seed_and_precision(tmp_path: Path) -> None:
    work = replace(job(), scratch=str(tmp_path))
    base = checkpoint_file(work, "finetune", QUICK, net("small"))
    assert base == checkpoint_file(work, "finetune", replace(QUICK), net("small"))
    assert base is not None
    assert base.parent == tmp_path
    others = [
        checkpoint_file(work, "distill", QUICK, net("small")),
        checkpoint_file(work, "finetune", replace(QUICK, lr=0.03), net("small")),
        checkpoint_file(work, "finetune", QUICK, damaged()),
        checkpoint_file(replace(work, seed=1), "finetune", QUICK, net("small")),
        checkpoint_file(replace(work, precision=Precision("int8", "int8")), "finetune", QUICK, net("small")),
    ]
    assert len({base, *others}) == 6
    assert checkpoint_file(job(), "finetune", QUICK, net("small")) is None


# --- what cannot be ---------------------------------------------------------------------------------------


def test_other_class_counts_are_refused_with_both_numbers() -> None:
    other: Any = net("small")
    other.fc = nn.Linear(96, 7)
    with pytest.raises(BadConfig, match="teacher answers with 10 classes, the student with 7"):
        recover(other, net("small"), QUICK, job(), task=task)


def test_no_images_no_teacher_and_no_common_layers_are_refused() -> None:
    empty = replace(job(), data=dataclasses.replace(job().data, train=None))
    with pytest.raises(BadConfig, match="no training images"):
        recover(damaged(), net("small"), QUICK, empty, task=task)
    with pytest.raises(BadConfig, match="no teacher"):
        recover(damaged(), None, QUICK, job(), task=task)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    with pytest.raises(BadConfig, match="no layers with maps of the same size"):
        recover(flat, net("small"), replace(QUICK, features=1.0), job(), task=task)


@pytest.mark.parametrize(
    "bad",
    [
        {"distill": 1.1}, {"distill": -0.1}, {"temperature": 0.0}, {"temperature": 101.0}, {"loss": "mse"},
        {"features": -1.0}, {"features": float("inf")}, {"label_smoothing": 1.0}, {"epochs": 0.0}, {"seconds": 0.0},
        {"batch": 1}, {"lr": 0.0}, {"ema": 1.0}, {"weight_decay": -1.0}, {"shift": 1.0},
    ],
)  # fmt: skip
def test_nonsense_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=next(iter(bad))):
        Recovery(**bad)
    if not isinstance(next(iter(bad.values())), int | str):
        with pytest.raises(BadConfig, match=next(iter(bad))):
            Recovery(**{next(iter(bad)): float("nan")})


def test_a_teacher_asked_once_gives_the_mean_of_both_ways_round() -> None:
    """Held to the teacher itself, image by image; labels stay what they were."""
    given = job()
    given = replace(given, data=replace(given.data, train=given.data.train.take(24)))
    teacher = net("small").eval()
    both = _with_labels(_answers(teacher, given, flip=True), given)
    x = torch.from_numpy(given.data.train.inputs(given.preprocess))
    with torch.no_grad():
        wanted = torch.stack([(teacher(one[None]) + teacher(one[None].flip(3)))[0] / 2 for one in x])
    assert torch.allclose(both[:, 1:], wanted, rtol=0.05, atol=0.05)  # the teacher may run in bfloat16
    assert both[:, 0].long().tolist() == given.data.train.labels.tolist()


def test_a_teacher_asked_once_wins_back_what_was_lost() -> None:
    settings = Recovery(epochs=4, batch=32, distill=1.0, once=True)
    before, trained = damaged(), recover(damaged(), net("small"), settings, job(nonsense=True), task=task)
    assert top1(trained) > top1(before) + 0.5 * (top1(net("small")) - top1(before))


def test_features_need_every_view() -> None:
    with pytest.raises(BadConfig, match="features"):
        Recovery(once=True, features=1.0)
