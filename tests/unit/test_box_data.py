"""Boxes in: COCO, YOLO and Pascal VOC as written by hand, hostile ones refused by name, splits balanced and disjoint."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lighten.data.box_files import inside, part_of, read_xml
from lighten.data.box_names import COCO, VOC, chinese
from lighten.data.boxes import BoxArrays, BoxImages, balanced, framed, kind_of, load_boxes, moved, present
from lighten.data.preprocess import GREY, to_pixels
from lighten.errors import BadData
from lighten.types import Data, Preprocess

LETTERBOX = Preprocess(64, 96, mode="letterbox")


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: int = 90, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, colour // 2, 20)).save(path, **options)
    return path


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(act: Callable[[], Any], *words: str) -> BadData:
    with pytest.raises(BadData) as caught:
        act()
    assert caught.value.to_do
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def boxes_of(data: Data, file: str) -> list[list[float]]:
    """The boxes of one image, wherever it is."""
    for split in data.splits.values():
        for k in split.rows:
            if Path(split.images.name(int(k))).name == file:
                rows = split.images.labels[k]
                return rows[rows[:, 0] >= 0].tolist()
    raise AssertionError(f"{file} is in no split")


# --- sets written by hand -----------------------------------------------------------------------------


def coco(root: Path, n: int = 12, part: str = "train2017", first: int = 0, **change: Any) -> Path:
    """Images of 40 x 30 with one cat at 4, 6, 14, 26 and a dog (a crowd in image 0); ids of categories have gaps."""
    images = [{"id": k, "file_name": f"{first + k:03}.jpg", "width": 40, "height": 30} for k in range(n)]
    annotations: list[dict[str, Any]] = []
    for k in range(n):
        picture(root / part / f"{first + k:03}.jpg")
        for category, box in ((18, [4, 6, 10, 20]), (90, [20.5, 1, 5, 5.25])):
            row = {"id": len(annotations), "image_id": k, "category_id": category, "bbox": box, "iscrowd": 0}
            annotations.append(row | {"iscrowd": int(k == 0 and category == 90)})
    content: dict[str, Any] = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "dog"}, {"id": 18, "name": "cat"}],
    }
    for key, edit in change.items():
        edit(content[key])
    return written(root / "annotations" / f"instances_{part}.json", json.dumps(content))


def yolo(root: Path, n: int = 12, part: str = "train") -> Path:
    for k in range(n):
        picture(root / "images" / part / f"{part}{k:03}.png")
        written(root / "labels" / part / f"{part}{k:03}.txt", "0 0.5 0.5 0.5 0.5\n1 0.25 0.5 0.1 0.2\n")
    named = "".join(f"{p}: images/{p}\n" for p in ("train", "val") if (root / "images" / p).is_dir())
    return written(root / "data.yaml", f"path: .\n{named}test: images/test\nnames:\n  0: cat\n  1: traffic light\n")


def voc_page(key: str, *objects: str, size: str = "<width>40</width><height>30</height>") -> str:
    return f"<annotation><filename>{key}.jpg</filename><size>{size}</size>{''.join(objects)}</annotation>"


def voc_object(name: str, x1: Any, y1: Any, x2: Any, y2: Any, difficult: int = 0) -> str:
    box = f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{part}{box}</object>"


def voc(root: Path, n: int = 12, year: str = "") -> Path:
    home = root / year
    for k in range(n):
        picture(home / "JPEGImages" / f"{k:06}.jpg")
        page = voc_page(f"{k:06}", voc_object("person", 1, 1, 40, 30), voc_object("cat", 5, 7, 14, 26.0, int(k == 0)))
        written(home / "Annotations" / f"{k:06}.xml", page)
    return root


# --- what is read -------------------------------------------------------------------------------------


def test_coco_boxes_are_corners_classes_go_by_id_and_crowds_are_ignored(tmp_path: Path) -> None:
    coco(tmp_path)
    data = load_boxes(tmp_path)
    assert (data.classes, data.classes_zh) == (("cat", "dog"), ("猫", "狗"))
    assert boxes_of(data, "001.jpg") == [[0, 4, 6, 14, 26, 0], [1, 20.5, 1, 25.5, 6.25, 0]]
    assert boxes_of(data, "000.jpg")[1][5] == 1
    assert data.train.labels.dtype == np.float32
    assert data.train.images.sizes.tolist() == [[40, 30]] * 12


def test_coco_is_read_as_pycocotools_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = pytest.importorskip("pycocotools.coco")
    file = coco(tmp_path, 20)
    content = json.loads(file.read_text())
    rng = np.random.default_rng(0)
    for row in content["annotations"]:
        x, y = rng.uniform(0, 20, 2)
        row["bbox"] = [round(float(v), 2) for v in (x, y, rng.uniform(1, 19), rng.uniform(1, 9))]
        row["area"], row["image_id"] = 1, int(rng.integers(20))
    file.write_text(json.dumps(content))
    data, known = load_boxes(tmp_path), theirs.COCO(str(file))
    numbers = {c["id"]: k for k, c in enumerate(sorted(content["categories"], key=lambda c: c["id"]))}
    for image in content["images"]:
        rows = known.loadAnns(known.getAnnIds(imgIds=image["id"]))
        want = [[numbers[r["category_id"]], *_corners(r["bbox"]), r["iscrowd"]] for r in rows]
        got = np.array(boxes_of(data, image["file_name"])).reshape(-1, 6)
        np.testing.assert_allclose(got, np.array(want).reshape(-1, 6), atol=1e-5)


def _corners(bbox: list[float]) -> list[float]:
    x, y, w, h = bbox
    return [x, y, x + w, y + h]


def test_yolo_shares_become_pixels_of_each_image(tmp_path: Path) -> None:
    yolo(tmp_path)
    picture(tmp_path / "images/train/wide.png", (200, 10))
    written(tmp_path / "labels/train/wide.txt", "1 0.5 0.5 1 1\n")
    yolo(tmp_path, 3, "val")
    data = load_boxes(tmp_path / "data.yaml")
    assert data.classes_zh == ("猫", "红绿灯")
    np.testing.assert_allclose(
        boxes_of(data, "train000.png"), [[0, 10, 7.5, 30, 22.5, 0], [1, 8, 12, 12, 18, 0]], atol=1e-5
    )
    assert boxes_of(data, "wide.png") == [[1, 0, 0, 200, 10, 0]]
    assert {Path(data.report.images.name(int(k))).name for k in data.report.rows} == {f"val00{k}.png" for k in range(3)}


def test_yolo_outlines_become_the_boxes_around_them(tmp_path: Path) -> None:
    yolo(tmp_path)
    written(tmp_path / "labels/train/train000.txt", "1 0.1 0.2 0.5 0.9 0.3 0.1\n")
    data = load_boxes(tmp_path)
    np.testing.assert_allclose(boxes_of(data, "train000.png"), [[1, 4, 3, 20, 27, 0]], atol=1e-5)
    assert any("1 outlines" in n for n in data.notices)


def test_yolo_lists_of_files_and_roboflow_paths_are_understood(tmp_path: Path) -> None:
    yolo(tmp_path)
    listed = "".join(f"./images/train/train{k:03}.png\n" for k in range(10))
    written(tmp_path / "some.txt", listed)
    written(tmp_path / "data.yaml", "train: some.txt\nnames: [cat, dog]\nnc: 2\n")
    assert sum(len(s) for s in load_boxes(tmp_path).splits.values()) == 10
    written(tmp_path / "data.yaml", "train: ../images/train\nnames: [cat, dog]\n")
    assert sum(len(s) for s in load_boxes(tmp_path).splits.values()) == 12


def test_voc_counts_pixels_from_one_and_difficult_is_ignored(tmp_path: Path) -> None:
    data = load_boxes(voc(tmp_path))
    assert (data.classes, data.classes_zh) == (("cat", "person"), ("猫", "人"))
    assert boxes_of(data, "000001.jpg") == [[1, 0, 0, 40, 30, 0], [0, 4, 6, 14, 26, 0]]
    assert boxes_of(data, "000000.jpg")[1][5] == 1


def test_voc_years_are_one_set_and_test_is_the_report(tmp_path: Path) -> None:
    voc(tmp_path, 12, "VOC2007")
    voc(tmp_path, 10, "VOC2012")
    for year, trainval, test in (("VOC2007", range(9), range(9, 12)), ("VOC2012", range(10), ())):
        sets = tmp_path / year / "ImageSets" / "Main"
        written(sets / "trainval.txt", "".join(f"{k:06}\n" for k in trainval))
        written(sets / "cat_trainval.txt", "000000  1\n")
        if test:
            written(sets / "test.txt", "".join(f"{k:06}\n" for k in test))
    data = load_boxes(tmp_path)
    assert len(data.report) == 3
    assert len(data.train) + len(data.calibrate) + len(data.select) == 19


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_what_a_folder_holds_is_recognised(kind: str, tmp_path: Path) -> None:
    {"coco": coco, "yolo": yolo, "voc": voc}[kind](tmp_path)
    assert kind_of(tmp_path) == kind


def test_a_json_a_yaml_and_a_mapping_name_their_images(tmp_path: Path) -> None:
    train, val = coco(tmp_path), coco(tmp_path, 3, "val2017", 100)
    assert kind_of(train) == "coco"
    assert sum(len(s) for s in load_boxes(train).splits.values()) == 12
    rows = {"train": {"images": "train2017", "annotations": "annotations/instances_train2017.json"}}
    file = written(tmp_path / "mine.yaml", json.dumps(rows))
    assert kind_of(file) == "named"
    assert sum(len(s) for s in load_boxes(file).splits.values()) == 12
    named = {
        "train": {"images": str(tmp_path / "train2017"), "annotations": str(train)},
        "val": {"images": str(tmp_path / "val2017"), "annotations": str(val)},
    }
    assert len(load_boxes(named).report) == 3


def test_roboflow_folders_of_coco_are_recognised(tmp_path: Path) -> None:
    for part, n, first in (("train", 12, 0), ("valid", 10, 50), ("test", 3, 90)):
        file = coco(tmp_path, n, part, first)
        file.rename(tmp_path / part / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    data = load_boxes(tmp_path)
    assert len(data.report) == 3
    held = {Path(s.images.name(int(k))).name for s in (data.calibrate, data.select) for k in s.rows}
    assert held <= {f"{k:03}.jpg" for k in range(50, 60)}, "calibrate and select come from the val part"


def test_folders_of_classes_and_other_things_are_no_sets_of_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "a.jpg")
    written(tmp_path / "settings.yaml", "seed: 1\n")
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "nowhere") is None
    assert kind_of(tmp_path / "train" / "cat" / "a.jpg") is None
    refusal(lambda: load_boxes(tmp_path), str(tmp_path))


def test_part_names_are_read_from_words() -> None:
    assert [part_of(n) for n in ("instances_val2017", "trainval", "my-test", "latest", "valley")] == [
        "val",
        "train",
        "test",
        None,
        None,
    ]


def test_chinese_names_of_all_known_classes() -> None:
    assert (len(COCO), len(VOC)) == (80, 20)
    assert all(zh != en for en, zh in zip((*COCO, *VOC), chinese((*COCO, *VOC))))
    assert chinese(("Traffic_Light", "gadget")) == ("红绿灯", "gadget")


def test_own_titles_win(tmp_path: Path) -> None:
    coco(tmp_path)
    written(tmp_path / "labels.json", '{"cat": {"name": "kitten", "name_zh": "小猫"}}')
    data = load_boxes(tmp_path)
    assert (data.classes, data.classes_zh) == (("kitten", "dog"), ("小猫", "狗"))


# --- splits -------------------------------------------------------------------------------------------


def random_labels(n: int, classes: int, seed: int = 0) -> np.ndarray:
    """Up to four boxes an image; class k is about k + 1 times rarer than class 0."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, classes + 1)
    k = rng.choice(classes, (n, 4), p=weights / weights.sum()).astype(np.float32)
    k[rng.random((n, 4)) < 0.4] = -1
    return np.concatenate([k[..., None], np.tile([0, 0, 9, 9, 0], (n, 4, 1))], 2).astype(np.float32)


