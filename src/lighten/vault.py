"""The report images: read once, by the original and the winner, and pictures of the answers that changed."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from PIL import Image

from lighten import workshop
from lighten.data.cache import write_whole
from lighten.data.preprocess import offset, scaled
from lighten.errors import BadConfig
from lighten.kit.boxes import SAME, clipped, pairs
from lighten.kit.draw import draw, font_for
from lighten.ledger import Ledger
from lighten.plugins import task_of
from lighten.trials import Run
from lighten.types import Final, Job, Preprocess, Trial

FLIPS_SHOWN = 24
BOXED_SHOWN, BOXED_LEAST = 16, 6
"""Images of a detector that are shown at most, and at least: where fewer changed, some that did not."""
PANEL, GAP, TALLEST = 256, 6, 2.0
"""Pixels of a panel's width and of the gap between two; how often its width a panel is high at most."""
LONGEST = 16
"""Letters of a class's name in a picture."""
STRIP_BYTES, QUALITIES = 90_000, (90, 80, 65, 45, 25, 10)
"""Bytes of one picture, and the JPEG qualities of which the first that keeps to them is taken."""


def read_report(book: Ledger, winner: Trial, split: Any, run: Run) -> tuple[Final, np.ndarray, np.ndarray]:
    """Original and winner on the report images. The answers are kept, so that a resumed run reads them back."""
    job, folder, baseline = run.job, run.folder, run.baseline
    file = run.artifacts / f"report-{winner.id}.npz"
    if book.final and book.final[0] == winner.id and file.exists():
        with np.load(file, allow_pickle=False) as kept:
            return book.final[1], kept["before"], kept["after"]
    run.log(f"reading the {len(split)} report images once, for {winner.recipe.title}")
    before = workshop.final_outputs(baseline, folder, split, job)
    after = before if winner.id == baseline.id else workshop.final_outputs(winner, folder, split, job)
    final = judged(task_of(job), before, after, split.labels, job.data.classes)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, before=before, after=after)
    write_whole(file, buffer.getvalue())
    book.append("final", {"winner": winner.id, "final": final})
    return final, before, after


