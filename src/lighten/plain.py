"""Nested dataclasses to plain JSON data and back; standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


CALLBACKS = ("progress", "say")


def to_json(value: Any) -> Any:
    """Nested dataclasses as plain dicts, lists and scalars. NaN and infinity become None: JSON has neither."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name not in CALLBACKS}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_json(kind: type[T], value: Any) -> T:
    """The inverse of `to_json` for the type `kind`. Raises KeyError/TypeError/ValueError on data of another shape."""
    return typing.cast(T, _decode(kind, value))


def _decode(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        if len(args) == 2 and args[1] is ...:
            return tuple(_decode(args[0], v) for v in value)
        return tuple(_decode(a, v) for a, v in zip(args, value, strict=True))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise TypeError(f"wanted {getattr(hint, '__name__', hint)}, got {type(value).__name__}")
        hints = typing.get_type_hints(hint)
        return hint(**{k: _decode(hints[k], v) for k, v in value.items() if k in hints})  # type: ignore[operator]
    if hint is float:
        return math.nan if value is None else float(value)
    if isinstance(value, dict):
        return {k: _decode(args[1] if args else Any, v) for k, v in value.items()}
    if hint is Any and isinstance(value, list):
        return tuple(_decode(Any, v) for v in value)
    return value


def digest(value: Any) -> str:
    """sha256 of plain data in one canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
