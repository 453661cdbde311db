"""What the report says of narrowed networks, predictions, short trials and time, held to hand-made cases and scipy."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_report import HOSTILE, evidence, layers, page, sample_result, table

from lighten.report import charts, drawings, write
from lighten.report.foresight import error, predicted_damage, ranked, spearman
from lighten.report.narrowed import aligned, count, typical_shares
from lighten.report.recipes import detail, made, settings, widths_of
from lighten.report.spent import duration, said
from lighten.report.texts import EN, ZH
from lighten.report.view import rows
from lighten.types import (
    Artifact,
    Budget,
    ChannelGroup,
    Estimate,
    Failure,
    LayerShape,
    Precision,
    Predicted,
    Recipe,
    Result,
    Step,
    Trial,
    WidthCost,
    from_json,
    to_json,
)

INT8 = Precision("int8", "int8")
STAGES = (("layer1", 64, 16), ("layer2", 128, 8), ("layer3", 256, 4), ("layer4", 512, 2))


# --- a narrowed ResNet-18, by hand ------------------------------------------------------------------


def resnet(widths: dict[str, int] | None = None) -> tuple[LayerShape, ...]:
    """ResNet-18 at 64 pixels; `widths` narrow the inside of a block (layer1.0.conv1) or a stage (layer1)."""
    kept = widths or {}
    stem = kept.get("layer1", 64)
    found = [conv("conv1", 3, stem, 7, 2, 64)]
    last, size = stem, 16
    for stage, channels, _ in STAGES:
        wide = kept.get(stage, channels)
        for k in range(2):
            stride = 2 if k == 0 and stage != "layer1" else 1
            inside = kept.get(f"{stage}.{k}.conv1", channels)
            found.append(conv(f"{stage}.{k}.conv1", last, inside, 3, stride, size))
            found.append(conv(f"{stage}.{k}.conv2", inside, wide, 3, 1, size // stride))
            if stride == 2:
                found.append(conv(f"{stage}.{k}.downsample.0", last, wide, 1, 2, size))
            last, size = wide, size // stride
    return (*found, LayerShape("fc", "linear", last, 10))


def conv(name: str, inputs: int, outputs: int, kernel: int, stride: int, size: int) -> LayerShape:
    pad = kernel // 2
    return LayerShape(
        name, "conv", inputs, outputs, (kernel,) * 2, (stride,) * 2, (pad,) * 2, (1, 1), source=(size,) * 2, bias=False
    )


def groups() -> tuple[ChannelGroup, ...]:
    """Four stages and the inside of eight blocks: 12 groups."""
    found = []
    for stage, channels, _ in STAGES:
        lead = "conv1" if stage == "layer1" else f"{stage}.0.conv2"
        found.append(ChannelGroup(lead, channels, ((lead, 1),), ((f"{stage}.1.conv1", 1),)))
        for k in range(2):
            name = f"{stage}.{k}.conv1"
            found.append(ChannelGroup(name, channels, ((name, 1),), ((f"{stage}.{k}.conv2", 1),)))
    return tuple(found)


def width_costs() -> tuple[WidthCost, ...]:
    """Stages hurt more than insides, the first layers most; a quarter hurts about five times as much as a half."""
    dice, rows = random.Random(1), []
    for k, g in enumerate(groups()):
        harm = (0.09 if g.name.endswith("conv2") or g.name == "conv1" else 0.012) * 0.8**k * dice.uniform(0.6, 1.5)
        for share, factor in ((2, 1.0), (4, 5.0)):
            drop = Estimate(60 * harm * factor, 0.4 + 2 * harm, 256)
            rows.append(WidthCost(g.name, g.channels // share, harm * factor, drop))
    return tuple(rows)


def plan(share: float, seed: int) -> tuple[tuple[str, int], ...]:
    dice = random.Random(seed)
    return tuple(
        (g.name, max(8, round(g.channels * share * dice.uniform(0.5, 1.4) / 8) * 8)) for g in groups() if g.channels > 8
    )


def recipe(widths: tuple[tuple[str, int], ...], epochs: float, seconds: float, format: str = "onnx") -> Recipe:
    steps = (
        Step("channel_prune", (("widths", widths),)),
        Step("distill", (("epochs", epochs), ("seconds", seconds))),
        Step("quantize"),
    )
    fc = (("layer4.0.conv1", "int4", "int8"), ("layer4.1.conv1", "int4", "int8"))
    return Recipe(steps, Precision("int8", "int8", fc), format)


def kept_network(widths: tuple[tuple[str, int], ...]) -> tuple[LayerShape, ...]:
    """The groups' names as `resnet` takes them."""
    stages = {"conv1": "layer1", **{f"{stage}.0.conv2": stage for stage, *_ in STAGES[1:]}}
    return resnet({stages.get(name, name): w for name, w in widths})


