"""Fine-tuning: batch norms anew, then epochs on the labels alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lighten.errors import BadConfig
from lighten.types import Device, Job

REQUIRES = ("torch",)
EXTRA = "compress"
NORM_IMAGES = 2048
"""Training images that batch norms are estimated from: one pass forward."""


@dataclass(frozen=True)
class Step:
    """`epochs` may be a fraction, 0 is batch norms alone; `seconds` limits the wall-clock time of training, 0 does not.

    `lr` is the peak of the one-cycle. `shift` is a fraction of the image's size. The seed is the job's.
    """

    epochs: float = 1.0
    seconds: float = 0.0
    batch: int = 128
    lr: float = 0.01
    ema: float = 0.999
    weight_decay: float = 5e-4
    shift: float = 0.125
    flip: bool = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        self._recovery()

    def apply(self, model: Any, job: Job) -> Any:
        """The trained network, in eval mode. Raises BadConfig without training images or where the loss stays not
        finite; an interrupted training goes on from `job.scratch`."""
        import torch

        from lighten.kit.norms import reestimate
        from lighten.kit.recover import checkpoint_file, recover
        from lighten.plugins import task_of

        if job.data.train is None or not len(job.data.train):
            raise BadConfig("finetune: there are no training images.", "Give some, or leave this step out.")
        file = checkpoint_file(job, "finetune", self, model)
        some = job.data.train.take(NORM_IMAGES)
        size = min(self.batch, len(some))  # whole batches: each counts the same
        some = some.take(len(some) // size * size)
        reestimate(model, (torch.from_numpy(x) for x in some.batches(job.preprocess, size)))
        if not self.epochs:
            return model.eval()
        return recover(model, None, self._recovery(), job, task=task_of(job), checkpoint=file)

    def _recovery(self) -> Any:
        from lighten.kit.recover import Recovery

        try:
            return Recovery(
                self.epochs if self.epochs else 1.0, self.seconds or None, self.batch, self.lr, distill=0.0,
                ema=self.ema, weight_decay=self.weight_decay, shift=self.shift, flip=self.flip,
                label_smoothing=self.label_smoothing,
            )  # fmt: skip
        except BadConfig as e:
            raise BadConfig(f"finetune: {e.what.partition(': ')[2]}", e.to_do) from e

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """One: how long to train is for those who ask for it."""
        yield cls()
