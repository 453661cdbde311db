"""Networks that end their process, or cannot be sent to another one; importable, so that a worker finds them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Two convolutions and a linear layer for (3, 16, 16); the weights are the same each time."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(16 * 16, classes)
        dice = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=dice))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


class Deadly(Tiny):
    """Dies in the hands of the workshop (it copies the model first), the way that its flag file says."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = str(flag)

    def __deepcopy__(self, memo: dict) -> nn.Module:
        how = Path(self.flag).read_text() if Path(self.flag).exists() else ""
        if how == "exit":
            print("the last words of a library", file=sys.stderr, flush=True)
            os._exit(7)
        if how == "mid-message":  # half a line on every pipe that the child can write
            for fd in range(3, 30):
                try:
                    os.write(fd, b'{"kind": "trial", "tri')
                except OSError:
                    continue
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "full":
            from lighten.errors import DiskFull

            raise DiskFull("The disk is full.", "Free some space.")
        if how == "sleep":
            Path(self.flag + ".pid").write_text(str(os.getpid()))
            time.sleep(600)
        if how:
            os.kill(os.getpid(), getattr(signal, how))
        return Tiny().eval()


class Unsendable(Tiny):
    """Holds a lambda, as models of notebooks do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: 2 * x


class NotFound(Tiny):
    """Can be pickled here, but another process does not find it."""

    def __reduce__(self) -> tuple:
        return _only_here, (os.getpid(),)


def _only_here(pid: int) -> nn.Module:
    if pid != os.getpid():
        raise ImportError("No module named 'users_own'")
    return NotFound()
