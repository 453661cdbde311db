"""COCO JSON: one file a part, with images, annotations and categories (cocodataset.org, "Data format")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.data.box_files import (
    MAX_CLASSES,
    WORDS,
    Found,
    Part,
    Picture,
    inside,
    number,
    part_of,
    plain_path,
    read_json,
    read_yaml,
    short,
    table,
)
from lighten.errors import BadData

NOT_BOXES = ("captions", "stuff", "panoptic", "image_info")
PROBE = 20
"""Images looked for in each folder to find where they lie."""

Named = dict[str, tuple[Path, Path | None]]
"""Part: its JSON, and the folder of its images where that is known."""


def files(root: Path) -> list[Path]:
    """The JSON files of a COCO folder: annotations/*.json, or `_annotations.coco.json` in the folder of each part."""
    found = sorted(root.glob("annotations/*.json"))
    found = [f for f in found if not f.name.startswith((".", *NOT_BOXES))]
    boxes = [f for f in found if f.name.startswith("instances")]
    return boxes or found or sorted([*root.glob("_annotations.coco.json"), *root.glob("*/_annotations.coco.json")])


def read(path: Path) -> Found:
    """A COCO folder, or one JSON of it. Raises BadData naming file, id and value."""
    root = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    jsons = files(root) if path.is_dir() else [path]
    named: Named = {}
    for file in jsons:
        part = part_of(file.stem) or (part_of(file.parent.name) if file.parent != root else None) or "train"
        if part in named:
            raise BadData(
                f"{named[part][0]} and {file} are both {part}.", "Write a YAML that names images and annotations."
            )
        named[part] = (file, None)
    return assemble(root, named)


def read_named(spec: Path | dict[str, Any]) -> Found:
    """Parts named one by one: {"train": {"images": folder, "annotations": file}, "val": ...}, as a YAML file (whose paths
    stay inside its folder) or as a mapping. Raises BadData."""
    where = str(spec) if isinstance(spec, Path) else "The data"
    rows = read_yaml(spec) if isinstance(spec, Path) else spec
    if unknown := sorted(short(k) for k in set(rows) - set(WORDS)):
        raise BadData(f"{where} names {unknown[0]}.", "Known parts: train, val, test.")
    named: Named = {}
    for part, row in rows.items():
        if not isinstance(row, dict) or set(row) != {"images", "annotations"}:
            raise BadData(f"{where}: {part} is not understood.", "Give images: FOLDER and annotations: FILE.")
        if isinstance(spec, Path):
            images, file = (inside(spec.parent, row[k], f"{where}: {part}") for k in ("images", "annotations"))
        elif all(isinstance(v, str | Path) for v in row.values()):
            images, file = Path(row["images"]).absolute(), Path(row["annotations"]).absolute()
        else:
            raise BadData(f"{where}: {part} does not name a folder and a file.", "Give two paths.")
        named[part] = (file, images)
    return assemble(next((f.parent for f, _ in named.values()), Path()), named)


def assemble(root: Path, named: Named) -> Found:
    """Every part, with the class numbers of the first one (train, where there is one)."""
    if not named:
        raise BadData(f"{root} has no annotations of boxes.", "Give annotations/instances_train.json and images.")
    order = [p for p in WORDS if p in named]
    classes: tuple[str, ...] = ()
    parts = {}
    for part in order:
        file, folder = named[part]
        content = _content(file)
        ids = _categories(content["categories"], file)
        classes = classes or tuple(ids.values())
        if extra := [n for n in ids.values() if n not in classes]:
            raise BadData(f"{file} has the class {extra[0]!r}, which {order[0]} lacks.", "Give all parts one list.")
        parts[part] = _part(file, content, {k: classes.index(n) for k, n in ids.items()}, root, folder)
    return Found(root, classes, parts)


def _content(file: Path) -> dict[str, list[Any]]:
    content = read_json(file)
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict):
        raise BadData(f"{file} is no COCO file.", f"It holds {', '.join(keys)}.")
    for key in keys:
        rows = content.get(key)
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise BadData(f"{file} has no list {key!r} of objects.", f"A COCO file holds {', '.join(keys)}.")
    return {key: content[key] for key in keys}


