"""Boxes and names drawn on an image, Chinese ones too, with a font that has their glyphs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lighten.errors import BadConfig

COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""Okabe and Ito (2008), "Color Universal Design": people with every common colour blindness tell these apart."""
FONTS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
    "/system/fonts/NotoSansCJK-Regular.ttc",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "/System/Library/Fonts/STHeiti Medium.ttc",
    "C:/Windows/Fonts/msyh.ttc",
    "C:/Windows/Fonts/simhei.ttf",
)
"""Where Debian, Fedora, Arch, Android, macOS and Windows keep fonts with Chinese glyphs."""
TO_DO = "apt-get install fonts-noto-cjk (or fonts-wqy-microhei), or name a font file, or take the English names."
FACES = 10
"""How many faces of a collection are looked through for the simplified Chinese one."""
NOWHERE = "\U0010fffd"
"""A character that no font has: it shows what a missing glyph looks like."""

COMMON = "0A%"
"""A font for Chinese names must have the letters of scores too."""

LONGEST = 60
"""Characters of a name that are ever drawn."""

Rect = tuple[float, float, float, float]


def draw(
    image: Image.Image | np.ndarray, found: np.ndarray, names: Sequence[str], font: str | Path | None = None
) -> Image.Image:
    """A copy of `image` (uint8 (H, W, 3) or (H, W, 1), or Pillow's) with `found` on it: (K, 6) of x1, y1, x2, y2, score
    and class, in pixels of the image, as `kit.boxes.detections` gives them; no number is written where the score is NaN.

    Line and letters grow with the image. Raises BadConfig where no font has the glyphs of the names that are shown.
    """
    picture = _picture(image)
    rows = np.asarray(found, np.float64).reshape(-1, 6)
    rows = rows[np.isfinite(rows[:, [0, 1, 2, 3, 5]]).all(1)]
    texts = [_text(row, names) for row in rows]
    letters = font_for("".join(texts), _letters(picture), font)
    width, pen = max(1, round(min(picture.size) / 220)), ImageDraw.Draw(picture)
    for row in rows[::-1]:
        _box(pen, np.clip(row[:4], -9, max(picture.size) + 9), colour(int(row[5])), width)
    taken: list[Rect] = []
    for row, text in zip(rows, [_fit(text, letters, picture.width) for text in texts]):
        where = _place(pen, text, letters, tuple(row[:4]), picture.size, taken)
        taken.append(where)
        _label(pen, text, letters, where, colour(int(row[5])))
    return picture


def labelled(image: Image.Image | np.ndarray, texts: Sequence[str], font: str | Path | None = None) -> Image.Image:
    """A copy of `image` with `texts` under each other in its upper left corner. Raises BadConfig as `draw` does."""
    picture = _picture(image)
    plain = [_plain(text) for text in texts]
    letters, pen = font_for("".join(plain), _letters(picture), font), ImageDraw.Draw(picture)
    y = 2.0
    for k, text in enumerate(plain):
        text = _fit(text, letters, picture.width)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=letters)
        _label(pen, text, letters, (2, y, right - left + 8, y + bottom - top + 5), (255, 255, 255) if k else (0, 0, 0))
        y += bottom - top + 6
    return picture


def colour(k: int) -> tuple[int, int, int]:
    """The colour of class `k`: seven that everybody can tell apart, then the same darker, then lighter."""
    r, g, b = COLOURS[k % len(COLOURS)]
    shade = k // len(COLOURS) % 3
    if shade == 1:
        return r * 55 // 100, g * 55 // 100, b * 55 // 100
    return (r, g, b) if shade == 0 else ((r + 255) // 2, (g + 255) // 2, (b + 255) // 2)


def _picture(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _letters(picture: Image.Image) -> int:
    """How high the letters are, in pixels."""
    return max(9, round(9 + 0.016 * min(picture.size)))


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:LONGEST]).strip()


def _text(row: np.ndarray, names: Sequence[str]) -> str:
    k = int(row[5])
    name = names[k] if 0 <= k < len(names) else str(k)
    plain = _plain(str(name))
    return plain if np.isnan(row[4]) else f"{plain} {100 * row[4]:.0f}%"


def _fit(text: str, font: Any, width: int) -> str:
    """`text`, shortened until it is no wider than the image."""
    while len(text) > 2 and font.getlength(text) > width - 6:
        text = text[:-2] + "…" if font.getlength("…") else text[:-1]
    return text


def _box(pen: ImageDraw.ImageDraw, box: np.ndarray, ink: tuple[int, int, int], width: int) -> None:
    """A frame in the class's colour between thin dark ones, so that it shows on any ground."""
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
    for grow, line, shade in ((1, width + 2, (0, 0, 0)), (0, width, ink)):
        pen.rectangle((x1 - grow, y1 - grow, x2 + grow, y2 + grow), outline=shade, width=line)


