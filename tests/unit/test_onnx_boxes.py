"""Boxes inside an ONNX file: what ONNX Runtime finds is what numpy and torchvision find, for every kind of head."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lighten.errors import BadModel
from lighten.heads import Head, Level
from lighten.kit import boxes, onnx_boxes
from lighten.kit.onnx_boxes import BoxRules, boxes_found
from lighten.types import Beside, Device, Precision, from_json, to_json

POINTS = (Level(8, 10, (8.0, 8.0)), Level(4, 5, (16.0, 16.0)))
ANCHORED = (
    Level(6, 8, (12.0, 10.0), 0.5, ((16.0, 32.0), (40.0, 20.0))),
    Level(2, 2, (40.0, 32.0), 0.0, ((64.0, 64.0),)),
)
KINDS = itertools.product(("distances", "distribution", "offsets"), ("sigmoid", "softmax"), (False, True))
HEADS = {
    f"{box}-{score}{'-centerness' if centre else ''}": Head(
        ANCHORED if box == "offsets" else POINTS,
        4,
        box,
        score,
        centre,
        7 if box == "distribution" else 0,
        (10.0, 10.0, 5.0, 5.0),
    )
    for box, score, centre in KINDS
}
SIZE = (80, 64)


def raw_model(head: Head, opset: int = 20) -> Any:
    """A file whose raw outputs are what it is given."""
    shape = ["batch", head.places, head.values]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "raw", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def found_by(model: Any, raw: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": raw})
    assert found.dtype == np.float32
    return found


def outputs_of(head: Head, images: int = 3, seed: int = 0) -> np.ndarray:
    """Boxes that overlap, and scores of which some are high."""
    raw = np.random.default_rng(seed).normal(0, 2, (images, head.places, head.values)).astype(np.float32)
    raw[..., :4] *= 1 if head.box == "distribution" else 3
    return raw


def same(found: np.ndarray, wanted: tuple[np.ndarray, ...]) -> None:
    """Every image's rows, in the same order."""
    assert found.shape[1:] == (7,)
    assert np.array_equal(found[:, 0], np.repeat(np.arange(len(wanted)), [len(w) for w in wanted]))
    np.testing.assert_allclose(found[:, 1:5], np.concatenate(wanted)[:, :4], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found[:, 5], np.concatenate(wanted)[:, 4], rtol=1e-5)
    np.testing.assert_array_equal(found[:, 6], np.concatenate(wanted)[:, 5])


@pytest.mark.parametrize("name", HEADS)
def test_every_kind_of_head_gives_numpys_boxes(name: str) -> None:
    head, raw = HEADS[name], outputs_of(HEADS[name])
    for threshold, iou, most, size in ((0.3, 0.6, 100, SIZE), (0.05, 0.3, 100, None), (0.1, 0.45, 6, SIZE)):
        model = onnx_boxes.into_onnx(raw_model(head), BoxRules(head, size, threshold, iou, most))
        onnx.checker.check_model(model, full_check=True)
        wanted = boxes.detections(raw, head, threshold, iou, most, size=size)
        assert min(map(len, wanted)) > 0
        same(found_by(model, raw), wanted)


@pytest.mark.parametrize("name", HEADS)
def test_suppression_is_torchvisions(name: str) -> None:
    import torch
    from torchvision.ops import batched_nms, clip_boxes_to_image

    head, raw = HEADS[name], outputs_of(HEADS[name], 1, seed=1)
    found = found_by(onnx_boxes.into_onnx(raw_model(head), BoxRules(head, SIZE, 0.2, 0.5, 40)), raw)
    corners, scores = (torch.from_numpy(a[0]) for a in boxes.decode(raw, head))
    place, kind = torch.nonzero(scores > 0.2, as_tuple=True)
    corners, score = clip_boxes_to_image(corners[place], SIZE[::-1]), scores[place, kind]
    whole = ((corners[:, 2:] - corners[:, :2]) > 0).all(1)
    corners, score, kind = corners[whole], score[whole], kind[whole]
    kept = batched_nms(corners, score, kind, 0.5)[:40]
    assert len(kept) > 3
    same(found, (torch.column_stack([corners[kept], score[kept], kind[kept]]).numpy(),))


