"""Core ML: no runtime here, so the file's own contents are held against the network's: names, shapes, operators, values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")
pytest.importorskip("torchao")

import torch

from lighten.errors import BadBundle, LightenError, RefusedFormat
from lighten.formats import coreml
from lighten.types import Device, Precision
from nets import SHAPE, calibration, net

HOW = {
    "float32": Precision(),
    "float16": Precision("float16", "float16"),
    "int8": Precision("int8", "int8"),
    "int4-weights": Precision("int4", "float32", (("stem.0", "int8", "float32"),)),
}
Make = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, here: Device) -> Make:
    """Name in HOW -> the manifest's path and the module it was written from."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        from lighten.quant.plan import quantize
        from lighten.quant.weight_only import quantize_weights

        module: Any = net("small")
        if name == "int8":
            module = quantize(module, SHAPE, calibration(), HOW[name], here).module
        elif name == "int4-weights":
            module = quantize_weights(module, SHAPE, HOW[name], here).module
        path = tmp_path_factory.mktemp(name) / "model.mlpackage" / "Manifest.json"
        others = coreml.export(module, SHAPE, path, HOW[name], here)
        assert {path, *others} == {f for f in path.parent.rglob("*") if f.is_file()}
        return path, module

    return make


@pytest.mark.parametrize("name", list(HOW))
def test_the_file_holds_what_the_network_computes_with(made: Make, name: str) -> None:
    path, module = made(name)
    assert coreml.refuses(HOW[name], Device("d", "", "", ())) is None
    assert coreml.check(path, module, SHAPE) == ()


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_a_network_with_other_weights_is_told_apart(made: Make, name: str) -> None:
    path, module = made(name)
    import copy

    other = copy.deepcopy(module)
    with torch.no_grad():
        tensors = other.state_dict().values()
        largest = max((v for v in tensors if v.ndim == 4), key=torch.numel)
        largest.view(-1)[-1] += 3
    problems = coreml.check(path, other, SHAPE)
    assert any("off by" in line for line in problems)


def test_another_input_size_is_told(made: Make) -> None:
    path, module = made("float32")
    assert any("(1, 3, 16, 16)" in line for line in coreml.check(path, module, (3, 32, 32)))


def test_weights_are_stored_in_the_bits_that_were_asked_for(made: Make) -> None:
    kinds = {name: {r.dtype for r in coreml.weights(made(name)[0]) if np.prod(r.shape) >= 200} for name in HOW}
    assert kinds == {"float32": {"float32"}, "float16": {"float16"}, "int8": {"int8"}, "int4-weights": {"int8", "int4"}}


def test_integers_of_weights_are_those_that_were_decided(made: Make) -> None:
    """Read by coremltools' own reader, from the file, not by what wrote it."""
    from lighten.kit.coreml_check import read

    path, module = made("int4-weights")
    stored = [one.value for one in read(path).constants if one.role in ("data", "quantized_data")]
    for one in module.meta["packed"].values():
        assert any(v.shape == one.q.shape and np.array_equal(v.astype(np.int8), one.q) for v in stored)


def test_the_same_network_is_the_same_package(made: Make, tmp_path: Path, here: Device) -> None:
    path, module = made("int8")
    again = tmp_path / "model.mlpackage" / "Manifest.json"
    others = coreml.export(module, SHAPE, again, HOW["int8"], here)
    for f in (again, *others):
        assert f.read_bytes() == (path.parent / f.relative_to(again.parent)).read_bytes(), f.name


def test_nothing_fell_back_where_every_operator_has_integers(made: Make) -> None:
    assert coreml.fallbacks(made("int8")[0]) == ()
    assert coreml.fallbacks(made("float32")[0]) == ()


def test_here_it_is_said_that_it_was_not_run(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert "macOS" in str(coreml.not_here())
    with pytest.raises(RefusedFormat, match="macOS"):
        coreml.load(made("float32")[0], 1)


def test_what_it_cannot_do_is_refused_with_a_reason(here: Device) -> None:
    for how in (Precision("int8", "dynamic"), Precision("int4", "int4"), Precision("int3", "int3")):
        assert coreml.refuses(how, here)
    assert coreml.lacks({"aten.conv2d.default": 2, "aten.hardswish.default": 1}, SHAPE) is None
    assert "mine.spline" in str(coreml.lacks({"mine.spline.default": 1}, SHAPE))


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path, here: Device) -> None:
    from lighten.quant.weight_only import quantize_weights

    module = quantize_weights(net("small"), SHAPE, Precision("int4", "float32"), here, block=32).module
    with pytest.raises(RefusedFormat, match="block"):
        coreml.export(module, SHAPE, tmp_path / "m.mlpackage" / "Manifest.json", Precision("int4", "float32"), here)


@pytest.mark.parametrize("which", ["Manifest.json", "model.mlmodel", "weight.bin"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "noise"])
def test_a_damaged_package_is_named(made: Make, tmp_path: Path, which: str, damage: str) -> None:
    folder = tmp_path / "model.mlpackage"
    shutil.copytree(made("float32")[0].parent, folder)
    victim = next(folder.rglob(which))
    raw = victim.read_bytes()
    noise = np.random.default_rng(0).bytes(len(raw))
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"empty": b"", "half": raw[: len(raw) // 2], "noise": noise}[damage])
    with pytest.raises(LightenError, match=r"model\.mlpackage|Manifest\.json") as e:
        coreml.load(folder / "Manifest.json", 1)
    assert e.type is BadBundle


def test_the_manifest_names_its_model(made: Make) -> None:
    table = json.loads(made("float32")[0].read_text())
    root = table["itemInfoEntries"][table["rootModelIdentifier"]]
    assert root["path"] == "com.apple.CoreML/model.mlmodel"
