"""From a module to an exported program, with errors a user can act on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lighten.errors import BadModel


def example_input(shape: tuple[int, ...], batch: int = 2, seed: int = 0) -> Tensor:
    """Random input of one batch. Two images or more: a batch of one would be baked into the graph."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def trace(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """`torch.export` with a dynamic batch; a GraphModule is traced the same way.

    Raises BadModel where the graph cannot be captured, or wants one fixed batch size.
    """
    batch = torch.export.Dim("batch", min=1, max=65536)
    try:
        with torch.no_grad():
            return torch.export.export(model, (example_input(shape),), dynamic_shapes=({0: batch},), strict=False)
    except Exception as e:
        raise BadModel(
            f"The graph of the model cannot be captured with input (batch, {', '.join(map(str, shape))}): {_first_line(e)}",
            "Look for Python branches on tensor values, for .item(), and for a wrong --input-size.",
        ) from e


def check_output(model: nn.Module, shape: tuple[int, ...], classes: int | None) -> int:
    """How many classes the model answers. Raises BadModel naming shapes where it takes or gives something else."""
    try:
        with torch.inference_mode():
            out = copy.deepcopy(model).eval()(example_input(shape))
    except Exception as e:
        raise BadModel(
            f"The model does not take an input of shape (2, {', '.join(map(str, shape))}): {_first_line(e)}",
            "Check --input-size and the number of channels.",
        ) from e
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 2:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise BadModel(
            f"A classifier answers one row of scores an image; this model gives {got}.",
            "Wrap it so that it returns (batch, classes).",
        )
    if not torch.isfinite(out).all():
        raise BadModel(
            "The model answers NaN or infinity for a random image.",
            "Check the weights and the preprocessing.",
        )
    if classes is not None and out.shape[1] != classes:
        raise BadModel(
            f"The model answers {out.shape[1]} classes, the data has {classes}.",
            "Check --classes and the class folders.",
        )
    return int(out.shape[1])


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {(lines or ['no message'])[0][:300]}"
