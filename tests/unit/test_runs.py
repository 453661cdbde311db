"""The leaderboard shows every run, whole or not; a comparison says what differs and what must not be compared."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import sample_result

from conftest import evidence, trial
from lighten import cli, ledger, runs, terminal
from lighten.errors import BadBundle, UnknownName
from lighten.types import (
    Budget,
    ClassChange,
    Estimate,
    Latency,
    Precision,
    Preprocess,
    Recipe,
    Result,
    Step,
    Trial,
    to_json,
)


def write(folder: Path, result: Result) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(to_json(result)))
    return folder


def with_drop(drop: float, **changes: Any) -> Result:
    base = sample_result()
    return dataclasses.replace(base, final=dataclasses.replace(base.final, drop=Estimate(drop, 0.1, 10000)), **changes)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two finished runs, one inside another folder; one unfinished, one damaged, and folders that are no runs."""
    here = tmp_path / "runs"
    write(here / "fails", with_drop(0.05, verdict="FAIL"))
    write(here / "deep" / "worse", with_drop(0.4))
    write(here / "better", with_drop(0.1))
    book = ledger.open_ledger(here / "part", "question")
    book = book.append("trial", trial(size=1_000_000, ms=10.0))
    book = book.append("trial", trial(Recipe(precision=Precision("int8", "int8")), size=250_000, ms=4.0, drop=0.2))
    book.append("trial", trial(Recipe(precision=Precision("int4", "int4")), size=100_000, ms=4.0, top1=50, drop=40))
    (here / "bad").mkdir()
    (here / "bad" / "result.json").write_text('{"schema_version": 1')
    (here / "better" / "bundle").mkdir()
    (here / "better" / "bundle" / "result.json").write_text("not a run")
    (here / "notes").mkdir()
    return here


def test_every_run_has_its_place(out: Path) -> None:
    rows = runs.leaderboard(runs.read_runs(out))
    assert [(r.verdict, r.name) for r in rows] == [
        ("PASS", "better"),
        ("PASS", "worse"),
        ("FAIL", "fails"),
        ("unfinished", "part"),
        ("damaged", "bad"),
    ]


def test_figures_of_a_row_are_those_of_its_winner(out: Path) -> None:
    row = runs.leaderboard(runs.read_runs(out))[0]
    assert (row.model, row.data, row.device, row.trials) == ("resnet18", "cifar10", "x86", 6)
    assert row.recipe == "int8/uint8 · onnx"
    assert row.drop == Estimate(0.1, 0.1, 10000)
    assert row.report
    result = sample_result()
    assert row.shrink == pytest.approx(100 * (1 - 11.4 / 44.8))
    base, got = (t.evidence.latency[0].samples_ms for t in (result.baseline, result.winning) if t.evidence)
    assert row.latency_ms == statistics.median(got)
    assert row.speedup == pytest.approx(statistics.median(base) / statistics.median(got))
    assert row.size_mb == 11.4


def test_an_unfinished_run_shows_its_best_so_far(out: Path) -> None:
    row = runs.standing(runs.read_run(out / "part"))
    assert (row.recipe, row.shrink, row.speedup, row.trials) == ("int8 · onnx", 75.0, 2.5, 3)
    assert row.drop is not None
    assert row.drop.value == 0.2
    assert not row.report


def test_an_unfinished_run_without_a_trial_is_still_a_row(tmp_path: Path) -> None:
    ledger.open_ledger(tmp_path / "new", "question")
    row = runs.standing(runs.read_run(tmp_path / "new"))
    assert (row.verdict, row.recipe, row.drop) == ("unfinished", "", None)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("result.json", '{"schema_version": 9}', "schema version 9"),
        ("result.json", "\xe3", "cannot be read"),
        ("ledger.jsonl", '{"kind": "trial", "value": {}}\n', "line 1 is damaged"),
        ("result.json", json.dumps(to_json(dataclasses.replace(sample_result(), winner="nobody"))), "not measured"),
    ],
)
def test_damage_is_a_row_with_its_reason(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1", "replace"))
    (row,) = runs.leaderboard(runs.read_runs(tmp_path))
    assert row.verdict == "damaged"
    assert says in row.reason


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="There is no folder"):
        runs.read_runs(tmp_path / "nowhere")


