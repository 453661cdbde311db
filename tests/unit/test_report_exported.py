"""The report shows the files in other formats as their record has them, in both languages, whatever the record holds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_report import HOSTILE, evidence, page, sample_result, table

import detector_results as made
from lighten.report import exported as shown
from lighten.report import exported_picture as picture
from lighten.report import language, write
from lighten.report.exported import read_record, smallest
from lighten.types import Agreement, Estimate, Evidence, Exported, Latency, Precision, Result, to_json

INT8, HALF = Precision("int8", "int8"), Precision("float16", "float16")
BASE = int(44.8e6)
"""Bytes of the original of `sample_result`."""


def measured(mb: float, top1: float, ms: float, same: float, drop: float = 0.0) -> Evidence:
    got = dataclasses.replace(evidence(mb, top1, ms, drop=drop), fidelity=Agreement(500, same, 0.1, 0.2, 50.0))
    return dataclasses.replace(got, latency=(Latency(1, (ms, ms, ms)),), memory_mb=123.4)


def row(format: str, precision: Precision = INT8, status: str = "PASS", reason: str = "", **more: Any) -> Exported:
    return Exported(format, precision, status, reason, **{"original_bytes": BASE} | more)


def sample_rows() -> tuple[Exported, ...]:
    """In the order that they were exported, which is not that of the table."""
    many = tuple(f"{k} x Op{k} in float32" for k in range(2, 6))
    return (
        row("onnx", INT8, bytes=11_270_000, evidence=measured(11.27, 91.23, 1.4, 99.87, 0.51)),
        row("onnx", Precision(), bytes=BASE, evidence=measured(44.8, 91.74, 6.62, 100.0)),
        row("ncnn", INT8, bytes=11_220_000, fallbacks=many, evidence=measured(11.22, 91.2, 2.01, 99.9)),
        row("litert", INT8, "FAIL", "answers like the program on 97.1 % of 500 images, not 99.5 %", bytes=9_000_000,
            evidence=measured(9.0, 90.0, 1.9, 97.1)),
        row("coreml", HALF, "not run here", "Core ML is a part of macOS and iOS", bytes=22_400_000),
        row("mnn", INT8, "refused", "MNN has no such kernel"),
        row("executorch", INT8, "missing", "needs executorch: pip install 'lighten[executorch]'"),
        row("aoti", INT8, "failed", "the writer died (SIGSEGV)", fallbacks=("1 x add in float32",)),
    )  # fmt: skip


def record(folder: Path, content: Any) -> None:
    file = folder / "exports" / "exports.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(to_json(content)), encoding="utf-8")


def cells(html: str) -> dict[tuple[str, str], list[str]]:
    """Text of each cell of the table, by format and precision, read from the page itself."""
    body = re.search(r'<table class="exported">.*?</table>', html, re.S)
    assert body
    found = {}
    for one in re.findall(r"<tr class.*?</tr>", body[0], re.S):
        texts = [" ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in re.findall(r"<t[hd].*?</t[hd]>", one, re.S)]
        found[texts[0], texts[1]] = texts[2:]
    return found


def test_the_record_is_where_export_writes_it() -> None:
    from lighten import exports

    assert Path(exports.FOLDER) / exports.RECORD == shown.RECORD
    assert exports.Row is Exported


def test_a_run_without_exports_has_no_section(tmp_path: Path) -> None:
    for content in (None, ()):
        if content is not None:
            record(tmp_path, content)
        html, seen = page(sample_result(), tmp_path)
        assert "Other formats" not in seen.text
        assert 'class="exported"' not in html
        assert "Other formats" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_numbers_of_the_page_are_those_of_the_rows(tmp_path: Path) -> None:
    record(tmp_path, sample_rows())
    html, seen = page(sample_result(), tmp_path)
    found = cells(html)
    assert found["ONNX", "int8"][:7] == ["11.3", "25.2%", "99.87", "91.23 ± 0.42", "0.51 ± 0.11", "1.40", "123"]
    assert found["ONNX", "float32"][:3] == ["44.8", "100.0%", "100.00"]
    assert found["Core ML", "float16"][:7] == ["22.4", "50.0%", "—", "—", "—", "—", "—"]
    assert found["MNN", "int8"] == ["—"] * 7 + ["refused MNN has no such kernel"]
    assert (
        found["ExecuTorch", "int8"][-1] == "tools missing needs executorch: pip install &#39;lighten[executorch]&#39;"
    )
    assert found["AOTInductor", "int8"][-1].startswith(
        "failed the writer died (SIGSEGV) Differs from the plan: 1 x add"
    )
    assert found["LiteRT", "int8"][-1].startswith("FAIL answers like the program on 97.1 %")
    assert found["Core ML", "float16"][-1] == "not run here Core ML is a part of macOS and iOS"
    assert "on 500 report images" in seen.text


def test_rows_are_sorted_by_format_and_the_finest_precision_comes_first(tmp_path: Path) -> None:
    rows = list(sample_rows())
    random.Random(0).shuffle(rows)
    record(tmp_path, tuple(rows))
    names = list(cells(page(sample_result(), tmp_path)[0]))
    assert [n for n, _ in names] == sorted([n for n, _ in names], key=str.casefold)
    assert names.index(("ONNX", "float32")) < names.index(("ONNX", "int8"))


def test_the_smallest_file_that_passed_is_marked_and_no_other(tmp_path: Path) -> None:
    record(tmp_path, sample_rows())
    found = cells(page(sample_result(), tmp_path)[0])
    marked = [key for key, texts in found.items() if "smallest that passed" in texts[-1]]
    assert marked == [("ncnn", "int8")]  # LiteRT's is smaller, but it failed
    assert smallest([r for r in sample_rows() if r.status != "PASS"]) is None


def test_many_fallbacks_are_folded_and_few_are_said(tmp_path: Path) -> None:
    record(tmp_path, sample_rows())
    html, _ = page(sample_result(), tmp_path)
    assert "<summary>Differs from the plan: 4 kinds of operators</summary>" in html
    assert html.count("<li>3 x Op3 in float32</li>") == 1
    assert "<p>Differs from the plan: 1 x add in float32</p>" in html


def test_the_markdown_has_the_same_table(tmp_path: Path) -> None:
    record(tmp_path, sample_rows())
    for lang, title in (("en", "Other formats"), ("zh", "其他格式")):
        lines = table(write(sample_result(), tmp_path, lang=lang)[1].read_text(encoding="utf-8"), title)
        assert len(lines) == 2 + len(sample_rows())
        assert {line.count("|") for line in lines} == {11}
        assert any("11.3 | 25.2% | 99.87 | 91.23 ± 0.42 | 0.51 ± 0.11 | 1.40 | 123" in line for line in lines)


def test_the_chinese_page_says_it_in_chinese(tmp_path: Path) -> None:
    record(tmp_path, (*sample_rows(), row("openvino", INT8, pixels=True, bytes=12_000_000)))
    html, seen = page(sample_result(), tmp_path, "zh")
    for word in ("其他格式", "答案一致 %", "通过的文件中最小", "不支持", "缺少工具", "未在本机运行", "输入 uint8 像素"):
        assert word in seen.text, word
    assert "smallest that passed" not in html


# --- hostile and damaged records ----------------------------------------------------------------------


def test_hostile_rows_stay_text(tmp_path: Path) -> None:
    bad = row(HOSTILE, Precision(HOSTILE, HOSTILE), HOSTILE, f"{HOSTILE}\n| a | b |", fallbacks=(HOSTILE,) * 4)
    good = [row(f"{HOSTILE}{k}", INT8, bytes=1000, evidence=measured(1, 90, 1.0 + k, 99.9)) for k in range(3)]
    got = good[0].evidence
    assert got
    good[0] = dataclasses.replace(good[0], evidence=dataclasses.replace(got, metric_name=HOSTILE))
    record(tmp_path, (bad, *good))
    for lang in ("en", "zh"):
        html, seen = page(sample_result(), tmp_path, lang)
        assert "<script" not in html
        assert not [a for _, attrs in seen.tags for a in attrs if a.startswith("on")]
        assert seen.text.count(HOSTILE) >= 8
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert len(table(text, "Other formats" if lang == "en" else "其他格式")) == 2 + 4


@pytest.mark.parametrize(
    "content", ["", "{", '{"rows": []}', "null", "[" * 100_000, '"x"', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_one_line(tmp_path: Path, content: str) -> None:
    record(tmp_path, content)
    html, seen = page(sample_result(), tmp_path)
    assert html.count('<p class="wrong">') == 1
    assert re.search(r"exports/exports\.json cannot be read: .+ Move it away", seen.text)
    assert 'class="exported"' not in html
    assert seen.text.endswith("nothing was measured for this page.")


def test_damaged_entries_are_counted_and_the_others_shown(tmp_path: Path) -> None:
    plain = to_json(sample_rows())
    wrong = [
        {"format": "onnx"},
        7,
        None,
        {**plain[0], "bytes": "many"},
        {**plain[0], "status": {"a": 1}},
        {**plain[0], "fallbacks": [3]},
        {**plain[0], "evidence": {**plain[0]["evidence"], "latency": []}},
        {**plain[0], "evidence": {**plain[0]["evidence"], "metric": {"value": "x", "error": 1, "n": 1}}},
    ]
    record(tmp_path, [*plain, *wrong])
    html, seen = page(sample_result(), tmp_path)
    assert f"Entries of exports/exports.json that are damaged and left out: {len(wrong)}." in seen.text
    assert len(cells(html)) == len(sample_rows())


def test_entries_of_another_original_are_left_out(tmp_path: Path) -> None:
    record(tmp_path, (*sample_rows(), row("tensorrt", original_bytes=BASE + 1)))
    html, seen = page(sample_result(), tmp_path)
    assert "belong to another original model and are left out: 1." in seen.text
    assert "TensorRT" not in seen.text
    assert len(cells(html)) == len(sample_rows())


def test_numbers_that_were_not_measured_are_dashes(tmp_path: Path) -> None:
    got = dataclasses.replace(
        measured(11.0, 91.0, 2.0, 99.9), memory_mb=float("nan"), drop=Estimate(float("nan"), 0, 0)
    )
    record(tmp_path, (row("onnx", bytes=11_000_000, evidence=got),))
    found = cells(page(sample_result(), tmp_path)[0])["ONNX", "int8"]
    assert found[4].startswith("—")
    assert found[6] == "—"


def test_the_record_is_read_from_the_run_when_the_report_goes_elsewhere(tmp_path: Path) -> None:
    record(tmp_path / "run", sample_rows())
    html, _ = page(sample_result(path=str(tmp_path / "run")), tmp_path / "elsewhere")
    assert len(cells(html)) == len(sample_rows())
    assert read_record(tmp_path / "nothing") == shown.NOTHING


# --- detectors ------------------------------------------------------------------------------------------


def test_a_detector_says_boxes_and_map(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    result: Result = made.detector_result(tmp_path)
    base = result.baseline.evidence
    assert base
    got = dataclasses.replace(measured(5, 31.5, 20.0, 96.5), metric_name=base.metric_name)
    rows = (
        row("onnx", INT8, bytes=5_000_000, evidence=got),
        row(
            "onnx",
            INT8,
            "PASS",
            "412 boxes in 64 images, 99.8 % as in numpy",
            bytes=5_100_000,
            evidence=got,
            boxes=True,
        ),
    )
    record(tmp_path, [dataclasses.replace(r, original_bytes=base.size.bytes) for r in rows])
    _, seen = page(result, tmp_path)
    for words in ("Boxes again %", "mAP %", "int8, boxes out", "Files with boxes inside", "412 boxes in 64 images"):
        assert words in seen.text, words
    assert "Same answer" not in seen.text
    _, seen = page(result, tmp_path, "zh")
    for words in ("框一致 %", "int8、输出检测框", "内含检测框的文件"):
        assert words in seen.text, words
    assert "答案一致" not in seen.text
    assert "精度" not in seen.text


# --- the picture ----------------------------------------------------------------------------------------


def test_integers_in_several_formats_are_drawn_one_mark_a_file_that_passed(tmp_path: Path) -> None:
    record(tmp_path, sample_rows())
    html, _ = page(sample_result(), tmp_path)
    wide = re.findall(r'<svg viewBox="0 0 900 380".*?</svg>', html)
    assert len(wide) == 1
    tips = set(re.findall(r"<title>(.*?)</title>", wide[0]))
    assert tips == {
        "ONNX int8: 11.3 MB, 1.40 ms",
        "ONNX float32: 44.8 MB, 6.62 ms",
        "ncnn int8: 11.2 MB, 2.01 ms",
    }
    assert sorted(re.findall(r'class="note" text-anchor="start">(.*?)<', wide[0])) == ["ONNX", "ONNX", "ncnn"]


def test_integers_in_one_format_are_not_drawn(tmp_path: Path) -> None:
    record(tmp_path, sample_rows()[:2])
    assert 'viewBox="0 0 900 380"' not in page(sample_result(), tmp_path)[0]


def test_a_smaller_and_a_faster_file_lie_further_left_and_further_down() -> None:
    files = [picture.Mark("a", "int8", 4.0, 9.0, True), picture.Mark("b", "float32", 16.0, 3.0, False)]
    drawn = picture.plane(files, "MB", "ms")
    ends = [tuple(map(float, m)) for m in re.findall(r'class="leader" d="M([\d.]+) ([\d.]+)L', drawn)]
    (ax, ay), (bx, by) = ends
    assert ax < bx
    assert ay < by


def test_labels_keep_their_distance_and_move_no_more_than_they_must() -> None:
    dice = random.Random(3)
    for _ in range(50):
        places = sorted(dice.uniform(0, 300) for _ in range(dice.randint(1, 12)))
        moved = picture.apart(places, 15, -1000, 1000)
        assert all(b - a >= 15 - 1e-9 for a, b in itertools.pairwise(moved))
        clear = [k for k in range(len(places)) if all(abs(places[k] - p) > 200 for j, p in enumerate(places) if j != k)]
        assert all(moved[k] == pytest.approx(places[k]) for k in clear)
    assert picture.apart([10.0, 10.0, 10.0], 15, 0, 100) == pytest.approx([0, 15, 30])  # as -5 is outside
    assert picture.apart([50.0, 50.0], 10, 0, 100) == pytest.approx([45, 55])


# --- written again --------------------------------------------------------------------------------------


def test_the_language_is_that_of_the_page(tmp_path: Path) -> None:
    assert language(tmp_path) == "en"
    for lang in ("zh", "en"):
        write(sample_result(), tmp_path, lang=lang)
        assert language(tmp_path) == lang
    (tmp_path / "report.html").write_bytes(b"\xff\xfe\x00")
    assert language(tmp_path) == "en"


def test_export_writes_the_report_again_in_its_language(tmp_path: Path) -> None:
    from lighten import exports

    write(sample_result(), tmp_path, lang="zh")
    record(tmp_path, sample_rows())
    said: list[str] = []
    exports._report(sample_result(), tmp_path, said.append)
    assert "其他格式" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "其他格式" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert said == [f"{tmp_path / 'report.html'} shows them too."]


def test_a_report_that_cannot_be_written_does_not_fail_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lighten import exports, report

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(report, "write", broken)
    said: list[str] = []
    exports._report(sample_result(), tmp_path, said.append)
    assert len(said) == 1
    assert "no space left" in said[0]
