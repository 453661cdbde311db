"""Images with boxes: a COCO, YOLO or Pascal VOC folder becomes four disjoint splits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lighten.data import box_coco, box_voc, box_yolo
from lighten.data.box_files import WORDS, Found, Part, Picture, read_bytes, read_yaml, real
from lighten.data.box_images import (
    NO_BOX,
    NOTHING,
    BoxArrays,
    Boxed,
    BoxImages,
    balanced,
    framed,
    moved,
    padded,
    present,
)
from lighten.data.box_names import chinese
from lighten.data.doctor import Finding
from lighten.data.images import DAMAGE, FORMATS, MAX_PIXELS
from lighten.data.splits import Split
from lighten.errors import BadData
from lighten.types import Data, Progress, digest, silent

__all__ = ["BoxArrays", "BoxImages", "Boxed", "balanced", "framed", "kind_of", "load_boxes", "moved", "present"]

CALIBRATE, SELECT, FEWEST = 512, 2000, 8
SLACK = 1.0
"""Pixels that a box may stick out by before it is counted: annotators round."""


# --- loading ----------------------------------------------------------------------------------------


def kind_of(path: Path) -> str | None:
    """ "coco", "yolo", "voc", or "named" (a YAML that names images and annotations); None for what is no set of boxes."""
    if path.is_file() and path.suffix.lower() == ".json":
        return "coco"
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        spec = read_yaml(path)
        return "named" if any(isinstance(spec.get(part), dict) for part in WORDS) else "yolo"
    if not path.is_dir():
        return None
    if box_coco.files(path):
        return "coco"
    if box_voc.years(path):
        return "voc"
    return "yolo" if box_yolo.yaml_of(path) or box_yolo.has_labels(path) else None


READERS: dict[str, Callable[[Path], Found]] = {
    "coco": box_coco.read,
    "named": box_coco.read_named,
    "yolo": box_yolo.read,
    "voc": box_voc.read,
}


def load_boxes(
    spec: Path | str | dict[str, Any],
    *,
    seed: int = 0,
    calibrate: int = CALIBRATE,
    select: int = SELECT,
    progress: Progress = silent,
) -> Data:
    """`spec` is a COCO, YOLO or Pascal VOC folder, a COCO JSON, a data.yaml, or {"train": {"images", "annotations"}}.

    The report split is the test part, else the val part, else a share of the images. Where there are train, val and
    test, calibrate and select come from val. Raises BadData naming file, line or id, and value.
    """
    real.cache_clear()
    if isinstance(spec, dict):
        found = box_coco.read_named(spec)
    else:
        path = Path(spec).absolute()
        kind = kind_of(path)
        if kind is None:
            raise BadData(f"{spec} holds no boxes.", "Give a COCO, YOLO or Pascal VOC folder, or its JSON or YAML.")
        found = READERS[kind](path)
    titles, titles_zh, notices = _titles(found)
    parts, more = _apart(found.parts)
    pools = {name: settled(part, name, progress) for name, part in parts.items()}
    notices += (*found.notices, *more, *(n for name in pools for n in _said(name, parts[name], pools[name])))
    return _split(found.root.absolute().name, titles, titles_zh, pools, seed, calibrate, select, notices)


def _apart(parts: dict[str, Part]) -> tuple[dict[str, Part], tuple[str, ...]]:
    """No image in two parts: what a later part has too is taken out of the earlier one."""
    order, notices = [p for p in WORDS if p in parts], []
    kept = {order[-1]: parts[order[-1]]}
    for name in order[-2::-1]:
        taken = {p.path for part in kept.values() for p in part.pictures}
        mine = tuple(p for p in parts[name].pictures if p.path not in taken)
        if lost := len(parts[name].pictures) - len(mine):
            notices.append(f"{lost} images of {name} are in a later part too and are left out of {name}.")
        if mine:
            kept[name] = dataclasses.replace(parts[name], pictures=mine)
    return {p: kept[p] for p in order if p in kept}, tuple(notices)


def _said(name: str, part: Part, images: BoxImages) -> list[str]:
    """What a person should know of one part that is no fault."""
    n, bare = len(images.paths), int((images.labels[..., 0] < 0).all(1).sum())
    said = []
    if part.missing:
        shown = ", ".join(part.missing[:3]) + (" and more" if len(part.missing) > 3 else "")
        said.append(f"{name}: {len(part.missing)} of {n + len(part.missing)} images are missing, left out: {shown}.")
    if bare:
        files = (
            f" ({part.empty} label files are empty, {part.unlabelled} missing)" if part.empty + part.unlabelled else ""
        )
        said.append(f"{name}: {bare} of {n} images have no box{files}.")
    if part.polygons:
        said.append(f"{name}: {part.polygons} outlines are taken as the boxes around them.")
    return said


def _titles(found: Found) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Class names in English and Chinese: from labels.json ({"dog": {"name": ..., "name_zh": ...}}), else as known."""
    file, names = found.root / "labels.json", found.classes
    if not file.is_file():
        return names, chinese(names), ()
    try:
        table = json.loads(read_bytes(file))
        rows = [table.get(n, {}) for n in names]
        own = tuple(str(r.get("name", n))[:200] for n, r in zip(names, rows))
        return own, tuple(str(r.get("name_zh", zh))[:200] for r, zh in zip(rows, chinese(own))), ()
    except (ValueError, AttributeError, RecursionError) as e:
        raise BadData(f"{file} cannot be read ({e}).", 'It holds {"dog": {"name": "dog", "name_zh": "狗"}}.') from e


