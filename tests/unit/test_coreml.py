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
from nets import SHAPE, calibration, images, net

HOW = {
    "float32": Precision(),
    "float16": Precision("float16", "float16"),
    "int8": Precision("int8", "int8"),
    "int4-weights": Precision("int4", "float32", (("stem.0", "int8", "float32"),)),
    "int4": Precision("int4", "int8"),
    "mobile": Precision("int8", "int8"),
    "palette4": Precision("palette4", "float32"),
    "palette8": Precision("palette8", "float32"),
}
Make = Callable[[str], tuple[Path, Any]]


def computed(path: Path, x: torch.Tensor) -> np.ndarray:
    """What the program in the file means, operator by operator in torch, after Apple's definitions of MIL; float32
    throughout. Not what wrote the file: it reads the specification and knows nothing of the network."""
    from coremltools.converters.mil.frontend.milproto.load import TranscriptionContext, _load_value

    from lighten.kit.coreml_check import BLOB, read, tensors

    package = read(path)
    context = TranscriptionContext(str((path.parent / BLOB).parent))
    known: dict[str, Any] = {"input": x} | {k: torch.from_numpy(v.copy()) for k, v in tensors(package).items()}
    for op in package.operators:
        out = op.outputs[0].name
        if op.type == "const":
            known.setdefault(out, _load_value(context, op.attributes["val"]))
        elif not op.type.startswith("constexpr"):
            given = {}
            for key, argument in op.inputs.items():
                values = [
                    known[a.name] if a.WhichOneof("binding") == "name" else _load_value(context, a.value)
                    for a in argument.arguments
                ]
                given[key] = values if key == "values" else values[0]
            known[out] = MEANS[op.type](**given)
    return known["output"].float().numpy()


def _list(v: Any) -> list[int]:
    return [int(n) for n in np.asarray(v).reshape(-1)]


def _padded(x: torch.Tensor, pad: Any, pad_type: str, fill: float) -> torch.Tensor:
    assert pad_type in ("custom", "valid")
    top, bottom, left, right = _list(pad) if pad_type == "custom" else (0, 0, 0, 0)
    return torch.nn.functional.pad(x, (left, right, top, bottom), value=fill)


def _conv(
    x: Any, weight: Any, strides: Any, pad_type: str, pad: Any, dilations: Any, groups: Any, bias: Any = None
) -> Any:
    x = _padded(x, pad, pad_type, 0.0)
    return torch.nn.functional.conv2d(x, weight, bias, _list(strides), 0, _list(dilations), int(groups))


def _max_pool(x: Any, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil_mode: Any) -> Any:
    return torch.nn.functional.max_pool2d(_padded(x, pad, pad_type, -np.inf), _list(kernel_sizes), _list(strides))


def _quantize(input: Any, scale: Any, output_dtype: str, zero_point: Any = 0) -> Any:
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[output_dtype]
    return (torch.round(input / float(scale)) + int(zero_point)).clamp(low, high)


MEANS: dict[str, Callable[..., Any]] = {
    "cast": lambda x, dtype: x,
    "conv": _conv,
    "linear": lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias),
    "relu": lambda x: x.clamp(min=0),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "thresholded_relu": lambda x, alpha: torch.where(x >= float(alpha), x, torch.zeros(())),
    "sigmoid_hard": lambda x, alpha, beta: (float(alpha) * x + float(beta)).clamp(0, 1),
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "concat": lambda values, axis, interleave: torch.cat(values, int(axis)),
    "max_pool": _max_pool,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(_list(axes), keepdim=bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(_list(shape)),
    "quantize": _quantize,
    "dequantize": lambda input, scale, zero_point=0: (input - int(zero_point)) * float(scale),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, here: Device) -> Make:
    """Name in HOW -> the manifest's path and the module it was written from."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        from lighten.quant.plan import quantize
        from lighten.quant.weight_only import quantize_weights

        module: Any = net("mobile" if name == "mobile" else "small")
        if name in ("int8", "int4", "mobile"):
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


@pytest.mark.parametrize("name", list(HOW))
def test_the_program_means_what_the_network_does(made: Make, name: str) -> None:
    path, module = made(name)
    x = images(48, seed=7)[0]
    got = np.concatenate([computed(path, one[None]) for one in x])
    with torch.no_grad():
        want = (coreml.simulate(path, module, SHAPE) if name == "palette4" else module)(x).numpy()
    exact = name in ("float32", "int4-weights")
    # Integer programs hold their scales in float16: a value on the edge of a step falls to either side.
    assert (got.argmax(1) == want.argmax(1)).mean() >= (0.95 if name == "int4" else 1)
    assert np.abs(got - want).max() <= (1e-4 if exact else 0.05 * np.abs(want).max())


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
    asked = {"float32": {"float32"}, "float16": {"float16"}, "int8": {"int8"}, "int4-weights": {"int8", "int4"}}
    for name, kinds in asked.items():
        assert {r.dtype for r in coreml.weights(made(name)[0]) if np.prod(r.shape) >= 200} == kinds


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
    assert coreml.lacks({"aten.conv2d.default": 2, "aten.hardswish_.default": 1, "aten.add_.Tensor": 1}, SHAPE) is None
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