def test_an_image_gives_the_same_alone_and_among_others() -> None:
    head = HEADS["distribution-sigmoid"]
    raw, model = outputs_of(head, 3), onnx_boxes.into_onnx(raw_model(head), BoxRules(head, SIZE))
    together = found_by(model, raw)
    for n in range(3):
        alone = found_by(model, raw[n : n + 1])
        np.testing.assert_array_equal(alone[:, 1:], together[together[:, 0] == n, 1:])
        assert not alone[:, 0].any()


@pytest.mark.parametrize("name", ["distances-sigmoid", "offsets-softmax"])
def test_nothing_found_is_no_row(name: str) -> None:
    head, raw = HEADS[name], outputs_of(HEADS[name])
    raw[:, :, head.numbers :] = -30
    if head.score == "softmax":
        raw[:, :, head.numbers] = 30  # the background
    model = onnx_boxes.into_onnx(raw_model(head), BoxRules(head, SIZE))
    assert found_by(model, raw[:1]).shape == (0, 7)
    raw[1] = outputs_of(head, 3)[1]
    found = found_by(model, raw)
    assert set(found[:, 0]) == {1}


def test_more_boxes_than_are_looked_at() -> None:
    """20,000 scores above the threshold: the best thousand count, as in numpy."""
    head = Head((Level(80, 125, (1.0, 1.0)),), 2)
    rng = np.random.default_rng(5)
    raw = rng.uniform(0, 8, (2, head.places, head.values)).astype(np.float32)
    apart = np.linspace(-0.8, 2, head.places * head.classes)  # far enough for two ways of rounding a sigmoid
    raw[..., 4:] = [rng.permutation(apart).reshape(head.places, head.classes) for _ in raw]
    model = onnx_boxes.into_onnx(raw_model(head), BoxRules(head, None, 0.3, 0.6, 300))
    wanted = boxes.detections(raw, head, 0.3, 0.6, 300)
    assert min(map(len, wanted)) > 150
    same(found_by(model, raw), wanted)


def test_of_equal_scores_the_first_wins() -> None:
    head = Head((Level(30, 30, (8.0, 8.0)),), 2)
    raw = np.ones((2, head.places, head.values), np.float32)
    raw[1, ::3, 4:] = 2
    for most in (7, 1000):
        model = onnx_boxes.into_onnx(raw_model(head), BoxRules(head, None, 0.3, 0.4, most))
        same(found_by(model, raw), boxes.detections(raw, head, 0.3, 0.4, most))


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("name", ["distances-sigmoid-centerness", "distribution-softmax", "offsets-sigmoid"])
def test_what_is_not_finite_or_has_no_area_is_never_found(name: str, size: tuple[int, int] | None) -> None:
    head, raw = HEADS[name], outputs_of(HEADS[name])
    raw[0, ::2, 0], raw[0, 1::4, -1], raw[1, ::3, 2], raw[2, ::2, -1] = np.nan, np.inf, -np.inf, np.nan
    raw[2, 1::2, :4] = -1e30 if head.box == "distances" else 3e38
    found = found_by(onnx_boxes.into_onnx(raw_model(head), BoxRules(head, size, 0.1)), raw)
    assert np.isfinite(found).all()
    assert (found[:, 3:5] > found[:, 1:3]).all()
    same(found, boxes.detections(raw, head, 0.1, size=size))


def test_the_file_says_what_it_gives_and_holds_its_thresholds() -> None:
    head = HEADS["distances-sigmoid"]
    model = onnx_boxes.into_onnx(raw_model(head), BoxRules(head, SIZE, 0.25, 0.5, 9))
    (output,) = model.graph.output
    assert output.name == "boxes"
    assert output.doc_string == "float32 (found, 7): image, x1, y1, x2, y2, score, class, in pixels of the input"
    held = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    assert (held["boxes_threshold"], held["boxes_iou"], held["boxes_most"]) == (np.float32([0.25]), [0.5], [9])
    assert {n.domain for n in model.graph.node} == {""}


