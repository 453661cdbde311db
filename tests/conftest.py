"""Fixtures that several suites share. Nothing heavy is imported until a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the suite runs on shared cores

import pytest

from lighten.types import Agreement, Artifact, Device, Estimate, Evidence, Latency, Precision, Recipe, Size, Trial

PRECISIONS = {
    "float32": Precision(),
    "float16": Precision("float16", "float16"),
    "int8": Precision("int8", "int8"),
}


@dataclass(frozen=True)
class Exported:
    """A file, the torch module it was written from, and how it was asked for."""

    path: Path
    companions: tuple[Path, ...]
    module: Any
    precision: Precision
    device: Device
    left_alone: bool
    """Whether the module's tensors are bit for bit what they were before."""

    @property
    def bytes(self) -> int:
        return sum(f.stat().st_size for f in (self.path, *self.companions))


@pytest.fixture(scope="session")
def here() -> Device:
    """This machine, with the integer kernels it has."""
    from lighten import devices

    return devices.load("this-machine")


@pytest.fixture(scope="session")
def module_of(here: Device) -> Callable[[str, str], Any]:
    """(net, precision) -> the torch module a format is given: the float net, or the plan's converted one."""

    @cache
    def make(net: str, precision: str) -> Any:
        from lighten.quant.plan import quantize
        from nets import SHAPE, calibration
        from nets import net as build

        model = build(net)
        if precision == "int8":
            return quantize(model, SHAPE, calibration(), PRECISIONS["int8"], here).module
        return model

    return make


@pytest.fixture(scope="session")
def exported(
    module_of: Callable[[str, str], Any], here: Device, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """(format, net, precision) -> the exported file, made once a session."""

    @cache
    def make(format: str, net: str, precision: str, copy: int = 0) -> Exported:
        from lighten.plugins import get
        from nets import SHAPE

        plugin, module = get("formats", format), module_of(net, precision)
        path = tmp_path_factory.mktemp(f"{format}-{net}-{precision}-{copy}") / f"model{plugin.SUFFIX}"
        path.parent.mkdir(exist_ok=True)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        companions = plugin.export(module, SHAPE, path, PRECISIONS[precision], here)
        after = module.state_dict()
        same = before.keys() == after.keys() and all(before[k].equal(after[k]) for k in before)
        return Exported(path, companions, module, PRECISIONS[precision], here, same)

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are run and timed here: for walks of tiny networks, where processes would take most of the time."""
    import numpy as np

    from lighten import bench
    from lighten.plugins import get

    def measure(path: Path, format: str, pixels: Any, how: Any, *, timing: Any = None, **_: Any) -> bench.Readings:
        run, x = get("formats", format).load(path, 1), bench.inputs_of(pixels, how)
        times = (Latency(1, bench.samples_ms(lambda: run(x[:1]), timing)),) if timing else ()
        outputs = np.concatenate([run(x[k : k + 32]) for k in range(0, len(x), 32)])
        return bench.Readings(outputs, times, 1e4, 50.0, "in this process")

    monkeypatch.setattr(bench, "measure", measure)


def evidence(
    *,
    top1: float = 90.0,
    error: float = 0.5,
    drop: float = 0.0,
    size: int = 1_000_000,
    ms: float = 10.0,
    memory_mb: float = 100.0,
) -> Evidence:
    """Made-up measurements; only what a test is about needs to be given."""
    same = Agreement(n=100, same_top1=100.0, mean_abs=0.0, max_abs=0.0, sqnr_db=60.0)
    return Evidence(
        metric_name="top1",
        metric=Estimate(top1, error, 1000),
        drop=Estimate(drop, 0.1, 1000),
        extra=(),
        flipped=0,
        classes=(),
        latency=(Latency(1, (ms, ms, ms)), Latency(4, (ms / 3,))),
        throughput=1000 / ms,
        memory_mb=memory_mb,
        size=Size(size, size // 2),
        fidelity=same,
        drift=same,
        runtime="none 1.0",
    )


ORIGINAL = Recipe()


def trial(recipe: Recipe = ORIGINAL, **measured: float) -> Trial:
    """A finished trial of `recipe` with made-up evidence."""
    artifact = Artifact(f"artifacts/{recipe.id}/model.onnx", recipe.format, "0" * 64)
    return Trial(recipe, artifact, evidence(**measured))  # type: ignore[arg-type]
