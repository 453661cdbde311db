"""A detector bundle whose answers can be worked out by hand: it finds squares of a grid that are red, green or blue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from test_bundle import own_answers, result_of

from conftest import trial
from lighten import bundle as bundles
from lighten.data.cache import sha256_file
from lighten.data.preprocess import normalize
from lighten.heads import Head, Level
from lighten.types import Artifact, Preprocess, Recipe

SIZE, CELL = 64, 16
NAMES, NAMES_ZH = ("red", "green", "blue"), ("红", "绿", "蓝")
HEAD = Head((Level(SIZE // CELL, SIZE // CELL, (float(CELL), float(CELL))),), len(NAMES))
FIT = Preprocess(SIZE, SIZE, "letterbox", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def model() -> Any:
    """Each square's class scores are 40 * (its mean colour) - 30, its box is the square itself. One colour at full strength
    scores 0.99995, the grey of a letterbox 0.0000056."""
    from onnx import TensorProto, helper, numpy_helper

    cells = (SIZE // CELL) ** 2
    held = {
        "flat": np.array([0, 3, cells], np.int64), "gain": np.float32(40), "off": np.float32(30),
        "nothing": np.float32(0), "half": np.full((1, cells, 4), 0.5, np.float32),
        "one": np.array([1], np.int64), "zero": np.array([0], np.int64), "last": np.array([2], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("AveragePool", ["input"], ["mean"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Reshape", ["mean", "flat"], ["row"]),
        helper.make_node("Transpose", ["row"], ["places"], perm=[0, 2, 1]),
        helper.make_node("Mul", ["places", "gain"], ["strong"]),
        helper.make_node("Sub", ["strong", "off"], ["logits"]),
        helper.make_node("Slice", ["logits", "zero", "one", "last"], ["first"]),
        helper.make_node("Mul", ["first", "nothing"], ["empty"]),
        helper.make_node("Add", ["empty", "half"], ["reach"]),
        helper.make_node("Concat", ["reach", "logits"], ["output"], axis=2),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", cells, HEAD.values])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def scenes(n: int) -> np.ndarray:
    """Input pixels (n, H, W, 3): black, with one square in one colour in each."""
    pixels: np.ndarray = np.zeros((n, SIZE, SIZE, 3), np.uint8)
    for k in range(n):
        y, x = divmod(k % 16, 4)
        pixels[k, y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL, k % 3] = 255
    return pixels


def write_detector(folder: Path, how: Preprocess = FIT, pixels: np.ndarray | None = None) -> Path:
    """A run folder with one trial of the detector, and its bundle."""
    recipe = Recipe()
    file = folder / "artifacts" / recipe.id / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(model().SerializeToString())
    won = trial(recipe)
    assert won.evidence is not None
    won = replace(
        won,
        artifact=Artifact(str(file.relative_to(folder)), "onnx", sha256_file(file)),
        evidence=replace(won.evidence, metric_name="mAP"),
    )
    result = replace(result_of(won, how), task="detection", head=HEAD, classes=NAMES, classes_zh=NAMES_ZH)
    pixels = scenes(20) if pixels is None else pixels
    return bundles.write(result, folder, pixels, own_answers(file, normalize(pixels, how)))
