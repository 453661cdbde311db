"""`lighten run`: boxes and labels of images, videos and cameras, in pixels of the original, drawn where wanted."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")

from quadrants import FIT, HEAD, write_detector
from test_bundle import CLASSES, CLASSES_ZH, write_bundle

from lighten import cli, runner, video
from lighten.errors import EXIT_BACKEND, EXIT_INPUT, EXIT_PASS, BadConfig, BadData, MissingBackend
from lighten.eye import load
from lighten.kit.draw import font_for
from lighten.runner import Answer, Pace, answers
from lighten.types import Preprocess

needs_opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="opencv-python-headless is missing")


def chinese_font() -> bool:
    try:
        font_for("红绿蓝暗", 16)
    except BadConfig:
        return False
    return True


needs_chinese = pytest.mark.skipif(not chinese_font(), reason="no font with Chinese glyphs (fonts-noto-cjk)")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("classifier"))


def street(blue: bool = True, red: bool = False, scale: int = 1) -> np.ndarray:
    """128 x 64 (times `scale`): in the input of 64 x 64 it lies in rows 16 to 48, a square of 16 there is 32 here."""
    pixels: np.ndarray = np.zeros((64, 128, 3), np.uint8)
    if blue:
        pixels[0:32, 32:64, 2] = 255
    if red:
        pixels[32:64, 96:128, 0] = 255
    return pixels.repeat(scale, 0).repeat(scale, 1)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


# --- images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 3])
def test_boxes_are_pixels_of_the_original_image(scale: int, detector: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "street.png", street(red=True, scale=scale))
    (answer,) = answers(detector, [file])
    assert {b.name: tuple(round(v / scale) for v in b.corners) for b in answer.boxes} == {
        "blue": (32, 0, 64, 32),
        "red": (96, 32, 128, 64),
    }
    assert all(b.probability > 0.99 for b in answer.boxes)
    assert [b.kind for b in answer.boxes if b.name == "blue"] == [2]


def test_an_image_that_its_camera_turned_is_answered_upright(detector: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it a quarter clockwise
    Image.fromarray(np.rot90(street())).save(tmp_path / "a.png", exif=exif)
    (answer,) = answers(detector, [tmp_path / "a.png"])
    assert tuple(round(v) for v in answer.boxes[0].corners) == (32, 0, 64, 32)


def test_lines_have_names_scores_and_places_in_both_languages(detector: Path, tmp_path: Path) -> None:
    file, empty = save(tmp_path / "street.png", street()), save(tmp_path / "x.png", street(blue=False))
    english, nothing = answers(detector, [file, empty], "en")
    assert english.text("en") == f"{file}  blue 100 % (32, 0, 64, 32)"
    assert nothing.text("en") == f"{empty}  nothing found"
    chinese, nothing = answers(detector, [file, empty], "zh")
    assert chinese.text("zh") == f"{file}  蓝 100 % (32, 0, 64, 32)"
    assert "没有" in nothing.text("zh")


def test_a_threshold_says_what_is_shown(detector: Path, tmp_path: Path) -> None:
    pixels: np.ndarray = np.zeros((64, 64, 3), np.uint8)
    pixels[16:32, 16:32, 2] = 255
    pixels[0:16, 0:16, 1] = 185  # 40 * 185 / 255 - 30 = -0.98, a score of 0.27
    file = save(tmp_path / "a.png", pixels)

    def names(**wanted: Any) -> list[str]:
        (answer,) = answers(detector, [file], **wanted)
        return [b.name for b in answer.boxes]

    assert names() == ["blue"]
    assert names(threshold=0.2) == ["blue", "green"]
    assert names(threshold=0.9999999) == []
    assert len(names(threshold=0.0)) > 2
    assert names(threshold=0.2, top=1) == ["blue"]
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(BadConfig, match="threshold"):
            names(threshold=bad)


def test_boxes_in_the_grey_border_alone_are_not_of_the_image(detector: Path) -> None:
    eye = load(detector)
    raw: np.ndarray = np.full((1, HEAD.places, HEAD.values), -9, np.float32)
    raw[0, :, :4] = 0.5
    raw[0, 0, 4], raw[0, 5, 4] = 5, 4  # the first cell lies above the image
    found = eye._boxes(raw, (128, 64))
    assert [b.corners for b in found] == [(32, 0, 64, 32)]


def test_what_makes_no_sense_is_refused_before_anything_is_loaded(classifier: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", street())
    for wanted, said in (
        ({"images": []}, "one of them"),
        ({"images": [file], "camera": 0}, "one of them"),
        ({"images": [file], "lang": "fr"}, "fr"),
        ({"images": [file], "threshold": 0.5}, "classifies"),
        ({"images": [file], "draw": file}, "overwrite"),
    ):
        with pytest.raises(BadConfig, match=said):
            list(answers(classifier, **wanted))  # type: ignore[arg-type]


def test_a_damaged_image_is_its_own_problem(detector: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    good = save(tmp_path / "b.png", street())
    bad, fine = answers(detector, [tmp_path], draw=tmp_path / "out")
    assert "a.png" in bad.problem
    assert (fine.image, len(fine.boxes), fine.drawn) == (good, 1, tmp_path / "out" / "b.png")


# --- drawn images -----------------------------------------------------------------------------------------


def differs(a: Path, b: np.ndarray) -> np.ndarray:
    with Image.open(a) as image:
        assert image.size == (b.shape[1], b.shape[0])
        return (np.abs(np.asarray(image.convert("RGB")).astype(int) - b) > 40).any(-1)


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp", "out.tif", "OUT.BMP", "new/out.png"])
def test_a_picture_is_the_original_with_boxes_on_it(name: str, detector: Path, tmp_path: Path) -> None:
    pixels = street(scale=3)
    file = save(tmp_path / "street.png", pixels)
    before = file.read_bytes()
    (answer,) = answers(detector, [file], draw=tmp_path / name)
    assert answer.drawn == tmp_path / name
    changed = differs(tmp_path / name, pixels)
    assert changed[10:90, 96].mean() > 0.9, "the left side of the box"
    assert not changed[130:].any()
    assert file.read_bytes() == before


def test_a_folder_is_drawn_under_the_same_names(detector: Path, tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.jpg", "c.gif"):
        save(tmp_path / "in" / name, street())
    got = list(answers(detector, [tmp_path / "in"], draw=tmp_path / "out"))
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")) == ["a.png", "c.png", "deep/b.jpg"]  # fmt: skip
    assert all(a.drawn for a in got)


def test_a_picture_that_cannot_be_written_is_told(detector: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", street())
    (tmp_path / "plain").write_bytes(b"")
    with pytest.raises(BadConfig, match="cannot be written"):
        list(answers(detector, [file], draw=tmp_path / "plain" / "out.png"))


@needs_chinese
def test_chinese_names_are_drawn_and_a_font_that_lacks_them_is_told_first(detector: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", street(scale=4))
    for lang in ("en", "zh"):
        list(answers(detector, [file], lang, draw=tmp_path / f"{lang}.png"))
    assert (tmp_path / "en.png").read_bytes() != (tmp_path / "zh.png").read_bytes()
    (tmp_path / "bad.ttf").write_bytes(b"no font")
    with pytest.raises(BadConfig, match=r"bad\.ttf"):
        list(answers(detector, [file], draw=tmp_path / "x.png", font=tmp_path / "bad.ttf"))
    assert not (tmp_path / "x.png").exists()


@needs_chinese
def test_a_classifier_writes_its_labels_into_the_corner(classifier: Path, tmp_path: Path) -> None:
    pixels: np.ndarray = np.full((300, 400, 3), 120, np.uint8)
    file = save(tmp_path / "a.png", pixels)
    (answer,) = answers(classifier, [file], "zh", draw=tmp_path / "out.png")
    assert len(answer.labels) == 3
    assert {name for name, _ in answer.labels} < set(CLASSES_ZH)
    changed = differs(tmp_path / "out.png", pixels)
    assert changed[:60, :60].any()
    assert not changed[100:].any()
    assert not changed[:, 200:].any()


# --- videos -----------------------------------------------------------------------------------------------


def film(path: Path, frames: int = 10, **kept: Any) -> Path:
    """A street by cv2 alone; red comes in the second half."""
    import cv2

    code = cv2.VideoWriter_fourcc(*video.CODECS[path.suffix])
    writer = cv2.VideoWriter(str(path), code, 20, (128 * 2, 64 * 2))
    for k in range(frames):
        writer.write(cv2.cvtColor(street(red=k >= frames // 2, scale=2, **kept), cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def names_of(answer: Answer) -> list[str]:
    return sorted(b.name for b in answer.boxes)


@needs_opencv
def test_every_frame_is_answered_in_the_right_colours_and_the_pace_is_told(detector: Path, tmp_path: Path) -> None:
    file = film(tmp_path / "street.mp4")
    *frames, last = answers(detector, [file])
    assert [a.frame for a in frames] == list(range(1, 11))
    assert [names_of(a) for a in frames] == [["blue"]] * 5 + [["blue", "red"]] * 5
    blue = next(b for b in frames[7].boxes if b.name == "blue")
    np.testing.assert_allclose(blue.corners, (64, 0, 128, 64), atol=3)
    assert frames[7].text().startswith(f"{file}#8  ")
    assert last.problem == ""
    assert last.pace is not None
    assert last.pace.frames == 10
    assert [name for name, _ in last.pace.parts] == ["reading", "scaling", "network", "boxes"]
    assert 0 < sum(s for _, s in last.pace.parts) <= last.pace.seconds


@needs_opencv
@pytest.mark.parametrize("name", ["out.mp4", "out.avi", "out.webm"])
def test_a_drawn_video_has_every_frame_with_its_boxes(name: str, detector: Path, tmp_path: Path) -> None:
    import cv2

    *_, last = answers(detector, [film(tmp_path / "street.mp4")], draw=tmp_path / name)
    assert last.drawn == tmp_path / name
    assert last.pace is not None
    assert "drawing" in dict(last.pace.parts)
    capture, shown = cv2.VideoCapture(str(tmp_path / name)), []
    while (row := capture.read())[0]:
        shown.append(row[1][..., ::-1].astype(int))
    assert len(shown) == 10
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(20)
    plain = street(red=True, scale=2).astype(int)
    assert (np.abs(shown[8] - plain) > 60).any(-1)[20:60, 64:68].all(0).any(), "the left side of the blue one's box"
    np.testing.assert_allclose(shown[8][24:56, 80:112].mean((0, 1)), (0, 0, 255), atol=40)


@needs_opencv
def test_a_video_that_ends_early_is_told_and_drawn_as_far_as_it_goes(detector: Path, tmp_path: Path) -> None:
    file = film(tmp_path / "street.avi", 60)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    *frames, last = answers(detector, [file], draw=tmp_path / "out.avi")
    assert 5 < len(frames) < 55
    assert f"{len(frames)} of 60" in last.problem
    assert str(tmp_path / "out.avi") in last.problem
    *_, again = answers(detector, [tmp_path / "out.avi"])
    assert again.pace is not None
    assert (again.pace.frames, again.problem) == (len(frames), ""), "what was written is whole"


@needs_opencv
def test_a_broken_video_among_images_is_its_own_problem(detector: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom broken")
    image = save(tmp_path / "b.png", street())
    bad, fine = answers(detector, [tmp_path / "a.mp4", image], draw=tmp_path / "out")
    assert "a.mp4" in bad.problem
    assert bad.drawn is None
    assert names_of(fine) == ["blue"]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["b.png"]


@needs_opencv
def test_a_video_that_is_left_before_its_end_is_not_written(detector: Path, tmp_path: Path) -> None:
    seen = answers(detector, [film(tmp_path / "street.mp4")], draw=tmp_path / "out.mp4")
    next(seen)
    next(seen)
    seen.close()  # type: ignore[attr-defined]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["street.mp4"]


@needs_opencv
def test_a_classifier_watches_videos_too(classifier: Path, tmp_path: Path) -> None:
    *frames, last = answers(classifier, [film(tmp_path / "a.mp4")], top=1, draw=tmp_path / "out.mp4")
    assert len(frames) == 10
    assert all(len(a.labels) == 1 and a.labels[0][0] in CLASSES for a in frames)
    assert last.pace is not None
    assert [name for name, _ in last.pace.parts] == ["reading", "scaling", "network", "labels", "drawing"]


def test_without_opencv_images_work_and_a_video_is_refused_at_once(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "cv2" else plain(name, *a))
    image = save(tmp_path / "b.png", street())
    assert names_of(next(answers(detector, [image]))) == ["blue"]
    for wanted in ({"images": [image, tmp_path / "a.mp4"]}, {"images": [], "camera": 0}):
        with pytest.raises(MissingBackend, match="cv2"):
            next(answers(detector, **wanted))  # type: ignore[arg-type]


# --- cameras ----------------------------------------------------------------------------------------------


class Frames:
    """A camera that gives `most` frames, one in `each` seconds, and then is gone."""

    fps, camera, notice, most, each = 20.0, True, "", 10**9, 0.0

    def __init__(self, source: int) -> None:
        if source:
            raise BadData(f"camera {source} cannot be opened.")

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Any:
        for _ in range(self.most):
            time.sleep(self.each)
            yield street()
        self.notice = "camera 0 gives no more frames."


@needs_opencv
def test_a_camera_runs_until_it_is_stopped_and_its_film_is_whole(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "Frames", Frames)
    left = [5]

    def stop() -> bool:
        left[0] -= 1
        return not left[0]

    *frames, last = answers(detector, [], camera=0, draw=tmp_path / "out.mp4", stop=stop)
    assert len(frames) == 5
    assert all(names_of(a) == ["blue"] for a in frames)
    assert frames[0].text().startswith("camera-0#1  blue")
    assert (last.problem, last.drawn) == ("", tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").stat().st_size


@needs_opencv
def test_a_film_of_a_camera_takes_as_long_as_what_it_shows(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four frames in a second are shown for a second, though the camera says it has twenty."""
    import cv2

    monkeypatch.setattr(Frames, "most", 4)
    monkeypatch.setattr(Frames, "each", 0.2)
    monkeypatch.setattr(runner, "Frames", Frames)
    *_, last = answers(detector, [], camera=0, draw=tmp_path / "out.mp4")
    assert "no more frames" in last.problem
    assert last.pace is not None
    capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    seconds = capture.get(cv2.CAP_PROP_FRAME_COUNT) / capture.get(cv2.CAP_PROP_FPS)
    assert seconds == pytest.approx(last.pace.seconds, abs=0.25)


