"""Pascal VOC: Annotations/*.xml, JPEGImages/, and the parts in ImageSets/Main/*.txt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from lighten.data.box_files import (
    MAX_CLASSES,
    Found,
    Part,
    Picture,
    class_names,
    inside,
    number,
    read_lines,
    read_xml,
    short,
    table,
)
from lighten.data.images import SUFFIXES
from lighten.errors import BadData

LISTS = ("labels.txt", "classes.txt")


@dataclass(frozen=True)
class _Page:
    """One annotation: the image, its objects as (name, x1, y1, x2, y2, difficult), and the size it gives."""

    image: Path | None
    objects: tuple[tuple[str, float, float, float, float, float], ...]
    size: tuple[int, int] | None


def years(root: Path) -> list[Path]:
    """Folders with Annotations/*.xml: the root itself, or VOC2007, VOC2012 and so on in it or in its VOCdevkit."""
    near = [root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    return [d for d in near if next((d / "Annotations").glob("*.xml"), None) is not None]


def read(root: Path) -> Found:
    """A Pascal VOC folder; several years become one set. Raises BadData naming file and value."""
    pages: dict[str, list[tuple[str, _Page]]] = {}
    for year in years(root):
        for part, ids in _parts(year).items():
            pages.setdefault(part, []).extend((k, _page(year, k, root)) for k in ids)
    used = sorted({row[0] for rows in pages.values() for _, page in rows for row in page.objects})
    listed = next((root / n for n in LISTS if (root / n).is_file()), None)
    classes = class_names([line for _, line in read_lines(listed)] if listed else used, str(listed or root))
    if extra := [n for n in used if n not in classes]:
        raise BadData(f"{listed} lacks the class {extra[0]!r}, which annotations have.", "Name every class there.")
    if len(classes) > MAX_CLASSES:
        raise BadData(f"{root} has {len(classes)} classes.", "Give fewer.")
    numbers = {n: k for k, n in enumerate(classes)}
    return Found(root, classes, {part: _part(rows, numbers) for part, rows in pages.items()})


def _part(rows: list[tuple[str, _Page]], numbers: dict[str, int]) -> Part:
    found, missing = [], []
    for key, page in rows:
        if page.image is None:
            missing.append(key)
        else:
            boxes = table((numbers[name], *box) for name, *box in page.objects)
            found.append(Picture(page.image, boxes, page.size))
    return Part(tuple(found), tuple(missing))


def _parts(year: Path) -> dict[str, list[str]]:
    """Part: ids. "trainval" counts where there is no train and val of its own."""
    lists = {f.stem: _ids(f) for f in sorted((year / "ImageSets" / "Main").glob("*.txt"))}
    found = {part: lists[part] for part in ("train", "val", "test") if lists.get(part)}
    if lists.get("trainval") and "train" not in found:
        held = set(found.get("val", ()))
        found["train"] = [k for k in lists["trainval"] if k not in held]
    return found or {"train": sorted(f.stem for f in (year / "Annotations").glob("*.xml"))}


def _ids(file: Path) -> list[str]:
    """The first word of each line; lists of one class have a flag behind it."""
    return list(dict.fromkeys(line.split()[0] for _, line in read_lines(file)))


def _page(year: Path, key: str, root: Path) -> _Page:
    where = str(year / "ImageSets")
    file = inside(root, f"{(year / 'Annotations').relative_to(root)}/{key}.xml", where)
    if not file.is_file():
        return _Page(None, (), None)
    tree = read_xml(file)
    if tree.tag != "annotation":
        raise BadData(f"{file} holds <{tree.tag[:60]}>, not <annotation>.", "Give Pascal VOC annotations.")
    objects = tuple(_object(one, file) for one in tree.findall("object"))
    width, height = (int(_value(tree, f"size/{side}") or 0) for side in ("width", "height"))
    whole = (width, height) if width > 0 and height > 0 else None
    return _Page(_image(year, key, tree, root, file), objects, whole)


def _image(year: Path, key: str, tree: Element, root: Path, file: Path) -> Path | None:
    folder = (year / "JPEGImages").relative_to(root)
    named = (tree.findtext("filename") or "").strip()
    for name in _names(key, named):
        path = inside(root, f"{folder}/{name}", str(file))
        if path.is_file():
            return path
    return None


def _names(key: str, named: str) -> Iterator[str]:
    yield f"{key}.jpg"
    if named:
        yield named
    yield from (f"{key}{suffix}" for suffix in SUFFIXES)


def _object(one: Element, file: Path) -> tuple[str, float, float, float, float, float]:
    """Coordinates are pixels counted from 1, the last one included, so that 1 to W is the whole width (as Detectron2
    reads them)."""
    name = (one.findtext("name") or "").strip()
    if not 0 < len(name) <= 200:
        raise BadData(f"{file}: an object has the name {short(name)}.", "Name its class.")
    x1, y1, x2, y2 = (_value(one, f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax"))
    if x1 is None or y1 is None or x2 is None or y2 is None:
        raise BadData(f"{file}: the box of {name!r} has no four numbers.", "Give xmin, ymin, xmax, ymax.")
    if x2 < x1 or y2 < y1:
        raise BadData(f"{file}: the box of {name!r} runs from {x1:g}, {y1:g} to {x2:g}, {y2:g}.", "Mend it.")
    difficult = _value(one, "difficult") == 1
    return name, x1 - 1, y1 - 1, x2, y2, float(difficult)


def _value(one: Element, path: str) -> float | None:
    try:
        value = float(one.findtext(path) or "nan")
    except ValueError:
        return None
    return value if number(value) else None
