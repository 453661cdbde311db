"""A finished run in other formats: files, bundles, reasons, and writers that die."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lighten
from lighten import bundle as bundles
from lighten import exports
from lighten.bench import Timing
from lighten.errors import BadBundle, BadConfig, UnknownName
from lighten.types import Precision

QUICK = Timing(warmup=1, runs=5, least=2, seconds=0.2)
HOW = lighten.Preprocess(16, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
INT8 = Precision("int8", "int8")


def pictures(n: int = 240) -> list[tuple[np.ndarray, int]]:
    """Noise with one bright half: the label is which."""
    dice = np.random.default_rng(0)
    rows = []
    for k in range(n):
        image = dice.integers(0, 120, (16, 16, 3)).astype(np.uint8)
        image[:, 8 * (k % 2) : 8 * (k % 2) + 8] += 90
        rows.append((image, k % 2))
    return rows


class Halves(nn.Module):
    """Knows the answer by construction: the mean of each half, through a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Linear(32, 2)
        with torch.no_grad():
            self.conv.weight.uniform_(0, 0.2, generator=torch.Generator().manual_seed(0))
            self.conv.bias.fill_(1.0)
            self.fc.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 16))
            self.fc.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(nn.functional.adaptive_avg_pool2d(self.relu(self.conv(x)), (1, 2)).flatten(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    settings = lighten.Settings(
        name="halves", out=out, timing=QUICK, formats=("onnx",), precisions=("int8",), isolate=False
    )
    result = lighten.compress(Halves().eval(), pictures(), lighten.Budget(), preprocess=HOW, settings=settings)
    assert result.final.baseline.value == 100
    return out / "halves"


@pytest.fixture(scope="module")
def rows(run: Path) -> dict[tuple[str, str], exports.Row]:
    made = exports.export(run, ("onnx", "openvino", "torchscript", "tensorrt"), data=pictures(), timing=QUICK)
    return {(r.format, r.precision.weights): r for r in made}


def test_every_format_and_precision_has_a_row(rows: dict[tuple[str, str], exports.Row]) -> None:
    assert len(rows) == 12
    for (format, weights), row in rows.items():
        if format in ("onnx", "openvino") or (format, weights) == ("torchscript", "float32"):
            assert row.status == "PASS", row
            assert row.evidence is not None
            assert row.evidence.metric.value == 100
            assert row.evidence.fidelity.same_top1 >= 99.5
            assert row.evidence.beside is not None
    assert rows["torchscript", "int8"].status == "refused"
    assert rows["tensorrt", "int8"].status in ("not run here", "PASS")


def test_a_row_counts_the_bytes_of_its_own_files(run: Path, rows: dict[tuple[str, str], exports.Row]) -> None:
    row = rows["openvino", "int8"]
    folder = (run / row.path).parent
    assert row.bytes == sum((folder / f"model{end}").stat().st_size for end in (".xml", ".bin"))


def test_the_file_of_the_plan_is_the_one_the_run_shipped(run: Path, rows: dict[tuple[str, str], exports.Row]) -> None:
    assert (run / rows["onnx", "int8"].path).read_bytes() == (run / "bundle" / "model.onnx").read_bytes()


@pytest.mark.parametrize("name", ["onnx-int8", "openvino-float16", "torchscript-float32"])
def test_what_passed_is_a_bundle_that_verifies_and_runs_alone(
    name: str, run: Path, rows: dict[tuple[str, str], exports.Row], tmp_path: Path
) -> None:
    from PIL import Image

    folder = tmp_path / "shipped"
    shutil.copytree(run / "exports" / name, folder)
    fine, text = bundles.verify(bundles.load(folder))
    assert fine, text
    Image.fromarray(pictures(2)[1][0]).save(tmp_path / "right.png")
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), str(tmp_path / "right.png")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "1"


def test_baked_preprocessing_takes_pixels_and_answers_the_same(run: Path, tmp_path: Path) -> None:
    """In the table, in the bundle's own check, in its run.py and in `lighten run`."""
    from PIL import Image

    from lighten.runner import answers

    own = tmp_path / "halves"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("exports"))
    formats, data = ("onnx", "openvino", "torchscript"), pictures()
    made = exports.export(own, formats, ("float32", "plan"), data=data, timing=QUICK, bake_preprocessing=True)
    assert [r.status for r in made] == ["PASS"] * 4 + ["refused"] * 2
    assert "onnx and openvino only" in made[-2].reason
    Image.fromarray(pictures(2)[1][0]).save(tmp_path / "right.png")
    for row in made[:4]:
        folder = (own / row.path).parent
        assert folder.name.endswith("-pixels")
        found = bundles.load(folder)
        assert found.manifest["input"] == {
            "name": "pixels", "shape": ["batch", 16, 16, 3], "layout": "NHWC", "dtype": "uint8",
        }  # fmt: skip
        fine, text = bundles.verify(found)
        assert fine, text
        (answer,) = answers(folder, [tmp_path / "right.png"], "en", 1)
        assert answer.labels[0][0] == "1"
        done = subprocess.run(
            [sys.executable, str(folder / "run.py"), str(tmp_path / "right.png")], capture_output=True, text=True
        )
        assert done.stdout.split()[1] == "1", done.stderr


