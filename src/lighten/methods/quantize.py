"""Static post-training quantization: ranges from unlabelled calibration images, no training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lighten.errors import BadConfig
from lighten.types import Device, Job, Precision

REQUIRES = ("torch", "torchao")
EXTRA = "compress"
RANGES = ("auto", "min-max", "percentile", "mse", "moving-average", "entropy")


@dataclass(frozen=True)
class Step:
    """`ranges` "auto" takes, for each tensor, whichever method has the smallest error; `images` bounds calibration."""

    ranges: str = "auto"
    images: int = 512
    batch: int = 32

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise BadConfig(f"quantize: ranges is {self.ranges!r}.", f"Choose one of {', '.join(RANGES)}.")
        if self.images < 1 or self.batch < 1:
            raise BadConfig("quantize: images and batch must be 1 or more.")

    def apply(self, model: Any, job: Job) -> Any:
        """The converted graph: integer weights and Q/DQ at `job.precision`. Its `meta["layers"]` says what was decided."""
        import torch

        from lighten.kit.quiet import quiet

        with quiet():  # torchao logs while it is imported
            from lighten.quant.plan import quantize
            from lighten.quant.ranges import METHODS

        if not job.precision.quantized:
            return model
        images = job.data.calibrate.take(self.images)
        inputs = (torch.from_numpy(x) for x in images.batches(job.preprocess, self.batch))
        shape = tuple(images.inputs(job.preprocess, slice(0, 1)).shape[1:])
        methods = METHODS if self.ranges == "auto" else (self.ranges,)
        done = quantize(
            model,
            shape,
            inputs,
            job.precision,
            job.device,
            methods,
            step=lambda n: job.progress("calibrating", n, len(images)),
        )
        done.module.meta["layers"] = done.layers
        return done.module

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """One: the default is chosen per tensor already."""
        yield cls()


def precisions(device: Device) -> tuple[Precision, ...]:
    """What is worth trying on a device, floats included: the best file may be float."""
    return (Precision(), Precision("float16", "float16"), Precision("int8", "int8"))
