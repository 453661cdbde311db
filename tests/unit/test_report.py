"""The report says what the Result says, in both languages, safely, and its pictures are where the numbers are."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
import string
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import BadBundle, UnknownName
from lighten.report import Raw, charts, markdown_text, read_result, write
from lighten.report.layers import stored
from lighten.report.numbers import fixed, saved, significant
from lighten.report.texts import EN, ZH, sentence
from lighten.report.view import rows, slower_than_float, view
from lighten.types import (
    Advice,
    Agreement,
    Artifact,
    Budget,
    ClassChange,
    Device,
    Estimate,
    Evidence,
    Failure,
    Final,
    Latency,
    Miss,
    Precision,
    Preprocess,
    Recipe,
    Result,
    Size,
    Step,
    Trial,
    Weight,
    to_json,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES_ZH = ("飞机", "汽车", "鸟", "猫", "鹿", "狗", "青蛙", "马", "船", "卡车")
HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


def evidence(mb: float, top1: float, ms: float, *, drop: float = 0.0, flipped: int = 0, seed: int = 0) -> Evidence:
    """A plausible measurement: 60 readings with a slow tail, faster on 4 threads; weights that add up to the size."""
    dice = random.Random(seed)
    samples = tuple(ms * (1 + abs(dice.gauss(0, 0.02)) + (0.4 if dice.random() < 0.04 else 0)) for _ in range(60))
    size = int(mb * 1e6)
    weights = (
        Weight("conv.weight", "int8", (int(size * 0.9), 1), int(size * 0.9), 0.04),
        Weight("conv.bias", "float32", (1000,), 4000, 0.0),
    )
    return Evidence(
        metric_name="top1",
        metric=Estimate(top1, 0.42, 5000),
        drop=Estimate(drop, 0.11, 5000),
        extra=(),
        flipped=flipped,
        classes=(),
        latency=(Latency(1, samples), Latency(4, tuple(s * 0.36 for s in samples))),
        throughput=1000 / ms,
        memory_mb=mb * 1.6 + 38,
        size=Size(size, int(size * 0.92), weights),
        fidelity=Agreement(5000, 99.96, 1e-4, 2.1e-3, 62.0),
        drift=Agreement(5000, 98.4, 0.05, 1.9, 27.5),
        runtime="ONNX Runtime 1.31.1",
    )


def layers(n: int) -> tuple[dict[str, Any], ...]:
    """`n` quantized layers, the third one the worst, and one left in float."""
    rows = [
        {
            "layer": f"layer{1 + k // 4}.{k % 4}.conv",
            "op": "conv2d",
            "weights": "int8",
            "shape": (64, 64, 3, 3),
            "weight_sqnr_db": 17.25 if k == 2 else 38.0 + k % 5,
            "input_range": (-0.2, 3.4 + k),
            "range_method": "mse",
            "input_sqnr_db": 33.0 + k % 3,
        }
        for k in range(n)
    ]
    return (
        *rows,
        {"layer": "fc", "op": "linear", "weights": "float32", "reason": "the precision keeps it in float"},
    )


def sample_trials() -> tuple[Trial, ...]:
    """float16, a winning int8, an int8 that is slower than float, openvino twice, a pruned one, and a failure."""
    int8 = Precision("int8", "uint8")
    return (
        Trial(
            Recipe(precision=Precision("float16", "float16"), format="onnx"),
            evidence=evidence(22.4, 94.31, 14.1, drop=0.01, seed=1),
        ),
        Trial(
            Recipe((Step("quantize"),), int8, "onnx"),
            Artifact("artifacts/int8.onnx", "onnx", "ab" * 32),
            evidence(11.4, 94.20, 3.52, drop=0.12, flipped=61, seed=2),
            layers=layers(20),
        ),
        Trial(Recipe((), Precision(), "openvino"), evidence=evidence(44.9, 94.32, 11.4, drop=0.0, seed=3)),
        Trial(Recipe((Step("quantize"),), int8, "openvino"), evidence=evidence(11.6, 94.02, 12.2, drop=0.3, seed=4)),
        Trial(
            Recipe((Step("channel_prune", (("ratio", 0.5),)), Step("distill"), Step("quantize")), int8, "onnx"),
            evidence=evidence(4.1, 92.7, 1.61, drop=1.62, seed=5),
        ),
        Trial(
            Recipe((Step("quantize"),), Precision("int4", "uint8"), "onnx"),
            failure=Failure("export", "Opset 19 has no INT4 <Conv> kernel."),
        ),
    )


def sample_result(**changes: Any) -> Result:
    """A walk that passed, as `compress` would return it."""
    trials = sample_trials()
    after = (94.9, 97.0, 92.0, 86.1, 94.6, 89.7, 96.8, 95.8, 96.9, 96.2)
    before = (95.1, 97.1, 92.4, 88.4, 94.2, 90.1, 96.7, 96.0, 96.9, 95.9)
    whole = Result(
        verdict="PASS",
        misses=(),
        advice=(Advice("Int8 in OpenVINO is slower than its float here.", "OpenVINO 的 int8 在本机比浮点慢。"),),
        budget=Budget(max_drop=0.5, min_shrink=60, min_speedup=2.0, time_s=3600),
        device=Device("x86", "x86 laptop (VNNI)", "x86 笔记本（VNNI）", ("onnx", "openvino")),
        task="classification",
        model="resnet18",
        data="cifar10",
        classes=CLASSES,
        classes_zh=CLASSES_ZH,
        preprocess=Preprocess(64, 64),
        baseline=Trial(Recipe(), Artifact("artifacts/original.onnx", "onnx", "cd" * 32), evidence(44.8, 94.32, 13.8)),
        trials=trials,
        winner=trials[1].id,
        final=Final(
            Estimate(94.28, 0.23, 10000),
            Estimate(94.19, 0.23, 10000),
            Estimate(0.09, 0.08, 10000),
            121,
            tuple(ClassChange(n, b, a, 1000) for n, b, a in zip(CLASSES, before, after)),
        ),
        environment={"lighten": "0.1.0", "python": "3.12.3", "cpu": "Intel Xeon, 2 cores", "onnxruntime": "1.31.1"},
        command="lighten compress resnet18.safetensors --data cifar10 --device x86 --max-drop 0.5",
        images={"train": 44500, "calibrate": 500, "select": 5000, "report": 10000},
        flips=tuple(
            {
                "image": f"test/{k}.png",
                "thumbnail": f"flips/{k}.png",
                "truth": k % 10,
                "before": (k + (k % 3 == 1)) % 10,
                "after": (k + (k % 3 != 1)) % 10,
            }
            for k in range(3)
        ),
    )
    return dataclasses.replace(whole, **changes)


def failed_result() -> Result:
    """The same walk with a budget that the winner does not meet."""
    miss = Miss("min_speedup", 6.0, 3.92, "x")
    return sample_result(verdict="FAIL", misses=(miss,), budget=Budget(max_drop=0.5, min_speedup=6.0))


def hostile_result() -> Result:
    """Every text that comes from outside is an attack."""
    base = sample_result()
    classes = (HOSTILE, *CLASSES[1:])
    final = dataclasses.replace(base.final, classes=(ClassChange(HOSTILE, 95.0, 80.0, 1000), *base.final.classes[1:]))
    return dataclasses.replace(
        base,
        classes=classes,
        classes_zh=classes,
        final=final,
        model=HOSTILE,
        data=HOSTILE,
        command=f"lighten ```{HOSTILE}",
        advice=(Advice(*[f"{HOSTILE}\n| a | b |"] * 2),),
        environment={HOSTILE: HOSTILE},
        trials=(*base.trials, Trial(Recipe(format=HOSTILE), failure=Failure(HOSTILE, HOSTILE))),
        flips=({"image": f'"{HOSTILE}', "thumbnail": "flips/0.png", "truth": 0, "before": 0, "after": 1},),
    )


def png(folder: Path, name: str) -> None:
    from PIL import Image

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    raw = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(raw, "PNG")
    (folder / name).write_bytes(raw.getvalue())


class Page(HTMLParser):
    """Reads a page and fails where a tag is not closed in order; keeps tags, attributes and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def page(result: Result, folder: Path, lang: str = "en") -> tuple[str, Page]:
    html = write(result, folder, lang=lang)[0].read_text(encoding="utf-8")
    return html, Page(html)