def test_a_run_is_found_by_name_and_by_path(out: Path) -> None:
    assert runs.find_run("better", out) == runs.find_run(str(out / "better"), Path("elsewhere"))
    with pytest.raises(UnknownName, match="better"):
        runs.find_run("bettr", out)
    with pytest.raises(BadBundle, match="has not finished"):
        runs.find_run("part", out)
    with pytest.raises(BadBundle, match="cannot be read"):
        runs.find_run("bad", out)


# --- two runs ---------------------------------------------------------------------------------------


def run(result: Result, name: str = "a") -> runs.Run:
    return runs.Run(name, f"runs/{name}", 0.0, result, result.trials)


def with_winner(recipe: Recipe, **changes: Any) -> Result:
    result = sample_result(**changes)
    won = dataclasses.replace(result.winning, recipe=recipe)
    return dataclasses.replace(result, trials=(won,), winner=won.id)


def test_a_run_against_itself_differs_in_nothing() -> None:
    got = runs.compare(run(sample_result()), run(sample_result(), "b"))
    assert (got.warnings, got.recipe, got.budget) == ((), (), ())
    assert {f.difference for f in got.figures} == {0.0}
    assert {f.better for f in got.figures} == {""}


def test_recipe_and_budget_differences_are_named_one_by_one() -> None:
    int8 = Precision("int8", "int8")
    mixed = Precision("int4", "int8", (("fc", "int8", "int8"),))
    a = Recipe((Step("channel_prune", (("widths", (("conv1", 32), ("conv2", 64))),)), Step("quantize")), int8)
    b = Recipe((Step("channel_prune", (("widths", (("conv1", 24), ("conv2", 64))),)),), mixed, "openvino")
    got = runs.compare(run(with_winner(a)), run(with_winner(b, budget=Budget(max_drop=1.0)), "b"))
    assert [(d.what, d.a, d.b) for d in got.recipe] == [
        ("format", "onnx", "openvino"),
        ("weights", "int8", "int4"),
        ("steps", "channel_prune + quantize", "channel_prune"),
        ("channel_prune.widths.conv1", "32", "24"),
        ("layer fc", "", "int8/int8"),
    ]
    assert ("max_drop", "0.5", "1") in [(d.what, d.a, d.b) for d in got.budget]
    assert ("min_shrink", "60", "") in [(d.what, d.a, d.b) for d in got.budget]


def test_a_step_that_comes_twice_is_told_apart() -> None:
    twice = Recipe((Step("finetune", (("epochs", 1),)), Step("finetune", (("epochs", 3),))))
    facts = runs.recipe_facts(twice)
    assert (facts["finetune.epochs"], facts["finetune (2).epochs"]) == ("1", "3")


def figures(a: Result, b: Result) -> dict[str, runs.Beside]:
    return {f.what: f for f in runs.compare(run(a), run(b, "b")).figures}


def test_errors_of_differences_by_hand() -> None:
    a, b = sample_result(), sample_result()
    b = dataclasses.replace(b, final=dataclasses.replace(b.final, winner=Estimate(93.0, 0.4, 10000)))
    got = figures(a, b)["report metric"]
    # 0.23 and 0.40: sqrt(0.0529 + 0.16) = 0.4614; -1.19 points are 2.6 errors, so a is better.
    assert got.difference == pytest.approx(-1.19)
    assert got.error == pytest.approx(0.4614, abs=1e-4)
    assert got.better == "a"
    b = dataclasses.replace(b, final=dataclasses.replace(b.final, winner=Estimate(93.5, 0.4, 10000)))
    assert figures(a, b)["report metric"].better == "", "0.69 points are 1.5 errors"


def test_bytes_are_exact_and_memory_is_one_reading() -> None:
    a = with_winner(Recipe(format="onnx", precision=Precision("int8", "int8")))
    won = dataclasses.replace(a.winning, evidence=evidence(size=2_000_000, memory_mb=10.0))
    got = figures(a, dataclasses.replace(a, trials=(won,)))
    assert (got["bytes"].a, got["bytes"].b, got["bytes"].better, got["bytes"].error) == (11.4, 2.0, "b", None)
    assert got["gzip"].b == 1.0
    assert got["memory"].b == 10.0
    assert got["memory"].better == ""


