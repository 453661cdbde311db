"""Every device: its file loads, its formats exist; this machine gets the kernels that its processor has."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from lighten import devices, plugins
from lighten.errors import BadConfig, UnknownName
from lighten.machine import Machine
from lighten.types import Device

FOLDER = Path(devices.__file__).parent
VNNI = Machine("x86_64", "a new one", ("avx2", "avx512_vnni", "avx512f"), 8, 32_000)
CLIENT_VNNI = Machine("x86_64", "a client one", ("avx2", "avx_vnni"), 4, 8_000)
AMX = Machine("x86_64", "a server", ("amx_int8", "avx2"), 64, 256_000)
OLD = Machine("x86_64", "an old one", ("avx2", "fma"), 4, 8_000)
ARM = Machine("aarch64", "a Cortex", ("asimd", "asimddp"), 4, 4_000)


def test_every_toml_is_a_device() -> None:
    assert set(devices.names()) == {f.stem for f in FOLDER.glob("*.toml")}
    assert "this-machine" in devices.names()


@pytest.mark.parametrize("name", devices.names())
def test_a_device_loads_and_makes_sense(name: str) -> None:
    device = devices.load(name)
    assert device.name == name
    assert device.title
    assert any("\u4e00" <= c <= "\u9fff" for c in device.title_zh)
    assert device.formats
    assert len(set(device.formats)) == len(device.formats)
    assert {*device.formats, *device.also} <= set(plugins.names("formats"))
    assert not set(device.formats) & set(device.also)
    assert device.arch in ("x86_64", "aarch64")
    assert device.activations in ("uint8", "int8")
    assert device.threads >= 1
    assert device.memory_mb >= 64
    assert device.channel_multiple in (1, 2, 4, 8, 16, 32)
    assert device.kernels
    hash(device)


@pytest.mark.parametrize("name", devices.names())
def test_a_device_can_have_every_format_it_names(name: str) -> None:
    from lighten.types import Precision

    device = devices.load(name)
    for format in device.formats:
        assert plugins.get("formats", format).refuses(Precision(), device) is None


@pytest.mark.parametrize("name", devices.names())
def test_types_in_the_file_are_those_of_the_profile(name: str) -> None:
    kinds = {"str": str, "bool": bool, "int": int, "tuple[str, ...]": list}
    wanted = {f.name: kinds[str(f.type)] for f in dataclasses.fields(Device)}
    for key, value in tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8")).items():
        assert type(value) is wanted[key], key


def test_unknown_name_suggests_the_near_ones() -> None:
    with pytest.raises(UnknownName) as e:
        devices.load("raspberypi4")
    assert "raspberry-pi-4" in e.value.to_do
    with pytest.raises(UnknownName) as e:
        devices.load("toaster")
    assert all(name in e.value.to_do for name in devices.names())


@pytest.mark.parametrize("name", ["../errors", "", "/etc/passwd"])
def test_a_path_is_no_device(name: str) -> None:
    with pytest.raises(UnknownName):
        devices.load(name)


@pytest.mark.parametrize(
    "machine, activations, reduce_range",
    [(VNNI, "uint8", False), (CLIENT_VNNI, "uint8", False), (AMX, "uint8", False), (OLD, "uint8", True), (ARM, "int8", False)],
)  # fmt: skip
def test_this_machine_gets_the_kernels_of_its_processor(machine: Machine, activations: str, reduce_range: bool) -> None:
    device = devices.load("this-machine", machine)
    assert (device.activations, device.reduce_range) == (activations, reduce_range)
    assert (device.arch, device.threads, device.memory_mb) == (machine.arch, machine.threads, machine.memory_mb)
    assert device.features == machine.features
    assert not device.symmetric_activations


def test_other_devices_do_not_hang_on_this_machine() -> None:
    for name in devices.names():
        if name != "this-machine":
            assert devices.load(name, OLD) == devices.load(name, ARM)


def test_known_processors_agree_with_their_own_files() -> None:
    """The file for x86 without VNNI says what such a machine says of itself, and so on."""
    for name, machine in (("x86-vnni", VNNI), ("x86-avx2", OLD), ("raspberry-pi-5", ARM)):
        device, found = devices.load(name), devices.load("this-machine", machine)
        for key in ("arch", "activations", "reduce_range", "symmetric_activations"):
            assert getattr(device, key) == getattr(found, key), (name, key)


def test_unknown_key_of_a_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text('title = "a"\ntitle_zh = "甲"\nformats = ["onnx"]\nthread = 4\n', "utf-8")
    monkeypatch.setattr(devices, "_FOLDER", tmp_path)
    devices.names.cache_clear()
    try:
        with pytest.raises(BadConfig, match=r"mine\.toml.*'thread'") as e:
            devices.load("mine")
        assert "threads" in e.value.to_do
    finally:
        monkeypatch.undo()
        devices.names.cache_clear()


@pytest.mark.parametrize("text", ["title = ", 'title = "a"\n'])
def test_a_damaged_or_incomplete_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "mine.toml").write_text(text, "utf-8")
    monkeypatch.setattr(devices, "_FOLDER", tmp_path)
    devices.names.cache_clear()
    try:
        with pytest.raises(BadConfig, match=r"mine\.toml"):
            devices.load("mine")
    finally:
        monkeypatch.undo()
        devices.names.cache_clear()
