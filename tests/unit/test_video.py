"""Videos in and out: right colours, limits, honest ends, and a written file that is whole or not there."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lighten import video
from lighten.errors import EXIT_BACKEND, BadConfig, BadData, DiskFull, MissingBackend
from lighten.video import CODECS, FPS, Film, Frames, ending, has_container, is_video, rate

needs_opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="opencv-python-headless is missing")

RED, BLUE = (250, 20, 30), (10, 30, 240)


def two_sides(width: int = 96, height: int = 64) -> np.ndarray:
    """Left half red, right half blue."""
    frame: np.ndarray = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2], frame[:, width // 2 :] = RED, BLUE
    return frame


def write(path: Path, frames: int = 12, width: int = 96, height: int = 64, fps: float = 20.0) -> Path:
    """A video by cv2 alone, in BGR as it wants it, that tells its frames by how grey a stripe at the bottom is."""
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODECS[path.suffix]), fps, (width, height))
    assert writer.isOpened()
    for k in range(frames):
        frame = two_sides(width, height)
        frame[-16:] = 20 * k % 256
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


# --- pure decisions -----------------------------------------------------------------------------------


def test_containers_are_told_by_how_they_begin() -> None:
    stream = (b"G" + bytes(187)) * 2
    for head in (b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3....", b"RIFF....AVI LIST", b"\0\0\1\xba..", b"FLV\1", stream):
        assert has_container(head), head[:12]
    for head in (b"", b"#EXTM3U\nhttp://x/y", b"ffconcat version 1.0", b"RIFF....WAVE", b"\x89PNG\r\n", b"GIF89a" + bytes(250)):  # fmt: skip
        assert not has_container(head), head[:12]


def test_endings_tell_videos_from_images() -> None:
    assert is_video(Path("a/B.MP4"))
    assert not is_video(Path("a/b.jpg"))
    assert not is_video(Path("mp4"))


@pytest.mark.parametrize(
    "claimed, used", [(29.97, 29.97), (0, FPS), (-5, FPS), (float("nan"), FPS), (float("inf"), FPS), (90000, FPS)]
)
def test_a_rate_that_cannot_be_is_not_used(claimed: float, used: float) -> None:
    assert rate(claimed) == used


def test_only_ends_that_came_too_early_are_told() -> None:
    assert ending("a.mp4", 120, 120, False) == ""
    assert ending("a.mp4", 118, 120, False) == "", "an estimate of the container"
    assert ending("a.mp4", 500, 0, False) == "", "no promise"
    assert "57 of 120" in ending("a.mp4", 57, 120, False)
    assert "after 9" in ending("camera 0", 9, 0, True)


# --- a missing OpenCV ---------------------------------------------------------------------------------


def test_without_opencv_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingBackend) as e:
        Frames(tmp_path / "a.mp4")
    assert "cv2" in e.value.what
    assert e.value.to_do == "pip install 'lighten[video]'"
    assert e.value.exit_code == EXIT_BACKEND


def test_an_opencv_that_lacks_a_library_of_the_system_is_missing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(video, "require", broken)
    with pytest.raises(MissingBackend, match=r"libGL\.so\.1"):
        video.opencv()


# --- reading --------------------------------------------------------------------------------------------


@needs_opencv
@pytest.mark.parametrize("ending", CODECS)
def test_frames_come_in_order_and_in_rgb(ending: str, tmp_path: Path) -> None:
    with Frames(write(tmp_path / f"a{ending}")) as frames:
        got = list(frames)
        assert frames.fps == pytest.approx(20)
        assert frames.notice == ""
    assert len(got) == frames.count == 12
    for k, frame in enumerate(got):
        assert frame.shape == (64, 96, 3)
        np.testing.assert_allclose(frame[:40, 8:40].mean((0, 1)), RED, atol=12)
        np.testing.assert_allclose(frame[:40, 56:88].mean((0, 1)), BLUE, atol=12)
        assert frame[-10:-4].mean() == pytest.approx(20 * k, abs=8)


@needs_opencv
def test_odd_names_are_names(tmp_path: Path) -> None:
    """A % is a row of images to some of OpenCV's readers."""
    with Frames(write(tmp_path / "a.avi").rename(tmp_path / "街 %02d:1.avi")) as frames:
        assert len(list(frames)) == 12


