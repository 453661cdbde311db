"""The two methods that train: a distilled or fine-tuned network answers better, goes on after a kill, refuses nonsense."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_recover import damaged, job, same, top1
from torch import nn

from lighten.errors import BadConfig, UnknownName
from lighten.methods import distill, finetune
from nets import net

torch.set_num_threads(1)
DISTILL = distill.Step(epochs=6.0, batch=32, ema=0.9)
FINETUNE = finetune.Step(epochs=6.0, batch=32, ema=0.9)


@pytest.mark.parametrize("step", [DISTILL, FINETUNE], ids=["distill", "finetune"])
def test_it_wins_back_half_of_what_was_lost_at_least(step: Any) -> None:
    whole, hurt = top1(net("small")), top1(damaged())
    done = step.apply(damaged(), job())
    assert top1(done) > hurt + 0.5 * (whole - hurt)
    assert not done.training


def test_batch_norms_alone_are_no_epoch() -> None:
    """Statistics that are wrong by far come right; no weight moves."""
    broken = net("small")
    for m in broken.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.add_(2.0)  # type: ignore[union-attr]
            m.running_var.mul_(4.0)  # type: ignore[union-attr]
    hurt, whole = top1(broken), top1(net("small"))
    done = finetune.Step(epochs=0.0, batch=64).apply(copy.deepcopy(broken), job())
    assert hurt < whole - 10
    assert top1(done) > whole - 2
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), broken.parameters()))


@pytest.mark.parametrize("step", [DISTILL, FINETUNE], ids=["distill", "finetune"])
def test_an_interrupted_training_goes_on_from_the_scratch_folder(tmp_path: Path, step: Any) -> None:
    short = replace(step, epochs=2.0)
    whole = short.apply(damaged(), job())

    def cut(what: str, done: int, _total: int) -> None:
        if what.startswith("epoch 2/") and done == 20:
            raise KeyboardInterrupt

    work = replace(job(), scratch=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        short.apply(damaged(), replace(work, progress=cut))
    assert len(list(tmp_path.glob("*.pt"))) == 1
    steps: list[int] = []
    done = short.apply(
        damaged(), replace(work, progress=lambda what, k, n: steps.append(k) if what.startswith("epoch") else None)
    )
    assert steps == [20]
    assert same(done, whole)


def test_a_smaller_student_takes_the_networks_place() -> None:
    """From random weights, in 20 steps without labels, it is far above chance (10 %) on images it never saw."""
    step = distill.Step(epochs=2.0, batch=32, lr=0.1, ema=0.5, student="lighten:resnet20", distill=1.0)
    done = step.apply(net("small"), job())
    assert type(done).__name__ != "Small"
    assert top1(done) > 30
    first, again = (replace(step, epochs=0.1).apply(net("small"), job()) for _ in range(2))
    assert same(first, again)


def test_a_student_that_is_not_there_or_cannot_take_the_images_is_refused() -> None:
    with pytest.raises(BadConfig, match="distill: student 'resnet18'"):
        distill.Step(student="resnet18")
    with pytest.raises(BadConfig, match="distill: student 'hub:resnet18'"):
        distill.Step(student="hub:resnet18")
    with pytest.raises(UnknownName, match="resnet20"):
        distill.Step(student="lighten:resnet21").apply(net("small"), job())
    pytest.importorskip("torchvision")
    with pytest.raises(BadConfig, match=r"torchvision:vit_b_32 cannot take inputs of \(3, 16, 16\)"):
        distill.Step(student="torchvision:vit_b_32").apply(net("small"), job())


def test_a_teacher_of_other_classes_is_refused() -> None:
    """The data has ten, so the student has ten."""
    teacher: Any = net("small")
    teacher.fc = nn.Linear(96, 7)
    with pytest.raises(BadConfig, match="teacher answers with 7 classes, the student with 10"):
        replace(DISTILL, student="lighten:resnet20").apply(net("small"), replace(job(), original=teacher))


@pytest.mark.parametrize("step", [DISTILL, FINETUNE], ids=["distill", "finetune"])
def test_without_training_images_it_says_so(step: Any) -> None:
    data = job().data
    for train in (None, dataclasses.replace(data.train, rows=np.arange(0))):
        with pytest.raises(BadConfig, match="no training images"):
            step.apply(net("small"), replace(job(), data=dataclasses.replace(data, train=train)))


@pytest.mark.parametrize("kind", [distill.Step, finetune.Step])
@pytest.mark.parametrize(
    "bad", [{"epochs": -1.0}, {"seconds": -1.0}, {"batch": 1}, {"lr": 0.0}, {"ema": 1.0}, {"label_smoothing": 1.0}]
)
def test_nonsense_settings_name_the_method_and_the_setting(kind: Any, bad: dict[str, Any]) -> None:
    method = kind.__module__.rpartition(".")[2]
    with pytest.raises(BadConfig, match=f"{method}: .*{next(iter(bad))}"):
        kind(**bad)
