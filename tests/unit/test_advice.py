"""Advice on narrowing says what the numbers given to it say, in both languages, and nothing where nothing was measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_report import evidence

from lighten.advice import narrowing, seen_before
from lighten.types import ChannelGroup, Estimate, Precision, Predicted, Recipe, Size, Step, Trial, Weight, WidthCost

INT8 = Precision("int8", "int8")
GROUPS = tuple(ChannelGroup(name, n, ((name, 1),), ()) for name, n in (("stem", 64), ("wide", 512), ("small", 16)))
# Per step of 1 / share kept: stem 0.1 / 1, wide 0.02 / 1, small 0.16 / 1. The quarter of stem is no fair comparison.
WIDTHS = (
    WidthCost("stem", 16, 0.9),
    WidthCost("stem", 32, 0.1),
    WidthCost("wide", 256, 0.02),
    WidthCost("small", 8, 0.16),
    WidthCost("small", 4, float("inf")),
)


def narrow(*widths: tuple[str, int]) -> Recipe:
    return Recipe((Step("channel_prune", (("widths", widths),)), Step("quantize")), INT8)


def test_names_the_most_sensitive_group_and_the_one_narrowed_most() -> None:
    (said,) = narrowing(GROUPS, WIDTHS, narrow(("wide", 64), ("stem", 48)), ())
    assert "those of small: 0.16 nats an image at 8 of 16; the winner leaves them whole" in said.en
    assert "Narrowed most was wide, 512 to 64; alone at 256 it moved the answers by 0.02" in said.en
    assert "最敏感的通道组是 small" in said.zh
    assert "从 512 到 64" in said.zh


def test_says_what_is_kept_of_the_most_sensitive_group_where_it_was_narrowed() -> None:
    (said,) = narrowing(GROUPS, WIDTHS, narrow(("small", 8)), ())
    assert "the winner keeps 8" in said.en
    assert "胜出方案保留 8 个" in said.zh


@pytest.mark.parametrize("recipe", [Recipe(), narrow(), narrow(("unknown", 3))])
def test_without_a_narrowed_winner_nothing_is_said_of_channels(recipe: Recipe) -> None:
    assert narrowing(GROUPS, WIDTHS, recipe, ()) == ()


def test_without_measured_widths_nothing_is_said_of_channels() -> None:
    assert narrowing(GROUPS, (), narrow(("wide", 64)), ()) == ()


def foreseen(name: str, mb: float, ms: float | None) -> Trial:
    """A file of 2 MB and 2 ms (every reading), of which so much was predicted."""
    got = evidence(2.0, 90.0, 2.0)
    got = dataclasses.replace(got, latency=(dataclasses.replace(got.latency[0], samples_ms=(2.0,) * 5),))
    return Trial(Recipe(format=name), evidence=got, predicted=Predicted(mb * 1e6, ms))


def test_only_predictions_off_by_more_than_a_quarter_are_told() -> None:
    assert narrowing((), (), Recipe(), (foreseen("a", 2.5, 1.5), foreseen("b", 2.0, None))) == ()
    (said,) = narrowing((), (), Recipe(), (foreseen("a", 2.0, 2.6), foreseen("b", 2.1, 3.0)))
    assert "2 of 4 predictions were off by more than 25 %" in said.en
    assert "· b: its latency was predicted as 3 ms and measured as 2 ms" in said.en
    assert "4 个预测中有 2 个误差超过 25%" in said.zh


def sized(recipe: Recipe, bytes_: int, gzip: int, zeros: float) -> Trial:
    weights = (Weight("a", "int8", (10, 9), 90, zeros), Weight("b", "int8", (10,), 10, 0.0))
    return Trial(recipe, evidence=dataclasses.replace(evidence(1, 90, 1), size=Size(bytes_, gzip, weights)))


def test_zeros_are_told_with_the_file_beside_the_one_without_them() -> None:
    sparse = sized(Recipe((Step("sparsify", (("ratio", 0.8),)), Step("quantize")), INT8), 11_400_000, 4_100_000, 0.8)
    dense = sized(Recipe((Step("quantize"),), INT8), 11_410_000, 10_200_000, 0.0)
    (said,) = narrowing((), (), Recipe(), (dense, sparse))
    assert "stores 72% zeros and takes 11.40 MB, 4.10 MB after gzip" in said.en  # 0.8 of 90 of 100 values
    assert "Without that step the file takes 11.41 MB, 10.20 MB after gzip." in said.en
    assert "72% 是零" in said.zh
    (alone,) = narrowing((), (), Recipe(), (sparse,))
    assert "Without that step" not in alone.en
    assert narrowing((), (), Recipe(), (dense,)) == ()


@pytest.mark.parametrize(
    ("select", "report", "told"),
    [
        ((99.0, 0.3), (91.0, 0.4), True),
        ((93.1, 0.3), (91.0, 0.4), True),  # 2.1 points: 4.2 errors of 0.5
        ((92.9, 0.3), (91.0, 0.4), False),  # 3.8 errors
        ((91.0, 0.3), (99.0, 0.4), False),  # doing better on new images is no sign of having seen the old ones
        ((91.0, 0.3), (91.0, 0.4), False),
        ((100.0, 0.0), (100.0, 0.0), False),
        ((100.0, 4.0), (90.0, 3.0), False),  # few images say little
    ],
)
def test_an_original_that_knows_the_select_images_too_well_is_told(
    select: tuple[float, float], report: tuple[float, float], told: bool
) -> None:
    said = seen_before(Estimate(*select, 1000), Estimate(*report, 1000))
    assert bool(said) == told
    for one in said:
        assert f"{select[0]:.1f} % on the select images but only {report[0]:.1f} %" in one.en
        assert "--held-out" in one.en
        assert "--held-out" in one.zh
        assert f"{report[0]:.1f} %" in one.zh