def _place(
    pen: ImageDraw.ImageDraw, text: str, font: Any, box: Rect, size: tuple[int, int], taken: Sequence[Rect]
) -> Rect:
    """Above the box, below it, or inside its top: the first that lies in the image and on no other label."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    wide, high = right - left + 6, bottom - top + 5
    x = min(max(box[0] - 1, 0), max(0, size[0] - wide))
    spots = [box[1] - high - 1, box[3] + 1, box[1] + 1, box[3] - high, box[1] + high]
    inside = [(x, y, x + wide, y + high) for y in spots if 0 <= y <= size[1] - high]
    free = [spot for spot in inside if not any(_touch(spot, other) for other in taken)]
    y = min(max(spots[0], 0), max(0, size[1] - high))
    return (free or inside or [(x, y, x + wide, y + high)])[0]


def _touch(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _label(pen: ImageDraw.ImageDraw, text: str, font: Any, where: Rect, ink: tuple[int, int, int]) -> None:
    """Black or white letters, whichever stands out more (ITU-R 601 brightness), on the class's colour."""
    left, top, _, _ = pen.textbbox((0, 0), text, font=font)
    bright = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2] > 110
    pen.rectangle((*where[:2], where[2] - 1, where[3] - 1), fill=ink, outline=(0, 0, 0))
    pen.text((where[0] + 3 - left, where[1] + 3 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


# --- fonts ------------------------------------------------------------------------------------------


def font_for(text: str, size: int, font: str | Path | None = None) -> Any:
    """A Pillow font of `size` pixels with every glyph of `text`: the file `font`, else Pillow's own, else one of the system.

    Raises BadConfig where there is none, with what to install.
    """
    wanted = "".join(sorted(set(text) - {" "}))
    if font is not None:
        return _named(str(font), size, wanted)
    rare = "".join(c for c in wanted if not c.isascii())
    for path, index in _system(rare + COMMON) if rare else ():
        return _face(path, size, index)
    own = _own(size)
    if lacking := missing(own, wanted):
        raise BadConfig(f"No font on this machine can write {lacking[:20]}.", TO_DO)
    return own


def missing(font: Any, text: str) -> str:
    """The characters of `text` that `font` draws as it draws any unknown one."""
    unknown = _shape(font, NOWHERE)
    return "".join(c for c in text if not c.isspace() and _shape(font, c) == unknown)


@lru_cache(maxsize=2048)
def _shape(font: Any, character: str) -> tuple[Any, bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@lru_cache(maxsize=16)
def _face(path: str, size: int, index: int) -> Any:
    """Opened once: every frame of a video asks for it."""
    return ImageFont.truetype(path, size, index)


@lru_cache(maxsize=16)
def _own(size: int) -> Any:
    return ImageFont.load_default(size)


def _named(font: str, size: int, wanted: str) -> Any:
    for found, index in _faces(font):
        face = _face(found, size, index)
        if not (lacking := missing(face, wanted)):
            return face
        raise BadConfig(f"The font {font} cannot write {lacking[:20]}.", TO_DO)
    raise BadConfig(f"The font {font} cannot be read.", TO_DO)


@lru_cache(maxsize=64)
def _system(wanted: str) -> tuple[tuple[str, int], ...]:
    """The first face of this machine that has all of `wanted`; empty where none has."""
    for path in _candidates():
        for face in _faces(path):
            if not missing(_face(face[0], 16, face[1]), wanted):
                return (face,)
            break
    return ()


def _candidates() -> Iterator[str]:
    """Known files first, then what fontconfig lists for Chinese, plain sans faces before others."""
    yield from (path for path in FONTS if Path(path).is_file())
    program = shutil.which("fc-list")
    if program is None:
        return
    try:
        done = subprocess.run([program, ":lang=zh-cn", "file"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return
    listed = {line.split(": ")[0].rstrip(": ") for line in done.stdout.splitlines() if line.strip()}
    yield from sorted(listed, key=lambda path: ("Serif" in path, "Bold" in path, path))


@lru_cache(maxsize=64)
def _faces(path: str) -> tuple[tuple[str, int], ...]:
    """The faces of a font file, those for simplified Chinese first: a collection has Japanese ones too."""
    found = []
    for index in range(FACES):
        try:
            found.append((ImageFont.truetype(path, 16, index).getname(), index))
        except (OSError, ValueError):
            break
    found.sort(key=lambda row: (not str(row[0][0]).endswith((" SC", " GB")), row[1]))
    return tuple((path, index) for _, index in found)
