"""How a budget is reached that quantization alone misses: probes first, then the training that the time allows. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lighten.search.widths import Costs, Limits, Plan, even, fitted, predict
from lighten.types import Budget, Evidence, Precision, Predicted, Recipe, Step, Trial, level_ms

ROOM, TIME_ROOM = 0.97, 0.9
"""Shares of the limits that are planned for, of time the product: what is predicted is not what is measured, and a time
is never measured twice alike."""
PLANS, REPLANS = 2, 3
"""Plans that are probed at once, and how often they are made anew after probes that broke a limit."""
PROBE_SHARE, PROBE_EPOCHS = 0.04, 1.0
"""A probe trains for this share of the time given, and never longer than this."""
EPOCHS, MOST_EPOCHS = 10.0, 60.0
"""Passes over the training images of the long training: without a limit on time, and with one."""
AGAIN = 2
"""Without a limit on time, how often a training that missed the allowed drop is repeated with twice the epochs."""
TIGHTER, MOST_TIGHTER = 0.95, 20
"""How limits are tightened that the unchanged network is wrongly expected to keep, and how often."""
LEAST_TRAINING_S = 5.0
MOST_EXTRA, EXTRA_SHARE = 3, 0.05
"""How many formats get a file of a probe's network that was made for another one, and the share of the time left for
training that these files may take: so that no format's times are held to unchanged networks alone."""
SACRIFICE = 1.0
"""Points of the metric by which a probe that keeps the limits in every format that was asked for may lie behind the best."""
ROOMY = 0.85
"""A plan whose file takes less than this share of a limit went too far, where one that broke it answers far better."""
PROBE_LR, LONG_LR = 0.02, 0.05
"""Peaks of the learning rate: a short training must not leave what is there, a long one may go further."""
NARROW = "channel_prune"


@dataclass(frozen=True)
class Tighter:
    """Shares of the limits on bytes and ms that are planned for, after files that were not as predicted."""

    bytes: float = 1.0
    ms: float = 1.0


@dataclass(frozen=True)
class Means:
    """What narrowing may use: costs for each format (planned for its own runtime), the ends that keep 8 bits, and
    how much of the time is left. `tail_s` is what has to happen after the last training, `file_s` what of it one file
    takes by its format. `asked` are the formats that the user named: the limits are to be kept in each of them, where
    nobody named any in one. `once` says whether one answer of the teacher to an image serves every view of it in the long
    training: of a detector it does not, whose boxes move with the view."""

    costs: dict[str, Costs]
    formats: tuple[str, ...]
    baseline: Trial
    budget: Budget
    ends: tuple[str, ...] = ()
    left_s: float | None = None
    tail_s: float = 0.0
    file_s: Mapping[str, float] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    once: bool = True


def goal(budget: Budget, base: Evidence, room: float = ROOM, time_room: float = TIME_ROOM) -> Limits:
    """The budget's limits on size and time in bytes and ms, with some room."""
    sizes = [budget.max_size_mb * 1e6] if budget.max_size_mb else []
    sizes += [base.size.bytes * (1 - budget.min_shrink / 100)] if budget.min_shrink else []
    times = [budget.max_latency_ms] if budget.max_latency_ms else []
    times += [base.p50(1) / budget.min_speedup] if budget.min_speedup else []
    return Limits(min(sizes) * room if sizes else None, min(times) * room * time_room if times else None)


def needed(trials: Iterable[Trial], baseline: Trial, budget: Budget) -> bool:
    """Whether no file is inside the budget yet, and one of its limits is on size or time, which narrowing can mend."""
    base = _evidence(baseline)
    limits = goal(budget, base)
    if limits.bytes is None and limits.latency_ms is None:
        return False
    return not any(t.evidence and not budget.misses(t.evidence, base) for t in trials)