@needs_opencv
def test_a_camera_that_is_not_there_is_a_problem(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Frames", Frames)
    (only,) = answers(detector, [], camera=7)
    assert "camera 7 cannot be opened" in only.problem


# --- words ------------------------------------------------------------------------------------------------


def test_the_pace_is_one_line_with_every_part() -> None:
    pace = Pace(50, 2.0, (("reading", 0.1), ("network", 1.5)))
    assert pace.text() == "50 frames, 25.0 a second (reading 2.0 ms, network 30.0 ms)"
    assert pace.text("zh") == "50 帧，每秒 25.0 帧（读取 2.0 ms, 网络 30.0 ms）"
    assert Pace(0, 0.0, ()).text()


def test_preprocessing_that_crops_has_boxes_of_the_whole_image(tmp_path: Path) -> None:
    """The centre alone is seen; what is found there lies where it does in the image."""
    how = replace(FIT, mode="crop", resize=64)
    folder = write_detector(tmp_path / "run", how)
    pixels: np.ndarray = np.zeros((64, 128, 3), np.uint8)
    pixels[16:32, 48:64, 1] = 255  # 32 pixels are cut away on the left: columns 16 to 32 of the input
    (answer,) = answers(folder, [save(tmp_path / "a.png", pixels)])
    assert [(b.name, b.corners) for b in answer.boxes] == [("green", (48, 16, 64, 32))]
    assert isinstance(load(folder).how, Preprocess)


# --- the command ------------------------------------------------------------------------------------------


@needs_opencv
def test_the_command_prints_lines_and_ends_with_a_code(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lighten(*words: object) -> tuple[int | str | None, list[str]]:
        with pytest.raises(SystemExit) as e:
            cli.main(["run", str(detector), *map(str, words)])
        told = capsys.readouterr()
        assert "Traceback" not in told.out + told.err
        return e.value.code, (told.out + told.err).splitlines()

    image, clip = save(tmp_path / "a.png", street()), film(tmp_path / "b.mp4")
    code, lines = lighten(image, clip, "--lang", "zh", "--draw", tmp_path / "out")
    assert code == EXIT_PASS
    assert lines[0] == f"{image}  蓝 100 % (32, 0, 64, 32)"
    assert lines[-1].startswith(f"{clip}  10 帧，每秒")
    assert len(lines) == 12
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a.png", "b.mp4"]
    clip.write_bytes(b"broken")
    code, lines = lighten(clip)
    assert code == EXIT_INPUT
    assert "not a video" in lines[0]
    code, lines = lighten("--camera", 97)
    assert code == EXIT_INPUT
    assert "camera 97 cannot be opened" in lines[0]
    assert lighten()[0] == EXIT_INPUT


NO_OPENCV = """
import importlib.util, sys
plain = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "cv2" else plain(name, *a)
from lighten.cli import main
main(sys.argv[1:])
"""


def test_the_command_without_opencv_names_the_extra(detector: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_OPENCV, "run", str(detector), "--camera", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_BACKEND, done.stderr
    assert "lighten[video]" in done.stderr


INTERRUPTED = """
import sys, time
from pathlib import Path
import numpy as np
from lighten import runner
class Frames:
    fps, camera, notice = 20.0, True, ""
    def __init__(self, source): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def __iter__(self):
        while True:
            time.sleep(0.02)
            yield np.zeros((64, 128, 3), np.uint8)
runner.Frames = Frames
from lighten.cli import main
main(sys.argv[1:])
"""


@needs_opencv
def test_ctrl_c_ends_a_camera_well_and_its_film_is_whole(detector: Path, tmp_path: Path) -> None:
    words = ["run", str(detector), "--camera", "0", "--draw", str(tmp_path / "out.mp4")]
    child = subprocess.Popen([sys.executable, "-u", "-c", INTERRUPTED, *words], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = child.stdout.readline()
    child.send_signal(signal.SIGINT)
    rest = child.stdout.read()
    assert child.wait(30) == EXIT_PASS
    assert first.startswith("camera-0#1")
    assert "a second (reading" in rest.splitlines()[-1]
    assert [f.name for f in tmp_path.iterdir()] == ["out.mp4"]
