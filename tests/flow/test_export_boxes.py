"""A finished run of a detector exported with boxes inside: the file gives them, the row proves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lighten
from lighten import exports
from lighten.bench import Timing
from lighten.data.box_images import BoxArrays
from lighten.data.splits import Split
from lighten.formats import onnx as onnx_format
from lighten.models.nano_detector import NanoDetector
from lighten.plugins import task_of
from lighten.report import read_result
from lighten.types import Asked, Data

SIDE = 64
HOW = lighten.Preprocess(SIDE, SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
QUICK = Timing(warmup=1, runs=3, least=2, seconds=0.2)


def noise(n: int, seed: int) -> BoxArrays:
    """Coarse noise, one box said to be in each image: nothing here is learned."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    labels = np.tile(np.array([0, 8, 8, 40, 40, 0], np.float32), (n, 1, 1))
    labels[:, 0, 0] = np.arange(n) % 2
    return BoxArrays(pixels, labels)


@pytest.fixture(scope="module")
def data() -> Data:
    counts = {"train": 48, "calibrate": 32, "select": 32, "report": 32}
    splits = {k: Split(noise(n, seed), np.arange(n)) for seed, (k, n) in enumerate(counts.items())}
    return Data("noise", ("a", "b"), ("甲", "乙"), fingerprint="noise", **splits)


def sure() -> NanoDetector:
    """Random weights whose scores reach from 0 to 1."""
    torch.manual_seed(0)
    net = NanoDetector(2, widths=(8, 16, 16, 16, 16), depths=(1, 1, 1, 1), neck=16, towers=1)
    net.train()(torch.randn(16, 3, SIDE, SIDE))
    with torch.no_grad():
        for head in net.heads:
            head.score.weight.normal_(0, 0.4)
            head.score.bias.fill_(-2.5)
    return net.eval()


@pytest.fixture(scope="module")
def run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = lighten.Settings(
        name="noise",
        out=tmp_path_factory.mktemp("runs"),
        formats=("onnx",),
        asked=Asked("ptq", "w8a8"),
        isolate=False,
        timing=QUICK,
    )
    return Path(lighten.compress(sure(), data, lighten.Budget(), preprocess=HOW, settings=settings).path)


@pytest.mark.usefixtures("in_process")
def test_files_with_boxes_inside_give_what_numpy_finds_and_the_rows_say_so(
    run: Path, data: Data, tmp_path: Path
) -> None:
    formats = ("onnx", "openvino")
    rows = exports.export(run, formats, ("float32", "plan"), data=data, timing=QUICK, with_nms=True)
    assert [r.status for r in rows] == ["PASS", "PASS", "refused", "refused"], rows
    assert rows[2].reason == "boxes are put inside files of onnx only"
    task, pixels = task_of(read_result(run)), data.report.pixels(HOW, slice(0, 5))
    x = data.report.inputs(HOW, slice(0, 5))
    for row in rows[:2]:
        onnx_format.take_boxes_out(run / row.path, tmp_path / "raw.onnx")
        raw = onnx_format.load(tmp_path / "raw.onnx", 1)
        assert row.title == f"{row.precision.title}, boxes out"
        assert (run / row.path).parent.name == f"onnx-{row.precision.weights}-boxes"
        assert "boxes in 32 images, 100.0 % as in numpy" in row.reason
        assert row.evidence.metric_name == "mAP"
        assert row.bytes == (run / row.path).stat().st_size > (tmp_path / "raw.onnx").stat().st_size
        found = onnx_format.load(run / row.path, 1)(x)
        wanted = task.shown(raw(x))
        assert len(found) == sum(map(len, wanted)) > 0
        for n, one in enumerate(wanted):
            np.testing.assert_allclose(found[found[:, 0] == n, 1:], one, rtol=1e-5, atol=1e-4)
    assert all(r.boxes for r in exports.read_record(run))
    (both,) = exports.export(
        run, ("onnx",), ("float32",), data=data, timing=QUICK, with_nms=True, bake_preprocessing=True
    )
    assert both.status == "PASS", both
    assert (run / both.path).parent.name == "onnx-float32-pixels-boxes"
    np.testing.assert_array_equal(
        onnx_format.load(run / both.path, 1)(pixels), onnx_format.load(run / rows[0].path, 1)(x)
    )


@pytest.mark.usefixtures("in_process")
def test_a_file_whose_boxes_are_not_numpys_fails(run: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the boxes of the images in another order."""
    real = exports.boxes_found
    monkeypatch.setattr(exports, "boxes_found", lambda wanted, *rest: real(wanted[::-1], *rest))
    (row,) = exports.export(run, ("onnx",), ("float32",), data=data, timing=QUICK, with_nms=True)
    assert row.status == "FAIL"
    assert "% as in numpy" in row.reason


def test_the_record_is_plain_json(run: Path) -> None:
    record = json.loads((run / exports.FOLDER / exports.RECORD).read_text())
    assert any(r["boxes"] for r in record)
