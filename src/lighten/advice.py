"""What was measured of layers, channels and predictions, said to a person: sentences that numbers support."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from lighten.types import Advice, ChannelGroup, Estimate, Evidence, LayerCost, Recipe, Size, Trial, WidthCost, level_ms

WORST = 3
"""How many layers are named, but never more than a third of all: accusing everybody helps nobody."""
EVEN = 2.0
"""The worst layers are guilty where their share of the damage is this many times that of any such number of layers."""
HARMLESS = 1e-3
"""Nats an image (of a detector, points of distance, for want of a better bound) under which nobody is accused: by Pinsker's inequality the probabilities of an answer then move by
2 points in all, at most (total variation <= sqrt(KL / 2))."""

WITHIN = 25.0
"""Percent of the measured value up to which a prediction is near enough that nobody need hear of it."""


Unit = tuple[str, str]
NATS: Unit = ("nats", "nat")
DISTANCE: Unit = ("points of distance", "距离")
"""What damage is counted in, in both languages: of a classifier, and of a detector's raw outputs."""


def unit_of(task: str) -> Unit:
    """What a task's damage is counted in."""
    return NATS if task == "classification" else DISTANCE


def guilty(costs: Iterable[LayerCost], unit: Unit = NATS) -> tuple[Advice, ...]:
    """For each precision of integers: the layers that do most of the damage, their share, and the price of sparing them.

    Nothing is said where a precision harms next to nothing, or of fewer than three layers. Rows that were not measured finite are left out.
    """
    rows = [row for row in costs if math.isfinite(row.damage)]
    found = []
    for pair in dict.fromkeys((row.weights, row.activations) for row in rows):
        mine = [row for row in rows if (row.weights, row.activations) == pair]
        if pair[0].startswith("int") and len(mine) >= 3 and sum(row.damage for row in mine) >= HARMLESS:
            found.append(_said(pair, mine, rows, unit))
    return tuple(found)