@needs_opencv
def test_a_video_that_ends_early_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "a.avi", 60)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) * 2 // 3])
    with Frames(file) as frames:
        got = len(list(frames))
        assert 10 < got < 55
        assert f"{got} of 60" in frames.notice
        assert "ends early" in frames.notice


@needs_opencv
@pytest.mark.parametrize("raw", [b"", b"not a video", b"#EXTM3U\n#EXTINF:1,\nsecret.mp4\n", b"\0\0\0\x20ftypisom" + bytes(999)])  # fmt: skip
def test_what_is_no_video_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(raw)
    with pytest.raises(BadData, match=r"a\.mp4"):
        list(Frames(tmp_path / "a.mp4"))
    with pytest.raises(BadData, match=r"b\.mp4.*No such file"):
        Frames(tmp_path / "b.mp4")


@needs_opencv
def test_damaged_bytes_never_end_in_anything_but_frames_or_a_clear_error(tmp_path: Path) -> None:
    raw, dice = write(tmp_path / "a.mp4").read_bytes(), np.random.default_rng(0)
    for k in range(25):
        bad = bytearray(raw)
        for at in dice.integers(0, len(bad), 1 + 8 * k):
            bad[at] = dice.integers(256)
        (tmp_path / "b.mp4").write_bytes(bad)
        with contextlib.suppress(BadData), Frames(tmp_path / "b.mp4") as frames:
            for frame in frames:
                assert frame.dtype == np.uint8
                assert frame.shape[2] == 3


class Camera:
    """What cv2.VideoCapture is to us, with frames that a hostile file or a broken camera could give."""

    def __init__(self, frames: list[Any], **properties: float) -> None:
        self.frames, self.properties, self.released = frames, properties, False

    def isOpened(self) -> bool:
        return True

    def get(self, name: str) -> float:
        return self.properties.get(name, 0.0)

    def read(self) -> tuple[bool, Any]:
        if not self.frames:
            return False, None
        frame = self.frames.pop(0)
        if isinstance(frame, Exception):
            raise frame
        return True, frame

    def release(self) -> None:
        self.released = True


def with_camera(monkeypatch: pytest.MonkeyPatch, frames: list[Any], **properties: float) -> Camera:
    camera = Camera(frames, **properties)
    names = ("FRAME_COUNT", "FPS", "FRAME_WIDTH", "FRAME_HEIGHT")
    fake = SimpleNamespace(VideoCapture=lambda *_: camera, error=ArithmeticError, **{f"CAP_PROP_{n}": n for n in names})
    monkeypatch.setattr(video, "opencv", lambda: fake)
    return camera


def test_a_header_that_claims_huge_frames_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = with_camera(monkeypatch, [], FRAME_WIDTH=90000, FRAME_HEIGHT=90000)
    with pytest.raises(BadData, match="90000 x 90000"):
        Frames(0)
    assert camera.released


