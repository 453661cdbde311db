"""Data in: a folder, a built-in name or a Python iterable becomes four disjoint splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lighten.data import boxes, builtin, composed
from lighten.data.images import DAMAGE, SUFFIXES, eight_bit
from lighten.data.splits import ArrayImages, FileImages, Images, ListImages, Split, stratified
from lighten.errors import BadData
from lighten.types import Data, Preprocess, Progress, digest, silent

__all__ = ["Split", "framed", "has_boxes", "load"]

CALIBRATE, SELECT, SELECT_BUILTIN = 512, 2000, 5000
MAX_CLASSES = 100_000
TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("report", "test", "val", "valid", "validation")


def load(
    spec: Any,
    *,
    seed: int = 0,
    calibrate: int = CALIBRATE,
    select: int | None = None,
    held_out: Iterable[int | str] | None = None,
    progress: Progress = silent,
) -> Data:
    """`spec` is a folder of class folders (or train/ and val/ of them), a built-in name, or an iterable of
    (image, label); with boxes, a COCO, YOLO or Pascal VOC folder, its JSON or YAML, {"train": {"images", "annotations"}},
    or composed. A `Data` passes unchanged.

    `held_out` are the numbers or names of the training images that the model was not trained on: calibrate and select
    then take only those. Raises BadData, naming the folder or item."""
    loaded = _load(spec, seed, calibrate, select, progress)
    return loaded if held_out is None else _holding_out(loaded, tuple(held_out), seed, calibrate, select)


def _load(spec: Any, seed: int, calibrate: int, select: int | None, progress: Progress) -> Data:
    if isinstance(spec, Data):
        return spec
    if spec == "demo":
        from lighten.data import demo

        return demo.data()
    if composed.is_name(spec):
        return composed.load(spec, calibrate=calibrate, select=select, progress=progress)
    if isinstance(spec, dict) or (isinstance(spec, str | Path) and boxes.kind_of(Path(spec))):
        return boxes.load_boxes(spec, seed=seed, calibrate=calibrate, select=select or SELECT, progress=progress)
    if isinstance(spec, str) and spec in builtin.known():
        return _load_builtin(spec, seed, calibrate, select or SELECT_BUILTIN, progress)
    if isinstance(spec, str | Path):
        return _load_folder(Path(spec), seed, calibrate, select or SELECT)
    if isinstance(spec, Iterable) or hasattr(spec, "__getitem__"):
        return _load_iterable(spec, seed, calibrate, select or SELECT)
    raise BadData(
        f"{type(spec).__name__} is no data.",
        "Give a folder, a built-in name, or an iterable of (image, label).",
    )


def has_boxes(data: Data) -> bool:
    """Whether its labels are boxes."""
    return bool(data.select.labels.ndim == 3)


def framed(data: Data, how: Preprocess | None) -> Data:
    """`data` with boxes, where it has any, in pixels of the network's input."""
    return boxes.framed(data, how) if how is not None and has_boxes(data) else data


