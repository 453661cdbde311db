"""Small data first: what narrowing each channel group costs, and what the layers take in each runtime. Measures only."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lighten import cost
from lighten.errors import RefusedFormat
from lighten.plugins import task_of
from lighten.search.widths import Costs, bits_harm, harms, layer_bytes, steps_of
from lighten.types import ChannelGroup, Evidence, Job, LayerCost, LayerShape, Trial, WidthCost, level_ms
from lighten.workshop import input_shape

IMAGES, NORM_IMAGES = 256, 128
"""Calibration images that a narrowed network answers, and of those how many its batch norms are re-estimated on."""
SHARES = (0.5, 0.25)
"""Shares of its channels that each group is measured at."""
INT8, INT4 = ("int8", "int8"), ("int4", "int8")
SCAN_SHARE, TIMES_SHARE = 0.12, 0.05
"""Of the time that is left, how much all of this may take, and how much of that timing layers alone."""


@dataclass(frozen=True)
class Scouted:
    """The network's layers and channel groups; what each group costs when it is narrowed and each layer at fewer bits,
    alone; and per format what the layers take. The `ends` keep 8 bits."""

    shapes: Mapping[str, LayerShape]
    groups: tuple[ChannelGroup, ...]
    widths: tuple[WidthCost, ...]
    bits: tuple[LayerCost, ...]
    times: Mapping[str, cost.CostModel]
    ends: tuple[str, ...] = ()


Keep = Callable[[str, Any], None]
"""Told each new row at once, with its kind in the ledger ("width", "cost")."""


def unkept(kind: str, row: Any) -> None:
    """The callback of those who keep nothing."""


Enough = Callable[[], bool]
"""Asked after each row: whether measuring has to end here, with what there is."""


def never() -> bool:
    """For those who have time."""
    return False


Share = Callable[[float], Enough]
"""From a share of the time that is left now, to what says when it is spent."""


def unlimited(part: float) -> Enough:
    """For those whom nobody limits."""
    return never


class _Stopped(Exception):
    """Enough was measured."""


def scout(
    job: Job,
    formats: Sequence[str],
    *,
    bits: bool = True,
    widths: Iterable[WidthCost] = (),
    costs: Iterable[LayerCost] = (),
    keep: Keep = unkept,
    share: Share = unlimited,
) -> Scouted:
    """Everything that planning widths and bits needs, from some hundred images and single layers.

    Rows of `widths` and `costs` are known already. Without `bits`, or where SCAN_SHARE of the time is spent before,
    4-bit weights are not measured; a group that was not measured counts as the mean of the others. Raises BadModel where
    the dependency graph cannot be traced, RefusedFormat where no format's layers can be timed.
    """
    from lighten.kit import channels

    enough = share(SCAN_SHARE)
    shape = input_shape(job)
    protect = task_of(job).protect(job.original)
    shapes = channels.shapes(job.original, shape)
    groups = channels.groups(job.original, shape, protect)
    times = layer_times(job, tuple(shapes.values()), formats, share)
    narrow = width_costs(job, groups, protect, widths, lambda row: keep("width", row), enough)
    fewer = bit_costs(job, costs, lambda row: keep("cost", row), enough) if bits and not enough() else tuple(costs)
    return Scouted(shapes, groups, narrow, fewer, times, ends_of(job))


def layer_times(
    job: Job, shapes: Sequence[LayerShape], formats: Sequence[str], share: Share = unlimited
) -> dict[str, cost.CostModel]:
    """What the layers take in each format, each in an equal part of TIMES_SHARE of the time that is left.

    A format whose runtime takes no file of a single layer borrows the times of the first one that does, until whole
    files say how it compares. Raises RefusedFormat where none does.
    """
    found, refused = dict[str, cost.CostModel](), list[RefusedFormat]()
    for f in formats:
        enough = share(TIMES_SHARE / len(formats))
        try:
            found[f] = cost.measure(shapes, INT8, f, job.device, progress=job.progress, enough=enough)
        except RefusedFormat as e:
            refused.append(e)
    if not found:
        raise refused[0]
    return {f: found[f] if f in found else cost.borrowed(next(iter(found.values())), f) for f in formats}


def bit_costs(
    job: Job,
    known: Iterable[LayerCost] = (),
    made: Callable[[LayerCost], None] = lambda row: None,
    enough: Enough = never,
) -> tuple[LayerCost, ...]:
    """Each layer alone with 8-bit and with 4-bit weights."""
    from lighten.quant import sensitivity

    sample = job.data.calibrate.take(NORM_IMAGES)
    rows = list(known)

    def keep(row: LayerCost) -> None:
        rows.append(row)
        made(row)
        if enough():
            raise _Stopped

    with contextlib.suppress(_Stopped):
        sensitivity.scan(
            job.original,
            input_shape(job),
            [_tensor(x) for x in sample.batches(job.preprocess, 32)],
            job.device,
            (INT8, INT4),
            damage=task_of(job).damage,
            labels=_tensor(sample.labels) if job.head is None else None,
            known=known,
            made=keep,
            step=lambda done, total: job.progress("what each layer costs at 4 bits", done, total),
        )
    return tuple(rows)


def width_costs(
    job: Job,
    groups: Sequence[ChannelGroup],
    protect: Sequence[str],
    known: Iterable[WidthCost] = (),
    made: Callable[[WidthCost], None] = lambda row: None,
    enough: Enough = never,
) -> tuple[WidthCost, ...]:
    """Each group alone at each of SHARES: least important channels gone, batch norms re-estimated, nothing trained.

    All groups at the first share come before any at the second, so that what is cut short still knows every group.
    """
    done = {row.key: row for row in known}
    ladders = [(g, measured_widths(g, job.device.channel_multiple)) for g in groups]
    wanted = [(g, ws[k]) for k in range(len(SHARES)) for g, ws in ladders if k < len(ws)]
    sample = job.data.calibrate.take(IMAGES)
    x = _tensor(sample.inputs(job.preprocess))
    before = _outputs(job.original, x)
    for k, (group, width) in enumerate(wanted):
        job.progress("what each channel group costs", k, len(wanted))
        if (group.name, width) not in done:
            row = _cost(job, group, width, protect, x, before, sample.labels)
            done[row.key] = row
            made(row)
        if enough():
            break
    job.progress("what each channel group costs", len(wanted), len(wanted))
    return tuple(done[g.name, w] for g, w in wanted if (g.name, w) in done)


def measured_widths(group: ChannelGroup, multiple: int) -> tuple[int, ...]:
    """The widths nearest to SHARES among those the group may have; none where it cannot be narrowed."""
    steps = steps_of(group, multiple)[1:]
    near = [min(steps, key=lambda w: abs(w - share * group.channels)) for share in SHARES if steps]
    return tuple(dict.fromkeys(near))


def _cost(
    job: Job, group: ChannelGroup, width: int, protect: Sequence[str], x: Any, before: np.ndarray, labels: np.ndarray
) -> WidthCost:
    from lighten.kit import channels, importance, norms

    model = copy.deepcopy(job.original)
    channels.prune(model, input_shape(job), {group.name: width}, importance.scorer("l2", model), protect)
    norms.reestimate(model, x[:NORM_IMAGES].split(64))
    after = _outputs(model, x)
    task = task_of(job)
    return WidthCost(group.name, width, damage(task, before, after), task.drop(before, after, labels))


def damage(task: Any, before: np.ndarray, after: np.ndarray) -> float:
    """Mean distance of the answers `after` from those `before`, as the task measures it; infinite where one is not finite."""
    value = float(task.damage(_tensor(before), _tensor(after)).mean())
    return value if math.isfinite(value) else math.inf


def _outputs(model: Any, x: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return np.concatenate([model(part).float().numpy() for part in x.split(64)])


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


# --- from what was measured to what planning reads ----------------------------------------------------


def costs(found: Scouted, format: str, trials: Iterable[Trial], job: Job, base: Evidence) -> Costs:
    """What planning needs for one format: layer times held to every int8 file that was measured whole (beside the
    original's, `base`), and what those files hold beside their layers."""
    seen = [t for t in trials if t.evidence and t.recipe.format == format and t.recipe.precision.weights == "int8"]
    networks = [(t.network or tuple(found.shapes.values()), t) for t in seen]
    model = cost.calibrated(found.times[format], [(n, level_ms(_evidence(t), base)) for n, t in networks])
    spare = [_evidence(t).size.bytes - _bytes(n, t) for n, t in networks]
    return Costs(
        found.shapes,
        found.groups,
        harms(found.widths, found.groups),
        lambda s: cost.predict(model, (s,)) - model.call_ms,
        model.call_ms,
        max(spare, default=0.0),
        bits={n: d for n, d in bits_harm(found.bits).items() if n in found.shapes and n not in found.ends},
        multiple=job.device.channel_multiple,
    )


def _bytes(network: Iterable[LayerShape], trial: Trial) -> float:
    four = {name for name, weights, _ in trial.recipe.precision.exceptions if weights == "int4"}
    return sum(layer_bytes(s, 4 if s.name in four else 8) for s in network)


def groups_of(job: Job) -> tuple[ChannelGroup, ...]:
    """The channel groups of the original."""
    from lighten.kit import channels

    return channels.groups(job.original, input_shape(job), task_of(job).protect(job.original))


def ends_of(job: Job) -> tuple[str, ...]:
    """The first layer and those that give the answer, which keep 8 bits."""
    from lighten.quant.static import ends

    found = ends(job.original, input_shape(job))
    if job.head is None:
        return found
    return tuple(dict.fromkeys((*found[:1], *task_of(job).protect(job.original))))


def _evidence(trial: Trial) -> Evidence:
    assert trial.evidence is not None
    return trial.evidence