def _categories(rows: list[Any], file: Path) -> dict[Any, str]:
    """Category id: name, in the order of the ids."""
    found: dict[Any, str] = {}
    for row in rows:
        key, name = row.get("id"), row.get("name")
        if not isinstance(key, int) or not isinstance(name, str) or not 0 < len(name.strip()) <= 200:
            raise BadData(f"{file}: category id {short(key)}, name {short(name)} is not understood.", "Mend it.")
        if key in found or name.strip() in found.values():
            raise BadData(f"{file}: category {key} ({name}) stands twice.", "Give each class one id.")
        found[key] = name.strip()
    if not 0 < len(found) <= MAX_CLASSES:
        raise BadData(f"{file} has {len(found)} categories.", f"Give 1 to {MAX_CLASSES:,}.")
    return dict(sorted(found.items()))


def _part(file: Path, content: dict[str, list[Any]], classes: dict[Any, int], root: Path, folder: Path | None) -> Part:
    images = _images(content["images"], file, root)
    rows: dict[Any, list[tuple[float, ...]]] = {key: [] for key in images}
    for k, one in enumerate(content["annotations"]):
        where = f"{file}: annotation {short(one.get('id', f'number {k}'))}"
        _key(one.get("image_id"), images, "image_id", where)
        _key(one.get("category_id"), classes, "category_id", where)
        x, y, w, h = _bbox(one.get("bbox"), where)
        crowd = float(one.get("iscrowd") in (1, True))
        rows[one["image_id"]].append((classes[one["category_id"]], x, y, x + w, y + h, crowd))
    folder = folder or _folder(root, file, [name for name, _ in images.values()])
    found, missing = [], []
    for key, (name, size) in images.items():
        path = inside(folder, name, f"{file}: image {short(key)}")
        if path.is_file():
            found.append(Picture(path, table(rows[key]), size))
        else:
            missing.append(name)
    return Part(tuple(found), tuple(missing))


def _images(rows: list[Any], file: Path, root: Path) -> dict[Any, tuple[str, tuple[int, int] | None]]:
    """Image id: file name, and width and height where both are given."""
    found: dict[Any, tuple[str, tuple[int, int] | None]] = {}
    names: dict[str, Any] = {}
    for row in rows:
        key = row.get("id")
        if not isinstance(key, int | str):
            raise BadData(f"{file}: the image id {short(key)} is not understood.", "Give each image a number.")
        name = plain_path(row.get("file_name"), root, f"{file}: image {short(key)}")
        if key in found or name in names:
            other = f"id {short(names[name])}" if name in names else "another name"
            raise BadData(f"{file}: image id {short(key)} ({short(name)}) stands twice, with {other}.", "Remove one.")
        names[name] = key
        size = (row.get("width"), row.get("height"))
        found[key] = (name, (int(size[0]), int(size[1])) if all(map(number, size)) and min(size) > 0 else None)
    return found


def _key(value: Any, known: dict[Any, Any], what: str, where: str) -> None:
    if not isinstance(value, int | str) or value not in known:
        raise BadData(f"{where}: {what} {short(value)} is not in the file.", "Mend or remove the annotation.")


def _bbox(value: Any, where: str) -> tuple[float, float, float, float]:
    if not isinstance(value, list) or len(value) != 4 or not all(map(number, value)):
        shown = f"[{', '.join(short(v) for v in value[:6])}]" if isinstance(value, list) else short(value)
        raise BadData(f"{where}: bbox {shown} is not x, y, width, height.", "Mend or remove the annotation.")
    x, y, w, h = map(float, value)
    if w < 0 or h < 0:
        raise BadData(f"{where}: bbox {value} has a negative width or height.", "Mend or remove the annotation.")
    return x, y, w, h


def _folder(root: Path, file: Path, names: list[str]) -> Path:
    """The folder under `root` where most of a few images lie; of equals the one whose name tells the same part."""
    picked = names[:: max(1, len(names) // PROBE)][:PROBE]
    part, year = part_of(file.stem), "".join(c for c in file.stem if c.isdigit())
    near = [file.parent, root, *sorted(d for d in (*root.glob("*"), *root.glob("*/*")) if d.is_dir())]

    def rank(folder: Path) -> tuple[int, bool, bool, bool]:
        hits = sum((folder / name).is_file() for name in picked)
        alike = part_of(str(folder.relative_to(root))) == part
        return hits, folder == file.parent, alike, bool(year) and year in folder.name

    best = max(near[:500], key=rank) if names else root
    if names and not rank(best)[0]:
        raise BadData(
            f"{file}: none of its images is under {root}, such as {short(names[0])}.",
            "Put the images into a folder beside annotations/, named as the file (train2017 for instances_train2017).",
        )
    return inside(root, str(best.relative_to(root)), str(file)) if best != root else root