def next_recipes(means: Means, done: Sequence[Trial]) -> tuple[Recipe, ...]:
    """The recipes to try next, one plan in one format or in all; none where the budget is met, or time is up.

    Probes are short trials of whole recipes (prune, train a little, quantize, measure the file), so that size and time
    are known before the long training, which only the best of them gets (one round of successive halving; Jamieson &
    Talwalkar, 2016). Where every probe broke a limit, or a far better one did than those that keep them all, widths are
    planned anew for tighter limits.
    Before the long training the best probe's network is written in the other formats too (`extra_files`), and where one
    that was asked for breaks a limit with it, widths are planned anew for that one, once.
    """
    probes = [t for t in done if is_probe(t.recipe)]
    long = [t for t in done if training_of(t.recipe) and not is_probe(t.recipe)]
    if long:
        return _again(means, long)
    if not probes:
        return _probes(means, Tighter(), _fastest(means))
    measured = [t for t in probes if t.evidence]
    inside = [t for t in measured if not _cost_misses(means, _evidence(t))]
    may_plan = bool(measured) and len(probes) <= PLANS * REPLANS
    if not inside:
        return _anew(means, measured[-PLANS:], probes) if may_plan else ()
    better = _better_outside(inside, probes)
    if better and may_plan and (again := _anew(means, [better], probes)):
        return again
    if may_plan and (ends := _bracket(means, inside, probes)) and (again := _between(means, *ends, probes)):
        return again
    return extra_files(means, _best(inside), probes) or _decided(means, inside, probes)


def _better_outside(inside: Sequence[Trial], probes: Sequence[Trial]) -> Trial | None:
    """A probe that broke a limit and answers far better than all that keep them: something between them is worth a try.
    None where a plan made after it keeps them, or once the best was written in more than one format, which decides."""
    kept = {plan_of(t.recipe) for t in inside}
    outside = [t for t in probes if t.evidence and plan_of(t.recipe) not in kept]
    if not outside or _has_extra(probes):
        return None
    best = _best(outside)
    if any(t in inside for t in probes[probes.index(best) + PLANS :]):
        return None
    return best if _evidence(best).metric.value - _evidence(_best(inside)).metric.value > SACRIFICE else None


def _bracket(means: Means, inside: Sequence[Trial], probes: Sequence[Trial]) -> tuple[Trial, Trial] | None:
    """A probe that broke a limit and the one plan made after it that keeps them, where that went too far: it leaves much
    of what the other broke unused and answers far worse."""
    outside = [t for t in probes if t.evidence and t not in inside]
    if not outside or _has_extra(probes):
        return None
    best = _best(outside)
    after = [t for t in probes[probes.index(best) + PLANS :] if t in inside]
    if len(after) != 1 or _evidence(best).metric.value - _evidence(after[0]).metric.value <= SACRIFICE:
        return None
    broken = [(a, b) for a, b in zip(_used(means, best), _used(means, after[0])) if a > 1]
    return (best, after[0]) if broken and all(b < ROOMY for _, b in broken) else None


def _used(means: Means, trial: Trial) -> tuple[float, float]:
    """The shares of the limits on bytes and on ms that a file takes; 0 where there is no limit."""
    base, got = _evidence(means.baseline), _evidence(trial)
    limits = goal(means.budget, base, 1.0, 1.0)
    pairs = (got.size.bytes, limits.bytes), (level_ms(got, base), limits.latency_ms)
    return tuple(value / limit if limit else 0.0 for value, limit in pairs)  # type: ignore[return-value]


def _between(means: Means, outside: Trial, inside: Trial, probes: Sequence[Trial]) -> tuple[Recipe, ...]:
    """One probe of a plan that was not tried yet, between one that broke a limit and one that went too far."""
    far, near = _mistaken(means, outside, most=math.inf), _mistaken(means, inside, most=math.inf)
    shares = (math.sqrt(a * b) for a, b in ((far.bytes, near.bytes), (far.ms, near.ms)))
    known = {plan_of(t.recipe) for t in probes}
    found = _probes(means, Tighter(*(min(1.0, s) for s in shares)), _fastest(means))
    return tuple(r for r in found[:1] if plan_of(r) not in known)


def _anew(means: Means, missed: Sequence[Trial], probes: Sequence[Trial]) -> tuple[Recipe, ...]:
    """Probes of plans that were not tried yet, for limits tightened by what is still predicted wrong of the files that
    overran them; where that gives nothing new, by what they overran."""
    known = {plan_of(t.recipe) for t in probes}
    for by in (_mistaken, _tightened):
        shares = [by(means, t) for t in missed]
        tighten = Tighter(min(s.bytes for s in shares), min(s.ms for s in shares))
        if found := tuple(r for r in _probes(means, tighten, _fastest(means)) if plan_of(r) not in known):
            return found
    return ()