def test_a_classifier_has_no_boxes_to_put_inside(run: Path) -> None:
    with pytest.raises(BadConfig, match="classification: there are no boxes"):
        exports.export(run, ("onnx",), data=pictures(), with_nms=True)


def test_a_bundle_brings_the_cpp_example_of_its_runtime(run: Path, rows: dict[tuple[str, str], exports.Row]) -> None:
    text = (run / "exports" / "torchscript-float32" / "run.cpp").read_text()
    assert "torch::jit::load" in text
    assert "Ort::Session" in (run / "exports" / "onnx-int8" / "run.cpp").read_text()
    assert not (run / "exports" / "openvino-int8" / "run.cpp").exists()


def test_a_file_changed_after_its_manifest_is_refused(
    run: Path, rows: dict[tuple[str, str], exports.Row], tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(run / "exports" / "torchscript-float32", folder)
    file = bundles.load(folder).model
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BadBundle, match="sha256"):
        bundles.load(folder)


def test_the_record_keeps_rows_of_earlier_calls(run: Path, rows: dict[tuple[str, str], exports.Row]) -> None:
    kept = {(r.format, r.precision.weights): r for r in exports.read_record(run)}
    assert kept.keys() == rows.keys()
    exports.export(run, ("onnx",), ("float32",), data=pictures(), timing=QUICK)
    assert {(r.format, r.precision.weights) for r in exports.read_record(run)} == rows.keys()


def test_a_writer_that_dies_is_one_failed_row_and_the_next_file_is_made(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first child is killed as it starts; the files after the one it was at get a new child."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, pathlib\n"
        f"flag = pathlib.Path({str(tmp_path / 'flag')!r})\n"
        "if 'lighten.exports' in sys.orig_argv and not flag.exists():\n"
        "    flag.touch()\n"
        "    os.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    float32, float16 = exports.export(run, ("onnx",), ("float32", "float16"), data=pictures(), timing=QUICK)
    assert float32.status == "failed"
    assert "SIGABRT" in float32.reason
    assert float16.status == "PASS"


def test_a_missing_tool_is_one_line_with_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lighten.formats import openvino

    monkeypatch.setattr(openvino, "REQUIRES", ("no_such_package",))
    (row,) = exports.export(run, ("openvino",), ("float32",), data=pictures(), timing=QUICK)
    assert (row.status, row.reason) == ("missing", "needs no_such_package: pip install 'lighten[openvino]'")


@pytest.mark.parametrize(
    "formats, precisions, error, words",
    [(("onxx",), (), UnknownName, "onxx"), (("onnx",), ("int3",), BadConfig, "int3"),
     (("onnx",), ("int4",), BadConfig, "int4")],
)  # fmt: skip
def test_what_is_not_there_is_named(
    run: Path, formats: tuple[str, ...], precisions: tuple[str, ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        exports.export(run, formats, precisions, data=pictures())


def test_other_data_is_refused(run: Path) -> None:
    with pytest.raises(BadConfig, match="other classes"):
        exports.export(run, ("onnx",), data=[(image, k % 3) for k, (image, _) in enumerate(pictures())])


def test_an_unfinished_or_older_run_says_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="lighten compress"):
        exports.export(tmp_path, ("onnx",), data=pictures())
    old = tmp_path / "old"
    shutil.copytree(run, old)
    shutil.rmtree(old / "artifacts" / "programs")
    with pytest.raises(BadBundle, match="older lighten"):
        exports.export(old, ("onnx",), data=pictures())


def test_the_table_in_the_terminal_shows_every_row(
    rows: dict[tuple[str, str], exports.Row], capsys: pytest.CaptureFixture[str]
) -> None:
    from lighten.terminal import print_exports

    for lang, word in (("en", "same answer"), ("zh", "答案一致")):
        print_exports(tuple(rows.values()), "runs/halves", lang)
        shown = capsys.readouterr().out
        assert word in shown
        assert shown.count("PASS") >= 7
        assert shown.count("refused") >= 1


@pytest.mark.parametrize("text", ["{", '[{"format": "onnx"}]', "[3]", '"no list"'])
def test_a_damaged_record_is_told_before_anything_is_written(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports/exports.json").write_text(text)
    (tmp_path / "result.json").write_bytes((run / "result.json").read_bytes())
    with pytest.raises(BadBundle, match=r"exports.json is damaged"):
        exports.export(tmp_path, ["onnx"], ["float32"])
    assert [f.name for f in (tmp_path / "exports").iterdir()] == ["exports.json"]


def test_the_record_is_json_without_nan(run: Path, rows: dict[tuple[str, str], exports.Row]) -> None:
    text = (run / "exports" / "exports.json").read_text()
    assert "NaN" not in text
    assert len(json.loads(text)) == len(rows)


def test_palettes_are_written_for_core_ml_alone_and_answer_as_they_were_read_back(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    own = tmp_path / "halves"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("exports"))
    refused, made = exports.export(own, ("onnx", "coreml"), ("palette8",), data=pictures(), timing=QUICK)
    assert refused.status == "refused"
    assert "palette8" in refused.reason
    if made.status == "not run here":
        assert "weights answer like the program on 100.0 %" in made.reason
    else:  # the net is small: a table must be worth its bytes
        assert made.status in ("PASS", "failed"), made
        assert made.status == "PASS" or "table" in made.reason
