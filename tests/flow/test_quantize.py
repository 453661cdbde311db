"""`lighten quantize` from a module to a verdict: each method and bits, mixes inside a size, what cannot be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lighten
from lighten.bench import Timing
from lighten.errors import BadConfig
from lighten.frontdesk import Options, asked
from lighten.types import Asked, Result
from lighten.walk import Settings
from nets import CLASSES, images

QUICK = Timing(warmup=1, runs=5, least=2, seconds=0.2)
FAST = (("images", 48), ("iterations", 20))


class Wide(nn.Module):
    """Mostly weights, so that bytes tell."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 128, 3, 2, 1)
        self.c, self.fc = nn.Conv2d(128, 128, 3, 2, 1), nn.Linear(128, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


def data(n: int = 400) -> list[tuple[torch.Tensor, int]]:
    """Ready inputs; the label is what the network itself answers, so that float is right."""
    x, _ = images(n, seed=4)
    with torch.no_grad():
        labels = model()(x).argmax(1)
    return [
        (a.numpy(), int(k) % CLASSES) for a, k in zip(x, torch.arange(n) if labels.unique().numel() < 2 else labels)
    ]


def model() -> nn.Module:
    torch.manual_seed(3)
    return Wide().eval()


def walk(tmp_path: Path, way: Asked, budget: lighten.Budget | None = None, **more: object) -> Result:
    settings = Settings(
        out=tmp_path, formats=("onnx",), asked=way, timing=QUICK, name=f"{way.method}-{way.bits}", model_name="wide",
        isolate=False,
    )  # fmt: skip
    return lighten.compress(model(), data(), budget, settings=replace(settings, **more))  # type: ignore[arg-type]


def stored(result: Result) -> set[str]:
    evidence = result.winning.evidence
    assert evidence is not None
    return {w.dtype for w in evidence.size.weights if len(w.shape) > 1}


@pytest.mark.parametrize(
    ("way", "share", "types"),
    [
        (Asked("ptq", "w8a8", FAST), 0.30, {"int8"}),
        (Asked("ptq", "w4a8", FAST), 0.18, {"int4", "int8"}),
        (Asked("ptq", "w4a4", FAST), 0.18, {"int4", "int8"}),
        (Asked("weight-only", "w8"), 0.30, {"int8"}),
        (Asked("weight-only", "w4", (("block", 32),)), 0.24, {"int4", "int8"}),
        (Asked("dynamic", "w8"), 0.30, {"uint8"}),
        (Asked("qat", "w4a4", (("epochs", 1), ("images", 48))), 0.18, {"int4", "int8"}),
    ],
    ids=lambda value: f"{value.method}-{value.bits}" if isinstance(value, Asked) else "",
)
def test_each_way_gives_a_file_of_its_size_and_types(tmp_path: Path, way: Asked, share: float, types: set[str]) -> None:
    result = walk(tmp_path, way)
    assert result.winner != result.baseline.id
    got, base = result.winning.evidence, result.baseline.evidence
    assert got is not None
    assert base is not None
    assert got.size.bytes < share * base.size.bytes
    assert types <= stored(result)
    assert got.fidelity.same_top1 > 95
    assert result.passed
    assert not (Path(result.path) / "scratch").exists()


def test_a_mix_is_chosen_from_what_layers_cost_and_fits_the_size(tmp_path: Path) -> None:
    result = walk(tmp_path, Asked("ptq", "mixed", FAST), lighten.Budget(min_shrink=80))
    evidence, base = result.winning.evidence, result.baseline.evidence
    assert evidence is not None
    assert base is not None
    assert evidence.size.bytes <= 0.2 * base.size.bytes
    assert {c.layer for c in result.sensitivity} == {"a", "b", "c", "fc"}
    assert all(c.bytes > 0 and c.damage >= 0 for c in result.sensitivity)
    text = (Path(result.path) / "report.html").read_text("utf-8")
    assert "guilty" in text


def test_a_size_that_no_mix_can_meet_is_refused_with_the_best_there_is(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"MB|bytes"):
        walk(tmp_path, Asked("ptq", "mixed", FAST), lighten.Budget(max_size_mb=0.001))


def test_a_way_that_failed_is_no_pass_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("out of order")

    monkeypatch.setattr("lighten.quant.static.quantize", broken)
    result = walk(tmp_path, Asked("ptq", "w8a8"))
    assert result.verdict == "FAIL"
    assert any("out of order" in a.en for a in result.advice)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (Options(method="dynamic", rounding="brecq"), "rounding"),
        (Options(bits="w4a8"), "bits"),
        (Options(iterations=5), "iterations"),
    ],
)
def test_a_setting_that_the_method_does_not_have_is_named(options: Options, word: str) -> None:
    with pytest.raises(BadConfig, match=word):
        asked(options)


@pytest.mark.parametrize("way", [Asked("ptq", "w2a2"), Asked("dynamic", "w4a8"), Asked("magic", "w8a8")])
def test_what_a_method_cannot_give_is_refused_at_once(way: Asked) -> None:
    with pytest.raises(BadConfig):
        Settings(asked=way)
