"""Distillation: the original network teaches the compressed one, or a smaller one of another architecture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lighten.errors import BadConfig
from lighten.types import Device, Job

REQUIRES = ("torch",)
EXTRA = "compress"
HOMES = ("timm", "torchvision", "lighten")


@dataclass(frozen=True)
class Step:
    """`distill` is the teacher's share of the loss (1: labels are not read), at `temperature`, by `loss` "kd" or "dkd".
    `features` weighs attention transfer beside it. `student` names an architecture (timm:NAME, torchvision:NAME,
    lighten:NAME) that replaces the network and starts from random weights.

    `epochs` may be a fraction; `seconds` limits the wall-clock time of training, 0 does not. `lr` is the peak of the
    one-cycle. With `once` the teacher answers each image once, before training. The seed is the job's.
    """

    epochs: float = 1.0
    seconds: float = 0.0
    batch: int = 128
    lr: float = 0.02
    distill: float = 0.9
    temperature: float = 4.0
    loss: str = "kd"
    features: float = 0.0
    student: str = ""
    ema: float = 0.999
    weight_decay: float = 5e-4
    shift: float = 0.125
    flip: bool = True
    label_smoothing: float = 0.0
    once: bool = False

    def __post_init__(self) -> None:
        home, _, name = self.student.partition(":")
        if self.student and (home not in HOMES or not name):
            raise BadConfig(
                f"distill: student {self.student!r} does not say where the architecture comes from.",
                f"Write {', '.join(f'{h}:NAME' for h in HOMES)}.",
            )
        self._recovery()

    def apply(self, model: Any, job: Job) -> Any:
        """The student after training, in eval mode; `job.original` is the teacher.

        Raises BadConfig without training images or teacher, where the two have different class counts, where the
        student cannot take the inputs, or where the loss stays not finite; UnknownName for an architecture that is
        not there. An interrupted training goes on from `job.scratch`.
        """
        from lighten.kit.recover import checkpoint_file, recover
        from lighten.plugins import task_of

        if job.data.train is None or not len(job.data.train):
            raise BadConfig("distill: there are no training images.", "Give some (labels are not needed: distill 1).")
        if self.student:
            model = self._student(job)
        file = checkpoint_file(job, "distill", self, model)
        return recover(model, job.original, self._recovery(), job, task=task_of(job), checkpoint=file)

    def _student(self, job: Job) -> Any:
        """The architecture with random weights and as many classes as the data has."""
        import torch

        from lighten.models.load import build

        torch.manual_seed(job.seed)
        student = build(self.student, classes=len(job.data.classes))
        x = torch.from_numpy(job.data.train.take(2).inputs(job.preprocess))
        try:
            with torch.no_grad():
                student.eval()(x)
        except (RuntimeError, ValueError, AssertionError) as e:
            raise BadConfig(
                f"distill: {self.student} cannot take inputs of {tuple(x.shape[1:])}: {e}",
                "Choose a student for this size, or another preprocessing.",
            ) from e
        return student

    def _recovery(self) -> Any:
        from lighten.kit.recover import Recovery

        try:
            return Recovery(
                self.epochs, self.seconds or None, self.batch, self.lr, self.distill, self.temperature, self.loss,
                self.features, self.ema, self.weight_decay, self.shift, self.flip, self.label_smoothing, self.once,
            )  # fmt: skip
        except BadConfig as e:
            raise BadConfig(f"distill: {e.what.partition(': ')[2]}", e.to_do) from e

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """One: how long to train is for those who ask for it."""
        yield cls()
