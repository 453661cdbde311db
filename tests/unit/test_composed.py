"""Composed scenes: boxes are where the objects are, the same dice give the same bytes, and no object serves two splits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from lighten.data import builtin, composed, demo
from lighten.data.box_doctor import examine
from lighten.data.boxes import present
from lighten.data.cutout import barrier, cut_outs, filled, otsu, part_around
from lighten.data.scenes import LARGEST, MOST, SMALLEST, Pieces, cut, ground, scene
from lighten.errors import BadData
from lighten.types import Data, Preprocess

DEMO = composed.composed_demo()
SPLITS = ("train", "calibrate", "select", "report")


def discs(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Discs of 7 to 9 pixels' radius on a soft ground: class 0 red, class 1 blue; uint8 (n, 32, 32, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    out = np.empty((n, 32, 32, 3), np.uint8)
    for k in range(n):
        out[k] = 110 + x[..., None] // 4 + rng.integers(-2, 3, (32, 32, 3))
        out[k][(x - 15.5) ** 2 + (y - 15.5) ** 2 < rng.integers(7, 10) ** 2] = (
            (220, 30, 30) if k % 2 == 0 else (30, 30, 220)
        )
    return out, np.arange(n) % 2


# --- cutting out ------------------------------------------------------------------------------------


def test_discs_are_cut_out_to_the_pixel() -> None:
    pictures, _ = discs()
    masks, good = cut_outs(pictures)
    truth = np.abs(pictures[..., 0].astype(int) - pictures[..., 2]) > 100
    assert good.all()
    assert ((masks > 0.5) != truth).mean() < 0.01


def test_flat_pictures_and_stripes_are_no_objects() -> None:
    flat = np.full((3, 32, 32, 3), 90, np.uint8)
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, :, ::4] = 200
    assert not cut_outs(np.concatenate([flat, stripes]))[1].any()


def test_barrier_distance_is_the_least_rise_on_any_path() -> None:
    """A wall of 0.5 around a yard of 0.2: into the wall costs 0.5, and the yard can only be had across it; through a gap of
    0.3 it costs 0.3."""
    x = np.zeros((2, 9, 9, 1), np.float32)
    x[:, 2:7, 2:7] = 0.5
    x[:, 3:6, 3:6] = 0.2
    x[1, 4, 2] = 0.3
    far = barrier(x)[..., 0]
    np.testing.assert_allclose([far[0, 4, 4], far[0, 2, 4], far[1, 4, 4], far[0, 1, 1]], [0.5, 0.5, 0.3, 0], atol=1e-6)


def test_parts_and_holes_are_those_of_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    on = np.random.default_rng(0).random((30, 32, 32)) < 0.6
    at = np.array([np.flatnonzero(one)[7] for one in on])
    parts, solid = part_around(on, at), filled(on)
    for k, one in enumerate(on):
        labelled, _ = ndimage.label(one)
        assert np.array_equal(parts[k], labelled == labelled.reshape(-1)[at[k]])
        assert np.array_equal(solid[k], ndimage.binary_fill_holes(one))


def test_otsu_parts_two_hills() -> None:
    rng = np.random.default_rng(0)
    two = np.where(
        rng.random((4, 32, 32)) < 0.3, rng.normal(0.8, 0.04, (4, 32, 32)), rng.normal(0.2, 0.04, (4, 32, 32))
    )
    cuts = otsu(np.clip(two, 0, 1))
    assert ((cuts > 0.3) & (cuts < 0.7)).all()


# --- scenes -----------------------------------------------------------------------------------------


def made(count: int = 30, size: int = 192) -> list[tuple[np.ndarray, np.ndarray]]:
    pieces = cut(*discs())
    return [scene(pieces, size, np.random.default_rng([5, k])) for k in range(count)]


def test_boxes_are_tight_around_what_is_visible() -> None:
    """Discs of pure colours on grey: each box is met by the pixels of its colour on all four sides, and no such pixel is
    outside every box."""
    for pixels, rows in made():
        signed = pixels[..., 0].astype(int) - pixels[..., 2]
        free = np.ones(pixels.shape[:2], bool)
        for c, x1, y1, x2, y2, _ in rows[rows[:, 0] >= 0]:
            mine = (signed > 40) if c == 0 else (signed < -40)
            part = mine[int(y1) : int(y2), int(x1) : int(x2)]
            assert part[:2].any()
            assert part[-2:].any()
            assert part[:, :2].any()
            assert part[:, -2:].any()
            free[max(0, int(y1) - 2) : int(y2) + 2, max(0, int(x1) - 2) : int(x2) + 2] = False
        assert not (free & (np.abs(signed) > 130)).any()


@pytest.mark.parametrize("size", composed.SIZES)
def test_scenes_hold_one_to_eight_objects_of_many_sizes_inside_the_picture(size: int) -> None:
    found = made(60, size)
    rows = np.concatenate([r[r[:, 0] >= 0] for _, r in found])
    counts = np.array([(r[:, 0] >= 0).sum() for _, r in found])
    sides = np.maximum(rows[:, 3] - rows[:, 1], rows[:, 4] - rows[:, 2])
    assert counts.min() >= 1
    assert 3 <= counts.max() <= MOST
    assert (rows[:, 1:3] >= 0).all()
    assert (rows[:, 3:5] <= size).all()
    assert sides.min() < 1.5 * SMALLEST
    assert 0.6 * LARGEST < sides.max() <= 1.2 * LARGEST * max(1, size / 192)
    assert all(pixels.shape == (size, size, 3) and pixels.dtype == np.uint8 for pixels, _ in found)
    assert all(rows.shape == (MOST, 6) for _, rows in found)


def test_objects_hide_little_of_each_other() -> None:
    """Discs are there to three quarters at least: 85 % of what is shown, of which an edge cuts 15 % at most."""
    for pixels, rows in made():
        signed = pixels[..., 0].astype(int) - pixels[..., 2]
        boxes = rows[rows[:, 0] >= 0]
        lone = [b for b in boxes if sum(_meet(b, o) for o in boxes) == 1]
        for c, x1, y1, x2, y2, _ in lone:
            part = signed[int(y1) : int(y2), int(x1) : int(x2)] * (1 if c == 0 else -1) > 60
            assert part.mean() > 0.55  # a whole disc fills pi / 4 of its box


def _meet(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4])


def test_the_same_dice_give_the_same_scene_and_others_another() -> None:
    pieces = cut(*discs())
    (a, x), (b, y), (c, _) = (scene(pieces, 160, np.random.default_rng([1, k])) for k in (0, 0, 1))
    assert np.array_equal(a, b)
    assert np.array_equal(x, y)
    assert not np.array_equal(a, c)


def test_grounds_show_no_object() -> None:
    """Only borders and corners of the source are used: what is red or blue in its middle is nowhere."""
    pieces = cut(*discs())
    for k in range(20):
        pixels = np.asarray(ground(pieces.ground, 160, np.random.default_rng(k))).astype(int)
        assert (np.abs(pixels[..., 0] - pixels[..., 2]) < 40).all()


def test_scenes_are_made_fast() -> None:
    """A scene takes about 3 ms of a core; the limit leaves room for a machine that is busy."""
    pieces = cut(*discs())
    scene(pieces, 192, np.random.default_rng(0))
    start = time.process_time()
    for k in range(50):
        scene(pieces, 192, np.random.default_rng(k))
    assert (time.process_time() - start) / 50 < 0.02


# --- sets -------------------------------------------------------------------------------------------


def test_the_demo_needs_no_files_and_is_always_the_same() -> None:
    again = composed.load("composed-demo")
    assert again.fingerprint == DEMO.fingerprint
    assert {k: len(s) for k, s in DEMO.splits.items()} == composed.DEMO
    for name in SPLITS:
        a, b = getattr(DEMO, name), getattr(again, name)
        assert np.array_equal(a.images.array, b.images.array)
        assert np.array_equal(a.labels, b.labels)


def test_sets_say_that_they_are_composed() -> None:
    assert "composed" in DEMO.name
    assert "CIFAR-10" in DEMO.name
    assert any("composed" in n and "photographs" in n for n in DEMO.notices)
    assert DEMO.classes_zh[3] == "猫"


def test_the_doctor_finds_no_error_in_the_demo() -> None:
    how = Preprocess(160, 160, mode="letterbox")
    found = examine(DEMO, how)
    assert {f.code for f in found} <= {"few-images", "missing-class"}
    assert all(f.level == "warning" for f in found)


def test_the_demo_s_objects_come_from_disjoint_images() -> None:
    sheets = composed._demo_sheets(demo.data())
    seen = [one.tobytes() for name in SPLITS for one in sheets[name][0]]
    assert len(seen) == len(set(seen))
    assert present(DEMO.train.labels, 10).any(0).all()


def fake_cifar(monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, np.ndarray]:
    """Discs in CIFAR-10's place, each picture marked by its number in a corner."""
    arrays: dict[str, np.ndarray] = {}
    for name, n in (("train", 60), ("test", 40)):
        pictures, _ = discs(n)
        pictures[:, 0, 0, 0], pictures[:, 0, 0, 1] = np.arange(n), 7 if name == "train" else 9
        arrays[name], arrays[f"{name}_labels"] = pictures, np.arange(n) % 10
    monkeypatch.setenv("LIGHTEN_CACHE", str(cache))
    monkeypatch.setattr(composed.builtin, "read", lambda name, progress: (builtin.known()[name], arrays))
    monkeypatch.setattr(composed, "EACH", {"train": 4, "calibrate": 2, "select": 2, "report": 2})
    return arrays