# --- the page ---------------------------------------------------------------------------------------


def test_english_page_says_verdict_limits_and_every_trial(tmp_path: Path) -> None:
    _, seen = page(sample_result(), tmp_path)
    assert "INT8 ONNX file is 75% smaller, 3.9× faster, and loses 0.09 points of top-1." in seen.text
    assert re.search(r"Accuracy loss, at most 0\.5 points 0\.09 points ✓ kept", seen.text)
    assert re.search(r"File smaller by, at least 60% 74\.6% ✓ kept", seen.text)
    assert "Time for the search 3600 s — · limits the search, not the file" in seen.text
    assert all(trial.recipe.title in seen.text for trial in sample_result().trials)
    assert "failed: export" in seen.text
    assert "Opset 19 has no INT4 <Conv> kernel." in seen.text
    assert "Int8 in OpenVINO is slower than its float here" in seen.text
    assert "layer1.2.conv, 17.2 dB (weights)" in seen.text
    assert "Zeros do not shrink a file" in seen.text
    assert "lighten compress resnet18.safetensors" in seen.text


def test_chinese_page_is_chinese(tmp_path: Path) -> None:
    html, seen = page(sample_result(), tmp_path, "zh")
    assert '<html lang="zh-CN">' in html
    assert "INT8 ONNX 文件体积缩小 75%，速度是原来的 3.9 倍，top-1 下降 0.09 个百分点。" in seen.text
    assert all(name in seen.text for name in CLASSES_ZH)
    assert "airplane" not in seen.text
    assert "x86 笔记本（VNNI）" in seen.text
    assert "OpenVINO 的 int8 在本机比浮点慢。" in seen.text
    assert "失败：export" in seen.text
    left = {phrase for phrase in EN.values() if len(phrase) > 12 and "{" not in phrase and phrase in seen.text}
    assert left == set()