@pytest.mark.parametrize(
    "bad",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), ArithmeticError("x")],
    ids=["grey", "float", "empty", "error"],
)
def test_a_frame_that_is_no_picture_is_named(bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_camera(monkeypatch, [np.zeros((4, 4, 3), np.uint8), bad])
    with pytest.raises(BadData, match="frame 2"):
        list(Frames(0))


def test_a_frame_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_PIXELS", 15)
    with_camera(monkeypatch, [np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(BadData, match="too large"):
        list(Frames(0))


def test_a_camera_that_stops_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with_camera(monkeypatch, [np.zeros((4, 4, 3), np.uint8)] * 5, FPS=float("nan"))
    with Frames(3) as frames:
        assert len(list(frames)) == 5
    assert frames.notice == "camera 3 gives no more frames after 5."
    assert frames.fps == FPS


@needs_opencv
@pytest.mark.skipif(os.path.exists("/dev/video97"), reason="there is such a camera")
def test_a_camera_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(BadData, match="camera 97 cannot be opened") as e:
        Frames(97)
    assert "--camera" in e.value.to_do


# --- writing --------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def read_back(path: Path) -> list[np.ndarray]:
    """By cv2 alone; RGB."""
    import cv2

    capture, frames = cv2.VideoCapture(str(path)), []
    while (row := capture.read())[0]:
        frames.append(row[1][..., ::-1])
    return frames


def shoot(path: Path, *frames: np.ndarray, then: Callable[[Film], object] = lambda film: None) -> None:
    """A film of these frames, and what else happens to it before it ends."""
    with Film(path) as film:
        for frame in frames:
            film.add(frame)
        then(film)


def interrupted(_: Film) -> None:
    raise KeyboardInterrupt


@needs_opencv
@pytest.mark.parametrize("size", [(96, 64), (97, 63), (33, 17)])
@pytest.mark.parametrize("ending", CODECS)
def test_what_is_written_can_be_read_with_its_colours(ending: str, size: tuple[int, int], tmp_path: Path) -> None:
    with Film(tmp_path / f"a{ending}", 20) as film:
        for _ in range(9):
            film.add(two_sides(*size))
    assert files(tmp_path) == [f"a{ending}"]
    got = read_back(tmp_path / f"a{ending}")
    assert len(got) == 9
    height, width = got[0].shape[:2]
    assert (width, height) == (size[0] + size[0] % 2, size[1] + size[1] % 2), "no row or column is lost"
    np.testing.assert_allclose(got[4][2:-4, 2 : width // 2 - 4].mean((0, 1)), RED, atol=12)
    np.testing.assert_allclose(got[4][2:-4, width // 2 + 4 : -2].mean((0, 1)), BLUE, atol=12)


@needs_opencv
def test_a_film_that_was_broken_off_leaves_nothing_and_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"an older one")
    with pytest.raises(KeyboardInterrupt):
        shoot(tmp_path / "a.mp4", two_sides(), then=interrupted)
    assert files(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"an older one"


@needs_opencv
def test_a_film_without_frames_is_no_file(tmp_path: Path) -> None:
    with Film(tmp_path / "a.mp4"):
        pass
    assert files(tmp_path) == []


@needs_opencv
def test_frames_that_change_their_size_are_refused(tmp_path: Path) -> None:
    """OpenCV would leave them out without a word."""
    with pytest.raises(BadData, match="96 x 64 to 64 x 96 after 1"):
        shoot(tmp_path / "a.mp4", two_sides(), two_sides(64, 96))
    assert files(tmp_path) == []


@needs_opencv
def test_an_encoder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, ".mp4", "zzzz")
    with pytest.raises(BadConfig, match="zzzz") as e:
        shoot(tmp_path / "a.mp4", two_sides())
    assert ".avi" in e.value.to_do
    assert files(tmp_path) == []


@needs_opencv
def test_where_nothing_can_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadConfig, match=r"a\.mp4 cannot be written"):
        Film(tmp_path / "file" / "a.mp4")
    with pytest.raises(BadConfig, match="not written"):
        Film(tmp_path / "a.wmv")
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(BadConfig, match="cannot be written"):
        shoot(tmp_path / "a.mp4", two_sides())
    assert files(tmp_path) == ["a.mp4", "file"]


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from lighten.errors import LightenError
from lighten.video import Film
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
dice = np.random.default_rng(0)
try:
    with Film(Path(sys.argv[1])) as film:
        for _ in range(60):
            film.add(dice.integers(0, 256, (120, 160, 3), dtype=np.uint8))
except LightenError as e:
    print(type(e).__name__, e.what)
"""


@needs_opencv
@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.webm", "a.mkv"])
def test_a_file_that_could_not_be_written_whole_is_removed(name: str, tmp_path: Path) -> None:
    """OpenCV itself says nothing."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    assert "could not be written whole" in done.stdout, done.stdout + done.stderr[-500:]
    assert files(tmp_path) == []


@needs_opencv
def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match=r"a\.mp4"):
        shoot(tmp_path / "a.mp4", two_sides(), then=lambda film: setattr(film, "count", 50))
    assert files(tmp_path) == []
