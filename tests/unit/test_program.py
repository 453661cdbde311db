"""A plan read back from disk gives the same files, to the byte, as the plan itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.errors import BadBundle
from lighten.formats import onnx, openvino
from lighten.quant import program
from lighten.quant.plan import quantize
from lighten.quant.weight_only import quantize_weights
from lighten.types import Device, Precision
from nets import SHAPE, calibration, images, net

PLANS = {
    "float32": Precision(),
    "int8": Precision("int8", "int8"),
    "mixed": Precision("int4", "int8", (("stem.0", "int8", "int8"), ("fc", "float16", "float16"))),
    "int4-weights": Precision("int4", "float32", (("fc", "float16", "float16"),)),
    "int8-dynamic": Precision("int8", "dynamic"),
}


def module_of(precision: Precision, device: Device) -> Any:
    if not precision.quantized:
        return net("small")
    if precision.activations in ("float32", "dynamic"):
        return quantize_weights(net("small"), SHAPE, precision, device, 0).module
    return quantize(net("small"), SHAPE, calibration(), precision, device).module


@pytest.mark.parametrize("name", list(PLANS))
def test_files_of_a_program_are_those_of_its_plan(name: str, here: Device, tmp_path: Path) -> None:
    precision = PLANS[name]
    module = module_of(precision, here)
    program.save(module, SHAPE, tmp_path / "p.pt2")
    again = program.read(tmp_path / "p.pt2")
    x = images(5, seed=3)[0]
    if precision.activations != "dynamic":  # rounding inputs as the network runs is the formats' own business
        with torch.no_grad():
            assert torch.equal(module(x), again(x))
    for format in (onnx, openvino):
        if format.refuses(precision, here):
            continue
        files = [tmp_path / f"{which}{format.SUFFIX}" for which in "ab"]
        made = [format.export(m, SHAPE, f, precision, here) for m, f in zip((module, again), files)]
        for a, b in zip((files[0], *made[0]), (files[1], *made[1])):
            assert a.read_bytes() == b.read_bytes(), a.name


def test_float_weights_that_became_integers_are_not_stored(here: Device, tmp_path: Path) -> None:
    module = module_of(PLANS["int8"], here)
    program.save(module, SHAPE, tmp_path / "p.pt2")
    stored = sum(v.numel() * v.element_size() for v in program.read(tmp_path / "p.pt2").state_dict().values())
    weights = sum(p.numel() for p in net("small").parameters())
    assert stored < 1.2 * weights


@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "truncated"])
def test_a_damaged_program_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    if damage != "missing":
        program.save(net("small"), SHAPE, path)
        raw = path.read_bytes()
        path.write_bytes({"empty": b"", "noise": bytes(range(256)) * 9, "truncated": raw[: len(raw) // 2]}[damage])
    with pytest.raises(BadBundle, match=r"p\.pt2"):
        program.read(path)
