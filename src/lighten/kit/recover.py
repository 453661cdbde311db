"""Winning back what compression cost: the teacher, the labels and the teacher's features in one loss, trained by `fit`."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import BadConfig
from lighten.kit.features import Pair, attention_loss, pairs, watched
from lighten.kit.fit import FitSettings, Hook, Loss, best_device, decoded, fit, gains_from_bf16
from lighten.types import Job, digest, to_json

LOSSES = ("kd", "dkd")
ANSWER_BATCH = 128


@dataclass(frozen=True)
class Recovery:
    """Settings of one recovery. `distill` is the teacher's share of the loss: 1 reads no labels, 0 labels alone.

    `loss` is "kd" (Hinton et al., 2015) or "dkd" (Zhao et al., 2022), at `temperature`; `features` weighs attention
    transfer (Zagoruyko & Komodakis, 2017), which comes on top. `epochs` may be a fraction; `seconds` is a limit of
    wall-clock time by which training ends with its learning rate annealed.

    With `once` the teacher answers each training image only once, before training: as it is and mirrored, and the mean
    is what the student learns from every augmented view. That costs two passes and saves one in every epoch, so a
    training of known time sees more epochs.
    """

    epochs: float = 1.0
    seconds: float | None = None
    batch: int = 128
    lr: float = 0.02
    distill: float = 0.9
    temperature: float = 4.0
    loss: str = "kd"
    features: float = 0.0
    ema: float = 0.999
    weight_decay: float = 5e-4
    shift: float = 0.125
    flip: bool = True
    label_smoothing: float = 0.0
    once: bool = False

    def __post_init__(self) -> None:
        checks = {
            "distill must be between 0 and 1": 0 <= self.distill <= 1,
            "temperature must be above 0 and at most 100": 0 < self.temperature <= 100,
            "once: features are compared on every view, so features must be 0": not (self.once and self.features),
            f"loss must be {' or '.join(LOSSES)}": self.loss in LOSSES,
            "features must be 0 or more": 0 <= self.features < math.inf,
            "label_smoothing must be 0 or more and under 1": 0 <= self.label_smoothing < 1,
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise BadConfig(f"recover: {broken[0]}.")
        self.fit_settings(0)

    @property
    def asks_the_teacher(self) -> bool:
        return self.distill > 0 or self.features > 0

    def fit_settings(self, seed: int) -> FitSettings:
        """What of it is the fit loop's. Raises BadConfig."""
        return FitSettings(
            self.epochs, self.batch, self.lr, weight_decay=self.weight_decay, ema=self.ema, shift=self.shift,
            flip=self.flip, seed=seed, seconds=self.seconds,
        )  # fmt: skip


def recover(
    model: nn.Module,
    teacher: nn.Module | None,
    settings: Recovery,
    job: Job,
    *,
    task: Any,
    checkpoint: Path | None = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
) -> nn.Module:
    """Train `model` (in place) on `job.data.train`; returns its average (EMA) on the CPU, in eval mode.

    loss = (1 - distill) * task.loss(labels) + distill * (KD or DKD against `teacher`) + features * attention transfer.
    `task` is the task's module. `teacher` is copied, never changed, and may be None where nothing asks it.
    `before_step(model)` is called between the backward pass and the optimizer's step, `after_step(model)` after it.
    With `checkpoint` (see `checkpoint_file`) an interrupted training goes on from there.

    Raises BadConfig without training images, without a teacher that is needed, where teacher and student have
    different class counts, or where the loss stays not finite.
    """
    if job.data.train is None or not len(job.data.train):
        raise BadConfig("There are no training images to recover on.", "Give some, or leave training out.")
    if settings.once and job.head is not None:
        raise BadConfig("recover: once: a detector's boxes move with every view.", "Leave once out.")
    model.requires_grad_(True)  # an average of a training before asks for no gradients
    began = time.monotonic()
    asked = _teacher(teacher) if settings.asks_the_teacher else None
    found: tuple[Pair, ...] = ()
    targets = None
    if asked is not None:
        found = _compared(model, asked, job, bool(settings.features))
        if settings.once:
            job = decoded(job)
            targets = _with_labels(_answers(asked, job, settings.flip), job)
    return fit(
        model,
        settings.fit_settings(job.seed),
        _loss(model, asked, settings, task, found),
        job,
        checkpoint=checkpoint,
        before_step=before_step,
        after_step=after_step,
        targets=targets,
        spent_s=time.monotonic() - began,
    )


def checkpoint_file(job: Job, name: str, settings: Any, model: nn.Module) -> Path | None:
    """A file in `job.scratch` for one training: other settings, or another network to start from, never go on from it.

    None where the job has no scratch folder. `settings` is a dataclass or plain data.
    """
    if not job.scratch:
        return None
    start = hashlib.sha256()
    for key, value in model.state_dict().items():
        start.update(key.encode())
        start.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    mark = digest(to_json((settings, job.precision, job.seed, start.hexdigest())))[:10]
    return Path(job.scratch) / f"{name}-{mark}.pt"


