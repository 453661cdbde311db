"""LiteRT: the plan's own integers in the file, no transposes between layers, nothing hostile reaches the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_litert")

import torch
from torch import Tensor, nn

from lighten import devices
from lighten.errors import BadBundle
from lighten.formats import litert
from lighten.kit import pt2e, tflite
from lighten.kit.onnx_graph import Packed
from lighten.quant.plan import quantize
from lighten.types import Precision

SHAPE = (3, 8, 8)
INT8 = Precision("int8", "int8")
HERE = devices.load("this-machine")


class Tiny(nn.Module):
    """A hard sigmoid (no integer kernel), a depthwise convolution, a concatenation of two ranges, a mean, an answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.gate, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        z = self.deep(y) * nn.functional.hardsigmoid(self.gate(y))
        return self.fc(torch.cat([y, 3.0 * z], 1).mean((2, 3)))


def images(n: int = 16) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan() -> Any:
    return quantize(Tiny().eval(), SHAPE, [images()], INT8, HERE).module


@pytest.fixture(scope="module")
def file(plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("litert") / "tiny.tflite"
    assert litert.export(plan, SHAPE, path, INT8, HERE) == ()
    return path


def stored(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of every int8 tensor, read without the format's own reader."""
    from ai_edge_litert.schema_py_generated import Model, TensorType

    model = Model.GetRootAs(path.read_bytes(), 0)
    graph = model.Subgraphs(0)
    for k in range(graph.TensorsLength()):
        tensor = graph.Tensors(k)
        data = model.Buffers(tensor.Buffer()).DataAsNumpy()
        if tensor.Type() == TensorType.INT8 and not isinstance(data, int):
            yield tensor.Name().decode(), data.view(np.int8).reshape(tensor.ShapeAsNumpy())


def kinds(path: Path) -> list[str]:
    """Operators in the order they run, as the runtime names them before any delegate takes them."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return [op["op_name"] for op in Interpreter(str(path), experimental_op_resolver_type=resolver)._get_ops_details()]


def test_weights_in_the_file_are_the_integers_of_the_plan(plan: Any, file: Path) -> None:
    wanted = [v.numpy() for v in plan.buffers() if v.dtype == torch.int8 and v.ndim > 1]
    held = [value for _, value in stored(file) if value.ndim > 1]
    assert len(wanted) == len(held) == 4
    for one in wanted:
        turned = [one.transpose(0, 2, 3, 1), one.transpose(1, 2, 3, 0)] if one.ndim == 4 else [one]
        assert any(t.shape == h.shape and (t == h).all() for t in turned for h in held)


def test_answers_are_those_of_the_plan(plan: Any, file: Path) -> None:
    with torch.inference_mode():
        want = plan(images()).numpy()
    got = litert.load(file, 1)(images().numpy())
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))


def test_no_transpose_is_left_and_the_file_takes_float_pixels_channels_last(file: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    assert "TRANSPOSE" not in kinds(file)
    (source,), (target,) = (
        f(Interpreter(str(file))) for f in (Interpreter.get_input_details, Interpreter.get_output_details)
    )
    assert (source["shape"].tolist(), source["dtype"], source["name"]) == ([1, 8, 8, 3], np.float32, "input")
    assert (target["shape"].tolist(), target["dtype"], target["name"]) == ([1, 5], np.float32, "output")


def test_what_runs_in_float_is_named(file: Path) -> None:
    """The hard sigmoid (add, clip, multiply) and the last layer, whose answer the plan does not round."""
    assert set(litert.fallbacks(file)) == {
        "1 x ADD in float32", "1 x MUL in float32", "1 x FULLY_CONNECTED in float32",
    }  # fmt: skip


def test_stored_tensors_are_aligned_as_the_schema_says(file: Path) -> None:
    raw = file.read_bytes()
    for name, value in stored(file):
        if value.ndim > 1:  # of fewer bytes the first like them may be others
            assert raw.index(value.tobytes()) % 16 == 0, name


@pytest.mark.parametrize("layout", [(0, 2, 3, 1), (1, 2, 3, 0), (0, 1, 2, 3)])
def test_integers_are_found_in_whatever_layout_the_converter_chose(layout: tuple[int, ...]) -> None:
    q = np.random.default_rng(0).integers(-127, 128, (6, 4, 3, 3)).astype(np.int8)
    packed = Packed(q, np.linspace(0.1, 0.2, 6, dtype=np.float32), 0, 8)
    found = tflite.placed(packed, packed.value.transpose(layout))
    assert found is not None
    ints, axis = found
    assert axis == layout.index(0)
    spread = packed.scale.reshape([-1 if d == axis else 1 for d in range(4)])
    np.testing.assert_array_equal(ints * spread, packed.value.transpose(layout))
    assert tflite.placed(packed, packed.value.transpose(layout) * 1.01) is None


@pytest.mark.parametrize("at", range(4, 8))
def test_a_file_that_is_not_one_never_reaches_the_runtime(
    file: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 0xFF
    (tmp_path / "bad.tflite").write_bytes(raw)
    monkeypatch.setattr("ai_edge_litert.interpreter.Interpreter", None)
    with pytest.raises(BadBundle, match=r"bad\.tflite"):
        litert.load(tmp_path / "bad.tflite", 1)


def test_a_tensor_that_says_it_is_larger_than_its_bytes_is_refused(file: Path, tmp_path: Path) -> None:
    model = tflite.read(file.read_bytes(), file)
    tensor = next(
        t for t in model.subgraphs[0].tensors if len(tflite.shape_of(t)) == 4 and tflite.data_of(model, t) is not None
    )
    tensor.shape = np.array([*tensor.shape[:-1], tensor.shape[-1] + 1000], np.int32)
    (tmp_path / "bad.tflite").write_bytes(tflite.file_bytes(model))
    with pytest.raises(BadBundle, match="bytes"):
        litert.load(tmp_path / "bad.tflite", 1)


def test_an_operator_that_names_a_tensor_outside_the_file_is_refused(file: Path, tmp_path: Path) -> None:
    model = tflite.read(file.read_bytes(), file)
    model.subgraphs[0].operators[2].inputs = np.array([9999], np.int32)
    (tmp_path / "bad.tflite").write_bytes(tflite.file_bytes(model))
    with pytest.raises(BadBundle, match="not there"):
        litert.load(tmp_path / "bad.tflite", 1)


def test_refusals_say_why() -> None:
    assert "4-bit activations" in str(litert.refuses(Precision("int4", "int4"), HERE))
    assert "dynamic" in str(litert.refuses(Precision("int8", "dynamic"), HERE))
    for able in (
        Precision(),
        Precision("float16", "float16"),
        INT8,
        Precision("int4", "int8"),
        Precision("int8", "float32"),
    ):
        assert litert.refuses(able, HERE) is None


def test_an_operator_without_lowering_is_named() -> None:
    common = {"aten.conv2d.default": 20, "aten.relu_.default": 3, "_operator.getitem": 2}
    assert litert.lacks(common, SHAPE) is None
    assert "torchvision.nms" in str(litert.lacks({**common, "torchvision.nms.default": 1}, SHAPE))


def test_what_the_converter_cannot_take_is_one_clear_line(tmp_path: Path) -> None:
    from lighten.errors import RefusedFormat

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x.mean(1))[1]

    with pytest.raises(RefusedFormat, match="LiteRT cannot convert"):
        litert.export(Odd(), SHAPE, tmp_path / "odd.tflite", Precision(), HERE)


def test_rewrites_of_the_graph_change_no_answer(plan: Any) -> None:
    """Float weights that are rounded again, aligned concatenations, outer biases: each exact on its own."""
    x = images(1)
    want = plan(x)
    graph = pt2e.one_image(plan, SHAPE)
    rewrites = (pt2e.with_float_weights, pt2e.with_aligned_cats, pt2e.with_outer_biases, pt2e.with_open_hardsigmoids)
    for rewrite in (lambda g: g, *rewrites):
        torch.testing.assert_close(rewrite(graph)(x), want, rtol=0, atol=2e-6)
