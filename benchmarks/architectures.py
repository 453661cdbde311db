"""Whether the product takes architectures as they come: trained a little, pruned, recovered, quantized, exported, compared.

python benchmarks/architectures.py --keep FOLDER [--archs torchvision:resnet50 timm:convnext_atto] [--train-images 1000]

It is about working, not about accuracy: a network is trained from random weights until it is above chance, then
`lighten.compress` prunes and recovers it and writes ONNX and OpenVINO files, in float and int8. An architecture that
fails has a row with the reason. `--keep` holds the rows that are done: an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import lighten
from lighten import devices
from lighten.bench import Timing
from lighten.data import load as load_data
from lighten.data.cache import write_whole
from lighten.formats import onnx as onnx_format
from lighten.formats import openvino as openvino_format
from lighten.kit.channels import shapes
from lighten.kit.fit import FitSettings, fit
from lighten.models.load import build
from lighten.tasks import classification as task
from lighten.types import Budget, Data, Job, Preprocess, Result, Step, Trial
from lighten.walk import Settings, compress
from lighten.workshop import NETWORK

ARCHS = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "timm:efficientnet_lite0",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:regnet_y_400mf",
    "torchvision:densenet121",
    "timm:convnext_atto",
    "timm:test_vit",
    "timm:vit_tiny_patch16_dinov3_qkvb",
)
FORMATS = {"onnx": onnx_format, "openvino": openvino_format}
HEADER = (
    "architecture", "parameters, M", "MMACs", "MB: float, pruned, pruned int8", "top-1 %: before, pruned, int8",
    "same answer as torch %: float, int8", "SQNR dB: float, int8", "ms: float, pruned int8 (onnx, openvino)",
    "checkpoint reads back", "verdict",
)  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    file = args.keep / "rows.json"
    rows: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    data = few(load_data("cifar10"), args)
    for arch in args.archs:
        if arch not in rows:
            began = time.monotonic()
            rows[arch] = tried(arch, data, args) | {"seconds": round(time.monotonic() - began)}
            write_whole(file, json.dumps(rows, indent=1))
        print(cells(arch, rows[arch]), flush=True)
    common.put(args.section, page({a: rows[a] for a in args.archs}, data, args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--keep", type=Path, required=True)
    add("--archs", nargs="+", default=ARCHS)
    add("--input-size", type=int, default=64)
    add("--train-images", type=int, default=1000)
    add("--test-images", type=int, default=256)
    add("--epochs", type=float, default=3.0, help="of training from random weights")
    add("--recover", type=float, default=4.0, help="epochs after pruning")
    add("--ratio", type=float, default=0.3)
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=100)
    add("--section", default="architectures")
    return parser.parse_args()


def few(data: Data, args: argparse.Namespace) -> Data:
    """The first images of every split; they are shuffled at birth."""
    sizes = {"train": args.train_images, "calibrate": 256, "select": args.test_images, "report": args.test_images}
    taken = {name: split.take(sizes[name]) for name, split in data.splits.items()}
    mark = f"{data.fingerprint}-{'-'.join(map(str, sizes.values()))}"
    return dataclasses.replace(data, fingerprint=mark, **taken)


def tried(arch: str, data: Data, args: argparse.Namespace) -> Row:
    """What one architecture gives, or why it gives nothing."""
    try:
        return measured(arch, data, args)
    except Exception as e:  # noqa: BLE001 - a failure is a finding, and the next architecture is tried all the same
        traceback.print_exc()
        return {"failed": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"}


def measured(arch: str, data: Data, args: argparse.Namespace) -> Row:
    folder = args.keep / re.sub(r"\W+", "-", arch)
    how = Preprocess(args.input_size, args.input_size)
    job = Job(data, "classification", devices.load("this-machine"), how)
    model = taught(arch, job, folder, args)
    result = narrowed(arch, model, job, folder, args)
    trials = {(t.recipe.format, t.recipe.precision.weights): t for t in result.trials}
    row = {
        "failures": [f"{t.recipe.title}: {t.failure.reason}" for t in trials.values() if t.failure],
        "notes": sorted({note for t in trials.values() for note in t.notes}),
        "verdict": result.verdict + "".join(f", {miss}" for miss in result.misses),
        "before": {"weights": parameters(model), "macs": macs(model, how), **figures(result.baseline)},
    }
    row |= {f"{format}-{bits}": figures(t) for (format, bits), t in trials.items() if t.evidence}
    return row | {"ms": milliseconds(result, trials, how, args.rounds), **reread(result, trials, how)}


def taught(arch: str, job: Job, folder: Path, args: argparse.Namespace) -> Any:
    """The architecture after a little training from random weights: the original that is compressed."""
    torch.manual_seed(0)
    model = build(arch, classes=len(job.data.classes))
    settings = FitSettings(epochs=args.epochs, batch=32, lr=1e-3, optimizer="adamw", weight_decay=0.05, ema=0.9)
    return fit(model, settings, lambda m, x, y: task.loss(m, x, y), job, checkpoint=folder / "last.pt")


def narrowed(arch: str, model: Any, job: Job, folder: Path, args: argparse.Namespace) -> Result:
    """`lighten.compress`, told to prune and to recover."""
    steps = (
        Step("channel_prune", (("ratio", args.ratio),)),
        Step("distill", (("batch", 32), ("epochs", args.recover))),
    )
    settings = Settings(
        name="run", out=folder, arch=arch, model_name=arch, steps=steps, formats=tuple(FORMATS),
        precisions=("float32", "int8"), timing=Timing(3, 10, 3, 1.0),
    )  # fmt: skip
    log = lambda line: print(f"{arch}: {line}", flush=True)  # noqa: E731
    budget = Budget(min_shrink=70.0, max_drop=3.0)
    return compress(copy.deepcopy(model), job.data, budget, preprocess=job.preprocess, settings=settings, log=log)


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: Any, how: Preprocess) -> int:
    """Of convolutions and linear layers; what attention multiplies beside them is not counted."""
    return sum(s.macs for s in shapes(model, how.input_shape).values())


def figures(trial: Trial) -> Row:
    """What the evidence of one file says."""
    e = trial.evidence
    assert e is not None, trial.failure
    kept = ("same_top1", "sqnr_db", "max_abs")
    return {"mb": e.size.mb, "top1": e.metric.value} | {k: getattr(e.fidelity, k) for k in kept}


def milliseconds(result: Result, trials: dict[Any, Trial], how: Preprocess, rounds: int) -> dict[str, float]:
    """Medians of one image on one thread: the original float ONNX file and the int8 ones, taken in turns."""
    files = {"float": result.baseline} | {f: t for f in FORMATS if (t := trials.get((f, "int8"))) and t.artifact}
    runs = {
        name: FORMATS[t.artifact.format].load(Path(result.path) / t.artifact.path, 1)
        for name, t in files.items()
        if t.artifact
    }
    x = np.random.default_rng(0).standard_normal((1, *how.input_shape)).astype(np.float32)
    return {name: statistics.median(row) for name, row in common.interleaved_ms(runs, x, rounds).items()}


def reread(result: Result, trials: dict[Any, Trial], how: Preprocess) -> Row:
    """The checkpoint of the pruned network: its size, whether it answers as the ONNX file of the same network does,
    and whether it comes back exactly once more when it is saved again."""
    trial = trials[("onnx", "float32")]
    if trial.artifact is None:
        return {}
    file = (Path(result.path) / trial.artifact.path).parent / NETWORK
    if not file.exists():
        return {"reads_back": "no checkpoint"}
    network = lighten.load(file)
    again = file.parent.parent.parent / "again.safetensors"
    lighten.save(again, network, result.model, classes=len(result.classes), preprocess=how)
    twice = lighten.load(again)
    state, other = network.state_dict(), twice.state_dict()
    exact = state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    x = np.random.default_rng(1).standard_normal((16, *how.input_shape)).astype(np.float32)
    theirs = onnx_format.load(Path(result.path) / trial.artifact.path, 1)(x)
    with torch.no_grad():
        ours, same = (m(torch.from_numpy(x)).numpy() for m in (network, twice))
    exact = exact and np.array_equal(ours, same)
    alike = np.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(np.abs(theirs).max()))
    return {
        "after": {"weights": parameters(network), "macs": macs(network, how)},
        "reads_back": "yes" if exact and alike else f"saved again {exact}, answers as the file {alike}",
        "reads_back_error": float(np.abs(ours - theirs).max()),
    }


def cells(arch: str, row: Row) -> list[str]:
    """One line of the table."""
    if "failed" in row:
        return [arch, *["-"] * (len(HEADER) - 2), f"failed: {row['failed']}"]
    files = [row.get(f"onnx-{bits}") for bits in ("float32", "int8")]
    both, ms = [row["before"], *files], row["ms"]
    ends = [row["before"], row.get("after")]
    others = [row.get(f"openvino-{bits}") for bits in ("float32", "int8")]
    return [
        arch,
        " → ".join(shown(one, "weights", "{:.2f}", 1e-6) for one in ends),
        " → ".join(shown(one, "macs", "{:.1f}", 1e-6) for one in ends),
        " → ".join(shown(one, "mb", "{:.2f}") for one in both),
        " → ".join(shown(one, "top1", "{:.1f}") for one in both),
        pairs(files, others, "same_top1", "{:.1f}"),
        pairs(files, others, "sqnr_db", "{:.0f}"),
        f"{ms['float']:.2f} → {', '.join(f'{ms[f]:.2f}' if f in ms else '-' for f in FORMATS)}",
        row.get("reads_back", "-"),
        "; ".join([row["verdict"], *row["failures"]]),
    ]


def shown(one: Row | None, key: str, form: str, scale: float = 1.0) -> str:
    return "-" if one is None else form.format(one[key] * scale)


def pairs(onnx: list[Row | None], openvino: list[Row | None], key: str, form: str) -> str:
    """ONNX's figures, then OpenVINO's: float and int8 each."""
    return "; ".join(", ".join(shown(one, key, form) for one in each) for each in (onnx, openvino))


def works(row: Row) -> bool:
    """All four files were made, the float ones answer as torch does on every image, and the checkpoint reads back."""
    files = [row.get(f"{format}-float32") for format in FORMATS]
    alike = all(one is not None and one["same_top1"] == 100 for one in files)
    return not row.get("failed") and not row["failures"] and alike and row.get("reads_back") == "yes"


def page(rows: dict[str, Row], data: Data, args: argparse.Namespace) -> str:
    sizes = {name: len(split) for name, split in data.splits.items()}
    worked = sum(map(works, rows.values()))
    head = (
        f"{worked} of {len(rows)} architectures work unchanged: trained from random weights for {args.epochs:g} epochs of "
        f"{sizes['train']} CIFAR-10 images at {args.input_size}x{args.input_size}, then `lighten.compress` with "
        f"channel_prune (ratio {args.ratio:g}) and distill ({args.recover:g} epochs). Top-1 and MB are those of the ONNX files, on "
        f"{sizes['select']} images; same answer and SQNR are held to the torch module that the file was exported from (256 "
        f"images; ONNX; OpenVINO); ms of one image on one thread, taken in turns. The checkpoint reads back where "
        f"`lighten.load` answers as the pruned float file and saves again without a bit changed. Asked: 70 % smaller, at most "
        f"3 points lost."
    )
    return f"{head}\n\n{common.table(HEADER, [cells(a, r) for a, r in rows.items()])}"


if __name__ == "__main__":
    main()
