"""Every format: a file that answers like torch, stores what it says it stores, and is refused when damaged."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from conftest import PRECISIONS, Exported
from lighten.errors import BadBundle, RefusedFormat
from lighten.plugins import get, missing_backends, names
from lighten.types import Device, Precision

BITS = {
    "float32": 32, "float16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int32": 32, "int64": 64, "bool": 8,
}  # fmt: skip
INTEGERS = {
    "int4": Precision("int4", "int8"),
    "int4-activations": Precision("int4", "int4", (("stem.0", "int8", "int8"), ("fc", "int8", "int8"))),
    "mixed": Precision(
        "int8", "int8", (("right.0", "int4", "int8"), ("fc", "float16", "float16"), ("skip", "int8", "float32"))
    ),
    "int8-weights": Precision("int8", "float32"),
    "int4-weights": Precision("int4", "float32", (("stem.0", "int8", "float32"), ("fc", "float16", "float16"))),
    "int8-dynamic": Precision("int8", "dynamic"),
    "int4-dynamic": Precision("int4", "dynamic"),
}
"""What is quantized beyond plain int8, and how near to the torch module the file has to be."""
STORED = {
    "int4": {"int4"}, "int4-activations": {"int4", "int8"}, "mixed": {"int4", "int8", "float16"},
    "int8-weights": {"int8"}, "int4-weights": {"int4", "int8", "float16"},
    "int8-dynamic": {"int8", "uint8"}, "int4-dynamic": {"int4", "uint4"},
}  # fmt: skip
ANSWERS_LIKE_TORCH = {"float32": 1e-4, "float16": 1e-2}
ROUNDED = 0.05
"""Of the largest output: what single steps of rounding, done in another order by integer kernels, may add up to."""

COMPILED = ("aoti",)
"""Formats whose files hold machine code: of the small net's 166 kB, 120 are code, whatever the weights are."""

Make = Callable[..., Exported]


@pytest.fixture(params=names("formats"))
def name(request: pytest.FixtureRequest) -> str:
    """Each format whose tools are installed here."""
    module = get("formats", request.param)
    missing = (*missing_backends(module, "REQUIRES"), *missing_backends(module, "RUNS_ON"))
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    return str(request.param)


@pytest.fixture
def format(name: str) -> ModuleType:
    return get("formats", name)


