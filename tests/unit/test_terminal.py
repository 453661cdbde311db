"""What the terminal says of trials: which are short, and what was measured, in both languages."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

import detector_results
from conftest import trial
from lighten import terminal
from lighten.report.texts import texts
from lighten.search import reach
from lighten.types import Agreement, BoxDrift, Precision, Recipe, Result, Step

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


# --- detectors ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Result:
    pytest.importorskip("faster_coco_eval")
    return detector_results.detector_result(tmp_path_factory.mktemp("run"))


def printed(result: Result, lang: str, monkeypatch: pytest.MonkeyPatch) -> str:
    page = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(terminal, "console", page)
    terminal.print_result(result, lang)
    return page.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_detectors_metric_is_map_and_its_boxes_are_told(
    detector: Result, lang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(detector, lang, monkeypatch)
    assert "top-1" not in text
    assert f"mAP {detector.final.winner} %" in text
    assert "mAP %" in text.splitlines()[1]
    old, new = dict(detector.final.extra_before), dict(detector.final.extra)
    assert f"AP50 {old['AP50'].value:.2f} → {new['AP50'].value:.2f} · AP75" in text
    won = detector.winning.evidence
    assert won is not None
    assert won.drift.boxes is not None
    assert f"{won.drift.boxes.matched:.1f} % " + ("keep a partner" if lang == "en" else "配对成功") in text


@pytest.mark.parametrize(("n", "matched", "says"), [(5, 0.0, "has a partner"), (0, 100.0, "neither side shows any")])
def test_boxes_without_partners_are_said_so(detector: Result, n: int, matched: float, says: str) -> None:
    won = detector.winning
    assert won.evidence is not None
    gone = Agreement(5, 0.0, 0.0, 0.0, 0.0, BoxDrift(float("nan"), float("nan"), matched, n))
    trials = (replace(won, evidence=replace(won.evidence, drift=gone)), *detector.trials[1:])
    assert says in terminal.detector_lines(replace(detector, trials=trials), "en")[-1]


def test_a_classifier_has_no_lines_of_boxes() -> None:
    from test_report import sample_result

    assert terminal.detector_lines(sample_result(), "en") == []


def test_exports_of_a_detector_have_its_metric(detector: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    from lighten.exports import Row

    page = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(terminal, "console", page)
    for result, words in ((detector, ("mAP", "boxes again")), (None, ("top-1", "same answer"))):
        got = result.winning.evidence if result else trial().evidence
        row = Row("onnx", Precision(), "PASS", bytes=1000, original_bytes=4000, evidence=got)
        terminal.print_exports((row,), "run", "en")
        text = page.file.getvalue()  # type: ignore[attr-defined]
        assert all(word in text for word in words)


def test_short_trials_of_detectors_say_map(detector: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(detector.winning, recipe=narrowed(1.0))
    text = printed(replace(detector, trials=(*detector.trials, short)), "en", monkeypatch)
    assert terminal.SHORT_DETECTORS in " ".join(text.split())
    for lang in ("en", "zh"):
        assert texts(lang, "detection")["short_trials_line"] == terminal._word(terminal.SHORT_DETECTORS, lang)