def test_another_threshold_can_be_written_into_the_file() -> None:
    head, raw = HEADS["distances-sigmoid"], outputs_of(HEADS["distances-sigmoid"])
    model = onnx_boxes.into_onnx(raw_model(head), BoxRules(head, SIZE, 0.25))
    (held,) = (c for c in model.graph.initializer if c.name == "boxes_threshold")
    held.CopyFrom(onnx.numpy_helper.from_array(np.float32([0.7]), held.name))
    same(found_by(model, raw), boxes.detections(raw, head, 0.7, size=SIZE))


def test_boxes_come_out_again() -> None:
    head = HEADS["distribution-sigmoid"]
    model = onnx_boxes.into_onnx(raw_model(head), BoxRules(head, SIZE))
    assert onnx_boxes.out_of_onnx(model) == raw_model(head)
    with pytest.raises(BadModel, match="no boxes inside"):
        onnx_boxes.out_of_onnx(model)


def test_a_head_of_another_network_is_refused() -> None:
    with pytest.raises(BadModel, match=r"\[100, 8\].*describes \[100, 9\]"):
        onnx_boxes.into_onnx(raw_model(HEADS["distances-sigmoid"]), BoxRules(HEADS["distances-softmax"]))
    with pytest.raises(BadModel, match="operator set 17"):
        onnx_boxes.into_onnx(raw_model(HEADS["distances-sigmoid"], 17), BoxRules(HEADS["distances-sigmoid"]))


@pytest.mark.parametrize("name", HEADS)
def test_rules_pass_through_json(name: str) -> None:
    rules = BoxRules(HEADS[name], SIZE, 0.2, 0.5, 7)
    assert from_json(BoxRules, to_json(rules)) == rules


@pytest.fixture(scope="module")
def detector() -> Any:
    """A small nano_detector of random weights and batch statistics, whose boxes are sure of themselves."""
    import torch

    from lighten.models.nano_detector import NanoDetector

    torch.manual_seed(0)
    net = NanoDetector(3, widths=(8, 16, 16, 16, 16), depths=(1, 1, 1, 1), neck=16, towers=1)
    net.train()(torch.randn(16, 3, 64, 96))
    with torch.no_grad():
        for head in net.heads:
            head.score.weight.normal_(0, 0.4)
            head.score.bias.fill_(-1.0)
    return net.eval()


@pytest.mark.parametrize("precision", [Precision(), Precision("float16", "float16"), Precision("int8", "int8")])
def test_files_of_every_precision_give_the_boxes_of_their_raw_outputs(
    detector: Any, here: Device, precision: Precision, tmp_path: Path
) -> None:
    import torch

    from lighten.formats import onnx as format
    from lighten.quant.plan import quantize

    shape, x = (3, 64, 96), np.random.default_rng(0).normal(0, 1, (5, 3, 64, 96)).astype(np.float32)
    module = detector
    if precision.quantized:
        module = quantize(detector, shape, [torch.from_numpy(x)], precision, here).module
    path, back = tmp_path / "model.onnx", tmp_path / "back.onnx"
    format.export(module, shape, path, precision, here)
    raw = format.load(path, 1)(x)
    head = detector.head(shape)
    format.put_boxes_in(path, BoxRules(head, (96, 64), 0.3, 0.5))
    wanted = boxes.detections(raw, head, 0.3, 0.5, size=(96, 64))
    assert min(map(len, wanted)) > 2
    same(format.load(path, 1)(x), wanted)
    format.take_boxes_out(path, back)
    np.testing.assert_array_equal(format.load(back, 1)(x), raw)


def test_boxes_are_counted_against_numpys() -> None:
    one = np.array([[0, 0, 10, 10, 0.9, 1], [20, 20, 30, 30, 0.5, 0]], np.float32)
    given = np.column_stack([[0, 0, 1], np.array([one[0], one[1] + [5, 0, 5, 0, 0, 0], one[0]])]).astype(np.float32)
    found = boxes_found((one, one[:1]), given, Beside((3.0, 4.0, 5.0), (1.0, 2.0, 9.0)))
    assert (found.images, found.given, found.wanted, found.both, found.added_ms) == (2, 3, 3, 2, 2.0)
    assert str(found) == "3 boxes in 2 images, 66.7 % as in numpy, +2.00 ms for them"
    nothing = boxes_found((one[:0],), given[:0])
    assert str(nothing) == "0 boxes in 1 images, 100.0 % as in numpy"
