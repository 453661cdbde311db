"""The calibration doctor for boxes: what is wrong with labels and images before anything costly runs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lighten.data.boxes import Boxed, moved, present
from lighten.data.doctor import Finding
from lighten.data.doctor import examine as examine_images
from lighten.data.preprocess import describe, frame_of, to_pixels
from lighten.data.splits import Split
from lighten.errors import BadImage
from lighten.types import Data, Preprocess

SLACK, NO_AREA = 1.0, 1e-3
"""Pixels: sticking out by less is rounding; a narrower box has no area."""
SAME = 0.95
"""Intersection over union from which two boxes of one class are one object that was drawn twice."""
TINY, MANY_TINY = 8.0, 0.1
"""Root of the area in pixels of the network's input; the share of boxes from which it is said."""
SKEWED, UPSCALED, LOST = 100.0, 2.0, 0.02
SAMPLE, PROBES = 5_000, 8
"""Images of a split whose boxes are compared in pairs, and calibration images that are read anew."""


def examine(data: Data, how: Preprocess | None, *, strict: bool = False) -> tuple[Finding, ...]:
    """Everything that can be seen of a detector's data before the model runs, errors first.

    Boxes may be in the pixels of the images or, after `framed`, in those of the network's input. Images are examined as
    those of a classifier are (`data.doctor`), without their labels.
    """
    found = [*_reading(data)]
    for name, split in data.splits.items():
        broken = list(_broken(name, split, data.classes))
        found += broken
        if len(split) and not any(f.level == "error" for f in broken):
            found += [*_boxes(name, split, data.classes), *_in_frame(name, split, how)]
    found += [*_pictures(data, how, strict), *_as_at_inference(data.calibrate, how)]
    return tuple(sorted(dict.fromkeys(found), key=lambda f: f.level))


def _warning(code: str, what: str, to_do: str) -> Finding:
    return Finding("warning", code, what, to_do)


def _error(code: str, what: str, to_do: str) -> Finding:
    return Finding("error", code, what, to_do)


def _reading(data: Data) -> Iterator[Finding]:
    """What was cut or left out when the files were read."""
    pools = {id(s.images): s.images for s in data.splits.values()}
    for images in pools.values():
        yield from getattr(images, "findings", ())


# --- labels -----------------------------------------------------------------------------------------


def _broken(name: str, split: Split, classes: tuple[str, ...]) -> Iterator[Finding]:
    """Labels that no score can be computed from."""
    labels, to_do = split.labels, "Mend the code or the files that the labels come from."
    if labels.ndim != 3 or labels.shape[2] != 6:
        what = f"{name}: labels of shape {labels.shape} are not (images, boxes, 6)."
        yield _error("labels", what, "A row is: class, x1, y1, x2, y2, ignore; class -1 is no box.")
        return
    image, row = np.nonzero(~np.isfinite(labels).all(2))
    if len(image):
        yield _error("not-finite", f"{name}: {_first(split, labels, image, row, 'hold NaN or infinity')}", to_do)
        return
    k = labels[..., 0]
    image, row = np.nonzero((k != np.floor(k)) | (k < -1) | (k >= len(classes)))
    if len(image):
        range_ = f"are of a class that is none of 0 to {len(classes) - 1}"
        yield _error("labels", f"{name}: {_first(split, labels, image, row, range_)}", to_do)
    image, row = np.nonzero((k >= 0) & ((labels[..., 3] < labels[..., 1]) | (labels[..., 4] < labels[..., 2])))
    if len(image):
        yield _error("reversed", f"{name}: {_first(split, labels, image, row, 'end before they begin')}", to_do)


def _first(split: Split, labels: np.ndarray, image: np.ndarray, row: np.ndarray, what: str) -> str:
    """ "3 boxes stick out; the first is 1 at 0, 5, 9, 9 in cat.jpg." """
    one = ", ".join(f"{v:g}" for v in labels[image[0], row[0], 1:5])
    where = split.images.name(int(split.rows[image[0]]))
    return f"{len(image)} boxes {what}; the first is class {labels[image[0], row[0], 0]:g} at {one} in {where}."


