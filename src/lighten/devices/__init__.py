"""One TOML per device; `this-machine` reads the processor's own features."""

from __future__ import annotations

import dataclasses
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from lighten.errors import BadConfig, UnknownName
from lighten.machine import Machine, this_machine
from lighten.types import Device

_FOLDER = Path(__file__).parent


@cache
def names() -> tuple[str, ...]:
    """Every known device, in alphabetical order."""
    return tuple(sorted(f.stem for f in _FOLDER.glob("*.toml")))


def load(name: str, machine: Machine | None = None) -> Device:
    """The device's profile. Raises UnknownName with the nearest names, BadConfig naming a wrong key of its file."""
    if name not in names():
        raise UnknownName("device", name, names())
    try:
        values = tomllib.loads((_FOLDER / f"{name}.toml").read_text("utf-8"))
    except ValueError as e:
        raise BadConfig(f"devices/{name}.toml: {e}.", "Mend the file.") from e
    device = _profile(name, values)
    return fit_to(device, machine or this_machine()) if name == "this-machine" else device


def fit_to(device: Device, machine: Machine) -> Device:
    """`device` with what the processor of `machine` has: the integer kernels follow from its instructions."""
    has_vnni = bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(machine.features))
    arm = machine.arch in ("aarch64", "arm64")
    return dataclasses.replace(
        device,
        arch=machine.arch,
        activations="int8" if arm else "uint8",
        reduce_range=not arm and not has_vnni,
        threads=machine.threads,
        memory_mb=machine.memory_mb,
        features=machine.features,
    )


def _profile(name: str, values: dict[str, Any]) -> Device:
    known = {f.name for f in dataclasses.fields(Device)}
    if unknown := set(values) - known:
        raise BadConfig(
            f"devices/{name}.toml: unknown key {sorted(unknown)[0]!r}.",
            f"Known keys: {', '.join(sorted(known))}",
        )
    if missing := {"title", "title_zh", "formats"} - set(values):
        raise BadConfig(f"devices/{name}.toml: {sorted(missing)[0]!r} is not given.", "Every device has these three.")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Device(name=name, **settings)