# --- from annotations to labels -----------------------------------------------------------------------


def settled(part: Part, name: str, progress: Progress = silent) -> BoxImages:
    """Pictures whose headers can be read, boxes in their pixels, cut at the edges. Raises BadData where none is left.

    The size is the header's, whatever the annotation says. What was cut or left out is in `findings`.
    """
    kept: list[Picture] = []
    sizes, broken, other = [], [], []
    for done, one in enumerate(part.pictures, 1):
        size = upright_size(one.path)
        if isinstance(size, str):
            broken.append(size)
            continue
        if one.size not in (None, size):
            other.append(f"{one.path} ({one.size[0]}x{one.size[1]}, is {size[0]}x{size[1]})")
        kept.append(one)
        sizes.append(size)
        if done % 100 == 0 or done == len(part.pictures):
            progress(f"looking at {name}", done, len(part.pictures))
    if not kept:
        first = broken[0] if broken else f"{', '.join(part.missing[:3])} and all others are missing"
        raise BadData(f"{name} has no images: {first}.", "Put the images where the annotations say.")
    rows, findings = _cut(kept, np.array(sizes, np.float64), name)
    findings += [*_header_findings(name, broken, other, len(part.pictures))]
    paths = tuple(one.path for one in kept)
    return BoxImages(paths, padded(rows, paths), np.array(sizes, np.int64), None, tuple(findings))