def test_splits_are_disjoint_exact_in_size_and_the_same_for_the_same_seed() -> None:
    labels, sizes = random_labels(1000, 12), {"calibrate": 100, "select": 150, "report": 200}
    rows = balanced(labels, sizes, 3)
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(1000))
    assert {k: len(v) for k, v in rows.items()} == {"train": 550, **sizes}
    again, other = balanced(labels, sizes, 3), balanced(labels, sizes, 4)
    assert all(np.array_equal(rows[k], again[k]) for k in rows)
    assert not np.array_equal(rows["select"], other["select"])


def test_each_split_has_its_share_of_every_class() -> None:
    """Every class within one and a half images of its share; random splits of the same sizes are several times off."""
    labels, sizes = random_labels(2000, 12), {"calibrate": 200, "select": 300, "report": 400}
    has = present(labels)
    worst = max(
        abs(has[rows].sum(0) - len(rows) / 2000 * has.sum(0)).max() for rows in balanced(labels, sizes, 0).values()
    )
    shuffled = np.random.default_rng(0).permutation(2000)
    chance = max(abs(has[r].sum(0) - len(r) / 2000 * has.sum(0)).max() for r in np.split(shuffled, [200, 500, 900]))
    assert worst < chance / 3
    assert worst < 0.03 * has.sum(0).max()


