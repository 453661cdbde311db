"""TorchScript: one file for LibTorch and for the lite interpreter, the same bytes each time, refused when it is not one."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchao")

import torch

from lighten.errors import BadBundle
from lighten.formats import torchscript
from lighten.types import Device, Precision
from nets import SHAPE, images, net


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, here: Device) -> Path:
    path = tmp_path_factory.mktemp("torchscript") / "model.ptl"
    assert torchscript.export(net("small"), SHAPE, path, Precision(), here) == ()
    return path


def test_the_lite_interpreter_of_phones_takes_the_same_file(file: Path) -> None:
    from torch.jit.mobile import _load_for_lite_interpreter

    x = images(5)[0]
    with torch.no_grad():
        want = net("small")(x)
    torch.testing.assert_close(_load_for_lite_interpreter(str(file))(x), want, rtol=0, atol=1e-4)


def test_a_second_trace_in_one_process_is_the_same_file(file: Path, tmp_path: Path, here: Device) -> None:
    torchscript.export(net("small"), SHAPE, tmp_path / "other.ptl", Precision(), here)
    assert (tmp_path / "other.ptl").read_bytes() == file.read_bytes()


def test_halves_are_stored_and_floats_computed(tmp_path: Path, here: Device) -> None:
    path, x = tmp_path / "model.ptl", images(6)[0]
    torchscript.export(net("mobile"), SHAPE, path, Precision("float16", "float16"), here)
    assert {row.dtype for row in torchscript.weights(path)} == {"float16"}
    with torch.no_grad():
        want = net("mobile")(x).numpy()
    np.testing.assert_allclose(torchscript.load(path, 1)(x.numpy()), want, rtol=0, atol=2e-2)


def test_integers_are_refused_and_strange_operators_named(here: Device) -> None:
    assert "TorchScript" in str(torchscript.refuses(Precision("int8", "int8"), here))
    assert torchscript.lacks({"aten.conv2d.default": 3, "aten.sym_size.int": 1}, SHAPE) is None
    assert "mine.spline" in str(torchscript.lacks({"aten.relu.default": 1, "mine.spline.default": 2}, SHAPE))


@pytest.mark.parametrize("damage", ["a pickle instead", "a tensor's byte", "no code", "a name that leads out"])
def test_what_is_not_laid_out_like_one_never_reaches_torch(
    file: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, raw = tmp_path / "model.ptl", bytearray(file.read_bytes())
    if damage == "a tensor's byte":
        raw[len(raw) // 2] ^= 0xFF
        bad.write_bytes(raw)
    elif damage == "a pickle instead":
        torch.save({"weight": torch.zeros(3)}, bad)
    else:
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(bad, "w") as new:
            for name in old.namelist():
                if not (damage == "no code" and name.endswith("bytecode.pkl")):
                    new.writestr(name, old.read(name))
            if damage == "a name that leads out":
                new.writestr("archive/../../evil", b"")
    monkeypatch.setattr(torch.jit, "load", lambda *_a, **_k: pytest.fail("torch was given the file"))
    with pytest.raises(BadBundle, match=r"model\.ptl"):
        torchscript.load(bad, 1)
