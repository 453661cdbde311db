"""What the terminal says of trials: which are short, in both languages."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from conftest import trial
from lighten import terminal
from lighten.report.texts import texts
from lighten.search import reach
from lighten.types import Precision, Recipe, Step

INT8 = Precision("int8", "int8")


def narrowed(epochs: float) -> Recipe:
    widths = Step("channel_prune", (("widths", (("a", 16),)),))
    return Recipe(
        (widths, Step("distill", (("epochs", epochs), ("lr", 0.02), ("seconds", 30.0))), Step("quantize")), INT8
    )


class Made:
    """As much of a result as the table reads."""

    def __init__(self) -> None:
        self.baseline, self.winner = trial(Recipe()), narrowed(60.0).id
        self.trials = tuple(trial(r) for r in (Recipe((Step("quantize"),), INT8), narrowed(1.0), narrowed(60.0)))


def shown(lang: str) -> list[str]:
    """The table's lines, title and header first."""
    result: Any = Made()
    page = Console(file=io.StringIO(), width=200)
    page.print(terminal.trials_table(result, lang))
    return page.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("lang", "says"), [("en", "short trial"), ("zh", "短训练试验")])
def test_only_short_trials_are_marked_as_such(lang: str, says: str) -> None:
    header, *rows = shown(lang)
    assert says not in header
    assert [says in row for row in rows] == [False, False, True, False]
    assert reach.is_probe(narrowed(1.0))
    assert "★" in rows[3]


def test_the_report_has_the_same_words() -> None:
    assert texts("en")["short_trial"] == "short trial"
    assert texts("zh")["short_trial"] == terminal.ZH["short trial"]
    assert texts("en")["short_trials_line"] == terminal.SHORT_TRIALS
    assert texts("zh")["short_trials_line"] == terminal.ZH[terminal.SHORT_TRIALS]
