"""Post-training INT8 beside onnxruntime's quantize_static and NNCF: same weights, calibration and test images, one run.

python benchmarks/ptq.py --weights WEIGHTS.safetensors [--arch torchvision:resnet18] [--input-size 64]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
from lighten import devices
from lighten.data import load as load_data
from lighten.formats import onnx as onnx_format
from lighten.formats import openvino as openvino_format
from lighten.methods.quantize import Step
from lighten.models.load import load
from lighten.tasks import classification as task
from lighten.types import Job, Precision, Preprocess

INT8 = Precision("int8", "int8")


def main() -> None:
    args = parse()
    how = Preprocess(args.input_size, args.input_size)
    data = load_data("cifar10")
    model, _ = load(Path(args.weights), args.arch, classes=10)
    job = Job(data, "classification", devices.load("this-machine"), how, model, precision=INT8)
    report = data.report.prepare(how)
    calibration = data.calibrate.take(512).inputs(how)
    with tempfile.TemporaryDirectory() as room:
        files = build_all(job, calibration, Path(room))
        rows = measure(files, report, how, args.rounds)
    common.put(
        "ptq",
        f"{args.arch}, {len(calibration)} calibration images, {len(report)} CIFAR-10 test images, one thread.\n\n"
        + rows,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--arch", default="torchvision:resnet18")
    parser.add_argument("--input-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=80)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class File:
    """One contender: its file, the format it is run by, and the seconds that making it took."""

    path: Path
    format: Any
    seconds: float


def build_all(job: Job, calibration: np.ndarray, room: Path) -> dict[str, File]:
    """Every contender's file. One that fails is told and left out."""
    shape, device = job.preprocess.input_shape, job.device  # type: ignore[union-attr]
    files: dict[str, File] = {}

    def add(name: str, format: Any, make: Callable[[Path], None]) -> None:
        path = room / f"{len(files)}{format.SUFFIX}"
        began = time.perf_counter()
        try:
            make(path)
        except Exception as e:  # noqa: BLE001 - a peer's own exceptions
            print(f"{name} failed: {type(e).__name__}: {str(e)[:200]}", flush=True)
            return
        files[name] = File(path, format, time.perf_counter() - began)
        print(f"{name}: {files[name].seconds:.1f} s", flush=True)

    for format in (onnx_format, openvino_format):
        title = format.__name__.rpartition(".")[2]
        add(f"float32, {title}", format, lambda p, f=format: f.export(job.original, shape, p, Precision(), device))
    for format in (onnx_format, openvino_format):
        title = format.__name__.rpartition(".")[2]
        add(
            f"lighten int8, {title}",
            format,
            lambda p, f=format: f.export(Step().apply(job.original, job), shape, p, INT8, device),
        )
    plain = files["float32, onnx"].path
    add(
        "onnxruntime quantize_static, default",
        onnx_format,
        lambda p: by_onnxruntime(plain, p, calibration, per_channel=False),
    )
    add(
        "onnxruntime quantize_static, per channel",
        onnx_format,
        lambda p: by_onnxruntime(plain, p, calibration, per_channel=True),
    )
    add("NNCF, onnx", onnx_format, lambda p: by_nncf_onnx(plain, p, calibration))
    add("NNCF, openvino", openvino_format, lambda p: by_nncf_openvino(files["float32, openvino"].path, p, calibration))
    return files


def by_onnxruntime(plain: Path, path: Path, calibration: np.ndarray, per_channel: bool) -> None:
    """As its documentation says: pre-processing, then quantize_static with a data reader; everything else default."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[np.ndarray] = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            one = next(self.rows, None)
            return None if one is None else {"input": one[None]}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(plain), str(prepared))
    quantize_static(str(prepared), str(path), Reader(), per_channel=per_channel)


def by_nncf_onnx(plain: Path, path: Path, calibration: np.ndarray) -> None:
    import nncf
    import onnx

    rows = nncf.Dataset(calibration, lambda one: {"input": one[None]})
    onnx.save(nncf.quantize(onnx.load(plain), rows, subset_size=len(calibration)), path)


def by_nncf_openvino(plain: Path, path: Path, calibration: np.ndarray) -> None:
    import nncf
    import openvino as ov

    rows = nncf.Dataset(calibration, lambda one: one[None])
    ov.save_model(
        nncf.quantize(ov.Core().read_model(plain), rows, subset_size=len(calibration)), path, compress_to_fp16=False
    )


def measure(files: dict[str, File], report: Any, how: Preprocess, rounds: int) -> str:
    """Accuracy on every test image, then latencies taken in turns."""
    labels, threads = report.labels, torch.get_num_threads()
    got = {}
    for name, file in files.items():
        run = file.format.load(file.path, threads)
        got[name] = common.outputs(run, lambda: report.batches(how, 50))
        print(f"{name}: top-1 {task.score(got[name], labels)} %", flush=True)
    runs = {name: file.format.load(file.path, 1) for name, file in files.items()}
    times = common.medians(common.interleaved_ms(runs, report.inputs(how, slice(0, 1)), rounds))
    base = got["float32, onnx"]
    rows = []
    for name, file in files.items():
        size = sum(f.stat().st_size for f in (file.path, file.path.with_suffix(".bin")) if f.exists())
        rows.append(
            [
                name,
                f"{task.score(got[name], labels).value:.2f}",
                f"{task.drop(base, got[name], labels)}",
                f"{100 * (got[name].argmax(1) == base.argmax(1)).mean():.2f}",
                f"{size / 1e6:.2f}",
                f"{times[name]:.2f}",
                f"{times['float32, onnx'] / times[name]:.2f}x",
                f"{file.seconds:.0f}",
            ]
        )
    same = 100 * (got["lighten int8, onnx"].argmax(1) == got["lighten int8, openvino"].argmax(1)).mean()
    header = (
        "file",
        "top-1 %",
        "drop pt ± SE",
        "same answer as float %",
        "MB",
        "ms",
        "faster than float ONNX",
        "seconds to make",
    )
    return (
        common.table(header, rows) + f"\n\nlighten's two int8 files give the same answer on {same:.2f} % of the images."
    )


if __name__ == "__main__":
    main()