def upright_size(path: Path) -> tuple[int, int] | str:
    """Width and height of the image as `open_image` will give it, from its header; or why it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return f"{path}: its header claims {width} x {height} pixels"
            # Not the PNG class's own getexif: it decodes the image.
            turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
    except DAMAGE as e:
        return f"{path}: {str(e)[:200]}"
    return (height, width) if turned else (width, height)


def _cut(pictures: list[Picture], sizes: np.ndarray, name: str) -> tuple[list[np.ndarray], list[Finding]]:
    """Boxes in pixels inside the image; those without area or outside are left out, and all of that is counted."""
    rows, out, flat, stick, total = [], 0, 0, 0, 0
    for one, (width, height) in zip(pictures, sizes):
        mine, edge = one.rows.copy(), np.array([width, height, width, height])
        mine[:, 1:5] *= edge if one.shares else 1
        cut = mine.copy()
        cut[:, 1:5] = np.clip(mine[:, 1:5], 0, edge)
        no_area = _short_side(mine) <= NOTHING
        gone = ~no_area & (_short_side(cut) <= NOTHING)
        over = (np.abs(cut - mine)[:, 1:5] > SLACK).any(1) & ~no_area & ~gone
        total, flat, out, stick = total + len(mine), flat + no_area.sum(), out + gone.sum(), stick + over.sum()
        rows.append(cut[~no_area & ~gone])
    worst = f"{name}: {{}} of {total} boxes "
    found = []
    if out:
        level = "error" if out > total / 2 else "warning"
        what = worst.format(out) + "lie outside their images and are left out."
        found.append(Finding(level, "outside", what, "Perhaps the images were scaled after they were annotated."))
    if stick:
        level = "error" if stick > total / 2 else "warning"
        what = worst.format(stick) + f"stick out by over {SLACK:g} pixel and are cut at the edge."
        found.append(Finding(level, "clipped", what, "Perhaps the images were scaled after they were annotated."))
    if flat:
        what = worst.format(flat) + "have no area and are left out."
        found.append(Finding("warning", "zero-area", what, "Remove them."))
    return rows, found


def _short_side(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.minimum(rows[:, 3] - rows[:, 1], rows[:, 4] - rows[:, 2]))


def _header_findings(name: str, broken: list[str], other: list[str], n: int) -> Iterable[Finding]:
    if broken:
        what = f"{name}: {len(broken)} of {n} images cannot be opened and are left out: {'; '.join(broken[:3])}."
        yield Finding("warning", "unreadable", what, "Remove or replace them.")
    if other:
        what = f"{name}: {len(other)} of {n} images have another size than annotated: {', '.join(other[:3])}."
        yield Finding("warning", "sizes", what, "The file's own size counts; check that its boxes fit.")


# --- splits -----------------------------------------------------------------------------------------


def _split(
    name: str,
    classes: tuple[str, ...],
    classes_zh: tuple[str, ...],
    pools: dict[str, BoxImages],
    seed: int,
    calibrate: int,
    select: int,
    notices: tuple[str, ...],
) -> Data:
    """The last part is the report split where there are two or more; a third part between them is held out."""
    order = list(pools)
    report = pools[order[-1]] if len(order) > 1 else None
    pool = _joined([pools[k] for k in (order[:-1] or order)])
    held = np.arange(len(pool.paths) - len(pools[order[1]].paths), len(pool.paths)) if len(order) > 2 else None
    rows = held if held is not None else np.arange(len(pool.paths))
    n = len(rows)
    if n < FEWEST:
        raise BadData(f"{name} has only {n} images to split.", f"Give at least {FEWEST}, better a few hundred.")
    share = 50 if held is not None else 15
    sizes = {"calibrate": min(calibrate, max(1, n * share // 100)), "select": min(select, max(1, n * share // 100))}
    if report is None:
        sizes["report"] = min(10000, max(1, n // 5))
    found = {k: rows[v] for k, v in balanced(pool.labels[rows], sizes, seed).items()}
    if held is not None:
        rest = np.setdiff1d(np.arange(len(pool.paths)), np.concatenate([found["calibrate"], found["select"]]))
        found["train"] = np.random.default_rng(seed).permutation(rest)
    mark = digest([[_listing(p) for p in pools.values()], classes, seed, sizes])
    train, calibration, selection = (Split(pool, found[k]) for k in ("train", "calibrate", "select"))
    final = Split(report, np.arange(len(report.paths))) if report is not None else Split(pool, found["report"])
    return Data(name, classes, classes_zh, train, calibration, selection, final, mark, notices)


def _joined(pools: list[BoxImages]) -> BoxImages:
    if len(pools) == 1:
        return pools[0]
    most = max(p.labels.shape[1] for p in pools)
    wide = [np.tile(NO_BOX, (len(p.paths), most, 1)) for p in pools]
    for table, p in zip(wide, pools):
        table[:, : p.labels.shape[1]] = p.labels
    paths, findings = (tuple(x for p in pools for x in getattr(p, key)) for key in ("paths", "findings"))
    return BoxImages(paths, np.concatenate(wide), np.concatenate([p.sizes for p in pools]), None, findings)


def _listing(images: BoxImages) -> str:
    mark = hashlib.sha256(images.labels.tobytes())
    for path in images.paths:
        stat = path.stat()
        mark.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return mark.hexdigest()
