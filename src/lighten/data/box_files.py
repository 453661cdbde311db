"""What annotation files have in common: pictures with boxes as they lie on disk, and reading that trusts nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import yaml

from lighten.data.images import SUFFIXES
from lighten.errors import BadData

MAX_JSON, MAX_SMALL = 1_000_000_000, 8_000_000
"""Bytes. COCO's own largest file has 450 MB; everything else is a page of text."""
MAX_CLASSES, MAX_DEPTH = 10_000, 16
FAR = 1e6
"""Pixels; no image is that wide."""
WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "report"),
}
"""What the parts of a set are called in file and folder names."""


@dataclass(frozen=True)
class Picture:
    """An image and its boxes: float64 (K, 6) of class, x1, y1, x2, y2, ignore, in pixels or, where `shares`, in shares
    of its width and height. `size` is the width and height that its annotation gives."""

    path: Path
    rows: np.ndarray
    size: tuple[int, int] | None = None
    shares: bool = False


@dataclass(frozen=True)
class Part:
    """One part of a set. `missing` are images that are named but not there, `empty` label files without a line,
    `unlabelled` images without a label file, `polygons` rows that were outlines and are boxes now."""

    pictures: tuple[Picture, ...]
    missing: tuple[str, ...] = ()
    empty: int = 0
    unlabelled: int = 0
    polygons: int = 0


@dataclass(frozen=True)
class Found:
    """A set as it lies on disk; `parts` are some of train, val and test."""

    root: Path
    classes: tuple[str, ...]
    parts: dict[str, Part]
    notices: tuple[str, ...] = ()


def part_of(name: str) -> str | None:
    """ "instances_val2017" -> "val"; None where no word tells."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((part for part, known in WORDS.items() if set(words) & set(known)), None)


def table(rows: Iterable[tuple[float, ...]]) -> np.ndarray:
    """float64 (K, 6), (0, 6) where there is no row."""
    return np.array(list(rows), np.float64).reshape(-1, 6)


# --- paths ------------------------------------------------------------------------------------------


def plain_path(name: object, root: Path, where: str) -> str:
    """A relative path with forward slashes. Raises BadData where it is absolute or has ".." in it."""
    to_do = f"Only files inside {root} are read."
    if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > 4000:
        raise BadData(f"{where}: {short(name)} is no file name.", to_do)
    plain = name.replace("\\", "/")
    if plain.startswith("/") or ".." in plain.split("/") or PureWindowsPath(name).drive:
        raise BadData(f"{where}: the path {short(name)} leads out of the data set.", to_do)
    return plain


def inside(root: Path, name: object, where: str) -> Path:
    """The file `name` under `root`. Raises BadData where it leads out: absolute, by "..", or by a link."""
    full = root / plain_path(name, root, where)
    file = real(full.parent) / full.name
    file = file.resolve() if os.path.islink(file) else file
    if not file.is_relative_to(real(root)):
        raise BadData(
            f"{where}: {short(name)} is a link to {file}, outside the data set.", f"Only files inside {root} are read."
        )
    return full


@lru_cache(maxsize=4096)
def real(folder: Path) -> Path:
    """Without links. Remembered: a set has many files in a folder; `real.cache_clear` where links may have changed."""
    return folder.resolve()


def pictures_in(folder: Path, root: Path) -> list[Path]:
    """Every image under `folder`, sorted; hidden files are none. Raises BadData on links that lead out of `root`."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return [inside(root, str(p.relative_to(root)), str(folder)) for p in found if p.is_file()]


# --- contents ---------------------------------------------------------------------------------------


def short(value: object) -> str:
    """A value as it may stand in a message: data of strangers can be long."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def number(value: object) -> bool:
    """Whether it is a finite number that can be a coordinate."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -FAR < value < FAR


def read_bytes(path: Path, limit: int = MAX_SMALL) -> bytes:
    """All bytes of a file that is not larger than `limit`. Raises BadData."""
    try:
        with path.open("rb") as f:
            raw = f.read(limit + 1)
    except OSError as e:
        raise BadData(f"{path} cannot be read ({e.strerror or e}).", "Check the path.") from e
    if len(raw) > limit:
        raise BadData(f"{path} is larger than {limit // 1_000_000} MB.", "That is more than any annotation needs.")
    return raw


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file that hold something. Raises BadData."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadData(f"{path} is no UTF-8 text (byte {e.start}).", "Write it as UTF-8.") from e
    return ((k, line.strip()) for k, line in enumerate(text.splitlines(), 1) if line.strip())


def read_json(path: Path) -> Any:
    """Raises BadData where it is no JSON."""
    try:
        return json.loads(read_bytes(path, MAX_JSON))
    except (ValueError, RecursionError) as e:
        raise BadData(f"{path} is no JSON ({e}).", "Fetch or write it again.") from e


class _Plain(yaml.SafeLoader):
    """Safe YAML without aliases, which can blow up."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not allowed")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises BadData."""
    try:
        found = yaml.load(read_bytes(path, 1_000_000), _Plain)  # noqa: S506 - a SafeLoader subclass
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as e:
        why = " ".join(str(e).split())[:300]
        raise BadData(f"{path} is no YAML ({why}).", "It holds path, train, val and names.") from e
    if not isinstance(found, dict):
        raise BadData(f"{path} holds no keys.", "It holds path, train, val and names.")
    return found


def read_xml(path: Path) -> Element:
    """The root element. Raises BadData on a DOCTYPE too: entities that blow up or fetch files need one, annotations
    do not."""
    builder, parser, depth = TreeBuilder(), expat.ParserCreate(), [0]

    def refuse(*_: Any) -> NoReturn:
        raise BadData(f"{path} has a DOCTYPE, which may hide entities.", "Remove it: annotations need none.")

    def start(name: str, attributes: dict[str, str]) -> None:
        depth[0] += 1
        if depth[0] > MAX_DEPTH:
            raise BadData(f"{path} is nested over {MAX_DEPTH} deep.", "That is no Pascal VOC annotation.")
        builder.start(name, attributes)

    def end(name: str) -> None:
        depth[0] -= 1
        builder.end(name)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    try:
        parser.Parse(read_bytes(path), True)
    except (expat.ExpatError, ValueError, LookupError) as e:
        raise BadData(f"{path} is no XML ({e}).", "Fetch or write it again.") from e
    return builder.close()


def class_names(value: object, where: str) -> tuple[str, ...]:
    """Distinct plain names from a list, or from a mapping of 0, 1, 2... to names. Raises BadData."""
    to_do = "Give a list of names, or 0: name, 1: name and so on."
    if isinstance(value, dict):
        keys = list(value)
        if sorted(map(str, keys)) != sorted(map(str, range(len(keys)))):
            raise BadData(f"{where}: names are numbered {', '.join(short(k) for k in keys[:8])}, not from 0 on.", to_do)
        value = [{str(k): v for k, v in value.items()}[str(k)] for k in range(len(keys))]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CLASSES:
        raise BadData(f"{where}: names must be 1 to {MAX_CLASSES:,} names.", to_do)
    if bad := [v for v in value if not isinstance(v, str | int | float) or not 0 < len(str(v).strip()) <= 200]:
        raise BadData(f"{where}: {short(bad[0])} is no class name.", to_do)
    names = tuple(str(v).strip() for v in value)
    if twice := [n for k, n in enumerate(names) if n in names[:k]]:
        raise BadData(f"{where}: the class {twice[0]!r} stands twice.", "Give each class one number.")
    return names
