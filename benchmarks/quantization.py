"""lighten's quantization beside every peer's: same weights, calibration and test images, one run, one table.

python benchmarks/quantization.py --weights WEIGHTS.safetensors --arch torchvision:resnet18 --input-size 64 --bits w8a8

Each peer is a script in peers/, run in an environment of its own under ~/.cache/lighten-peers (or $LIGHTEN_PEERS),
which is built from its requirements when it is not there. For w4a8 one rule holds for all: the first and the last
layer keep 8-bit weights, wherever a tool lets one say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import common
from lighten import devices
from lighten.data import load as load_data
from lighten.formats import onnx as onnx_format
from lighten.formats import openvino as openvino_format
from lighten.methods.quantize import Step
from lighten.models.load import load
from lighten.quant.static import ends
from lighten.search import uniform
from lighten.tasks import classification as task
from lighten.types import Asked, Job, Precision, Preprocess

PEERS = ("ort", "nncf_ptq", "pt2e", "mct", "aimet", "nvidia_modelopt")
FORMATS = {".onnx": onnx_format, ".xml": openvino_format}
FLOAT, OURS = "float32, onnx", "lighten, onnx"
HEADER = (
    "contender",
    "top-1 %",
    "drop pt ± SE",
    "same answer as float %",
    "MB",
    "ms",
    "faster than float ONNX",
    "seconds to make",
    "note",
)


@dataclasses.dataclass
class Contender:
    """A row of the table: a file that we run, or answers that its own tool simulated, or the reason for neither."""

    title: str
    path: Path | None = None
    seconds: float | None = None
    note: str = ""
    simulated: np.ndarray | None = None
    outputs: np.ndarray | None = None
    ms: float | None = None

    @property
    def mb(self) -> float | None:
        if self.path is None:
            return None
        return sum(f.stat().st_size for f in self.path.parent.glob(f"{self.path.stem}.*")) / 1e6

    def add_note(self, text: str) -> None:
        self.note = "; ".join(x for x in (self.note, text) if x)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    how = preprocess(args)
    data = load_data("cifar10", calibrate=max(512, args.calibration))
    data = dataclasses.replace(data, calibrate=data.calibrate.take(args.calibration))
    model, _ = load(Path(args.weights), args.arch, classes=len(data.classes))
    job = Job(data, "classification", devices.load("this-machine"), how, model)
    tests = data.report.take(args.images)
    with common.room_for(args.keep) as room:
        lay_out(room, job, tests, args)
        contenders = [*floats(job, room), *ours(job, args.bits, room)]
        versions: dict[str, str] = {}
        for name in args.peers:
            made, found = peer(name, room, args)
            contenders += made
            versions |= found
        answer_all(contenders, np.load(room / "tests.npy", mmap_mode="r"), args.threads)
        time_all(contenders, np.load(room / "calibration.npy")[:1], args.rounds)
        text = page(contenders, tests.labels, versions, args)
    if args.dry:
        print(text)
    else:
        common.put(args.section or f"quantization-{args.arch.rpartition(':')[2]}-{args.bits}", text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True)
    add("--arch", default="torchvision:resnet18", help="torchvision:NAME or timm:NAME")
    add("--input-size", type=int, default=64)
    add("--mean", type=float, nargs=3)
    add("--std", type=float, nargs=3)
    add("--interpolation", default="bilinear")
    add("--bits", choices=("w8a8", "w4a8"), default="w8a8")
    add("--peers", type=lambda s: [x for x in s.split(",") if x], default=list(PEERS), help=f"of {','.join(PEERS)}")
    add("--calibration", type=int, default=512)
    add("--images", type=int, default=10000)
    add("--iterations", type=int, default=300, help="of AIMET's AdaRound, per layer (its own default is 15000)")
    add(
        "--skip",
        nargs="*",
        default=[],
        help="leave out contenders whose title holds one of these words (GPTQ, AdaRound)",
    )
    add("--limit-s", type=float, default=7200, help="of one peer, all its contenders together")
    add("--threads", type=int, default=1, help="for making files and answering; latency is always of one thread")
    add("--rounds", type=int, default=80)
    add("--section", help="section of README.md (quantization-ARCH-BITS)")
    add("--keep", type=Path, help="folder for the files; peers that are done there for the same job are not run again")
    add("--dry", action="store_true", help="print the table, write nothing")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    return args


def preprocess(args: argparse.Namespace) -> Preprocess:
    own = {k: tuple(v) for k, v in (("mean", args.mean), ("std", args.std)) if v}
    return Preprocess(args.input_size, args.input_size, interpolation=args.interpolation, **own)


def lay_out(room: Path, job: Job, tests: Any, args: argparse.Namespace) -> None:
    """What every peer gets: the network as ONNX and as weights, calibration and test images, and what to do."""
    how, model = job.preprocess, job.original
    onnx_format.export(model, how.input_shape, room / "float.onnx", Precision(), job.device)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, room / "weights.safetensors")
    np.save(room / "calibration.npy", job.data.calibrate.inputs(how))
    shape = (len(tests), *how.input_shape)
    array = np.lib.format.open_memmap(room / "tests.npy", mode="w+", dtype=np.float32, shape=shape)
    done = 0
    for x in tests.batches(how, 100):
        array[done : done + len(x)] = x
        done += len(x)
    array.flush()
    convolutions = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    values = {
        "room": str(room),
        "arch": args.arch,
        "classes": len(job.data.classes),
        "weight_bits": 8 if args.bits == "w8a8" else 4,
        "iterations": args.iterations,
        "first": convolutions[0],
        "last": task.protect(model)[-1],
        "skip": args.skip,
    }
    (room / "job.json").write_text(json.dumps(values))


# --- lighten's own --------------------------------------------------------------------------------


def floats(job: Job, room: Path) -> list[Contender]:
    """The untouched network in both formats."""
    return [made_by_us(f"float32, {f}", job, Precision(), room / f"float-{f}", FORMATS[s], lambda: job.original)
            for s, f in ((".onnx", "onnx"), (".xml", "openvino"))]  # fmt: skip


def ours(job: Job, bits: str, room: Path) -> list[Contender]:
    """lighten's files: one plan, written in both formats."""
    precision = our_precision(bits, job)
    mine = dataclasses.replace(job, precision=precision)
    began = time.perf_counter()
    module = Step(images=len(job.data.calibrate)).apply(job.original, mine)
    seconds = time.perf_counter() - began
    rows = [
        made_by_us(f"lighten, {name}", mine, precision, room / f"ours-{bits}-{name}", FORMATS[suffix], lambda: module)
        for suffix, name in ((".onnx", "onnx"), (".xml", "openvino"))
    ]
    for row in rows:
        row.seconds = None if row.seconds is None else row.seconds + seconds
    return rows


