"""Which layer is guilty, in the report: every layer is drawn and listed, in both languages, at its number."""

from __future__ import annotations

import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_report import HOSTILE, page, sample_result, table

from lighten.report import charts, write
from lighten.report.numbers import nats, power
from lighten.report.sensitivity import sensitivity, title
from lighten.report.texts import EN
from lighten.types import Estimate, LayerCost, Precision, Result, from_json, to_json

CHOICES = (("int4", "int8", 1.0, 500), ("int8", "int8", 0.01, 1000), ("float32", "float32", 0.0, 4000))


def costs(n: int, timed: bool = True, labelled: bool = True) -> tuple[LayerCost, ...]:
    """`n` layers; the fourth does most harm, the first none at all."""
    rows = []
    for k in range(n):
        harm = 0.0 if k == 0 else 0.4 if k == 3 else 0.001 * k
        for weights, activations, factor, size in CHOICES:
            drop = Estimate(12.5 * factor, 0.5, 200) if labelled else None
            ms = size / 1e4 if timed else None
            rows.append(LayerCost(f"layer{k}.conv", "conv2d", weights, activations, harm * factor, 0, drop, size, ms))
    return tuple(rows)


def section(result: Result, folder: Path, lang: str = "en") -> str:
    text, _ = page(result, folder, lang)
    heading = "Which layer is guilty" if lang == "en" else "问题出在哪一层"
    found = [s for s in re.findall(r"<section>.*?</section>", text, re.S) if heading in s]
    return found[0] if found else ""


def test_without_a_scan_nothing_is_shown(tmp_path: Path) -> None:
    assert section(sample_result(), tmp_path) == ""
    assert "guilty" not in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_layer_is_in_the_picture_and_in_the_table(tmp_path: Path, lang: str) -> None:
    shown = section(sample_result(sensitivity=costs(9)), tmp_path, lang)
    wide, narrow = re.findall(r"<svg[^>]*class=\"chart\">.*?</svg>(?=</div>)", shown, re.S)
    for k in range(9):
        assert f"<title>layer{k}.conv: int8 " in wide
        assert f"<title>layer{k}.conv: int8 " in narrow
        assert shown.count(f'<th scope="row">layer{k}.conv</th>') == 1
    assert shown.count("<details") == 0
    share = 100 * 0.4 / (0.4 + 0.001 * sum(k for k in range(9) if k != 3))
    assert f"{share:.0f}%" in shown
    assert "layer3.conv" in re.findall(r"<b>(.*?)</b>", shown)[0]


def test_cells_are_the_numbers(tmp_path: Path) -> None:
    rows = sensitivity(costs(9), Precision("int4", "int8", (("layer3.conv", "int8", "int8"),)), EN)
    assert rows["suspect_columns"] == [
        "Damage, int8", "Damage, int4/int8", "Points lost, int8", "Points lost, int4/int8",
        "kB: float32 → int8 → int4", "ms: float32 → int8 → int4/int8", "In the winner",
    ]  # fmt: skip
    assert rows["suspects"][3] == {
        "layer": "layer3.conv",
        "op": "conv2d",
        "cells": [
            "0.0040", "0.40", "0.12 ± 0.50", "12.50 ± 0.50", "4.00 → 1.00 → 0.500", "0.40 → 0.10 → 0.050", "int8",
        ],
    }  # fmt: skip
    assert rows["suspects"][2]["cells"][-1] == "int4/int8"


def test_columns_that_nothing_was_measured_for_are_left_out() -> None:
    rows = sensitivity(costs(3, timed=False, labelled=False), Precision("int8", "int8"), EN)
    assert rows["suspect_columns"] == ["Damage, int8", "Damage, int4/int8", "kB: float32 → int8 → int4"]
    assert all(len(row["cells"]) == 3 for row in rows["suspects"])


def test_many_layers_are_folded_under_the_worst(tmp_path: Path) -> None:
    shown = section(sample_result(sensitivity=costs(64)), tmp_path)
    assert shown.count("<details") == 1
    before, after = shown.split("<details")
    names = re.findall(r'<th scope="row">(.*?)</th>', before)
    assert names == ["layer3.conv", "layer63.conv", "layer62.conv", "layer61.conv", "layer60.conv"]
    assert len(re.findall(r'<th scope="row">', after)) == 64


