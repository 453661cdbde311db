"""ONNX files as input: the same answers in torch, and every hostile file refused with its reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnx2torch")
from lighten.errors import BadModel
from lighten.kit.onnx_graph import to_onnx
from lighten.models import onnx_in
from nets import SHAPE, images, net


def write(model: Any, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def graph(nodes: list[Any], stored: list[Any] = [], out: str = "y") -> Any:  # noqa: B006
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])
    y = helper.make_tensor_value_info(out, TensorProto.FLOAT, ["batch", 768])
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=opset)


FLATTEN = helper.make_node("Flatten", ["x"], ["y"])


@pytest.mark.parametrize("name", ["small", "mobile"])
def test_a_network_comes_back_with_its_answers(name: str, tmp_path: Path) -> None:
    from lighten.kit.trace import trace

    module, shape = onnx_in.load(write(to_onnx(net(name), SHAPE), tmp_path / "m.onnx"))
    assert shape == SHAPE
    x = images(6, seed=1)[0]
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), net(name)(x).numpy(), atol=1e-4)
    trace(module, SHAPE)  # it can be exported again
    assert sum(isinstance(m, torch.nn.Conv2d) for m in module.modules()) > 3


def test_an_unknown_custom_operator_is_named(tmp_path: Path) -> None:
    model = graph([helper.make_node("Sharpen", ["x"], ["z"], domain="acme"), helper.make_node("Flatten", ["z"], ["y"])])
    with pytest.raises(BadModel, match="Sharpen of the domain acme"):
        onnx_in.read(write(model, tmp_path / "m.onnx"))


def test_a_loop_is_refused_before_it_runs(tmp_path: Path) -> None:
    true = numpy_helper.from_array(np.array(True), "go")
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)],
    )  # fmt: skip
    forever = helper.make_node("Loop", ["", "go", "x"], ["z"], body=body)
    with pytest.raises(BadModel, match="Loop"):
        onnx_in.load(write(graph([forever, helper.make_node("Flatten", ["z"], ["y"])], [true]), tmp_path / "m.onnx"))


def test_a_memory_bomb_dies_in_the_child_and_not_here(tmp_path: Path) -> None:
    """A kilobyte that asks for a terabyte."""
    sizes = numpy_helper.from_array(np.array([1 << 20, 1 << 10, 1 << 8], np.int64), "sizes")
    nodes = [
        helper.make_node("ConstantOfShape", ["sizes"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["total"], keepdims=0),
        helper.make_node("Add", ["x", "total"], ["z"]),
        helper.make_node("Flatten", ["z"], ["y"]),
    ]
    with pytest.raises(BadModel):
        onnx_in.load(write(graph(nodes, [sizes]), tmp_path / "m.onnx"))


@pytest.mark.parametrize("how", ["parent", "absolute", "symlink", "hard link", "missing", "folder link"])
def test_tensors_outside_the_models_folder_are_refused(how: str, tmp_path: Path) -> None:
    outside, home = tmp_path / "secret.bin", tmp_path / "home"
    outside.write_bytes(np.zeros(768, np.float32).tobytes())
    home.mkdir()
    location = {"parent": "../secret.bin", "absolute": str(outside), "folder link": "away/secret.bin"}.get(how, "w.bin")
    if how == "symlink":
        (home / "w.bin").symlink_to(outside)
    if how == "hard link":
        os.link(outside, home / "w.bin")
    if how == "folder link":
        (home / "away").symlink_to(tmp_path)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[768], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("length", str(768 * 4))):
        tensor.external_data.add(key=key, value=value)
    model = graph([helper.make_node("Flatten", ["x"], ["z"]), helper.make_node("Add", ["z", "w"], ["y"])], [tensor])
    with pytest.raises(BadModel, match=r"missing" if how == "missing" else r"outside|link"):
        onnx_in.read(write(model, home / "m.onnx"))


def test_tensors_beside_the_model_are_read(tmp_path: Path) -> None:
    model = to_onnx(net("small"), SHAPE)
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    got = onnx_in.read(tmp_path / "m.onnx")
    assert sum(len(i.raw_data) for i in got.graph.initializer) > 200_000


@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "truncated"])
def test_what_is_no_onnx_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if damage != "missing":
        raw = write(to_onnx(net("small"), SHAPE), path).read_bytes()
        path.write_bytes({"empty": b"", "noise": bytes(range(1, 255)) * 40, "truncated": raw[: len(raw) // 2]}[damage])
    with pytest.raises(BadModel, match=r"m\.onnx"):
        onnx_in.read(path)


def test_a_quantized_file_is_no_input(module_of: Any, tmp_path: Path) -> None:
    path = write(to_onnx(module_of("small", "int8"), SHAPE), tmp_path / "m.onnx")
    with pytest.raises(BadModel, match="quantized already"):
        onnx_in.read(path)


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    model = graph([FLATTEN])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    with pytest.raises(BadModel, match="2 inputs"):
        onnx_in.input_shape(model, tmp_path / "m.onnx")
