"""Mixed precision at three budgets beside every uniform choice: bytes on disk and accuracy of the files themselves.

python benchmarks/mixed.py --weights WEIGHTS.safetensors --arch timm:efficientnet_lite0 --input-size 96 [--rounding nearest]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import common
from lighten import devices
from lighten.data import load as load_data
from lighten.formats import onnx as onnx_format
from lighten.methods.quantize import Step
from lighten.models.load import load
from lighten.quant.allocate import allocate
from lighten.quant.sensitivity import scan
from lighten.quant.static import ends
from lighten.search import uniform
from lighten.tasks import classification as task
from lighten.types import Asked, Job, LayerCost, Precision, Preprocess

SHARES = (0.2, 0.45, 0.7)
"""Where between the bytes of all-int4 and all-int8 the three budgets lie."""
CHOICES = (("int4", "int8"), ("int8", "int8"))


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    own = {k: tuple(v) for k, v in (("mean", args.mean), ("std", args.std)) if v}
    how = Preprocess(args.input_size, args.input_size, interpolation=args.interpolation, **own)
    data = load_data("cifar10")
    model, _ = load(Path(args.weights), args.arch, classes=10)
    job = Job(data, "classification", devices.load("this-machine"), how, model)
    began = time.perf_counter()
    costs = scan(model, how.input_shape, sample(job), job.device, CHOICES)
    seconds = time.perf_counter() - began
    report = data.report.take(args.images).prepare(how)
    rows, reference = [], np.zeros(0)
    with tempfile.TemporaryDirectory() as room:
        for title, precision in {"float32": Precision(), **contenders(job, costs)}.items():
            path = Path(room) / f"{len(rows)}.onnx"
            build(job, precision, path, args.rounding)
            run = onnx_format.load(path, args.threads)
            outputs = common.outputs(run, lambda: report.batches(how, 50))
            reference = outputs if not rows else reference
            rows.append(row(title, path, outputs, reference, report.labels))
            print(rows[-1], flush=True)
    text = common.table(("precision", "MB", "top-1 %", "drop pt ± SE", "KL to float, mnat"), rows)
    common.put(
        args.section,
        f"{args.arch}, rounding {args.rounding}, {len(report)} CIFAR-10 test images. The scan of {len(costs)} layer costs took "
        f"{seconds:.0f} s. Budgets: {', '.join(f'{100 * s:.0f} %' for s in SHARES)} of the way from all-int4 to all-int8.\n\n"
        + text,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True)
    add("--arch", default="torchvision:resnet18")
    add("--input-size", type=int, default=64)
    add("--interpolation", default="bilinear")
    add("--mean", type=float, nargs=3)
    add("--std", type=float, nargs=3)
    add("--images", type=int, default=10000)
    add("--rounding", default="auto", help="auto learns it (minutes a row), nearest does not")
    add("--threads", type=int, default=1)
    add("--section", default="mixed")
    return parser.parse_args()


def sample(job: Job) -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in job.data.calibrate.take(128).batches(job.preprocess, 32)]


def contenders(job: Job, costs: tuple[LayerCost, ...]) -> dict[str, Precision]:
    """Every uniform choice, then the mix of least damage for each budget."""
    assert job.preprocess is not None
    low, high = (sum(c.bytes for c in costs if c.weights == w) for w in ("int4", "int8"))
    spared = ends(job.original, job.preprocess.input_shape)
    mixes = {
        f"mixed, at most {(low + s * (high - low)) / 1e6:.2f} MB of weights": allocate(
            costs, max_bytes=low + s * (high - low)
        ).precision
        for s in SHARES
    }
    return {
        "int8 everywhere": Precision("int8", "int8"),
        "int4 weights everywhere": Precision("int4", "int8"),
        "int4 weights, first and last layer int8": uniform(Asked("ptq", "w4a8"), spared),
        **mixes,
    }


def build(job: Job, precision: Precision, path: Path, rounding: str) -> None:
    mine = dataclasses.replace(job, precision=precision)
    module = Step(rounding=rounding).apply(job.original, mine)
    assert job.preprocess is not None
    onnx_format.export(module, job.preprocess.input_shape, path, precision, job.device)


def row(title: str, path: Path, outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> list[str]:
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (reference.astype(np.float64), outputs.astype(np.float64)))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    divergence = float((p * (np.log(p + 1e-30) - np.log(q + 1e-30))).sum(1).mean())
    return [
        title,
        f"{path.stat().st_size / 1e6:.2f}",
        f"{task.score(outputs, labels).value:.2f}",
        str(task.drop(reference, outputs, labels)),
        f"{1e3 * divergence:.2f}",
    ]


if __name__ == "__main__":
    main()