def _boxes(name: str, split: Split, classes: tuple[str, ...]) -> Iterator[Finding]:
    labels, here = split.labels, split.labels[..., 0] >= 0
    box, sizes = labels[..., 1:5], _sizes(split)
    if not here.any():
        what = f"{name}: none of the {len(split)} images has a box."
        grave = name in ("select", "report")
        yield _error("no-boxes", what, "mAP needs boxes.") if grave else _warning("no-boxes", what, "Give labels.")
        return
    bare = int((~here.any(1)).sum())
    if bare > len(split) / 2:
        what = f"{name}: {bare} of {len(split)} images have no box."
        yield _warning("no-boxes", what, "Fine where they are background; else look for the missing labels.")
    side = np.minimum(box[..., 2] - box[..., 0], box[..., 3] - box[..., 1])
    image, row = np.nonzero(here & (side <= NO_AREA))
    if len(image):
        yield _warning("zero-area", f"{name}: {_first(split, labels, image, row, 'have no area')}", "Remove them.")
    over = np.maximum(-box.min(2), np.maximum(box[..., 2] - sizes[:, :1], box[..., 3] - sizes[:, 1:]))
    image, row = np.nonzero(here & (over > SLACK))
    if len(image):
        what = f"{name}: {_first(split, labels, image, row, 'stick out of their images')}"
        to_do = "Cut them at the edge; if they are many, the images were scaled after they were annotated."
        yield _error("outside", what, to_do) if len(image) > here.sum() / 2 else _warning("outside", what, to_do)
    yield from _twice(name, split)
    yield from _counts(name, labels, classes)


def _sizes(split: Split) -> np.ndarray:
    """Width and height of the frame that the boxes lie in, (N, 2)."""
    images: Boxed = split.images  # type: ignore[assignment]
    if images.how is not None:
        return np.tile(np.array([images.how.width, images.how.height]), (len(split), 1))
    return np.asarray(images.sizes)[split.rows]


def _twice(name: str, split: Split) -> Iterator[Finding]:
    """Two boxes of one class in nearly the same place; a crowd may lie anywhere."""
    picked = np.sort(np.random.default_rng(0).permutation(len(split))[:SAMPLE])
    labels = split.labels[picked]
    image: list[int] = []
    for k in np.flatnonzero(((labels[..., 0] >= 0) & (labels[..., 5] == 0)).sum(1) > 1):
        mine = labels[k][(labels[k][:, 0] >= 0) & (labels[k][:, 5] == 0)]
        pairs = np.triu((overlaps(mine[:, 1:5]) > SAME) & (mine[:, :1] == mine[:, 0]), 1)
        image += [int(k)] * int(pairs.sum())
    if image:
        shown = _some(list(dict.fromkeys(split.images.name(int(split.rows[picked[k]])) for k in image)))
        seen = "" if len(picked) == len(split) else f" in a sample of {len(picked)} images"
        what = f"{name}: {len(image)} boxes are there twice (same class, IoU over {SAME:g}){seen}: {shown}."
        yield _warning("duplicates", what, "Remove the copies: a detector that is right loses points by them.")


def overlaps(box: np.ndarray) -> np.ndarray:
    """Intersection over union of each pair of (K, 4), (K, K); 0 where both are empty."""
    low, high = np.maximum(box[:, None, :2], box[None, :, :2]), np.minimum(box[:, None, 2:], box[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(2)
    area = (box[:, 2:] - box[:, :2]).prod(1)
    return np.asarray(both / np.maximum(area[:, None] + area[None] - both, 1e-9))


def _counts(name: str, labels: np.ndarray, classes: tuple[str, ...]) -> Iterator[Finding]:
    lost = [classes[k] for k in np.flatnonzero(~present(labels, len(classes)).any(0))]
    if lost:
        what = f"{name} has no box of {len(lost)} of {len(classes)} classes: {_some(lost, 5)}."
        yield _warning("missing-class", what, "Give images of every class: its AP cannot be measured, nor learnt.")
    counted = labels[(labels[..., 0] >= 0) & (labels[..., 5] == 0)][:, 0].astype(int)
    counts = np.bincount(counted, minlength=len(classes))
    most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max() + 1).argmin())
    if name == "train" and counts[most] >= SKEWED * counts[least] > 0:
        what = f"train has {counts[most]} boxes of {classes[most]} but {counts[least]} of {classes[least]}."
        yield _warning("imbalance", what, "mAP weighs each class alike: give more of the rare ones.")


