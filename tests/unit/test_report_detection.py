"""The report of a detector says mAP, shows its boxes before and after, and keeps positions and scores apart."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import string
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_report import HOSTILE, page, png, sample_result, table

import detector_results as made
from lighten.report import boxes, charts, detector_texts, read_result, write
from lighten.report.numbers import fixed, pair
from lighten.report.texts import EN, LANGUAGES, texts
from lighten.types import Agreement, BoxDrift, Estimate, Result, from_json, to_json

pytest.importorskip("faster_coco_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detector")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return made.detector_result(folder)


def drift(**changes: float) -> Agreement:
    box = BoxDrift(**{"iou": 0.951, "score": 0.0213, "matched": 96.4, "n": 1234} | changes)  # type: ignore[arg-type]
    return Agreement(32, 71.5, 0.01, 2.5, 24.0, box)


# --- words --------------------------------------------------------------------------------------------


def test_nothing_is_said_of_classifiers(result: Result, folder: Path) -> None:
    for lang, foreign in (
        ("en", ("top-1", "ccurac", "nats", "Kullback")),
        ("zh", ("top-1", "准确率", "精度", "nat", "KL")),
    ):
        _, seen = page(result, folder, lang)
        text = seen.text + (folder / "report.md").read_text(encoding="utf-8")
        for word in foreign:
            assert word not in text, (lang, word)
        assert "mAP50–95" in seen.text


def test_the_verdict_the_tiles_and_the_limits_say_map(result: Result, folder: Path) -> None:
    _, seen = page(result, folder)
    lost = result.final.drop.value
    assert f"loses {lost:.2f} points of mAP." in seen.text
    assert f"mAP50–95 {fixed(result.final.winner.value)} %" in seen.text
    assert "mAP loss, at most 15 points" in seen.text
    assert re.search(r"mAP % Loss, points", seen.text)


def test_words_are_in_both_languages_with_the_same_blanks() -> None:
    assert detector_texts.EN.keys() == detector_texts.ZH.keys()

    def blanks(text: str) -> set[str]:
        return {part[1] for part in string.Formatter().parse(text) if part[1]}

    for name in detector_texts.EN:
        assert blanks(detector_texts.EN[name]) == blanks(detector_texts.ZH[name]), name
        for lang, words in LANGUAGES.items():
            if name in words and name != "flips_some":
                assert blanks(detector_texts.LANGUAGES[lang][name]) <= blanks(words[name]), name
    assert texts("en") == EN
    assert texts("en", "classification") == EN


def test_a_classifiers_report_has_none_of_it(tmp_path: Path) -> None:
    png(tmp_path, "flips/0.png")
    _, seen = page(sample_result(), tmp_path)
    for name in ("detail", "moved", "moved_what"):
        assert detector_texts.EN[name] not in seen.text
    assert not [a for _, a in seen.tags if a.get("class") in ("strips", "panels", "moved")]


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_metric_is_shown_before_and_after_with_its_error(result: Result, folder: Path, lang: str) -> None:
    words = texts(lang, "detection")
    _, seen = page(result, folder, lang)
    old, new = dict(result.final.extra_before), dict(result.final.extra)
    assert old.keys() == new.keys() >= {"AP50", "AP75", "APsmall"}
    lines = table((folder / "report.md").read_text(encoding="utf-8"), words["detail"])
    assert len(lines) == 2 + 1 + len(new)
    for name in new:
        assert f"{words[name]} {pair(old[name])} {pair(new[name])}" in seen.text
        assert any(f"| {words[name]} | {pair(old[name])} | {pair(new[name])} |" in line for line in lines)
    assert f"{pair(result.final.baseline)} {pair(result.final.winner)}" in seen.text


def test_a_metric_that_one_side_lacks_is_a_dash(result: Result) -> None:
    final = dataclasses.replace(result.final, extra_before=(), extra=(("AP50", Estimate(50, 1, 9)),))
    rows = boxes.detail(dataclasses.replace(result, final=final), texts("en", "detection"))
    assert rows[1] == {"name": "AP50", "cells": [("—", ""), ("50.00", "± 1.00"), ("—", "")]}


def test_positions_scores_and_export_are_told_apart(result: Result, folder: Path) -> None:
    won = result.winning.evidence
    assert won is not None
    new = dataclasses.replace(won, drift=drift(), fidelity=drift(iou=0.999, score=0.0004, matched=100.0))
    shown = boxes.moved(new, texts("en", "detection"))
    assert shown["moved"] == [
        {"name": "export (fidelity)", "cells": ["1,234", "71.5", "100.0", "99.9", "0.000"]},
        {"name": "compression (drift)", "cells": ["1,234", "71.5", "96.4", "95.1", "0.021"]},
    ]
    assert shown["moved_sentence"] == (
        "Compression: 96.4% of the boxes keep a partner, partners overlap by 95.1%, and their scores differ by 0.021 on "
        "average."
    )
    _, seen = page(result, folder)
    assert boxes.said(won.drift, texts("en", "detection")) in seen.text
    lines = table((folder / "report.md").read_text(encoding="utf-8"), "What became of the boxes")
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"iou": math.nan, "matched": 0.0}, "moved_none"), ({"iou": math.nan, "matched": 100.0, "n": 0}, "moved_empty")],
)
def test_no_partner_and_no_box_are_said_so(changes: dict[str, float], name: str) -> None:
    words = texts("en", "detection")
    assert boxes.said(drift(score=math.nan, **changes), words) == words[name]
    assert boxes.said(dataclasses.replace(drift(), boxes=None), words) == ""


# --- pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_images_with_boxes_are_shown_and_nothing_is_fetched(result: Result, folder: Path, lang: str) -> None:
    html, seen = page(result, folder, lang)
    pictures = [a["src"] for tag, a in seen.tags if tag == "img"]
    assert len(pictures) == len(result.flips) == len(set(pictures))
    assert all(str(src).startswith("data:image/jpeg;base64,") for src in pictures)
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(html) < 4_000_000
    folded = "details" in [tag for tag, _ in seen.tags]
    assert folded == (len(result.flips) > boxes.OPEN_STRIPS)


def test_each_language_shows_its_own_pictures_and_chinese_falls_back(result: Result, folder: Path) -> None:
    english, chinese = (
        {a["src"] for tag, a in page(result, folder, lang)[1].tags if tag == "img"} for lang in ("en", "zh")
    )
    assert not english & chinese
    plain = tuple({k: v for k, v in flip.items() if k != "thumbnail_zh"} for flip in result.flips)
    without = dataclasses.replace(result, flips=plain)
    assert {a["src"] for tag, a in page(without, folder, "zh")[1].tags if tag == "img"} == english


def test_a_card_says_what_was_found() -> None:
    words = texts("en", "detection")
    flip = {
        "image": "a.jpg",
        "changed": True,
        "n_truth": 3,
        "n_before": 4,
        "right_before": 3,
        "n_after": 2,
        "right_after": 2,
        "gone": [0, 1, 1],
        "new": [],
    }
    names = ("cat", "dog")
    assert boxes._card(flip, "data:", names, words) == {
        "src": "data:",
        "image": "a.jpg",
        "kind": "lost",
        "truth": "3 objects",
        "before": "3 of 3 found, 1 wrong",
        "after": "2 of 3 found",
        "gone": "cat, dog ×2",
        "new": "",
    }
    empty = boxes._card({"n_truth": 0, "n_after": 1, "new": [7, "x"]}, "", names, words)
    assert [empty[k] for k in ("truth", "before", "after", "new")] == ["no object", "nothing found", "1 wrong", ""]
    assert boxes._card({**flip, "changed": False, "right_after": 3}, "", names, words)["kind"] == "same_boxes"


def test_a_picture_that_is_missing_or_no_picture_is_left_out(result: Result, tmp_path: Path) -> None:
    (tmp_path / "flips").mkdir()
    (tmp_path / "flips/0.jpg").write_text("<svg>")
    (tmp_path / "out.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    flips = ({"thumbnail": "flips/0.jpg"}, {"thumbnail": "../out.jpg"}, {"thumbnail": "flips/9.jpg"}, {"image": "x"})
    run = tmp_path / "run"
    run.mkdir()
    _, seen = page(dataclasses.replace(result, flips=flips, path=""), run)
    assert "img" not in [tag for tag, _ in seen.tags]


def test_long_names_are_told_apart_in_the_chart() -> None:
    names = [f"traffic participant of the kind {k}, seen from afar" for k in range(30, 40)]
    short = charts.shortened(names, 120)
    assert len(set(short)) == len(names)
    assert all(charts.text_width(s) <= 120 for s in short)
    assert short[0] == "traf…30, seen…"
    assert charts.shortened(["cat", "cat", "dog"], 120) == ["cat", "cat", "dog"]
    assert charts.shortened([names[0]], 120) == [charts.shorten(names[0], 120)]
    assert charts.shortened(names, 5) == ["…"] * 10


# --- other shapes ---------------------------------------------------------------------------------------


def test_eighty_classes_with_long_names_are_shown_at_both_ends(tmp_path: Path) -> None:
    names = tuple(f"traffic participant of the kind number {k} <b>" for k in range(80))
    result = made.detector_result(tmp_path, names, lost=0.2, moved=3.0)
    html, seen = page(result, tmp_path)
    assert "<b>7" not in html
    assert len(result.final.classes) > 40
    assert seen.text.count("traffic participant") >= 40


def test_no_box_at_all_is_a_report_too(tmp_path: Path) -> None:
    result = made.detector_result(tmp_path, blind=True)
    for lang in ("en", "zh"):
        html, seen = page(result, tmp_path, lang)
        assert texts(lang, "detection")["moved_empty"] in seen.text
        assert "nan" not in re.sub(r"[a-zA-Z]+nan|nan[a-zA-Z]+", "", html).lower()
        assert "img" not in [tag for tag, _ in seen.tags]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = tuple(f"{HOSTILE}{k}" for k in range(10))
    result = made.detector_result(tmp_path, names)
    flips = tuple({**flip, "image": f'"><img src=x onerror=1>{HOSTILE}'} for flip in result.flips)
    for lang in ("en", "zh"):
        html, seen = page(dataclasses.replace(result, flips=flips), tmp_path, lang)
        assert "<script" not in html
        assert not [a for _, attrs in seen.tags for a in attrs if a.startswith("on")]
        assert not re.search(r"(?<!\\)<script", (tmp_path / "report.md").read_text(encoding="utf-8"))


def test_a_result_read_back_gives_the_same_page(result: Result, folder: Path) -> None:
    (folder / "result.json").write_text(json.dumps(to_json(result), allow_nan=False), encoding="utf-8")
    again = read_result(folder)
    assert again == from_json(Result, to_json(result))
    assert write(again, folder)[0].read_text() == page(result, folder)[0]