def assemble(
    name: str,
    classes: tuple[str, ...],
    classes_zh: tuple[str, ...],
    pool: Images,
    report: Images | None,
    seed: int,
    calibrate: int,
    select: int,
    identity: str,
    notices: tuple[str, ...] = (),
) -> Data:
    """Splits `pool` into train / calibrate / select, and report too where there is no `report` of its own.

    A small pool gives each split a share: at most 15 % calibrate, 15 % select, 20 % report.
    """
    n = len(pool.labels)
    sizes = {"calibrate": min(calibrate, max(1, n * 15 // 100)), "select": min(select, max(1, n * 15 // 100))}
    if report is None:
        sizes["report"] = min(10000, max(1, n // 5))
    rows = stratified(np.asarray(pool.labels), sizes, seed)
    final = Split(report, np.arange(len(report.labels))) if report is not None else Split(pool, rows["report"])
    mark = digest([identity, seed, sizes])
    train, calibration, selection = (Split(pool, rows[k]) for k in ("train", "calibrate", "select"))
    return Data(name, classes, classes_zh, train, calibration, selection, final, mark, notices)


def _holding_out(data: Data, held_out: tuple[int | str, ...], seed: int, calibrate: int, select: int | None) -> Data:
    """`data` with calibrate and select drawn from the held-out images alone. Raises BadData on one that is not there."""
    pool: Images = data.train.images
    rows = np.unique(_rows_of(pool, held_out))
    if len(rows) < 2 * len(data.classes):
        raise BadData(
            f"Only {len(rows)} images are held out, for {len(data.classes)} classes.", "Name some of every class."
        )
    calibrate = min(calibrate, max(1, len(rows) * 15 // 100))
    sizes = {"calibrate": calibrate, "select": min(select or len(rows), len(rows) - calibrate)}
    fair = boxes.balanced if has_boxes(data) else stratified
    found = fair(np.asarray(pool.labels)[rows], sizes, seed)
    mine = np.isin(data.report.rows, rows) if data.report.images is pool else np.zeros(len(data.report.rows), bool)
    if mine.any():
        raise BadData(
            f"{int(mine.sum())} of the held-out images are report images.", "Give the data a test/ folder of its own."
        )
    taken = data.report.rows if data.report.images is pool else np.array([], int)
    rest = np.setdiff1d(np.arange(len(pool.labels)), np.concatenate([rows, taken]))
    train = Split(pool, np.random.default_rng(seed).permutation(rest))
    mark = digest([data.fingerprint, rows.tolist(), sizes])
    calibration, selection = (Split(pool, rows[found[k]]) for k in ("calibrate", "select"))
    return replace(data, train=train, calibrate=calibration, select=selection, fingerprint=mark)


def _rows_of(pool: Images, held_out: tuple[int | str, ...]) -> np.ndarray:
    n = len(pool.labels)
    wanted = {str(name) for name in held_out if isinstance(name, str)}
    numbers = [int(i) for i in held_out if not isinstance(i, str)]
    if bad := [i for i in numbers if not 0 <= i < n]:
        raise BadData(f"Image {bad[0]} is held out, but there are only {n}.", "Count training images from 0.")
    if not wanted:
        return np.array(numbers, int)
    by_name = {pool.name(i): i for i in range(n)}
    if missing := [name for name in wanted if name not in by_name]:
        raise BadData(f"{missing[0]} is held out, but is no training image.", "Write paths as the data has them.")
    return np.array([*numbers, *(by_name[name] for name in wanted)], int)


def read_held_out(file: Path) -> tuple[int | str, ...]:
    """One image a line: its number from 0 in the order of the set (built-in data), or its path. Raises BadData."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadData(f"{file} cannot be read ({e}).", "Give a text file with one image a line.") from e
    found = tuple(int(line) if line.isdecimal() else line for line in lines if line and not line.startswith("#"))
    if not found:
        raise BadData(f"{file} names no image.", "Write one a line: its number, or its path.")
    return found


def _load_builtin(name: str, seed: int, calibrate: int, select: int, progress: Progress) -> Data:
    spec, arrays = builtin.read(name, progress)
    pool = ArrayImages(arrays["train"], np.asarray(arrays["train_labels"]))
    report = ArrayImages(arrays["test"], np.asarray(arrays["test_labels"]))
    identity = digest([name, spec.sha256])
    return assemble(name, spec.classes, spec.classes_zh, pool, report, seed, calibrate, select, identity)


# --- folders ----------------------------------------------------------------------------------------


def _load_folder(root: Path, seed: int, calibrate: int, select: int) -> Data:
    if not root.is_dir():
        known = ", ".join([*builtin.known(), "demo", "composed"])
        to_do = f"Give a folder of class folders, a COCO, YOLO or Pascal VOC set, or a built-in name ({known})."
        raise BadData(f"{root} is not a folder.", to_do)
    train = next((root / n for n in TRAIN_NAMES if (root / n).is_dir()), None)
    test = next((root / n for n in TEST_NAMES if (root / n).is_dir()), None)
    # Class folders may themselves be called "train" or "test": a layout is a pair, or a "train" with folders in it.
    train = train if train and any(d.is_dir() for d in train.iterdir()) else None
    pool_root, report_root = (train, test) if train and test else (train or root, None)
    names = _class_names(pool_root)
    pool, notices = _scan(pool_root, names)
    if report_root is not None:
        unused = [n for n in TEST_NAMES if (root / n).is_dir() and root / n != report_root]
        notices += tuple(f"{root / n} is not used: {report_root.name}/ is the report split." for n in unused)
    report = None
    if report_root is not None:
        extra = sorted(set(_class_names(report_root)) - set(names))
        if extra:
            raise BadData(
                f"{report_root} has classes that {pool_root} lacks: {', '.join(extra[:5])}.",
                "Give both the same class folders.",
            )
        report, more = _scan(report_root, names)
        notices += more
    titles, titles_zh = _labels(root, names)
    identity = digest([_listing(pool, root), _listing(report, root) if report else None])
    return assemble(root.name, titles, titles_zh, pool, report, seed, calibrate, select, identity, notices)


def _class_names(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")))
    if not names:
        loose = any(f.suffix.lower() in SUFFIXES for f in root.iterdir())
        raise BadData(
            f"{root} holds {'images but no class folders' if loose else 'no class folders'}.",
            "Put the images of each class into a folder named after the class.",
        )
    if len(names) == 1:
        raise BadData(f"{root} holds only one class, {names[0]!r}.", "A classifier needs at least two class folders.")
    return names


def _scan(root: Path, names: tuple[str, ...]) -> tuple[FileImages, tuple[str, ...]]:
    paths, labels, empty = [], [], []
    for k, name in enumerate(names):
        folder = root / name
        found = sorted(p for p in folder.rglob("*") if _is_picture(p)) if folder.is_dir() else []
        paths += found
        labels += [k] * len(found)
        if not found:
            empty.append(name)
    if not paths:
        raise BadData(f"{root} holds no images.", f"Known endings: {', '.join(SUFFIXES)}.")
    notices = (f"{root} has no images of: {', '.join(empty[:10])}",) if empty else ()
    return FileImages(tuple(paths), np.array(labels, np.int64)), notices


def _is_picture(path: Path) -> bool:
    """Hidden files are none: macOS leaves a `._photo.jpg` beside each photo."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _listing(images: FileImages, root: Path) -> str:
    rows = [f"{p.relative_to(root)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in images.paths]
    return hashlib.sha256("\n".join(rows).encode(errors="surrogateescape")).hexdigest()


def _labels(root: Path, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Titles from `labels.json` in the folder ({"folder": {"name": ..., "name_zh": ...}}), else the folder names."""
    file = root / "labels.json"
    if not file.is_file():
        return names, names
    try:
        table = json.loads(file.read_text("utf-8"))
        rows = [table.get(n, {}) for n in names]
        return tuple(str(r.get("name", n)) for n, r in zip(names, rows)), tuple(
            str(r.get("name_zh", r.get("name", n))) for n, r in zip(names, rows)
        )
    except (ValueError, AttributeError) as e:
        raise BadData(f"{file} cannot be read ({e}).", 'It holds {"folder": {"name": "cat", "name_zh": "猫"}}.') from e


# --- iterables --------------------------------------------------------------------------------------


def _load_iterable(items: Any, seed: int, calibrate: int, select: int) -> Data:
    images, labels = [], []
    for i, item in enumerate(_walk(items)):
        try:
            image, label = item
        except (TypeError, ValueError):
            raise BadData(
                f"Item {i} of the data is not a pair (image, label).", "Yield pairs, one image at a time."
            ) from None
        images.append(_plain_image(image, i))
        labels.append(_plain_label(label, i))
    if not images:
        raise BadData("The data yields nothing.", "Give at least a few hundred pairs (image, label).")
    y = np.array(labels, np.int64)
    if len(np.unique(y)) < 2:
        raise BadData(f"All {len(y)} labels are {y[0]}.", "A classifier needs at least two classes.")
    names = _names_of(items, int(y.max()) + 1)
    pool = ListImages(tuple(images), y)
    mark = hashlib.sha256(y.tobytes())
    for image in images:
        mark.update(np.asarray(image).tobytes())
    return assemble("python data", names, names, pool, None, seed, calibrate, select, mark.hexdigest())


def _walk(items: Any) -> Iterable[Any]:
    """Map-style data sets with a length are walked by index: their `__getitem__` need not raise IndexError."""
    if hasattr(items, "__len__") and hasattr(items, "__getitem__"):
        return (items[i] for i in range(len(items)))
    return iter(items)


def _names_of(items: Any, classes: int) -> tuple[str, ...]:
    """The data set's own `classes`, as torchvision's have it, else the numbers."""
    own = getattr(items, "classes", None)
    if not isinstance(own, list | tuple) or not own:
        return tuple(str(k) for k in range(classes))
    if len(own) < classes:
        raise BadData(f"The data names {len(own)} classes, but a label is {classes - 1}.", "Number the classes from 0.")
    return tuple(str(n) for n in own)


def _plain_image(image: Any, i: int) -> Image.Image | np.ndarray:
    try:
        if isinstance(image, Image.Image):
            return eight_bit(image).copy()
        array = np.asarray(image)
    except (*DAMAGE, RuntimeError) as e:
        raise BadData(
            f"Item {i}: the image cannot be read ({e}).",
            "Give images that are whole, on the CPU, without gradients.",
        ) from e
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))) and array.size:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "f" and array.ndim == 3:
        return np.ascontiguousarray(array, np.float32)
    raise BadData(
        f"Item {i}: an image of shape {array.shape} and type {array.dtype} is not understood.",
        "Give Pillow images, uint8 arrays (H, W, 3), or float tensors (3, H, W) that are ready network inputs.",
    )


def _plain_label(label: Any, i: int) -> int:
    try:
        value = int(label)
        whole = bool(value == label)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        whole = False
    if not whole:
        raise BadData(f"Item {i}: the label {label!r} is not a whole number.", "Number the classes from 0.")
    if not 0 <= value < MAX_CLASSES:
        why = "negative" if value < 0 else f"over the limit of {MAX_CLASSES:,} classes"
        raise BadData(f"Item {i}: the label {value} is {why}.", "Number the classes from 0.")
    return value
