"""The calibration doctor: each finding is made to appear, and a clean set gives none."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lighten.data.doctor import Finding, examine, raise_errors, suspect_channel_order, suspect_normalization
from lighten.data.splits import ArrayImages, FileImages, Images, ListImages, Split
from lighten.errors import BadData
from lighten.types import Data, Preprocess

HOW = Preprocess(32, 32)
CLASSES = ("cat", "dog", "owl")
PARTS = {"train": 150, "calibrate": 60, "select": 150, "report": 150}
N = sum(PARTS.values())
START = dict(zip(PARTS, [0, 150, 210, 360]))


def pictures(n: int = N, seed: int = 0, side: int = 32) -> np.ndarray:
    """Soft random pictures: no two alike, and more light than colour in them, as in photographs."""
    rng = np.random.default_rng(seed)
    rough = np.clip(rng.integers(0, 256, (n, 8, 8, 1)) + rng.integers(-25, 26, (n, 8, 8, 3)), 0, 255).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in rough])


CLEAN = pictures()


def data_of(images: Images, how: Preprocess | None = HOW, *, prepared: bool = True) -> Data:
    splits = [Split(images, np.arange(START[k], START[k] + n)) for k, n in PARTS.items()]
    if prepared:
        splits = [splits[0], *(s.prepare(how) for s in splits[1:])]
    return Data("toy", CLASSES, CLASSES, *splits, "mark")  # type: ignore[misc]


def labels() -> np.ndarray:
    return np.arange(N) % 3


def arrays(x: np.ndarray, y: np.ndarray | None = None) -> ArrayImages:
    return ArrayImages(x, labels() if y is None else y)


def only(findings: tuple[Finding, ...]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def codes(findings: tuple[Finding, ...]) -> set[str]:
    return {f.code for f in findings}


def test_a_clean_set_gives_no_finding() -> None:
    assert examine(data_of(arrays(CLEAN)), HOW) == ()
    assert examine(data_of(arrays(CLEAN), prepared=False), HOW) == ()


def test_clean_ready_inputs_give_no_finding() -> None:
    x = ((CLEAN / 255.0 - HOW.mean) / HOW.std).transpose(0, 3, 1, 2).astype(np.float32)
    assert examine(data_of(arrays(x), None), None) == ()


# --- counts -----------------------------------------------------------------------------------------


def cut(data: Data, **sizes: int) -> Data:
    return dataclasses.replace(data, **{k: getattr(data, k).take(n) for k, n in sizes.items()})


def test_few_images_to_calibrate() -> None:
    data = data_of(arrays(CLEAN))
    found = only(examine(cut(data, calibrate=31), HOW))
    assert (found.level, found.code) == ("warning", "few-images")
    assert "31" in found.what
    assert examine(cut(data, calibrate=32), HOW) == ()


def test_few_images_to_measure_says_how_wide_the_error_is() -> None:
    found = only(examine(cut(data_of(arrays(CLEAN)), report=25), HOW))
    assert (found.level, found.code) == ("warning", "few-images")
    assert "± 10.0 points" in found.what  # 100 * sqrt(0.5 * 0.5 / 25)
    assert examine(cut(data_of(arrays(CLEAN)), report=100), HOW) == ()


@pytest.mark.parametrize("name", ["calibrate", "select", "report"])
def test_no_images_is_an_error(name: str) -> None:
    found = only(examine(cut(data_of(arrays(CLEAN)), **{name: 0}), HOW))
    assert (found.level, found.code) == ("error", "no-images")
    assert name in found.what


def test_no_training_images_is_no_matter() -> None:
    assert examine(cut(data_of(arrays(CLEAN)), train=0), HOW) == ()


def test_missing_classes_are_named() -> None:
    y = labels()
    y[START["select"] : START["report"]] = 0
    found = only(examine(data_of(arrays(CLEAN, y)), HOW))
    assert found.code == "missing-class"
    assert "select has no images of 2 of 3 classes: dog, owl" in found.what


def test_imbalance_of_calibrate() -> None:
    y = labels()
    y[START["calibrate"] : START["select"]] = [0] * 50 + [1] * 5 + [2] * 5
    found = only(examine(data_of(arrays(CLEAN, y)), HOW))
    assert found.code == "imbalance"
    assert "50 images of cat but 5 of dog" in found.what
    y[START["calibrate"] : START["select"]] = [0] * 40 + [1] * 10 + [2] * 10
    assert examine(data_of(arrays(CLEAN, y)), HOW) == ()


def test_labels_without_a_class() -> None:
    y = labels()
    y[START["report"]] = 3
    found = only(examine(data_of(arrays(CLEAN, y)), HOW))
    assert (found.level, found.code) == ("error", "labels")
    assert "0 to 3, but there are 3" in found.what


# --- leaks ------------------------------------------------------------------------------------------


def copied(source: str, target: str, n: int, change: Any = lambda x: x) -> Data:
    x = CLEAN.copy()
    for k in range(n):
        x[START[target] + k + 1] = change(x[START[source] + 2 * k])
    return data_of(arrays(x))


@pytest.mark.parametrize(
    ("source", "target"),
    [("train", "calibrate"), ("train", "report"), ("calibrate", "select"), ("select", "report")],
)
def test_identical_images_in_two_splits_are_counted_and_named(source: str, target: str) -> None:
    found = only(examine(copied(source, target, 5), HOW))
    assert (found.level, found.code) == ("warning", "leak")
    assert f"5 images of {target} are in {source} too (5 identical)" in found.what
    named = [f"image {START[target] + k + 1} is image {START[source] + 2 * k}" for k in range(3)]
    assert found.what.endswith(": " + "; ".join(named) + ".")


def as_jpeg(x: np.ndarray) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(x).save(out, "JPEG", quality=90)
    return np.asarray(Image.open(out))


@pytest.mark.parametrize(
    "change", [as_jpeg, np.fliplr, lambda x: as_jpeg(np.fliplr(x))], ids=["jpeg", "mirrored", "both"]
)
def test_near_copies_are_found(change: Any) -> None:
    found = only(examine(copied("train", "report", 20, change), HOW))
    count = int(found.what.split()[0])
    assert found.code == "leak"
    assert 10 <= count <= 20  # equal hashes find most, not all
    assert "(0 identical)" in found.what


def test_pictures_that_only_resemble_are_no_leak() -> None:
    def darker(x: np.ndarray) -> np.ndarray:
        return x // 2

    assert examine(copied("train", "report", 20, darker), HOW) == ()


def test_a_report_split_that_is_mostly_known_is_an_error() -> None:
    found = only(examine(copied("select", "report", 40), HOW))  # 40 of 150
    assert (found.level, found.code) == ("error", "leak")
    assert only(examine(copied("select", "report", 30), HOW)).level == "warning"
    assert only(examine(copied("train", "calibrate", 40), HOW)).level == "warning"


def test_blank_images_are_nobodys_copy() -> None:
    x = CLEAN.copy()
    x[[3, START["select"], START["report"]]] = [10, 20, 30]
    found = examine(data_of(arrays(x)), HOW)
    assert codes(found) == {"blank"}
    assert [f.what.split(":")[0] for f in found] == ["train", "select", "report"]
    assert f"image {START['select']}" in found[1].what


def test_ten_thousand_images_are_fast() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10_000, 64, 64, 3), np.uint8)
    images = ArrayImages(x, np.arange(10_000) % 3)
    ends = {"train": (0, 3000), "calibrate": (3000, 3500), "select": (3500, 6000), "report": (6000, 10_000)}
    splits = {k: Split(images, np.arange(a, b), None if k == "train" else x[a:b]) for k, (a, b) in ends.items()}
    x[9999] = x[3100]
    start = time.process_time()
    found = only(examine(Data("big", CLASSES, CLASSES, **splits, fingerprint=""), Preprocess(64, 64)))
    assert found.what == "1 images of report are in calibrate too (1 identical): image 9999 is image 3100."
    assert time.process_time() - start < 4.0  # about 1 s; CI machines are slow


def test_only_a_sample_of_train_is_read() -> None:
    class Counting(ArrayImages):
        read_rows: list[int] = []

        def read(self, i: int) -> np.ndarray:
            self.read_rows.append(i)
            return self.array[i % len(self.array)]

    images = Counting(CLEAN, np.arange(1_000_000) % 3)
    train = Split(images, np.arange(1_000_000))
    examine(dataclasses.replace(data_of(arrays(CLEAN)), train=train), HOW)
    assert len(set(images.read_rows)) == 512


# --- pixels -----------------------------------------------------------------------------------------


def test_grey_pictures_for_a_colour_model() -> None:
    grey = CLEAN[..., :1].repeat(3, 3)
    found = examine(data_of(arrays(grey)), HOW)
    assert codes(found) == {"grey"}
    assert len(found) == 4
    how = Preprocess(32, 32, channel_order="GRAY", mean=(0.5,), std=(0.5,))
    assert examine(data_of(arrays(grey), how), how) == ()
    half = np.concatenate([grey[: N // 2], CLEAN[N // 2 :]])
    found = examine(data_of(arrays(half)), HOW)
    assert [f.what.split(":")[0] for f in found] == ["train", "calibrate"]  # 45 of 150 select images are too few


@pytest.mark.parametrize(("top", "level"), [(1, "error"), (15, "warning")])
def test_pixels_that_were_scaled_before(top: int, level: str) -> None:
    x = (CLEAN > 127).astype(np.uint8) if top == 1 else (CLEAN.astype(int) * 15 // 255).astype(np.uint8)
    found = [f for f in examine(data_of(arrays(x)), HOW) if f.code == "range"]
    assert len(found) == 4
    assert {f.level for f in found} == {level}
    assert f"largest pixel is {top} of 255" in found[0].what


def test_one_bright_pixel_is_a_range() -> None:
    x = (CLEAN // 20).astype(np.uint8)
    x[:, 5, 5] = 200
    assert "range" not in codes(examine(data_of(arrays(x)), HOW))


def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, 3, 16, 16)).astype(np.float32)


def test_ready_inputs_that_are_plain_pixels() -> None:
    x = CLEAN.transpose(0, 3, 1, 2).astype(np.float32)
    found = examine(data_of(arrays(x), None), None)
    assert codes(found) == {"range"}
    assert "0 to 255" in found[0].what


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_errors(value: float) -> None:
    x = inputs()
    x[START["select"] + 4, 1, 2, 3] = value
    found = only(examine(data_of(arrays(x), None), None))
    assert (found.level, found.code) == ("error", "not-finite")
    assert f"select: 1 inputs hold NaN or infinity, the first is image {START['select'] + 4}" in found.what


def test_inputs_with_channels_last_are_errors() -> None:
    found = examine(data_of(arrays(inputs().transpose(0, 2, 3, 1).copy()), None), None)
    assert {(f.level, f.code) for f in found} == {("error", "layout")}


# --- files ------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> FileImages:
    paths = tuple(tmp_path / f"{i:03}.png" for i in range(N))
    for path, x in zip(paths, CLEAN):
        Image.fromarray(x).save(path, compress_level=1)
    return FileImages(paths, labels())


def test_unreadable_images_are_counted_and_named(photos: FileImages) -> None:
    bad = [photos.paths[START["select"] + k] for k in range(5)]
    for path in bad:
        path.write_bytes(path.read_bytes()[:100])
    found = only(examine(data_of(photos), HOW))
    assert (found.level, found.code) == ("warning", "unreadable")
    assert "select: 5 images cannot be read" in found.what
    assert all(p.name in found.what for p in bad[:3])
    assert bad[3].name not in found.what
    assert found.what.endswith("and 2 more")
    assert only(examine(data_of(photos), HOW, strict=True)).level == "error"


def test_unreadable_training_images_are_seen_in_the_sample(photos: FileImages) -> None:
    photos.paths[7].write_bytes(b"")
    assert "train: 1 images" in only(examine(data_of(photos), HOW)).what
    for path in photos.paths[:150]:
        path.write_bytes(b"")
    found = only(examine(data_of(photos), HOW))
    assert "None of the 150 train images" in found.what


def test_a_split_that_cannot_be_read_at_all_is_an_error(photos: FileImages) -> None:
    for path in photos.paths[START["report"] :]:
        path.write_bytes(b"")
    data = data_of(photos, prepared=False)
    found = only(examine(data, HOW))
    assert (found.level, found.code) == ("error", "unreadable")


def test_originals_far_smaller_than_the_input() -> None:
    how = Preprocess(72, 72)
    found = only(examine(data_of(arrays(CLEAN), how), how))
    assert found.code == "upscaled"
    assert "2.2 times to the 72x72" in found.what  # 72 / 32
    crop = Preprocess(56, 56, "crop", 72)
    assert codes(examine(data_of(arrays(CLEAN), crop), crop)) == {"upscaled"}
    enough = Preprocess(64, 64)
    assert examine(data_of(arrays(CLEAN), enough), enough) == ()


def test_pictures_stretched_out_of_shape() -> None:
    wide = ListImages(tuple(Image.fromarray(x).resize((64, 36)) for x in CLEAN), labels())
    found = only(examine(data_of(wide), HOW))
    assert found.code == "distorted"
    assert "1.8 times" in found.what  # 64 / 36
    crop = Preprocess(32, 32, "crop", 36)
    assert examine(data_of(wide, crop), crop) == ()
    fitting = Preprocess(36, 64)
    assert examine(data_of(wide, fitting), fitting) == ()


# --- errors, and what the model has to say ----------------------------------------------------------


def test_errors_come_first_and_are_raised_all_at_once() -> None:
    data = cut(data_of(arrays(CLEAN)), calibrate=0, select=0, report=20)
    found = examine(data, HOW)
    assert [f.level for f in found] == ["error", "error", "warning"]
    with pytest.raises(BadData) as caught:
        raise_errors(found)
    assert "calibrate has no images" in caught.value.what
    assert "select has no images" in caught.value.what
    assert "report" not in caught.value.what
    assert caught.value.to_do == "Give more images."
    raise_errors(found[2:])
    raise_errors(())


def scorer(right: float, turned: float, x: np.ndarray) -> Any:
    def score(pixels: np.ndarray) -> float:
        assert pixels.shape == x.shape
        if np.array_equal(pixels, x):
            return right
        np.testing.assert_array_equal(pixels[..., [2, 1, 0]], x)
        return turned

    return score


def test_channel_order_is_measured() -> None:
    x = CLEAN[:200]
    found = suspect_channel_order(scorer(60.0, 80.0, x), x)
    assert found is not None
    assert found.code == "channel-order"
    assert "80.0 % instead of 60.0 % (200 images)" in found.what
    # Two standard errors of the difference at 200 images: 2 * sqrt(2 * 0.6 * 0.4 / 200) = 9.8 points.
    assert suspect_channel_order(scorer(60.0, 68.0, x), x) is None
    assert suspect_channel_order(scorer(60.0, 72.0, x), x) is not None
    assert suspect_channel_order(scorer(80.0, 60.0, x), x) is None


def test_channel_order_needs_colours_and_more_than_an_image_or_two() -> None:
    assert suspect_channel_order(scorer(0.0, 100.0, CLEAN[:2]), CLEAN[:2]) is None
    assert suspect_channel_order(lambda _: 1 / 0, CLEAN[:9, ..., :1]) is None
    assert suspect_channel_order(lambda _: 1 / 0, CLEAN[:0]) is None


def test_accuracy_no_better_than_guessing() -> None:
    # Chance is 10 %, and two standard errors at 400 images are 2 * sqrt(0.1 * 0.9 / 400) = 3 points.
    found = suspect_normalization(12.9, 10, 400)
    assert found is not None
    assert found.code == "normalization"
    assert "guessing gets 10.0 %" in found.what
    assert suspect_normalization(13.1, 10, 400) is None
    assert suspect_normalization(0.0, 10, 400) is not None
    assert suspect_normalization(0.0, 10, 49) is None


def test_near_copies_never_stop_a_run_for_a_fixed_camera_sees_the_same_all_day() -> None:
    found = only(examine(copied("select", "report", 60, np.fliplr), HOW))  # 60 of 150
    assert (found.level, found.code) == ("warning", "leak")
    assert int(found.what.split()[0]) > 40
