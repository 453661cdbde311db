"""The calibration doctor: says what is wrong with the data before anything costly runs on it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from lighten.data.preprocess import frame_of
from lighten.data.splits import Split
from lighten.errors import BadData, BadImage
from lighten.types import Data, Preprocess

SAMPLE = 512
"""Images looked at of a split that is not decoded yet; `train` may hold a million."""
ORIGINALS = 16
"""Images read once more in their own size."""
FEW_CALIBRATE, FEW_MEASURED = 32, 100
IMBALANCE = 10.0
UPSCALED, DISTORTED = 2.0, 1.5
NEAR = 0.15
"""Near-copies differ by less than this share of their own standard deviation (mean absolute difference)."""
LEAK_ERROR = 0.2
"""Share of a measured split that may be known from elsewhere before its accuracy means nothing."""
LUMA = (299, 587, 114)
"""What JPEG keeps best (ITU-R 601-2), so its hash outlives being encoded anew."""
CROWD = 8
"""How many images of one hash are compared with one image; more is a flat background, not a copy."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong ("error") or likely so ("warning"). `code` is stable, for tests and JSON."""

    level: str
    code: str
    what: str
    to_do: str


def examine(data: Data, how: Preprocess | None, *, strict: bool = False) -> tuple[Finding, ...]:
    """Everything that can be seen before the model runs, errors first.

    Splits that are `prepare`d are seen whole, others (always `train`) through a seeded sample of 512. With
    `strict` an unreadable image is an error. Reads no more than those samples and 16 originals.
    """
    found: list[Finding] = []
    looks: dict[str, _Look] = {}
    for name, split in data.splits.items():
        found += _counted(name, split, data.classes)
        try:
            if len(split):
                looks[name] = _Look.at(name, split, how)
        except BadData as e:
            found.append(Finding("warning" if name == "train" else "error", "unreadable", e.what, e.to_do))
    for look in looks.values():
        found += [*_unreadable(look, strict), *_pixels(look, how)]
    found += [f for a, b in combinations(looks.values(), 2) for f in _leak(a, b)]
    if "calibrate" in looks and how is not None:
        found += _originals(data.calibrate, how)
    return tuple(sorted(found, key=lambda f: f.level))


def raise_errors(findings: Iterable[Finding]) -> None:
    """Raises BadData naming every error at once; warnings pass."""
    errors = [f for f in findings if f.level == "error"]
    if errors:
        raise BadData("\n".join(f.what for f in errors), "\n".join(dict.fromkeys(f.to_do for f in errors)))


def suspect_channel_order(score: Callable[[np.ndarray], float], pixels: np.ndarray) -> Finding | None:
    """Is the model better with red and blue exchanged, by more than two standard errors?

    `score` gives accuracy in percent on uint8 `pixels` (N, H, W, C). Pixels alone cannot tell RGB from BGR.
    """
    if pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        return None
    n, straight, turned = len(pixels), score(pixels), score(np.ascontiguousarray(pixels[..., ::-1]))
    # Agresti and Coull's p and error: with few images, 0 % and 100 % are not sure things.
    p, q = ((v / 100 * n + 2) / (n + 4) for v in (straight, turned))
    if q - p <= 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / (n + 4)):
        return None
    return _warning(
        "channel-order",
        f"With red and blue exchanged, accuracy is {turned:.1f} % instead of {straight:.1f} % ({n} images).",
        "It was probably trained on the other channel order: give --channel-order.",
    )


def suspect_normalization(accuracy: float, classes: int, n: int) -> Finding | None:
    """Is `accuracy` (percent, over `n` images) no better than guessing, within two standard errors?"""
    chance = 1 / max(classes, 1)
    limit = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / max(n, 1)))
    if n < 50 or accuracy > limit:
        return None
    return _warning(
        "normalization",
        f"The original gets {accuracy:.1f} % of {n} images right; guessing gets {100 * chance:.1f} %.",
        "Its preprocessing (size, mean, std, channel order) or its order of classes is probably another.",
    )


def suspect_blindness(average: float, n: int) -> Finding | None:
    """Does a detector find next to nothing: mAP under a point, over `n` images?"""
    if average >= 1.0:
        return None
    return _warning(
        "blind",
        f"The original finds next to nothing: mAP {average:.2f} % on {n} images.",
        "Its preprocessing (size, letterbox, mean, std, channel order) or its order of classes is probably another.",
    )


