"""One budget, reached by lighten and by hand: prune, train on, quantize, on the same machine for the same epochs.

python benchmarks/budget.py --weights WEIGHTS.safetensors --min-shrink 97 --min-speedup 12 --max-drop 0.5 --time 60m --keep FOLDER

By hand means what the tutorials do: Torch-Pruning's magnitude pruning at one ratio for all layers, training on with the
labels, ONNX export, onnxruntime's quantize_static with its defaults. The control is the original, trained on for the
same epochs: what it gains is no merit of compression. `--keep` lets an interrupted comparison go on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import common
from lighten import devices
from lighten.data import load as load_data
from lighten.formats import onnx as onnx_format
from lighten.formats import openvino as openvino_format
from lighten.frontdesk import seconds
from lighten.kit.fit import FitSettings, fit
from lighten.methods.finetune import Step as Finetune
from lighten.models.load import load
from lighten.tasks import classification as task
from lighten.types import Budget, Job, Precision, Preprocess, Result, Trial
from lighten.walk import Settings, compress

FORMATS = {"onnx": onnx_format, "openvino": openvino_format}
HEADER = ("file", "top-1 %", "drop pt ± SE", "drop from the control", "MB", "smaller", "ms", "faster", "minutes")


@dataclasses.dataclass
class Row:
    """A file with the minutes that it took to make."""

    title: str
    path: Path
    format: str
    minutes: float | None = None
    outputs: np.ndarray | None = None

    @property
    def mb(self) -> float:
        return sum(f.stat().st_size for f in self.path.parent.glob(f"{self.path.stem}.*")) / 1e6


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    keep = args.keep.resolve()
    model, _ = load(Path(args.weights), args.arch, classes=10)
    how = Preprocess(args.input_size, args.input_size)
    data = load_data("cifar10", held_out=unseen(args.unseen_seed))
    job = Job(data, "classification", devices.load("this-machine"), how, model, progress=shown(), arch=args.arch)
    result, minutes = ours(args, model, data, how, keep)
    epochs = args.epochs or trained(result.winning)
    print(f"lighten trained {epochs:.1f} epochs in {minutes:.1f} minutes: {result.verdict}", flush=True)
    rows = [*floats(job, keep), *our_files(result, minutes)]
    if not args.skip_expert:
        rows += by_hand(job, result.winning, epochs, keep, args)
    if not args.skip_control:
        rows.append(control(job, epochs, keep, args))
    tests = data.report.take(args.images).prepare(how)
    for row in rows:
        run = FORMATS[row.format].load(row.path, args.threads)
        row.outputs = common.outputs(run, lambda: tests.batches(how, 50))
        print(f"{row.title}: answered", flush=True)
    one = next(tests.batches(how, 1))
    runs = {row.title: FORMATS[row.format].load(row.path, 1) for row in rows}
    ms = common.medians(common.interleaved_ms(runs, one, args.rounds))
    common.put(args.section, page(rows, ms, tests.labels, result, epochs, args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True)
    add("--arch", default="torchvision:resnet18")
    add("--input-size", type=int, default=64)
    add("--max-drop", type=float, default=0.5)
    add("--min-shrink", type=float, default=95.0)
    add("--min-speedup", type=float, default=12.0)
    add("--time", type=seconds, default=3600.0)
    add("--formats", type=lambda s: tuple(s.split(",")), default=())
    add("--epochs", type=float, help="for expert and control [those that lighten trained]")
    add("--unseen-seed", type=int, help="the weights never saw the first 5,000 of torch.randperm(50000) of this seed")
    add("--images", type=int, default=10000)
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=200)
    add("--keep", type=Path, required=True)
    add("--skip-expert", action="store_true")
    add("--skip-control", action="store_true")
    add("--section", default="budget")
    return parser.parse_args()


def unseen(seed: int | None) -> list[int] | None:
    """The 5,000 training images that the weights were not trained on (../shared/models/README.md)."""
    if seed is None:
        return None
    return torch.randperm(50000, generator=torch.Generator().manual_seed(seed))[:5000].tolist()


def shown() -> Any:
    """Progress as lines, at most one in 30 s."""
    last = [0.0]

    def progress(what: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"  {what} {done}/{total}", flush=True)

    return progress


def ours(args: argparse.Namespace, model: Any, data: Any, how: Preprocess, keep: Path) -> tuple[Result, float]:
    """What `lighten compress` gives; a finished run is read again, with the minutes that it took then."""
    budget = Budget(max_drop=args.max_drop, min_shrink=args.min_shrink, min_speedup=args.min_speedup, time_s=args.time)
    settings = Settings(name="lighten", out=keep, arch=args.arch, formats=args.formats, model_name=args.arch)
    log, mark = (lambda line: print(line, flush=True)), keep / "lighten-spent.json"
    began = time.monotonic()
    result = compress(copy.deepcopy(model), data, budget, preprocess=how, settings=settings, progress=shown(), log=log)
    if not mark.exists():
        mark.write_text(json.dumps({"minutes": (time.monotonic() - began) / 60, "spent": result.spent}))
    kept = json.loads(mark.read_text())
    return dataclasses.replace(result, spent=tuple(map(tuple, kept["spent"]))), kept["minutes"]


def trained(trial: Trial) -> float:
    """Epochs of the winner's training, as its step said, or as its recipe asked; 0 if it was not trained."""
    found = [re.search(r"trained ([\d.]+) epochs", note) for note in trial.notes]
    asked = [dict(step.settings).get("epochs") for step in trial.recipe.steps]
    return next((float(m[1]) for m in found if m), next((float(e) for e in asked if e), 0.0))


