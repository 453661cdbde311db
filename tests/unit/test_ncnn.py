"""ncnn: its two files read and written, and layers in int8 held to plain integer arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lighten.errors import BadBundle
from lighten.formats import ncnn as format
from lighten.kit import ncnn_graph as graphs
from lighten.kit.ncnn_graph import MARK, Grid, Integers, Layer
from lighten.types import Device, Precision

DEVICE = Device("here", "Here", "这里", ("ncnn",))
SCALE, REACH = 0.02, 127
GRIDS = {"of a ReLU": Grid(SCALE, -128), "symmetric": Grid(SCALE, 0), "skewed": Grid(SCALE, 20), "of a swish": Grid(SCALE, -110)}  # fmt: skip


def convolution(
    name: str, source: str, made: str, weight: np.ndarray, bias: np.ndarray, pad: int, stride: int = 1, **more: str
) -> Layer:
    out, inner, height, width = weight.shape
    settings = {0: out, 1: width, 11: height, 2: 1, 12: 1, 3: stride, 13: stride, 4: pad, 14: pad, 5: 1, 6: weight.size}
    settings |= {7: out} if inner == 1 and out > 1 else {}
    params = {k: str(v) for k, v in settings.items()} | {int(k[1:]): v for k, v in more.items()}
    kind = "ConvolutionDepthWise" if 7 in params else "Convolution"
    return Layer(kind, name, (source,), (made,), params, {"weight": weight.astype(np.float32), "bias": bias})


def some_integers(shape: tuple[int, ...], seed: int = 0) -> tuple[Integers, np.ndarray, np.ndarray]:
    """Integers, the float weight that they stand for, a bias."""
    dice = np.random.default_rng(seed)
    held = Integers(
        dice.integers(-127, 128, shape).astype(np.int8), dice.uniform(1e-3, 2e-3, shape[0]).astype(np.float32)
    )
    value = held.q.astype(np.float32) * held.scale.reshape(-1, *[1] * (len(shape) - 1))
    return held, value, dice.normal(0, 1, shape[0]).astype(np.float32)


def on_grid(x: np.ndarray, grid: Grid) -> torch.Tensor:
    """`x` rounded to those of the plan's levels that ncnn has."""
    levels = np.rint(x / np.float32(grid.scale)).clip(grid.middle - REACH, grid.middle + REACH)
    return torch.from_numpy(levels.astype(np.float64) * grid.scale)


def written(layers: tuple[Layer, ...], folder: Path) -> Path:
    path = folder / "net.ncnn.param"
    text, raw = graphs.write(layers)
    path.write_text(text)
    path.with_suffix(".bin").write_bytes(raw)
    return path


def pixels(channels: int, grid: Grid, side: int = 9) -> np.ndarray:
    ends = (np.array([-REACH, REACH]) + grid.middle) * grid.scale
    return np.random.default_rng(7).uniform(*ends, (channels, side, side)).astype(np.float32)


START = Layer("Input", "in0", (), ("in0",), {})


# --- the files ----------------------------------------------------------------------------------------


def test_what_is_written_is_read_again() -> None:
    _, weight, bias = some_integers((5, 3, 3, 3))
    odd = convolution("a", "in0", "1", weight, bias, 1).having(tensors={"weight": weight.astype(np.float16)})
    reshape = Layer("Reshape", "r", ("1",), ("out0",), {12: "0", 6: '"1,1,//(96,0n),0n"'})
    layers = (START, odd, reshape)
    read = graphs.read(*graphs.write(layers))
    assert read == layers
    for key, value in odd.tensors.items():
        np.testing.assert_array_equal(read[1].tensors[key], value)
        assert read[1].tensors[key].dtype == value.dtype


def test_every_reader_of_a_blob_gets_a_copy_of_its_own() -> None:
    add = Layer("BinaryOp", "add", ("1", "1"), ("out0",), {0: "0"})
    relu = Layer("ReLU", "relu", ("in0",), ("1",), {})
    text, _ = graphs.write((START, relu, add))
    reads = [blob for layer in graphs.read(text, b"") for blob in layer.inputs]
    assert len(reads) == len(set(reads)) == 4
    assert graphs.without_splits(graphs.read(text, b"")) == (START, relu, add)


