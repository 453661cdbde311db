"""Quantization-aware training: weights and scales learn on together, from the calibrated network and its float teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import BadConfig
from lighten.types import Device, Job, digest, to_json

REQUIRES = ("torch", "torchao")
EXTRA = "compress"
RANGES = ("auto", "min-max", "percentile", "mse", "moving-average", "entropy")
SMALLEST_SIZE = 1e-3


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


@dataclass(frozen=True)
class Step:
    """`lr` is the change a step makes of a tensor, relative to its root mean square, at the peak of the one-cycle;
    `scale_lr` the same for scales. `distill` is the teacher's share of the loss (1: labels are not read), at
    `temperature`. `images` calibrate, by `ranges`. The seed is the job's.
    """

    epochs: int = 4
    batch: int = 64
    lr: float = 1e-3
    scale_lr: float = 1e-3
    distill: float = 0.9
    temperature: float = 4.0
    ema: float = 0.99
    shift: float = 0.125
    flip: bool = True
    images: int = 512
    ranges: str = "auto"

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise BadConfig(f"qat: ranges is {self.ranges!r}.", f"Choose one of {', '.join(RANGES)}.")
        checks = {
            "epochs and images must be whole numbers, 1 or more": _whole(self.epochs) and _whole(self.images),
            "batch must be 2 or more": self.batch >= 2,
            "lr must be above 0 and under 1": 0 < self.lr < 1,
            "scale_lr must be above 0 and under 1": 0 < self.scale_lr < 1,
            "distill must be between 0 and 1": 0 <= self.distill <= 1,
            "temperature must be above 0 and at most 100": 0 < self.temperature <= 100,
            "ema must be 0 or more and under 1": 0 <= self.ema < 1,
            "shift must be 0 to 0.9": 0 <= self.shift <= 0.9,
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise BadConfig(f"qat: {broken[0]}.")

    def apply(self, model: Any, job: Job) -> Any:
        """The converted graph: integer weights and Q/DQ at `job.precision`. Its `meta["layers"]` says what was decided.

        Batch norms are folded before training (Nagel et al., 2021, "A White Paper on NN Quantization", section 4.2,
        static folding): what is trained is exactly what ships, there are no statistics that training and inference
        could see differently, and the network needs no batch norm to train, because it is trained already.

        Raises BadConfig without training images, or where the loss is not finite.
        """
        from lighten.quant.learned import learn, settle
        from lighten.quant.plan import convert

        if not job.precision.quantized:
            return model
        if job.data.train is None or not len(job.data.train):
            raise BadConfig("qat: there are no training images.", "Give some, or quantize without training.")
        plan = self._calibrated(model, job)
        learn(plan.graph)
        self._train(plan.graph, model if job.original is None else job.original, job)
        settle(plan.graph)
        done = convert(plan)
        done.module.meta["layers"] = done.layers
        return done.module

    def _calibrated(self, model: Any, job: Job) -> Any:
        """What post-training quantization gives: ranges chosen, means and spreads matched where that helps."""
        import torch

        from lighten.quant import static

        images = torch.from_numpy(job.data.calibrate.take(self.images).inputs(job.preprocess))
        parts = static.Parts(self.ranges)
        plan = static.calibrated(model, images, job.precision, job.device, parts, job.progress)
        static.correct(plan, model, images, static.with_biases(plan), parts)
        return plan

    def _train(self, graph: Any, original: Any, job: Job) -> None:
        """`graph` ends with the averaged weights and scales, on the CPU."""
        import torch

        from lighten.kit.fit import FitSettings, best_device, fit
        from lighten.quant.learned import Trainable

        settings = FitSettings(
            self.epochs, self.batch, self.lr, "adamw",
            weight_decay=0.0, ema=self.ema, shift=self.shift, flip=self.flip, seed=job.seed,
        )  # fmt: skip
        teacher = copy.deepcopy(original).to(best_device(), memory_format=torch.channels_last).eval()
        student = Trainable(graph)
        average = fit(
            student,
            settings,
            self._loss(teacher.requires_grad_(False), job),
            job,
            checkpoint=self._checkpoint(job),
            groups=self._groups,
            autocast=False,
        )
        student.load_state_dict(average.state_dict())
        student.to("cpu", memory_format=torch.contiguous_format)

    def _checkpoint(self, job: Job) -> Path | None:
        """One file for one training: other settings or another precision never go on from it."""
        mark = digest(to_json((self, job.precision, job.seed)))[:10]
        return Path(job.scratch) / f"qat-{mark}.pt" if job.scratch else None

    def _loss(self, teacher: Any, job: Job) -> Callable[[Any, Any, Any], Any]:
        """Hinton et al., 2015, section 2: the teacher's softened answers and the labels, weighted."""
        import torch

        from lighten.plugins import task_of

        task = task_of(job)

        def loss(student: Any, x: Any, y: Any) -> Any:
            answers = student(x)
            parts = []
            if self.distill:
                with torch.no_grad():
                    wanted = teacher(x)
                parts.append(self.distill * task.distill_loss(answers, wanted, self.temperature))
            if self.distill < 1:
                parts.append((1 - self.distill) * task.loss(lambda _: answers, x, y))
            return sum(parts)

        return loss

    def _groups(self, student: Any) -> list[dict[str, Any]]:
        """Adam's steps are as long as its learning rate, whatever the gradient: each tensor gets one of its own size."""
        scales = [p for name, p in student.named_parameters() if name.endswith(".ratio")]
        groups = [{"params": scales, "lr": self.scale_lr}]
        for name, p in student.named_parameters():
            if not name.endswith(".ratio") and p.requires_grad:
                size = float(p.detach().square().mean().sqrt())
                groups.append({"params": [p], "lr": self.lr * max(size, SMALLEST_SIZE)})
        return groups

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """One: how long to train is for those who ask for it."""
        yield cls()