# --- teacher ------------------------------------------------------------------------------------------


def _teacher(original: nn.Module | None) -> nn.Module:
    """A frozen copy on the device that trains. Weights that would be cast to bfloat16 in every step are cast once."""
    if original is None:
        raise BadConfig("There is no teacher to learn from.", "Set distill and features to 0 to learn from labels.")
    device = best_device()
    teacher = copy.deepcopy(original).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if gains_from_bf16(teacher, device):
        for m in teacher.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                m.to(torch.bfloat16)
    return teacher


def _autocast(teacher: nn.Module) -> torch.autocast:
    device = best_device()
    return torch.autocast(device.type, torch.bfloat16, enabled=gains_from_bf16(teacher, device))


def _compared(model: nn.Module, teacher: nn.Module, job: Job, features: bool) -> tuple[Pair, ...]:
    """Both networks answer two images: do the answers compare, and which layers do?"""
    device = best_device()
    x = torch.from_numpy(job.data.train.take(2).inputs(job.preprocess)).to(device)
    was, training = next((p.device for p in model.parameters()), device), model.training
    model.to(device).eval()
    try:
        with torch.no_grad(), _autocast(teacher):
            wanted = teacher(x)
        with torch.no_grad():
            got = model(x)
        if isinstance(got, Tensor) and got.shape != wanted.shape:
            ours, theirs = (" x ".join(map(str, t.shape[1:])) for t in (got, wanted))
            of = "classes" if wanted.ndim == 2 else "places x values"
            raise BadConfig(
                f"The teacher answers with {theirs} {of}, the student with {ours}.",
                f"Build the student with as many {of} as the teacher has.",
            )
        return _layers(model, teacher, x) if features else ()
    finally:
        model.to(was).train(training)


def _layers(model: nn.Module, teacher: nn.Module, x: Tensor) -> tuple[Pair, ...]:
    with _autocast(teacher):
        found = pairs(model, teacher, x)
    if not found:
        raise BadConfig("Teacher and student have no layers with maps of the same size to match.", "Set features to 0.")
    return found


def _answers(teacher: nn.Module, job: Job, flip: bool) -> Tensor:
    """The teacher's logits of every training image (N, classes), the mean of both ways round where `flip`."""
    split, device, parts = job.data.train, best_device(), []
    for k in range(0, len(split), ANSWER_BATCH):
        where = slice(k, min(k + ANSWER_BATCH, len(split)))
        x = torch.from_numpy(split.inputs(job.preprocess, where)).to(device, memory_format=torch.channels_last)
        with torch.no_grad(), _autocast(teacher):
            views = [teacher(v).float() for v in ((x, x.flip(3)) if flip else (x,))]
        parts.append(torch.stack(views).mean(0))
        job.progress("the teacher answers", where.stop, len(split))
    return torch.cat(parts)


def _with_labels(answers: Tensor, job: Job) -> Tensor:
    """(N, 1 + classes): the label, then the teacher's logits. float32 is exact for labels up to 2^24."""
    labels = torch.from_numpy(job.data.train.labels).to(answers.device, answers.dtype)
    return torch.cat([labels[:, None], answers], 1)


# --- loss ---------------------------------------------------------------------------------------------


def _loss(model: nn.Module, teacher: nn.Module | None, settings: Recovery, task: Any, found: tuple[Pair, ...]) -> Loss:
    """`model` is the module inside `student`, which may be wrapped for several processes."""
    s = settings

    def loss(student: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        parts = []
        wanted = None
        if s.once and teacher is not None:
            y, wanted = y[:, 0].long(), y[:, 1:]
        with watched(model, [p.student for p in found]) as ours:
            answers = student(x)
        if teacher is not None:
            if wanted is None:
                with torch.no_grad(), _autocast(teacher), watched(teacher, [p.teacher for p in found]) as theirs:
                    wanted = teacher(x)
            if s.distill:
                parts.append(s.distill * _distilled(task, s, answers, wanted, y))
            if s.features:
                maps = [(ours[p.student], theirs[p.teacher]) for p in found]
                parts.append(s.features * attention_loss(maps))
        if s.distill < 1:
            parts.append((1 - s.distill) * task.loss(lambda _: answers, x, y, s.label_smoothing))
        return torch.stack(parts).sum()

    return loss


def _distilled(task: Any, s: Recovery, answers: Tensor, wanted: Tensor, y: Tensor) -> Any:
    """By the labels only where labels are read at all."""
    if s.loss == "kd":
        return task.distill_loss(answers, wanted, s.temperature)
    return task.dkd_loss(answers, wanted, y if s.distill < 1 else None, s.temperature)