def test_the_error_of_a_median_is_what_sampling_gives() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    draws = rng.normal(10.0, 1.0, (4000, 61))
    seen = float(np.median(draws, 1).std())
    told = statistics.mean(runs.median(Latency(1, tuple(row))).error for row in draws[:400])
    assert told == pytest.approx(seen, rel=0.06)
    q25, q75 = np.percentile(draws[0], [25, 75])
    assert runs.median(Latency(1, tuple(draws[0]))).error == pytest.approx(1.25 * (q75 - q25) / 1.35 / math.sqrt(61))


def test_classes_by_the_size_of_their_change() -> None:
    def final(*after: float) -> Result:
        result = sample_result()
        rows = tuple(ClassChange(c, 90.0, x, 100) for c, x in zip(result.classes, after))
        return dataclasses.replace(result, final=dataclasses.replace(result.final, classes=rows))

    got = runs.compare(run(final(90, 80, 70)), run(final(91, 75, 73), "b")).classes
    assert [(c.name, c.name_zh, c.difference) for c in got] == [
        ("automobile", "汽车", -5.0),
        ("bird", "鸟", 3.0),
        ("airplane", "飞机", 1.0),
    ]
    p, q = 92 / 104, 93 / 104  # Agresti and Coull: 90 + 2 of 104
    assert got[2].error == pytest.approx(100 * math.sqrt(p * (1 - p) / 104 + q * (1 - q) / 104))


@pytest.mark.parametrize(
    ("changes", "says", "says_zh"),
    [
        ({"data": "fashion-mnist"}, "Accuracies are not comparable", "准确率不可比较"),
        ({"images": {"report": 5}}, "of different images", "不同的图片"),
        ({"classes": ("a",)}, "Different classes", "类别不同"),
        ({"model": "resnet50"}, "Different originals: resnet18 against resnet50", "原模型不同"),
        ({"preprocess": Preprocess(32, 32)}, "Different preprocessing", "预处理不同"),
        ({"environment": {"processor": "ARM"}}, "Times and memory are not comparable", "时间和内存不可比较"),
    ],
)
def test_what_must_not_be_compared_is_said(changes: dict[str, Any], says: str, says_zh: str) -> None:
    got = runs.compare(run(sample_result()), run(sample_result(**changes), "b")).warnings
    assert any(says in w.en for w in got), got
    assert any(says_zh in w.zh for w in got), got


def test_other_images_and_a_busy_machine_are_seen_by_the_original() -> None:
    a = sample_result()
    b = dataclasses.replace(a, final=dataclasses.replace(a.final, baseline=Estimate(93.0, 0.2, 10000)))
    (warning,) = runs.compare(run(a), run(b, "b")).warnings
    assert "The same original scores differently" in warning.en
    e = a.baseline.evidence
    assert e is not None
    slow = tuple(Latency(row.threads, tuple(1.5 * s for s in row.samples_ms)) for row in e.latency)
    b = dataclasses.replace(a, baseline=dataclasses.replace(a.baseline, evidence=dataclasses.replace(e, latency=slow)))
    (warning,) = runs.compare(run(a), run(b, "b")).warnings
    assert "not equally fast" in warning.en
    retrained = dataclasses.replace(a.baseline.artifact, sha256="ef" * 32)  # type: ignore[type-var]
    b = dataclasses.replace(a, baseline=dataclasses.replace(a.baseline, artifact=retrained))
    (warning,) = runs.compare(run(a), run(b, "b")).warnings
    assert "two files of resnet18" in warning.en


def test_only_finished_runs_are_compared(out: Path) -> None:
    with pytest.raises(BadBundle, match="has not finished"):
        runs.compare(run(sample_result()), runs.read_run(out / "part"))


# --- detectors ----------------------------------------------------------------------------------------


