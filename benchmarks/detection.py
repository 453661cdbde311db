"""A detector's INT8 files beside onnxruntime's quantize_static and NNCF: same weights, calibration and report images.

python benchmarks/detection.py --weights WEIGHTS.safetensors [--data composed] [--images 2000]

WEIGHTS describe themselves, as `lighten train configs/detector.yaml` writes them. Every file is scored from its own
outputs in its own runtime; boxes are decoded and suppressed by the same numpy code for all.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import ptq
from lighten import devices
from lighten.data import framed
from lighten.data import load as load_data
from lighten.formats import onnx as onnx_format
from lighten.kit import boxes
from lighten.kit.onnx_boxes import BoxRules
from lighten.models import detectors, saved
from lighten.models.load import load
from lighten.plugins import task_of
from lighten.tasks.detection import Task
from lighten.types import Job

FLOAT, OURS = "float32, onnx", "lighten int8, onnx"
OWN = (FLOAT, "float32, openvino", OURS, "lighten int8, openvino")
ORT = {
    "onnxruntime quantize_static, default": (True, False),
    "onnxruntime quantize_static, per channel": (True, True),
    "onnxruntime quantize_static, without pre-processing": (False, False),
}
"""Whether the file is pre-processed before, as onnxruntime recommends, and whether weights have a scale a channel."""
HEADER = (
    "file", "mAP %", "drop pt ± SE", "AP50 %", "mean IoU of matched boxes", "score drift", "boxes matched %",
    "MB", "ms", "faster than float ONNX", "seconds to make",
)  # fmt: skip


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    job = job_of(args)
    report = job.data.report.take(args.images).prepare(job.preprocess, what="report")
    with common.room_for(args.keep) as room:
        with contextlib.chdir(room):  # onnxruntime leaves files where it is run
            files = build(job, room)
        rows, ahead = judge(files, job, report, args.threads)
        times, beside = timed(files, job, report, room, args.rounds)
        text = page(files, rows, ahead, times, beside, job, len(report), args)
    if args.dry:
        print(text)
    else:
        common.put(args.section, text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True)
    add("--arch", help="of weights that do not describe themselves; lighten:nano_detector")
    add("--data", default="composed")
    add("--calibration", type=int, default=512)
    add("--images", type=int, default=2000)
    add("--rounds", type=int, default=80)
    add("--threads", type=int, default=1, help="for making files and answering; times are always of one thread")
    add("--section", default="detection")
    add("--keep", type=Path, help="folder for the files")
    add("--dry", action="store_true", help="print the table, write nothing")
    return parser.parse_args()


def job_of(args: argparse.Namespace) -> Job:
    """The trained detector and its data, boxes in pixels of its input."""
    path = Path(args.weights)
    model, _ = load(path, args.arch)
    how = saved.preprocess_in(saved.told(path) or {})
    if how is None:
        raise SystemExit(f"{path} does not say how images become inputs: train it with `lighten train`.")
    data = framed(load_data(args.data, calibrate=args.calibration), how)
    head = detectors.check(model, how.input_shape, len(data.classes))
    return Job(data, "detection", devices.load("this-machine"), how, model, precision=ptq.INT8, head=head)


def build(job: Job, room: Path) -> dict[str, ptq.File]:
    """The contenders of ptq.py; onnxruntime's where ptq.py could not make them, and one without pre-processing."""
    calibration = job.data.calibrate.inputs(job.preprocess)
    files = ptq.build_all(job, calibration, room)
    for k, (name, (prepare, per_channel)) in enumerate(ORT.items()):
        if name in files:
            continue
        path, began = room / f"ort{k}.onnx", time.perf_counter()
        try:
            by_onnxruntime(files[FLOAT].path, path, calibration, prepare, per_channel)
        except Exception as e:  # noqa: BLE001 - a peer's own exceptions
            print(f"{name} failed: {type(e).__name__}: {str(e)[:200]}", flush=True)
            continue
        files[name] = ptq.File(path, onnx_format, time.perf_counter() - began)
        print(f"{name}: {files[name].seconds:.1f} s", flush=True)
    return files


def by_onnxruntime(float_file: Path, path: Path, calibration: np.ndarray, prepare: bool, per_channel: bool) -> None:
    """As its documentation says, but for symbolic shape inference, which gives up on this network (its maps are resized):
    its option to skip that is taken; optimisation and ordinary shape inference stay."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[np.ndarray] = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            one = next(self.rows, None)
            return None if one is None else {"input": one[None]}

    source = float_file
    if prepare:
        source = path.with_suffix(".prepared.onnx")
        quant_pre_process(str(float_file), str(source), skip_symbolic_shape=True)
    quantize_static(str(source), str(path), Reader(), per_channel=per_channel)


# --- measuring ------------------------------------------------------------------------------------


def judge(
    files: dict[str, ptq.File], job: Job, report: Any, threads: int
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The cells of each file's accuracy, and by how many points of mAP lighten's ONNX file is ahead of each peer's.

    One file after another: raw outputs of thousands of images are hundreds of megabytes.
    """
    task, labels = task_of(job), report.labels
    kept: dict[str, np.ndarray] = {}
    rows, ahead = {}, {}
    for name, file in files.items():
        run = file.format.load(file.path, threads)
        outputs = common.outputs(run, lambda: report.batches(job.preprocess, 50))
        if name in (FLOAT, OURS):
            kept[name] = outputs
        rows[name] = cells(task, kept[FLOAT], outputs, labels)
        if name not in OWN and OURS in kept:
            ahead[name] = task.drop(kept[OURS], outputs, labels)
        print(f"{name}: mAP {rows[name][0]} %, drop {rows[name][1]}", flush=True)
    return rows, ahead


