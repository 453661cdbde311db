"""Boxes drawn: frames where they belong, Chinese letters from a font that has them, colours that everybody can tell."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from lighten.errors import BadConfig
from lighten.kit import draw as module
from lighten.kit.draw import COLOURS, colour, draw, font_for, labelled, missing

GREY = 120
ENGLISH, CHINESE = ("cat", "traffic light"), ("猫", "红绿灯")


def grey(width: int = 192, height: int = 128) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def chinese_here() -> bool:
    try:
        font_for("猫", 12)
    except BadConfig:
        return False
    return True


needs_chinese = pytest.mark.skipif(not chinese_here(), reason="no font with Chinese glyphs is installed here")


def row(x1: float, y1: float, x2: float, y2: float, score: float = 0.87, k: int = 0) -> np.ndarray:
    return np.array([[x1, y1, x2, y2, score, k]], np.float32)


def changed(image: Image.Image, before: np.ndarray) -> np.ndarray:
    return np.asarray((np.asarray(image) != before).any(2))


@pytest.mark.parametrize("size", [(192, 128), (1920, 1280)])
def test_the_frame_is_on_the_edges_of_the_box_in_the_class_s_colour(size: tuple[int, int]) -> None:
    w, h = size
    before = grey(w, h)
    x1, y1, x2, y2 = w // 4, h // 2, w // 2, h * 3 // 4
    pixels = np.asarray(draw(before, row(x1, y1, x2, y2), ENGLISH))
    for y, x in ((y1, (x1 + x2) // 2), (y2 - 1, (x1 + x2) // 2), ((y1 + y2) // 2, x1), ((y1 + y2) // 2, x2 - 1)):
        assert tuple(pixels[y, x]) == colour(0)
    inner = pixels[y1 + h // 20 : y2 - h // 20, x1 + w // 20 : x2 - w // 20]
    assert (inner == GREY).all(), "what was found stays to be seen"


def test_labels_stand_in_the_corner_one_under_the_other() -> None:
    before = grey(400, 300)
    one, two = (changed(labelled(before, texts), before) for texts in (["cat 87%"], ["cat 87%", "dog 9%"]))
    rows = [np.flatnonzero(seen.any(1)) for seen in (one, two)]
    assert rows[0][0] <= 4
    assert 1.5 * len(rows[0]) < len(rows[1]) < 60
    assert not one[:, 150:].any()
    assert not two[:, 150:].any()
    assert (one[: rows[0][-1]] <= two[: rows[0][-1]]).all(), "the first label is where it was"
    assert not changed(labelled(before, []), before).any()
    assert labelled(before[..., :1], ["a" * 500]).size == (400, 300)


def test_the_image_itself_is_left_alone() -> None:
    before = grey()
    picture = Image.fromarray(before.copy())
    assert changed(draw(picture, row(20, 60, 90, 110), ENGLISH), before).any()
    assert np.array_equal(np.asarray(picture), before)
    draw(before, row(20, 60, 90, 110), ENGLISH)
    assert (before == GREY).all()


def test_nothing_found_changes_nothing() -> None:
    assert not changed(draw(grey(), np.zeros((0, 6)), ENGLISH), grey()).any()


def test_grey_images_get_colours() -> None:
    for image in (grey()[..., :1], grey()[..., 0], Image.new("L", (192, 128), GREY)):
        assert draw(image, row(20, 60, 90, 110), ENGLISH).mode == "RGB"


@pytest.mark.parametrize(
    "box", [(-50, -50, 400, 400), (0, 0, 192, 128), (150, 100, 192, 128), (0, 0, 3, 2), (90, 50, 90, 50)]
)
def test_labels_stay_inside_the_image(box: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[float, ...]] = []
    plain = module._place
    monkeypatch.setattr(module, "_place", lambda *a: placed.append(plain(*a)) or placed[-1])
    draw(grey(), row(*box), ENGLISH)
    x1, y1, x2, y2 = placed[0]
    assert x1 >= 0
    assert y1 >= 0
    assert x2 <= 192
    assert y2 <= 128


def test_labels_of_neighbours_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[float, ...]] = []
    plain = module._place
    monkeypatch.setattr(module, "_place", lambda *a: placed.append(plain(*a)) or placed[-1])
    draw(grey(400, 400), np.concatenate([row(100, 200, 180, 300), row(105, 202, 185, 305, k=1)]), ENGLISH)
    (a, b) = placed
    assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_scores_are_written_and_left_out_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "_label", lambda pen, text, *_: said.append(text))
    draw(
        grey(),
        np.concatenate([row(9, 60, 90, 110), row(9, 60, 90, 110, np.nan, 1), row(9, 9, 90, 50, 0.5, 7)]),
        ENGLISH,
    )
    assert said == ["cat 87%", "traffic light", "7 50%"]


@pytest.mark.parametrize("bad", [(np.nan, 0, 9, 9), (0, np.inf, 9, 9)])
def test_boxes_that_are_no_numbers_are_not_drawn(bad: tuple[float, ...]) -> None:
    assert not changed(draw(grey(), row(*bad), ENGLISH), grey()).any()


def test_huge_boxes_and_names_do_no_harm() -> None:
    draw(grey(), row(-1e30, -1e30, 1e30, 1e30), ("a\nb\x00" * 500,))
    draw(grey(8, 8), row(0, 0, 8, 8), ENGLISH)


@needs_chinese
@pytest.mark.parametrize("size", [(192, 192), (1920, 1080)])
def test_chinese_names_are_written_large_enough(size: tuple[int, int]) -> None:
    font = font_for("红绿灯", max(9, round(9 + 0.016 * min(size))))
    left, top, right, bottom = font.getbbox("红绿灯")
    assert bottom - top >= 10, "strokes run together below ten pixels"
    assert (bottom - top) / min(size) < 0.08
    before = grey(*size)
    x1, y1 = size[0] // 4, size[1] // 2
    image = draw(before, row(x1, y1, x1 * 2, y1 + 60, k=1), CHINESE)
    assert changed(image, before)[y1 - (bottom - top) : y1, x1 : x1 + (right - left)].any()


@needs_chinese
def test_different_characters_look_different() -> None:
    pictures = [np.asarray(draw(grey(), row(20, 60, 90, 110), (name,))) for name in ("猫", "狗", "鸟", "马")]
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))


def test_missing_glyphs_are_seen() -> None:
    own = ImageFont.load_default(16)
    assert missing(own, "cat 87%") == ""
    assert missing(own, "a猫b") == "猫"


def test_without_a_chinese_font_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_candidates", lambda: iter(()))
    module._system.cache_clear()
    try:
        with pytest.raises(BadConfig, match="猫") as caught:
            draw(grey(), row(20, 60, 90, 110), CHINESE)
        assert "fonts-noto-cjk" in caught.value.to_do
        assert "fonts-wqy-microhei" in caught.value.to_do
        assert "English" in caught.value.to_do
        assert changed(draw(grey(), row(20, 60, 90, 110), ENGLISH), grey()).any(), "English needs no font"
    finally:
        module._system.cache_clear()


def test_a_font_file_that_is_none_or_lacks_the_glyphs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "my.ttf"
    file.write_bytes(b"no font")
    with pytest.raises(BadConfig, match=r"my\.ttf cannot be read"):
        draw(grey(), row(20, 60, 90, 110), ENGLISH, file)
    with pytest.raises(BadConfig, match=r"gone\.ttf"):
        draw(grey(), row(20, 60, 90, 110), ENGLISH, tmp_path / "gone.ttf")


@needs_chinese
def test_a_named_font_is_taken() -> None:
    path = font_for("猫", 12).path
    assert font_for("cat", 12, path).path == path


@pytest.mark.parametrize("trouble", [OSError("no"), subprocess.TimeoutExpired("fc-list", 20)])
def test_a_broken_fontconfig_does_no_harm(trouble: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setattr(module, "FONTS", ())
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/fc-list")
    monkeypatch.setattr(module.subprocess, "run", fail)
    assert list(module._candidates()) == []


# --- colours ----------------------------------------------------------------------------------------

# Viénot, Brettel and Mollon (1999), "Digital video colourmaps for checking the legibility of displays by dichromats",
# on linear RGB: what people without red (protan) and without green cones (deutan) see.
PROTAN = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
DEUTAN = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


def lab(colours: np.ndarray) -> np.ndarray:
    """Linear RGB to CIE L*a*b* (D65)."""
    xyz = colours @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-6))
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("sight", [np.eye(3), PROTAN, DEUTAN], ids=["all", "protan", "deutan"])
def test_seven_colours_can_be_told_apart_by_the_colour_blind(sight: np.ndarray) -> None:
    """At least 10 units of CIE 1976 between any two: over four times what is just noticeable (2.3)."""
    linear = (np.array(COLOURS) / 255) ** 2.2
    seen = lab(np.clip(linear @ sight.T, 0, 1))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


def test_further_classes_have_other_shades() -> None:
    assert len({colour(k) for k in range(21)}) == 21
    assert colour(21) == colour(0)
