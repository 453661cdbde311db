"""Narrowing: where quantization alone misses the budget, channels and bits are planned, probed and trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lighten import scout, workshop
from lighten.errors import BadModel, RefusedFormat
from lighten.ledger import Ledger
from lighten.search import reach
from lighten.trials import Bench, Run, closing_s, evidence_of, limit_of, tried, untrained_s
from lighten.types import Predicted, Recipe

SPARE_S, SPARE_SHARE = 10.0, 0.05
"""Seconds that are kept back for what is not foreseen, and the share of the time given that they are at most."""
FIRST_FILE_S = 20.0
"""Seconds that a file takes in a format that none was written in: a first export loads half a world of modules."""


def narrowed(book: Ledger, menu: Sequence[Recipe], bench: Bench, run: Run) -> Ledger:
    """Measure what channels cost, plan widths, probe, train the best as long as the time allows.

    What is decided is recorded before it is tried: an interrupted run goes on with the same recipes.
    """
    mine = {r.id for r in menu}
    if not reach.needed([t for t in book.trials if t.id in mine], run.baseline, run.budget):
        return book
    if reason := hindered(book, run):
        run.log(f"quantization alone misses the budget, and the network is not narrowed: {reason}")
        return book
    run.log("quantization alone misses the budget: measuring what each channel group costs, on little data")
    book, found = scouted(book, run)
    if found is None:
        return book
    while todo := next_narrow(book, found, run):
        for recipe in todo:
            if recipe not in book.planned:
                book = book.append("planned", recipe)
        for recipe in todo:
            limit_s = limit_of(book, run)
            if limit_s is not None and limit_s <= 0:
                run.log("time is up")
                return book
            book = attempted(book, recipe, found, bench, run, limit_s)
    for line in last_words(book, run):
        run.log(line)
    return book


def hindered(book: Ledger, run: Run) -> str | None:
    """Why narrowing cannot even begin, or None."""
    if not len(run.job.data.train):
        return "there are no training images to recover on"
    left_s = run.clock.left_s
    if left_s is not None and left_s < closing_s(book, run) + 2 * reach.LEAST_TRAINING_S:
        return f"only {max(left_s, 0):.0f} s are left"
    return None


def scouted(book: Ledger, run: Run) -> tuple[Ledger, scout.Scouted | None]:
    """What groups and layers cost, each row in the ledger at once; nothing where the network cannot be narrowed."""

    def keep(kind: str, row: Any) -> None:
        nonlocal book
        book = book.append(kind, row)

    try:
        with run.clock.part("sensitivity"):
            found = scout.scout(
                run.job,
                worth_narrowing(book, run),
                bits=reach.goal(run.budget, evidence_of(run.baseline)).bytes is not None,
                widths=book.widths,
                costs=book.costs,
                keep=keep,
                share=run.clock.share,
            )
    except (BadModel, RefusedFormat) as e:
        run.log(f"the network is not narrowed: {e.what} {e.to_do}")
        return book, None
    return book, found


def worth_narrowing(book: Ledger, run: Run) -> tuple[str, ...]:
    """The formats without those in which every file failed so far; all of them where all did."""
    failed = {f for f in run.formats if (rows := _files(book, f)) and not any(t.evidence for t in rows)}
    return tuple(f for f in run.formats if f not in failed) or run.formats


def _files(book: Ledger, format: str) -> list[Any]:
    return [t for t in book.trials if t.recipe.format == format and t.recipe.steps and t.recipe not in book.planned]


def next_narrow(book: Ledger, found: scout.Scouted, run: Run) -> list[Recipe]:
    """What was decided before and is not tried yet, or whose files are no longer whole; else what is decided now."""
    tried_before = {t.id for t in book.trials if workshop.is_whole(t, run.folder)}
    if open_ := [r for r in book.planned if r.id not in tried_before and r.format in found.times]:
        return open_
    if run.clock.is_up:
        return []
    done = [t for t in book.trials if t.recipe in book.planned]
    todo = reach.next_recipes(means_of(book, found, run), done)
    return [r for r in todo if r.id not in tried_before]


def attempted(
    book: Ledger, recipe: Recipe, found: scout.Scouted, bench: Bench, run: Run, limit_s: float | None
) -> Ledger:
    """One of the planned recipes, predicted, tried, recorded."""
    expected = reach.expected(means_of(book, found, run), recipe)
    run.log(f"{recipe.title}: {said(recipe, found, expected)}")
    with run.clock.part("probes" if reach.is_probe(recipe) else "training"):
        return tried(book, recipe, bench, run, predicted=expected, limit_s=limit_s)[0]


def means_of(book: Ledger, found: scout.Scouted, run: Run) -> reach.Means:
    """What is known now: costs held to every file that was measured so far, and the time that is left."""
    names = tuple(found.times)
    seconds = {f: file_s(book, f) for f in names}
    spare = min(SPARE_S, SPARE_SHARE * (run.clock.limit_s or 0.0))
    return reach.Means(
        {f: scout.costs(found, f, book.trials, run.job, evidence_of(run.baseline)) for f in names},
        names,
        run.baseline,
        run.budget,
        found.ends,
        run.clock.left_s,
        spare + sum(seconds.values()) + closing_s(book, run),
        seconds,
        tuple(f for f in run.asked if f in names),
        run.job.head is None,
    )


def file_s(book: Ledger, format: str) -> float:
    """Seconds to quantize, export and measure one file of a format whose network is trained."""
    known = (t for t in book.trials if t.evidence and t.recipe.steps and t.recipe.format == format)
    return max(map(untrained_s, known), default=FIRST_FILE_S)


def said(recipe: Recipe, found: scout.Scouted, expected: Predicted | None) -> str:
    """What a narrowed recipe is expected to be, in one line."""
    channels = {g.name: g.channels for g in found.groups}
    kept = dict(reach.widths_of(recipe))
    share = sum(kept.get(n, c) for n, c in channels.items()) / max(sum(channels.values()), 1)
    words = [f"{100 * share:.0f} % of the channels kept"]
    if expected is not None:
        words.append(f"{expected.bytes / 1e6:.2f} MB expected")
        words += [f"{expected.latency_ms:.2f} ms expected"] if expected.latency_ms else []
    training = reach.training_of(recipe)
    limit = f"at most {training['seconds']:.0f} s" if training["seconds"] else f"{training['epochs']:g} epochs"
    return ", ".join([*words, f"training {limit}"])


def last_words(book: Ledger, run: Run) -> list[str]:
    """Why no more was tried, where that was not for the budget being met."""
    left_s = run.clock.left_s
    if run.clock.is_up:
        return ["time is up"]
    if not book.planned:
        return ["no channel widths are expected to meet the budget: nothing was narrowed"]
    if left_s is not None and all(map(reach.is_probe, book.planned)):
        return [f"the long training is left out: {left_s:.0f} s are left, and what follows it takes most of them"]
    return []
