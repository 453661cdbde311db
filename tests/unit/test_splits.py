"""Folders, iterables and arrays become four disjoint, class-balanced splits, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lighten.data import Split, load
from lighten.data.splits import ArrayImages, FileImages, ListImages, as_inputs, stratified
from lighten.errors import BadData
from lighten.types import Data, Preprocess

HOW = Preprocess(8, 8)


def counts(labels: np.ndarray, rows: np.ndarray) -> list[int]:
    return np.bincount(labels[rows], minlength=int(labels.max()) + 1).tolist()


# --- stratified -------------------------------------------------------------------------------------

LABELS = np.random.default_rng(3).permutation(np.repeat([0, 1, 2], [60, 30, 10]))
SIZES = {"calibrate": 10, "select": 20}


def test_every_split_has_its_share_of_every_class() -> None:
    rows = stratified(LABELS, SIZES, seed=0)
    assert {k: counts(LABELS, v) for k, v in rows.items()} == {
        "calibrate": [6, 3, 1],
        "select": [12, 6, 2],
        "train": [42, 21, 7],
    }


def test_splits_are_disjoint_and_whole() -> None:
    rows = np.concatenate(list(stratified(LABELS, SIZES, seed=0).values()))
    assert sorted(rows.tolist()) == list(range(100))


def test_largest_remainders_come_first() -> None:
    labels = np.repeat([0, 1, 2], [5, 3, 2])
    rows = stratified(labels, {"calibrate": 3}, seed=0)  # shares 1.5, 0.9, 0.6: one each
    assert counts(labels, rows["calibrate"]) == [1, 1, 1]


def test_the_seed_decides() -> None:
    one, same, other = (stratified(LABELS, SIZES, seed)["calibrate"].tolist() for seed in (1, 1, 2))
    assert one == same != other
    assert one != sorted(one)  # shuffled, so the first rows are a fair sample


def test_a_class_that_is_used_up_leaves_its_place_to_others() -> None:
    rows = stratified(np.array([0, 1, 2]), {"calibrate": 1, "select": 1, "report": 1}, seed=0)
    assert [len(rows[k]) for k in ("calibrate", "select", "report", "train")] == [1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_any_labels_any_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([1, 4, 5, 9], rng.integers(8, 60), p=[0.7, 0.1, 0.1, 0.1])
    sizes = {"a": int(rng.integers(1, 5)), "b": int(rng.integers(1, 4))}
    rows = stratified(labels, sizes, seed)
    assert [len(rows["a"]), len(rows["b"])] == list(sizes.values())
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(labels)))


# --- Split ------------------------------------------------------------------------------------------


def noise(n: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)


def test_prepare_take_and_inputs_agree_with_the_images() -> None:
    x, rows = noise(6), np.array([4, 1, 5])
    split = Split(ArrayImages(x, np.arange(6)), rows)
    ready = split.prepare(HOW)
    assert split.ready is None  # frozen: a new one came
    assert ready.prepare(HOW) is ready
    np.testing.assert_array_equal(ready.ready, x[rows])
    np.testing.assert_array_equal(split.pixels(HOW), ready.pixels(HOW))
    np.testing.assert_array_equal(ready.labels, [4, 1, 5])
    for one in (split.take(2), ready.take(2)):
        assert len(one) == 2
        np.testing.assert_array_equal(one.pixels(HOW), x[[4, 1]])
    want = (x[[1, 5]] / 255.0 - np.array(HOW.mean)) / np.array(HOW.std)
    np.testing.assert_allclose(ready.inputs(HOW, slice(1, 3)), want.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ready.pixels(HOW, np.array([2, 0])), x[[5, 4]])


def test_batches_are_the_inputs_in_order() -> None:
    split = Split(ArrayImages(noise(7), np.arange(7)), np.arange(7))
    parts = list(split.batches(HOW, 3))
    assert [len(p) for p in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), split.inputs(HOW))


def test_ready_inputs_pass_as_they_are() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    split = Split(ArrayImages(x, np.arange(5)), np.array([3, 0])).prepare(None)
    np.testing.assert_array_equal(split.inputs(None), x[[3, 0]])
    assert as_inputs(x, HOW) is x


def test_pixels_without_preprocessing_are_refused() -> None:
    with pytest.raises(BadData, match="how the model wants them"):
        Split(ArrayImages(noise(2), np.arange(2)), np.arange(2)).prepare(None)


def test_unreadable_images_are_dropped_and_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(4)[i]).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    seen: list[int] = []
    images = FileImages(tuple(paths), np.array([0, 1, 2, 3]))
    split = Split(images, np.array([3, 2, 0])).prepare(HOW, lambda _, done, total: seen.append(done))
    assert split.labels.tolist() == [3, 0]
    assert split.rows.tolist() == [3, 0]
    assert len(split.unreadable) == 1
    assert "2.png" in split.unreadable[0]
    np.testing.assert_array_equal(split.ready, noise(4)[[3, 0]])
    assert seen == [1, 2, 3]


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(BadData, match="None of the 1 select images") as caught:
        Split(FileImages((tmp_path / "a.png",), np.array([0])), np.array([0])).prepare(HOW, what="select")
    assert "a.png" in caught.value.to_do
    with pytest.raises(BadData, match="None of the 0"):
        Split(ArrayImages(noise(1), np.array([0])), np.array([], int)).prepare(HOW)


def test_ready_inputs_of_different_shapes_are_refused() -> None:
    items = (np.zeros((3, 8, 8), np.float32), np.zeros((3, 9, 9), np.float32))
    with pytest.raises(BadData, match="different shapes"):
        Split(ListImages(items, np.array([0, 1])), np.arange(2)).prepare(None)


# --- folders ----------------------------------------------------------------------------------------


def fill(root: Path, classes: dict[str, int], start: int = 0) -> Path:
    for name, n in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (start, i, len(name))).save(root / name / f"{start}-{i}.png")
    return root


def total(data: Data) -> int:
    return sum(len(s) for s in data.splits.values())


def test_a_plain_folder_of_classes(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 30, "dog": 30})
    (tmp_path / ".git").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / "._0-0.png").write_bytes(b"\0")  # macOS
    data = load(tmp_path)
    assert data.classes == data.classes_zh == ("cat", "dog")
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 30, "calibrate": 9, "select": 9, "report": 12}
    names = [s.images.name(int(r)) for s in data.splits.values() for r in s.rows]
    assert len(set(names)) == 60
    for split in data.splits.values():
        assert all(
            Path(split.images.name(int(r))).parent.name == data.classes[split.images.labels[r]] for r in split.rows
        )


@pytest.mark.parametrize(("train", "test"), [("train", "val"), ("training", "test"), ("train", "validation")])
def test_train_and_val_folders(train: str, test: str, tmp_path: Path) -> None:
    fill(tmp_path / train, {"cat": 20, "dog": 20})
    fill(tmp_path / test, {"cat": 5, "dog": 4}, start=9)
    data = load(str(tmp_path))
    assert len(data.report) == 9
    assert total(data) == 49
    assert all(test in data.report.images.name(int(r)) for r in data.report.rows)
    assert all(f"/{train}/" in data.select.images.name(int(r)) for r in data.select.rows)


def test_classes_may_be_called_train_or_test(tmp_path: Path) -> None:
    fill(tmp_path / "a", {"train": 10, "plane": 10})
    fill(tmp_path / "b", {"test": 10, "exam": 10})
    assert load(tmp_path / "a").classes == ("plane", "train")
    assert load(tmp_path / "b").classes == ("exam", "test")


def test_a_train_folder_alone_is_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"cat": 20, "dog": 20})
    assert load(tmp_path).classes == ("cat", "dog")
    assert len(load(tmp_path).report) == 8


def test_the_same_folder_gives_the_same_rows_and_fingerprint(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 30, "dog": 30})
    one, two, other = load(tmp_path), load(tmp_path), load(tmp_path, seed=1)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.select.rows.tolist() == two.select.rows.tolist() != other.select.rows.tolist()
    fill(tmp_path, {"cat": 1}, start=7)
    assert load(tmp_path).fingerprint != one.fingerprint


def test_sizes_are_upper_limits(tmp_path: Path) -> None:
    data = load(fill(tmp_path, {"cat": 30, "dog": 30}), calibrate=4, select=6)
    assert (len(data.calibrate), len(data.select)) == (4, 6)


@pytest.mark.parametrize(
    ("classes", "loose", "message"),
    [
        ({}, False, "no class folders"),
        ({}, True, "images but no class folders"),
        ({"cat": 3}, False, "only one class, 'cat'"),
        ({"cat": 0, "dog": 0}, False, "holds no images"),
    ],
)
def test_folders_that_hold_no_data_set(classes: dict[str, int], loose: bool, message: str, tmp_path: Path) -> None:
    fill(tmp_path, classes)
    if loose:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.JPG", "JPEG")
    with pytest.raises(BadData, match=message):
        load(tmp_path)


def test_a_missing_folder_names_the_built_in_sets(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="is not a folder") as caught:
        load(str(tmp_path / "cifra10"))
    assert "cifar10" in caught.value.to_do


def test_a_class_without_images_is_noticed(tmp_path: Path) -> None:
    data = load(fill(tmp_path, {"cat": 10, "dog": 10, "owl": 0}))
    assert data.classes == ("cat", "dog", "owl")
    assert any("owl" in n for n in data.notices)


def test_a_class_in_val_that_train_lacks(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"cat": 10, "dog": 10})
    fill(tmp_path / "val", {"cat": 3, "dog": 3, "owl": 3})
    with pytest.raises(BadData, match="lacks: owl"):
        load(tmp_path)


def test_labels_are_numbered_by_the_train_folders(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"ant": 10, "cat": 10, "dog": 10})
    fill(tmp_path / "val", {"cat": 3, "dog": 3})
    data = load(tmp_path)
    assert counts(data.report.labels, np.arange(6)) == [0, 3, 3]
    assert any("ant" in n for n in data.notices)


def test_labels_json_gives_titles_in_both_languages(tmp_path: Path) -> None:
    fill(tmp_path, {"n01": 10, "n02": 10, "n03": 10})
    table = {"n01": {"name": "cat", "name_zh": "猫"}, "n02": {"name": "dog"}}
    (tmp_path / "labels.json").write_text(json.dumps(table, ensure_ascii=False), "utf-8")
    data = load(tmp_path)
    assert data.classes == ("cat", "dog", "n03")
    assert data.classes_zh == ("猫", "dog", "n03")


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"cat": "Cat"}', '{"cat": null}', "\ud83d"])
def test_a_broken_labels_json_is_named(text: str, tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / "labels.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadData, match=r"labels\.json cannot be read") as caught:
        load(tmp_path)
    assert "name_zh" in caught.value.to_do


# --- iterables --------------------------------------------------------------------------------------


def pairs(images: Any, classes: int = 2) -> list[tuple[Any, int]]:
    return [(image, i % classes) for i, image in enumerate(images)]


def all_pixels(data: Data, how: Preprocess | None = HOW) -> np.ndarray:
    """Pixels of all splits, put back into the order they came in."""
    parts = list(data.splits.values())
    order = np.argsort(np.concatenate([s.rows for s in parts]))
    return np.concatenate([s.pixels(how) for s in parts if len(s)])[order]


def test_pillow_images_and_uint8_arrays_and_tensors_mean_the_same() -> None:
    torch = pytest.importorskip("torch")
    x = noise(20)
    kinds = {
        "pillow": [Image.fromarray(i) for i in x],
        "hwc": list(x),
        "chw": [np.ascontiguousarray(i.transpose(2, 0, 1)) for i in x],
        "tensor": [torch.from_numpy(i.transpose(2, 0, 1).copy()) for i in x],
    }
    for name, images in kinds.items():
        np.testing.assert_array_equal(all_pixels(load(pairs(images))), x, err_msg=name)


def test_float_tensors_are_ready_inputs() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(20, 3, 8, 8)
    np.testing.assert_array_equal(all_pixels(load(pairs(x)), None), x.numpy())


def test_16_bit_pillow_images_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert np.unique(all_pixels(load(pairs([grey] * 20)))).tolist() == [128]


def test_a_generator_is_read_once() -> None:
    data = load((x, i % 2) for i, x in enumerate(noise(20)))
    assert total(data) == 20
    assert data.classes == ("0", "1")


class Endless:
    """A map-style data set as people write them: no IndexError at its end."""

    classes = ["猫", "dog"]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return noise(20)[i % 20], i % 2


def test_a_map_style_data_set_ends_at_its_length() -> None:
    data = load(Endless())
    assert total(data) == 20
    assert data.classes == ("猫", "dog")


def test_splits_of_an_iterable_are_disjoint_and_remembered() -> None:
    items = pairs(noise(60), 3)
    one, two = load(items), load(items)
    rows = np.concatenate([s.rows for s in one.splits.values()])
    assert sorted(rows.tolist()) == list(range(60))
    assert one.fingerprint == two.fingerprint
    items[0] = (items[1][0], items[0][1])
    assert load(items).fingerprint != one.fingerprint


def test_data_passes_unchanged() -> None:
    data = load(pairs(noise(20)))
    assert load(data) is data
    other = dataclasses.replace(data, name="x")
    assert load(other) is other


def _nothing() -> Iterator[Any]:
    yield from ()


IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "yields nothing"),
        (_nothing(), "yields nothing"),
        ([IMAGE, IMAGE], "Item 0 of the data is not a pair"),
        ([(IMAGE, 0), (IMAGE, 0, 1)], "Item 1 of the data is not a pair"),
        ([(IMAGE, 0), 5], "Item 1 of the data is not a pair"),
        ([(IMAGE, -1)], "Item 0: the label -1 is negative"),
        ([(IMAGE, "cat")], "the label 'cat' is not a whole number"),
        ([(IMAGE, 1.5)], "the label 1.5 is not a whole number"),
        ([(IMAGE, float("inf"))], "not a whole number"),
        ([(IMAGE, None)], "the label None is not a whole number"),
        ([(IMAGE, 10**12)], "over the limit"),
        ([(IMAGE, 1), (IMAGE, 1)], "All 2 labels are 1"),
        ([("a.jpg", 0)], "Item 0: an image of shape"),
        ([(np.zeros((4, 8, 8, 3), np.uint8), 0)], "Item 0: an image of shape"),
        ([(np.zeros((8, 8, 5), np.uint8), 0)], "Item 0: an image of shape"),
        ([(np.zeros((8, 8, 3), np.int64), 0)], "type int64 is not understood"),
    ],
)
def test_what_is_wrong_with_an_item_is_named(items: Any, message: str) -> None:
    with pytest.raises(BadData, match=message):
        load(items)


def test_batches_of_a_loader_are_refused_as_such() -> None:
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(pairs(list(torch.randn(8, 3, 8, 8))), batch_size=4)
    with pytest.raises(BadData, match=r"shape \(4, 3, 8, 8\)"):
        load(loader)
    with pytest.raises(BadData, match="not a whole number"):
        load([(torch.zeros(3, 8, 8), torch.tensor([1, 2]))])


def test_tensors_that_cannot_be_read_are_named() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(BadData, match="Item 0: the image cannot be read"):
        load([(torch.zeros(3, 8, 8, requires_grad=True), 0)])


def test_fewer_class_names_than_labels() -> None:
    class Two(Endless):
        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            return IMAGE, i % 3

    with pytest.raises(BadData, match="names 2 classes, but a label is 2"):
        load(Two())


def test_what_is_no_data_at_all() -> None:
    with pytest.raises(BadData, match="int is no data"):
        load(5)
