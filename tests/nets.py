"""Small networks and images that the tests share: random weights, real structure, answers that are sure of themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

SHAPE = (3, 16, 16)
CLASSES = 10

torch.set_num_threads(1)


class Small(nn.Module):
    """conv-bn-relu, residual add, max-pool, depthwise conv, ReLU6, concat, adaptive pool, linear: 52k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.left = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6())
        self.right = nn.Sequential(nn.Conv2d(64, 80, 3, 2, 1), nn.BatchNorm2d(80), nn.ReLU())
        self.skip = nn.Conv2d(64, 16, 1, 2)
        self.fc = nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.pool(self.relu(self.inner(y) + y))
        y = self.left(self.depthwise(y))
        y = torch.cat([self.right(y), self.skip(y)], 1)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))


class Mobile(nn.Module):
    """Hard-swish, squeeze-excite with a hard sigmoid, a residual, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.swish = nn.Hardswish()
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Hardswish())
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.swish(self.depthwise(x))
        y = self.project(y * self.squeeze(y)) + x
        return self.fc(self.head(y).mean((2, 3)))


NETS: dict[str, type[nn.Module]] = {"small": Small, "mobile": Mobile}


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` inputs (N, 3, 16, 16) and their classes: ten smooth colour patterns under noise."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(12345))
    patterns = nn.functional.interpolate(patterns, SHAPE[1:], mode="bilinear")
    dice = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=dice)
    return patterns[labels] + 0.3 * torch.randn(n, *SHAPE, generator=dice), labels


def net(name: str, seed: int = 0) -> nn.Module:
    """A network with lived-in batch norms and a last layer fitted in closed form, so that it answers with a margin."""
    torch.manual_seed(seed)
    model = NETS[name]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.1, 0.3)
    x, labels = images(256, seed=1)
    with torch.no_grad():
        if isinstance(model, Small):
            model.right[0].weight[:20] = 0  # type: ignore[index]  # filters that pruning would find
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None  # the mean of all batches
        for part in x.split(64):
            model(part)
        model.eval()
        _fit_last(model, x, labels)
    return model


def _fit_last(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    seen: list[Tensor] = []
    fc: nn.Linear = model.fc  # type: ignore[assignment]
    hook = fc.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0]))
    model(x)
    hook.remove()
    features = torch.cat([seen[0], torch.ones(len(x), 1)], 1).double()
    wanted = 6 * nn.functional.one_hot(labels, CLASSES).double() - 1
    ridge = features.T @ features + 0.1 * torch.eye(features.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(ridge, features.T @ wanted).float()
    fc.weight.copy_(solved[:-1].T)
    fc.bias.copy_(solved[-1])


@dataclass(frozen=True)
class Answers:
    """What torch says to some images."""

    x: np.ndarray
    outputs: np.ndarray


def torch_answers(model: nn.Module, n: int = 24, seed: int = 7) -> Answers:
    x, _ = images(n, seed)
    with torch.inference_mode():
        return Answers(x.numpy(), model(x).float().numpy())


def calibration(n: int = 64, batch: int = 32, seed: int = 3) -> list[Tensor]:
    return list(images(n, seed)[0].split(batch))
