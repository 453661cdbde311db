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
