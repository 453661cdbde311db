"""What is drawn where: decided before anything runs, and never over what was given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lighten.errors import BadConfig
from lighten.targets import Source, camera_target, sources, targets


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images, one deeper, beside other files."""
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", "deep/c.gif", "notes.txt", "film.mp4"):
        (root / name).write_bytes(b"x")
    return root


def named(*files: Path) -> tuple[Source, ...]:
    return sources(files)


def test_folders_are_walked_for_images_in_order_and_keep_their_names(photos: Path) -> None:
    found = sources([photos, photos / "film.mp4"])
    assert [str(row.name) for row in found] == ["a.PNG", "b.jpg", "deep/c.gif", "film.mp4"]
    assert [row.found for row in found] == [True, True, True, False]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no images"):
        sources([tmp_path])


def test_one_image_goes_to_the_file_that_was_named(photos: Path, tmp_path: Path) -> None:
    rows = named(photos / "b.jpg")
    assert targets(rows, tmp_path / "out.png") == {photos / "b.jpg": tmp_path / "out.png"}
    assert targets(rows, tmp_path / "new") == {photos / "b.jpg": tmp_path / "new" / "b.jpg"}
    film = named(photos / "film.mp4")
    assert targets(film, tmp_path / "out.avi") == {photos / "film.mp4": tmp_path / "out.avi"}


def test_several_images_go_to_a_folder_under_the_same_names(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    got = targets(sources([photos, photos / "film.mp4"]), out)
    assert got == {
        photos / "a.PNG": out / "a.PNG",
        photos / "b.jpg": out / "b.jpg",
        photos / "deep/c.gif": out / "deep/c.png",  # full colour does not fit into a GIF
        photos / "film.mp4": out / "film.mp4",
    }


@pytest.mark.parametrize("name", ["out.txt", "out.pgm", "out.mp4", "model.onnx"])
def test_what_an_image_cannot_be_drawn_to_is_refused(name: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=name):
        targets(named(photos / "b.jpg"), tmp_path / name)


def test_a_video_is_no_picture_and_several_files_are_not_one(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"out\.jpg") as e:
        targets(named(photos / "film.mp4"), tmp_path / "out.jpg")
    assert ".mp4" in e.value.to_do
    for rows in (sources([photos]), named(photos / "b.jpg", photos / "a.PNG")):
        with pytest.raises(BadConfig, match="cannot be drawn to one"):
            targets(rows, tmp_path / "out.jpg")
    (photos / "deep" / "c.gif").rename(photos / "deep" / "c.jpg")
    with pytest.raises(BadConfig, match="cannot be drawn to one"):  # a folder stays a folder though it holds one image
        targets(sources([photos / "deep"]), tmp_path / "out.jpg")


def test_a_plain_file_is_no_folder(photos: Path) -> None:
    (photos / "out").write_bytes(b"x")
    with pytest.raises(BadConfig, match="neither a folder"):
        targets(sources([photos]), photos / "out")


def test_nothing_that_was_given_is_drawn_over(photos: Path, tmp_path: Path) -> None:
    image = photos / "b.jpg"
    with pytest.raises(BadConfig, match="overwrite"):
        targets(named(image), image)
    with pytest.raises(BadConfig, match="overwrite"):
        targets(named(image), photos / "deep" / ".." / "b.jpg")
    with pytest.raises(BadConfig, match="overwrite"):
        targets(sources([photos]), photos)
    (tmp_path / "link.jpg").symlink_to(image)
    os.link(image, tmp_path / "hard.jpg")
    for name in ("link.jpg", "hard.jpg"):
        with pytest.raises(BadConfig, match="overwrite"):
            targets(named(image), tmp_path / name)


def test_two_images_never_become_one_file(photos: Path, tmp_path: Path) -> None:
    (photos / "deep" / "b.jpg").write_bytes(b"x")
    with pytest.raises(BadConfig, match="both"):
        targets(named(photos / "b.jpg", photos / "deep" / "b.jpg"), tmp_path / "out")
    twice = named(photos / "b.jpg", photos / "b.jpg")
    assert len(targets(twice, tmp_path / "out")) == 1


def test_a_camera_is_drawn_to_a_video(tmp_path: Path) -> None:
    assert camera_target(tmp_path / "out.mp4") == tmp_path / "out.mp4"
    for name in ("out", "out.jpg", "out.wmv"):
        with pytest.raises(BadConfig, match="out"):
            camera_target(tmp_path / name)
