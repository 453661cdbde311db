"""Running a torch module over a split."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lighten.types import Preprocess, Progress, silent


def outputs(
    model: Any, split: Any, how: Preprocess | None, *, batch: int = 128, progress: Progress = silent
) -> np.ndarray:
    """Raw outputs (N, classes) float32, in the split's order, on the device the model lives on."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts, done = [], 0
    with torch.inference_mode():
        for x in split.batches(how, batch):
            parts.append(model(torch.from_numpy(x).to(device)).float().cpu().numpy())
            done += len(x)
            progress("running the model", done, len(split))
    return np.concatenate(parts)