def test_markdown_has_a_row_for_every_layer(tmp_path: Path) -> None:
    write(sample_result(sensitivity=costs(20)), tmp_path)
    lines = table((tmp_path / "report.md").read_text(encoding="utf-8"), "Which layer is guilty")
    assert len(lines) == 22
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert lines[5].startswith("| layer3.conv | conv2d | 0.0040 | 0.40 |")


def test_hostile_layer_names_stay_text(tmp_path: Path) -> None:
    rows = tuple(replace(row, layer=HOSTILE) if row.layer == "layer3.conv" else row for row in costs(6))
    for lang in ("en", "zh"):
        text, _ = page(sample_result(sensitivity=rows), tmp_path, lang)
        assert HOSTILE not in text
        assert "&lt;script&gt;" in text


def test_a_result_with_costs_comes_back_from_json() -> None:
    result = sample_result(sensitivity=costs(3))
    assert from_json(Result, to_json(result)) == result
    plain = to_json(result)
    del plain["sensitivity"]  # written by an older lighten
    assert from_json(Result, plain).sensitivity == ()


def test_what_was_not_finite_or_not_measured_is_a_dash(tmp_path: Path) -> None:
    rows = [replace(row, damage=math.nan) if row.layer == "layer2.conv" else row for row in costs(5)]
    del rows[3]  # layer1 at int4
    rows_of = sensitivity(rows, Precision("int8", "int8"), EN)["suspects"]
    assert rows_of[1]["cells"][:2] == ["1×10⁻⁵", "—"]
    assert rows_of[2]["cells"][:2] == ["—", "—"]
    assert section(sample_result(sensitivity=tuple(rows)), tmp_path)


# --- the picture ------------------------------------------------------------------------------------


def test_dots_lie_where_their_logarithms_are() -> None:
    """Three decades over the axis: the middle one lies in the middle of the outer two."""
    rows = [charts.Suspect("a", (0.001, None)), charts.Suspect("b", (0.01, 0.1)), charts.Suspect("c", (0.1, None))]
    drawn = charts.dots(rows, x_title="x")
    at = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2, abs=0.11)
    diamond = re.findall(r'<path d="M([\d.]+) [\d.]+l5.5', drawn)
    assert float(diamond[0]) == pytest.approx(at[2], abs=0.11)
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)]
    assert heights[1] - heights[0] == heights[2] - heights[1] == 22


def test_nothing_and_what_is_far_below_lie_faint_at_the_left_end() -> None:
    rows = [charts.Suspect("a", (0.0,)), charts.Suspect("b", (1e-20,)), charts.Suspect("c", (1.0,))]
    drawn = charts.dots(rows, x_title="x")
    faint = re.findall(r'series circle off"><circle cx="([\d.]+)"', drawn)
    assert len(faint) == 2
    assert len(set(faint)) == 1
    assert charts.dots([charts.Suspect("a", (0.0, None))], x_title="x") == ""
    assert charts.dots([], x_title="x") == ""


@pytest.mark.parametrize("width", [900, 350])
@pytest.mark.parametrize("n", [1, 9, 80])
def test_all_of_the_picture_lies_inside_it(width: int, n: int) -> None:
    rows = [
        charts.Suspect(f"features.{k}.block.conv_pointwise", (10.0**-k, 3.0), "", "0.00012" if k < 5 else "")
        for k in range(n)
    ]
    drawn = charts.dots(rows, x_title="damage", width=width, tick=power)
    for x, text in re.findall(r'<text x="([\d.]+)"[^>]*class="value"[^>]*>(.*?)</text>', drawn):
        assert float(x) + charts.text_width(text, 11) <= width
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawn)[0])
    assert all(0 < float(y) < height for y in re.findall(r' y="(-?[\d.]+)"', drawn) if float(y))
    ticks = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="14.0" class="tick"', drawn)]
    assert all(b - a >= 28 for a, b in itertools.pairwise(ticks))


def test_titles_and_numbers() -> None:
    assert title(("int8", "int8")) == "int8"
    assert title(("int4", "int8")) == "int4/int8"
    said = [nats(v) for v in (0.0, 0.31, 0.00042, 1.24e-6, 3e-7, 2.0, math.nan)]
    assert said == ["0", "0.31", "0.00042", "1.2×10⁻⁶", "3×10⁻⁷", "2.0", "—"]
    assert [power(v) for v in (10.0, 0.01, 1e-4, 5e-6)] == ["10", "0.01", "10⁻⁴", "5×10⁻⁶"]
