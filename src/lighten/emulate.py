"""A bundle on an emulated Raspberry Pi: the same file, the ARM runtime, the same answers? Nothing about speed."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lighten import bench
from lighten import bundle as bundles
from lighten.bundle import Bundle
from lighten.data.cache import cache_dir
from lighten.data.images import SUFFIXES, open_image
from lighten.data.preprocess import to_pixels
from lighten.errors import BadBundle, BadConfig, CrashedRuntime, RefusedFormat, UnknownName
from lighten.machine import this_machine
from lighten.plugins import get
from lighten.types import Progress, silent, to_json
from lighten.userland import CORES, Core, Userland, build, python_here, qemu_version

RunCode = Callable[[str, list[str], Path, float], None]
"""(code, arguments, a folder of its own, seconds): runs Python somewhere."""
RUN_S = 900.0
BATCH = 16
INSPECTED = 2
"""Images with differing integer answers that are followed from operator to operator."""


TRIED = ("onnx", "litert", "mnn", "ncnn", "openvino")
"""Formats whose runtimes have aarch64 wheels for Linux."""


@dataclass(frozen=True)
class Emulated:
    """How the answers of an emulated core compare with those of this machine.

    `what` they are is one answer for each image, or every box that a detector shows: `same` of `compared` are the same,
    and of `golden` such in the bundle the core gives `golden_same` too. `worst` is the largest difference of two scores,
    `allowed` what the bundle allows (of its golden vectors; 0 where the answers must be equal bit for bit). `built_s` is
    what the userland took to build (0 where it was there), `seconds` the emulated run alone.
    """

    core: str
    board: str
    format: str
    precision: str
    images: int
    images_from: str
    what: str
    same: int
    compared: int
    golden: int
    golden_same: int
    worst: float
    allowed: float
    bit_exact: bool
    there: str
    here: str
    dot_products: bool
    built_s: float
    seconds: float
    remark: str = ""

    @property
    def passed(self) -> bool:
        """Every answer is the same, and no score differs by more than is allowed."""
        return self.same == self.compared and self.worst <= self.allowed

    @property
    def lines(self) -> tuple[str, ...]:
        """For a person to read, the verdict first."""
        scores = "bit for bit the same scores" if self.bit_exact else f"scores differ by at most {self.worst:.3g}"
        allowed = "must be equal" if self.allowed == 0 else f"allowed {self.allowed:.3g}"
        dots = "with" if self.dot_products else "without"
        return (
            f"{'PASS' if self.passed else 'FAIL'} {self.core} ({self.board}): {self.same} of {self.compared} {self.what} "
            f"are the same as on this machine, {scores} ({allowed}); {self.golden_same} of {self.golden} golden {self.what}.",
            f"ran {self.format} {self.precision} on {self.images_from}",
            f"there: {self.there}, {dots} dot-product instructions; here: {self.here}",
            *((self.remark,) if self.remark else ()),
            "This proves answers, not speed: an emulator's times say nothing about the board's. "
            "On the board: lighten bench BUNDLE --ssh user@host",
        )


def _quiet(text: str) -> None:
    """Says nothing."""


def check(
    bundle_folder: Path,
    core: str = "cortex-a72",
    images: int = 0,
    *,
    source: Sequence[Path] = (),
    cache: Path | None = None,
    timeout_s: float = RUN_S,
    progress: Progress = silent,
    log: Callable[[str], None] = _quiet,
) -> Emulated:
    """Run the bundle's golden vectors and `images` more on an emulated `core`, and compare with this machine.

    The further images come from `source` (files, or folders that are walked); without one they are made of the golden
    images (see `variations`). The arm64 userland is built once under `cache` [the cache folder of lighten].
    Raises UnknownName, RefusedFormat, MissingTool, BadBundle, BadConfig, and CrashedRuntime where the emulated process
    dies or takes longer than `timeout_s`.
    """
    if core not in CORES:
        raise UnknownName("emulated core", core, CORES)
    if images < 0:
        raise BadConfig(f"images is {images}.", "Give 0 or more.")
    found = bundles.load(bundle_folder)
    if found.format not in TRIED:
        why = f"The runtime of {found.format} is not to be had for ARM Linux as a wheel."
        raise RefusedFormat(why, f"Formats that can be checked: {', '.join(TRIED)}.")
    module = get("formats", found.format, needs="RUNS_ON")
    pixels, images_from = _pixels(found, images, source)
    progress("check", 0, 3)
    start = time.monotonic()
    userland = build(CORES[core], module, cache or cache_dir(), log)
    built_s = time.monotonic() - start if userland.new else 0.0
    progress("check", 1, 3)
    here = answers(python_here, found, pixels, timeout_s)
    progress("check", 2, 3)
    start = time.monotonic()
    there = answers(userland.python_there, found, pixels, timeout_s)
    progress("check", 3, 3)
    seconds = time.monotonic() - start
    unequal = np.flatnonzero((there.outputs != here.outputs).reshape(len(pixels), -1).any(1))
    inside = None
    if len(unequal) and _integer(found):
        inside = first_differences(found, userland, pixels[unequal[:INSPECTED]], timeout_s)
    return compare(found, CORES[core], here, there, inside, images_from, (built_s, seconds))


def compare(
    found: Bundle,
    core: Core,
    here: Answers,
    there: Answers,
    inside: tuple[Difference, ...] | None,
    images_from: str,
    spent: tuple[float, float],
) -> Emulated:
    """The record of a check, from outputs (N, ...) here and there; `inside` as first_differences gives it, `spent`
    seconds of building and running."""
    if there.outputs.shape != here.outputs.shape:
        raise CrashedRuntime(f"The emulated {core.name} gave outputs of shape {there.outputs.shape}.", "Report this.")
    golden = found.golden()
    precision = found.manifest["recipe"]["precision"]
    ours, theirs = here.outputs, there.outputs
    exact = bool(np.array_equal(theirs.view(np.uint32), ours.view(np.uint32)))
    gap = np.abs(theirs.astype(np.float64) - ours)
    same, compared, what = found.again(ours, theirs)
    golden_same, shown, _ = found.again(golden["outputs"], theirs[: len(golden["outputs"])])
    known = bool(inside) and all(d.known for d in inside or ())
    return Emulated(
        core=core.name,
        board=core.board,
        format=found.format,
        precision=f"{precision['weights']} weights, {precision['activations']} activations",
        images=len(theirs),
        images_from=images_from,
        what=what,
        same=same,
        compared=compared,
        golden=shown,
        golden_same=golden_same,
        worst=float("inf") if np.isnan(gap).any() else float(gap.max(initial=0.0)),
        allowed=0.0 if _integer(found) and not known else float(golden["atol"]),
        bit_exact=exact,
        there=f"{there.runtime}, Python {there.python}, numpy {there.numpy}, {qemu_version()}",
        here=f"{here.runtime}, {this_machine().processor}",
        dot_products=there.dot_products,
        built_s=spent[0],
        seconds=spent[1],
        remark="" if exact or not _integer(found) else remark(inside),
    )


def _integer(found: Bundle) -> bool:
    """Whether the file computes with integers, so that two processors can agree bit for bit."""
    return found.format == "onnx" and found.manifest["recipe"]["precision"]["activations"].startswith("int")


KNOWN = {"QLinearAdd": 1}
"""Integer operators that ONNX Runtime itself computes differently on ARM, and by how many steps at most."""
ROUNDING = 1e-5
"""Of an operator's largest output: what float arithmetic in another order may change."""


