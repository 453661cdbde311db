"""What the sensitivity of the layers says to a person: sentences that numbers support, in both languages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lighten.types import Advice, LayerCost

WORST = 3
"""How many layers are named, but never more than a third of all: accusing everybody helps nobody."""
EVEN = 2.0
"""The worst layers are guilty where their share of the damage is this many times that of any such number of layers."""
HARMLESS = 1e-3
"""Nats an image under which nobody is accused: by Pinsker's inequality the probabilities of an answer then move by
2 points in all, at most (total variation <= sqrt(KL / 2))."""


def guilty(costs: Iterable[LayerCost]) -> tuple[Advice, ...]:
    """For each precision of integers: the layers that do most of the damage, their share, and the price of sparing them.

    Nothing is said where a precision harms next to nothing, or of fewer than three layers. Rows that were not measured finite are left out.
    """
    rows = [row for row in costs if math.isfinite(row.damage)]
    found = []
    for pair in dict.fromkeys((row.weights, row.activations) for row in rows):
        mine = [row for row in rows if (row.weights, row.activations) == pair]
        if pair[0].startswith("int") and len(mine) >= 3 and sum(row.damage for row in mine) >= HARMLESS:
            found.append(_said(pair, mine, rows))
    return tuple(found)


def _said(pair: tuple[str, str], mine: Sequence[LayerCost], rows: Sequence[LayerCost]) -> Advice:
    total = sum(row.damage for row in mine)
    worst = sorted(mine, key=lambda row: -row.damage)[: min(WORST, len(mine) // 3)]
    share = sum(row.damage for row in worst) / total
    name = pair[0] if pair[0] == pair[1] else f"{pair[0]} ({pair[1]} activations)"
    name_zh = f"{pair[0]} " if pair[0] == pair[1] else f"{pair[0]}（激活 {pair[1]}）"
    if share < EVEN * len(worst) / len(mine):
        return Advice(
            f"With {name} no layer is much guiltier than the rest: the worst {len(worst)} of {len(mine)} do {share:.0%} "
            f"of the damage ({nats(total)} nats an image in all, each layer alone).",
            f"用 {name_zh}时没有哪一层特别有问题：{len(mine)} 层中最差的 {len(worst)} 层只占总损害的 {share:.0%}"
            f"（逐层单独相加，每张图片共 {nats(total)} nat）。",
        )
    listed = ", ".join(f"{row.layer} ({nats(row.damage)})" for row in worst)
    listed_zh = "、".join(f"{row.layer}（{nats(row.damage)}）" for row in worst)
    spared, spared_zh = _sparing(worst, rows)
    return Advice(
        f"With {name} the guilty layers are {listed}: {share:.0%} of {nats(total)} nats an image, each layer alone.{spared}",
        f"用 {name_zh}时，损害最大的层是 {listed_zh}：占每张图片 {nats(total)} nat（逐层单独相加）的 {share:.0%}。{spared_zh}",
    )


def _sparing(worst: Sequence[LayerCost], rows: Sequence[LayerCost]) -> tuple[str, str]:
    """What the next finer precision that was measured for all of them costs in bytes, and the damage it leaves."""
    finer = _finer(worst, rows)
    if finer is None:
        return "", ""
    name, more, left = finer
    en = f" Keeping {'it' if len(worst) == 1 else 'them'} at {name} costs {more} more and leaves {nats(left)} nats of theirs."
    return en, f"让这些层保持 {name} 会多占 {more}，它们的损害降到 {nats(left)} nat。"


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