def narrowed_result(**changes: object) -> Result:
    """A walk that had to narrow: quantized files first, four short trials, two long ones; twelve trials in all."""
    plans = [plan(share, seed) for seed, share in enumerate((0.30, 0.34, 0.24, 0.38))]
    short = [recipe(p, 1.0, 72.0) for p in plans]
    long = [recipe(plans[1], 60.0, 1860.0, f) for f in ("onnx", "openvino")]
    rows_ = ((1.44, 89.1, 1.21), (1.61, 90.4, 1.33), (0.98, 86.2, 0.97), (2.32, 89.9, 1.70))
    probes = tuple(
        Trial(
            r,
            evidence=evidence(mb, top1, ms, drop=94.32 - top1, seed=20 + k),
            build_s=78.0 + k,
            measure_s=6.0,
            notes=("distill: stopped after 72 s, at 0.8 of 1 epoch",),
            predicted=Predicted(mb * 1e6 * 0.985, ms * (1.04, 0.93, 1.31, 0.9)[k]),
            network=kept_network(plans[k]),
        )
        for k, (r, (mb, top1, ms)) in enumerate(zip(short, rows_))
    )
    winner = Trial(
        long[0],
        Artifact("artifacts/narrow.onnx", "onnx", "ef" * 32),
        evidence(1.61, 93.94, 1.31, drop=0.38, flipped=240, seed=31),
        build_s=1884.0,
        measure_s=9.0,
        layers=layers(6),
        notes=(
            "distill: the loss was not finite in epoch 7: back to epoch 6 with the learning rate halved to 0.01",
            "distill: trained 38.4 epochs in 1860 s",
        ),
        predicted=Predicted(1.59e6, 1.24),
        network=kept_network(plans[1]),
    )
    other = dataclasses.replace(
        winner,
        recipe=long[1],
        artifact=None,
        evidence=evidence(1.73, 93.9, 1.02, drop=0.42, seed=32),
        predicted=Predicted(1.68e6, 0.99),
        notes=(),
        build_s=12.0,
    )
    sparse = Trial(
        Recipe((Step("sparsify", (("pattern", "2:4"),)), Step("quantize")), INT8, "onnx"),
        evidence=evidence(11.4, 93.1, 3.5, drop=1.22, seed=33),
        notes=("sparsify: zeros do not shrink a dense file and do not speed it up",),
    )
    died = Trial(
        Recipe((Step("low_rank"), Step("quantize")), INT8), failure=Failure("build", "The worker died: killed.")
    )
    base = sample_result()
    kept = tuple(t for t in base.trials if not t.recipe.complexity and t.evidence)
    whole = dataclasses.replace(
        base,
        budget=Budget(max_drop=0.5, min_shrink=95, min_speedup=8, time_s=3600),
        baseline=dataclasses.replace(base.baseline, network=resnet()),
        trials=(*kept, sparse, died, *probes, winner, other),
        winner=winner.id,
        groups=groups(),
        widths=width_costs(),
        spent=(
            ("weigh-in", 21.0),
            ("sensitivity", 84.5),
            ("trials", 133.0),
            ("probes", 345.0),
            ("training", 1860.0),
            ("report images", 96.0),
        ),
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


HEADINGS = ("made", "narrowed", "matter", "predicted", "small_first", "spent")


def section(result: Result, folder: Path, name: str, lang: str = "en") -> str:
    html, _ = page(result, folder, lang)
    heading = f"<h2>{(EN if lang == 'en' else ZH)[name]}</h2>"
    return next((s for s in re.findall(r"<section>.*?</section>", html, re.S) if heading in s), "")


# --- the page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_section_is_there_in_both_languages_and_none_for_a_plain_walk(tmp_path: Path, lang: str) -> None:
    words = EN if lang == "en" else ZH
    html, seen = page(narrowed_result(), tmp_path, lang)
    assert [name for name in HEADINGS if f"<h2>{words[name]}</h2>" not in html] == []
    if lang == "zh":
        assert not [p for p in EN.values() if len(p) > 12 and "{" not in p and p in seen.text]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [name for name in HEADINGS if f"## {words[name]}\n" not in text] == []
    plain, _ = page(sample_result(), tmp_path, lang)
    assert [name for name in HEADINGS if words[name] in plain] == []
    assert [name for name in HEADINGS if words[name] in (tmp_path / "report.md").read_text(encoding="utf-8")] == []


def test_markdown_tables_have_as_many_cells_in_every_row(tmp_path: Path) -> None:
    text = write(narrowed_result(), tmp_path)[1].read_text(encoding="utf-8")
    for name, cells in (("matter", 7), ("predicted", 8), ("small_first", 6)):
        lines = table(text, EN[name])
        assert {line.count("|") for line in lines} == {cells + 1}, name
    assert len(table(text, EN["matter"])) == 2 + 12
    assert len(table(text, EN["predicted"])) == 2 + 6
    assert len(table(text, EN["small_first"])) == 2 + 4
    assert {line.count("|") for line in table(text, EN["narrowed"])} == {5, 7}


def test_a_result_read_back_from_json_gives_the_same_page(tmp_path: Path) -> None:
    again = from_json(Result, to_json(narrowed_result()))
    assert page(again, tmp_path)[0] == page(narrowed_result(), tmp_path / "other")[0]


def test_nothing_prints_the_settings_as_they_are_stored(tmp_path: Path) -> None:
    html, _ = page(narrowed_result(), tmp_path)
    for text in (html, (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert "((" not in text
        assert "('" not in text
        assert "(&#39;" not in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    result = narrowed_result()
    bad = dataclasses.replace(
        result,
        groups=(dataclasses.replace(result.groups[0], name=HOSTILE), *result.groups[1:]),
        widths=(WidthCost(HOSTILE, 32, 0.5), *result.widths[2:]),
        baseline=dataclasses.replace(
            result.baseline, notes=(HOSTILE,), network=(dataclasses.replace(resnet()[0], name=HOSTILE), *resnet()[1:])
        ),
        spent=((HOSTILE, 3.0),),
    )
    for lang in ("en", "zh"):
        html, seen = page(bad, tmp_path, lang)
        assert "<script" not in html
        assert seen.text.count(HOSTILE) >= 5


def test_short_trials_are_marked_and_faint_but_the_winner_never(tmp_path: Path) -> None:
    html, seen = page(narrowed_result(), tmp_path)
    assert html.count('<span class="chip short">short trial</span>') == 4
    assert EN["short_trials_line"] in seen.text
    assert [row.mark for row in rows(narrowed_result(), EN)][7:13] == ["probe"] * 4 + ["winner", "inside"]
    probe = narrowed_result().trials[6]
    assert [row.mark for row in rows(narrowed_result(winner=probe.id), EN)][7] == "winner"
    assert EN["short_trials_line"] not in page(sample_result(), tmp_path)[1].text


def test_notes_stand_under_their_trial(tmp_path: Path) -> None:
    html, _ = page(narrowed_result(), tmp_path)
    body = html.split('<table class="trials">')[1].split("</table>")[0]
    after = body.split('<th scope="row" data-no="11">')[1]
    assert "back to epoch 6 with the learning rate halved" in after.split('data-no="12"')[0]
    assert body.count('<tr class="notes') == 6
    assert "- **#5**: sparsify: zeros do not shrink" in (tmp_path / "report.md").read_text(encoding="utf-8")


# --- recipes ------------------------------------------------------------------------------------------

CHANNELS = {"a": 64, "b": 128, "c": 32, "d": 16, "e": 8}
WIDTHS = (("a", 48), ("b", 32), ("c", 16), ("d", 15))


def test_widths_are_summarised_with_the_most_narrowed_first() -> None:
    step = Step("channel_prune", (("importance", "l2"), ("widths", WIDTHS)))
    assert settings(step, CHANNELS, EN) == "4 groups: b 128 → 32, c 32 → 16, a 64 → 48, … and 1 more, importance l2"
    assert settings(step, {}, EN).startswith("4 groups: a ? → 48")
    assert settings(Step("quantize"), {}, EN) == "default settings"
    assert settings(Step("distill", (("epochs", 10.0), ("lr", 0.02), ("seconds", 0.0))), {}, EN) == "epochs 10, lr 0.02"
    assert settings(Step("x", (("keep", ("a", "b", "c", "d")),)), {}, EN) == "keep a, b, c, … and 1 more"


def test_detail_counts_the_channels_that_are_kept_of_all_groups() -> None:
    steps = (Step("channel_prune", (("widths", WIDTHS),)), Step("distill", (("epochs", 1.0),)), Step("quantize"))
    # 48 + 32 + 16 + 15, and the 8 of e that nobody narrowed, of 248.
    assert detail(Recipe(steps), CHANNELS, EN) == "channel prune: keeps 119 of 248 channels; distill: epochs 1"
    assert detail(Recipe((Step("quantize"),)), CHANNELS, EN) == ""


def test_a_plain_quantized_winner_needs_no_section_of_its_own() -> None:
    assert made(Recipe((Step("quantize"),), INT8), {}, EN) == []
    shown = made(Recipe((Step("quantize"),), Precision("int8", "int8", (("fc", "int4", "int8"),))), {}, EN)
    assert shown[-1] == ("precision", "int8 (1 layer otherwise) · onnx: fc int4/int8")


@pytest.mark.parametrize("bad", [5, "ab", (("a",),), (("a", "x"),)])
def test_widths_that_are_none_are_left_alone(bad: object) -> None:
    assert widths_of(Step("channel_prune", (("widths", bad),))) == {}


# --- the network --------------------------------------------------------------------------------------


def test_the_resnet_of_these_tests_has_the_published_counts() -> None:
    """He et al. (2016): 11.69 M parameters at 1000 classes, of which 11.16 M are in convolutions."""
    convs = [s for s in resnet() if s.op == "conv"]
    assert sum(s.weights for s in convs) == 11_166_912
    assert len(convs) == 20


def test_totals_by_hand(tmp_path: Path) -> None:
    small = tuple(conv(n, i, o, 3, 1, 4) for n, i, o in (("a", 4, 10), ("b", 10, 20)))
    less = tuple(conv(n, i, o, 3, 1, 4) for n, i, o in (("a", 4, 5), ("b", 5, 20)))
    result = narrowed_result()
    trials = tuple(dataclasses.replace(t, network=less) if t.id == result.winner else t for t in result.trials)
    base = dataclasses.replace(result.baseline, network=small)
    shown = section(dataclasses.replace(result, baseline=base, trials=trials), tmp_path, "narrowed")
    # Weights 360 + 1800 = 2160, then 180 + 900 = 1080; MACs are 16 times as many; channels 30, then 25.
    for name, before, after, change in (
        ("Weights", "2.16 k", "1.08 k", "−50.0%"),
        ("MACs an image", "34.6 k", "17.3 k", "−50.0%"),
        ("Channels, all layers", "30", "25", "−16.7%"),
    ):
        row = f'<td>{name}</td><td class="n">{before}</td><td class="n got">{after}</td><td class="n">{change}</td>'
        assert row in shown
    assert "Layers</td>" not in shown
    assert shown.count("<title>a: 10 → 5 · 5.76 k → 2.88 k</title>") == 2


def test_an_unchanged_network_is_not_shown(tmp_path: Path) -> None:
    result = narrowed_result()
    trials = tuple(dataclasses.replace(t, network=resnet()) if t.id == result.winner else t for t in result.trials)
    assert section(dataclasses.replace(result, trials=trials), tmp_path, "narrowed") == ""
    without = dataclasses.replace(result, baseline=dataclasses.replace(result.baseline, network=()))
    assert section(without, tmp_path, "narrowed") == ""


def test_new_layers_stand_after_the_one_before_them_and_lost_ones_where_they_were() -> None:
    a, b, c = (conv(n, 4, 4, 1, 1, 4) for n in "abc")
    b0, b1 = (dataclasses.replace(b, name=f"b.{k}") for k in range(2))
    names = [(x and x.name, y and y.name) for x, y in aligned((a, b, c), (a, b0, b1, c))]
    assert names == [("a", "a"), (None, "b.0"), (None, "b.1"), ("b", None), ("c", "c")]
    assert aligned((a,), ()) == [(a, None)]


def test_layer_bars_by_hand() -> None:
    # Names take 7.2, so the bars begin at 19.2; the pair "100 → 25" and the percent stand right of them.
    svg = drawings.layers([drawings.Kept("a", (100, 25), (800, 200), "800 → 200")], width=350, titles=("c", "m", "%"))
    pair = charts.text_width("100 → 25", 11)
    full = 350 - pair - 52 - 19.2
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert [b[:2] for b in bars] == [("had", "19.2"), ("keeps", "19.2")]
    assert [float(b[2]) for b in bars] == [pytest.approx(full, abs=0.06), pytest.approx(full / 4, abs=0.06)]
    assert ">25%<" in svg
    wide = drawings.layers([drawings.Kept("a", (100, 0), (800, 0), "gone")], width=900, titles=("c", "m", "%"))
    assert re.findall(r'class="keeps"[^>]* width="([\d.]+)"', wide) == ["0.0", "0.0"]
    assert drawings.layers([], width=900, titles=("", "", "")) == ""


def test_counts_as_people_read_them() -> None:
    assert [count(n) for n in (0, 999, 1000, 9_437_184, 1_820_000_000)] == ["0", "999", "1.00 k", "9.44 M", "1.82 G"]


# --- channel groups -----------------------------------------------------------------------------------


def test_every_group_is_drawn_and_listed_with_its_damages_and_the_kept_width(tmp_path: Path) -> None:
    result = narrowed_result()
    shown = section(result, tmp_path, "matter")
    kept = dict(plan(0.34, 1))
    for g in groups():
        half, quarter = (r for r in width_costs() if r.group == g.name)
        assert shown.count(f"<title>{g.name}: {half.width}/{g.channels} ") == 2
        cells = re.findall(rf'<th scope="row">{re.escape(g.name)}</th>(.*?)</tr>', shown)[0]
        assert f"({half.width})" in cells
        assert f"({quarter.width})" in cells
        assert cells.endswith(f'<td class="n">{kept[g.name]}</td>')
    worst = max(width_costs(), key=lambda r: r.damage)
    assert f"Most sensitive: {worst.group}, " in shown
    assert shown.count('<circle class="kept"') == 2 * 12 + 1  # each picture, and the legend


def test_groups_measured_at_fewer_widths_join_the_nearest_share() -> None:
    known = {n: ChannelGroup(n, c, ((n, 1),), ()) for n, c in (("a", 64), ("b", 48), ("c", 16))}
    found = {"a": [WidthCost("a", 32, 1), WidthCost("a", 16, 1)], "b": [WidthCost("b", 24, 1), WidthCost("b", 16, 1)]}
    assert typical_shares({**found, "c": [WidthCost("c", 8, 1)]}, known) == [0.5, pytest.approx((1 / 4 + 1 / 3) / 2)]


def test_a_winner_that_is_not_narrowed_has_no_kept_widths(tmp_path: Path) -> None:
    shown = section(narrowed_result(winner=narrowed_result().trials[1].id), tmp_path, "matter")
    assert '<circle class="kept"' not in shown
    assert EN["chosen"] not in shown
    assert shown.count('<th scope="row">') == 12


def test_damages_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    rows_ = (WidthCost("conv1", 16, math.inf), WidthCost("conv1", 32, 0.2), WidthCost("nobody", 4, 9.0))
    shown = section(narrowed_result(widths=rows_), tmp_path, "matter")
    assert "inf" not in shown
    assert "nobody" not in shown
    assert shown.count('<th scope="row">') == 1


# --- predictions and probes ---------------------------------------------------------------------------


def test_error_is_percent_of_what_was_measured() -> None:
    assert error(1.5, 1.2) == pytest.approx(25)
    assert error(0.9, 1.2) == pytest.approx(-25)
    assert math.isnan(error(1.0, 0.0))


def test_predictions_are_counted_within_a_quarter(tmp_path: Path) -> None:
    shown = section(narrowed_result(), tmp_path, "predicted")
    assert "Size: 6 of 6 within 25%. Latency: 5 of 6 within 25%." in shown
    assert shown.count('<tr><td class="no">') == 6
    without = tuple(
        dataclasses.replace(t, predicted=Predicted(t.predicted.bytes) if t.predicted else None)
        for t in narrowed_result().trials
    )
    shown = section(narrowed_result(trials=without), tmp_path, "predicted")
    assert "Latency" not in shown
    assert shown.count('class="chart"') == 2  # one plane, wide and narrow


def test_parity_by_hand() -> None:
    # Values 1 and 4: the domain is widened by 1.3, as 4^0.1 is less; x runs over 50..426, y over 316.8..30.
    pairs = [drawings.Pair("#1", "inside", 1.0, 4.0), drawings.Pair("#2", "inside", 4.0, 4.0)]
    svg = drawings.parity(pairs, x_title="x", y_title="y", within=25, width=440)
    lo, span = math.log(1 / 1.3), math.log(4 * 1.3**2)
    x, y = (lambda v: 50 + (math.log(v) - lo) / span * 376), (lambda v: 318.8 - (math.log(v) - lo) / span * 288.8)
    dots = {(float(a), float(b)) for a, b in re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)}
    assert dots == {(round(x(1), 1), round(y(4), 1)), (round(x(4), 1), round(y(4), 1))}
    corners = re.findall(r'points="([^"]+)"', svg)[0].split()
    hi = 4 * 1.3
    # measured = predicted / 0.75 leaves the picture at its top where 0.75 hi was predicted.
    assert corners[2] == f"{x(0.75 * hi):.1f},{y(hi):.1f}"
    assert corners[4] == f"{x(hi):.1f},{y(hi / 1.25):.1f}"
    assert drawings.parity([drawings.Pair("", "inside", 0, 1)], x_title="", y_title="", within=25) == ""


def test_ranks_and_spearman_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    dice = random.Random(5)
    for n in (3, 4, 7, 20):
        xs, ys = ([round(dice.random(), 1) for _ in range(n)] for _ in range(2))
        xs[0] = xs[1] + 1  # never all the same
        ys[0] = ys[1] + 1
        assert ranked(xs) == list(stats.rankdata(xs))
        assert spearman(xs, ys) == pytest.approx(stats.spearmanr(xs, ys).statistic)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_probes_are_ranked_by_prediction_and_by_measurement(tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    result = narrowed_result()
    shown = section(result, tmp_path, "small_first")
    probes = result.trials[6:10]
    harm = [predicted_damage(result, t.recipe) for t in probes]
    got = [-t.evidence.metric.value for t in probes if t.evidence]
    rho = stats.spearmanr(harm, got).statistic
    assert f"over 4 short trials: {rho:.2f}" in shown
    assert re.findall(r'<td class="n">(\d)</td></tr>', shown) == ["3", "1", "4", "2"]
    # One of four plans was trained long, for 1884 s; the probes took 78..81 s and 6 s each.
    assert "3 of 4 plans were not trained long: at 31.4 min each that saved 94.2 min" in shown
    assert "short trials that took 5.7 min in all" in shown


def test_predicted_damage_by_hand() -> None:
    # The curve of one row through the origin: 0.3 at a half is 0.3 x (1 / share - 1); a quarter costs three times that.
    one = dataclasses.replace(narrowed_result(), groups=groups()[:1], widths=(WidthCost("conv1", 32, 0.3),))
    assert predicted_damage(one, recipe((("conv1", 16),), 1.0, 0.0)) == pytest.approx(0.9)
    assert predicted_damage(dataclasses.replace(one, widths=()), recipe((("conv1", 16),), 1.0, 0.0)) is None


def test_two_probes_are_only_said_to_be_in_order_or_not_and_one_is_no_comparison(tmp_path: Path) -> None:
    trials = narrowed_result().trials
    two = section(narrowed_result(trials=(*trials[:8], *trials[10:])), tmp_path, "small_first")
    assert (EN["order_right"] in two) != (EN["order_wrong"] in two)
    assert "Rank correlation" not in two
    one = (*trials[:6], trials[7], *trials[10:])  # the one that was trained long: nothing was saved either
    assert section(narrowed_result(trials=one), tmp_path, "small_first") == ""


# --- time ---------------------------------------------------------------------------------------------


def test_time_is_beside_what_was_allowed() -> None:
    assert said(2700, 3600, EN) == "45 min of the 60 min allowed: the time was kept."
    assert said(3960, 3600, EN) == "66 min where 60 min were allowed: 10% over."
    assert said(3960, None, ZH) == "共 66 分钟；没有设置时间限制。"
    assert [duration(s, EN) for s in (0.5, 119, 120, 7199, 9000)] == ["0.5 s", "119 s", "2 min", "120 min", "2.5 h"]


def test_parts_of_time_by_hand(tmp_path: Path) -> None:
    result = narrowed_result(
        spent=(("weigh-in", 30.0), ("training", 45.0), ("training", 15.0), ("own", 10.0), ("x", 0.0))
    )
    shown = section(result, tmp_path, "spent")
    found = re.findall(r"</i>([^<]+)<b>([^<]+)</b><small>(\d+)%", shown)
    assert found == [("measuring the original", "30 s", "30"), ("long trials", "60 s", "60"), ("own", "10 s", "10")]
    wide = drawings.stack([("a", 30.0, 0), ("b", 70.0, 1)], 902, 200.0, "200 s")
    bars = re.findall(r'class="part p\d" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', wide)
    assert bars == [("0.0", "134.0"), ("135.0", "314.0")]  # 4.5 pixels a second, one pixel between
    assert 'class="limit" d="M900.0 ' in wide
    assert drawings.stack([], 900, None, "") == ""


def test_the_limit_on_time_shows_what_was_spent(tmp_path: Path) -> None:
    _, seen = page(narrowed_result(), tmp_path)
    assert "Time for the search 3600 s 2,540 s · limits the search, not the file" in seen.text
