"""The report images: read once, by the original and the winner, and small pictures of the answers that changed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lighten import workshop
from lighten.data.cache import write_whole
from lighten.ledger import Ledger
from lighten.plugins import task_of
from lighten.trials import Run
from lighten.types import Final, Trial

FLIPS_SHOWN = 24


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
    task, labels = task_of(job), split.labels
    final = Final(
        task.score(before, labels),
        task.score(after, labels),
        task.drop(before, after, labels),
        len(task.flipped(before, after)),
        task.per_class(before, after, labels, job.data.classes),
        task.extra(after, labels),
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, before=before, after=after)
    write_whole(file, buffer.getvalue())
    book.append("final", {"winner": winner.id, "final": final})
    return final, before, after


def thumbnails(folder: Path, split: Any, before: np.ndarray, after: np.ndarray) -> tuple[dict[str, Any], ...]:
    """Small pictures of report images whose answer changed, with all three answers."""
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
            write_whole(folder / "flips" / f"{k}.png", _png(pixels))
        shown.append(entry)
    return tuple(shown)


def _png(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((128, 128))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
