"""Unfinished state of long work on disk: written whole, and taken up again only where it belongs to the same work."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from lighten.data.cache import write_whole


def save(path: Path, mark: str, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that a reader sees all of it or the state before."""
    buffer = io.BytesIO()
    torch.save({"mark": mark, "state": state}, buffer)
    write_whole(path, buffer.getvalue())


def load(path: Path, mark: str) -> dict[str, Any] | None:
    """What was saved under the same mark; None where there is nothing, or the state of other work."""
    if not path.exists():
        return None
    kept = torch.load(path, map_location="cpu", weights_only=True)
    return dict(kept["state"]) if kept.get("mark") == mark else None