def small(seed: int = 0) -> Data:
    return composed.composed(160, 10, 8, 9, 8, seed=seed)


def test_a_set_is_made_once_and_mapped_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_cifar(monkeypatch, tmp_path)
    first = small()
    assert {k: len(s) for k, s in first.splits.items()} == {"train": 10, "calibrate": 8, "select": 9, "report": 8}
    assert type(first.train.images.array) is np.memmap
    monkeypatch.setattr(composed, "scene", None)  # a second making would fail
    again = small()
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.select.images.array, first.select.images.array)
    assert np.array_equal(again.select.labels, first.select.labels)


def test_another_seed_is_another_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_cifar(monkeypatch, tmp_path)
    a, b = small(), small(1)
    assert a.fingerprint != b.fingerprint
    assert not np.array_equal(a.train.images.array, b.train.images.array)


def test_train_objects_are_training_images_and_measured_ones_test_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_cifar(monkeypatch, tmp_path)
    used: dict[str, np.ndarray] = {}

    def spy(pictures: np.ndarray, labels: np.ndarray) -> Pieces:
        used[SPLITS[len(used)]] = pictures[:, 0, 0, :2].copy()
        return cut(pictures, labels)

    monkeypatch.setattr(composed, "cut", spy)
    small()
    assert [set(used[k][:, 1].tolist()) for k in SPLITS] == [{7}, {7}, {9}, {9}]
    numbers = {k: set(used[k][:, 0].tolist()) for k in SPLITS}
    assert not numbers["train"] & numbers["calibrate"]
    assert not numbers["select"] & numbers["report"]


def test_a_damaged_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_cifar(monkeypatch, tmp_path)
    small()
    file = next(tmp_path.rglob("select.npy"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadData, match="damaged") as caught:
        small()
    assert str(file.parent) in str(caught.value)


def test_an_interrupted_making_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_cifar(monkeypatch, tmp_path)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("composing select"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        composed.composed(160, 10, 8, 9, 8, progress=stop)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


@pytest.mark.parametrize(
    "name, known",
    [
        ("composed", True),
        ("composed-500", True),
        ("composed-demo", True),
        ("composed@320", True),
        ("composed-500@160", True),
        ("composed-", False),
        ("composed-x", False),
        ("composed-1000000", False),
        ("cifar10", False),
        (5, False),
    ],
)
def test_names(name: object, known: bool) -> None:
    assert composed.is_name(name) == known


@pytest.mark.parametrize(
    "name, word", [("composed-demo@100", "100"), ("composed-3", "3 scenes"), ("composed@999", "999")]
)
def test_sizes_and_counts_out_of_range_are_refused(name: str, word: str) -> None:
    with pytest.raises(BadData, match=word) as caught:
        composed.load(name)
    assert caught.value.to_do