def test_a_failed_verdict_names_the_broken_limit_as_the_result_judged_it(tmp_path: Path) -> None:
    _, seen = page(failed_result(), tmp_path)
    assert re.search(r"\bFAIL\b", seen.text)
    assert "It breaks 1 of 2 limits" in seen.text
    assert "Speedup, at least 6× 3.92× ✗ missed" in seen.text
    assert "winner, breaks: speedup" in seen.text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    png(tmp_path, "flips/0.png")
    for lang in ("en", "zh"):
        html, seen = page(hostile_result(), tmp_path, lang)
        assert "<script" not in html
        assert not [tag for tag, _ in seen.tags if tag == "script"]
        assert not [a for _, attrs in seen.tags for a in attrs if a.startswith("on")]
        assert seen.text.count(HOSTILE) >= 8


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    png(tmp_path, "flips/0.png")
    html, seen = page(sample_result(), tmp_path)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", html)
    sources = [
        v for _, attrs in seen.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "data", "xlink:href")
    ]
    assert len(sources) == 1
    assert str(sources[0]).startswith("data:image/png;base64,")


def test_a_missing_or_foreign_thumbnail_is_not_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    png(run, "flips/1.png")
    png(tmp_path, "outside.png")
    (run / "flips/2.png").write_text("<svg>not a png</svg>")
    flips = (
        *sample_result().flips,
        {"image": "x", "thumbnail": "../outside.png", "truth": 0, "before": 0, "after": 1},
    )
    _, seen = page(sample_result(flips=flips), run)
    assert [tag for tag, _ in seen.tags].count("img") == 1
    assert "1 of them are shown." in seen.text
    assert "truth automobile before bird after automobile" in seen.text
    assert "now right" in seen.text


def test_thumbnails_come_from_the_run_folder_when_the_report_goes_elsewhere(tmp_path: Path) -> None:
    png(tmp_path / "run", "flips/0.png")
    _, seen = page(sample_result(path=str(tmp_path / "run")), tmp_path / "elsewhere")
    assert [tag for tag, _ in seen.tags].count("img") == 1


def test_few_layers_are_open_and_many_are_folded(tmp_path: Path) -> None:
    assert "details" in [tag for tag, _ in page(sample_result(), tmp_path)[1].tags]
    trials = list(sample_trials())
    trials[1] = dataclasses.replace(trials[1], layers=layers(3))
    _, seen = page(sample_result(trials=tuple(trials)), tmp_path)
    assert "details" not in [tag for tag, _ in seen.tags]
    assert "17.2" in seen.text