def floats(job: Job, keep: Path) -> Iterator[Row]:
    """The untouched network."""
    for name, format in FORMATS.items():
        folder = keep / f"float-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"model{format.SUFFIX}"
        format.export(job.original, job.preprocess.input_shape, path, Precision(), job.device)
        yield Row(f"original float32, {name}", path, name)


def our_files(result: Result, minutes: float) -> list[Row]:
    """The winner's plan in every format."""
    plan = result.winning.recipe
    same = [
        t for t in result.trials if t.artifact and (t.recipe.steps, t.recipe.precision) == (plan.steps, plan.precision)
    ]
    return [
        Row(f"lighten, {t.recipe.format}", Path(result.path) / t.artifact.path, t.recipe.format, minutes) for t in same
    ]


def by_hand(job: Job, winner: Trial, epochs: float, keep: Path, args: argparse.Namespace) -> list[Row]:
    """The tutorials' way to about as many weights as the winner has."""
    folder = keep / "by-hand"
    path, mark = folder / "int8.onnx", folder / "minutes"
    if not mark.exists():
        began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        module = tutorial_pruning(job, sum(s.weights for s in winner.network))
        own = dataclasses.replace(job, original=None)
        settings = FitSettings(epochs=epochs, batch=128, lr=0.05, seed=0)
        module = fit(module, settings, lambda m, x, y: task.loss(m, x, y), own, checkpoint=folder / "last.pt")
        quantized(module.eval(), job, folder / "float.onnx", path)
        mark.write_text(f"{(time.monotonic() - began) / 60:.2f}")
    own_folder = folder / "file"
    own_folder.mkdir(exist_ok=True)
    alone = own_folder / "model.onnx"
    alone.write_bytes(path.read_bytes())
    return [Row("by hand, onnx", alone, "onnx", float(mark.read_text()))]


def tutorial_pruning(job: Job, weights: int) -> Any:
    """Torch-Pruning's example recipe: group magnitude, one ratio for all layers; the ratio by bisection."""
    import torch_pruning as tp

    example = torch.zeros(1, *job.preprocess.input_shape)

    def pruned(ratio: float) -> Any:
        model = copy.deepcopy(job.original)
        tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[dict(model.named_modules())[n] for n in task.protect(model)],
            round_to=8,
            in_channel_groups={},
            out_channel_groups={},
        ).step()
        return model

    def count(model: Any) -> int:
        kinds = (torch.nn.Conv2d, torch.nn.Linear)
        return sum(m.weight.numel() for m in model.modules() if isinstance(m, kinds))

    low, high = 0.0, 0.95
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if count(pruned(middle)) > weights else (low, middle)
    return pruned(high)


def quantized(module: Any, job: Job, float_path: Path, path: Path) -> None:
    """torch.onnx.export, then onnxruntime's pre-processing and quantize_static, all at their defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx_format.export(module, job.preprocess.input_shape, float_path, Precision(), job.device)
    name = onnx.load(float_path).graph.input[0].name
    images = iter(job.data.calibrate.take(512).inputs(job.preprocess))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            x = next(images, None)
            return None if x is None else {name: x[None]}

    quant_pre_process(str(float_path), str(float_path.with_name("ready.onnx")))
    quantize_static(str(float_path.with_name("ready.onnx")), str(path), Reader())


def control(job: Job, epochs: float, keep: Path, args: argparse.Namespace) -> Row:
    """The original, trained on with the labels for as many epochs."""
    folder = keep / "control"
    path, mark = folder / "model.onnx", folder / "minutes"
    folder.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        began = time.monotonic()
        own = dataclasses.replace(job, scratch=str(folder))
        module = Finetune(epochs=epochs).apply(copy.deepcopy(job.original), own)
        onnx_format.export(module, job.preprocess.input_shape, path, Precision(), job.device)
        mark.write_text(f"{(time.monotonic() - began) / 60:.2f}")
    return Row(f"control: original float32, {epochs:.1f} epochs more", path, "onnx", float(mark.read_text()))


def page(
    rows: list[Row], ms: dict[str, float], labels: np.ndarray, result: Result, epochs: float, args: argparse.Namespace
) -> str:
    """What was asked, the table, what was predicted."""
    base = rows[0]
    trained_on = next((r for r in rows if r.title.startswith("control")), None)
    head = (
        f"{args.arch}, {len(labels)} CIFAR-10 test images, one thread; sizes and times against the original's ONNX file in "
        f"the same run. Asked: drop at most {args.max_drop} points, {args.min_shrink} % smaller, {args.min_speedup}x "
        f"faster, in {args.time / 60:.0f} minutes on {args.threads} cores. lighten: {result.verdict}, {epochs:.1f} epochs."
    )
    cells = [
        [
            r.title,
            f"{task.score(r.outputs, labels).value:.2f}",
            str(task.drop(base.outputs, r.outputs, labels)),
            "-" if trained_on is None else str(task.drop(trained_on.outputs, r.outputs, labels)),
            f"{r.mb:.3f}",
            f"{100 * (1 - r.mb / base.mb):.1f} %",
            f"{ms[r.title]:.3f}",
            f"{ms[base.title] / ms[r.title]:.1f}x",
            "-" if r.minutes is None else f"{r.minutes:.1f}",
        ]
        for r in rows
    ]
    spent = ", ".join(f"{name} {s / 60:.1f}" for name, s in result.spent)
    return f"{head}\n\n{common.table(HEADER, cells)}\n\nMinutes of lighten's walk: {spent}."


if __name__ == "__main__":
    main()