@pytest.mark.parametrize(
    "change",
    [
        lambda text, raw: (text, raw[:-4]), lambda text, raw: (text, raw + b"\0" * 4), lambda text, raw: (text, b"\1" * len(raw)),
        lambda text, raw: (text.replace("7767517", "7767518"), raw), lambda text, raw: (text.replace("2 2", "3 2"), raw),
        lambda text, raw: (text.replace("6=135", "6=999999999999"), raw), lambda text, raw: (text.replace("0=5", "0=0"), raw),
        lambda text, raw: (text.replace("0=5", "0=-5"), raw), lambda text, raw: (text.replace("in0 out0", "in1 out0"), raw),
        lambda text, raw: ("", raw),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_each_other_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    _, weight, bias = some_integers((5, 3, 3, 3))
    text, raw = graphs.write((START, convolution("a", "in0", "out0", weight, bias, 1)))
    with pytest.raises(BadBundle):
        graphs.read(*change(text, raw))


# --- integers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRIDS)
def test_of_256_levels_one_end_is_given_up_and_never_zero(kind: str) -> None:
    grid = GRIDS[kind]
    plan = set(range(-128 - grid.zero, 128 - grid.zero))
    ncnn = {n + grid.middle for n in range(-REACH, REACH + 1)}
    assert ncnn < plan
    assert 0 in ncnn


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    "shape, pad, stride", [((16, 3, 3, 3), 1, 1), ((16, 16, 3, 3), 1, 1), ((64, 64, 3, 3), 1, 1), ((16, 16, 1, 1), 0, 1), ((16, 1, 3, 3), 1, 1), ((16, 1, 5, 5), 2, 2), ((7, 5, 3, 3), 1, 2)]
)  # fmt: skip
def test_int8_convolution_is_the_plans_arithmetic(
    kind: str, shape: tuple[int, ...], pad: int, stride: int, tmp_path: Path
) -> None:
    """Against a convolution in float64 of the very values; 64 channels at 3x3 are what Winograd would take. ncnn's depthwise
    kernel divides by an approximate reciprocal of 12 bits: its sums are exact, their scale is not quite."""
    pytest.importorskip("ncnn")
    grid, groups = GRIDS[kind], shape[0] if shape[1] == 1 else 1
    held, weight, bias = some_integers(shape)
    x = pixels(shape[1] * groups, grid)
    mark = Layer(MARK, "mark", ("in0",), ("1",), {})
    layers = graphs.integer_layers(
        (START, mark, convolution("c", "1", "out0", weight, bias, pad, stride)), {"mark": grid}, lambda w: held
    )
    got = format.load(written(layers, tmp_path), 1)(x[None])[0]
    exact = torch.from_numpy(weight).double(), torch.from_numpy(bias).double()
    want = torch.nn.functional.conv2d(on_grid(x, grid)[None], *exact, stride, pad, groups=groups).reshape(-1).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=(1e-6 if groups == 1 else 4e-4) * np.abs(want).max())


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("clip", [{}, {"_9": "1"}, {"_9": "3", "_23310": ""}])
def test_a_layer_that_only_int8_layers_read_gives_int8(kind: str, clip: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    first_grid, grid = GRIDS["skewed"], GRIDS[kind]
    (held, weight, bias), (held2, weight2, bias2) = some_integers((16, 3, 3, 3)), some_integers((16, 16, 3, 3), 1)
    first = convolution("a", "1", "2", weight, bias, 1, **{k: v for k, v in clip.items() if k == "_9"})
    first = replace(first, params={**first.params, -23310: "2,0.0,1.0"}) if "_23310" in clip else first
    marks = Layer(MARK, "m1", ("in0",), ("1",), {}), Layer(MARK, "m2", ("2",), ("3",), {})
    rows = (START, marks[0], first, marks[1], convolution("b", "3", "out0", weight2, bias2, 1))
    known = {weight.tobytes(): held, weight2.tobytes(): held2}
    layers = graphs.integer_layers(rows, {"m1": first_grid, "m2": grid}, lambda w: known.get(w.tobytes()))
    assert [layer.number(8) for layer in layers if layer.kind == "Convolution"] == [101, 1]
    assert [layer.kind for layer in layers].count("BinaryOp") == 1  # the input alone is shifted by a layer of its own
    x = pixels(3, first_grid)
    got = format.load(written(layers, tmp_path), 1)(x[None])[0]
    conv = torch.nn.functional.conv2d
    y = conv(
        on_grid(x, first_grid)[None], torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), padding=1
    )
    y = y.clamp(0.0, 1.0) if "_23310" in clip else y.relu() if clip else y
    y = on_grid(y.numpy().astype(np.float32), grid)
    want = conv(y, torch.from_numpy(weight2).double(), torch.from_numpy(bias2).double(), padding=1).reshape(-1).numpy()
    # A value on the edge of a step may fall to the other side: one step of one of 144 inputs.
    assert np.abs(got - want).max() <= SCALE * np.abs(weight2).max() * 1.01
    assert (np.abs(got - want) <= 1e-3).mean() > 0.9


