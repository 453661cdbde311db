"""Every error a user can meet: what happened, what to do next, and the exit code of the process."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_PASS, EXIT_BUG, EXIT_INPUT, EXIT_BUDGET, EXIT_BACKEND, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130


class LightenError(Exception):
    """`what` happened (naming the file, key, layer or limit) and what `to_do` about it."""

    exit_code = EXIT_INPUT

    def __init__(self, what: str, to_do: str = "") -> None:
        super().__init__(f"{what}\n{to_do}" if to_do else what)
        self.what, self.to_do = what, to_do

    def __reduce__(self) -> tuple[type[LightenError], tuple[str, str]]:
        return type(self), (self.what, self.to_do)


class BadModel(LightenError):
    """Weights or an architecture that cannot be used."""


class UntrustedCode(BadModel):
    """The model can only be had by running code of the user's file."""


class BadData(LightenError):
    """A data set that cannot be used, or that the calibration doctor refuses."""


class BadImage(BadData):
    """One image that cannot be decoded, or is not safe to decode."""


class BadConfig(LightenError):
    """A setting, a YAML key or a budget that makes no sense."""


class BadBundle(LightenError):
    """A bundle or a run folder that is damaged, changed or incomplete."""


class UnknownName(LightenError):
    """A name that is not among the known ones; the nearest are suggested."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known[:40])}"
        super().__init__(f"There is no {kind} named {name!r}.", hint)

    def __reduce__(self) -> tuple[type[LightenError], tuple[str, str]]:
        return LightenError, (self.what, self.to_do)


class DiskFull(LightenError):
    """No room for what must be written."""


class RunLocked(LightenError):
    """Another process works in this run folder."""


class RefusedFormat(LightenError):
    """A format cannot hold this model; the reason says which part."""


class CrashedRuntime(LightenError):
    """The process that ran an artifact died or gave no answer."""

    exit_code = EXIT_BUG


class MissingBackend(LightenError):
    """A package that this task needs is not installed."""

    exit_code = EXIT_BACKEND

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed.", f"pip install 'lighten[{extra}]'")
        self.args_for_copy = (what, extra)

    def __reduce__(self) -> tuple[type[LightenError], tuple[str, str]]:
        return MissingBackend, self.args_for_copy


class MissingTool(LightenError):
    """A program that the emulation needs is not installed."""

    exit_code = EXIT_BACKEND


class BadTarget(LightenError):
    """A device that cannot be reached, does not let us in, or lacks what a bundle needs."""

    exit_code = EXIT_BACKEND
