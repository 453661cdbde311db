"""Finds plug-ins by file name, imports one when it is asked for, and explains a missing backend."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lighten.errors import MissingBackend, UnknownName

KINDS = ("methods", "formats", "tasks")
_HOUSE = Path(__file__).parent


@cache
def names(kind: str) -> tuple[str, ...]:
    """The plug-ins of one kind, in alphabetical order. Nothing is imported."""
    return tuple(sorted(f.stem for f in (_HOUSE / kind).glob("*.py") if not f.stem.startswith("_")))


def get(kind: str, name: str, *, needs: str | None = None) -> ModuleType:
    """The plug-in module. `needs` names its list of packages that must be installed: "REQUIRES" to build with it,
    "RUNS_ON" to run its files.

    Raises UnknownName (with the nearest names) or MissingBackend (with the extra to install).
    """
    if name not in names(kind):
        raise UnknownName(kind.rstrip("s"), name, names(kind))
    module = importlib.import_module(f"lighten.{kind}.{name}")
    if needs and (missing := missing_backends(module, needs)):
        raise MissingBackend(f"{missing[0]} (needed by {name})", getattr(module, "EXTRA", "compress"))
    return module


def task_of(job: Any) -> Any:
    """The task of a Job or a Result, bound to its detector's head and the size of its input where it has a head.

    Raises as `get` does."""
    module = get("tasks", job.task)
    if job.head is None:
        return module
    how = job.preprocess
    return module.bind(job.head, (how.width, how.height) if how else None)


def missing_backends(module: ModuleType, needs: str = "REQUIRES") -> tuple[str, ...]:
    """Packages in the module's list `needs` that are not installed; found without importing them."""
    return tuple(p for p in getattr(module, needs, ()) if importlib.util.find_spec(p) is None)


def require(package: str, extra: str, why: str) -> ModuleType:
    """Import an optional package where it is used, or say in one line how to get it."""
    if importlib.util.find_spec(package.split(".")[0]) is None:
        raise MissingBackend(f"{package} (needed to {why})", extra)
    return importlib.import_module(package)
