"""Which recipe next, which trial wins, what to advise: pure, no torch, no files, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lighten.types import (
    Advice,
    Budget,
    Device,
    Evidence,
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


def menu(formats: Iterable[str], precisions: Iterable[Precision], quantize: Step = QUANTIZE) -> tuple[Recipe, ...]:
    """Every format at every precision, quantized ones by the step `quantize`."""
    rows = [(f, p) for p in precisions for f in formats]
    return tuple(Recipe((quantize,) if p.quantized else (), p, f) for f, p in rows)


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
    rows += [_miss_advice(m) for m in misses]
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
    "min_shrink": ("Quantization alone shrinks by at most about 75 %.", "仅靠量化最多缩小约 75 %。"),
    "max_size_mb": ("Quantization alone shrinks by at most about 75 %.", "仅靠量化最多缩小约 75 %。"),
    "min_speedup": ("Choose a smaller input size or a smaller architecture.", "请减小输入尺寸，或换用更小的网络。"),
    "max_latency_ms": ("Choose a smaller input size or a smaller architecture.", "请减小输入尺寸，或换用更小的网络。"),
    "max_memory_mb": (
        "Choose a smaller input size; the runtime itself takes some 50 to 100 MB.",
        "请减小输入尺寸；运行库本身约占 50 到 100 MB。",
    ),
}


def _miss_advice(miss: Miss) -> Advice:
    en, zh = HINTS[miss.limit]
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