def test_what_a_float_layer_reads_is_the_plans_value_on_all_256_levels(tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    grid = GRIDS["of a swish"]
    rows = (
        START, Layer(MARK, "m", ("in0",), ("1",), {}), Layer("Flatten", "flat", ("1",), ("2",), {}),
        Layer(MARK, "again", ("2",), ("3",), {}), Layer("ReLU", "relu", ("3",), ("out0",), {0: "0.5"}),
    )  # fmt: skip
    layers = graphs.integer_layers(rows, {"m": grid, "again": grid}, lambda w: None)
    assert [layer.kind for layer in layers].count("UnaryOp") == 1  # what is on the grid is not rounded again
    x = np.random.default_rng(0).uniform(-2, 6, (4, 5, 5)).astype(np.float32)
    got = format.load(written(layers, tmp_path), 1)(x[None])[0]
    y = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), SCALE, grid.zero, -128, 127)
    want = torch.nn.functional.leaky_relu(y, 0.5).reshape(-1).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_value_that_int8_and_float_layers_read_is_given_to_both() -> None:
    held, weight, bias = some_integers((16, 16, 1, 1))
    pool = {0: "1", 4: "0", 7: "1", 8: "3", 18: "3"}  # 8 is the width of an adaptive pooling, int8_scale_term elsewhere
    rows = (
        START, Layer("ReLU", "relu", ("in0",), ("1",), {}), Layer(MARK, "m", ("1",), ("2",), {}),
        convolution("c", "2", "3", weight, bias, 0), Layer("Pooling", "pool", ("2",), ("4",), pool),
        Layer("Concat", "cat", ("3", "4"), ("out0",), {}),
    )  # fmt: skip
    made = graphs.integer_layers(rows, {"m": GRIDS["of a ReLU"]}, lambda w: held)
    layers = {blob: one for one in made for blob in one.outputs}
    assert layers["3"].number(8) == 1
    assert layers[layers["3"].inputs[0]].kind == "BinaryOp"
    assert layers[layers["3"].inputs[0]].inputs == ("1",)
    assert layers["4"].inputs == ("2_rounded",)


def test_a_grouped_convolution_stays_float_because_ncnn_has_one_scale_a_group() -> None:
    held, weight, bias = some_integers((8, 2, 3, 3))
    grouped = convolution("c", "1", "out0", weight, bias, 1)
    grouped = replace(grouped, kind="ConvolutionDepthWise", params={**grouped.params, 7: "4"})
    rows = (START, Layer(MARK, "m", ("in0",), ("1",), {}), grouped)
    made = graphs.integer_layers(rows, {"m": GRIDS["skewed"]}, lambda w: held)
    assert made[-1].kind == "ConvolutionDepthWise"
    assert made[-1].tensors["weight"].dtype == np.float32
    assert made[-1].inputs == ("1_rounded",)


