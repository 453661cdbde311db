"""The append-only record of a run: one JSON line a fact, synced at once; reading it back resumes the run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lighten.data.cache import room_to_write
from lighten.errors import BadBundle, RunLocked
from lighten.types import Final, LayerCost, Recipe, Trial, WidthCost, from_json, to_json

NAME = "ledger.jsonl"


@dataclass(frozen=True)
class Ledger:
    """What a run folder's ledger holds. `fingerprint` names the question; trials answer it.

    `planned` are recipes that were decided on, so that a resumed run does not decide anew with less time left.
    """

    path: Path
    fingerprint: str
    trials: tuple[Trial, ...] = ()
    final: tuple[str, Final] | None = None
    costs: tuple[LayerCost, ...] = ()
    widths: tuple[WidthCost, ...] = ()
    planned: tuple[Recipe, ...] = ()

    def append(self, kind: str, value: Any) -> Ledger:
        """The ledger with one more line, which is on disk when this returns."""
        line = json.dumps({"kind": kind, "value": to_json(value)}, ensure_ascii=False, allow_nan=False) + "\n"
        with room_to_write(self.path), self.path.open("ab") as out:
            out.write(line.encode())
            out.flush()
            os.fsync(out.fileno())
        return self.holding(json.loads(line))

    def holding(self, row: dict[str, Any]) -> Ledger:
        """The ledger after one line; lines of kinds that this version does not know are passed over."""
        kind, value = row["kind"], row["value"]
        match kind:
            case "run":
                return replace(self, fingerprint=value["fingerprint"])
            case "trial":
                trial = from_json(Trial, value)
                return replace(self, trials=tuple({**{t.id: t for t in self.trials}, trial.id: trial}.values()))
            case "cost":
                return replace(self, costs=(*self.costs, from_json(LayerCost, value)))
            case "width":
                return replace(self, widths=(*self.widths, from_json(WidthCost, value)))
            case "planned":
                return replace(self, planned=(*self.planned, from_json(Recipe, value)))
            case "final":
                return replace(self, final=(value["winner"], from_json(Final, value["final"])))
        return self


def open_ledger(folder: Path, fingerprint: str) -> Ledger:
    """The ledger of `folder`, new or continued. Raises BadBundle where it answers another question."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    if not path.exists() or not path.read_bytes().endswith(b"\n"):
        _mend(path)
    if not path.exists() or not path.stat().st_size:
        return Ledger(path, fingerprint).append("run", {"fingerprint": fingerprint})
    return read(path, fingerprint)


def read(path: Path, fingerprint: str | None = None) -> Ledger:
    """Every whole line of a ledger. Raises BadBundle naming a damaged line, or a fingerprint that differs."""
    book = Ledger(path, "")
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            book = book.holding(json.loads(line))
        except (ValueError, KeyError, TypeError) as e:
            raise BadBundle(f"{path}, line {number} is damaged ({e}).", "Start afresh with --fresh.") from e
    if fingerprint is not None and book.fingerprint != fingerprint:
        raise BadBundle(
            f"{path.parent} holds a run of another model, data, budget or device.",
            "Give another --name, or --fresh to throw that run away.",
        )
    return book


def _mend(path: Path) -> None:
    """Cut off a last line that a crash left half-written."""
    if not path.exists():
        return
    whole = path.read_bytes()
    with path.open("r+b") as f:
        f.truncate(whole.rfind(b"\n") + 1)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process; the system lets go of it even after kill -9. Raises RunLocked."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise RunLocked(f"Another lighten works in {folder}.", "Wait for it, or give another --name.") from e
        yield
