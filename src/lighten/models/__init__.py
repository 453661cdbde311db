"""The demo models, by name: `--arch lighten:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def builders() -> dict[str, Callable[..., Any]]:
    """Every architecture of our own; torch is imported when one is asked for."""
    from lighten.models import nano_detector, resnet

    return {
        "nano_detector": nano_detector.nano_detector,
        "resnet20": resnet.resnet20,
        "resnet56": resnet.resnet56,
    }
