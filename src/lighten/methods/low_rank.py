"""Low rank: a wide layer becomes two narrow ones where that has fewer weights and multiplications; then recovery."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lighten.errors import BadConfig, UnknownName
from lighten.types import Device, Job

REQUIRES = ("torch",)
EXTRA = "compress"
BATCH = 64


@dataclass(frozen=True)
class Step:
    """Linear -> two Linears, k x k convolution -> k x k with few filters and 1 x 1, where it pays.

    With `data` the directions that are kept are the principal ones of a layer's answers to `images` calibration images
    (Zhang et al., 2016, "Accelerating Very Deep Convolutional Networks", section 3.1), else those of its weights (Denton et
    al., 2014). As many are kept as hold `energy`, the share of their variance (of the squared singular values); with `ratio`
    above 0 as many as keep that share of the layer's weights instead. Ranks are multiples of `round_to` (0: the device's
    channel_multiple), rounded up for energy, down for ratio. Left alone: grouped convolutions; layers in `keep`, or inside
    them; what the task protects, unless `ends`: few outputs hold no spare direction (ResNet-18 on CIFAR-10 at ratio 0.5: 8
    directions for its 10 answers save 944 weights and cost 4 points), while a classifier of many classes may.
    `epochs` of training follow, for at most `seconds` of wall-clock time (0: no limit).
    """

    energy: float = 0.95
    ratio: float = 0.0
    round_to: int = 0
    data: bool = True
    keep: tuple[str, ...] = ()
    ends: bool = False
    epochs: float = 0.0
    seconds: float = 0.0
    lr: float = 0.02
    distill: float = 0.9
    images: int = 256

    def __post_init__(self) -> None:
        checks = {
            f"energy is {self.energy}; it must be above 0 and at most 1": 0 < self.energy <= 1,
            f"ratio is {self.ratio}; it must be 0 (by energy) or more and under 1": 0 <= self.ratio < 1,
            "round_to must be a whole number, 0 (the device's) or more": _whole(self.round_to, 0),
            "images must be a whole number, 1 or more": _whole(self.images, 1),
            "epochs and seconds must be 0 or more": 0 <= self.epochs < math.inf and 0 <= self.seconds < math.inf,
            "lr must be above 0 and at most 10": 0 < self.lr <= 10,
            "distill must be between 0 and 1": 0 <= self.distill <= 1,
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise BadConfig(f"low_rank: {broken[0]}.")
        object.__setattr__(self, "keep", tuple(self.keep))

    def apply(self, model: Any, job: Job) -> Any:
        """The model with pairs of layers under the old names: `fc` becomes `fc.0` and `fc.1`.

        Raises UnknownName for a layer in `keep` that the model has not, and what recovery raises (no training images).
        """
        from lighten.kit import factors

        teacher = copy.deepcopy(model) if job.original is None and self.epochs else job.original
        names = self._candidates(model, job)
        seen = factors.responses(model, names, self._images(job, self.images if self.data else 1))
        done = []
        for name in [n for n in names if n in seen]:
            layer = model.get_submodule(name)
            basis = factors.of_responses(seen[name]) if self.data else factors.of_weight(layer.weight)
            rank = self._rank(layer.weight, basis, job.device)
            if factors.pays(layer.weight, rank):
                mean = seen[name].mean if self.data else None
                factors.put(model, name, factors.factorise(layer, basis, rank, mean))
                done.append((name, layer.weight, rank, seen[name].places_per_image))
        job.say(_line(done, len(names)))
        return self._recovered(model, teacher, job).eval() if done else model.eval()

    def _candidates(self, model: Any, job: Job) -> list[str]:
        from lighten.kit import factors
        from lighten.plugins import task_of

        modules = [name for name, _ in model.named_modules() if name]
        for name in self.keep:
            if name not in modules:
                raise UnknownName("layer", name, modules)
        kept = [*self.keep, *(() if self.ends else task_of(job).protect(model))]
        return [n for n in factors.layers(model) if n and not any(n == k or n.startswith(f"{k}.") for k in kept)]

    def _rank(self, weight: Any, basis: Any, device: Device) -> int:
        from lighten.kit import factors

        step = self.round_to or device.channel_multiple
        if self.ratio:
            return max(step, factors.rank_for_ratio(weight, self.ratio) // step * step)
        return math.ceil(factors.rank_for_energy(basis.energies, self.energy) / step) * step

    def _images(self, job: Job, n: int) -> list[Any]:
        import torch

        few = job.data.calibrate.take(n)
        return [torch.from_numpy(x) for x in few.batches(job.preprocess, BATCH)]

    def _recovered(self, model: Any, teacher: Any, job: Job) -> Any:
        """Trained on where `epochs` say so; the statistics of batch norms fit the new layers in any case."""
        from lighten.kit.norms import reestimate

        if self.epochs:
            from lighten.kit.recover import Recovery, checkpoint_file, recover
            from lighten.plugins import task_of

            model = recover(
                model.requires_grad_(True),
                teacher if self.distill else None,
                Recovery(self.epochs, self.seconds or None, lr=self.lr, distill=self.distill),
                job,
                task=task_of(job),
                checkpoint=checkpoint_file(job, "low_rank", self, model),
            )
        reestimate(model, self._images(job, self.images))
        return model

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """Two: what costs hardly anything, and more than that."""
        yield cls(energy=0.99)
        yield cls()


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _line(done: list[tuple[str, Any, int, float]], layers: int) -> str:
    """What it brought, over the layers that were factorised."""
    from lighten.kit import factors

    if not done:
        return "No layer pays as two: their factors would have as many weights and multiplications or more. Nothing changed."
    before = sum(w.numel() for _, w, _, _ in done), sum(w.numel() * places for _, w, _, places in done)
    rows = [(rank * factors.per_rank(w), places) for _, w, rank, places in done]
    after = sum(n for n, _ in rows), sum(n * places for n, places in rows)
    ranks = ", ".join(f"{name} {len(w)} -> {rank}" for name, w, rank, _ in done)
    return (
        f"{len(done)} of {layers} layers are two of lower rank now: {before[0]:,} -> {after[0]:,} weights,"
        f" {before[1] / 1e6:.1f} -> {after[1] / 1e6:.1f} million multiplications an image ({ranks})."
    )