def our_precision(bits: str, job: Job) -> Precision:
    """What `lighten quantize --bits` takes: below 8 bits the first and the last layer keep 8."""
    asked = Asked("ptq", bits)
    return uniform(asked, ends(job.original, job.preprocess.input_shape) if bits == "w4a8" else ())  # type: ignore[union-attr]


def made_by_us(
    title: str, job: Job, precision: Precision, folder: Path, format: Any, make: Callable[[], Any]
) -> Contender:
    folder.mkdir(exist_ok=True)
    path = folder / f"model{format.SUFFIX}"
    began = time.perf_counter()
    try:
        format.export(make(), job.preprocess.input_shape, path, precision, job.device)
    except Exception as e:  # noqa: BLE001 - a failure is a row, for us too
        return Contender(title, note=f"failed: {type(e).__name__}: {str(e)[:160]}")
    print(f"{title}: made in {time.perf_counter() - began:.0f} s", flush=True)
    return Contender(title, path, time.perf_counter() - began)


# --- peers ----------------------------------------------------------------------------------------


def peer(name: str, room: Path, args: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """Run one peer's script in its environment; whatever goes wrong becomes a row."""
    out = room / f"{name}-{args.bits}"
    wanted = {**json.loads((room / "job.json").read_text()), "out": str(out)}
    done = out / "done.json"
    stamp = json.dumps([wanted, args.calibration, args.images, args.threads, hashes(room, name)])
    if not (done.exists() and done.read_text() == stamp):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            python = environment(name)
        except (OSError, subprocess.SubprocessError) as e:
            return [Contender(name, note=f"failed: its environment could not be built ({str(e)[:160]})")], {}
        (out / "job.json").write_text(json.dumps(wanted))
        print(f"{name}: running, log in {out / 'log.txt'}", flush=True)
        code = run_logged([str(python), str(script(name)), str(out / "job.json")], out / "log.txt", args)
        if code:
            rows, versions = read_results(out)
            return [*rows, Contender(name, note=f"failed: exit code {code}: {last_line(out / 'log.txt')}")], versions
        done.write_text(stamp)
    return read_results(out)


def script(name: str) -> Path:
    return common.HERE / "peers" / f"{name}.py"


def hashes(room: Path, name: str) -> list[str]:
    """What a finished peer depended on: the weights, and its own code and requirements."""
    files = (room / "weights.safetensors", script(name), script("peer"), script(name).with_suffix(".txt"))
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def run_logged(command: list[str], log: Path, args: argparse.Namespace) -> int:
    """The exit code; 124 where it took over `--limit-s`."""
    threads = args.threads
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=log.parent, timeout=args.limit_s
            )
        except subprocess.TimeoutExpired:
            return 124
    return done.returncode


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def read_results(out: Path) -> tuple[list[Contender], dict[str, str]]:
    file = out / "results.json"
    if not file.exists():
        return [], {}
    results = json.loads(file.read_text())
    return [read_row(row) for row in results["rows"]], results["versions"]


