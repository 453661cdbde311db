"""Zeros among the weights: the smallest of the network or of each layer, or N kept of every M; in rounds, with recovery."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lighten.errors import BadConfig, UnknownName
from lighten.types import Device, Job

REQUIRES = ("torch",)
EXTRA = "compress"
SCOPES = ("global", "local")
UNSTRUCTURED = "unstructured"
BATCH = 64


@dataclass(frozen=True)
class Step:
    """Sets weights to zero by magnitude (Han et al., 2015, "Learning both Weights and Connections", section 3).

    `ratio` is the share of zeros: of all layers together (`scope` "global", one threshold) or of each (`"local"`). With
    `pattern` "2:4" (generally N:M) N of M consecutive inputs are kept instead and `ratio` is not used. `rounds` reach it by
    the cubic schedule of Zhu & Gupta (2017, eq. 1); each is followed by an equal part of `epochs`, in which zeros stay
    zeros. Without epochs the rounds change nothing. `seconds` limits the wall-clock time of all training together, 0 does
    not: each round has an equal part of it. `images` re-estimate the batch norms.

    Left alone: layers in `keep` (or inside them); what the task protects, because every answer hangs on those few weights;
    depthwise convolutions, which hold a few percent of the weights and have one small kernel a channel, so that no other
    input can stand in for a lost one.
    """

    ratio: float = 0.5
    scope: str = "global"
    pattern: str = UNSTRUCTURED
    rounds: int = 1
    epochs: float = 0.0
    seconds: float = 0.0
    lr: float = 0.02
    distill: float = 0.9
    keep: tuple[str, ...] = ()
    images: int = 512

    def __post_init__(self) -> None:
        checks = {
            f"ratio is {self.ratio}; it must be above 0 and under 1": 0 < self.ratio < 1,
            f"scope is {self.scope!r}; choose {' or '.join(SCOPES)}": self.scope in SCOPES,
            f"pattern is {self.pattern!r}; choose {UNSTRUCTURED} or N:M with 0 < N < M, as 2:4": self.pattern
            == UNSTRUCTURED
            or _n_of_m(self.pattern) is not None,
            "rounds and images must be whole numbers, 1 or more": _whole(self.rounds) and _whole(self.images),
            "epochs and seconds must be 0 or more": 0 <= self.epochs < math.inf and 0 <= self.seconds < math.inf,
            "lr must be above 0 and at most 10": 0 < self.lr <= 10,
            "distill must be between 0 and 1": 0 <= self.distill <= 1,
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise BadConfig(f"sparsify: {broken[0]}.")
        object.__setattr__(self, "keep", tuple(self.keep))

    def apply(self, model: Any, job: Job) -> Any:
        """The model with plain zeros in its weights: nothing hangs on its layers afterwards.

        Raises BadConfig where no layer can take it, UnknownName for a layer in `keep` that the model has not; and what
        recovery raises (no training images).
        """
        from lighten.kit import masks

        names, left = self._chosen(model, job)
        before = masks.packed(masks.weights(model).values())
        teacher = copy.deepcopy(model) if job.original is None and self.epochs else job.original
        for done in range(1, self.rounds + 1):
            found = masks.weights(model)
            gone = self._gone({name: found[name] for name in names}, done)
            masks.hold(model, gone)
            model = self._recovered(model, teacher, gone, done, job)
            masks.hold(model, gone)
        self._settle_norms(model, job)
        for line in _lines(masks.weights(model), names, left, before):
            job.say(line)
        return model.eval()

    def _chosen(self, model: Any, job: Job) -> tuple[tuple[str, ...], dict[str, str]]:
        """The weights that get zeros, by parameter name, and why each of the others is left alone."""
        from lighten.kit import masks
        from lighten.plugins import task_of

        modules = [name for name, _ in model.named_modules() if name]
        for name in self.keep:
            if name not in modules:
                raise UnknownName("layer", name, modules)
        reasons = {
            "kept on request": self.keep,
            "protected by the task": task_of(job).protect(model),
            "depthwise": masks.depthwise(model),
        }
        found = masks.weights(model)
        left = {}
        for name, weight in found.items():
            why = [reason for reason, those in reasons.items() if masks.under(masks.layer_of(name), those)]
            why += self._misfit(weight)
            if why:
                left[name] = why[0]
        chosen = tuple(name for name in found if name not in left)
        if not chosen:
            told = "; ".join(f"{name}: {why}" for name, why in left.items())
            raise BadConfig("sparsify: no layer can take zeros.", told or "It has no linear layer and no convolution.")
        return chosen, left

    def _misfit(self, weight: Any) -> list[str]:
        nm, inputs = _n_of_m(self.pattern), weight.shape[1]
        return [f"{inputs} inputs are no multiple of {nm[1]}"] if nm and inputs % nm[1] else []

    def _gone(self, tensors: Mapping[str, Any], done: int) -> dict[str, Any]:
        """Zeros after round `done`. In a pattern the number dropped of every M follows the schedule, rounded up."""
        from lighten.kit import masks

        if nm := _n_of_m(self.pattern):
            kept, of = nm
            dropped = math.ceil(masks.schedule(of - kept, done, self.rounds) - 1e-9)
            return {name: masks.n_of_m(w, of - dropped, of) for name, w in tensors.items()}
        ratio = masks.schedule(self.ratio, done, self.rounds)
        return (masks.over_all if self.scope == "global" else masks.each_alone)(tensors, ratio)

    def _recovered(self, model: Any, teacher: Any, gone: dict[str, Any], done: int, job: Job) -> Any:
        """A file of unfinished state a round: a run that was stopped goes through the finished ones at once."""
        if not self.epochs:
            return model
        from lighten.kit import masks
        from lighten.kit.recover import Recovery, checkpoint_file, recover
        from lighten.plugins import task_of

        return recover(
            model.requires_grad_(True),
            teacher if self.distill else None,
            Recovery(self.epochs / self.rounds, self.seconds / self.rounds or None, lr=self.lr, distill=self.distill),
            job,
            task=task_of(job),
            checkpoint=checkpoint_file(job, f"sparsify-{done}", self, model),
            after_step=lambda network: masks.hold(network, gone),
        )

    def _settle_norms(self, model: Any, job: Job) -> None:
        import torch

        from lighten.kit.norms import reestimate

        few = job.data.calibrate.take(self.images)
        reestimate(model, [torch.from_numpy(x) for x in few.batches(job.preprocess, BATCH)])

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """One: no runtime here gains from zeros, so a search has no use for more of them."""
        yield cls()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _n_of_m(text: str) -> tuple[int, int] | None:
    """ "2:4" -> (2, 4). None where it is no pattern N:M with 0 < N < M."""
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
    kept, of = (int(g) for g in match.groups()) if match else (0, 0)
    return (kept, of) if 0 < kept < of else None


def _lines(found: Mapping[str, Any], names: tuple[str, ...], left: dict[str, str], before: Any) -> list[str]:
    """What was done, what was left alone, and what zeros bring: all of it counted and compressed, nothing estimated."""
    from lighten.kit import masks

    after, chosen = masks.packed(found.values()), [found[name] for name in names]
    lines = [
        f"{100 * masks.zeros(chosen):.1f} % of the weights of {len(names)} layers are zero,"
        f" {100 * masks.zeros(found.values()):.1f} % of all the network's.",
        "Zeros do not shrink a dense file nor speed it up: they are stored and multiplied like any other number."
        f" Gzip makes the float32 weights {after.float32_saved:.1f} % smaller ({before.float32_saved:.1f} % before the"
        f" zeros), int8 ones {after.int8_saved:.1f} % ({before.int8_saved:.1f} % before).",
    ]
    if empty := [masks.layer_of(name) for name in names if not found[name].any()]:
        lines.append(f"Nothing is left of {', '.join(empty)}: lower the ratio, or choose scope local.")
    for why in dict.fromkeys(left.values()):
        lines.append(f"Left alone ({why}): {', '.join(masks.layer_of(n) for n, w in left.items() if w == why)}.")
    return lines
