"""YOLO: images/ with labels/ beside them, one text file an image, and a data.yaml that names parts and classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.data.box_files import (
    WORDS,
    Found,
    Part,
    Picture,
    class_names,
    inside,
    part_of,
    pictures_in,
    read_lines,
    read_yaml,
    short,
    table,
)
from lighten.errors import BadData

SHARES = (-0.5, 1.5)
"""Where a coordinate may lie, in shares of the image: boxes stick out a little, pixels are refused."""
LISTS = ("classes.txt", "obj.names", "labels.txt")
TO_DO = "A line is: class x_centre y_centre width height, the last four as shares of the image (0 to 1)."


@dataclass(frozen=True)
class _Set:
    """A set while it is read: `spec` is the YAML's content, `file` where it stands."""

    root: Path
    file: Path
    spec: dict[Any, Any]
    classes: tuple[str, ...]
    notices: tuple[str, ...] = ()


def yaml_of(root: Path) -> Path | None:
    """The YAML of a YOLO folder: the first that has names and a train or val path."""
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            spec = read_yaml(file)
        except BadData:
            continue
        if "names" in spec and not isinstance(spec.get("train", spec.get("val")), dict | None):
            return file
    return None


def has_labels(root: Path) -> bool:
    """Whether images/ and labels/ with text files lie side by side."""
    return (root / "images").is_dir() and next((root / "labels").rglob("*.txt"), None) is not None


def read(path: Path) -> Found:
    """A YOLO folder, or its data.yaml. Raises BadData naming file, line and value."""
    file = path if path.is_file() else yaml_of(path)
    one = _from_yaml(file) if file else _from_folders(path)
    parts: dict[str, Part] = {}
    notices = list(one.notices)
    for part in WORDS:
        entries = _listed(one.spec.get(part))
        if part == "test" and parts and not any(_beside(one.root, e) for e in entries):
            notices += [f"{one.file}: test ({short(entries[0])}) is not there."] if entries else []
            continue
        pictures = [p for e in entries for p in _pictures(one, e)]
        if pictures:
            parts[part] = _part(one, list(dict.fromkeys(pictures)))
    if not parts:
        raise BadData(f"{one.file} leads to no images.", "Give train: and val: folders of images.")
    if all(p.unlabelled == len(p.pictures) for p in parts.values()):
        first = next(iter(parts.values())).pictures[0].path
        raise BadData(
            f"{one.root} has no label files; {label_of(first, one.root)} is missing.", "Put labels/ beside images/."
        )
    return Found(one.root, one.classes, parts, tuple(notices))


def label_of(image: Path, root: Path) -> Path:
    """The text file of an image: the last folder called "images" becomes "labels"; beside it where there is none."""
    parts = list(image.relative_to(root).with_suffix(".txt").parts)
    at = [k for k, p in enumerate(parts[:-1]) if p == "images"]
    if at:
        parts[at[-1]] = "labels"
    return root.joinpath(*parts)


# --- which images -----------------------------------------------------------------------------------


def _from_yaml(file: Path) -> _Set:
    spec = read_yaml(file)
    names = class_names(spec.get("names"), str(file))
    if spec.get("nc") not in (None, len(names)):
        raise BadData(f"{file}: nc is {short(spec['nc'])}, but there are {len(names)} names.", "Make them agree.")
    for part in WORDS:
        entries = spec.get(part)
        plain = isinstance(entries, str | None) or (
            isinstance(entries, list) and all(isinstance(e, str) for e in entries)
        )
        if not plain:
            raise BadData(f"{file}: {part} is {short(entries)}.", "Give a folder, a list of folders, or a .txt file.")
    root, notices = _root(file, spec)
    return _Set(root, file, spec, names, notices)


def _root(file: Path, spec: dict[Any, Any]) -> tuple[Path, tuple[str, ...]]:
    """The folder that paths start from: `path` inside the YAML's folder, else that folder where the images are there."""
    base, name = file.parent, spec.get("path")
    if name in (None, "", ".", "./"):
        return base, ()
    try:
        if (root := inside(base, name, f"{file}: path")).is_dir():
            return root, ()
        reason = BadData(f"{file}: path {short(name)} is no folder.", "Give `path: .` for the folder of the YAML.")
    except BadData as e:
        reason = e
    entries = [e for part in WORDS for e in _listed(spec.get(part))]
    if any(_beside(base, e) is not None for e in entries):
        return base, (f"{file}: path {short(name)} is not used; the images are beside the file.",)
    raise reason