def test_a_class_with_an_image_for_each_split_is_in_each() -> None:
    labels = random_labels(400, 3)
    labels[:5, 0, 0] = 3  # a fourth class, in five images
    rows = balanced(labels, {"calibrate": 20, "select": 20, "report": 20}, 0)
    assert all(present(labels[r], 4)[:, 3].any() for r in rows.values())


def test_no_image_is_in_two_parts(tmp_path: Path) -> None:
    yolo(tmp_path, 20)
    yolo(tmp_path, 3, "val")
    written(tmp_path / "data.yaml", "train: images\nval: images/val\nnames: [cat, dog]\n")
    data = load_boxes(tmp_path)
    mine = {data.train.images.name(int(k)) for s in (data.train, data.calibrate, data.select) for k in s.rows}
    assert not mine & {data.report.images.name(int(k)) for k in data.report.rows}
    assert any("3 images of train are in a later part too" in n for n in data.notices)
    written(tmp_path / "data.yaml", "train: images/train\nval: images/train\nnames: [cat, dog]\n")
    whole = load_boxes(tmp_path)
    assert sum(len(s) for s in whole.splits.values()) == 20


def test_the_fingerprint_knows_labels_and_seed(tmp_path: Path) -> None:
    yolo(tmp_path)
    first = load_boxes(tmp_path).fingerprint
    assert first == load_boxes(tmp_path).fingerprint != load_boxes(tmp_path, seed=1).fingerprint
    written(tmp_path / "labels/train/train003.txt", "0 0.5 0.5 0.5 0.4\n")
    assert load_boxes(tmp_path).fingerprint != first