def extra_files(means: Means, best: Trial, probes: Sequence[Trial]) -> tuple[Recipe, ...]:
    """`best`'s network in formats that hold none of a probe yet, so that what is predicted of them was learnt there.

    Each costs an export and its measuring: the training is there already. Formats that were asked for come first, then
    the fastest; few, once, and none that would take more than EXTRA_SHARE of the time for training.
    """

    def order(recipe: Recipe) -> tuple[bool, float]:
        return recipe.format not in means.asked, expected(means, recipe).latency_ms or 0.0

    if _has_extra(probes):
        return ()
    known = {t.recipe.format for t in probes}
    rest = [dataclasses.replace(best.recipe, format=f) for f in means.formats if f not in known]
    chosen, left_s = list[Recipe](), EXTRA_SHARE * ((means.left_s or 0.0) - means.tail_s)
    for recipe in sorted(rest, key=order)[:MOST_EXTRA]:
        seconds = means.file_s.get(recipe.format, math.inf)
        if means.left_s is None or seconds <= left_s:
            chosen.append(recipe)
            left_s -= seconds
    return tuple(chosen)


def _has_extra(probes: Sequence[Trial]) -> bool:
    """Whether a network was written in more than one format."""
    return len({plan_of(t.recipe) for t in probes}) < len(probes)


def _decided(means: Means, inside: Sequence[Trial], probes: Sequence[Trial]) -> tuple[Recipe, ...]:
    """The long training of the best probe that is inside the limits in every format asked for, unless one that is
    inside in some format only is far better; or first, once, probes that are planned for the format that breaks them."""
    best = _best(inside)
    near = [t for t in inside if _evidence(best).metric.value - _evidence(t).metric.value <= SACRIFICE]
    everywhere = [t for t in near if not _broken(means, t.recipe, probes)]
    known = [plan_of(t.recipe) for t in probes]
    if not everywhere and known[-1] in known[:-1]:
        worst = max(_broken(means, best.recipe, probes), key=lambda f: _excess(means, best.recipe, f))
        if again := tuple(r for r in _probes(means, Tighter(), worst) if plan_of(r) not in known):
            return again
    return _long(means, _best(everywhere or inside).recipe)


def _broken(means: Means, recipe: Recipe, probes: Sequence[Trial]) -> list[str]:
    """The formats asked for in which a probe's network breaks a limit: by its own file, else by what is expected once
    any probe was measured there."""
    rows = []
    for f in means.asked:
        there = [t for t in probes if t.recipe.format == f and t.evidence]
        own = [_evidence(t) for t in there if plan_of(t.recipe) == plan_of(recipe)]
        if any(_cost_misses(means, e) for e in own) or (there and not own and _excess(means, recipe, f) > 0):
            rows.append(f)
    return rows


def _excess(means: Means, recipe: Recipe, format: str) -> float:
    """By how much a recipe's network is expected to overrun the limits in a format."""
    limits = goal(means.budget, _evidence(means.baseline), 1.0, 1.0)
    return limits.excess(expected(means, dataclasses.replace(recipe, format=format)))


def plan_of(recipe: Recipe) -> tuple[tuple[tuple[str, int], ...], Precision]:
    """Its widths and bits, however long it trains and whatever its format."""
    return widths_of(recipe), recipe.precision


def _best(trials: Sequence[Trial]) -> Trial:
    """The most accurate."""
    return max(trials, key=lambda t: _evidence(t).metric.value)


def candidates(means: Means, tighten: Tighter, format: str) -> list[Plan]:
    """By the measured damages, and evenly (the control that tells whether measuring was worth it).

    A file that is expected to be inside the limits as it is was measured outside: they are tightened until it is not.
    """
    costs = means.costs[format]
    for room in (ROOM * TIGHTER**k for k in range(MOST_TIGHTER)):
        time_room = TIME_ROOM * tighten.ms / tighten.bytes
        limits = goal(means.budget, _evidence(means.baseline), room * tighten.bytes, time_room)
        found = [p for p in (fitted(costs, limits), even(costs, limits)) if p is not None]
        if changed := [p for p in found if p.widths or p.int4]:
            return list(dict.fromkeys(changed))
        if not found:
            break
    return []


def _fastest(means: Means) -> str:
    """The format whose files are expected to be the fastest when nothing is narrowed."""

    def ms(name: str) -> float:
        return predict(means.costs[name], {}).latency_ms or 0.0

    return min(means.formats, key=ms)


# --- recipes --------------------------------------------------------------------------------------