def test_many_classes_show_only_both_ends(tmp_path: Path) -> None:
    changes = tuple(ClassChange(f"class-{k:02d}-", 80.0, 80.0 + k - 30, 50) for k in range(60))
    _, seen = page(sample_result(final=dataclasses.replace(sample_result().final, classes=changes)), tmp_path)
    shown = {int(k) for k in re.findall(r"class-(\d\d)-", seen.text)}
    assert shown == {*range(20), *range(40, 60)}
    assert "20 most worsened" in seen.text


def test_the_original_may_win(tmp_path: Path) -> None:
    result = sample_result(winner=sample_result().baseline.id)
    _, seen = page(result, tmp_path)
    assert "No compressed file was chosen: the original FP32 ONNX file ships unchanged." in seen.text
    assert "smaller, " not in seen.text


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="report language"):
        write(sample_result(), tmp_path, lang="fr")
    with pytest.raises(BadBundle, match="no measurement"):
        write(sample_result(winner=sample_result().trials[-1].id), tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_that_were_not_measured_are_dashes(tmp_path: Path) -> None:
    base = sample_result()
    got = dataclasses.replace(evidence(9.0, math.nan, 3.0), memory_mb=math.nan, latency=(Latency(1, (3.0,)),))
    html, seen = page(
        dataclasses.replace(base, trials=(*base.trials[:2], Trial(Recipe(format="litert"), evidence=got))),
        tmp_path,
    )
    assert "nan" not in html.replace("nance", "").lower()
    assert "—" in seen.text


def test_a_result_read_back_gives_the_same_page(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(to_json(sample_result())), encoding="utf-8")
    again = read_result(tmp_path)
    assert again.path == str(tmp_path)
    assert page(again, tmp_path)[0] == page(sample_result(), tmp_path / "first")[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "There is no"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"schema_version": 1}', "cannot be read"),
        ('{"schema_version": 2}', "has schema version 2, not 1"),
    ],
)
def test_a_result_that_cannot_be_read_says_why(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(BadBundle, match=says):
        read_result(tmp_path)


# --- Markdown ---------------------------------------------------------------------------------------


def table(text: str, title: str) -> list[str]:
    """The lines of the table under a heading."""
    return [line for line in text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]


def test_markdown_has_a_row_for_every_trial_and_as_many_columns_in_each(tmp_path: Path) -> None:
    for lang, words in (("en", EN), ("zh", ZH)):
        text = write(sample_result(), tmp_path, lang=lang)[1].read_text(encoding="utf-8")
        lines = table(text, words["trials"])
        assert len(lines) == 2 + 1 + len(sample_result().trials)
        assert {line.count("|") for line in lines} == {14}
        assert len(table(text, words["budget"])) == 2 + 4
        assert "```sh\nlighten compress resnet18" in text


def test_markdown_shows_hostile_text_as_it_stands(tmp_path: Path) -> None:
    text = write(hostile_result(), tmp_path)[1].read_text(encoding="utf-8")
    body, fenced = text.split("````sh\n")
    assert fenced == f"lighten ```{HOSTILE}\n````\n"
    assert not re.search(r"(?<!\\)<", body)
    assert {line.count("|") - line.count("\\|") for line in table(text, "What was tried")} == {14}
    assert "\\| a \\| b \\|" in text


def test_markdown_text_escapes_all_but_raw() -> None:
    assert markdown_text("a|b\n*c*") == "a\\|b \\*c\\*"
    assert markdown_text(Raw("**b**")) == "**b**"
    assert markdown_text(3) == "3"


# --- words and numbers ------------------------------------------------------------------------------


def test_both_languages_have_the_same_words_with_the_same_blanks() -> None:
    assert EN.keys() == ZH.keys()
    for name in EN:
        blanks = [sorted({part[1] for part in string.Formatter().parse(words[name]) if part[1]}) for words in (EN, ZH)]
        assert blanks[0] == blanks[1] or name == "keeps"


@pytest.mark.parametrize(
    ("gain", "ratio", "drop", "says"),
    [
        (74.4, 3.88, 0.1, "The X file is 74% smaller, 3.9× faster, and loses 0.10 points of top-1."),
        (-12.0, 0.5, -0.25, "The X file is 12% larger, 2.0× slower, and gains 0.25 points of top-1."),
        (0.2, 1.01, 0.001, "The X file is the same size, just as fast, and keeps its top-1."),
    ],
)
def test_sentence(gain: float, ratio: float, drop: float, says: str) -> None:
    assert sentence(EN, what="X", shrink=gain, speedup=ratio, drop=drop, metric="top-1") == says


def test_numbers_as_text() -> None:
    assert [significant(v) for v in (0.01234, 4.567, 78.94, 1234.5, 0.0)] == [
        "0.0123",
        "4.57",
        "78.9",
        "1,234",
        "0",
    ]
    assert [fixed(v) for v in (-0.1, -0.001, math.nan)] == ["−0.10", "0.00", "—"]
    assert [saved(v) for v in (74.44, -5.0, 0.0)] == ["−74.4%", "+5.0%", "0.0%"]


def test_a_broken_limit_never_looks_kept() -> None:
    result = sample_result(
        verdict="FAIL", misses=(Miss("max_size_mb", 11.4, 11.4004, " MB"),), budget=Budget(max_size_mb=11.4)
    )
    row = view(result, "en", {})["limits"][0]
    assert (row["wanted"], row["got"], row["mark"]) == ("11.4 MB", "11.400 MB", "missed")


def test_status_of_each_trial() -> None:
    assert [row.kind for row in rows(sample_result(), EN)] == [
        "original",
        "outside",
        "winner",
        "outside",
        "outside",
        "outside",
        "failed",
    ]
    assert [row.status for row in rows(sample_result(), EN)][4:6] == ["breaks: speedup", "breaks: accuracy"]
    assert rows(sample_result(), EN)[4].warning == "slower than float: not advised on this machine"


def test_slower_than_float_compares_within_one_format() -> None:
    result = sample_result()
    assert [slower_than_float(trial, result) for trial in result.trials] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    without = dataclasses.replace(result, trials=(*result.trials[:2], *result.trials[3:]))
    assert not slower_than_float(result.trials[3], without)


def test_stored_counts_zeros_over_values() -> None:
    weights = (
        Weight("a", "int8", (10, 9), 90, 0.1),
        Weight("b", "int8", (10,), 10, 1.0),
        Weight("c", "float32", (75,), 300, 0.0),
    )
    assert [(row["dtype"], row["tensors"], row["size"], row["percent"], row["zeros"]) for row in stored(weights)] == [
        ("float32", 1, 300, 75.0, "0.0%"),
        ("int8", 2, 100, 25.0, "19.0%"),
    ]


# --- pictures ---------------------------------------------------------------------------------------


def test_axes() -> None:
    assert charts.linear(0, 10, 100, 200)(2.5) == 125
    assert charts.logarithmic(1, 100, 0, 200)(10) == pytest.approx(100)
    assert charts.nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert charts.nice_ticks(93.9, 94.6) == [94.0, 94.2, 94.4, 94.6]
    assert charts.log_ticks(1, 30) == [1, 2, 5, 10, 20]
    assert charts.log_ticks(11, 13) == [11, 11.5, 12, 12.5, 13]


def point(x: float, y: float, label: str = "p", kind: str = "inside") -> charts.Point:
    return charts.Point(label, "#1", x, y, 0.0, kind)


def test_front_keeps_what_nothing_beats() -> None:
    a, b, c, d, e = point(1, 80), point(2, 90), point(3, 85), point(4, 95), point(4, 94)
    assert charts.front([e, d, c, b, a]) == [a, b, d]


def test_scatter_places_points_by_hand() -> None:
    # Two points 1 and 100 on x, 80 and 90 on y. x: pad = 100^0.14, so the ends lie 0.14 / 1.28 of the way in from
    # 50..526; y: pad = 0.12 * 10, so they lie 1.2 / 12.4 of the way in from 358..30.
    svg = charts.scatter([point(1, 80), point(100, 90)], x_title="x", y_title="y", width=540, height=400)
    dots = [(float(x), float(y)) for x, y in re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)]
    left, low = 476 * 0.14 / 1.28, 328 * 1.2 / 12.4
    assert sorted(dots) == [
        (pytest.approx(50 + left, abs=0.06), pytest.approx(358 - low, abs=0.06)),
        (pytest.approx(526 - left, abs=0.06), pytest.approx(30 + low, abs=0.06)),
    ]
    assert f'class="front" d="M{50 + left:.1f} {358 - low:.1f}H{526 - left:.1f}V{30 + low:.1f}"' in svg


