"""Post-training quantization: static, dynamic or of the weights alone, from unlabelled calibration images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import BadConfig
from lighten.types import Device, Job, Precision

REQUIRES = ("torch", "torchao")
EXTRA = "compress"
RANGES = ("auto", "min-max", "percentile", "mse", "moving-average", "entropy", "reconstruction")
BIASES = ("auto", "none", "analytic", "empirical", "reestimate")
ROUNDINGS = ("auto", "nearest", "adaround", "brecq", "qdrop")
NAMED = {
    "float32": Precision(),
    "float16": Precision("float16", "float16"),
    "int8": Precision("int8", "int8"),
    "int4": Precision("int4", "int8"),
    "int8-dynamic": Precision("int8", "dynamic"),
    "int8-weights": Precision("int8", "float32"),
    "int4-weights": Precision("int4", "float32"),
}
"""What a person may ask for by name; `int4` is 4-bit weights with 8-bit activations."""


@dataclass(frozen=True)
class Step:
    """`ranges` "auto" takes, for each tensor, whichever method has the smallest error; `images` bounds calibration.

    `rounding` "auto" rounds to the nearest at 8 bits, and learns it block by block (BRECQ) where weights have 4;
    `iterations` are those of one block. `split` is the share of outlier channels that are split in two, `block` the
    consecutive weights that share a scale where weights alone are quantized (0: one scale an output channel).
    """

    ranges: str = "auto"
    images: int = 512
    batch: int = 32
    equalize: bool = False
    split: float = 0.0
    bias: str = "auto"
    rounding: str = "auto"
    iterations: int = 300
    block: int = 0

    def __post_init__(self) -> None:
        for key, known in (("ranges", RANGES), ("bias", BIASES), ("rounding", ROUNDINGS)):
            if getattr(self, key) not in known:
                raise BadConfig(f"quantize: {key} is {getattr(self, key)!r}.", f"Choose one of {', '.join(known)}.")
        if self.images < 1 or self.batch < 1 or self.iterations < 1:
            raise BadConfig("quantize: images, batch and iterations must be 1 or more.")
        if self.block < 0 or self.block == 1:
            raise BadConfig("quantize: block must be 0 (a scale for each output channel), or 2 and more.")
        if not 0 <= self.split <= 0.5:
            raise BadConfig("quantize: split is a share of the channels, 0 to 0.5.")

    def apply(self, model: Any, job: Job) -> Any:
        """The converted graph: integer weights and Q/DQ at `job.precision`. Its `meta["layers"]` says what was decided."""
        import torch

        from lighten.quant import static, weight_only

        if not job.precision.quantized:
            return model
        if job.precision.activations in ("float32", "dynamic"):
            done = weight_only.quantize_weights(
                model, _shape(job), job.precision, job.device, self.block, static.methods(self.ranges)
            )
        else:
            images = torch.from_numpy(job.data.calibrate.take(self.images).inputs(job.preprocess))
            kept = Path(job.scratch) / "rounding.pt" if job.scratch else None
            done = static.quantize(model, images, job.precision, job.device, self._parts(job), job.progress, kept)
        done.module.meta["layers"] = done.layers
        return done.module

    def _parts(self, job: Job) -> Any:
        from lighten.quant.rounding import Rounding
        from lighten.quant.static import Parts

        how = self.rounding
        if how == "auto":
            how = "brecq" if has_weights(job.precision, "int4") else "nearest"
        rounding = None if how == "nearest" else Rounding(how, self.iterations, seed=job.seed)
        return Parts(self.ranges, self.equalize, self.split, self.bias, rounding, self.batch)

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """One: the default is chosen per tensor already."""
        yield cls()


def has_weights(precision: Precision, weights: str) -> bool:
    """Whether any layer has weights of this type."""
    return weights in (precision.weights, *(w for _, w, _ in precision.exceptions))


def _shape(job: Job) -> tuple[int, ...]:
    return tuple(job.data.calibrate.inputs(job.preprocess, slice(0, 1)).shape[1:])


def precisions(device: Device) -> tuple[Precision, ...]:
    """What is worth trying on a device, floats included: the best file may be float."""
    return NAMED["float32"], NAMED["float16"], NAMED["int8"]
