"""A demonstration set without downloads: scenes composed from real CIFAR-10 objects, with boxes. Made, not photographed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from lighten.data import builtin, demo
from lighten.data.boxes import BoxArrays
from lighten.data.cache import cache_dir, whole_folder, write_whole
from lighten.data.scenes import MOST, VERSION, cut, scene
from lighten.data.splits import Split
from lighten.errors import BadData
from lighten.types import Data, Progress, digest, silent

TRAIN, CALIBRATE, SELECT, REPORT = 6000, 512, 1000, 2000
SIZES, COUNTS = (160, 320), (8, 50_000)
DEMO_SIZE, DEMO = 160, {"train": 48, "calibrate": 16, "select": 32, "report": 32}
NOTICE = (
    "These scenes are composed: real CIFAR-10 objects on grounds made of other CIFAR-10 images, placed by chance. They show"
    " how things work; numbers on them say little about photographs."
)
EACH = {"train": 2500, "calibrate": 300, "select": 350, "report": 650}
"""Images of each class that objects may come from; CIFAR-10 has 5,000 to train with (train, calibrate) and 1,000 to test
with (select, report). No image serves two splits."""
NAME = re.compile(r"composed(?:-(demo|\d{1,6}))?(?:@(\d{1,4}))?")


def is_name(name: object) -> bool:
    """ "composed", "composed-500" (training scenes), "composed-demo", each with "@320" for the size in pixels."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def load(name: str, *, calibrate: int = CALIBRATE, select: int | None = None, progress: Progress = silent) -> Data:
    """The set of that name. With fewer training scenes the other splits are smaller too. Raises BadData."""
    found = NAME.fullmatch(name)
    if found is None:
        raise BadData(f"{name!r} is no composed set.", "Known: composed, composed-N, composed-demo, each with @SIZE.")
    count, size = found[1], int(found[2] or (DEMO_SIZE if found[1] == "demo" else 192))
    if count == "demo":
        return composed_demo(size)
    train = int(count or TRAIN)
    calibrate = min(calibrate, max(32, train // 8))
    select = min(SELECT if select is None else select, max(100, train // 6))
    return composed(size, train, calibrate, select, min(REPORT, max(100, train // 3)), progress=progress)


def composed(
    size: int = 192,
    train: int = TRAIN,
    calibrate: int = CALIBRATE,
    select: int = SELECT,
    report: int = REPORT,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Data:
    """So many scenes of `size` x `size` pixels a split, made once and kept in the cache; the same seed gives the same bytes.

    Objects of train and calibrate are CIFAR-10's training images, those of select and report its test images, and no
    image serves two splits. Raises BadData on sizes and counts out of range, and where CIFAR-10 cannot be had.
    """
    counts = {"train": train, "calibrate": calibrate, "select": select, "report": report}
    _check(size, counts)
    mark = digest(["composed", VERSION, size, counts, seed, EACH, builtin.CIFAR_SHA256])
    folder = cache_dir() / "composed" / f"{train}-{size}-{mark[:10]}"
    if not (folder / "complete.json").exists():
        _write(folder, _cifar(counts, progress), size, counts, seed, progress)
    return _data(f"composed-{train} (CIFAR-10)", _read(folder, counts, size), mark)


def composed_demo(size: int = DEMO_SIZE, seed: int = 0) -> Data:
    """A tiny set in memory, made of the CIFAR-10 images that come with lighten: nothing is fetched or kept."""
    _check(size, DEMO)
    source, found = demo.data(), {}
    for k, (name, sheet) in enumerate(_demo_sheets(source).items()):
        pieces = cut(*sheet)
        made = [scene(pieces, size, np.random.default_rng([seed, k, i])) for i in range(DEMO[name])]
        found[name] = BoxArrays(np.stack([pixels for pixels, _ in made]), np.stack([rows for _, rows in made]))
    return _data("composed-demo (CIFAR-10)", found, digest(["demo", VERSION, size, seed, source.fingerprint]))


def _check(size: int, counts: dict[str, int]) -> None:
    if not SIZES[0] <= size <= SIZES[1]:
        raise BadData(f"Scenes of {size} pixels are not made.", f"Give {SIZES[0]} to {SIZES[1]}.")
    for name, count in counts.items():
        if not COUNTS[0] <= count <= COUNTS[1]:
            raise BadData(f"{count} scenes for {name} are not made.", f"Give {COUNTS[0]} to {COUNTS[1]:,}.")


def _data(name: str, found: dict[str, BoxArrays], mark: str) -> Data:
    cifar = builtin.known()["cifar10"]
    splits = {k: Split(found[k], np.arange(len(found[k].labels))) for k in EACH}
    return Data(name, cifar.classes, cifar.classes_zh, **splits, fingerprint=mark, notices=(NOTICE,))


# --- where the objects come from ----------------------------------------------------------------------

Sheet = tuple[np.ndarray, np.ndarray]
"""uint8 (n, 32, 32, 3) and their classes (n,)."""


def _cifar(counts: dict[str, int], progress: Progress) -> dict[str, Sheet]:
    """The source images of each split; a few scenes need only some of them."""
    _, arrays = builtin.read("cifar10", progress)
    sheets = {}
    for pool, names in (("train", ("train", "calibrate")), ("test", ("select", "report"))):
        labels, first = np.asarray(arrays[f"{pool}_labels"]), 0
        for name in names:
            last = first + min(EACH[name], max(50, counts[name] // 2))
            rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[first:last] for c in range(10)]))
            sheets[name] = (np.asarray(arrays[pool])[rows], labels[rows])
            first += EACH[name]
    return sheets


def _demo_sheets(source: Data) -> dict[str, Sheet]:
    """The embedded images: its select and calibrate are CIFAR-10's training images, its report the test images."""
    parts = {
        "train": (source.select, slice(0, 300)),
        "calibrate": (source.calibrate, slice(0, 150)),
        "select": (source.report, slice(0, 150)),
        "report": (source.report, slice(150, 300)),
    }
    return {name: (s.images.array[s.rows[at]], s.labels[at]) for name, (s, at) in parts.items()}


# --- the cache --------------------------------------------------------------------------------------


def _write(
    folder: Path, sheets: dict[str, Sheet], size: int, counts: dict[str, int], seed: int, progress: Progress
) -> None:
    """One plain .npy file of pixels and one of labels a split; written as it is made, so that little memory is held."""
    with whole_folder(folder) as room:
        for k, (name, count) in enumerate(counts.items()):
            progress(f"cutting out objects for {name}", k, len(counts))
            pieces = cut(*sheets[name])
            rows: np.ndarray = np.empty((count, MOST, 6), np.float32)
            with (room / f"{name}.npy").open("wb") as f:
                head = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
                np.lib.format.write_array_header_1_0(f, head)
                for i in range(count):
                    pixels, rows[i] = scene(pieces, size, np.random.default_rng([seed, k, i]))
                    f.write(pixels.tobytes())
                    if (i + 1) % 50 == 0 or i + 1 == count:
                        progress(f"composing {name}", i + 1, count)
            np.save(room / f"{name}_labels.npy", rows)
        write_whole(room / "complete.json", json.dumps({"size": size, "counts": counts, "seed": seed}))


def _read(folder: Path, counts: dict[str, int], size: int) -> dict[str, BoxArrays]:
    found = {}
    try:
        for name, count in counts.items():
            pixels = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / f"{name}_labels.npy", allow_pickle=False)
            if pixels.shape != (count, size, size, 3) or labels.shape != (count, MOST, 6):
                raise ValueError(f"{name} has another shape")
            found[name] = BoxArrays(pixels, labels)
    except (OSError, ValueError, EOFError) as e:
        raise BadData(f"{folder} is damaged ({e}).", "Delete that folder, then run it again.") from e
    return found
