"""Which recipe next, which trial wins, what to advise: pure, no torch, no files, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from lighten.types import (
    Advice,
    Asked,
    Budget,
    Device,
    Evidence,
    LayerCost,
    Miss,
    Precision,
    Recipe,
    Step,
    Trial,
    shrink,
    speedup,
)

SLOWER = 1.05
"""A file counts as slower than another from this ratio of medians on; less is the noise of a shared machine."""


QUANTIZE = Step("quantize")


def menu(
    formats: Iterable[str], precisions: Iterable[Precision], quantize: Step = QUANTIZE, steps: tuple[Step, ...] = ()
) -> tuple[Recipe, ...]:
    """Every format at every precision, after `steps`, quantized ones by the step `quantize`."""
    formats = tuple(formats)
    rows = [(f, p) for p in precisions for f in formats]
    return tuple(Recipe((*steps, quantize) if p.quantized else steps, p, f) for f, p in rows)


MOST_SHRINK = {"float32": 0.0, "float16": 51.0}
"""Percent of the bytes that a precision can take off at most: its weights, and nothing added."""


def worth_a_trial(precisions: Iterable[Precision], budget: Budget, base: Evidence) -> tuple[Precision, ...]:
    """Without the floats that cannot meet the limits on size, whatever their file looks like."""
    wanted = [budget.min_shrink or 0.0]
    wanted += [100 * (1 - budget.max_size_mb * 1e6 / base.size.bytes)] if budget.max_size_mb else []
    return tuple(p for p in precisions if MOST_SHRINK.get(p.weights, 100.0) >= max(wanted))


GUILTY = 0.9


def sensitive_ends(costs: Iterable[LayerCost]) -> tuple[str, ...]:
    """Of the layers that end a detector's head, the fewest that do GUILTY of the damage that 8 bits do to each alone, as
    measured; none where nothing does any."""
    rows = sorted((r for r in costs if (r.weights, r.activations) == ("int8", "int8")), key=lambda r: -r.damage)
    total, found = sum(r.damage for r in rows), list[str]()
    for row in rows:
        if total <= 0 or sum(r.damage for r in rows[: len(found)]) >= GUILTY * total:
            break
        found.append(row.layer)
    return tuple(sorted(found))


def sparing(precision: Precision, layers: Iterable[str]) -> Precision:
    """`precision` with some layers left in float32."""
    return dataclasses.replace(precision, exceptions=tuple(sorted((name, "float32", "float32") for name in layers)))


BITS = {
    "w8a8": Precision("int8", "int8"),
    "w4a8": Precision("int4", "int8"),
    "w4a4": Precision("int4", "int4"),
    "w8": Precision("int8", "float32"),
    "w4": Precision("int4", "float32"),
    "mixed": Precision("int4", "int8"),
}
WAYS = {
    "ptq": ("w8a8", "w4a8", "w4a4", "mixed"),
    "qat": ("w8a8", "w4a8", "w4a4"),
    "dynamic": ("w8",),
    "weight-only": ("w8", "w4"),
}
"""Each method of `lighten quantize` and the bits it can give; dynamic has 8-bit activations, chosen at run time."""


def cannot(asked: Asked) -> str | None:
    """Why a method cannot give the bits, or None."""
    if asked.method not in WAYS:
        return f"There is no method {asked.method!r}; choose one of {', '.join(WAYS)}."
    if asked.bits not in WAYS[asked.method]:
        return f"Method {asked.method} cannot give bits {asked.bits!r}; it gives {', '.join(WAYS[asked.method])}."
    return None


def uniform(asked: Asked, ends: Iterable[str]) -> Precision:
    """The same bits for every layer; below 8, the first and the last layer (`ends`) keep 8."""
    wanted = BITS[asked.bits]
    activations = "dynamic" if asked.method == "dynamic" else wanted.activations
    if wanted.weights != "int4":
        return Precision(wanted.weights, activations)
    spared = "int8" if activations in ("int8", "int4") else activations
    return Precision(wanted.weights, activations, tuple(sorted((name, "int8", spared) for name in ends)))


def asked_menu(formats: Iterable[str], asked: Asked, precisions: Iterable[Precision]) -> tuple[Recipe, ...]:
    """Every format at every one of the `precisions`, by the method that was asked for."""
    step = Step("qat" if asked.method == "qat" else "quantize", asked.settings)
    return tuple(Recipe((step,), p, f) for p in precisions for f in formats)


def next_recipe(recipes: Sequence[Recipe], done: Iterable[Trial]) -> Recipe | None:
    """The first that was not tried."""
    tried = {t.id for t in done}
    return next((r for r in recipes if r.id not in tried), None)


def judge(trials: Sequence[Trial], baseline: Trial, budget: Budget, same_machine: bool = True) -> Trial:
    """The winner: inside the budget, within one standard error of the best, then the simplest, then not slower than
    the original, then the smallest. Where nothing is inside the budget, the nearest. The original wins only where it is
    among `trials`, or nothing else was measured.

    `same_machine` is False where times were not taken on the kind of processor that is the target.
    """
    base = _evidence(baseline)
    good = [t for t in trials if t.evidence is not None] or [baseline]
    inside = [t for t in good if not budget.misses(_evidence(t), base)]
    if not inside:
        return min(good, key=lambda t: (distance(budget.misses(_evidence(t), base)), _evidence(t).size.bytes))
    best = max(inside, key=lambda t: _evidence(t).metric.value)
    allowed = max(_evidence(best).metric.error, 1e-9)
    equals = [t for t in inside if _evidence(best).metric.value - _evidence(t).metric.value <= allowed]

    def order(t: Trial) -> tuple[int, bool, int, float]:
        slow = same_machine and speedup(_evidence(t), base) < 1 / SLOWER
        return t.recipe.complexity, slow, _evidence(t).size.bytes, _evidence(t).p50(1)

    return min(equals, key=order)


def distance(misses: Iterable[Miss]) -> float:
    """How far outside the budget, each limit relative to its own size."""
    return sum(abs(m.got - m.wanted) / max(abs(m.wanted), 1e-9) for m in misses)


def advise(
    trials: Sequence[Trial], baseline: Trial, device: Device, same_machine: bool, misses: Sequence[Miss]
) -> tuple[Advice, ...]:
    """What the measurements say beyond the verdict."""
    rows: list[Advice] = []
    if not same_machine:
        rows.append(
            Advice(
                f"Times were measured on this machine, not on {device.title}: run `lighten bench` with the bundle there.",
                f"耗时是在本机测得的，不是在{device.title_zh}上：请在设备上对交付包运行 `lighten bench`。",
            )
        )
    rows += [a for t in trials if same_machine and (a := _slow_advice(t, trials))]
    for t in trials:
        if t.failure:
            rows.append(
                Advice(
                    f"{t.recipe.title} failed while it was {t.failure.stage}: {t.failure.reason}",
                    f"{t.recipe.title} 失败（{t.failure.stage}）：{t.failure.reason}",
                )
            )
    narrowed = any(step.method == "channel_prune" for t in trials for step in t.recipe.steps)
    rows += [_miss_advice(m, narrowed) for m in misses]
    return tuple(rows)


def _slow_advice(trial: Trial, trials: Sequence[Trial]) -> Advice | None:
    """A quantized file that is not faster than the float file of its own format."""
    if not trial.evidence or trial.recipe.precision.weights == "float32":
        return None
    plain = next(
        (
            t.evidence
            for t in trials
            if t.evidence
            and t.recipe.format == trial.recipe.format
            and t.recipe.precision.weights == "float32"
            and not t.recipe.steps
        ),
        None,
    )
    if plain is None or trial.evidence.p50(1) < plain.p50(1):
        return None
    times = f"{trial.evidence.p50(1):.2f} ms / {plain.p50(1):.2f} ms"
    return Advice(
        f"{trial.recipe.title} is not faster than float32 on this machine ({times}): use it for its size, not for speed.",
        f"{trial.recipe.title} 在本机并不比 float32 快（{times}）：它只省体积，不提速。",
    )


HINTS = {
    "max_drop": (
        "Give more calibration images of the kind the device will see, or allow a larger drop.",
        "请提供更多与实际场景相近的校准图片，或放宽精度下降的上限。",
    ),
    "min_shrink": (
        "INT8 shrinks by about 75 %, 4-bit weights by about 87 %: lighten quantize --bits w4a8, or mixed.",
        "INT8 约缩小 75 %，4 位权重约缩小 87 %：lighten quantize --bits w4a8 或 mixed。",
    ),
    "max_size_mb": (
        "INT8 shrinks by about 75 %, 4-bit weights by about 87 %: lighten quantize --bits w4a8, or mixed.",
        "INT8 约缩小 75 %，4 位权重约缩小 87 %：lighten quantize --bits w4a8 或 mixed。",
    ),
    "min_speedup": ("Choose a smaller input size or a smaller architecture.", "请减小输入尺寸，或换用更小的网络。"),
    "max_latency_ms": ("Choose a smaller input size or a smaller architecture.", "请减小输入尺寸，或换用更小的网络。"),
    "max_memory_mb": (
        "Choose a smaller input size; the runtime itself takes some 50 to 100 MB.",
        "请减小输入尺寸；运行库本身约占 50 到 100 MB。",
    ),
}


NEXT = {
    ("ptq", "w8a8"): (
        "Try --ranges reconstruction, then --method qat.",
        "可先试 --ranges reconstruction，再试 --method qat。",
    ),
    ("ptq", "w4a8"): (
        "Try --bits mixed, which keeps the guilty layers at 8 bits, more --iterations, or --method qat.",
        "可试 --bits mixed（让问题层保持 8 位）、增大 --iterations，或 --method qat。",
    ),
    ("ptq", "w4a4"): (
        "4-bit activations usually need training: --method qat.",
        "4 位激活通常需要训练：--method qat。",
    ),
    ("ptq", "mixed"): ("Allow more bytes, or try --method qat.", "放宽体积上限，或试 --method qat。"),
    ("qat", ""): ("Train longer (--epochs), or use more bits.", "训练更久（--epochs），或用更多位。"),
    ("weight-only", "w4"): ("Try --block 32, or --bits w8.", "可试 --block 32，或 --bits w8。"),
}
"""What to try where accuracy was lost, by method and bits (or for a method with any bits)."""


def next_step(asked: Asked | None, misses: Iterable[Miss]) -> tuple[Advice, ...]:
    """What to try next where one way to quantize lost more accuracy than allowed."""
    if asked is None or not any(m.limit == "max_drop" for m in misses):
        return ()
    found = NEXT.get((asked.method, asked.bits)) or NEXT.get((asked.method, ""))
    return (Advice(*found),) if found else ()


NARROWED = {
    "max_drop": (
        "Give it more time (--time), or allow a larger drop or a larger file.",
        "请给更多时间（--time），或放宽精度下降、体积的上限。",
    ),
    **dict.fromkeys(
        ("min_shrink", "max_size_mb", "min_speedup", "max_latency_ms"),
        (
            "Channels were removed already: ask for a little more than you need, for one format (--formats), or give it "
            "more time.",
            "通道已经剪过：请把要求略微提高一点，或只要一种格式（--formats），或给更多时间。",
        ),
    ),
}
"""Hints where the search has pruned already."""


def _miss_advice(miss: Miss, narrowed: bool) -> Advice:
    en, zh = (NARROWED if narrowed else HINTS).get(miss.limit) or HINTS[miss.limit]
    by = abs(miss.got - miss.wanted)
    return Advice(f"{miss.limit} is missed by {by:.3g}{miss.unit}. {en}", f"{miss.limit} 差 {by:.3g}{miss.unit}。{zh}")


def pareto(trials: Iterable[Trial]) -> tuple[str, ...]:
    """Ids of the trials that no other beats in accuracy, bytes and latency at once."""
    rows = [(t.id, t.evidence) for t in trials if t.evidence]
    return tuple(name for name, e in rows if not any(_beats(o, e) for _, o in rows))


def _beats(a: Evidence, b: Evidence) -> bool:
    ours = (-a.metric.value, a.size.bytes, a.p50(1))
    theirs = (-b.metric.value, b.size.bytes, b.p50(1))
    return all(x <= y for x, y in zip(ours, theirs)) and ours != theirs


def summary(winner: Trial, baseline: Trial) -> tuple[float, float]:
    """Shrink in percent and speed-up of the winner."""
    return shrink(_evidence(winner), _evidence(baseline)), speedup(_evidence(winner), _evidence(baseline))


def _evidence(trial: Trial) -> Evidence:
    assert trial.evidence is not None
    return trial.evidence