def _warning(code: str, what: str, to_do: str) -> Finding:
    return Finding("warning", code, what, to_do)


def _error(code: str, what: str, to_do: str) -> Finding:
    return Finding("error", code, what, to_do)


# --- counts -----------------------------------------------------------------------------------------


def _counted(name: str, split: Split, classes: tuple[str, ...]) -> Iterator[Finding]:
    n, labels = len(split), split.labels
    if n:
        yield from _balance(name, labels, classes)
    elif name != "train":
        yield _error("no-images", f"{name} has no images.", "Give more images.")
    if name == "calibrate" and 0 < n < FEW_CALIBRATE:
        yield _warning("few-images", f"calibrate has {n} images; ranges need {FEW_CALIBRATE}.", "Give more images.")
    if name in ("select", "report") and 0 < n < FEW_MEASURED:
        bar = f"the error bar is wide, up to ± {50 / math.sqrt(n):.1f} points of accuracy"
        yield _warning("few-images", f"{name} has {n} images: {bar}.", "Give more images.")


def _balance(name: str, labels: np.ndarray, classes: tuple[str, ...]) -> Iterator[Finding]:
    if labels.min() < 0 or labels.max() >= len(classes):
        what = f"{name} has labels {labels.min()} to {labels.max()}, but there are {len(classes)} classes."
        yield _error("labels", what, "Number the classes from 0, and name each.")
        return
    counts = np.bincount(labels, minlength=len(classes))
    lost = [classes[k] for k in np.flatnonzero(counts == 0)]
    if lost:
        what = f"{name} has no images of {len(lost)} of {len(classes)} classes: {_some(lost, 5)}."
        yield _warning("missing-class", what, "Give images of every class.")
    most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max()).argmin())
    if name == "calibrate" and counts[most] >= IMBALANCE * counts[least]:
        what = f"calibrate has {counts[most]} images of {classes[most]} but {counts[least]} of {classes[least]}."
        yield _warning("imbalance", what, "Balance the classes: the ranges will suit the largest.")


def _some(items: Sequence[str], n: int = 3) -> str:
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")


