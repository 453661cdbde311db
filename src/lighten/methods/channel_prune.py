"""Channel pruning: whole channels leave the weights, the least important first; the network is really smaller."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.errors import BadConfig, BadData
from lighten.types import ChannelGroup, Device, Job

REQUIRES = ("torch", "torch_pruning")
EXTRA = "compress"
SCOPES = ("global", "local")
KINDS = ("l1", "l2", "bn-scale", "taylor", "hessian", "random")
BATCH = 64
SPARSE_REG = 1e-4
"""Strength of the group regularisation, as in the CIFAR-10 recipe of Fang et al. (2023)."""


@dataclass(frozen=True)
class Step:
    """`ratio` is the share of channels removed: of every group for `scope` "local", of all together for "global".

    `widths` are exact widths by group, and then ratio and scope are not used. Widths are multiples of `round_to` (0: the
    device's channel_multiple), rounded up, and never under `least` of a group's channels. `keep` names layers, or parts
    of the network, whose outputs stay beside those that the task protects. With `rounds` above 1 the network narrows in
    geometric steps, and learns on from `recover` training images after each one. `max_damage` (points of top-1 on the
    calibrate split, after that) ends pruning and keeps the round before; 0 never does. `sparse` are epochs of training
    with group regularisation first (Fang et al., 2023, "DepGraph", equation 4). `images` bounds what importance and
    batch norms are measured on.
    """

    ratio: float = 0.5
    scope: str = "global"
    importance: str = "l2"
    widths: tuple[tuple[str, int], ...] = ()
    round_to: int = 0
    least: float = 0.1
    keep: tuple[str, ...] = ()
    rounds: int = 1
    recover: int = 0
    max_damage: float = 0.0
    sparse: float = 0.0
    images: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple((str(name), width) for name, width in self.widths))
        object.__setattr__(self, "keep", tuple(self.keep))
        if self.ratio == 0:
            raise BadConfig("channel_prune: a ratio of 0 removes nothing.", "Leave the step out.")
        if self.ratio == 1:
            raise BadConfig("channel_prune: a ratio of 1 removes everything.", "Choose one under 1, such as 0.5.")
        for key, known in (("scope", SCOPES), ("importance", KINDS)):
            if getattr(self, key) not in known:
                raise BadConfig(
                    f"channel_prune: {key} is {getattr(self, key)!r}.", f"Choose one of {', '.join(known)}."
                )
        checks = {
            "ratio must be between 0 and 1": 0 < self.ratio < 1,
            "least must be between 0 and 1": 0 <= self.least <= 1,
            "rounds and images must be whole numbers, 1 or more": _whole(self.rounds, 1) and _whole(self.images, 1),
            "round_to and recover must be whole numbers, 0 or more": _whole(self.round_to) and _whole(self.recover),
            "max_damage must be 0 or more, in points": 0 <= self.max_damage < math.inf,
            "sparse must be 0 or more, in epochs": 0 <= self.sparse < math.inf,
            "widths must be whole numbers, 1 or more": all(_whole(width, 1) for _, width in self.widths),
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise BadConfig(f"channel_prune: {broken[0]}.")

    def apply(self, model: Any, job: Job) -> Any:
        """`model`, narrower, in eval mode, with batch norms re-estimated.

        Raises BadModel where the graph cannot be traced or has nothing to prune, BadConfig where `widths` or `keep`
        name what is not there, BadData where images are needed and missing.
        """
        from lighten.kit import channels

        bench = _Bench.of(model, job, self)
        if self.sparse:
            model = self._sparse(model, bench)
        first = channels.groups(model, bench.shape, bench.protect)
        known = {g.name: g for g in first}
        _named("channel group", [name for name, _ in self.widths], known)
        if not first:
            _nothing(bench.protect)
        for k in range(1, self.rounds + 1):
            before = copy.deepcopy(model) if self.max_damage else None
            model = self._round(model, known, k, bench)
            damage = bench.damage(model) if self.max_damage else 0.0
            if damage > self.max_damage:
                job.say(
                    f"Pruning stopped at round {k} of {self.rounds}: {damage:.2f} points lost, "
                    f"{self.max_damage:g} allowed; round {k - 1} is kept."
                )
                return before
        self._tell(model, first, bench)
        return model

    def _round(self, model: Any, first: Mapping[str, ChannelGroup], k: int, bench: _Bench) -> Any:
        """One part of the way: prune, batch norms, a little training."""
        from lighten.kit import channels
        from lighten.kit.norms import reestimate

        scorer = bench.scorer(model, k)
        now = channels.groups(model, bench.shape, bench.protect)
        part = k / self.rounds
        if self.widths:
            goal = dict(self.widths)
            wanted = toward(goal, [first[name] for name in goal], now, part, self._multiple(bench.job.device))
        else:
            ranked = channels.scores(model, bench.shape, scorer, bench.protect)
            step, ratio = self._multiple(bench.job.device), 1 - (1 - self.ratio) ** part
            originals = {name: g.channels for name, g in first.items()}
            wanted = narrowed(now, ranked, originals, ratio, self.scope, step, self.least)
        bench.job.progress(f"pruning, round {k} of {self.rounds}", k, self.rounds)
        channels.prune(model, bench.shape, wanted, scorer, bench.protect)
        reestimate(model, bench.batches())
        return self._recovered(model, k, bench) if self.recover else model

    def _multiple(self, device: Device) -> int:
        return self.round_to or device.channel_multiple

    def _recovered(self, model: Any, k: int, bench: _Bench) -> Any:
        train = bench.training("recover")
        return self._train(model, f"round {k}", self.recover / len(train), bench)

    def _sparse(self, model: Any, bench: _Bench) -> Any:
        from lighten.kit.channels import regularizer

        bench.training("sparse")
        push: list[Callable[[], None]] = []

        def before_step(training: Any) -> None:
            if not push:
                push.append(regularizer(training, bench.shape, bench.protect, SPARSE_REG))
            push[0]()

        return self._train(model, "sparse", self.sparse, bench, before_step)

    def _train(self, model: Any, part: str, epochs: float, bench: _Bench, before_step: Any = None) -> Any:
        """Learn from the original and the labels."""
        from lighten.kit.recover import Recovery, checkpoint_file, recover
        from lighten.plugins import task_of

        job = bench.job
        settings = Recovery(epochs=epochs, batch=min(128, len(bench.training(part))))
        file = checkpoint_file(job, f"channel_prune-{part.replace(' ', '')}", (self, settings), model)
        task = task_of(job)
        return recover(model, job.original, settings, job, task=task, checkpoint=file, before_step=before_step)

    def _tell(self, model: Any, first: Sequence[ChannelGroup], bench: _Bench) -> None:
        from lighten.kit import channels

        before = sum(g.channels for g in first)
        now = {g.name: g.channels for g in channels.groups(model, bench.shape, bench.protect)}
        after = sum(now.get(g.name, g.multiple) for g in first)
        if after == before:
            bench.job.say(
                f"channel_prune removed nothing: widths are rounded up to multiples of "
                f"{self._multiple(bench.job.device)}, and ratio {self.ratio:g} does not reach the next one."
            )

    @classmethod
    def proposals(cls, model: Any, device: Device) -> Iterable[Step]:
        """A few ratios; exact widths are for the search, which knows what they cost."""
        for ratio in (0.3, 0.5, 0.7):
            yield cls(ratio=ratio)


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _named(kind: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:20]
            raise BadConfig(f"channel_prune: there is no {kind} named {name!r}.", f"The nearest: {', '.join(near)}.")


def _nothing(protect: Sequence[str]) -> None:
    from lighten.errors import BadModel

    raise BadModel("The model has no channels that can be pruned.", f"Protected are: {', '.join(protect) or 'none'}.")


# --- how wide: pure -------------------------------------------------------------------------------


def unit(group: ChannelGroup, multiple: int) -> int:
    """What a group's width is a multiple of: its own, and the device's unless that leaves no choice."""
    both = math.lcm(group.multiple, multiple)
    return group.multiple if group.multiple > 1 and both >= group.channels else both


def rounded(group: ChannelGroup, width: float, multiple: int) -> int:
    """The smallest allowed width that is not below `width`, and never above what there is."""
    step = unit(group, multiple)
    return min(group.channels, max(1, math.ceil(width / step - 1e-9)) * step)


def narrowed(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Sequence[float]],
    originals: Mapping[str, int],
    ratio: float,
    scope: str,
    multiple: int,
    least: float,
) -> dict[str, int]:
    """Widths that remove `ratio` of the `originals` (channels by group before any pruning), by group.

    "local" takes the share from each group. "global" divides each group's scores by their mean, sorts all together, and
    removes the lowest until the share is reached; a group at its floor (`least` of its original, rounded) gives no more.
    """
    floors = {g.name: rounded(g, least * originals[g.name], multiple) for g in groups}
    if scope == "local":
        return {g.name: max(floors[g.name], rounded(g, (1 - ratio) * originals[g.name], multiple)) for g in groups}
    kept = {g.name: float(g.channels) for g in groups}
    gone = sum(originals[g.name] - g.channels for g in groups)
    target = ratio * sum(originals[g.name] for g in groups)
    sizes = {g.name: g.multiple for g in groups}
    for _, name in sorted((s, g.name) for g in groups for s in _relative(scores[g.name])):
        if gone >= target - 1e-9:
            break
        if kept[name] - sizes[name] >= floors[name]:
            kept[name] -= sizes[name]
            gone += sizes[name]
    return {g.name: rounded(g, kept[g.name], multiple) for g in groups}


def _relative(scores: Sequence[float]) -> list[float]:
    """Over their mean; all alike where they are all zero."""
    mean = sum(scores) / len(scores)
    return [s / mean for s in scores] if mean > 0 else [1.0] * len(scores)


def toward(
    goal: Mapping[str, int], first: Sequence[ChannelGroup], now: Sequence[ChannelGroup], part: float, multiple: int
) -> dict[str, int]:
    """Widths `part` of the way from the first ones to `goal`, in geometric steps; all the way they are exact."""
    if part >= 1:
        return dict(goal)
    current = {g.name: g for g in now}
    widths = {}
    for g in first:
        wanted = rounded(g, g.channels * (goal[g.name] / g.channels) ** part, multiple)
        widths[g.name] = max(goal[g.name], min(wanted, current[g.name].channels))
    return widths


# --- what a step works with -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """The images of one step, the layers that stay, and what the original answered."""

    job: Job
    step: Step
    shape: tuple[int, int, int]
    protect: tuple[str, ...]

    @classmethod
    def of(cls, model: Any, job: Job, step: Step) -> _Bench:
        from lighten.plugins import task_of

        if job.data.calibrate is None or not len(job.data.calibrate):
            raise BadData("channel_prune: there are no calibration images.", "Give some: batch norms need them.")
        names = [name for name, _ in model.named_modules() if name]
        _named("layer", step.keep, names)
        protect = (*task_of(job).protect(model), *step.keep)
        one = job.data.calibrate.take(1).inputs(job.preprocess)
        return cls(job, step, tuple(one.shape[1:]), protect)

    def batches(self) -> list[Any]:
        """Calibration inputs; the last batch takes what is left over, since one image alone has no variance."""
        import torch

        x = torch.from_numpy(self.job.data.calibrate.take(self.step.images).inputs(self.job.preprocess))
        return list(x.chunk(max(1, len(x) // BATCH)))

    def labelled(self) -> list[tuple[Any, Any]]:
        import torch

        x = self.batches()
        y = torch.from_numpy(self.job.data.calibrate.take(self.step.images).labels).long()
        return list(zip(x, y.split([len(part) for part in x])))

    def training(self, why: str) -> Any:
        if self.job.data.train is None or not len(self.job.data.train):
            raise BadConfig(f"channel_prune: {why} needs training images, and there are none.", f"Leave {why} at 0.")
        return self.job.data.train

    def scorer(self, model: Any, k: int) -> Callable[[Any], Any]:
        from lighten.kit.importance import LEARNED, scorer
        from lighten.plugins import task_of

        kind = self.step.importance
        batches = self.labelled() if kind in LEARNED else []
        return scorer(kind, model, batches, task_of(self.job).loss, self.job.seed + k)

    def damage(self, model: Any) -> float:
        """Points of top-1 lost on the calibrate split against the original."""
        from lighten.kit.infer import outputs
        from lighten.plugins import task_of

        split = self.job.data.calibrate
        before, after = (outputs(m, split, self.job.preprocess) for m in (self.job.original, model))
        return float(task_of(self.job).drop(before, after, split.labels).value)
