"""AOTInductor: what is refused before a compiler is started, what the package holds, and that no damage reaches the loader."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchao")

import torch

from lighten.errors import BadBundle
from lighten.formats import aoti
from lighten.types import Device, Precision
from nets import SHAPE, calibration, images, net

INT8 = Precision("int8", "int8")
compiles = pytest.mark.skipif(aoti._compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def plan(here: Device) -> Any:
    from lighten.quant.plan import quantize

    return quantize(net("small"), SHAPE, calibration(), INT8, here).module


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, here: Device, plan: Any) -> Path:
    """The plan of the small network, compiled once (half a minute)."""
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    assert aoti.export(plan, SHAPE, path, INT8, here) == ()
    return path


def test_without_a_compiler_there_is_one_clear_reason(here: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_: None)
    assert "g++" in str(aoti.refuses(Precision(), here))


def test_other_processors_are_refused(here: Device) -> None:
    assert "processor" in str(aoti.refuses(Precision(), dataclasses.replace(here, arch="riscv64", name="board")))
    if here.features:
        assert "processor" in str(aoti.refuses(Precision(), dataclasses.replace(here, features=(), name="older")))


def test_what_has_no_kernel_is_refused(here: Device) -> None:
    for how in (Precision("float16", "float16"), Precision("int4", "int8"), Precision("int8", "float32")):
        assert "AOTInductor" in str(aoti.refuses(how, here))
    assert "mine.spline" in str(aoti.lacks({"mine.spline.default": 1}, SHAPE))


def test_unsigned_activations_compute_the_very_same(plan: Any) -> None:
    x = images(8)[0]
    with torch.no_grad():
        assert torch.equal(aoti._unsigned(plan)(x), plan(x))


@compiles
def test_integer_kernels_run_and_answer_like_the_plan(file: Path, plan: Any) -> None:
    x = images(32)[0]
    with torch.no_grad():
        want = plan(x).numpy()
    got = aoti.load(file, 1)(x.numpy())
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
    layers = sum(count for name, count in aoti._table_of(file)["kernels"].items() if name.startswith(aoti.INTEGER))
    assert layers == 7
    assert {r.dtype for r in aoti.weights(file) if np.prod(r.shape) >= 1000} == {"int8"}
    assert not any("conv" in line or "linear" in line for line in aoti.fallbacks(file))


@compiles
@pytest.mark.parametrize(
    "damage", ["a byte", "half", "empty", "missing", "another processor", "two libraries", "a bomb"]
)
def test_damage_never_reaches_the_loader(
    file: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor

    bad, raw = tmp_path / "model.pt2", bytearray(file.read_bytes())
    if damage == "a byte":
        raw[len(raw) // 2] ^= 0xFF
    if damage in ("another processor", "two libraries", "a bomb"):
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(bad, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(
                    name, data.replace(b"x86_64", b"mips64") if damage[0] == "a" and name.endswith("json") else data
                )
            if damage == "two libraries":
                new.writestr(f"model/{aoti.FOLDER}evil.so", b"\x7fELF")
            if damage == "a bomb":
                new.writestr(f"model/{aoti.FOLDER}zeros", bytes(1 << 28), zipfile.ZIP_DEFLATED)
    elif damage != "missing":
        bad.write_bytes({"a byte": bytes(raw), "half": bytes(raw[: len(raw) // 2]), "empty": b""}[damage])
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: pytest.fail("the loader was given the file"))
    with pytest.raises(BadBundle, match=r"model\.pt2"):
        aoti.load(bad, 1)