# --- pixels -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What is seen of one split. `small` is every image thinned to about 64 pixels a side, RGB, channels last."""

    name: str
    split: Split
    ready: np.ndarray
    small: np.ndarray
    blank: np.ndarray
    of: int

    @classmethod
    def at(cls, name: str, split: Split, how: Preprocess | None) -> _Look:
        """Raises BadData where not one image can be read."""
        part = split if split.ready is not None else _sample(split).prepare(how, what=name)
        ready = np.asarray(part.ready)
        if ready.ndim != 4:
            raise BadData(
                f"{name}: inputs of shape {ready.shape[1:]} are no images.", "Give (channels, height, width)."
            )
        last = ready if ready.dtype == np.uint8 or ready.ndim != 4 else ready.transpose(0, 2, 3, 1)
        step = max(1, min(last.shape[1:3]) // 64)
        bgr = how is not None and how.channel_order == "BGR"
        small = np.ascontiguousarray(last[:, ::step, ::step, :: -1 if bgr else 1])
        blank = (small == small[:, :1, :1]).reshape(len(small), -1).all(1)
        blank[blank] = [bool((last[k] == last[k][:1, :1]).all()) for k in np.flatnonzero(blank)]
        return cls(name, part, ready, small, blank, len(split))

    def __len__(self) -> int:
        return len(self.ready)

    def image(self, k: int) -> str:
        """The name a person knows image `k` by."""
        return self.split.images.name(int(self.split.rows[k]))

    @property
    def title(self) -> str:
        seen = len(self) + len(self.split.unreadable)
        return self.name if seen >= self.of else f"{self.name} (a sample of {seen})"

    @cached_property
    def exact(self) -> np.ndarray:
        """A hash of the thinned pixels, uint64 (N,)."""
        raw = [hashlib.blake2b(one.tobytes(), digest_size=8).digest() for one in self.small]
        return np.frombuffer(b"".join(raw), np.uint64)

    @cached_property
    def cells(self) -> np.ndarray:
        """Brightness over an even 8 x 8 grid, which a mirror image has mirrored: (N, 8, 8)."""
        dtype = np.uint32 if self.small.dtype == np.uint8 else np.float64
        rows, columns = (np.minimum((np.arange(8) * side + 4) // 8, side - 1) for side in self.small.shape[1:3])
        weights = np.array(LUMA if self.small.shape[3] == 3 else [1] * self.small.shape[3])
        parts = []
        for start in range(0, len(self.small), 256):
            part = np.add.reduceat(self.small[start : start + 256], rows, axis=1, dtype=dtype)
            parts.append(np.add.reduceat(part, columns, axis=2) @ weights)
        return np.concatenate(parts)

    def hashes(self, *, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """dHash (Krawetz, 2013): is each cell brighter than the one to its left; than the one above."""
        cells = self.cells[:, :, ::-1] if mirrored else self.cells
        return _key(cells[:, :, 1:] > cells[:, :, :-1]), _key(cells[:, 1:] > cells[:, :-1])


def _sample(split: Split) -> Split:
    rows = np.sort(np.random.default_rng(0).choice(len(split), min(SAMPLE, len(split)), replace=False))
    return dataclasses.replace(split, rows=split.rows[rows])


def _unreadable(look: _Look, strict: bool) -> Iterator[Finding]:
    bad = look.split.unreadable
    if bad:
        what = f"{look.title}: {len(bad)} images cannot be read and are left out: {_some(bad)}"
        yield Finding("error" if strict else "warning", "unreadable", what, "Remove or replace them.")


def _pixels(look: _Look, how: Preprocess | None) -> Iterator[Finding]:
    blank = [look.image(int(k)) for k in np.flatnonzero(look.blank)]
    if blank:
        what = f"{look.title}: {len(blank)} images are of one colour only: {_some(blank)}."
        yield _warning("blank", what, "Remove them: nothing can be learnt from them.")
    yield from _bytes(look, how) if look.ready.dtype == np.uint8 else _floats(look)


def _bytes(look: _Look, how: Preprocess | None) -> Iterator[Finding]:
    small = look.small[~look.blank]
    if not len(small):
        return
    if small.max() <= 15 and (top := int(look.ready.max())) <= 15:
        what = f"{look.title}: the largest pixel is {top} of 255."
        to_do = "The pixels were scaled before; give them as 0 to 255."
        yield _error("range", what, to_do) if top <= 1 else _warning("range", what, to_do)
    if how is not None and how.channels == small.shape[3] == 3:
        grey = 100 * float((small == small[..., :1]).reshape(len(small), -1).all(1).mean())
        if grey >= 95:
            what = f"{look.title}: {grey:.0f} % of the images are grey, and the model takes colour."
            yield _warning("grey", what, "Give pictures like those it will see.")


def _floats(look: _Look) -> Iterator[Finding]:
    """Ready inputs, which nothing will normalise any more."""
    ready = look.ready
    broken = [k for k, one in enumerate(ready) if not np.isfinite(one).all()]
    if broken:
        what = f"{look.title}: {len(broken)} inputs hold NaN or infinity, the first is {look.image(broken[0])}."
        yield _error("not-finite", what, "Mend the code that makes the inputs.")
    elif ready.min() >= 0 and ready.max() > 30:
        what = f"{look.title}: the inputs run from {ready.min():.0f} to {ready.max():.0f}, like plain pixels."
        yield _warning("range", what, "Normalise them as in training, or give uint8.")
    if ready.ndim == 4 and ready.shape[1] not in (1, 3, 4) and ready.shape[3] in (1, 3, 4):
        what = f"{look.title}: inputs of shape {ready.shape[1:]} look channels-last."
        yield _error("layout", what, "Give (channels, height, width).")


def _originals(split: Split, how: Preprocess) -> Iterator[Finding]:
    """Sizes of a few images as they are, against the size the network takes."""
    picked = np.random.default_rng(0).permutation(split.rows)[:ORIGINALS]
    sizes = [s for s in (_size(split, int(i)) for i in picked) if s]
    if not sizes:
        return
    width, height = np.array(sizes, float).T
    frames = [frame_of(w, h, how) for w, h in sizes]
    scale = np.array([max(f.scale_x, f.scale_y) for f in frames])
    if how.mode == "stretch":
        bend = (width / height) / (how.width / how.height)
        bend = np.maximum(bend, 1 / bend)
        if np.mean(bend > DISTORTED) > 0.5:
            what = f"Most images are stretched out of shape, by {np.median(bend):.1f} times."
            yield _warning("distorted", what, "If the model was trained on crops, give --resize.")
    if np.mean(scale > UPSCALED) > 0.5:
        what = f"Most images are blown up {np.median(scale):.1f} times to the {how.width}x{how.height} input."
        yield _warning("upscaled", what, "Fine if the model was trained so; else give larger originals.")


def _size(split: Split, row: int) -> tuple[int, int] | None:
    """Width and height before preprocessing; None for ready inputs and for what cannot be read."""
    try:
        image = split.images.read(row)
    except BadImage:
        return None
    if not isinstance(image, np.ndarray):
        return image.size
    return (image.shape[1], image.shape[0]) if image.dtype == np.uint8 else None


# --- leaks ------------------------------------------------------------------------------------------


def _leak(a: _Look, b: _Look) -> Iterator[Finding]:
    """Images of `b` that `a` holds as well: identical, or near-copies (encoded anew, or mirrored).

    Near-copies are found by equal difference hashes, so the count is a lower bound: of CIFAR-10 encoded anew as
    JPEG at quality 85 three in four have one.
    """
    same = _identical(a, b)
    copies = {**_near_copies(a, b), **same}
    if not copies:
        return
    shown = [*same, *(j for j in copies if j not in same)][:3]
    named = "; ".join(f"{b.image(j)} is {a.image(copies[j])}" for j in shown)
    what = f"{len(copies)} images of {b.title} are in {a.title} too ({len(same)} identical): {named}."
    # Near-copies alone are no reason to stop: a fixed camera sees nearly the same picture all day.
    grave = b.name in ("select", "report") and len(same) > LEAK_ERROR * min(len(a), len(b))
    to_do = "Remove the copies: they flatter the accuracy."
    yield _error("leak", what, to_do) if grave else _warning("leak", what, to_do)


def _identical(a: _Look, b: _Look) -> dict[int, int]:
    """Row of `b`: row of `a` with the very same pixels."""
    return {j: i for i, j in _candidates(a, b, a.exact, b.exact) if np.array_equal(a.ready[i], b.ready[j])}


def _near_copies(a: _Look, b: _Look) -> dict[int, int]:
    """Row of `b`: row of `a` with nearly the same pixels, straight or mirrored."""
    if a.small.shape[1:] != b.small.shape[1:]:
        return {}
    found: dict[int, int] = {}
    for mirrored in (True, False):
        for x, y in zip(a.hashes(mirrored=mirrored), b.hashes()):
            pairs = _candidates(a, b, x, y)
            found |= {j: i for i, j in pairs if _alike(a.small[i][:, :: -1 if mirrored else 1], b.small[j])}
    return found


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    difference = np.abs(one.astype(np.float32) - other.astype(np.float32))
    return bool(difference.mean() <= NEAR * other.std())


def _candidates(a: _Look, b: _Look, x: np.ndarray, y: np.ndarray) -> list[tuple[int, int]]:
    """Rows (i, j) with x[i] == y[j], at most CROWD for each j. Images of one colour are nobody's copy."""
    order = np.argsort(x, kind="stable")
    low = np.asarray(np.searchsorted(x, y, "left", sorter=order))
    count = np.minimum(np.searchsorted(x, y, "right", sorter=order) - low, CROWD)
    j: np.ndarray = np.repeat(np.arange(len(y)), count)
    i: np.ndarray = order[low[j] + np.arange(len(j)) - np.repeat(np.cumsum(count) - count, count)]
    keep = ~(a.blank[i] | b.blank[j])
    return list(zip(i[keep].tolist(), j[keep].tolist()))


def _key(bits: np.ndarray) -> np.ndarray:
    """56 bits of each row as one uint64."""
    packed = np.packbits(bits.reshape(len(bits), -1), axis=1)
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, 1)))).view(np.uint64)[:, 0]