@dataclass(frozen=True)
class Difference:
    """An operator that answers differently on the two processors, given the same inputs: by integer steps, or by a
    share of its largest output where that is of floats."""

    operator: str
    integer: bool
    by: float

    @property
    def known(self) -> bool:
        """Whether the runtime's own kernels explain it."""
        return self.by <= (KNOWN.get(self.operator, 0) if self.integer else ROUNDING)

    def __str__(self) -> str:
        return f"{self.operator} (by {self.by:.3g}{' steps' if self.integer else ' of its largest output'})"


def remark(inside: tuple[Difference, ...] | None) -> str:
    """Why integer answers differ, in words."""
    if inside is None:
        return "Which operator differs is told where onnx is installed: pip install 'lighten[onnx]'"
    if not inside:
        return "Operator by operator the two agree; the whole file does not. The runtime fuses it differently there."
    kinds = dict.fromkeys("float" if not d.integer else d.operator for d in inside)
    why = " ".join(WHY[kind] for kind in kinds if kind in WHY)
    told = ", ".join(dict.fromkeys(map(str, inside)))
    return f"The first operator that differs, given the same inputs: {told}. {why}".strip()


WHY = {
    "float": "It runs in float inside the integer file, and float sums hang on their order.",
    "QLinearAdd": "ONNX Runtime adds with float scales on x86 and with 21-bit fixed-point ones on ARM (MLAS, qladd.cpp): "
    "a sum that falls within a hundred-thousandth of the middle between two integers may round to either.",
    "QLinearConv": "On x86 without VNNI uint8 x int8 products are added in 16 bits and saturate, on ARM they do not; a "
    "profile for ARM (raspberry-pi-4) or with reduced range (x86-avx2) gives the same answers everywhere.",
}


