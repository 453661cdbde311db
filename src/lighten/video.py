"""Videos and cameras by OpenCV: frames in, checked and in RGB, and out to a file that is there only when it is whole."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from lighten.data.images import MAX_PIXELS
from lighten.errors import BadConfig, BadData, DiskFull, MissingBackend
from lighten.plugins import require

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
"""What can be written, and with which of OpenCV's own encoders."""
FPS = 25.0
"""Of what is written where the source does not say a rate that can be."""
FASTEST = 240.0
SLACK = 2
"""Frames that a whole video may have less than its header says: some containers only estimate them."""
LITTLE = 4 << 20  # bytes free that count as a full disk
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
MARKS = (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"0&\xb2u\x8ef\xcf\x11", b"FLV", b"OggS")
"""How Matroska, MPEG (two kinds), ASF, Flash and Ogg begin."""


def opencv() -> ModuleType:
    """cv2, made quiet. Raises MissingBackend where it is not there or lacks a library of the system."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what a damaged file makes FFmpeg say is told by us, once
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        return require("cv2", "video", "read videos and cameras")
    except ImportError as e:
        raise MissingBackend(f"A working cv2 ({e})", "video") from e


def is_video(path: Path) -> bool:
    """By its ending."""
    return path.suffix.lower() in SUFFIXES


def has_container(head: bytes) -> bool:
    """Whether a file that begins with these 256 bytes is a video of a known container. Playlists and other texts, which
    FFmpeg would follow to other files, are not."""
    riff, packets = head[:4] == b"RIFF" and head[8:12] == b"AVI ", head[:1] == b"G" and head[188:189] == b"G"
    return head[4:8] in BOXES or head.startswith(MARKS) or riff or packets


class Frames:
    """An open video file, or camera by its number: iterate for frames, RGB uint8 (H, W, 3), once.

    `notice` says, after the last frame, why it may not have been the last. Raises BadData where nothing can be read.
    """

    def __init__(self, source: Path | int) -> None:
        self.name = str(source) if isinstance(source, Path) else f"camera {source}"
        self.camera, self.notice, self.count = not isinstance(source, Path), "", 0
        self._cv2 = opencv()
        self._capture = self._opened(source)
        self.promised = 0 if self.camera else int(_number(self._get("FRAME_COUNT")))
        self.fps = rate(self._get("FPS"))
        across, down = _number(self._get("FRAME_WIDTH")), _number(self._get("FRAME_HEIGHT"))
        if across * down > MAX_PIXELS:
            self.close()
            raise BadData(
                f"{self.name}: its header claims frames of {across:.0f} x {down:.0f}, over the limit of {MAX_PIXELS:,} pixels.",
                "Scale the video down first; it was not decoded.",
            )

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file or camera."""
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        while (frame := self._read()) is not None:
            self.count += 1
            yield frame
        if not self.count:
            raise BadData(f"{self.name}: no frame could be decoded.", self._to_do())
        self.notice = ending(self.name, self.count, self.promised, self.camera)

    def _opened(self, source: Path | int) -> Any:
        if isinstance(source, int):
            capture = self._cv2.VideoCapture(source)
        else:
            _check_file(source)
            # By FFmpeg alone: other readers take a % in a name for a row of images.
            capture = self._cv2.VideoCapture(str(source.resolve()), self._cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise BadData(f"{self.name} cannot be opened.", self._to_do())
        return capture

    def _to_do(self) -> str:
        if self.camera:
            return "Is it plugged in, free, and yours to read? ls -l /dev/video* shows what there is; --camera 1 takes the next."
        return "It is damaged, or its codec is not in this OpenCV: ffmpeg -i FILE out.mp4 makes another one."

    def _get(self, name: str) -> float:
        return float(self._capture.get(getattr(self._cv2, f"CAP_PROP_{name}")))

    def _read(self) -> np.ndarray | None:
        """The next frame, or None where there is none. Raises BadData on one that is no picture or too large."""
        try:
            there, frame = self._capture.read()
        except self._cv2.error as e:
            raise BadData(f"{self.name}: frame {self.count + 1} cannot be decoded ({e}).", self._to_do()) from e
        if not there or frame is None:
            return None
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise BadData(f"{self.name}: frame {self.count + 1} is no picture in colour.", self._to_do())
        if frame.shape[0] * frame.shape[1] > MAX_PIXELS:
            raise BadData(f"{self.name}: frame {self.count + 1} is too large.", f"At most {MAX_PIXELS:,} pixels.")
        return np.ascontiguousarray(frame[..., ::-1])  # OpenCV has BGR


def ending(name: str, count: int, promised: int, camera: bool) -> str:
    """What to tell of a source that gave `count` frames of `promised` and then no more; nothing where that is right."""
    if camera:
        return f"{name} gives no more frames after {count}."
    if count + SLACK < promised:
        why = "it ends early, is damaged, or was trimmed without being encoded anew"
        return f"{name} gave {count} of {promised} frames that its header speaks of: {why}."
    return ""


def rate(fps: float) -> float:
    """Frames per second that a source claims, or `FPS` where that cannot be."""
    return fps if math.isfinite(fps) and 1 <= fps <= FASTEST else FPS


def _number(value: float) -> float:
    return value if math.isfinite(value) and value > 0 else 0.0


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as f:
            head = f.read(256)
    except OSError as e:
        raise BadData(f"{path}: cannot be opened ({e.strerror or e}).", "Check the path.") from e
    if not has_container(head):
        raise BadData(f"{path}: not a video of a known container.", f"Known endings: {', '.join(SUFFIXES)}.")


class Film:
    """A video that is being written: `add` frames of one size, RGB uint8 (H, W, 3). The file appears under its name when
    the `with` block ends well, and only if every frame can be found in it; else nothing of it stays.

    Raises BadConfig where it cannot be written, DiskFull, BadData where a frame has another size than the first.
    """

    def __init__(self, path: Path, fps: float = FPS) -> None:
        self.path, self.fps, self.count = path, rate(fps), 0
        self._cv2, self._size = opencv(), (0, 0)
        self._writer: Any = None
        if path.suffix.lower() not in CODECS:
            raise BadConfig(f"{path}: videos of this kind are not written.", f"Known endings: {', '.join(CODECS)}.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(path.suffix.lower(), f".{path.stem}.", path.parent)
        except OSError as e:
            raise unwritable(path, e) from e
        os.close(handle)
        self._temporary = Path(name)

    def __enter__(self) -> Film:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.release()
        try:
            if kind is None and self.count:
                self._prove()
                os.chmod(self._temporary, 0o644)
                os.replace(self._temporary, self.path)
        except OSError as e:
            raise unwritable(self.path, e) from e
        finally:
            self._temporary.unlink(missing_ok=True)

    def add(self, frame: np.ndarray) -> None:
        """One frame more."""
        size = (frame.shape[1], frame.shape[0])
        if self._writer is None:
            self._size, self._writer = size, self._started(size)
        if size != self._size:
            told = f"frames change from {self._size[0]} x {self._size[1]} to {size[0]} x {size[1]}"
            raise BadData(f"{self.path} cannot be written: {told} after {self.count}.", "Run it without --draw.")
        self._writer.write(np.ascontiguousarray(_even(frame)[..., ::-1]))
        self.count += 1

    def _started(self, size: tuple[int, int]) -> Any:
        codec = CODECS[self.path.suffix.lower()]
        even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        code = self._cv2.VideoWriter_fourcc(*codec)
        with contextlib.suppress(self._cv2.error), _muted():
            writer = self._cv2.VideoWriter(str(self._temporary.resolve()), self._cv2.CAP_FFMPEG, code, self.fps, even)
            if writer.isOpened():
                return writer
        what = f"{self.path} cannot be written: this OpenCV does not encode {codec} at {even[0]} x {even[1]}."
        raise BadConfig(what, f"Try another ending: {', '.join(CODECS)}.")

    def _prove(self) -> None:
        """OpenCV says nothing of a full disk or a failed encoder: the file is opened again and its frames are counted."""
        again = self._cv2.VideoCapture(str(self._temporary.resolve()), self._cv2.CAP_FFMPEG)
        held = int(_number(again.get(self._cv2.CAP_PROP_FRAME_COUNT))) if again.isOpened() else 0
        again.release()
        if abs(held - self.count) <= SLACK and self._temporary.stat().st_size:
            return
        if shutil.disk_usage(self._temporary.parent).free < LITTLE:
            raise DiskFull(f"The disk is full while writing {self.path}.", "Free some space, then run it again.")
        what = f"{self.path} could not be written whole: {held} of {self.count} frames are in it."
        raise BadConfig(what, "It was removed. Is there room on the disk? Try another ending, such as .avi.")


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Nothing on standard error while it lasts: OpenCV's C code itself writes there which tag it took for a codec."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def unwritable(path: Path, e: Exception) -> BadConfig:
    """The error for a file that cannot be written."""
    why = getattr(e, "strerror", None) or e
    return BadConfig(f"{path} cannot be written ({why}).", "Name another file or folder to draw to.")


def _even(frame: np.ndarray) -> np.ndarray:
    """The frame with its last row and column doubled where their number is odd: encoders would drop them."""
    down, across = frame.shape[0] % 2, frame.shape[1] % 2
    return np.pad(frame, ((0, down), (0, across), (0, 0)), "edge") if down or across else frame
