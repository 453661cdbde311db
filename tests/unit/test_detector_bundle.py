"""A detector's bundle: its manifest, its own runner beside lighten's code, what is refused, what is found again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")

from quadrants import CELL, FIT, HEAD, NAMES, NAMES_ZH, SIZE, write_detector
from test_bundle import change, golden_with, photos  # noqa: F401 - a fixture

from lighten import bundle as bundles
from lighten import plugins
from lighten.data.cache import sha256_file
from lighten.data.images import open_image
from lighten.data.preprocess import frame_of, normalize, to_pixels
from lighten.errors import BadBundle
from lighten.examples import examples
from lighten.heads import Head, Level
from lighten.kit import boxes
from lighten.runner import answers
from lighten.types import Preprocess, to_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """128 x 64, black, a blue square from (32, 0) to (64, 32): one cell of the letterboxed input."""
    pixels: np.ndarray = np.zeros((64, 128, 3), np.uint8)
    pixels[0:32, 32:64, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


# --- what is written --------------------------------------------------------------------------------


def test_the_manifest_says_how_raw_values_become_boxes(made: Path) -> None:
    found = bundles.load(made)
    manifest = found.manifest
    assert manifest["task"] == "detection"
    assert manifest["output"]["shape"] == ["batch", HEAD.places, HEAD.values]
    assert manifest["detection"] == {"threshold": 0.3, "floor": 0.01, "iou": 0.6, "most": 100}
    assert found.head == HEAD
    assert (found.task.head, found.task.size) == (HEAD, (SIZE, SIZE))
    assert {f.name for f in made.iterdir()} == {"model.onnx", "golden.npz", "run.py", "labels.txt", "README.md", "manifest.json"}  # fmt: skip


def test_the_readme_speaks_of_a_detector_in_both_languages(made: Path) -> None:
    text = (made / "README.md").read_text("utf-8")
    english, chinese = text.split("## 中文")
    for part in (english, chinese):
        assert "mAP" in part
        assert "--draw" in part
        assert "batch x 16 x 7" in part
        assert "softmax" not in part
        assert "top-1" not in part.lower()
    assert "{" not in text
    assert "<!--" not in text


def test_a_detector_gets_no_examples_of_classifiers(made: Path) -> None:
    manifest = bundles.load(made).manifest
    assert all(examples(format, manifest) == {} for format in plugins.names("formats"))


def test_large_raw_outputs_make_fewer_golden_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "GOLDEN_BYTES", 3 * 4 * HEAD.places * HEAD.values)
    golden = bundles.load(write_detector(tmp_path)).golden()
    assert len(golden["pixels"]) == len(golden["outputs"]) == 3


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, value",
    [
        (("head",), None),
        (("head",), 7),
        (("head", "levels"), []),
        (("head", "levels"), [{"rows": 4}]),
        (("head", "levels", 0, "rows"), "4"),
        (("head", "levels", 0, "rows"), 0),
        (("head", "levels", 0, "step"), [1.0]),
        (("head", "levels", 0, "offset"), None),
        (("head", "classes"), 2.5),
        (("head", "classes"), 99),
        (("head", "box"), "polar"),
        (("head", "bins"), "8"),
        (("head", "centerness"), 3),
        (("head", "clip"), "big"),
        (("detection",), None),
        (("detection", "threshold"), "high"),
        (("detection", "threshold"), 1.5),
        (("detection", "most"), 0),
        (("detection", "most"), 2.5),
        (("detection", "colour"), 1),
        (("labels",), []),
        (("labels", 0, "name"), 3),
        (("task",), 4),
    ],
)
def test_a_damaged_head_is_a_bad_bundle(folder: Path, path: tuple[Any, ...], value: Any) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        inner: Any = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    change(folder, edit)
    with pytest.raises(BadBundle, match=r"manifest\.json"):
        bundles.load(folder)


@pytest.mark.parametrize("key", ["head", "detection"])
def test_a_detector_without_its_head_is_a_bad_bundle(folder: Path, key: str) -> None:
    change(folder, lambda m: m.pop(key))
    with pytest.raises(BadBundle, match=key):
        bundles.load(folder)


# --- verify -----------------------------------------------------------------------------------------


def test_verify_counts_boxes_that_are_found_again(made: Path, folder: Path) -> None:
    assert bundles.verify(bundles.load(made)) == (True, "16 of 16 golden boxes are found again, outputs differ by at most 0 (allowed 0.003)")  # fmt: skip
    outputs = bundles.load(folder).golden()["outputs"].copy()
    outputs[0, :, :4] = 0.2  # its box is far smaller
    passed, text = bundles.verify(golden_with(folder, outputs=outputs))
    assert not passed
    assert text.startswith("15 of 16 golden boxes")


def test_boxes_of_nothing_are_counted_as_wrong(made: Path) -> None:
    found = bundles.load(made)
    outputs = found.golden()["outputs"]
    empty = outputs.copy()
    empty[:, :, 4:] = -9
    assert found.again(empty, empty) == (0, 0, "boxes")
    assert found.again(empty, outputs) == (0, 16, "boxes")
    assert found.again(outputs, empty) == (0, 16, "boxes")


# --- run.py beside lighten's own code ---------------------------------------------------------------

SCREEN = Preprocess(96, 128, "letterbox")
POINTS = tuple(Level(96 // s, 128 // s, (float(s), float(s))) for s in (8, 16, 32))
ANCHORS = tuple(Level(96 // s, 128 // s, (float(s), float(s)), 0.5, ((s, 2.0 * s), (3.0 * s, s))) for s in (16, 32))
HEADS = {
    "distances": Head(POINTS, 5),
    "centerness": Head(POINTS, 5, centerness=True),
    "distribution": Head(POINTS, 3, "distribution", bins=8),
    "offsets": Head(ANCHORS, 4, "offsets", weights=(10.0, 10.0, 5.0, 5.0)),
    "softmax": Head(ANCHORS, 4, "offsets", "softmax", weights=(1.0, 2.0, 0.5, 1.0)),
    "odd grid": Head((Level(3, 5, (20.0, 30.0), 0.0),), 2, "distribution", bins=2),
}


def runner_of(bundle: Path) -> Any:
    """run.py of a bundle as a module."""
    spec = importlib.util.spec_from_file_location("bundle_run", bundle / "run.py")
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    return run


@pytest.mark.parametrize("size", [(128, 96), (300, 96), (50, 200), (37, 23)])
@pytest.mark.parametrize("name", HEADS)
def test_run_py_finds_what_lighten_finds(name: str, size: tuple[int, int], made: Path) -> None:
    head = HEADS[name]
    run = runner_of(made)
    run.HEAD, run.HOW = to_json(head), to_json(SCREEN)
    dice = np.random.default_rng(len(name))
    raw = dice.normal(0, 2, (6, head.places, head.values)).astype(np.float32)
    raw[0, 3], raw[1, :, 0], raw[2] = np.nan, np.inf, -9
    for one in raw:
        (want,) = boxes.detections(one[None], head, 0.3, 0.6, 100, size=(128, 96))
        want[:, :4] = boxes.to_image(want[:, :4].astype(np.float64), frame_of(*size, SCREEN), *size)
        want = want[(want[:, 2] > want[:, 0]) & (want[:, 3] > want[:, 1])]
        got = run.detections(one.reshape(-1), *size)  # some runtimes give it flat
        assert got.shape == want.shape
        np.testing.assert_array_equal(got[:, 4:], want[:, 4:])
        np.testing.assert_allclose(got[:, :4], want[:, :4], atol=1e-3)
    assert len(run.detections(raw[3], *size))


FITS = {
    "letterbox": SCREEN,
    "tall": Preprocess(120, 50, "letterbox", interpolation="bicubic"),
    "one line": Preprocess(1, 90, "letterbox"),
    "bgr": Preprocess(33, 41, "letterbox", channel_order="BGR"),
    "gray": Preprocess(33, 40, "letterbox", channel_order="GRAY", mean=(0.3,), std=(0.7,)),
    "exact": Preprocess(40, 57, "letterbox", interpolation="nearest"),
}


@pytest.mark.parametrize("name", FITS)
def test_run_py_letterboxes_exactly_as_lighten_does(name: str, made: Path, photos: dict[str, Path]) -> None:  # noqa: F811
    how, run = FITS[name], runner_of(made)
    run.HOW = to_json(how)
    for kind, path in photos.items():
        want = to_pixels(open_image(path), how)
        got = run.pixels(run.upright(path))
        np.testing.assert_array_equal(got, want, err_msg=kind)
        np.testing.assert_array_equal(run.normalize(got[None]), normalize(want[None], how), err_msg=kind)


def call(made: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(made / "run.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, encoding="utf-8", check=False)


def test_run_py_prints_and_draws_boxes_in_pixels_of_the_image(made: Path, street: Path, tmp_path: Path) -> None:
    done = call(made, street, "--draw", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{street} blue 100 % (32, 0, 64, 32)"
    (want,) = answers(made, [street], "en")
    assert want.text().split() == done.stdout.split()
    with Image.open(tmp_path / "out.png") as drawn, Image.open(street) as plain:
        assert drawn.size == plain.size
        differ = (np.asarray(drawn) != np.asarray(plain)).any(-1)
    assert differ[0:32, 32:34].all(), "the left side of the box"
    assert not differ[40:].any()


def test_run_py_speaks_chinese_and_says_when_nothing_is_there(made: Path, street: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    done = call(made, street, tmp_path / "black.png", "--zh")
    assert done.stdout.splitlines() == [f"{street} 蓝 100 % (32, 0, 64, 32)", f"{tmp_path / 'black.png'} -"]


def test_run_py_never_draws_over_its_input(made: Path, street: Path) -> None:
    before = street.read_bytes()
    for words in ((street, "--draw", street), (street, street, "--draw", street.parent / "x.png")):
        done = call(made, *words)
        assert done.returncode != 0
        assert "--draw" in done.stderr
        assert "Traceback" not in done.stderr
    assert street.read_bytes() == before


@pytest.mark.parametrize("format", plugins.names("formats"))
def test_run_py_of_a_detector_is_one_file_that_can_be_read(format: str) -> None:
    text = bundles.runner(format, "detection")
    compile(text, "run.py", "exec")
    assert text.count("def main(") == text.count("def load_model(") == text.count("__main__") == 1
    assert text.splitlines()[0].startswith('"""')
    assert len(text.splitlines()) < 240
    assert "lighten import" not in text
    assert "def detections(" not in bundles.runner(format)


def test_names_and_sums_fit_the_classes(made: Path) -> None:
    found = bundles.load(made)
    assert (found.labels(), found.labels("zh")) == (NAMES, NAMES_ZH)
    assert json.loads((made / "manifest.json").read_text("utf-8"))["files"]["run.py"] == sha256_file(made / "run.py")
    assert found.preprocess == FIT
    assert SIZE % CELL == 0
