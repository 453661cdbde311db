"""Whole walks on a tiny model: from a module and data to a bundle that answers, and what happens in between."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lighten
from lighten import bundle as bundles
from lighten import runner
from lighten.bench import Timing
from lighten.errors import BadBundle, BadConfig, BadData, BadModel, RefusedFormat
from lighten.types import Result, from_json

QUICK = Timing(warmup=1, runs=5, least=2, seconds=0.2)
HOW = lighten.Preprocess(16, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Tiny(nn.Module):
    """Tells which third of the picture is bright; two convolutions and a linear layer."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
        )
        self.fc = nn.Linear(32 * 16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).flatten(1))


def pictures(n: int = 360, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    """Noise with one bright third: the label is which."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        image = rng.integers(0, 120, (16, 16, 3)).astype(np.uint8)
        label = k % 3
        image[:, 5 * label : 5 * label + 6] += 70
        rows.append((image, label))
    return rows


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net, rows = Tiny(), pictures(seed=1)
    from lighten.data.preprocess import normalize

    x = torch.from_numpy(normalize(np.stack([r[0] for r in rows]), HOW))
    y = torch.tensor([r[1] for r in rows])
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def finished(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("runs")
    settings = lighten.Settings(name="tiny", out=out, timing=QUICK, precisions=("float32", "int8"))
    result = lighten.compress(
        model, pictures(), lighten.Budget(max_drop=5, min_shrink=40), preprocess=HOW, settings=settings
    )
    return result, out / "tiny"


def test_the_walk_ends_in_a_verified_int8_bundle(finished: tuple[Result, Path]) -> None:
    result, folder = finished
    assert result.verdict == "PASS"
    assert result.winning.recipe.precision.weights == "int8"
    assert result.final.baseline.value > 90
    fine, text = bundles.verify(bundles.load(folder / "bundle"))
    assert fine, text


def test_result_json_is_the_result(finished: tuple[Result, Path]) -> None:
    result, folder = finished
    read = from_json(Result, json.loads((folder / "result.json").read_text()))
    assert read.winner == result.winner
    assert read.final == result.final
    assert [t.recipe for t in read.trials] == [t.recipe for t in result.trials]


def test_every_trial_has_evidence_from_its_own_file(finished: tuple[Result, Path]) -> None:
    result, folder = finished
    assert {t.recipe.format for t in result.trials} >= {"onnx", "openvino"}
    for trial in (result.baseline, *result.trials):
        assert trial.failure is None
        assert trial.evidence is not None
        assert trial.artifact is not None
        files = sorted((folder / trial.artifact.path).parent.iterdir())
        assert trial.evidence.size.bytes == sum(f.stat().st_size for f in files)
        assert {row.threads for row in trial.evidence.latency} >= {1}
        assert all(len(row.samples_ms) >= 2 for row in trial.evidence.latency)
        assert trial.evidence.fidelity.same_top1 >= 98
        assert 10 < trial.evidence.memory_mb < 2000
    quantized = [t for t in result.trials if t.recipe.precision.quantized]
    for trial in quantized:
        assert trial.evidence is not None
        assert "int8" in {w.dtype for w in trial.evidence.size.weights if w.name and len(w.shape) == 4}
        assert {row["layer"] for row in trial.layers} == {"features.0", "features.3", "fc"}


def test_splits_are_disjoint_and_report_is_apart(model: nn.Module) -> None:
    data = lighten.load_data(pictures())
    rows = [set(s.rows.tolist()) for s in data.splits.values()]
    assert sum(map(len, rows)) == len(set().union(*rows)) == 360


def test_the_same_call_repeats_no_trial(
    model: nn.Module, finished: tuple[Result, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = finished
    before = (folder / "ledger.jsonl").read_bytes()
    monkeypatch.setattr("lighten.workshop.build", lambda *a, **k: pytest.fail("built again"))
    monkeypatch.setattr("lighten.bench.measure", lambda *a, **k: pytest.fail("measured again"))
    settings = lighten.Settings(name="tiny", out=folder.parent, timing=QUICK, precisions=("float32", "int8"))
    again = lighten.compress(
        model, pictures(), lighten.Budget(max_drop=5, min_shrink=40), preprocess=HOW, settings=settings
    )
    assert again.winner == result.winner
    assert again.final == result.final
    assert (folder / "ledger.jsonl").read_bytes() == before


def test_a_damaged_artifact_is_made_again(model: nn.Module, finished: tuple[Result, Path]) -> None:
    result, folder = finished
    trial = next(t for t in result.trials if t.recipe.format == "openvino")
    assert trial.artifact is not None
    file = folder / trial.artifact.path
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    settings = lighten.Settings(name="tiny", out=folder.parent, timing=QUICK, precisions=("float32", "int8"))
    again = lighten.compress(
        model, pictures(), lighten.Budget(max_drop=5, min_shrink=40), preprocess=HOW, settings=settings
    )
    assert len(file.read_bytes()) > len(whole) - 10
    assert again.winner == result.winner


def test_another_question_in_the_same_folder_is_refused(model: nn.Module, finished: tuple[Result, Path]) -> None:
    _, folder = finished
    settings = lighten.Settings(name="tiny", out=folder.parent, timing=QUICK)
    with pytest.raises(BadBundle, match="another model, data, budget or device"):
        lighten.compress(model, pictures(), lighten.Budget(max_drop=1), preprocess=HOW, settings=settings)


def test_a_budget_that_cannot_be_met_gives_the_nearest_and_says_by_how_much(model: nn.Module, tmp_path: Path) -> None:
    settings = lighten.Settings(
        name="no", out=tmp_path, timing=QUICK, formats=("onnx",), precisions=("float32", "int8"), narrow=False
    )
    result = lighten.compress(model, pictures(), lighten.Budget(min_shrink=99), preprocess=HOW, settings=settings)
    assert result.verdict == "FAIL"
    (miss,) = result.misses
    assert miss.limit == "min_shrink"
    assert 0 < miss.got < 99
    assert result.winning.recipe.precision.weights == "int8"
    assert (tmp_path / "no" / "bundle" / "manifest.json").exists()
    assert any("min_shrink is missed by" in a.en for a in result.advice)


def test_ready_float_inputs_need_no_preprocessing(model: nn.Module, tmp_path: Path) -> None:
    from lighten.data.preprocess import normalize

    pairs = [(normalize(image[None], HOW)[0], label) for image, label in pictures(240)]
    settings = lighten.Settings(name="f", out=tmp_path, timing=QUICK, formats=("onnx",), precisions=("int8",))
    result = lighten.compress(model, pairs, lighten.Budget(max_drop=5), settings=settings)
    assert result.preprocess is None
    bundle = bundles.load(tmp_path / "f" / "bundle")
    assert bundles.verify(bundle)[0]
    with pytest.raises(BadBundle, match="preprocessing is not known"):
        list(runner.answers(tmp_path / "f" / "bundle", [tmp_path / "x.png"], "en", 1))


def test_answers_of_the_bundle_are_those_of_the_model(finished: tuple[Result, Path], tmp_path: Path) -> None:
    from PIL import Image

    _, folder = finished
    rows = pictures(30, seed=9)
    for k, (image, _) in enumerate(rows):
        Image.fromarray(image).save(tmp_path / f"{k:02d}.png")
    got = list(runner.answers(folder / "bundle", [tmp_path], "en", 1))
    right = sum(int(a.labels[0][0]) == label for a, (_, label) in zip(got, rows))
    assert right >= 27


def test_pixels_without_known_preprocessing_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="not known"):
        lighten.compress(model, pictures(), settings=lighten.Settings(out=tmp_path))


def test_class_counts_must_agree(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="answers 5 classes, the data has 3"):
        lighten.compress(Tiny(5), pictures(), preprocess=HOW, settings=lighten.Settings(out=tmp_path))


def test_a_wrong_input_size_is_told_before_anything_is_built(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"does not take an input of shape \(2, 3, 20, 20\)"):
        lighten.compress(
            model,
            pictures(),
            preprocess=dataclasses.replace(HOW, height=20, width=20),
            settings=lighten.Settings(out=tmp_path),
        )
    assert not any(tmp_path.iterdir())


def test_a_model_whose_graph_cannot_be_captured_is_refused_with_advice(tmp_path: Path) -> None:
    class Branch(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum().item() > 0 else super().forward(-x)

    with pytest.raises(BadModel, match="cannot be exported"):
        lighten.compress(
            Branch(), pictures(), preprocess=HOW, settings=lighten.Settings(name="b", out=tmp_path, timing=QUICK)
        )


def test_data_without_pairs_is_refused(model: nn.Module) -> None:
    def broken() -> Iterator[int]:
        yield 5

    with pytest.raises(BadData, match="not a pair"):
        lighten.compress(model, broken(), preprocess=HOW)


def test_a_format_that_fails_is_a_failed_trial_not_a_failed_run(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RefusedFormat("openvino cannot hold this model: aten.nothing.")

    monkeypatch.setattr("lighten.formats.openvino.export", broken)
    # In this process, where the format is broken.
    settings = lighten.Settings(name="x", out=tmp_path, timing=QUICK, precisions=("int8",), isolate=False)
    result = lighten.compress(model, pictures(), lighten.Budget(max_drop=5), preprocess=HOW, settings=settings)
    assert result.verdict == "PASS"
    (failed,) = [t for t in result.trials if t.failure]
    assert failed.failure is not None
    assert "aten.nothing" in failed.failure.reason
    assert (tmp_path / "x" / "report.html").exists()


def test_the_search_reads_the_held_out_images_and_no_others(model: nn.Module, tmp_path: Path, in_process: None) -> None:
    """Every other image of train/ is held out and lies in the wrong folder: only who reads those finds the original
    always wrong. The report images are right."""
    from PIL import Image

    for k, (image, label) in enumerate(pictures(240, seed=1)):
        part, held = ("test", False) if k < 60 else ("train", k // 3 % 2 == 0)
        folder = tmp_path / "photos" / part / str((label + held) % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{'held' if held else 'own'}-{k}.png")
    names = sorted((tmp_path / "photos" / "train").glob("*/held-*.png"))
    data = lighten.load_data(tmp_path / "photos", held_out=[str(n) for n in names])
    settings = lighten.Settings(
        name="held", out=tmp_path, timing=QUICK, formats=("onnx",), precisions=("int8",), isolate=False
    )
    result = lighten.compress(model, data, lighten.Budget(max_drop=5), preprocess=HOW, settings=settings)
    assert result.images["calibrate"] + result.images["select"] == len(names) == 90
    assert result.images["train"] == 90
    for trial in (result.baseline, *result.trials):
        assert trial.evidence is not None
        assert trial.evidence.metric.n == result.images["select"]
        assert trial.evidence.metric.value < 10
    assert result.final.baseline.value > 90
    assert result.final.winner.n == 60


def test_a_wrong_channel_order_is_doubted_and_the_right_one_is_not() -> None:
    from lighten import walk
    from lighten.data import demo
    from lighten.models.load import load

    net, _ = load(demo.WEIGHTS, "lighten:resnet20")
    for order, doubted in (("RGB", False), ("BGR", True)):
        how = dataclasses.replace(demo.PREPROCESS, channel_order=order)
        job, _ = walk.front_desk(net, demo.data(), "this-machine", how, lighten.Settings(), lambda *_: None)
        outputs = walk.workshop.torch_outputs(net, job, job.data.select)
        assert [f.code for f in walk.doubts(job, outputs)] == ["channel-order"] * doubted
