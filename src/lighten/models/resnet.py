"""ResNet for 32x32 images (He et al., 2016, "Deep Residual Learning for Image Recognition", section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        changed = stride != 1 or c_in != c_out
        self.shortcut: nn.Module = nn.Identity()
        if changed:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of `depth` blocks with 16, 32 and 64 channels, mean over the image, one linear layer."""

    def __init__(self, depth: int, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks, width = [], 16
        for stage, out in enumerate((16, 32, 64)):
            for k in range(depth):
                blocks.append(Block(width, out, 2 if stage and k == 0 else 1))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float32 to logits (N, num_classes)."""
        y = self.blocks(self.stem(x))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))


def resnet20(num_classes: int = 10, channels: int = 3) -> ResNet:
    """0.27 million parameters."""
    return ResNet(3, num_classes, channels)


def resnet56(num_classes: int = 10, channels: int = 3) -> ResNet:
    """0.86 million parameters."""
    return ResNet(9, num_classes, channels)