def test_scatter_points_below_the_floor_become_arrows_and_do_not_flatten_the_rest() -> None:
    svg = charts.scatter([point(1, 94), point(2, 95), point(3, 10)], x_title="x", y_title="y", floor=88)
    assert svg.count("<circle") == 2
    assert "h12l-6 10z" in svg
    assert min(float(v) for v in re.findall(r'class="tick" text-anchor="end">([\d.]+)<', svg)) > 93


def test_scatter_draws_a_limit_only_where_it_lies_in_the_picture() -> None:
    two = [point(1, 94), point(10, 95)]
    inside = charts.scatter(two, x_title="x", y_title="y", x_limit=3.0, y_limit=94.5, limit_text="budget")
    assert inside.count('class="limit"') == 2
    assert (
        charts.scatter(two, x_title="x", y_title="y", x_limit=300.0, y_limit=20.0, limit_text="budget").count(
            'class="limit"'
        )
        == 0
    )


def test_labels_neither_overlap_nor_leave_the_picture() -> None:
    dice = random.Random(3)
    area = (0.0, 0.0, 500.0, 300.0)
    spots = [(dice.uniform(20, 480), dice.uniform(20, 280)) for _ in range(25)]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    asks = [charts.Ask(spot, ("channel prune + int8 · onnx", f"#{k}")) for k, spot in enumerate(spots)]
    notes = [n for n in charts.place(asks, taken, area) if n]
    boxes = [n.box for n in notes]
    assert len(notes) > 15
    assert not any(charts.overlap(a, b) for k, a in enumerate(boxes) for b in [*boxes[:k], *taken])
    assert all(b[0] >= 0 and b[1] >= 0 and b[2] <= 500 and b[3] <= 300 for b in boxes)
    assert {n.text for n in notes} & {f"#{k}" for k in range(25)}