def first_differences(
    found: Bundle, userland: Userland, pixels: np.ndarray, timeout_s: float
) -> tuple[Difference, ...] | None:
    """For each image, the first operator whose output is not the same here and there. All before it agree, so it had the
    same inputs on both. None where the `onnx` package is missing."""
    if importlib.util.find_spec("onnx") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="lighten-") as name:
        room, differ = Path(name), []
        kinds = _open_up(found.model, room / "inside.onnx")
        for image in pixels:
            np.save(room / "x.npy", bench.inputs_of(image[None], found.preprocess))
            words = [str(room / "inside.onnx"), str(room / "x.npy")]
            python_here(INSIDE, [*words, str(room / "here.npz")], room, timeout_s)
            userland.python_there(INSIDE, [*words, str(room / "there.npz")], room, timeout_s)
            with np.load(room / "here.npz") as ours, np.load(room / "there.npz") as theirs:
                pairs = ((kind, ours[str(i)], theirs[str(i)]) for i, kind in enumerate(kinds))
                differ += [first] if (first := first_of(pairs)) else []
    return tuple(differ)


def first_of(pairs: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> Difference | None:
    """The first (operator, output here, output there) that is not equal."""
    for kind, ours, theirs in pairs:
        if not np.array_equal(ours, theirs):
            whole = bool(np.issubdtype(ours.dtype, np.integer))
            gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
            scale = 1.0 if whole else max(float(np.abs(ours).max()), 1e-30)
            return Difference(kind, whole, float(gap) / scale)
    return None


def _open_up(model: Path, out: Path) -> list[str]:
    """Write `model` with its operators fused and every value between them as an output; the operators' types in order
    of those outputs."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    graph = (fused := onnx.load(str(out))).graph
    made = [(name, node.op_type) for node in graph.node for name in node.output if name]
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name, _ in made)
    onnx.save(fused, str(out))
    return [kind for _, kind in made]


# --- images -----------------------------------------------------------------------------------------


def _pixels(found: Bundle, images: int, source: Sequence[Path]) -> tuple[np.ndarray, str]:
    """Golden pixels and `images` more, and where they come from in words."""
    golden = found.golden()["pixels"]
    told = f"{len(golden)} golden images"
    if not images:
        return golden, told
    if not source:
        made = f"{told} and {images} made of them (mirrored, moved, lit differently)"
        return np.concatenate([golden, variations(golden, images)]), made
    how = found.preprocess
    if how is None:
        raise BadBundle(f"The model in {found.folder} takes ready float inputs, not images.", "Leave --data out.")
    files = _image_files(source)[:images]
    if len(files) < images:
        raise BadConfig(f"{images} images are wanted, {len(files)} were found.", "Ask for fewer, or give more.")
    rows = np.stack([to_pixels(open_image(f), how) for f in files])
    return np.concatenate([golden, rows]), f"{told} and {images} of {', '.join(map(str, source))}"


def _image_files(source: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in source:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        found += inside
    return found


def variations(pixels: np.ndarray, n: int) -> np.ndarray:
    """`n` further images made of `pixels`, always the same ones: mirrored, moved along both axes, lit differently.

    uint8 (N, H, W, C) gives uint8, float32 network inputs (N, C, H, W) give float32.
    """
    dice, rows = np.random.default_rng(0), []
    height, width = (1, 2) if pixels.dtype == np.uint8 else (2, 3)
    for k in range(n):
        image = pixels[k % len(pixels)][None]
        image = np.flip(image, width) if dice.random() < 0.5 else image
        image = np.roll(image, tuple(dice.integers(-4, 5, 2)), (height, width))
        light = image.astype(np.float32) * np.float32(dice.uniform(0.6, 1.4))
        rows.append(np.clip(np.rint(light), 0, 255).astype(np.uint8) if pixels.dtype == np.uint8 else light)
    return np.concatenate(rows) if rows else pixels[:0]


# --- the same code, here and there ------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a machine said: outputs (N, ...), its runtime, its versions, whether it has dot-product instructions."""

    outputs: np.ndarray
    runtime: str
    python: str
    numpy: str
    dot_products: bool


def answers(run: RunCode, found: Bundle, pixels: np.ndarray, timeout_s: float) -> Answers:
    """The bundle's answers to `pixels` where `run` runs Python. Raises BadBundle, CrashedRuntime."""
    with tempfile.TemporaryDirectory(prefix="lighten-") as name:
        room = Path(name)
        np.save(room / "pixels.npy", pixels)
        how = to_json(found.preprocess)
        asked = {"path": str(found.model.resolve()), "format": found.format, "how": how, "batch": BATCH}
        (room / "asked.json").write_text(json.dumps(asked))
        run(CHILD, [str(room)], room, timeout_s)
        said = json.loads((room / "said.json").read_text())
        if "what" in said:
            raise BadBundle(said["what"], said["to_do"])
        return Answers(np.load(room / "outputs.npy", allow_pickle=False), **said)


CHILD = """
import ctypes, json, platform, sys
from pathlib import Path
import numpy as np
from lighten.bench import inputs_of
from lighten.errors import LightenError
from lighten.machine import usable_threads
from lighten.plugins import get
from lighten.types import Preprocess, from_json
folder = Path(sys.argv[1])
asked = json.loads((folder / "asked.json").read_text())
getauxval = ctypes.CDLL(None).getauxval
getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
at_hwcap, asimddp = 16, 1 << 20
if asked["format"] == "onnx":
    import onnxruntime as ort
    plain = ort.SessionOptions
    def with_int8():
        options = plain()
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        return options
    ort.SessionOptions = with_int8
how, module = from_json(Preprocess, asked["how"]) if asked["how"] else None, get("formats", asked["format"])
said = {"python": platform.python_version(), "numpy": np.__version__, "runtime": module.runtime()}
said["dot_products"] = bool(getauxval(at_hwcap) & asimddp)
try:
    run, pixels = module.load(Path(asked["path"]), usable_threads()), np.load(folder / "pixels.npy")
    parts = [run(inputs_of(pixels[i : i + asked["batch"]], how)) for i in range(0, len(pixels), asked["batch"])]
    np.save(folder / "outputs.npy", np.concatenate([np.asarray(p, np.float32) for p in parts]))
except LightenError as e:
    said |= {"what": e.what, "to_do": e.to_do}
(folder / "said.json").write_text(json.dumps(said))
"""
"""What lighten's own bench does, without the clock, here and there. On x86 ONNX Runtime would run int8 activations in
float, which is no reference for ARM's integers: the option is what it has on ARM anyway. Dot products are asked of the emulated processor itself, not of the
file that ONNX Runtime reads."""

INSIDE = """
import sys
import numpy as np
import onnxruntime as ort
model, inputs, out = sys.argv[1:4]
options = ort.SessionOptions()
options.log_severity_level = 3
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
values = session.run(None, {session.get_inputs()[0].name: np.load(inputs)})
np.savez(out, **{str(i): v for i, v in enumerate(values)})
"""
"""Every value inside an ONNX file whose operators are fused already; run here and there."""
