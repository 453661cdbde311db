"""The vault shows what changed: which images, in which order, and boxes where they are."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import detector_results as made
from lighten import vault
from lighten.data.splits import ArrayImages, Split
from lighten.errors import BadConfig
from lighten.types import Device, Final, Job, Preprocess, from_json, to_json

pytest.importorskip("faster_coco_eval")

NOTHING = np.zeros((0, 6), np.float32)


def rows(*detections: tuple[float, ...]) -> np.ndarray:
    return np.array(detections, np.float32).reshape(-1, 6)


# --- which images ---------------------------------------------------------------------------------------


def test_difference_is_the_scores_of_what_is_alone_and_the_overlap_that_partners_lack() -> None:
    a = rows((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 30, 0.8, 1))
    b = rows((0, 0, 10, 8, 0.7, 0), (20, 20, 30, 30, 0.6, 2))
    # The first pair overlaps by 0.8; the second box has another class, so that both are alone: 0.8 + 0.6.
    assert vault.difference(a, b) == pytest.approx(0.2 + 1.4)
    assert vault.difference(a, a) == 0
    assert vault.difference(a, NOTHING) == pytest.approx(1.7)
    assert vault.difference(NOTHING, NOTHING) == 0


def test_the_most_different_come_first_and_calm_ones_fill_up() -> None:
    box = rows((0, 0, 10, 10, 0.9, 0))
    faint = rows((0, 0, 10, 10, 0.4, 0))
    old = [box, faint, NOTHING, box, box, NOTHING, box, box, box]
    new = [box, NOTHING, NOTHING, NOTHING, box, NOTHING, box, box, box]
    assert vault.chosen([1, 3], old, new) == [3, 1, 0, 4, 6, 7]
    many = [box] * 40
    assert len(vault.chosen([*range(40)], many, [NOTHING] * 40)) == vault.BOXED_SHOWN
    assert vault.chosen([], [NOTHING], [NOTHING]) == []


def test_counts_leave_out_what_is_to_be_ignored() -> None:
    labels = np.array([[0, 0, 0, 10, 10, 0], [1, 50, 50, 60, 60, 1], [0, 30, 30, 40, 40, 0], [-1, 0, 0, 0, 0, 0]])
    on, other, ignored, stray = (
        (0, 0, 10, 9, 0.9, 0), (30, 30, 40, 40, 0.9, 1), (50, 50, 60, 60, 0.9, 1), (80, 80, 90, 90, 0.5, 0),
    )  # fmt: skip
    got = vault.counts(labels, rows(on, other, ignored), rows(on, stray))
    assert got == {"n_truth": 2, "n_before": 2, "right_before": 1, "n_after": 2, "right_after": 1}
    assert vault.counts(labels[3:], NOTHING, NOTHING) == {
        "n_truth": 0, "n_before": 0, "right_before": 0, "n_after": 0, "right_after": 0,
    }  # fmt: skip


def test_boxes_of_one_side_alone_are_named_by_class() -> None:
    a = rows((0, 0, 10, 10, 0.9, 2), (20, 20, 30, 30, 0.8, 1), (50, 0, 60, 10, 0.5, 1))
    b = rows((0, 0, 10, 10, 0.4, 2), (20, 20, 30, 30, 0.8, 0))
    assert vault.alone(a, b) == {"gone": [1, 1], "new": [0]}
    assert vault.alone(a, a) == {"gone": [], "new": []}


# --- pictures ---------------------------------------------------------------------------------------


def test_boxes_lie_where_they_are_in_every_panel() -> None:
    grey = Image.new("RGB", (128, 64), (90, 90, 90))
    box = rows((32, 16, 96, 48, 0.9, 0))
    picture = vault.strip(grey, (NOTHING, box, box), ("cat",))
    assert picture.size == (3 * vault.PANEL + 2 * vault.GAP, vault.PANEL // 2)
    pixels = np.asarray(picture)
    for k in (1, 2):
        panel = pixels[:, k * (vault.PANEL + vault.GAP) :][:, : vault.PANEL]
        coloured = np.abs(panel.astype(int) - 90).max(2) > 40
        assert (
            coloured[96 - 1 : 96 + 2, 64:192].any(0).all()
        )  # the lower side, twice as far from the corner as in the image
        assert coloured[40:90, 64 - 2 : 64 + 2].any(1).all()
        assert not coloured[40:90, 72:184].any()
    assert not (np.abs(pixels[:, : vault.PANEL].astype(int) - 90) > 4).any()


def test_what_was_filled_with_grey_is_cut_off() -> None:
    how = Preprocess(160, 160, "letterbox")

    @dataclasses.dataclass
    class Sized:
        sizes: np.ndarray

    split = Split(Sized(np.array([[5, 5], [200, 100]])), np.array([1]))  # type: ignore[arg-type]
    assert vault.content_of(split, 0, how) == (0, 40, 160, 120)
    assert vault.content_of(split, 0, Preprocess(160, 160)) is None
    whole = Image.new("RGB", (160, 160), (114, 114, 114))
    whole.paste((10, 10, 10), (0, 40, 160, 120))
    picture = vault.strip(whole, (NOTHING,), (), (0, 40, 160, 120))
    assert picture.size == (vault.PANEL, vault.PANEL // 2)
    assert np.asarray(picture).max() == 10


def test_long_names_are_cut_so_that_they_stay_different() -> None:
    assert vault.short_names(("cat", "pedestrian")) == ["cat", "pedestrian"]
    assert vault.short_names(("traffic light, red", "cat")) == ["traffic light,..", "cat"]
    assert vault.short_names(("红绿灯（被树叶遮挡）",)) == ["红绿灯（被树叶.."]
    long = [f"traffic participant {k}" for k in range(12)]
    assert vault.short_names(long)[10:] == ["traffic pa.. #10", "traffic pa.. #11"]


def test_a_picture_keeps_to_its_bytes() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 780, 3), np.uint8))
    assert len(vault._jpeg(noise)) <= vault.STRIP_BYTES
    calm = Image.new("RGB", (780, 256), (9, 99, 199))
    assert np.abs(np.asarray(Image.open(io.BytesIO(vault._jpeg(calm)))).astype(int) - np.asarray(calm)).max() < 4


# --- a whole split ------------------------------------------------------------------------------------


def test_a_detectors_pictures_are_in_both_languages(tmp_path: Path) -> None:
    result = made.detector_result(tmp_path)
    assert 0 < len(result.flips) <= vault.BOXED_SHOWN
    changed = [flip["changed"] for flip in result.flips]
    assert changed == sorted(changed, reverse=True)
    assert sum(changed) == min(result.final.flipped, vault.BOXED_SHOWN)
    json.dumps(to_json(result), allow_nan=False)
    for flip in result.flips:
        for key in ("thumbnail", "thumbnail_zh"):
            file = tmp_path / flip[key]
            with Image.open(file) as picture:
                assert picture.format == "JPEG"
                assert picture.size == (3 * vault.PANEL + 2 * vault.GAP, vault.PANEL)
            assert file.stat().st_size <= vault.STRIP_BYTES
        assert flip["right_after"] <= min(flip["n_truth"], flip["n_after"])


def no_font(*allowed: str) -> Any:
    """A machine whose fonts can write nothing but these characters."""

    def font_for(text: str, *rest: Any) -> None:
        if set(text) - set("".join(allowed) + "0123456789% "):
            raise BadConfig("No font on this machine can write it.")

    return font_for


def test_without_a_font_for_them_names_are_english_else_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault, "font_for", no_font("abcdefghijklmnopqrstuvwxyz"))
    flips = made.detector_result(tmp_path / "en").flips
    assert all("thumbnail" in f and "thumbnail_zh" not in f for f in flips)
    names: list[Any] = []
    monkeypatch.setattr(vault, "font_for", no_font())
    monkeypatch.setattr(vault, "strip", lambda i, f, n, c: names.append([*n]) or Image.new("RGB", (8, 8)))
    made.detector_result(tmp_path / "none")
    assert names[0] == [str(k) for k in range(10)]


def test_equal_answers_show_some_images_where_nothing_changed(tmp_path: Path) -> None:
    flips = made.detector_result(tmp_path, lost=0, moved=0).flips
    assert [flip["changed"] for flip in flips] == [False] * vault.BOXED_LEAST


def test_a_detector_that_finds_nothing_has_no_pictures(tmp_path: Path) -> None:
    result = made.detector_result(tmp_path, blind=True)
    assert result.flips == ()
    assert result.final.flipped == 0
    assert not (tmp_path / "flips").exists()


def test_the_originals_further_metrics_are_kept(tmp_path: Path) -> None:
    final = made.detector_result(tmp_path).final
    old, new = dict(final.extra_before), dict(final.extra)
    assert {"AP50", "AP75"} <= old.keys() == new.keys()
    assert old["AP50"].value > new["AP50"].value
    assert from_json(Final, to_json(final)) == final
    plain = {k: v for k, v in to_json(final).items() if k != "extra_before"}  # written by an older lighten
    assert from_json(Final, plain).extra_before == ()


# --- classifiers as before ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_classifiers_pictures_are_those_whose_answer_changed(tmp_path: Path, order: str) -> None:
    how = Preprocess(8, 8, channel_order=order)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    pixels[..., 0] = 200
    split = Split(ArrayImages(pixels, np.array([0, 1, 1, 0])), np.arange(4)).prepare(how)
    before, after = np.eye(2)[[0, 1, 0, 0]], np.eye(2)[[0, 0, 1, 0]]
    job = Job(None, "classification", Device("", "", "", ()), how)  # type: ignore[arg-type]
    assert vault.thumbnails(tmp_path, split, before, after, job) == (
        {"image": "image 1", "truth": 1, "before": 1, "after": 0, "thumbnail": "flips/0.png"},
        {"image": "image 2", "truth": 1, "before": 0, "after": 1, "thumbnail": "flips/1.png"},
    )
    with Image.open(tmp_path / "flips/0.png") as picture:
        assert picture.getpixel((3, 3)) == (200, 0, 0)
