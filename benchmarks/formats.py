"""Every format x precision of three real networks, each file in its own runtime: writes benchmarks/formats.md.

python benchmarks/formats.py --keep FOLDER --networks resnet18=WEIGHTS mobilenet_v3=WEIGHTS efficientnet_lite0=WEIGHTS

One plan a network is decided by `lighten.compress` (int8, no training), then `lighten export` writes it in every format
whose tools are installed. `--keep` holds runs and rows: an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
from lighten import bench, exports, workshop
from lighten.bench import Timing
from lighten.data import load as load_data
from lighten.data.cache import write_whole
from lighten.models.load import load
from lighten.plugins import names
from lighten.quant import program
from lighten.report import read_result
from lighten.types import Budget, Precision, Preprocess
from lighten.walk import Settings, compress

HALF = (0.5,) * 3
KNOWN = {
    "resnet18": ("torchvision:resnet18", Preprocess(64, 64)),
    "mobilenet_v3": ("torchvision:mobilenet_v3_large", Preprocess(64, 64)),
    "efficientnet_lite0": (
        "timm:efficientnet_lite0",
        Preprocess(96, 96, interpolation="bicubic", mean=HALF, std=HALF),
    ),
}
TIMING = Timing(5, 40, 10, 2.0)
MOST_SHARE, MOST_DROP = 27.0, 0.3
"""Of the issue: int8 bytes in percent of float32's, and points of top-1 that a file may be below the ONNX int8 one."""
NOISE = (1e-5, 1e-4)
HEADER = (
    "format", "precision", "MB", "% of float32", "same answer %", "top-1 %", "drop pt ± SE", "ms", "memory MB",
    "what fell back, or why there is no figure",
)  # fmt: skip


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    pages = []
    for given in args.networks:
        name, _, weights = given.partition("=")
        run = decided(name, Path(weights), args)
        rows = exported(run, args)
        pages.append(page(name, run, rows, args))
    head = (
        "# Formats\n\nMade by `python benchmarks/formats.py`; see its first lines. One plan a network, every format, each "
        f"file in its own runtime on {args.images} CIFAR-10 test images; ms of one image on one thread of this machine, "
        "memory of the process. *Same answer*: top-1 as the torch program that the file was written from.\n"
    )
    write_whole(common.HERE / "formats.md", "\n".join([head, *pages]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", nargs="+", required=True, help="NAME=WEIGHTS, names: " + ", ".join(KNOWN))
    add("--formats", nargs="+", default=names("formats"))
    add("--images", type=int, default=1000)
    add("--threads", type=int, default=1)
    add("--keep", type=Path, required=True)
    return parser.parse_args()


def decided(name: str, weights: Path, args: argparse.Namespace) -> Path:
    """The run folder in which the plan of a network lies."""
    run = args.keep / name
    if not (run / "result.json").exists():
        arch, how = KNOWN[name]
        model, _ = load(weights, arch, classes=10)
        settings = Settings(
            name=name, out=args.keep, arch=arch, model_name=arch, formats=("onnx",), precisions=("int8",), narrow=False,
            timing=TIMING,
        )  # fmt: skip
        data = load_data("cifar10")
        compress(model, data, Budget(), preprocess=how, settings=settings, log=lambda line: print(line, flush=True))
    return run


def exported(run: Path, args: argparse.Namespace) -> tuple[exports.Row, ...]:
    """Rows of every format; those that were made before are read again."""
    done = {row.format for row in exports.read_record(run)}
    todo = [f for f in args.formats if f not in done]
    if todo:
        exports.export(run, todo, images=args.images, timing=TIMING, log=lambda line: print(line, flush=True))
    order = {f: k for k, f in enumerate(args.formats)}
    rows = [row for row in exports.read_record(run) if row.format in order]
    return tuple(sorted(rows, key=lambda row: order[row.format]))


def page(name: str, run: Path, rows: tuple[exports.Row, ...], args: argparse.Namespace) -> str:
    table = common.table(HEADER, [cells(row) for row in rows])
    return (
        f"## {name}\n\n{table}\n\n{verdict(rows)}\n\n{floor(run, args.images)}\n\n{agreement(run, rows, args.images)}\n"
    )


def cells(row: exports.Row) -> list[str]:
    said = "; ".join(filter(None, [row.reason, ", ".join(row.fallbacks)]))
    status = "" if row.status == "PASS" else f"**{row.status}** "
    size = f"{row.bytes / 1e6:.2f}" if row.bytes else "-"
    share = f"{100 * row.bytes / row.original_bytes:.1f}" if row.bytes else "-"
    if row.evidence is None:
        return [row.format, row.precision.title, size, share, *["-"] * 5, f"{status}{said}"]
    e = row.evidence
    figures = [
        f"{e.fidelity.same_top1:.1f}",
        f"{e.metric.value:.2f}",
        str(e.drop),
        f"{e.p50(1):.2f}",
        f"{e.memory_mb:.0f}",
    ]
    return [row.format, row.precision.title, size, share, *figures, f"{status}{said}"]


def verdict(rows: tuple[exports.Row, ...]) -> str:
    """The issue's two limits, checked."""
    int8 = [r for r in rows if r.precision == Precision("int8", "int8") and r.bytes]
    large = [
        f"{r.format} {100 * r.bytes / r.original_bytes:.1f} %"
        for r in int8
        if r.bytes > MOST_SHARE / 100 * r.original_bytes
    ]
    base = next((r.evidence.drop.value for r in int8 if r.format == "onnx" and r.evidence), 0.0)
    ran = [(r.format, r.evidence.drop.value - base) for r in int8 if r.evidence]
    far = [f"{f} {d:+.2f} pt" for f, d in ran if round(d, 2) > MOST_DROP]
    return (
        f"int8 files over {MOST_SHARE:g} % of float32: {', '.join(large) or 'none'} (of {len(int8)}). More than "
        f"{MOST_DROP:g} pt below the ONNX int8 file: {', '.join(far) or 'none'} (of {len(ran)} that ran)."
    )


def floor(run: Path, images: int) -> str:
    """How far the int8 plan agrees with itself where its inputs move by far less than one step of a pixel: no other
    arithmetic can agree with it better than that."""
    result = read_result(run)
    split = load_data("cifar10").report.take(images).prepare(result.preprocess)
    plan = program.read(workshop.program_of(result.winning.recipe, run / "artifacts"))
    dice = torch.Generator().manual_seed(0)

    def answers(noise: float) -> np.ndarray:
        with torch.inference_mode():
            parts = [torch.from_numpy(x) for x in split.batches(result.preprocess, 50)]
            return np.concatenate([plan(x + noise * torch.randn(x.shape, generator=dice)).numpy() for x in parts])

    before = answers(0.0)
    rows = [f"{100 * (answers(n).argmax(1) == before.argmax(1)).mean():.1f} % with noise of {n:g}" for n in NOISE]
    step = 1 / 255 / max(result.preprocess.std if result.preprocess else (1.0,))
    return (
        f"The int8 plan agrees with itself, in torch, on {' and '.join(rows)} on its inputs, where one step of a pixel is "
        f"{step:.2g}: what differs in the last bit of a float is rounded to another integer now and then, and grows."
    )


def agreement(run: Path, rows: tuple[exports.Row, ...], images: int) -> str:
    """How the int8 files of one plan agree with each other: same top-1, and the largest difference of a score."""
    result = read_result(run)
    split = load_data("cifar10").report.take(min(images, 256)).prepare(result.preprocess)
    int8 = [r for r in rows if r.precision == Precision("int8", "int8") and r.evidence]
    answers: dict[str, np.ndarray] = {
        r.format: bench.measure(run / r.path, r.format, workshop.decoded(split), result.preprocess, timing=None).outputs
        for r in int8
    }
    largest = max((float(np.abs(a).max()) for a in answers.values()), default=1.0)
    cells_: list[list[Any]] = [
        [a, b, f"{100 * (answers[a].argmax(1) == answers[b].argmax(1)).mean():.1f}",
         f"{np.abs(answers[a] - answers[b]).max() / largest * 100:.2f}"]
        for a, b in itertools.combinations(answers, 2)
    ]  # fmt: skip
    head = f"The same int8 plan in two runtimes, {len(split)} images (differences in percent of the largest score):"
    return f"{head}\n\n{common.table(('one', 'other', 'same top-1 %', 'largest difference %'), cells_)}"


if __name__ == "__main__":
    main()
