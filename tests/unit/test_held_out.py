"""Images that the model was not trained on: calibrate and select take those and no others, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lighten.data import load, read_held_out
from lighten.errors import BadData
from lighten.types import Data

EACH = {"a": 40, "b": 20}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 40 and 20 images of two classes, test/ with 5 of each."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, counts in (("train", EACH), ("test", dict.fromkeys(EACH, 5))):
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{k:02d}.png")
    return root


HELD = (*range(0, 40, 2), *range(40, 60, 2))
"""Every other image: 20 of a, 10 of b."""


def rows(data: Data) -> dict[str, set[int]]:
    return {name: set(split.rows.tolist()) for name, split in data.splits.items()}


def test_calibrate_and_select_are_the_held_out_images_and_train_is_the_rest(photos: Path) -> None:
    found = rows(load(photos, held_out=HELD))
    assert found["calibrate"] | found["select"] == set(HELD)
    assert not found["calibrate"] & found["select"]
    assert found["train"] == set(range(60)) - set(HELD)
    assert found["report"] == rows(load(photos))["report"]


def test_each_split_has_its_share_of_every_class(photos: Path) -> None:
    data = load(photos, held_out=HELD)
    assert np.bincount(data.calibrate.labels).tolist() == [3, 1]  # 15 % of 30 is 4: two thirds and one third, rounded
    assert np.bincount(data.select.labels).tolist() == [17, 9]


def test_sizes_that_are_asked_for_are_kept_and_the_rest_is_left_out(photos: Path) -> None:
    data = load(photos, held_out=HELD, calibrate=2, select=10)
    assert (len(data.calibrate), len(data.select)) == (2, 10)
    assert not rows(data)["train"] & set(HELD)


def test_names_and_numbers_mean_the_same_images(photos: Path) -> None:
    every = load(photos).train.images
    by_name = load(photos, held_out=[every.name(i) for i in HELD])
    by_number = load(photos, held_out=HELD)
    assert rows(by_name) == rows(by_number)
    assert by_name.fingerprint == by_number.fingerprint


def test_the_fingerprint_knows_which_images_but_not_their_order(photos: Path) -> None:
    plain, first = load(photos), load(photos, held_out=HELD)
    assert load(photos, held_out=(*reversed(HELD), HELD[0])).fingerprint == first.fingerprint
    assert len({plain.fingerprint, first.fingerprint, load(photos, held_out=HELD[1:]).fingerprint}) == 3


def test_the_seed_decides_which_are_calibrated_on(photos: Path) -> None:
    first, same, other = (rows(load(photos, held_out=HELD, seed=s))["calibrate"] for s in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ((60,), "Image 60 is held out, but there are only 60"),
        ((-1,), "Image -1 is held out"),
        (("train/a/00.jpg",), "is no training image"),
        ((0, 1, 2), "Only 3 images are held out, for 2 classes"),
        ((0, 0, 0, 0, 0), "Only 1 images"),
        ((), "Only 0 images"),
    ],
)
def test_mistakes_are_named(photos: Path, held: tuple[int | str, ...], says: str) -> None:
    with pytest.raises(BadData, match=says):
        load(photos, held_out=held)


def test_report_images_cannot_be_held_out_for_the_search() -> None:
    pairs = [(np.full((4, 4, 3), k, np.uint8), k % 2) for k in range(50)]
    taken = load(pairs).report.rows.tolist()
    with pytest.raises(BadData, match="2 of the held-out images are report images"):
        load(pairs, held_out=[*taken[:2], *(set(range(10)) - set(taken))])


def test_held_out_images_beside_a_report_of_the_same_pool_leave_it_alone() -> None:
    pairs = [(np.full((4, 4, 3), k, np.uint8), k % 2) for k in range(50)]
    report = set(load(pairs).report.rows.tolist())
    held = sorted(set(range(50)) - report)[:20]
    found = rows(load(pairs, held_out=held))
    assert found["report"] == report
    assert found["train"] == set(range(50)) - report - set(held)


def test_the_file_holds_one_image_a_line(tmp_path: Path) -> None:
    file = tmp_path / "held.txt"
    file.write_text("# of the training of May\n12\n\n  photos/a b.jpg \n007\n-3\n²\n", "utf-8")
    assert read_held_out(file) == (12, "photos/a b.jpg", 7, "-3", "²")


def test_files_that_name_nothing_are_refused(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("# nothing\n\n")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for file, says in ((empty, "names no image"), (binary, "cannot be read"), (tmp_path / "no.txt", "cannot be read")):
        with pytest.raises(BadData, match=says):
            read_held_out(file)
