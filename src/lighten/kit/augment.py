"""Training augmentation on whole batches, on the device that trains: one gather for crop and flip."""

from __future__ import annotations

import torch
from torch import Tensor

from lighten.types import Preprocess


def to_input(pixels: Tensor, how: Preprocess | None) -> Tensor:
    """uint8 (N, H, W, C) to normalised float32 (N, C, H, W), as `data.preprocess.normalize` does; floats pass."""
    if pixels.dtype != torch.uint8 or how is None:
        return pixels.float()
    mean, std = (torch.tensor(v, device=pixels.device) for v in (how.mean, how.std))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def views(
    pixels: Tensor, labels: Tensor, shift: float, flip: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each image as it is seen this time, and its labels: boxes (N, M, 6) go where their objects go."""
    if labels.ndim == 3 and pixels.dtype == torch.uint8:
        return with_boxes(pixels, labels, shift, flip, generator)
    return crop_and_flip(pixels, shift, flip, generator), labels


def crop_and_flip(pixels: Tensor, shift: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `shift` of its size (edges mirrored) and, half of the time, mirrored.

    `pixels` is (N, H, W, C); ready inputs (N, C, H, W), which are float, are returned unchanged.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    n, height, width, _ = pixels.shape
    ys = _moved(n, height, shift, generator)
    xs = _moved(n, width, shift, generator)
    if flip:
        turned = torch.rand(n, 1, generator=generator) < 0.5
        xs = torch.where(turned, xs.flip(1), xs)
    ys, xs = ys.to(pixels.device), xs.to(pixels.device)
    rows = torch.arange(n, device=pixels.device)[:, None, None]
    return pixels[rows, ys[:, :, None], xs[:, None, :]]


def _moved(n: int, length: int, shift: float, generator: torch.Generator) -> Tensor:
    reach = int(length * shift)
    by = torch.randint(-reach, reach + 1, (n, 1), generator=generator)
    at = (torch.arange(length)[None] + by).abs()
    return torch.where(at >= length, 2 * (length - 1) - at, at)


ZOOM, GREY = 1.3, 114
"""Objects become up to so much larger or smaller; what lies outside the image is grey, as in a letterbox."""
LEAST_SEEN = 0.25
"""A box of which less is left in the image is neither right nor wrong to find."""


def with_boxes(
    pixels: Tensor, labels: Tensor, shift: float, flip: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each image zoomed, moved by up to `shift` of its size and, half of the time, mirrored, and its boxes with it.

    `pixels` uint8 (N, H, W, C), `labels` (N, M, 6): class (-1: no box), x1, y1, x2, y2 in pixels, ignore. What is uncovered
    is grey: mirrored edges would show objects that have no box. Boxes are cut to the image.
    """
    n, height, width, _ = pixels.shape
    zoom = ZOOM ** (2 * torch.rand(n, 1, generator=generator) - 1) if shift else torch.ones(n, 1)
    turned = torch.rand(n, 1, generator=generator) < (0.5 if flip else 0.0)
    left, top = (
        (1 - zoom) * size / 2 + size * shift * (2 * torch.rand(n, 1, generator=generator) - 1)
        for size in (width, height)
    )
    xs, ys = ((torch.arange(size)[None] + 0.5 - start) / zoom for size, start in ((width, left), (height, top)))
    xs = torch.where(turned, xs.flip(1), xs)
    seen = ((ys >= 0) & (ys < height))[:, :, None] & ((xs >= 0) & (xs < width))[:, None]
    rows = torch.arange(n, device=pixels.device)[:, None, None]
    y, x = (v.floor().long().clamp(0, size - 1).to(pixels.device) for v, size in ((ys, height), (xs, width)))
    moved = pixels[rows, y[:, :, None], x[:, None]]
    moved = torch.where(
        seen[..., None].to(pixels.device), moved, torch.tensor(GREY, dtype=pixels.dtype, device=pixels.device)
    )
    return moved, _boxes_moved(labels, zoom, left, top, turned, width, height)


def _boxes_moved(
    labels: Tensor, zoom: Tensor, left: Tensor, top: Tensor, turned: Tensor, width: int, height: int
) -> Tensor:
    zoom, left, top, turned = (v.to(labels.device) for v in (zoom, left, top, turned))
    x1, x2 = (labels[..., k] * zoom + left for k in (1, 3))
    y1, y2 = (labels[..., k] * zoom + top for k in (2, 4))
    x1, x2 = torch.where(turned, width - x2, x1), torch.where(turned, width - x1, x2)
    whole = (x2 - x1) * (y2 - y1)
    x1, x2, y1, y2 = x1.clamp(0, width), x2.clamp(0, width), y1.clamp(0, height), y2.clamp(0, height)
    left_over = (x2 - x1) * (y2 - y1)
    kind = torch.where((labels[..., 0] >= 0) & (left_over > 0), labels[..., 0], -torch.ones_like(x1))
    ignored = torch.where(left_over < LEAST_SEEN * whole, torch.ones_like(x1), labels[..., 5])
    return torch.stack([kind, x1, y1, x2, y2, ignored], -1)


def cut_out(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """A square of `size` of the width set to zero at a random place (DeVries & Taylor, 2017, "Cutout")."""
    n, _, height, width = x.shape
    side = max(1, int(width * size))
    cy = torch.randint(0, height, (n, 1), generator=generator).to(x.device)
    cx = torch.randint(0, width, (n, 1), generator=generator).to(x.device)
    ys = torch.arange(height, device=x.device)[None] - cy + side // 2
    xs = torch.arange(width, device=x.device)[None] - cx + side // 2
    inside_y, inside_x = (ys >= 0) & (ys < side), (xs >= 0) & (xs < side)
    return x.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
