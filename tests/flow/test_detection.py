"""Whole walks with a detector: trained here in seconds on squares, compressed, its files held to what it finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lighten
from lighten.bench import Timing
from lighten.data.box_images import BoxArrays
from lighten.data.splits import Split
from lighten.errors import BadConfig, BadData, BadModel
from lighten.heads import Head
from lighten.models.nano_detector import NanoDetector
from lighten.types import Data, Precision, Preprocess, Result, from_json

QUICK = Timing(warmup=1, runs=5, least=2, seconds=0.2)
SIDE = 64
HOW = Preprocess(SIDE, SIDE, "letterbox", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
COUNTS = {"train": 384, "calibrate": 64, "select": 96, "report": 96}


def squares(n: int, seed: int) -> BoxArrays:
    """Noise with one or two squares: class 0 is red, class 1 is blue."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 140, (n, SIDE, SIDE, 3)).astype(np.uint8)
    labels = np.tile(np.array([-1, 0, 0, 0, 0, 0], np.float32), (n, 2, 1))
    for image, rows in zip(pixels, labels):
        for k in range(rng.integers(1, 3)):
            side, kind = int(rng.integers(14, 28)), int(rng.integers(2))
            x, y = int(rng.integers(0, SIDE // 2 - side // 2)) + k * SIDE // 2, int(rng.integers(0, SIDE - side))
            x = min(x, SIDE - side)
            image[y : y + side, x : x + side] = (230, 30, 30) if kind == 0 else (30, 30, 230)
            rows[k] = kind, x, y, x + side, y + side, 0
    return BoxArrays(pixels, labels)


@pytest.fixture(scope="module")
def data() -> Data:
    splits = {k: Split(squares(n, seed), np.arange(n)) for seed, (k, n) in enumerate(COUNTS.items())}
    return Data("squares", ("red", "blue"), ("红", "蓝"), fingerprint="squares", **splits)


def small() -> NanoDetector:
    torch.manual_seed(0)
    return NanoDetector(2, widths=(8, 16, 24, 32, 32), depths=(1, 1, 1, 1), neck=24, towers=1)


@pytest.fixture(scope="module")
def model(data: Data) -> NanoDetector:
    from lighten.data import framed
    from lighten.kit.fit import FitSettings, fit
    from lighten.plugins import task_of
    from lighten.types import Device, Job

    net, placed = small(), framed(data, HOW)
    job = Job(placed, "detection", Device("", "", "", ()), HOW, head=net.head(HOW.input_shape))
    task = task_of(job)
    settings = FitSettings(8, 32, 0.004, "adamw", ema=0.9, shift=0.1)
    return fit(net, settings, lambda m, x, y: task.loss(m, x, y), job)


@pytest.fixture(scope="module")
def run(model: NanoDetector, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Result:
    settings = lighten.Settings(
        out=tmp_path_factory.mktemp("runs"),
        formats=("onnx", "openvino"),
        precisions=("int8",),
        sensitivity=True,
        isolate=False,
        timing=QUICK,
    )
    return lighten.compress(model, data, lighten.Budget(max_drop=5), preprocess=HOW, settings=settings)


def trial(run: Result, format: str, weights: str) -> lighten.types.Trial:
    return next(t for t in run.trials if (t.recipe.format, t.recipe.precision.weights) == (format, weights))


def test_the_original_finds_the_squares_and_the_record_says_by_which_measure(run: Result) -> None:
    evidence = run.baseline.evidence
    assert evidence is not None
    assert (run.task, evidence.metric_name) == ("detection", "mAP")
    assert evidence.metric.value > 30
    assert {name for name, _ in evidence.extra} >= {"AP50", "AP75"}
    assert [c.name for c in evidence.classes] == ["red", "blue"]


def test_int8_files_find_the_same_boxes_as_their_plan_and_nearly_those_of_the_original(run: Result) -> None:
    for format in ("onnx", "openvino"):
        evidence = trial(run, format, "int8").evidence
        assert evidence is not None
        assert evidence.fidelity.same_top1 > 97
        assert evidence.drift.boxes is not None
        assert evidence.drift.boxes.iou > 0.95
        assert evidence.drop.value < 3


def test_the_score_of_the_file_is_that_of_pycocotools(run: Result, data: Data) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    evaluate = pytest.importorskip("pycocotools.cocoeval")
    from lighten import bench
    from lighten.kit.average_precision import as_coco, as_results
    from lighten.plugins import task_of

    file = Path(run.path) / run.baseline.artifact.path
    outputs = bench.measure(file, "onnx", data.select.pixels(HOW), HOW, timing=None).outputs
    truth = coco.COCO()
    truth.dataset = as_coco(data.select.labels, 2)
    truth.createIndex()
    judge = evaluate.COCOeval(truth, truth.loadRes(as_results(task_of(run).found(outputs))), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert run.baseline.evidence.metric.value == pytest.approx(100 * judge.stats[0], abs=1e-6)


def test_nothing_is_rounded_between_the_heads_and_the_answer(model: NanoDetector, data: Data) -> None:
    """Box numbers and class scores that share one scale after a concatenation are what kills detectors."""
    from lighten import devices
    from lighten.quant.plan import quantize

    x = torch.from_numpy(data.calibrate.inputs(HOW))
    graph = quantize(model, HOW.input_shape, x.split(32), Precision("int8", "int8"), devices.load("x86-vnni")).module
    at, seen = next(n for n in graph.graph.nodes if n.op == "output"), []
    todo = list(at.all_input_nodes)
    while todo:
        node = todo.pop()
        seen.append(str(node.target))
        if "conv2d" not in str(node.target):
            todo += node.all_input_nodes
    assert sum("conv2d" in name for name in seen) == len(model.head_layers())
    assert not [name for name in seen if "quantize" in name]


def test_each_layer_was_weighed_by_what_it_does_to_boxes_and_scores(run: Result, model: NanoDetector) -> None:
    layers = {row.layer for row in run.sensitivity}
    assert set(model.head_layers()) <= layers
    assert all(row.damage >= 0 and row.drop is None for row in run.sensitivity)
    assert max(row.damage for row in run.sensitivity if row.weights == "int4") > 0


def test_the_result_reads_back_with_its_head(run: Result, model: NanoDetector) -> None:
    again = from_json(Result, json.loads((Path(run.path) / "result.json").read_text()))
    assert again.head == model.head(HOW.input_shape)
    assert isinstance(again.head, Head)


def test_a_detector_is_narrowed_and_taught_by_its_original(model: NanoDetector, data: Data, tmp_path: Path) -> None:
    from lighten.types import Step

    settings = lighten.Settings(
        out=tmp_path,
        formats=("onnx",),
        precisions=("float32",),
        steps=(
            Step("channel_prune", (("ratio", 0.5),)),
            Step("distill", (("epochs", 3.0), ("lr", 0.02), ("batch", 32))),
        ),
        isolate=False,
        timing=QUICK,
    )
    got = lighten.compress(model, data, lighten.Budget(), preprocess=HOW, settings=settings)
    narrow = next(t for t in got.trials if t.recipe.steps)
    assert narrow.evidence is not None, narrow.failure
    assert narrow.evidence.size.bytes < 0.8 * got.baseline.evidence.size.bytes
    assert narrow.evidence.metric.value > 10
    heads = {s.name: s.outputs for s in narrow.network if s.name.startswith("heads.") and s.name.count(".") == 2}
    assert heads == {s.name: s.outputs for s in got.baseline.network if s.name in heads}


def test_what_lighten_train_writes_says_itself_what_it_is_and_how_it_wants_its_images(tmp_path: Path) -> None:
    from lighten.frontdesk import ModelIn, load_model
    from lighten.models.train import train

    config = tmp_path / "detector.yaml"
    config.write_text(
        "arch: lighten:nano_detector\ndata: composed-demo\nout: unused\n"
        "preprocess: {height: 160, width: 160, mode: letterbox}\n"
        "fit: {epochs: 1, batch: 16, optimizer: adamw, lr: 0.001}\n"
    )
    record = train(config, out=tmp_path / "out", log=lambda line: None)
    assert (record["metric"], record["scores"]["report"]["n"]) == ("mAP", 32)
    loaded = load_model(ModelIn(str(tmp_path / "out/model.safetensors")))
    assert loaded.arch == "lighten:nano_detector"
    assert loaded.module.num_classes == 10
    assert loaded.preprocess is not None
    assert (loaded.preprocess.height, loaded.preprocess.mode) == (160, "letterbox")


# --- mistakes ---------------------------------------------------------------------------------------------


def test_a_classifier_on_boxes_is_refused(data: Data, tmp_path: Path) -> None:
    from lighten.models.resnet import resnet20

    with pytest.raises(BadModel, match="no detector"):
        lighten.compress(resnet20(2), data, preprocess=HOW, settings=lighten.Settings(out=tmp_path))


def test_another_number_of_classes_is_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="has 3 classes, the data 2"):
        lighten.compress(NanoDetector(3), data, preprocess=HOW, settings=lighten.Settings(out=tmp_path))


def test_a_task_that_the_data_is_not_for_is_refused(model: NanoDetector, data: Data, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="labels of squares are boxes"):
        lighten.compress(model, data, preprocess=HOW, settings=lighten.Settings(out=tmp_path, task="classification"))
    with pytest.raises(BadConfig, match="no boxes"):
        lighten.compress(model, "demo", preprocess=HOW, settings=lighten.Settings(out=tmp_path, task="detection"))


def test_a_detector_without_boxes_to_learn_from_is_refused(model: NanoDetector, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"is a detector, but .* has no boxes"):
        lighten.compress(model, "demo", preprocess=HOW, settings=lighten.Settings(out=tmp_path))


def test_a_detector_of_two_stages_is_refused_by_name() -> None:
    from lighten.errors import UnknownName
    from lighten.models.load import build

    with pytest.raises(UnknownName, match="of one stage named 'fasterrcnn_resnet50_fpn'"):
        build("torchvision:fasterrcnn_resnet50_fpn", classes=3)


def test_data_without_any_box_is_refused(model: NanoDetector, data: Data, tmp_path: Path) -> None:
    import dataclasses

    bare = squares(32, 9)
    bare.labels[..., 0] = -1
    empty = dataclasses.replace(data, select=Split(bare, np.arange(32)))
    with pytest.raises(BadData, match="none of the 32 images has a box"):
        lighten.compress(model, empty, preprocess=HOW, settings=lighten.Settings(out=tmp_path))


def test_a_side_that_the_detector_cannot_take_is_refused(model: NanoDetector, data: Data, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="multiples of 32"):
        lighten.compress(
            model, data, preprocess=Preprocess(72, 72, "letterbox"), settings=lighten.Settings(out=tmp_path)
        )
