"""Normalisation and layout put inside a file: it takes the pixels themselves, uint8 (N, H, W, C)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lighten.types import Preprocess

PIXELS = "pixels"


def into_onnx(model: Any, how: Preprocess) -> Any:
    """Give an ONNX ModelProto the input `pixels` in place of its own: the arithmetic of `data.preprocess.normalize` in
    the same order, so that the network sees the same float32 values to the bit. Changes and returns `model`.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    old = graph.input[0].name
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    constants = {
        f"{PIXELS}_{name}": np.asarray(value, np.float32).reshape(1, -1, 1, 1)
        for name, value in (("largest", [255.0]), ("mean", how.mean), ("std", how.std))
    }
    steps: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
        ("Transpose", [PIXELS], {"perm": [0, 3, 1, 2]}),
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Div", [f"{PIXELS}_largest"], {}),
        ("Sub", [f"{PIXELS}_mean"], {}),
        ("Div", [f"{PIXELS}_std"], {}),
    )
    nodes, last = [], PIXELS
    for k, (kind, others, attributes) in enumerate(steps):
        made = old if k == len(steps) - 1 else f"{PIXELS}_{k}"
        nodes.append(helper.make_node(kind, [last, *others] if k else others, [made], f"{PIXELS}_{k}", **attributes))
        last = made
    size = [batch.dim_param or batch.dim_value, how.height, how.width, how.channels]
    graph.input[0].CopyFrom(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, size))
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return model


def into_openvino(model: Any, how: Preprocess) -> Any:
    """The same for an OpenVINO model, by its own PrePostProcessor; returns the model that it built."""
    import openvino as ov
    from openvino.preprocess import PrePostProcessor

    work = PrePostProcessor(model)
    given = work.input()
    given.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    given.model().set_layout(ov.Layout("NCHW"))
    given.preprocess().convert_element_type(ov.Type.f32).scale(255.0).mean(list(how.mean)).scale(list(how.std))
    return work.build()