def load(format: ModuleType, path: Path, threads: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """The runtime's function, where the runtime can run on this machine."""
    if reason := format.not_here():
        pytest.skip(reason)
    run: Callable[[np.ndarray], np.ndarray] = format.load(path, threads)
    return run


def answers(format: ModuleType, file: Exported, x: np.ndarray) -> np.ndarray:
    out = load(format, file.path)(x)
    assert isinstance(out, np.ndarray)
    return out


def copy_of(file: Exported, folder: Path) -> None:
    """The file and its companions, as they lie beside each other."""
    for one in (file.path, *file.companions):
        target = folder / one.relative_to(file.path.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(one, target)


def wanted(file: Exported, x: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return file.module(torch.from_numpy(x)).float().numpy()


def some_images(n: int) -> np.ndarray:
    from nets import images

    return images(n, seed=7)[0].numpy()


def asked_for(format: ModuleType, precision: str, device: Device) -> Precision:
    if reason := format.refuses(PRECISIONS[precision], device):
        pytest.skip(f"refused: {reason}")
    return PRECISIONS[precision]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_file_that_normalises_inside_answers_pixels_as_it_answered_inputs(
    name: str, format: ModuleType, here: Device, exported: Make, precision: str, tmp_path: Path
) -> None:
    from lighten.data.preprocess import normalize
    from lighten.types import Preprocess
    from nets import SHAPE

    if not hasattr(format, "bake"):
        pytest.skip("takes the network's inputs only")
    how = Preprocess(*SHAPE[1:], mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.25), inside=True)
    file = exported(name, "small", precision)
    copy_of(file, tmp_path)
    pixels = np.random.default_rng(3).integers(0, 256, (5, *SHAPE[1:], SHAPE[0]), np.uint8)
    format.bake(tmp_path / file.path.name, how)
    want, got = load(format, file.path)(normalize(pixels, how)), load(format, tmp_path / file.path.name)(pixels)
    exact = name == "onnx"  # OpenVINO multiplies by the reciprocal of the spread
    np.testing.assert_allclose(got, want, rtol=0, atol=0 if exact else ROUNDED * np.abs(want).max())
    stored = sum(w.bytes for w in format.weights(file.path))
    assert sum(w.bytes for w in format.weights(tmp_path / file.path.name)) <= stored + 200


# --- the shape of a plug-in -------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", names("formats"))
def test_has_every_name_of_the_contract(plugin: str) -> None:
    module = get("formats", plugin)
    for listing in (module.REQUIRES, module.RUNS_ON):
        assert isinstance(listing, tuple)
        assert listing
        assert all(isinstance(p, str) for p in listing)
    assert isinstance(module.EXTRA, str)
    assert module.SUFFIX.startswith(".")
    assert module.BATCH in ("any", "one")
    parameters = {
        "refuses": ["precision", "device"],
        "lacks": ["operators", "shape"],
        "not_here": [],
        "export": ["module", "shape", "path", "precision", "device"],
        "load": ["path", "threads"],
        "runtime": [],
        "weights": ["path"],
        "fallbacks": ["path"],
    }
    for function, expected in parameters.items():
        assert list(inspect.signature(getattr(module, function)).parameters) == expected


@pytest.mark.parametrize("plugin", names("formats"))
def test_its_extra_can_be_installed(plugin: str) -> None:
    import tomllib

    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert get("formats", plugin).EXTRA in table["project"]["optional-dependencies"]


def test_runtime_names_itself_with_a_version(format: ModuleType) -> None:
    words = format.runtime().split()
    assert len(words) >= 2
    assert words[-1][0].isdigit()


def test_refuses_with_a_reason_what_it_cannot_do_and_nothing_it_can(
    name: str, format: ModuleType, here: Device, exported: Make
) -> None:
    reason = format.refuses(Precision("int3", "int3"), here)
    assert isinstance(reason, str)
    assert "int3" in reason
    able = [p for p, precision in PRECISIONS.items() if format.refuses(precision, here) is None]
    assert "float32" in able
    for precision in able:
        assert exported(name, "small", precision).path.stat().st_size > 0


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_program_is_not_refused_for_the_operators_of_a_plan(
    format: ModuleType, here: Device, module_of: Callable[[str, str], Any], precision: str
) -> None:
    from lighten.kit.operators import operators
    from nets import SHAPE

    asked_for(format, precision, here)
    for net in ("small", "mobile"):
        assert format.lacks(operators(module_of(net, precision), SHAPE), SHAPE) is None


def test_nothing_falls_back_in_a_float_file(name: str, format: ModuleType, exported: Make) -> None:
    assert format.fallbacks(exported(name, "small", "float32").path) == ()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_format_that_cannot_run_here_checks_its_file(
    name: str, format: ModuleType, here: Device, exported: Make, precision: str
) -> None:
    """A float program may still hold its batch norms, which writers fold."""
    from lighten.kit.trace import trace
    from nets import SHAPE

    if format.not_here() is None:
        pytest.skip("its runtime proves it")
    asked_for(format, precision, here)
    file = exported(name, "small", precision)
    as_read = file.module if precision == "int8" else trace(file.module, SHAPE).module(check_guards=False)
    assert format.check(file.path, as_read, SHAPE) == ()


# --- the file answers like torch -----------------------------------------------------------------------


@pytest.mark.parametrize("net, precision", [("small", "float32"), ("small", "float16"), ("mobile", "float32")])
def test_float_file_answers_like_torch(
    name: str, format: ModuleType, here: Device, exported: Make, net: str, precision: str
) -> None:
    asked_for(format, precision, here)
    file, x = exported(name, net, precision), some_images(24)
    np.testing.assert_allclose(answers(format, file, x), wanted(file, x), rtol=0, atol=ANSWERS_LIKE_TORCH[precision])


@pytest.mark.parametrize("net", ["small", "mobile"])
def test_int8_file_answers_like_the_converted_module(
    name: str, format: ModuleType, here: Device, exported: Make, module_of: Callable[[str, str], Any], net: str
) -> None:
    """Same labels, no output far off, and together closer to the plan than the plan is to the float network."""
    import torch

    asked_for(format, "int8", here)
    file, x = exported(name, net, "int8"), some_images(48)
    got, want = answers(format, file, x), wanted(file, x)
    with torch.inference_mode():
        float_net = module_of(net, "float32")(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
    assert np.abs(got - want).max() <= ROUNDED * np.abs(want).max()
    assert ((got - want) ** 2).mean() < ((float_net - want) ** 2).mean()


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_one_file_takes_batches_of_1_3_and_8(
    name: str, format: ModuleType, here: Device, exported: Make, precision: str
) -> None:
    asked_for(format, precision, here)
    file, x = exported(name, "small", precision), some_images(8)
    run = load(format, file.path, 1)
    alone = np.concatenate([run(x[k : k + 1]) for k in range(8)])
    assert alone.shape == (8, 10)
    assert alone.dtype == np.float32
    tolerance = max(ANSWERS_LIKE_TORCH.get(precision, 0), ROUNDED * np.abs(alone).max() * (precision == "int8"))
    for n in (3, 8):
        np.testing.assert_allclose(run(x[:n]), alone[:n], rtol=0, atol=tolerance)


def test_answers_are_the_callers_own(name: str, format: ModuleType, exported: Make) -> None:
    run, x = load(format, exported(name, "small", "float32").path, 1), some_images(4)
    first = run(x[:2])
    kept = first.copy()
    run(x[2:])
    np.testing.assert_array_equal(first, kept)


def test_threads_change_speed_not_answers(name: str, format: ModuleType, exported: Make) -> None:
    file, x = exported(name, "small", "float32"), some_images(4)
    np.testing.assert_allclose(load(format, file.path, 2)(x), load(format, file.path, 1)(x), rtol=0, atol=1e-5)


# --- integers of other widths --------------------------------------------------------------------------


@cache
def integer_module(precision: str, device: Device, block: int = 0) -> Any:
    from lighten.quant.plan import quantize
    from lighten.quant.weight_only import quantize_weights
    from nets import SHAPE, calibration, net

    how = INTEGERS[precision]
    if how.activations in ("float32", "dynamic"):
        return quantize_weights(net("small"), SHAPE, how, device, block).module
    return quantize(net("small"), SHAPE, calibration(), how, device).module


@pytest.fixture
def integers(
    name: str, format: ModuleType, here: Device, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[str, Exported]:
    """The "small" net at one precision of INTEGERS, in this format."""
    from nets import SHAPE

    precision, block = request.param
    if reason := format.refuses(INTEGERS[precision], here):
        pytest.skip(f"refused: {reason}")
    module, path = integer_module(precision, here, block), tmp_path / f"model{format.SUFFIX}"
    before = {k: v.clone() for k, v in module.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    try:
        companions = format.export(module, SHAPE, path, INTEGERS[precision], here)
    except RefusedFormat as e:
        if not block:  # which is in the module, not in the precision: only the writer sees it
            raise
        pytest.skip(f"refused: {e.what}")
    same = all(before[k].equal(v) for k, v in module.state_dict().items())
    return precision, Exported(path, companions, module, INTEGERS[precision], here, same)


EVERY = pytest.mark.parametrize(
    "integers", [*((p, 0) for p in INTEGERS), ("int8-weights", 32), ("int4-weights", 32)], indirect=True,
    ids=lambda one: f"{one[0]}-{one[1]}",
)  # fmt: skip


@EVERY
def test_integer_file_answers_like_its_module(format: ModuleType, integers: tuple[str, Exported]) -> None:
    """Weight-only: the same floats. Rounded activations: same labels, and nearer to the plan than its own noise."""
    precision, file = integers
    x = some_images(32)
    got, want = answers(format, file, x), wanted(file, x)
    if precision.endswith("weights"):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert (got.argmax(1) == want.argmax(1)).mean() >= (0.96 if precision == "int4-activations" else 1)
    # A value on the edge of a step falls to either side; with 4-bit activations a step is a fifteenth of the range.
    noise = 0.2 if precision == "int4-activations" else ROUNDED
    assert np.sqrt(((got - want) ** 2).mean()) <= noise * np.abs(want).max()
    assert file.left_alone


@EVERY
def test_integer_file_stores_what_was_asked(format: ModuleType, integers: tuple[str, Exported]) -> None:
    precision, file = integers
    rows = format.weights(file.path)
    big = [row for row in rows if len(row.shape) > 1 and int(np.prod(row.shape)) >= 200]
    for row in rows:
        assert row.bytes == -(-int(np.prod(row.shape, dtype=np.int64)) * BITS[row.dtype] // 8), row
    # Scales of blocks are the only float tensors of this size.
    assert {row.dtype for row in big if row.dtype != "float32"} <= STORED[precision]
    assert {row.dtype for row in big} & STORED[precision]
    counted = [row for row in big if row.dtype != "float32"]
    assert sum(int(np.prod(row.shape)) for row in counted) >= 50_000


@pytest.mark.parametrize("integers", [("int4", 0), ("int4-weights", 0)], indirect=True)
def test_integer_export_is_deterministic(format: ModuleType, integers: tuple[str, Exported], tmp_path: Path) -> None:
    from nets import SHAPE

    _, file = integers
    other = tmp_path / "again"
    other.mkdir()
    again = format.export(file.module, SHAPE, other / file.path.name, file.precision, file.device)
    for a, b in zip((file.path, *file.companions), (other / file.path.name, *again)):
        assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.parametrize(
    "precision",
    [
        Precision("float32", "int8"), Precision("int8", "float16"), Precision("float32", "float32", (("fc", "int8", "int8"),)),
        Precision("int8", "float32", (("fc", "int8", "int8"),)), Precision("int8", "int8", (("fc", "int2", "int8"),)),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_with_one_reason(
    format: ModuleType, here: Device, precision: Precision
) -> None:
    reason = format.refuses(precision, here)
    assert reason
    assert "\n" not in reason


# --- what is stored -----------------------------------------------------------------------------------


def parameter_shapes(module: Any) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters() if p.ndim > 1]


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_weights_tells_the_dtypes_and_bytes_that_are_in_the_file(
    name: str, format: ModuleType, here: Device, exported: Make, module_of: Callable[[str, str], Any], precision: str
) -> None:
    asked_for(format, precision, here)
    file = exported(name, "small", precision)
    rows = format.weights(file.path)
    parameters = parameter_shapes(module_of("small", "float32"))
    largest = max(int(np.prod(s)) for s in parameters)
    for row in rows:
        assert row.bytes == -(-int(np.prod(row.shape, dtype=np.int64)) * BITS[row.dtype] // 8), row
        assert 0 <= row.zeros <= 1
    big = [row for row in rows if int(np.prod(row.shape)) >= 100]
    assert max(int(np.prod(r.shape)) for r in big) == largest
    assert {row.dtype for row in big} == {precision}
    assert sum(row.bytes for row in rows) <= file.bytes
    assert sum(int(np.prod(r.shape)) for r in big) >= sum(int(np.prod(s)) for s in parameters) - 100 * len(parameters)


def test_weights_counts_zeros(name: str, format: ModuleType, exported: Make) -> None:
    rows = format.weights(exported(name, "small", "float32").path)
    (row,) = [r for r in rows if tuple(r.shape) in ((80, 64, 3, 3), (80, 3, 3, 64))]  # as the runtime lays them out
    assert row.zeros == pytest.approx(20 / 80, abs=1e-6)


def test_int8_file_is_well_under_half_of_float32(name: str, format: ModuleType, here: Device, exported: Make) -> None:
    """Under 40 %. A graph written as text (OpenVINO's XML) costs the same for any width of network: it is left out,
    and all together must still be well under float16's half and a tenth. Of a file that is mostly compiled code, the
    tensors are held to the 40 %."""
    asked_for(format, "int8", here)
    whole, int8 = exported(name, "small", "float32"), exported(name, "small", "int8")
    stored = [sum(row.bytes for row in format.weights(f.path)) for f in (whole, int8)]
    assert stored[1] < 0.40 * stored[0]
    if name not in COMPILED:
        binary = sum(len(raw) for f in (int8.path, *int8.companions) if b"\0" in (raw := f.read_bytes()))
        assert binary < 0.40 * whole.bytes
        assert int8.bytes < 0.60 * whole.bytes


def test_float16_file_is_little_over_half_of_float32(
    name: str, format: ModuleType, here: Device, exported: Make
) -> None:
    asked_for(format, "float16", here)
    assert exported(name, "small", "float16").bytes < 0.65 * exported(name, "small", "float32").bytes


def test_companions_lie_beside_the_file_and_are_all_it_needs(
    name: str, format: ModuleType, exported: Make, tmp_path: Path
) -> None:
    file, x = exported(name, "small", "float32"), some_images(2)
    assert {f for f in file.path.parent.rglob("*") if f.is_file()} == {file.path, *file.companions}
    copy_of(file, tmp_path)
    np.testing.assert_array_equal(load(format, tmp_path / file.path.name, 1)(x), load(format, file.path, 1)(x))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_export_is_deterministic(name: str, format: ModuleType, here: Device, exported: Make, precision: str) -> None:
    asked_for(format, precision, here)
    first, second, x = exported(name, "small", precision), exported(name, "small", precision, 1), some_images(4)
    for a, b in zip((first.path, *first.companions), (second.path, *second.companions)):
        assert hashlib.sha256(a.read_bytes()).digest() == hashlib.sha256(b.read_bytes()).digest(), a.name
    np.testing.assert_array_equal(answers(format, first, x), answers(format, second, x))


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_export_leaves_the_module_as_it_was(
    name: str, format: ModuleType, here: Device, exported: Make, precision: str
) -> None:
    asked_for(format, precision, here)
    assert exported(name, "small", precision).left_alone


# --- damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "missing"])
@pytest.mark.parametrize("which", [0, 1])
def test_damaged_file_is_named_in_a_bad_bundle(
    name: str, format: ModuleType, exported: Make, tmp_path: Path, damage: str, which: int
) -> None:
    good = exported(name, "small", "float32")
    if which > len(good.companions):
        pytest.skip("the format is one file")
    copy_of(good, tmp_path)
    victim = tmp_path / (good.path, *good.companions)[which].relative_to(good.path.parent)
    raw = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        noise = np.random.default_rng(0).bytes(len(raw))
        victim.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "noise": noise}[damage])
    if damage == "noise" and which:
        pytest.skip("any bytes are weights; the bundle's sha256 finds this")
    with pytest.raises(BadBundle, match=good.path.name):
        load(format, tmp_path / good.path.name, 1)