def _listed(entries: Any) -> list[str]:
    return [entries] if isinstance(entries, str) else list(entries or ())


def _beside(root: Path, entry: str) -> str | None:
    """`entry` as a path that exists under `root`; Roboflow writes ../train/images for train/images."""
    plain = entry.replace("\\", "/")
    if plain.startswith(str(root.absolute()) + "/"):
        plain = plain[len(str(root.absolute())) + 1 :]
    while plain.startswith(("../", "./")):
        plain = plain.split("/", 1)[1]
    safe = plain and not plain.startswith("/") and ".." not in plain.split("/")
    return plain if safe and (root / plain).exists() else None


def _pictures(one: _Set, entry: str) -> list[Path]:
    where = f"{one.file}"
    at = inside(one.root, _beside(one.root, entry) or entry, where)
    if at.is_dir():
        return pictures_in(at, one.root)
    if at.suffix == ".txt" and at.is_file():
        lines = [(k, _beside(one.root, line) or line) for k, line in read_lines(at)]
        return [inside(one.root, line, f"{at}, line {k}") for k, line in lines]
    raise BadData(f"{where}: {short(entry)} is not there.", "Give folders of images, or .txt files that list them.")


def _from_folders(root: Path) -> _Set:
    """images/ and labels/ without a YAML: parts by the names of their folders, classes from a list beside them."""
    names = next((root / n for n in LISTS if (root / n).is_file()), None)
    if names is None and (root / "data.yaml").is_file():
        return _from_yaml(root / "data.yaml")  # which says what is wrong with it
    if names is None:
        raise BadData(f"{root} has images/ and labels/ but no class names.", "Write a data.yaml with train and names.")
    folders = sorted(d for d in (root / "images").iterdir() if d.is_dir())
    spec: dict[Any, Any] = {}
    for folder in folders:
        spec.setdefault(part_of(folder.name) or "train", []).append(f"images/{folder.name}")
    listed = class_names([line for _, line in read_lines(names)], str(names))
    return _Set(root, root, spec or {"train": "images"}, listed)


# --- labels -----------------------------------------------------------------------------------------


def _part(one: _Set, paths: list[Path]) -> Part:
    found, missing, empty, unlabelled, polygons = [], [], 0, 0, 0
    for path in paths:
        if not path.is_file():
            missing.append(str(path.relative_to(one.root)))
            continue
        file = label_of(path, one.root)
        inside(one.root, str(file.relative_to(one.root)), str(path))
        there = file.is_file()
        rows, outlines = _labels(file, one.classes) if there else (table(()), 0)
        empty += there and not len(rows)
        unlabelled += not there
        polygons += outlines
        found.append(Picture(path, rows, shares=True))
    return Part(tuple(found), tuple(missing), empty, unlabelled, polygons)


def _labels(file: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, int]:
    rows, outlines = [], 0
    for k, line in read_lines(file):
        where, words = f"{file}, line {k}", line.split()
        if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
            raise BadData(f"{where}: {len(words)} numbers in {short(line)}.", TO_DO)
        try:
            values = [float(w) for w in words]
        except ValueError:
            raise BadData(f"{where}: {short(line)} are not numbers.", TO_DO) from None
        rows.append(_box(values, classes, where))
        outlines += len(words) > 5
    return table(rows), outlines


def _box(values: list[float], classes: tuple[str, ...], where: str) -> tuple[float, ...]:
    """A row (class, x1, y1, x2, y2, 0) of a line: five numbers, or the class and an outline of x, y, x, y..."""
    k, *numbers = values
    if not k.is_integer() or not 0 <= k < len(classes):
        raise BadData(
            f"{where}: the class {k:g} is none of 0 to {len(classes) - 1}.", "Mend the id, or name the class."
        )
    if not all(SHARES[0] <= v <= SHARES[1] for v in numbers):
        bad = next(v for v in numbers if not SHARES[0] <= v <= SHARES[1])
        raise BadData(f"{where}: {bad:g} is no share of the image.", TO_DO)
    if len(numbers) > 4:
        return (k, min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]), 0.0)
    x, y, w, h = numbers
    if w < 0 or h < 0:
        raise BadData(f"{where}: the width or height {min(w, h):g} is negative.", TO_DO)
    return (k, x - w / 2, y - h / 2, x + w / 2, y + h / 2, 0.0)