def _said(pair: tuple[str, str], mine: Sequence[LayerCost], rows: Sequence[LayerCost], unit: Unit) -> Advice:
    total = sum(row.damage for row in mine)
    worst = sorted(mine, key=lambda row: -row.damage)[: min(WORST, len(mine) // 3)]
    share = sum(row.damage for row in worst) / total
    name = pair[0] if pair[0] == pair[1] else f"{pair[0]} ({pair[1]} activations)"
    name_zh = f"{pair[0]} " if pair[0] == pair[1] else f"{pair[0]}（激活 {pair[1]}）"
    if share < EVEN * len(worst) / len(mine):
        return Advice(
            f"With {name} no layer is much guiltier than the rest: the worst {len(worst)} of {len(mine)} do {share:.0%} "
            f"of the damage ({nats(total)} {unit[0]} an image in all, each layer alone).",
            f"用 {name_zh}时没有哪一层特别有问题：{len(mine)} 层中最差的 {len(worst)} 层只占总损害的 {share:.0%}"
            f"（逐层单独相加，每张图片共 {nats(total)} {unit[1]}）。",
        )
    listed = ", ".join(f"{row.layer} ({nats(row.damage)})" for row in worst)
    listed_zh = "、".join(f"{row.layer}（{nats(row.damage)}）" for row in worst)
    spared, spared_zh = _sparing(worst, rows, unit)
    return Advice(
        f"With {name} the guilty layers are {listed}: {share:.0%} of {nats(total)} {unit[0]} an image, each layer alone.{spared}",
        f"用 {name_zh}时，损害最大的层是 {listed_zh}：占每张图片 {nats(total)} {unit[1]}（逐层单独相加）的 {share:.0%}。{spared_zh}",
    )


def _sparing(worst: Sequence[LayerCost], rows: Sequence[LayerCost], unit: Unit) -> tuple[str, str]:
    """What the next finer precision that was measured for all of them costs in bytes, and the damage it leaves."""
    finer = _finer(worst, rows)
    if finer is None:
        return "", ""
    name, more, left = finer
    en = f" Keeping {'it' if len(worst) == 1 else 'them'} at {name} costs {more} more and leaves {nats(left)} {unit[0]} of theirs."
    return en, f"让这些层保持 {name} 会多占 {more}，它们的损害降到 {nats(left)} {unit[1]}。"


def _finer(worst: Sequence[LayerCost], rows: Sequence[LayerCost]) -> tuple[str, str, float] | None:
    for name in ("int8", "float16", "float32"):
        better = [
            min(
                (r for r in rows if r.layer == w.layer and r.weights == name and r.bytes > w.bytes),
                key=lambda r: r.damage,
                default=None,
            )
            for w in worst
        ]
        kept = [row for row in better if row is not None]
        if len(kept) == len(worst):
            more = sum(row.bytes for row in kept) - sum(row.bytes for row in worst)
            return name, size(more), sum(row.damage for row in kept)
    return None


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1000 else f"{count} bytes"


def nats(value: float) -> str:
    """Two digits and no exponent: what is under a ten-thousandth is said to be so."""
    return "<0.0001" if 0 < value < 1e-4 else f"{value:.2g}"


# --- narrowing, predictions, zeros ------------------------------------------------------------------


def narrowing(
    groups: Sequence[ChannelGroup],
    widths: Iterable[WidthCost],
    winner: Recipe,
    trials: Sequence[Trial],
    unit: Unit = NATS,
) -> tuple[Advice, ...]:
    """The most sensitive channel group and the one that `winner` narrowed most, predictions that were far off, and what
    zeros did to the file. Each only where it was measured; `trials` hold the original as well."""
    return (*_channels(groups, widths, winner, unit), *_far_off(trials), *_zeros(trials))


def _channels(
    groups: Sequence[ChannelGroup], widths: Iterable[WidthCost], winner: Recipe, unit: Unit
) -> tuple[Advice, ...]:
    known = {g.name: g.channels for g in groups}
    kept = {name: w for name, w in _kept(winner).items() if name in known}
    alone: dict[str, WidthCost] = {}
    for row in sorted(widths, key=lambda r: r.width):  # the widest of a group stays
        if row.width < known.get(row.group, 0) and math.isfinite(row.damage):
            alone[row.group] = row
    if not kept or not alone:
        return ()
    # Per step of 1 / share kept, so that widths which were rounded otherwise compare.
    worst = max(alone.values(), key=lambda r: r.damage / (known[r.group] / r.width - 1))
    least = min(kept, key=lambda name: kept[name] / known[name])
    en, zh = _left(worst.group, known, kept)
    there = alone.get(least)
    at = f"; alone at {there.width} it moved the answers by {nats(there.damage)}" if there else ""
    at_zh = f"，单独保留 {there.width} 个时损害 {nats(there.damage)} {unit[1]}" if there else ""
    total = known[worst.group]
    return (
        Advice(
            f"The most sensitive channels are those of {worst.group}: {nats(worst.damage)} {unit[0]} an image at {worst.width} of "
            f"{total}; {en}. Narrowed most was {least}, {known[least]} to {kept[least]}{at}.",
            f"最敏感的通道组是 {worst.group}：{total} 个通道保留 {worst.width} 个时每张图片损害 {nats(worst.damage)} {unit[1]}，{zh}。"
            f"变窄最多的是 {least}：从 {known[least]} 到 {kept[least]}{at_zh}。",
        ),
    )


def _left(name: str, known: Mapping[str, int], kept: Mapping[str, int]) -> tuple[str, str]:
    if kept.get(name, known[name]) >= known[name]:
        return "the winner leaves them whole", "胜出方案没有动它"
    return f"the winner keeps {kept[name]}", f"胜出方案保留 {kept[name]} 个"


def _kept(recipe: Recipe) -> dict[str, int]:
    """Channels by group, from the settings of the steps that name them."""
    found = [dict(step.settings).get("widths") or () for step in recipe.steps if step.method == "channel_prune"]
    return {str(name): int(width) for pairs in found for name, width in dict(pairs).items()}


def _far_off(trials: Sequence[Trial]) -> tuple[Advice, ...]:
    base = next((t.evidence for t in trials if t.evidence and not t.recipe.steps and not t.predicted), None)
    rows = [(abs(p / m - 1), t, what, p, m) for t in trials for what, p, m in _foreseen(t, base) if m > 0]
    far = [row for row in rows if 100 * row[0] > WITHIN]
    if not far:
        return ()
    _, trial, what, predicted, measured = max(far, key=lambda row: row[0])
    names = {"size": ("its size", "大小", "MB"), "latency": ("its latency", "延迟", "ms")}
    name, name_zh, unit = names[what]
    return (
        Advice(
            f"{len(far)} of {len(rows)} predictions were off by more than {WITHIN:.0f} %. Furthest was {trial.recipe.title}: "
            f"{name} was predicted as {predicted:.3g} {unit} and measured as {measured:.3g} {unit}. Go by what was measured.",
            f"{len(rows)} 个预测中有 {len(far)} 个误差超过 {WITHIN:.0f}%。偏差最大的是 {trial.recipe.title}："
            f"{name_zh}预测为 {predicted:.3g} {unit}，实测 {measured:.3g} {unit}。请以实测为准。",
        ),
    )


def _foreseen(trial: Trial, base: Evidence | None) -> list[tuple[str, float, float]]:
    """What was predicted (MB, ms) beside what was measured, on the original's clock where it is known."""
    p, got = trial.predicted, trial.evidence
    if p is None or got is None:
        return []
    took = level_ms(got, base) if base else got.p50(1)
    time = [] if p.latency_ms is None else [("latency", p.latency_ms, took)]
    return [("size", p.bytes / 1e6, got.size.mb), *time]


def _zeros(trials: Sequence[Trial]) -> tuple[Advice, ...]:
    """Of the sparsified file with most zeros; beside the same recipe without the step, where that was measured."""
    sparse = [(t, t.evidence) for t in trials if t.evidence and any(s.method == "sparsify" for s in t.recipe.steps)]
    if not sparse:
        return ()
    trial, got = max(sparse, key=lambda row: _zero_share(row[1].size))
    share, en, zh = _zero_share(got.size), "", ""
    if (twin := _dense_twin(trial.recipe, trials)) is not None:
        en = f" Without that step the file takes {size(twin.size.bytes)}, {size(twin.size.gzip_bytes)} after gzip."
        zh = f"不做这一步时文件为 {size(twin.size.bytes)}，gzip 后 {size(twin.size.gzip_bytes)}。"
    return (
        Advice(
            f"{trial.recipe.title} stores {share:.0%} zeros and takes {size(got.size.bytes)}, {size(got.size.gzip_bytes)} after "
            f"gzip.{en} A zero takes as many bytes in the file as any other value; to shrink the file itself, narrow the "
            "network or lower its bits.",
            f"{trial.recipe.title} 的权重中有 {share:.0%} 是零，文件为 {size(got.size.bytes)}，gzip 后 {size(got.size.gzip_bytes)}。"
            f"{zh}零在文件里与其他数值占用同样多的字节；要缩小文件本身，请减少通道或降低位数。",
        ),
    )


def _zero_share(stored: Size) -> float:
    values = sum(math.prod(w.shape) for w in stored.weights)
    return sum(w.zeros * math.prod(w.shape) for w in stored.weights) / values if values else 0.0


def _dense_twin(recipe: Recipe, trials: Iterable[Trial]) -> Evidence | None:
    """The same recipe without zeros."""
    steps = tuple(s for s in recipe.steps if s.method != "sparsify")
    wanted = dataclasses.replace(recipe, steps=steps)
    return next((t.evidence for t in trials if t.evidence and t.recipe == wanted), None)


SEEN = 4.0
"""Standard errors by which the original must do better on the select images than on the report images."""


def seen_before(select: Estimate, report: Estimate) -> tuple[Advice, ...]:
    """Where the original knows the select images too well: it was probably trained on them, and everything that was
    trained anew looks worse beside it than it is."""
    error = math.hypot(select.error, report.error)
    if select.value - report.value <= SEEN * error:
        return ()
    return (
        Advice(
            f"The original gets {select.value:.1f} % on the select images but only {report.value:.1f} % on the report "
            "images: it was probably trained on the former, so drops measured there look larger than they are. Name the "
            "images that it was not trained on with --held-out.",
            f"原模型在选择集上为 {select.value:.1f} %，在报告集上只有 {report.value:.1f} %：它很可能用选择集的图片训练过，"
            "因此在那里测得的精度下降偏大。请用 --held-out 指出它没有训练过的图片。",
        ),
    )