def _probes(means: Means, tighten: Tighter, format: str) -> tuple[Recipe, ...]:
    """A short trial of each candidate in the format that it is planned for."""
    seconds = 0.0 if means.left_s is None else max(LEAST_TRAINING_S, PROBE_SHARE * means.left_s)
    training = Step("distill", _pairs(epochs=PROBE_EPOCHS, lr=PROBE_LR, seconds=round(seconds, 1)))

    def probe(plan: Plan) -> Recipe:
        # Fewer bits alone may do; the step without widths would choose some by a ratio.
        narrow = (Step(NARROW, _pairs(widths=plan.widths)),) if plan.widths else ()
        return Recipe((*narrow, training, Step("quantize")), plan.precision(means.ends), format)

    return tuple(map(probe, candidates(means, tighten, format)))


def _long(means: Means, probe: Recipe, epochs: float = EPOCHS) -> tuple[Recipe, ...]:
    """The probed widths with the long training, in every format; nothing where no time is left for it."""
    if means.left_s is None:
        training = Step("distill", _pairs(epochs=epochs, lr=LONG_LR, once=means.once, seconds=0.0))
    else:
        seconds = means.left_s - means.tail_s
        if seconds < LEAST_TRAINING_S:
            return ()
        limit = {"epochs": MOST_EPOCHS, "seconds": round(seconds, 1)}
        training = Step("distill", _pairs(lr=LONG_LR, once=means.once, **limit))
    steps = tuple(training if s.method == training.method else s for s in probe.steps)
    return tuple(dataclasses.replace(probe, steps=steps, format=f) for f in means.formats)


def _again(means: Means, long: Sequence[Trial]) -> tuple[Recipe, ...]:
    """Twice the epochs where only the drop was missed and nobody limited the time."""
    base = _evidence(means.baseline)
    met = any(t.evidence and not means.budget.misses(t.evidence, base) for t in long)
    tried = sorted({training_of(t.recipe)["epochs"] for t in long})
    if met or means.left_s is not None or len(tried) > AGAIN or all(t.evidence is None for t in long):
        return ()
    return _long(means, long[-1].recipe, epochs=2 * tried[-1])


def _pairs(**settings: object) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(settings.items()))


def is_probe(recipe: Recipe) -> bool:
    """Whether it is a short trial of the widths and bits of a longer one."""
    training = training_of(recipe)
    ours = narrows(recipe) or {"lr", "seconds"} <= training.keys()
    return ours and training.get("epochs") == PROBE_EPOCHS


def training_of(recipe: Recipe) -> dict[str, Any]:
    """The settings of its training; nothing where it has none."""
    return next((dict(s.settings) for s in recipe.steps if s.method == "distill"), {})


def narrows(recipe: Recipe) -> bool:
    """Whether it removes channels."""
    return any(s.method == NARROW for s in recipe.steps)


def widths_of(recipe: Recipe) -> tuple[tuple[str, int], ...]:
    """The channels kept by group that a recipe asks for."""
    return next((tuple(dict(s.settings).get("widths", ())) for s in recipe.steps if s.method == NARROW), ())


def expected(means: Means, recipe: Recipe) -> Predicted:
    """Bytes and ms of the file that a narrowed recipe will give."""
    int4 = [name for name, weights, _ in recipe.precision.exceptions if weights == "int4"]
    return predict(means.costs[recipe.format], dict(widths_of(recipe)), int4)


def _cost_misses(means: Means, got: Evidence) -> bool:
    """Whether a limit other than the drop is broken."""
    free = dataclasses.replace(means.budget, max_drop=None)
    return bool(free.misses(got, _evidence(means.baseline)))


def _mistaken(means: Means, trial: Trial, most: float = 1.0) -> Tighter:
    """What of a measured file the costs, which know it by now, still predict; at most `most`."""
    got, said = _evidence(trial), expected(means, trial.recipe)
    ms = said.latency_ms / level_ms(got, _evidence(means.baseline)) if said.latency_ms else 1.0
    return Tighter(min(most, said.bytes / got.size.bytes), min(most, ms))


def _tightened(means: Means, trial: Trial) -> Tighter:
    """What the limits must be multiplied by so that a file that overran them as this one did would keep them."""
    got, base = _evidence(trial), _evidence(means.baseline)
    limits = goal(means.budget, base, 1.0, 1.0)

    def share(value: float, limit: float | None) -> float:
        return 1 / (1 + max(0.0 if limit is None else value / limit - 1, 0.0) + (1 - ROOM))

    return Tighter(share(got.size.bytes, limits.bytes), share(level_ms(got, base), limits.latency_ms))


def _evidence(trial: Trial) -> Evidence:
    assert trial.evidence is not None
    return trial.evidence
