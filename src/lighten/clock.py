"""The time that a run was given, and where it goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Clock:
    """The time that was given, from the call on, and where it went."""

    began: float
    limit_s: float | None
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def left_s(self) -> float | None:
        return None if self.limit_s is None else self.limit_s - (time.monotonic() - self.began)

    def share(self, part: float) -> Callable[[], bool]:
        """Whether this share of what is left now is spent; never, where the time is not limited."""
        until = None if self.left_s is None else time.monotonic() + part * self.left_s
        return lambda: until is not None and time.monotonic() > until

    @property
    def is_up(self) -> bool:
        return self.left_s is not None and self.left_s <= 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to the part `name` of the walk."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - began
