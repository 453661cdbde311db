"""Latency of pruned networks: predicted from single layers before they are built, against the files that were measured.

python benchmarks/cost.py --weights shared/models/resnet18_cifar10_64.safetensors --arch torchvision:resnet18
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import table
from lighten import cost, devices, plugins
from lighten.data import load as load_data
from lighten.methods.quantize import NAMED
from lighten.methods.quantize import Step as Quantize
from lighten.models.load import load
from lighten.types import Data, Device, Job, LayerShape, Preprocess, from_json, to_json

Built = tuple[tuple[LayerShape, ...], dict[str, Path]]
"""The layers of one version and its file in each format."""
Times = dict[str, list[float]]
WITHIN = 0.25
FORMATS = ("onnx", "openvino")


def layer_shapes(model: nn.Module, shape: tuple[int, ...]) -> tuple[LayerShape, ...]:
    """Every convolution and linear layer in the order it runs."""
    found: list[LayerShape] = []

    def see(name: str) -> Callable[..., None]:
        def hook(m: Any, inputs: tuple[torch.Tensor, ...], _out: torch.Tensor) -> None:
            size = tuple(inputs[0].shape)
            if isinstance(m, nn.Linear):
                row = LayerShape(name, "linear", m.in_features, m.out_features, source=size[1:-1])
            else:
                geometry = m.kernel_size, m.stride, m.padding, m.dilation, m.groups, size[2:]
                row = LayerShape(name, "conv", m.in_channels, m.out_channels, *geometry, clip=True)
            found.append(row)

        return hook

    handles = [
        m.register_forward_hook(see(n)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return tuple(found)


def pruned(model: nn.Module, shape: tuple[int, ...], seed: int) -> nn.Module:
    """A copy that lost a random share, up to four fifths, of the channels of every layer."""
    import torch_pruning as tp

    torch.manual_seed(seed)
    dice = np.random.default_rng(seed)
    model = copy.deepcopy(model).eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    level = dice.uniform(0.1, 0.8)
    ratios = {
        m: float(np.clip(level + dice.uniform(-0.3, 0.3), 0, 0.85))
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and m is not last
    }
    tp.pruner.BasePruner(
        model,
        torch.randn(1, *shape),
        importance=tp.importance.RandomImportance(),
        pruning_ratio=level,
        pruning_ratio_dict=ratios,
        ignored_layers=[last],
        round_to=8,
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    return model


def build(model: nn.Module, tag: str, precision: str, data: Data, how: Preprocess, device: Device, room: Path) -> Built:
    """Quantize and export in every format of the device."""
    wanted = NAMED[precision]
    job = Job(data, "classification", device, how, model, precision=wanted)
    shapes = layer_shapes(model, how.input_shape)
    made = Quantize(images=32, bias="none").apply(copy.deepcopy(model), job) if wanted.quantized else model
    files = {}
    for name in FORMATS:
        module = plugins.get("formats", name)
        files[name] = room / f"{tag}{module.SUFFIX}"
        module.export(made, how.input_shape, files[name], wanted, device)
    return shapes, files


def timed_ms(files: dict[str, Path], format: str, shape: tuple[int, ...], rounds: int, runs: int = 12) -> Times:
    """Raw times; each file runs a few times in a row, as when it is measured alone, and the files take turns."""
    x = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    calls = {tag: plugins.get("formats", format).load(path, 1) for tag, path in files.items()}
    times: Times = {tag: [] for tag in calls}
    for _ in range(rounds):
        for tag, run in calls.items():
            for k in range(3 + runs):
                before = time.perf_counter()
                run(x)
                if k >= 3:
                    times[tag].append((time.perf_counter() - before) * 1e3)
    return times


def predictions(
    model: cost.CostModel, built: dict[str, Built], measured: dict[str, float]
) -> dict[str, tuple[float, ...]]:
    """Of every version: calibrated by nothing, by the unpruned file, and by that and all versions before it."""
    first, *others = built
    seen = [(built[first][0], measured[first])]
    alone = cost.calibrated(model, seen)
    found = {}
    for tag in others:
        shapes = built[tag][0]
        found[tag] = tuple(cost.predict(m, shapes) for m in (model, alone, cost.calibrated(model, seen)))
        seen.append((shapes, measured[tag]))
    return found


def compare(model: cost.CostModel, built: dict[str, Built], measured: dict[str, float]) -> str:
    """One row a version, then how many are within a quarter and the mean error of each way."""
    found = predictions(model, built, measured)
    rows = []
    for tag, ways in found.items():
        macs = sum(s.macs for s in built[tag][0]) / 1e6
        cells = [f"{p:.3f} ({100 * (p / measured[tag] - 1):+.0f} %)" for p in ways]
        rows.append([tag, f"{macs:.1f}", f"{measured[tag]:.3f}", *cells])
    errors = np.array([[p / measured[tag] - 1 for p in ways] for tag, ways in found.items()])
    shares = [f"{int(n)} of {len(found)}" for n in (np.abs(errors) <= WITHIN).sum(0)]
    rows.append(["within 25 %", "", "", *shares])
    rows.append(["mean error", "", "", *(f"{100 * e:.0f} %" for e in np.abs(errors).mean(0))])
    return table(
        ["version", "million MACs", "measured ms", "plain", "by the unpruned file", "and by versions before"], rows
    )


def versions(given: argparse.Namespace, device: Device, how: Preprocess, room: Path) -> dict[str, Built]:
    """The unpruned network and the pruned ones, built or found in `room`."""
    index = room / "built.json"
    if index.exists():
        page = json.loads(index.read_text("utf-8"))
        return {
            tag: (from_json(tuple[LayerShape, ...], shapes), {f: room / name for f, name in files.items()})
            for tag, (shapes, files) in page.items()
        }
    data = load_data("cifar10", calibrate=512)
    data = dataclasses.replace(data, calibrate=data.calibrate.take(32))
    model, _ = load(given.weights, given.arch, classes=len(data.classes))
    model.eval()
    built: dict[str, Built] = {}
    for k in range(given.versions + 1):
        version = pruned(model, how.input_shape, k) if k else model
        built[f"v{k}"] = build(version, f"v{k}", given.precision, data, how, device, room)
        print(f"built {k} of {given.versions}", file=sys.stderr, flush=True)
    page = {tag: (to_json(shapes), {f: p.name for f, p in files.items()}) for tag, (shapes, files) in built.items()}
    index.write_text(json.dumps(page), "utf-8")
    return built


def run(given: argparse.Namespace) -> None:
    device, how = devices.load("this-machine"), Preprocess(given.size, given.size)
    precision = NAMED[given.precision]
    with tempfile.TemporaryDirectory() as scratch:
        room = given.keep or Path(scratch)
        room.mkdir(parents=True, exist_ok=True)
        built = versions(given, device, how, room)
        for name in FORMATS:
            start = time.perf_counter()
            cache = given.cache or Path(scratch) / "times.json"
            model = cost.measure(built["v0"][0], (precision.weights, precision.activations), name, device, cache)
            took = time.perf_counter() - start
            raw = timed_ms({tag: files[name] for tag, (_, files) in built.items()}, name, how.input_shape, given.rounds)
            print(
                f"\n{model.runtime}: {len(model.curves)} layers timed in {took:.1f} s, guessed: {model.guessed or 'none'}"
            )
            for title, of in (("medians", statistics.median), ("medians of the faster half", cost.faster)):
                print(f"\n{title}\n\n{compare(model, built, {tag: of(row) for tag, row in raw.items()})}", flush=True)


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--weights", type=Path, required=True)
    a.add_argument("--arch", default="torchvision:resnet18")
    a.add_argument("--size", type=int, default=64)
    a.add_argument("--precision", default="int8")
    a.add_argument("--versions", type=int, default=10)
    a.add_argument("--rounds", type=int, default=12)
    a.add_argument("--keep", type=Path, help="folder for the files; found there, they are not built again")
    a.add_argument("--cache", type=Path, help="file of the layers' times; none: measure all anew")
    given = a.parse_args()
    torch.set_num_threads(1)
    run(given)


if __name__ == "__main__":
    main()