def test_a_symmetric_plan_needs_no_shifts() -> None:
    held, weight, bias = some_integers((16, 16, 3, 3))
    rows = (START, Layer(MARK, "m", ("in0",), ("1",), {}), convolution("c", "1", "out0", weight, bias, 1))
    (_, only) = graphs.integer_layers(rows, {"m": GRIDS["symmetric"]}, lambda w: held)
    np.testing.assert_array_equal(only.tensors["bias"], bias)
    np.testing.assert_array_equal(only.tensors["weight"], held.q)
    assert 18 not in only.params


def test_int8_convolutions_forbid_winograd_whatever_the_reader_sets() -> None:
    held, weight, bias = some_integers((16, 16, 3, 3))
    rows = (START, Layer(MARK, "m", ("in0",), ("1",), {}), convolution("c", "1", "out0", weight, bias, 1))
    assert graphs.integer_layers(rows, {"m": GRIDS["skewed"]}, lambda w: held)[-1].number(31) == 64


# --- the whole way ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.fx.GraphModule, Path]:
    """The "small" net's plan, and its file."""
    pytest.importorskip("ncnn")
    pytest.importorskip("pnnx")
    from lighten.quant.plan import quantize
    from nets import SHAPE, calibration, net

    how = Precision("int8", "int8", (("fc", "float16", "float16"),))
    module = quantize(net("small"), SHAPE, calibration(), how, DEVICE).module
    path = tmp_path_factory.mktemp("ncnn") / "model.ncnn.param"
    format.export(module, SHAPE, path, how, DEVICE)
    return module, path


def test_the_files_integers_are_the_plans(planned: tuple[torch.fx.GraphModule, Path]) -> None:
    """Bit for bit, but that a layer's may all be negated, in its inputs and outputs alike."""
    module, path = planned
    plan = {
        np.sort(np.abs(b.numpy()), None).tobytes()
        for _, b in module.named_buffers()
        if b.dtype == torch.int8 and b.ndim > 1
    }
    layers = graphs.read(path.read_text(), path.with_suffix(".bin").read_bytes())
    file = [layer.tensors["weight"] for layer in layers if "weight_scales" in layer.tensors]
    assert {np.sort(np.abs(w), None).tobytes() for w in file} == plan
    assert len(file) == 6


def test_weights_and_fallbacks_tell_what_is_in_the_file(planned: tuple[torch.fx.GraphModule, Path]) -> None:
    rows = {row.dtype: row for row in format.weights(planned[1]) if len(row.shape) > 1}
    assert set(rows) == {"int8", "float16"}
    assert rows["float16"].shape == (10, 96)
    assert rows["float16"].bytes == 10 * 96 * 2
    said = format.fallbacks(planned[1])
    assert "1 x InnerProduct in float32" in said
    assert "2 x Pooling in float32" in said
    assert any("step of rounding" in line for line in said)


@pytest.mark.parametrize(
    "precision",
    [Precision("int8", "float32"), Precision("int4", "int8"), Precision("int8", "dynamic"), Precision("int8", "int8", (("fc", "int4", "int8"),))],
)  # fmt: skip
def test_refuses_what_would_have_to_be_changed_silently(precision: Precision) -> None:
    reason = format.refuses(precision, DEVICE)
    assert reason is not None
    assert "ncnn" in reason


def test_a_network_of_unknown_operators_is_refused_by_name() -> None:
    assert format.lacks({"aten.conv2d.default": 3, "aten.relu.default": 3}, (3, 16, 16)) is None
    reason = format.lacks({"aten.conv2d.default": 3, "aten.sort.default": 1}, (3, 16, 16))
    assert reason is not None
    assert "aten.sort" in reason


def test_float32_and_int8_exceptions_are_what_the_plan_says() -> None:
    kept = Precision("int8", "int8", (("fc", "float32", "float32"), ("stem.0", "float16", "float16")))
    assert format.refuses(kept, DEVICE) is None