def test_strips_by_hand() -> None:
    # 1..9 ms and p95 = 8.6, so the axis ends at 1.12 * 8.6 = 9.632; the name takes 24 + 7.2, so the plot is 31.2..816.
    svg = charts.strips([charts.Strip("a", tuple(float(k) for k in range(1, 10)), "winner", "5.00")], width=900)
    scale = (816 - 31.2) / 9.632
    assert f'class="median" d="M{31.2 + 5 * scale:.1f} 11.0v20"' in svg
    assert f'class="box" x="{31.2 + 3 * scale:.1f}" y="14.0" width="{4 * scale:.1f}"' in svg
    assert len(re.findall(r"v14", svg)) == 9
    assert "›" not in svg


def test_strips_count_what_is_off_the_axis() -> None:
    svg = charts.strips([charts.Strip("a", (*([2.0] * 50), 40.0, 50.0), "inside", "2.00")], width=900)
    assert "+2›" in svg
    assert len(re.findall(r"v14", svg)) == 1


def test_diverging_by_hand() -> None:
    # "cat" takes 3 * 7.2 = 21.6, so the plot runs from 31.6 to 792 with zero at 411.8; 5 points are 380.2 pixels.
    changes = [charts.Change("cat", 88.0, 86.0, 100), charts.Change("dog", 90.0, 91.0, 100)]
    svg = charts.diverging(changes, reach=5, width=900)
    assert 'class="worse"' in svg
    assert '<rect class="bar" x="259.7" y="6.0" width="152.1"' in svg
    assert '<rect class="bar" x="411.8" y="30.0" width="76.0"' in svg
    assert [charts.extent(changes), charts.extent([]), charts.extent([charts.Change("a", 90, 10, 1)])] == [
        2,
        1,
        100,
    ]


def test_meter_by_hand() -> None:
    widths = [
        re.findall(r'class="fill" width="([\d.]+)"', charts.meter(v, 50))[0] for v in (25, 80, -3, math.nan, math.inf)
    ]
    assert widths == ["32.0", "64.0", "0.0", "0.0", "0.0"]


def test_text_is_cut_to_the_room_it_has() -> None:
    assert charts.text_width("ab", 10) == 12
    assert charts.text_width("飞机", 10) == 20
    assert charts.shorten("airplane", 100, 10) == "airplane"
    assert charts.shorten("airplane", 36, 10) == "air…e"
    assert charts.text_width(charts.shorten("飞机" * 20, 50, 10), 10) <= 50
