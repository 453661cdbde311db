"""Batch norms whose running statistics are measured anew, on the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lighten.errors import BadData


def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Running mean and variance of every batch norm become the plain average over `batches` (N, C, H, W).

    In place; weights stay. Only batch norms run in training mode, so dropout and its like are off; the model ends in
    eval mode. As in torch, the variance of each batch is the unbiased one. Raises BadData without batches, or where a
    batch norm sees a single value a channel, which has no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    model.eval()
    seen = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's name for the cumulative average
            norm.train()
        with torch.no_grad():
            for batch in batches:
                model(batch)
                seen += 1
    except ValueError as e:
        raise BadData(f"Batch norms cannot be re-estimated: {e}", "Give batches of two images or more.") from e
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        model.eval()
    if norms and not seen:
        raise BadData("Batch norms cannot be re-estimated without images.", "Give some calibration images.")
