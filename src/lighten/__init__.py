"""From a trained vision model and a budget to verified files that run on the device.

Importing this package loads neither torch nor any runtime; names are resolved when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lighten.data import load as load_data
    from lighten.models.saved import load, save
    from lighten.types import Budget, Data, Precision, Preprocess, Recipe, Result
    from lighten.walk import Settings, compress

__version__ = "0.1.0"

_HOMES = {
    "compress": "lighten.walk",
    "Settings": "lighten.walk",
    "load_data": "lighten.data",
    "load": "lighten.models.saved",
    "save": "lighten.models.saved",
    **dict.fromkeys(("Budget", "Data", "Precision", "Preprocess", "Recipe", "Result"), "lighten.types"),
}
__all__ = [
    "Budget",
    "Data",
    "Precision",
    "Preprocess",
    "Recipe",
    "Result",
    "Settings",
    "compress",
    "load",
    "load_data",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lighten' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), "load" if name == "load_data" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