# --- the network's input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        LETTERBOX,
        Preprocess(96, 64, mode="letterbox"),
        Preprocess(64, 96),
        Preprocess(48, 48, mode="crop", resize=64),
    ],
    ids=["letterbox", "tall letterbox", "stretch", "crop"],
)
@pytest.mark.parametrize("size", [(200, 120), (90, 160), (64, 64)])
def test_boxes_move_as_the_pixels_do(how: Preprocess, size: tuple[int, int]) -> None:
    """A white rectangle, scaled by Pillow: where its pixels are is where its box is."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    x1, y1, x2, y2 = (round(f * s) for f, s in zip((0.3, 0.35, 0.7, 0.6), (*size, *size)))
    image[y1:y2, x1:x2] = 255
    labels = np.array([[[4, x1, y1, x2, y2, 1]]], np.float32)
    row = moved(labels, np.array([size]), how)[0, 0]
    bright = to_pixels(image, how)[..., 0] > 127 + (GREY > 127) * 60
    xs, ys = np.flatnonzero(bright.any(0)), np.flatnonzero(bright.any(1))
    np.testing.assert_allclose(row[1:5], [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], atol=1.01)
    assert (row[0], row[5]) == (4, 1)


def test_letterboxed_by_hand() -> None:
    """200 x 100 into 96 x 64: scale 0.48, 96 x 48, eight rows of grey above."""
    labels = np.array([[[1, 50, 25, 100, 75, 0], [0, -20, 0, 400, 100, 0], [-1, 0, 0, 0, 0, 0]]], np.float32)
    got = moved(labels, np.array([[200, 100]]), LETTERBOX)[0]
    np.testing.assert_allclose(got[0], [1, 24, 20, 48, 44, 0], atol=1e-5)
    np.testing.assert_allclose(got[1], [0, 0, 8, 96, 56, 0], atol=1e-5)
    assert got[2, 0] == -1


def test_a_box_that_is_cut_away_is_no_box() -> None:
    labels = np.array([[[1, 0, 0, 20, 10, 0], [2, 90, 0, 110, 100, 0]]], np.float32)
    got = moved(labels, np.array([[200, 100]]), Preprocess(50, 50, mode="crop", resize=50))
    assert got[0, 0].tolist() == [-1, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(got[0, 1, 1:5], [20, 0, 30, 50], atol=1e-5)


def test_data_is_framed_once_and_shared_images_stay_shared(tmp_path: Path) -> None:
    coco(tmp_path)
    data = framed(load_boxes(tmp_path), LETTERBOX)
    assert data.train.images is data.select.images
    assert data.train.images.how == LETTERBOX
    assert framed(data, LETTERBOX).train.images is data.train.images
    with pytest.raises(ValueError, match="already"):
        framed(data, Preprocess(32, 32))
    arrays = BoxArrays(np.zeros((2, 30, 40, 3), np.uint8), np.zeros((2, 1, 6), np.float32))
    assert arrays.sizes.tolist() == [[40, 30]] * 2
    assert arrays.in_frame(LETTERBOX).how == LETTERBOX


# --- what is wrong, but usable ----------------------------------------------------------------------------


def codes(images: BoxImages) -> dict[str, str]:
    return {f.code: f.what for f in images.findings}


def test_boxes_that_stick_out_are_cut_and_counted_flat_and_lost_ones_left_out(tmp_path: Path) -> None:
    def edit(rows: list[dict[str, Any]]) -> None:
        rows[0]["bbox"], rows[2]["bbox"] = [-5, -5, 60, 20], [10, 10, 0, 5]
        rows[4]["bbox"], rows[6]["bbox"] = [100, 100, 5, 5], [-0.5, 0, 40.5, 30]

    coco(tmp_path, annotations=edit)
    data = load_boxes(tmp_path)
    assert boxes_of(data, "000.jpg")[0] == [0, 0, 0, 40, 15, 0]
    assert len(boxes_of(data, "001.jpg")) == len(boxes_of(data, "002.jpg")) == 1
    assert boxes_of(data, "003.jpg")[0] == [0, 0, 0, 40, 30, 0]
    said = codes(data.train.images)
    assert "1 of 24 boxes stick out" in said["clipped"]
    assert "1 of 24 boxes have no area" in said["zero-area"]
    assert "1 of 24 boxes lie outside" in said["outside"]


def test_images_that_are_missing_are_listed_and_left_out(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "train2017" / "003.jpg").unlink()
    data = load_boxes(tmp_path)
    assert sum(len(s) for s in data.splits.values()) == 11
    assert any("1 of 12 images are missing" in n and "003.jpg" in n for n in data.notices)


def test_all_images_missing_is_an_error(tmp_path: Path) -> None:
    file = coco(tmp_path)
    for image in (tmp_path / "train2017").iterdir():
        image.unlink()
    refusal(lambda: load_boxes(tmp_path), str(file), "000.jpg")
    home = voc(tmp_path / "voc")
    for image in (home / "JPEGImages").iterdir():
        image.unlink()
    refusal(lambda: load_boxes(home), "train", "000000")


def test_the_file_s_own_size_counts(tmp_path: Path) -> None:
    coco(tmp_path)
    picture(tmp_path / "train2017" / "002.jpg", (20, 15))
    data = load_boxes(tmp_path)
    assert boxes_of(data, "002.jpg")[0] == [0, 4, 6, 14, 15, 0]
    assert "002.jpg (40x30, is 20x15)" in codes(data.train.images)["sizes"]


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    coco(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(tmp_path / "train2017" / "002.jpg", exif=turned)
    images = load_boxes(tmp_path).train.images
    k = next(k for k in range(12) if images.name(k).endswith("002.jpg"))
    assert images.sizes[k].tolist() == [30, 40] == list(images.read(k).size)


def test_damaged_images_are_named(tmp_path: Path) -> None:
    coco(tmp_path)
    written(tmp_path / "train2017" / "005.jpg", b"no image at all")
    data = load_boxes(tmp_path)
    assert sum(len(s) for s in data.splits.values()) == 11
    assert "005.jpg" in codes(data.train.images)["unreadable"]


def test_images_without_boxes_stay_and_are_counted(tmp_path: Path) -> None:
    yolo(tmp_path)
    written(tmp_path / "labels/train/train000.txt", "\n")
    (tmp_path / "labels/train/train001.txt").unlink()
    data = load_boxes(tmp_path)
    assert boxes_of(data, "train000.png") == boxes_of(data, "train001.png") == []
    assert any("2 of 12 images have no box (1 label files are empty, 1 missing)" in n for n in data.notices)


# --- garbage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, word",
    [
        ("0 0.5 0.5 0.5", "4 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.9", "6 numbers"),
        ("0 0.5 0.5 nan 0.5", "nan"),
        ("0 0.5 0.5 inf 0.5", "inf"),
        ("0 0.5 0.5 -0.2 0.5", "negative"),
        ("0 20 15 10 10", "20"),
        ("2 0.5 0.5 0.5 0.5", "class 2"),
        ("-1 0.5 0.5 0.5 0.5", "class -1"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5"),
        ("cat 0.5 0.5 0.5 0.5", "cat"),
        ("1e400 0.5 0.5 0.5 0.5", "class inf"),
        ("nan 0.5 0.5 0.5 0.5", "class nan"),
    ],
)
def test_yolo_lines_that_make_no_sense_are_named(line: str, word: str, tmp_path: Path) -> None:
    yolo(tmp_path)
    written(tmp_path / "labels/train/train004.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    refusal(lambda: load_boxes(tmp_path), "train004.txt, line 2", word)


@pytest.mark.parametrize(
    "text, words",
    [
        ("names: [cat, dog]\ntrain: nowhere\n", ["nowhere"]),
        ("names: [cat, dog]\ntrain: /etc\n", ["/etc", "leads out"]),
        ("names: [cat, dog]\ntrain: images/../../x\n", ["leads out"]),
        ("names: [cat, dog]\ntrain: images/train\nnc: 3\n", ["nc", "3"]),
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", ["numbered"]),
        ("names: [cat, cat]\ntrain: images/train\n", ["twice"]),
        ("names: [[a], b]\ntrain: images/train\n", ["class name"]),
        ("names: []\ntrain: images/train\n", ["names"]),
        ("names: [cat, dog]\ntrain: {a: 1}\n", ["data.yaml"]),
        ("names: &a [cat, dog]\ntrain: images/train\nother: *a\n", ["aliases"]),
        ("path: /etc\nnames: [cat, dog]\ntrain: passwd.d\n", ["/etc"]),
        ("names: [cat, dog\n", ["YAML"]),
        ("- 1\n", ["keys"]),
    ],
)
def test_a_data_yaml_that_makes_no_sense_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    yolo(tmp_path)
    refusal(lambda: load_boxes(written(tmp_path / "data.yaml", text)), *words)


def test_a_broken_data_yaml_of_a_folder_is_what_is_told(tmp_path: Path) -> None:
    file = yolo(tmp_path)
    file.write_text("names: [cat, dog\n")
    refusal(lambda: load_boxes(tmp_path), str(file), "YAML")
    file.write_text("train: images/train\n")
    refusal(lambda: load_boxes(tmp_path), str(file), "names")


@pytest.mark.parametrize("row", [{"images": None, "annotations": 3}, {"images": "x"}, "x", None])
def test_a_mapping_that_names_no_paths_is_refused(row: Any) -> None:
    refusal(lambda: load_boxes({"train": row}), "train")
    refusal(lambda: load_boxes({"trian": row}), "trian")


def test_a_yaml_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    coco(tmp_path / "set")
    rows = {"train": {"images": "../set/train2017", "annotations": "set/annotations/instances_train2017.json"}}
    refusal(lambda: load_boxes(written(tmp_path / "mine.yaml", json.dumps(rows))), "mine.yaml", "leads out")


def set_row(index: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[index].update(values)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"annotations": set_row(3, bbox=[1, 2, float("nan"), 4])}, ["annotation 3", "nan"]),
        ({"annotations": set_row(3, bbox=[1, 2, float("inf"), 4])}, ["annotation 3", "inf"]),
        ({"annotations": set_row(3, bbox=[1, 2, -3, 4])}, ["annotation 3", "negative"]),
        ({"annotations": set_row(3, bbox=[1, 2, 3])}, ["annotation 3", "bbox"]),
        ({"annotations": set_row(3, bbox="1 2 3 4")}, ["annotation 3", "bbox"]),
        ({"annotations": set_row(3, bbox=[1, 2, True, 4])}, ["annotation 3"]),
        ({"annotations": set_row(3, bbox=[1, 2, 10**30, 4])}, ["annotation 3"]),
        ({"annotations": set_row(3, category_id=7)}, ["annotation 3", "category_id 7"]),
        ({"annotations": set_row(3, category_id=[1])}, ["annotation 3", "category_id"]),
        ({"annotations": set_row(3, image_id=99)}, ["annotation 3", "image_id 99"]),
        ({"images": set_row(2, id=0)}, ["twice"]),
        ({"images": set_row(2, file_name="000.jpg")}, ["000.jpg", "twice"]),
        ({"images": set_row(2, file_name="../secret.jpg")}, ["../secret.jpg", "leads out"]),
        ({"images": set_row(2, file_name="/etc/passwd")}, ["/etc/passwd", "leads out"]),
        ({"images": set_row(2, file_name="C:\\x.jpg")}, ["leads out"]),
        ({"images": set_row(2, file_name="..\\x.jpg")}, ["leads out"]),
        ({"images": set_row(2, file_name=5)}, ["file name"]),
        ({"images": set_row(2, id=None)}, ["image id None"]),
        ({"categories": set_row(0, id="x")}, ["category id"]),
        ({"categories": set_row(0, id=18)}, ["category 18"]),
        ({"categories": set_row(0, name="cat")}, ["cat", "twice"]),
        ({"categories": set_row(0, name="")}, ["category id 90"]),
        ({"categories": list.clear}, ["0 categories"]),
        ({"annotations": lambda rows: rows.append(5)}, ["annotations"]),
    ],
)
def test_coco_entries_that_make_no_sense_are_named(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    file = coco(tmp_path, **change)
    refusal(lambda: load_boxes(tmp_path), str(file), *words)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"5", b"[" * 100_000, b"\xff\xfe\x00", b'{"images": 1}', b"1" * 5000]
)
def test_json_that_is_none_is_refused(text: bytes, tmp_path: Path) -> None:
    coco(tmp_path)
    file = written(tmp_path / "annotations" / "instances_train2017.json", text)
    refusal(lambda: load_boxes(tmp_path), str(file))


def test_a_part_with_more_classes_than_train_is_refused(tmp_path: Path) -> None:
    coco(tmp_path)
    file = coco(tmp_path, 3, "val2017", 50, categories=set_row(0, name="zebra"))
    refusal(lambda: load_boxes(tmp_path), str(file), "zebra")


def test_too_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = coco(tmp_path)
    monkeypatch.setattr("lighten.data.box_files.MAX_JSON", 1000)
    refusal(lambda: load_boxes(tmp_path), str(file), "larger")


def test_an_image_with_thousands_of_boxes_does_not_eat_the_memory(tmp_path: Path) -> None:
    yolo(tmp_path)
    written(tmp_path / "labels/train/train003.txt", "0 0.5 0.5 0.5 0.5\n" * 2001)
    refusal(lambda: load_boxes(tmp_path), "train003.png", "2,001 boxes")


LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
FETCH = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation><filename>&a;</filename></annotation>'


@pytest.mark.parametrize(
    "page, word",
    [
        (LAUGHS, "DOCTYPE"),
        (FETCH, "DOCTYPE"),
        (LAUGHS.encode("utf-16"), "DOCTYPE"),
        ("<annotation>", "XML"),
        ("", "XML"),
        (b"\x00\x01", "XML"),
        ("<other/>", "other"),
        ("<annotation>" + "<a>" * 50 + "</a>" * 50 + "</annotation>", "nested"),
        (voc_page("000002", voc_object("cat", 1, 2, "nan", 4)), "cat"),
        (voc_page("000002", voc_object("cat", 1, 2, "wide", 4)), "cat"),
        (voc_page("000002", voc_object("cat", 9, 2, 3, 4)), "9"),
        (voc_page("000002", voc_object("", 1, 2, 3, 4)), "name"),
        (voc_page("000002", "<object><name>cat</name></object>"), "cat"),
        (voc_page("../../x"), ".."),
    ],
)
def test_voc_pages_that_make_no_sense_are_named(page: str | bytes, word: str, tmp_path: Path) -> None:
    voc(tmp_path)
    file = written(tmp_path / "Annotations" / "000002.xml", page)
    if word == "..":
        (tmp_path / "JPEGImages" / "000002.jpg").unlink()
    refusal(lambda: load_boxes(tmp_path), str(file), word)


def test_entities_are_never_expanded(tmp_path: Path) -> None:
    refusal(lambda: read_xml(written(tmp_path / "a.xml", LAUGHS)), "DOCTYPE")
    assert read_xml(written(tmp_path / "b.xml", "<a><b>&lt;1&#50;</b></a>")).findtext("b") == "<12"


def test_links_out_of_the_set_are_refused_by_name(tmp_path: Path) -> None:
    secret = picture(tmp_path / "private" / "me.png")
    yolo(tmp_path / "set")
    os.symlink(secret, tmp_path / "set" / "images" / "train" / "train099.png")
    refusal(lambda: load_boxes(tmp_path / "set"), "train099.png", "outside")


def test_a_linked_folder_of_images_is_refused_and_one_inside_is_fine(tmp_path: Path) -> None:
    file = coco(tmp_path / "set")
    (tmp_path / "set" / "train2017").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "train2017")
    refusal(lambda: load_boxes(tmp_path / "set"), str(file), "outside")
    os.unlink(tmp_path / "set" / "train2017")
    (tmp_path / "elsewhere").rename(tmp_path / "set" / "store")
    os.symlink("store", tmp_path / "set" / "train2017")
    assert sum(len(s) for s in load_boxes(tmp_path / "set").splits.values()) == 12


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 5000, None, 3, ["a"]])
def test_names_that_are_no_paths_are_refused(name: Any, tmp_path: Path) -> None:
    refusal(lambda: inside(tmp_path, name, "here"), "here", "no file name")


def test_voc_ids_do_not_lead_out(tmp_path: Path) -> None:
    voc(tmp_path / "set")
    written(tmp_path / "set" / "ImageSets" / "Main" / "train.txt", "000000\n../../../etc/passwd\n")
    refusal(lambda: load_boxes(tmp_path / "set"), "leads out")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    coco(tmp_path, 7)
    refusal(lambda: load_boxes(tmp_path), "7 images")


def test_two_files_of_one_part_are_refused(tmp_path: Path) -> None:
    coco(tmp_path)
    coco(tmp_path, 3, "train2014", 50)
    refusal(lambda: load_boxes(tmp_path), "train2014", "train2017")


def test_splits_read_and_prepare_letterboxed(tmp_path: Path) -> None:
    coco(tmp_path)
    data = framed(load_boxes(tmp_path), LETTERBOX)
    ready = data.train.prepare(LETTERBOX)
    assert ready.ready is not None
    assert ready.ready.shape[1:] == (64, 96, 3)
    assert ready.labels.shape == (len(ready), 2, 6)
    assert dataclasses.replace(ready).take(2).labels.shape == (2, 2, 6)