def judged(task: Any, before: np.ndarray, after: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Final:
    """What the task says of both sets of answers to the same images."""
    return Final(
        task.score(before, labels),
        task.score(after, labels),
        task.drop(before, after, labels),
        len(task.flipped(before, after)),
        task.per_class(before, after, labels, classes),
        task.extra(after, labels),
        task.extra(before, labels),
    )


def thumbnails(
    folder: Path, split: Any, before: np.ndarray, after: np.ndarray, job: Job | None = None
) -> tuple[dict[str, Any], ...]:
    """Pictures of report images that are answered otherwise, as `Result.flips` describes them: small ones with all three
    answers, or of a detector (`job` has a head) truth, original and compressed side by side."""
    how = job.preprocess if job else None
    if job and job.head:
        return _boxed(folder, split, before, after, job)
    rows = np.flatnonzero(before.argmax(1) != after.argmax(1))[:FLIPS_SHOWN]
    labels, shown = split.labels, []
    for k, row in enumerate(rows.tolist()):
        pixels = split.ready[row]
        entry = {
            "image": split.images.name(int(split.rows[row])),
            "truth": int(labels[row]),
            "before": int(before[row].argmax()),
            "after": int(after[row].argmax()),
        }
        if pixels.dtype == np.uint8:
            entry["thumbnail"] = f"flips/{k}.png"
            write_whole(folder / "flips" / f"{k}.png", _png(_picture(pixels, how)))
        shown.append(entry)
    return tuple(shown)


def _picture(pixels: np.ndarray, how: Preprocess | None) -> Image.Image:
    """uint8 (H, W, C) as the network takes it, as a picture for people."""
    if how and how.channel_order == "BGR":
        pixels = np.ascontiguousarray(pixels[..., ::-1])
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _png(image: Image.Image) -> bytes:
    image.thumbnail((128, 128))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# --- detectors: truth, original and compressed side by side ---------------------------------------------


def _boxed(folder: Path, split: Any, before: np.ndarray, after: np.ndarray, job: Job) -> tuple[dict[str, Any], ...]:
    """The images that differ most first, then some that do not where few do."""
    task, labels = task_of(job), split.labels
    old, new = task.shown(before), task.shown(after)
    changed = task.flipped(before, after).tolist()
    languages, entries = [*_spelled(job.data.classes, job.data.classes_zh)], []
    for k, row in enumerate(chosen(changed, old, new)):
        truth = truth_of(labels[row])
        truth[:, 4] = np.nan  # no number is drawn
        entry = {
            "image": split.images.name(int(split.rows[row])),
            "changed": row in changed,
            **counts(labels[row], old[row], new[row]),
            **alone(old[row], new[row]),
        }
        if (pixels := split.ready[row]).dtype == np.uint8:
            image, crop = _picture(pixels, job.preprocess), content_of(split, row, job.preprocess)
            for key, names in languages:
                name = f"flips/{k}.jpg" if key == "thumbnail" else f"flips/{k}.zh.jpg"
                picture = strip(image, (truth, old[row], new[row]), names, crop)
                write_whole(folder / name, _jpeg(picture))
                entry[key] = name
        entries.append(entry)
    return tuple(entries)


def chosen(changed: Sequence[int], old: Sequence[np.ndarray], new: Sequence[np.ndarray]) -> list[int]:
    """Rows to show: the `changed` ones, most different first; under `BOXED_LEAST` of them, others in which something is
    found, too."""
    order = sorted(changed, key=lambda row: -difference(old[row], new[row]))[:BOXED_SHOWN]
    calm = [row for row in range(len(old)) if row not in changed and len(old[row])]
    return order + calm[: max(0, BOXED_LEAST - len(order))]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """How unlike two images' detections (K, 6) are: the scores of those without a partner, and what partners lack in
    overlap."""
    i, j, iou = pairs(a, b, SAME)
    alone = a[:, 4].sum() - a[i, 4].sum() + b[:, 4].sum() - b[j, 4].sum()
    return float(alone + (1 - iou).sum())


def truth_of(labels: np.ndarray, ignored: bool = False) -> np.ndarray:
    """The boxes of one image's labels (M, 6) that count, or those that do not, as detections (K, 6) with score 1."""
    rows = labels[(labels[:, 0] >= 0) & ((labels[:, 5] > 0) == ignored)]
    return np.column_stack([rows[:, 1:5], np.ones(len(rows)), rows[:, 0]])


def counts(labels: np.ndarray, old: np.ndarray, new: np.ndarray) -> dict[str, int]:
    """How many objects there are, how many boxes each side shows, and how many of those are such an object. A box on
    an object that does not count is not counted either."""
    real, beside = truth_of(labels), truth_of(labels, ignored=True)
    found = {"n_truth": len(real)}
    for name, shown in (("before", old), ("after", new)):
        right, where, _ = pairs(real, shown, SAME)
        spared = len(pairs(beside, np.delete(shown, where, 0), SAME)[0])
        found |= {f"n_{name}": len(shown) - spared, f"right_{name}": len(right)}
    return found


def alone(old: np.ndarray, new: np.ndarray) -> dict[str, list[int]]:
    """Classes of the boxes (K, 6) that only the original shows, and of those that only the winner shows."""
    i, j, _ = pairs(old, new, SAME)
    kinds: list[np.ndarray] = [np.delete(rows[:, 5], at).astype(int) for rows, at in ((old, i), (new, j))]
    return {"gone": sorted(kinds[0].tolist()), "new": sorted(kinds[1].tolist())}


def content_of(split: Any, row: int, how: Preprocess | None) -> tuple[int, int, int, int] | None:
    """Where the image lies in the input, where it was filled up with grey; None where all of it is image."""
    sizes = getattr(split.images, "sizes", None)
    if how is None or how.mode != "letterbox" or sizes is None:
        return None
    width, height = (int(v) for v in sizes[split.rows[row]])
    (across, down), (left, top) = scaled(width, height, how), offset(width, height, how)
    return left, top, left + across, top + down


def strip(
    image: Image.Image,
    found: Sequence[np.ndarray],
    names: Sequence[str],
    crop: tuple[int, int, int, int] | None = None,
) -> Image.Image:
    """One panel for each of `found` (K, 6), side by side: `image` with those boxes and names on it, `PANEL` pixels
    wide. `crop` is the part of the image that is shown, in its pixels."""
    left, top, right, bottom = crop or (0, 0, *image.size)
    part = image.crop((left, top, right, bottom)).convert("RGB")
    high = min(max(1, round(PANEL * part.height / part.width)), round(TALLEST * PANEL))
    scale = np.array([PANEL / part.width, high / part.height] * 2)
    part = part.resize((PANEL, high), Image.Resampling.BICUBIC)
    whole = Image.new("RGB", (len(found) * (PANEL + GAP) - GAP, high), (128, 128, 128))
    for k, rows in enumerate(found):
        placed = np.array(rows, np.float64).reshape(-1, 6)
        placed[:, :4] = clipped((placed[:, :4] - [left, top, left, top]) * scale, PANEL, high)
        whole.paste(draw(part, placed, names), (k * (PANEL + GAP), 0))
    return whole


def _spelled(en: Sequence[str], zh: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Key of the entry and the class names that this machine's fonts can write, for English and, where they are others
    and there is a font, for Chinese. Without any font for the former, classes are their numbers."""
    yield "thumbnail", short_names(en) if _writable(en) else [str(k) for k in range(len(en))]
    if tuple(zh) != tuple(en) and _writable(zh):
        yield "thumbnail_zh", short_names(zh)


def short_names(names: Sequence[str]) -> list[str]:
    """Names that leave something of a panel to see, `LONGEST` letters wide; cut ones that would be the same get their
    number."""
    cut = [_cut(name, LONGEST) for name in names]
    alike = {c for c, n in Counter(cut).items() if n > 1}
    return [f"{_cut(n, LONGEST - 4)} #{k}" if c in alike and c != n else c for k, (n, c) in enumerate(zip(names, cut))]


def _cut(name: str, wide: int) -> str:
    """`name`, or as much of its start as is `wide` letters with two dots behind; Chinese signs are two letters wide."""

    def width(text: str) -> int:
        return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)

    if width(name) <= wide:
        return name
    kept = next(k for k in range(len(name), -1, -1) if width(name[:k]) <= wide - 2)
    return name[:kept].rstrip() + ".."


def _writable(names: Sequence[str]) -> bool:
    try:
        font_for("".join(names) + "0123456789%", 12)
    except BadConfig:
        return False
    return True


def _jpeg(image: Image.Image) -> bytes:
    """JPEG with whole colours, so that letters stay sharp, in `STRIP_BYTES` where any quality allows it."""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= STRIP_BYTES:
            break
    return buffer.getvalue()
