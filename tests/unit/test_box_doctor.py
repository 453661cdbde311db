"""The doctor for boxes: each finding is made to appear, and a clean set gives none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lighten.data.box_doctor import examine, overlaps
from lighten.data.boxes import BoxArrays, BoxImages, framed
from lighten.data.doctor import Finding
from lighten.data.splits import Split
from lighten.types import Data, Preprocess

HOW = Preprocess(64, 64, mode="letterbox")
CLASSES = ("cat", "dog", "owl")
PARTS = {"train": 102, "calibrate": 33, "select": 102, "report": 102}
N = sum(PARTS.values())
START = dict(zip(PARTS, [0, 102, 135, 237]))


def pictures(n: int = N, seed: int = 0) -> np.ndarray:
    """Soft random pictures of 80 x 60 pixels, no two alike."""
    rng = np.random.default_rng(seed)
    rough = np.clip(rng.integers(0, 256, (n, 8, 8, 1)) + rng.integers(-25, 26, (n, 8, 8, 3)), 0, 255).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((80, 60), Image.Resampling.BICUBIC)) for x in rough])


CLEAN = pictures()


def labels() -> np.ndarray:
    """Two boxes an image, of two classes, and room for one more."""
    out = np.tile(np.array([-1, 0, 0, 0, 0, 0], np.float32), (N, 3, 1))
    out[:, 0] = [0, 5, 5, 35, 40, 0]
    out[:, 1] = [0, 30, 10, 75, 55, 0]
    out[:, 0, 0], out[:, 1, 0] = np.arange(N) % 3, (np.arange(N) + 1) % 3
    return out


def data_of(y: np.ndarray | None = None, how: Preprocess | None = HOW, **change: object) -> Data:
    images = BoxArrays(CLEAN, labels() if y is None else y)
    splits = {k: Split(images, np.arange(START[k], START[k] + n)) for k, n in PARTS.items()}
    splits = {k: s if k == "train" or how is None else s.prepare(how) for k, s in splits.items()}
    return Data("toy", CLASSES, CLASSES, **splits, fingerprint="mark")


def edited(split: str, box: int, *row: float) -> np.ndarray:
    y = labels()
    y[START[split], box] = row
    return y


def only(findings: tuple[Finding, ...]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_a_clean_set_gives_no_finding() -> None:
    assert examine(data_of(), HOW) == ()
    assert examine(framed(data_of(), HOW), HOW) == ()
    assert examine(data_of(how=None), HOW) == ()


# --- labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, code, word",
    [
        ((3, 1, 1, 9, 9, 0), "labels", "class 3"),
        ((-2, 1, 1, 9, 9, 0), "labels", "class -2"),
        ((0.5, 1, 1, 9, 9, 0), "labels", "class 0.5"),
        ((0, np.nan, 1, 9, 9, 0), "not-finite", "nan"),
        ((0, 1, 1, np.inf, 9, 0), "not-finite", "inf"),
        ((0, 9, 1, 1, 9, 0), "reversed", "9, 1, 1, 9"),
    ],
)
def test_labels_that_no_score_can_use_are_errors(row: tuple[float, ...], code: str, word: str) -> None:
    found = examine(data_of(edited("select", 2, *row)), HOW)
    assert (found[0].level, found[0].code) == ("error", code)
    assert "select: 1 boxes" in found[0].what
    assert word in found[0].what
    assert "image 135" in found[0].what


def test_labels_of_another_shape_are_an_error() -> None:
    found = examine(data_of(np.zeros(N, np.int64)), HOW)
    assert {f.code for f in found} == {"labels"}
    assert all(f.level == "error" for f in found)


@pytest.mark.parametrize(
    "row, code",
    [((0, 70, 5, 85, 20, 0), "outside"), ((0, 5, 5, 5, 20, 0), "zero-area"), ((0, 5, 5.4, 35, 39.6, 0), "duplicates")],
)
def test_single_bad_boxes_are_warnings_that_name_the_image(row: tuple[float, ...], code: str) -> None:
    found = only(examine(data_of(edited("report", 2, *row)), HOW))
    assert (found.level, found.code) == ("warning", code)
    assert "report" in found.what
    assert "image 237" in found.what


def test_a_copy_of_another_class_or_in_a_crowd_is_none() -> None:
    assert examine(data_of(edited("report", 2, 2, 5, 5, 35, 40, 0)), HOW) == ()
    assert examine(data_of(edited("report", 2, 0, 5, 5, 35, 40, 1)), HOW) == ()


def test_most_boxes_outside_is_an_error() -> None:
    y = labels()
    y[..., 1:5] *= 3
    found = [f for f in examine(data_of(y), HOW) if f.code == "outside"]
    assert {f.level for f in found} == {"error"}
    assert len(found) == 4


def test_overlaps_are_those_of_pycocotools() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    box = rng.uniform(0, 50, (20, 4))
    box[:, 2:] = box[:, :2] + rng.uniform(1, 50, (20, 2))
    wide = np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], 1)
    np.testing.assert_allclose(overlaps(box), mask.iou(wide, wide, [0] * 20), atol=1e-9)


def test_a_class_without_boxes_in_a_split_is_named() -> None:
    y = labels()
    mine = y[START["select"] : START["report"]]
    mine[mine[..., 0] == 2] = [-1, 0, 0, 0, 0, 0]
    found = only(examine(data_of(y), HOW))
    assert found.code == "missing-class"
    assert "select has no box of 1 of 3 classes: owl" in found.what


def test_a_class_that_is_only_ignored_is_missing() -> None:
    y = labels()
    y[START["report"] :, :, 5] = y[START["report"] :, :, 0] == 1
    assert "dog" in only(examine(data_of(y), HOW)).what


def test_splits_without_boxes() -> None:
    y = labels()
    y[START["select"] : START["report"], :, 0] = -1
    found = only(examine(data_of(y), HOW))
    assert (found.level, found.code) == ("error", "no-boxes")
    y = labels()
    y[:60, :, 0] = -1
    found = only(examine(data_of(y), HOW))
    assert (found.level, found.code) == ("warning", "no-boxes")
    assert "train: 60 of 102" in found.what


def test_skewed_classes_are_said_for_train() -> None:
    y = labels()
    y[: PARTS["train"], 0, 0], y[: PARTS["train"], 1, 0] = 0, 0
    y[0, 0, 0], y[1, 0, 0] = 1, 2
    found = only(examine(data_of(y), HOW))
    assert found.code == "imbalance"
    assert "202 boxes of cat but 1 of dog" in found.what


# --- in the network's input -----------------------------------------------------------------------------


def test_tiny_boxes_are_counted_where_the_network_sees_them() -> None:
    """9 pixels of an image of 80 are 7.2 of an input of 64, and 9 of one of 80."""
    y = labels()
    y[START["select"] : START["report"], 2] = [0, 60, 2, 69, 11, 0]
    found = only(examine(data_of(y), HOW))
    assert found.code == "tiny"
    assert "select: 33 % of the boxes are under 8 pixels at 64x64" in found.what
    assert only(examine(framed(data_of(y), HOW), HOW)).what == found.what
    larger = Preprocess(80, 80, mode="letterbox")
    assert examine(data_of(y, larger), larger) == ()


def test_boxes_that_cropping_cuts_away_are_said() -> None:
    y = labels()
    y[START["report"] :, 2] = [0, 0, 0, 9, 60, 0]  # 80 x 60 is cut to the middle 60 x 60
    crop = Preprocess(60, 60, mode="crop", resize=60)
    found = [f for f in examine(data_of(y, crop), crop) if f.code == "cut-away"]
    assert "report: 102 of 306 boxes" in only(tuple(found)).what
    assert not [f for f in examine(data_of(y), HOW) if f.code == "cut-away"]


def test_boxes_of_another_frame_are_an_error() -> None:
    found = examine(framed(data_of(), HOW), Preprocess(32, 32, mode="letterbox"))
    assert [f.code for f in found if f.level == "error"].count("frame") == 4


def test_calibration_images_must_be_those_of_inference() -> None:
    data = data_of()
    stretched = dataclasses.replace(data.calibrate, ready=None).prepare(Preprocess(64, 64))
    found = only(examine(dataclasses.replace(data, calibrate=stretched), HOW))
    assert (found.level, found.code) == ("error", "calibration-frame")
    assert "letterbox" not in found.what
    assert "the rest grey" in found.to_do


# --- pictures ---------------------------------------------------------------------------------------


def test_pictures_are_examined_as_those_of_a_classifier() -> None:
    data = data_of()
    few = dataclasses.replace(data, report=data.report.take(25))
    found = only(examine(few, HOW))
    assert (found.code, found.what) == ("few-images", "report has 25 images: the error bar of mAP is wide.")
    leaked = dataclasses.replace(data, report=data.select)
    assert "leak" in {f.code for f in examine(leaked, HOW)}


def test_enlarged_images_are_said_by_their_letterbox() -> None:
    large, small = Preprocess(200, 200, mode="letterbox"), Preprocess(150, 320, mode="letterbox")
    for how in (large, small):
        found = only(examine(data_of(how=how), how))
        assert found.code == "upscaled"
        assert "2.5 times" in found.what  # and not 3.3, of the shorter side


def test_what_reading_found_is_told_once(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    told = Finding("warning", "clipped", "train: 1 of 2 boxes stick out.", "Look.")
    images = BoxImages((tmp_path / "a.png",), labels()[:1], np.array([[80, 60]]), None, (told,))
    empty = Split(images, np.zeros(0, int))
    data = dataclasses.replace(data_of(), train=Split(images, np.array([0])), calibrate=empty)
    assert [f.code for f in examine(data, HOW)].count("clipped") == 1