def detectors(result: Result) -> Result:
    """The same result as if a detector's metric had been measured."""

    def renamed(one: Trial) -> Trial:
        return dataclasses.replace(one, evidence=one.evidence and dataclasses.replace(one.evidence, metric_name="mAP"))

    return dataclasses.replace(
        result, task="detection", baseline=renamed(result.baseline), trials=tuple(map(renamed, result.trials))
    )


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_two_detectors_are_compared_by_their_own_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lang: str
) -> None:
    write(tmp_path / "a", detectors(sample_result()))
    write(tmp_path / "b", detectors(sample_result(data="other")))
    code, text = said(monkeypatch, 100, "compare", "a", "b", "--out", str(tmp_path), "--lang", lang)
    assert code == 0
    for word in ("top-1", "ccurac", "准确率", "nan"):
        assert word not in text
    assert ("报告图片 mAP" if lang == "zh" else "mAP, report images") in text
    assert ("mAP 不可比较" if lang == "zh" else "Values of mAP are not comparable") in text


def test_an_average_precision_has_no_binomial_error_and_another_metric_is_not_compared() -> None:
    found = runs.compare(run(detectors(sample_result())), run(detectors(sample_result()), "b"))
    assert found.metric == "mAP"
    assert all(math.isnan(row.error) for row in found.classes)
    mixed = runs.compare(run(sample_result()), run(detectors(sample_result()), "b"))
    assert (mixed.metric, mixed.classes) == ("", ())
    assert not {"report metric", "metric", "drop"} & {f.what for f in mixed.figures}
    assert any("Different tasks" in w.en and "Accuracies" in w.en for w in mixed.warnings)


# --- the two commands -------------------------------------------------------------------------------


def said(monkeypatch: pytest.MonkeyPatch, width: int, *words: str) -> tuple[int, str]:
    """Exit code and what a terminal of that width shows."""
    page = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=page, width=width, highlight=False))
    with pytest.raises(SystemExit) as e:
        cli.main(list(words))
    return int(e.value.code or 0), page.getvalue()


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_leaderboard_fits_a_terminal(out: Path, monkeypatch: pytest.MonkeyPatch, lang: str) -> None:
    from rich.cells import cell_len

    code, text = said(monkeypatch, 80, "runs", str(out), "--lang", lang)
    assert code == 0
    assert max(map(cell_len, text.splitlines())) <= 80
    assert text.index("better") < text.index("worse") < text.index("fails") < text.index("part") < text.index("bad")
    assert "resnet18 · cifar10 · x86" in text
    assert ("目前最好的" if lang == "zh" else "best of 3 trials so far") in text.replace("\n", "")
    assert "…%" not in text


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_comparison_fits_a_terminal(out: Path, monkeypatch: pytest.MonkeyPatch, lang: str) -> None:
    from rich.cells import cell_len

    write(out / "other", sample_result(data="[red]my[/] photos", budget=Budget(max_drop=2)))
    code, text = said(monkeypatch, 80, "compare", "better", "other", "--out", str(out), "--lang", lang)
    assert code == 0
    assert max(map(cell_len, text.splitlines())) <= 80
    assert text.index("[red]my[/] photos") < text.index("max_drop"), "what must not be compared comes first"
    assert ("猫" if lang == "zh" else "cat") in text


def test_json_of_both_commands(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert said(monkeypatch, 80, "runs", str(out), "--json")[0] == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in rows] == ["better", "worse", "fails", "part", "bad"]
    assert said(monkeypatch, 80, "compare", "better", "fails", "--out", str(out), "--json")[0] == 0
    got = json.loads(capsys.readouterr().out)
    assert got["verdicts"] == ["PASS", "FAIL"]
    assert len(got["classes"]) == 10


@pytest.mark.parametrize("words", [("runs", "nowhere"), ("compare", "better", "nobody"), ("runs", ".", "--lang", "fr")])
def test_bad_input_has_its_exit_code(out: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.chdir(out)
    assert said(monkeypatch, 80, *words)[0] == 2


def test_no_runs_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, 80, "runs", str(tmp_path)) == (0, f"No runs in {tmp_path}.\n")


def test_newest_change_is_told(out: Path) -> None:
    os.utime(out / "better" / "result.json", (0, 86400 * 365))
    assert runs.leaderboard(runs.read_runs(out))[0].when.startswith("1971-01-01")
