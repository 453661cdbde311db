"""A small detector of our own: one stage, no anchors, trained from scratch in hours, made to be narrowed and quantized.

What it takes from whom: the residual backbone of He et al. (2016), the top-down and bottom-up neck of Liu et al. (2018,
"Path Aggregation Network"), separate towers for boxes and classes (Ge et al., 2021, "YOLOX"), distances as
distributions (Li et al., 2020, "Generalized Focal Loss"). What is chosen for integers and for narrowing:

- Plain convolutions, batch norm, ReLU. A ReLU is folded into the convolution before it by every integer kernel, and its
  whole range is used. SiLU (YOLO's) is a table between two roundings and spends a part of the range on its negative
  tail; ReLU6 puts a clip where weight equalization wants to scale. Depthwise convolutions, with few products a channel,
  suffer most from rounding and are slow where integer kernels are meant to be fast.
- Each level has towers of its own. A tower shared by all levels would put maps of different ranges through one set of
  batch-norm statistics, and could not be narrowed where one level is worth less than the others.
- A distance is the mean of a distribution over `bins` whole steps. Its logits are bounded and rounded many times over,
  so that errors average out; no exponential stretches an error of the last layer as a log size would.
- Maps are joined by sums, so that no concatenation forces two ranges into one scale before the last layers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lighten.errors import BadModel
from lighten.heads import Head, Level

STRIDES = (8, 16, 32)
PRIOR = 0.01
"""Score of every class before training, so that the first steps are not spent on the background (Lin et al., 2017)."""
DECAY = 0.35
"""How much less each farther bin weighs before training: boxes begin about four steps wide, as RetinaNet's anchors."""


class Layer(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Block(nn.Module):
    """Two 3x3 convolutions around which the input passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = Layer(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + x)


class Neck(nn.Module):
    """Maps of `inputs` channels, each half the size of the one before, to as many of `width`, each knowing the others."""

    def __init__(self, inputs: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(Layer(k, width, 1) for k in inputs)
        self.merge = nn.ModuleList(Layer(width, width) for _ in inputs[1:])
        self.down = nn.ModuleList(Layer(width, width, 3, 2) for _ in inputs[1:])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        found = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for k in reversed(range(len(self.merge))):
            found[k] = self.merge[k](found[k] + interpolate(found[k + 1], scale_factor=2.0, mode="nearest"))
        for k, down in enumerate(self.down):
            found[k + 1] = found[k + 1] + down(found[k])
        return found


class Towers(nn.Module):
    """The head of one level: `depth` convolutions and a 1x1 one for boxes, and as many for classes."""

    def __init__(self, inputs: int, width: int, depth: int, numbers: int, classes: int) -> None:
        super().__init__()
        widths = [inputs, *[width] * depth]
        self.box_tower = nn.Sequential(*(Layer(a, b) for a, b in pairwise(widths)))
        self.score_tower = nn.Sequential(*(Layer(a, b) for a, b in pairwise(widths)))
        self.box = nn.Conv2d(width, numbers, 1)
        self.score = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, numbers + classes, H, W)"""
        return torch.cat([self.box(self.box_tower(x)), self.score(self.score_tower(x))], 1)


class NanoDetector(nn.Module):
    """Raw outputs (N, places, 4 * bins + classes) of images (N, C, H, W); `head` says what they mean.

    `widths` are the channels of the stem (2 pixels a step) and of the stages of 4, 8, 16 and 32 pixels a step, `depths`
    the residual blocks of the stages. Height and width of the input are multiples of 32.
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        widths: tuple[int, int, int, int, int] = (16, 32, 64, 128, 160),
        depths: tuple[int, int, int, int] = (1, 2, 2, 1),
        neck: int = 64,
        towers: int = 2,
        bins: int = 8,
    ) -> None:
        super().__init__()
        self.num_classes, self.bins = num_classes, bins
        self.stem = Layer(channels, widths[0], 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(Layer(a, b, 3, 2), *(Block(b) for _ in range(depth)))
            for a, b, depth in zip(widths, widths[1:], depths)
        )
        self.neck = Neck(widths[2:], neck)
        self.heads = nn.ModuleList(Towers(neck, neck, towers, 4 * bins, num_classes) for _ in STRIDES)
        self._start()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        found = [head(x) for head, x in zip(self.heads, self.neck(maps[1:]))]
        return torch.cat([y.permute(0, 2, 3, 1).flatten(1, 2) for y in found], 1)

    def head(self, input_shape: tuple[int, int, int]) -> Head:
        """What the raw outputs of inputs (C, H, W) mean. Raises BadModel where a side is no multiple of 32."""
        _, height, width = input_shape
        if height < 32 or width < 32 or height % 32 or width % 32:
            raise BadModel(
                f"nano_detector cannot take inputs of {width}x{height} pixels.",
                f"Choose multiples of 32, as {max(32, round(width / 32) * 32)}x{max(32, round(height / 32) * 32)}.",
            )
        levels = tuple(Level(height // s, width // s, (float(s), float(s))) for s in STRIDES)
        return Head(levels, self.num_classes, "distribution", bins=self.bins)

    def head_layers(self) -> tuple[str, ...]:
        """The last layer of each branch: what it gives is the answer."""
        return tuple(f"heads.{k}.{branch}" for branch in ("box", "score") for k in range(len(STRIDES)))

    @torch.no_grad()
    def _start(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        slope = -DECAY * torch.arange(self.bins, dtype=torch.float32)
        for head in self.heads:
            for last in (head.box, head.score):
                nn.init.normal_(last.weight, std=0.01)
            head.box.bias.copy_(slope.repeat(4))
            nn.init.constant_(head.score.bias, -math.log((1 - PRIOR) / PRIOR))


def nano_detector(num_classes: int = 10, channels: int = 3) -> NanoDetector:
    """2.1 million parameters, 0.42 billion products for an image of 192 x 192."""
    return NanoDetector(num_classes, channels)
