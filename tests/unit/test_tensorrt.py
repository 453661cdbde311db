"""The graph that TensorRT is given: its rules, a symmetric plan, the command that builds the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lighten.errors import MissingBackend
from lighten.formats import onnx as onnx_format
from lighten.formats import tensorrt
from lighten.kit.tensorrt_rules import broken_rules, make_symmetric
from lighten.types import Device, Precision
from nets import SHAPE, images

INT8 = Precision("int8", "int8")


@pytest.fixture(scope="module")
def file(module_of: Callable[[str, str], Any], here: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trt") / "model.trt.onnx"
    tensorrt.export(module_of("small", "int8"), SHAPE, path, INT8, here)
    return path


def test_every_zero_point_is_0_every_integer_int8_and_every_bias_float(file: Path) -> None:
    model = onnx.load(file)
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    quantizing = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizing) > 10
    for node in quantizing:
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    for node in (n for n in model.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2):
        assert node.input[2] not in makers
    assert broken_rules(model) == ()


def test_the_plain_int8_file_breaks_rules_that_are_named(
    module_of: Callable[[str, str], Any], here: Device, tmp_path: Path
) -> None:
    onnx_format.export(module_of("small", "int8"), SHAPE, tmp_path / "m.onnx", INT8, here)
    broken = " ".join(broken_rules(onnx.load(tmp_path / "m.onnx")))
    assert "zero point" in broken
    assert "bias" in broken


def test_a_symmetric_scale_covers_the_range_it_replaces() -> None:
    """zero point -128, scale 0.1: 0 to 25.5, so that 127 steps of 25.5 / 127 reach it."""
    scale, zero = np.array(0.1, np.float32), np.array(-128, np.int8)
    nodes = [onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
             onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]  # fmt: skip
    value = [onnx.helper.make_tensor_value_info(n, 1, [4]) for n in "xy"]
    graph = onnx.helper.make_graph(
        nodes, "g", value[:1], value[1:], [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")]
    )
    model = onnx.helper.make_model(graph)
    assert make_symmetric(model) == 1
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node in model.graph.node:
        assert float(constants[node.input[1]]) == pytest.approx(25.5 / 127)
        assert int(constants[node.input[2]]) == 0


def test_the_prepared_file_answers_like_the_plan(file: Path, module_of: Callable[[str, str], Any]) -> None:
    import torch

    x = images(48, seed=7)[0]
    with torch.inference_mode():
        want = module_of("small", "int8")(x).numpy()
    got = onnx_format.load(file, 1)(x.numpy())
    assert (got.argmax(1) == want.argmax(1)).mean() >= 0.95
    assert tensorrt.check(file, module_of("small", "int8"), SHAPE) == ()


def test_what_was_widened_is_said_and_the_command_is_beside_the_file(file: Path) -> None:
    (line,) = tensorrt.fallbacks(file)
    assert "symmetric" in line
    words = file.with_name("build.sh").read_text().splitlines()[-1].split()
    assert words[0] == "trtexec"
    assert {"--onnx=model.trt.onnx", "--saveEngine=model.engine", "--int8", "--fp16"} <= set(words)
    assert "--maxShapes=input:32x3x16x16" in words


def test_without_a_gpu_the_runtime_is_missing_and_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_has_gpu", lambda: False)
    assert "GPU" in str(tensorrt.not_here())
    with pytest.raises(MissingBackend, match="TensorRT"):
        tensorrt.load(file, 1)


@pytest.mark.parametrize(
    "precision", [Precision("int4", "int8"), Precision("int8", "float32"), Precision("int8", "dynamic")]
)
def test_what_tensorrt_does_not_run_is_refused(precision: Precision, here: Device) -> None:
    assert "TensorRT" in str(tensorrt.refuses(precision, here))