def cells(task: Task, base: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> list[str]:
    drift = task.drift(base, outputs)
    return [
        f"{task.score(outputs, labels).value:.2f}",
        str(task.drop(base, outputs, labels)),
        f"{dict(task.extra(outputs, labels))['AP50'].value:.2f}",
        f"{drift.iou:.4f}",
        f"{drift.score:.4f}",
        f"{drift.matched:.2f}",
    ]


def timed(
    files: dict[str, ptq.File], job: Job, report: Any, room: Path, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of one image on one thread, all in turns: of each file, and of what makes boxes of raw outputs, in numpy
    or inside the file."""
    task = task_of(job)
    runs = {name: file.format.load(file.path, 1) for name, file in files.items()}
    x = report.inputs(job.preprocess, slice(0, 1))
    rules, more = BoxRules(task.head, task.size, task.threshold, task.iou, task.most), {}
    for name in (FLOAT, OURS):
        if name in files:
            path = room / f"{files[name].path.stem}-boxes.onnx"
            shutil.copyfile(files[name].path, path)
            onnx_format.put_boxes_in(path, rules)
            more[f"{name}, boxes inside"] = onnx_format.load(path, 1)
    raw = runs[FLOAT](x)
    more["numpy"] = lambda _: boxes.detections(raw, task.head, task.threshold, task.iou, task.most, size=task.size)
    times = common.medians(common.interleaved_ms({**runs, **more}, x, rounds))
    return {name: times[name] for name in runs}, {name: times[name] for name in more}


# --- the page -------------------------------------------------------------------------------------


def page(
    files: dict[str, ptq.File],
    rows: dict[str, list[str]],
    ahead: dict[str, Any],
    times: dict[str, float],
    beside: dict[str, float],
    job: Job,
    images: int,
    args: argparse.Namespace,
) -> str:
    """What was done, the table, and the verdict on lighten."""
    task, how = task_of(job), job.preprocess
    table = [
        [
            name,
            *rows[name],
            f"{megabytes(file):.2f}",
            f"{times[name]:.2f}",
            f"{times[FLOAT] / times[name]:.2f}x",
            f"{file.seconds:.0f}",
        ]
        for name, file in files.items()
    ]
    head = (
        f"{type(job.original).__name__} at {how.width}x{how.height}, {len(job.data.calibrate)} calibration images, "  # type: ignore[union-attr]
        f"{images} report images of {job.data.name}, one thread. Drops are paired on the same images. Boxes above a score of "
        f"{task.threshold:g} are matched with the float ONNX file's (same class, overlap of a half or more); mAP counts those "
        f"above {task.floor:g}. ms are those of the network."
    )
    return "\n\n".join([head, common.table(HEADER, table), verdict(ahead), boxes_told(times, beside)])


def megabytes(file: ptq.File) -> float:
    return sum(f.stat().st_size for f in (file.path, file.path.with_suffix(".bin")) if f.exists()) / 1e6


def verdict(ahead: dict[str, Any]) -> str:
    """Whether lighten is better or equal within one standard error of the paired difference, peer by peer."""
    worse = [f"{name} (by {-g.value:.2f} ± {g.error:.2f} pt)" for name, g in ahead.items() if g.value < -g.error]
    shown = ", ".join(f"{name} {g.value:+.2f} ± {g.error:.2f}" for name, g in ahead.items())
    return (
        f"lighten's ONNX file is better than, or equal within one standard error to, {len(ahead) - len(worse)} of "
        f"{len(ahead)} contenders"
        + (f"; it is worse than {', '.join(worse)}" if worse else "")
        + f". Points of mAP that it is ahead, paired over the same images: {shown}."
    )


def boxes_told(times: dict[str, float], beside: dict[str, float]) -> str:
    added = [
        f"{ms - times[name]:.2f} ms more than {name}"
        for name in times
        if (ms := beside.get(f"{name}, boxes inside")) is not None
    ]
    return (
        f"From raw outputs to boxes, one image: {beside['numpy']:.2f} ms in numpy; inside the file (`--with-nms`) "
        f"{', '.join(added)}."
    )


if __name__ == "__main__":
    main()