def read_row(row: dict[str, Any]) -> Contender:
    if row["status"] != "made":
        return Contender(row["title"], note=f"{row['status']}: {row['note']}")
    folder = Path(row["folder"])
    path = next((folder / f"model{s}" for s in FORMATS if (folder / f"model{s}").exists()), None)
    simulated = np.load(folder / "outputs.npy") if (folder / "outputs.npy").exists() else None
    return Contender(row["title"], path, row["seconds"], row["note"], simulated)


def environment(name: str) -> Path:
    """The Python of a peer's environment, built when it is not there or its requirements have changed."""
    home = Path(os.environ.get("LIGHTEN_PEERS") or Path.home() / ".cache" / "lighten-peers")
    folder, needs = home / name, script(name).with_suffix(".txt")
    python, mark = folder / "bin" / "python", folder / "complete"
    want = hashlib.sha256(needs.read_bytes() + sys.version.encode()).hexdigest()
    if mark.exists() and mark.read_text() == want and python.exists():
        return python
    print(f"{name}: building its environment in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv:
        call(uv, "venv", "--quiet", "--python", sys.executable, str(folder))
        call(uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(needs))
    else:
        call(sys.executable, "-m", "venv", str(folder))
        call(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(needs))
    mark.write_text(want)
    return python


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise OSError(lines[-1] if lines else f"{command[0]} gave exit code {done.returncode}")


# --- measuring ------------------------------------------------------------------------------------


def answer_all(contenders: list[Contender], tests: np.ndarray, threads: int) -> None:
    """Every contender's outputs: of its file in its runtime, else those that its tool simulated."""
    for c in contenders:
        if c.path is None:
            c.outputs = c.simulated
            if c.simulated is not None:
                c.add_note("simulated")
            continue
        try:
            c.outputs = answers(FORMATS[c.path.suffix].load(c.path, threads), tests)
        except Exception as e:  # noqa: BLE001 - a peer's file may be anything
            c.add_note(f"its file does not run: {' '.join(str(e).split())[:160]}")
            c.path = None
            c.outputs = c.simulated if c.simulated is not None and len(c.simulated) == len(tests) else None
            continue
        if c.simulated is not None:
            same = 100 * (c.outputs[: len(c.simulated)].argmax(1) == c.simulated.argmax(1)).mean()
            c.add_note(f"its simulation answers {same:.1f} % of {len(c.simulated)} images alike")
        print(f"{c.title}: answered", flush=True)


def answers(run: common.Run, tests: np.ndarray) -> np.ndarray:
    """Outputs in batches of 50; one at a time where a file takes no batch."""
    try:
        run(np.array(tests[:2]))
        size = 50
    except Exception:  # noqa: BLE001 - each runtime has its own
        size = 1
    return common.outputs(run, lambda: (np.array(tests[k : k + size]) for k in range(0, len(tests), size)))


def time_all(contenders: list[Contender], x: np.ndarray, rounds: int) -> None:
    files = {c.title: c for c in contenders if c.path is not None and c.outputs is not None}
    runs = {title: FORMATS[c.path.suffix].load(c.path, 1) for title, c in files.items()}  # type: ignore[union-attr]
    for title, ms in common.medians(common.interleaved_ms(runs, x, rounds)).items():
        files[title].ms = ms


def page(contenders: list[Contender], labels: np.ndarray, versions: dict[str, str], args: argparse.Namespace) -> str:
    """What was done, the table, and the verdict on lighten."""
    base = next(c for c in contenders if c.title == FLOAT)
    tools = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = (
        f"{args.arch}, {args.bits}, {args.calibration} calibration images, {len(labels)} CIFAR-10 test images, "
        f"one thread for latency, {args.threads} for making. "
        + (
            "The first and the last layer keep 8-bit weights where the tool lets one say so. "
            if args.bits == "w4a8"
            else ""
        )
        + "A simulated row was answered by the tool's own framework, since it gave no file. "
        + f"Peers: {tools}."
    )
    rows = [cells(c, base, labels) for c in contenders]
    return f"{head}\n\n{common.table(HEADER, rows)}\n\n{verdict(contenders, labels)}"


def cells(c: Contender, base: Contender, labels: np.ndarray) -> list[str]:
    known = c.outputs is not None and base.outputs is not None
    return [
        c.title,
        f"{task.score(c.outputs, labels).value:.2f}" if known else "-",
        f"{task.drop(base.outputs, c.outputs, labels)}" if known else "-",
        f"{100 * (c.outputs.argmax(1) == base.outputs.argmax(1)).mean():.2f}" if known else "-",  # type: ignore[union-attr]
        "-" if c.mb is None else f"{c.mb:.2f}",
        "-" if c.ms is None else f"{c.ms:.2f}",
        "-" if c.ms is None or base.ms is None else f"{base.ms / c.ms:.2f}x",
        "-" if c.seconds is None else f"{c.seconds:.0f}",
        c.note.replace("|", "/"),
    ]


def verdict(contenders: list[Contender], labels: np.ndarray) -> str:
    """Whether lighten is better or equal within one standard error of the paired difference, peer by peer."""
    mine = next((c for c in contenders if c.title == OURS and c.outputs is not None), None)
    if mine is None:
        return "lighten has no file to compare yet."
    own = (FLOAT, "float32, openvino", OURS, "lighten, openvino")
    others = [c for c in contenders if c.title not in own and c.outputs is not None]
    gains = {c.title: task.drop(mine.outputs, c.outputs, labels) for c in others}  # what they lose to us
    worse = [f"{name} (by {-g.value:.2f} ± {g.error:.2f} pt)" for name, g in gains.items() if g.value < -g.error]
    shown = ", ".join(f"{name} {g.value:+.2f} ± {g.error:.2f}" for name, g in gains.items())
    return (
        f"lighten's ONNX file is better than, or equal within one standard error to, {len(gains) - len(worse)} of "
        f"{len(gains)} contenders"
        + (f"; it is worse than {', '.join(worse)}" if worse else "")
        + f". Points of top-1 that it is ahead, paired over the same images: {shown}."
    )


if __name__ == "__main__":
    main()
