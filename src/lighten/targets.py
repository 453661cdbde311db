"""Which images and videos are meant, and where each is drawn to: decided before anything is run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten.data.images import SUFFIXES
from lighten.errors import BadConfig
from lighten.video import CODECS, is_video

PICTURES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM"}  # fmt: skip
"""Endings of pictures that can be drawn, in full colour, and Pillow's names for them."""


@dataclass(frozen=True)
class Source:
    """A file that was given, or found in a folder that was: then `name` is its path inside that folder."""

    file: Path
    name: Path
    found: bool = False


def sources(given: Iterable[Path]) -> tuple[Source, ...]:
    """Files as they are, folders walked for images in alphabetical order. Raises BadConfig on a folder without any."""
    rows: list[Source] = []
    for path in given:
        if not path.is_dir():
            rows.append(Source(path, Path(path.name)))
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not inside:
            raise BadConfig(f"{path} holds no images.", f"Known endings: {', '.join(SUFFIXES)}.")
        rows += [Source(p, p.relative_to(path), True) for p in inside]
    return tuple(rows)


def targets(rows: Sequence[Source], draw: Path) -> dict[Path, Path]:
    """Where each file is drawn to: one that was named to a file of its own kind, several or a folder's into a folder.

    Raises BadConfig where that cannot be, where two would be one file, and where one would overwrite what was given.
    """
    kind = _kind(draw)
    if kind == "folder":
        found = {row.file: _named(draw / row.name) for row in rows}
    elif len(rows) == 1 and not rows[0].found:
        wanted = "video" if is_video(rows[0].file) else "picture"
        if kind != wanted:
            endings = ", ".join(CODECS if wanted == "video" else PICTURES)
            raise BadConfig(f"{rows[0].file} cannot be drawn to {draw}.", f"A {wanted} ends in one of {endings}.")
        found = {rows[0].file: draw}
    else:
        raise BadConfig(f"{len(rows)} files cannot be drawn to one, {draw}.", "Name a folder: --draw FOLDER")
    _check(found)
    return found


def camera_target(draw: Path) -> Path:
    """`draw` where a camera can be drawn to it. Raises BadConfig."""
    if _kind(draw) != "video":
        raise BadConfig(
            f"A camera cannot be drawn to {draw}.", f"Name a video that ends in one of {', '.join(CODECS)}."
        )
    return draw


def _kind(draw: Path) -> str:
    ending = draw.suffix.lower()
    if draw.is_dir() or (not ending and not draw.exists()):
        return "folder"
    if ending in PICTURES or ending in CODECS:
        return "picture" if ending in PICTURES else "video"
    endings = ", ".join([*PICTURES, *CODECS])
    raise BadConfig(f"{draw} is neither a folder nor a file that can be drawn.", f"Known endings: {endings}.")


def _named(path: Path) -> Path:
    """The same name where such a file can be drawn; else that of the kind that can."""
    ending = path.suffix.lower()
    if ending in PICTURES or ending in CODECS:
        return path
    return path.with_suffix(".mp4" if is_video(path) else ".png")


def _check(found: dict[Path, Path]) -> None:
    given = {mark: file for file in found if (mark := _mark(file)) is not None}
    taken: dict[Path, Path] = {}
    for file, target in found.items():
        mark, whole = _mark(target), Path(os.path.abspath(target))
        if mark is not None and mark in given:
            raise BadConfig(
                f"{target} would overwrite {given[mark]}, which was given.", "Draw to another file or folder."
            )
        if (other := taken.setdefault(whole, file)) is not file:
            raise BadConfig(f"{other} and {file} would both be drawn to {target}.", "Run them one after the other.")


def _mark(path: Path) -> tuple[int, int] | None:
    """What tells a file from every other, whatever it is called; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