def _some(items: Sequence[str], n: int = 3) -> str:
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")


# --- in the network's input -----------------------------------------------------------------------------


def _in_frame(name: str, split: Split, how: Preprocess | None) -> Iterator[Finding]:
    """How large boxes are where the network sees them, and whether cropping cuts them away."""
    images: Boxed = split.images  # type: ignore[assignment]
    if how is None:
        return
    if images.how not in (None, how):
        what = f"{name}: the boxes are those of another input ({describe(images.how)})."
        yield _error("frame", what, "Load the data again and frame it once.")
        return
    before = split.labels
    after = before if images.how == how else moved(before, _sizes(split), how)
    here = after[..., 0] >= 0
    had, has = int((before[..., 0] >= 0).sum()), int(here.sum())
    if had - has > LOST * had:
        what = f"{name}: {had - has} of {had} boxes lie outside the network's input ({describe(how)})."
        yield _warning("cut-away", what, "Use letterbox, which keeps the whole image.")
    size = np.sqrt(np.clip(after[..., 3] - after[..., 1], 0, None) * np.clip(after[..., 4] - after[..., 2], 0, None))
    share = float((size[here] < TINY).mean()) if has else 0.0
    if share > MANY_TINY:
        what = f"{name}: {100 * share:.0f} % of the boxes are under {TINY:g} pixels at {how.width}x{how.height}."
        yield _warning("tiny", what, "Few detectors find those: take a larger input, or crops of the images.")


# --- pictures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bare:
    """The images without their boxes: all of one class."""

    images: Boxed

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.images.labels), np.int64)

    def read(self, i: int) -> Image.Image | np.ndarray:
        return self.images.read(i)

    def name(self, i: int) -> str:
        return self.images.name(i)


def _pictures(data: Data, how: Preprocess | None, strict: bool) -> Iterator[Finding]:
    """What the doctor of classifiers says of the pixels, in words of detection."""
    bare = {k: dataclasses.replace(s, images=_Bare(s.images)) for k, s in data.splits.items()}
    for f in examine_images(dataclasses.replace(data, classes=("object",), **bare), how, strict=strict):
        if f.code == "few-images" and "accuracy" in f.what:
            yield dataclasses.replace(f, what=f"{f.what.split(':')[0]}: the error bar of mAP is wide.")
        elif f.code != "upscaled":
            yield f
    yield from _upscaled(data.calibrate, how)


def _upscaled(split: Split, how: Preprocess | None) -> Iterator[Finding]:
    images: Boxed = split.images  # type: ignore[assignment]
    if how is None or not len(split):
        return
    sizes = np.unique(np.asarray(images.sizes)[split.rows], axis=0)
    scales = [max(f.scale_x, f.scale_y) for f in (frame_of(int(w), int(h), how) for w, h in sizes)]
    if np.mean(np.array(scales) > UPSCALED) > 0.5:
        what = f"Most images are blown up {np.median(scales):.1f} times to the {how.width}x{how.height} input."
        yield _warning("upscaled", what, "Fine if the model was trained so; else give larger originals.")


def _as_at_inference(split: Split, how: Preprocess | None) -> Iterator[Finding]:
    """Whether prepared calibration images are what inference makes of the same files: ranges come from them."""
    if how is None or split.ready is None or split.ready.dtype != np.uint8:
        return
    picked = np.random.default_rng(0).permutation(len(split))[:PROBES]
    wrong = []
    for k in picked:
        try:
            image = split.images.read(int(split.rows[k]))
        except BadImage:
            continue
        fresh = image if isinstance(image, np.ndarray) and image.dtype != np.uint8 else to_pixels(image, how)
        if not np.array_equal(fresh, split.ready[k]):
            wrong.append(split.images.name(int(split.rows[k])))
    if wrong:
        what = f"calibrate: {len(wrong)} of {len(picked)} images were prepared in another way than inference has."
        yield _error("calibration-frame", f"{what} {wrong[0]} is one.", f"Prepare them so: {describe(how)}.")
