"""The nouns of lighten: frozen data, standard library only, importable on any device."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lighten.heads import Head
from lighten.plain import digest as digest
from lighten.plain import from_json as from_json
from lighten.plain import to_json as to_json

FLOATS = ("float32", "float16")


# --- what goes in ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes the network's input; part of the model, so part of the manifest.

    `mode` "stretch" scales to height x width; "crop" scales the shorter side to `resize` (same aspect) and cuts
    the centre; "letterbox" scales the whole image to fit (same aspect) and fills the rest with grey. Pixels are then divided by 255, `mean` subtracted, divided by `std` (one value per channel, in
    `channel_order`), and laid out NCHW float32; where `inside` is true the file does this itself and takes the pixels.
    """

    height: int
    width: int
    mode: str = "stretch"
    resize: int | None = None
    interpolation: str = "bilinear"
    channel_order: str = "RGB"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    source: str = "given"
    inside: bool = False

    def __post_init__(self) -> None:
        checks = {
            "height and width must be 1 to 8192": 0 < self.height <= 8192 and 0 < self.width <= 8192,
            "mode must be stretch, crop or letterbox": self.mode in ("stretch", "crop", "letterbox"),
            "resize is needed in crop mode and must cover the crop": self.mode != "crop"
            or (self.resize or 0) >= max(self.height, self.width),
            "interpolation must be nearest, bilinear, bicubic or lanczos": self.interpolation
            in ("nearest", "bilinear", "bicubic", "lanczos"),
            "channel_order must be RGB, BGR or GRAY": self.channel_order in ("RGB", "BGR", "GRAY"),
            f"mean and std need {self.channels} values": len(self.mean) == len(self.std) == self.channels,
            "mean and std must be finite and std above 0": all(map(math.isfinite, (*self.mean, *self.std)))
            and all(s > 0 for s in self.std),
        }
        for rule, holds in checks.items():
            if not holds:
                raise ValueError(rule)

    @property
    def channels(self) -> int:
        return 1 if self.channel_order == "GRAY" else 3

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one input."""
        return (self.channels, self.height, self.width)


@dataclass(frozen=True)
class Data:
    """Four disjoint splits. `report` is read once, for the winner, so that the search cannot flatter itself.

    The splits are `lighten.data.Split` objects; they are typed loosely here because this file knows no numpy.
    """

    name: str
    classes: tuple[str, ...]
    classes_zh: tuple[str, ...]
    train: Any
    calibrate: Any
    select: Any
    report: Any
    fingerprint: str
    notices: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("train", "calibrate", "select", "report")}


@dataclass(frozen=True)
class Device:
    """A target: the formats it takes, in order of preference, and the integer kernels it has.

    `also` are formats that run there too: `lighten export` writes them, the search does not try them by itself.
    """

    name: str
    title: str
    title_zh: str
    formats: tuple[str, ...]
    also: tuple[str, ...] = ()
    arch: str = ""
    activations: str = "uint8"
    symmetric_activations: bool = False
    reduce_range: bool = False
    per_channel_weights: bool = True
    power_of_two_scales: bool = False
    channel_multiple: int = 8
    threads: int = 4
    memory_mb: int = 1024
    features: tuple[str, ...] = ()
    notes: str = ""

    @property
    def kernels(self) -> str:
        """What its integer kernels want, in a few words."""
        words = [f"{self.activations} activations"]
        words += ["symmetric"] if self.symmetric_activations else []
        words += ["7-bit weights"] if self.reduce_range else []
        words += [] if self.per_channel_weights else ["one weight scale a layer"]
        words += ["scales of powers of two"] if self.power_of_two_scales else []
        return ", ".join(words)


@dataclass(frozen=True)
class Miss:
    """One broken limit of a budget."""

    limit: str
    wanted: float
    got: float
    unit: str

    def __str__(self) -> str:
        return f"{self.limit}: wanted {self.wanted:g}{self.unit}, got {self.got:.4g}{self.unit}"


@dataclass(frozen=True)
class Budget:
    """What the result may cost. `None` is no limit. Drops are percentage points, shrink is percent of bytes saved."""

    max_drop: float | None = None
    max_size_mb: float | None = None
    min_shrink: float | None = None
    max_latency_ms: float | None = None
    min_speedup: float | None = None
    max_memory_mb: float | None = None
    time_s: float | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None and (not math.isfinite(value) or value < 0):
                raise ValueError(f"{f.name} must be a number of 0 or more, not {value}")
        if self.min_shrink is not None and self.min_shrink >= 100:
            raise ValueError("min_shrink is percent of bytes saved and must be under 100")

    def misses(self, got: Evidence, base: Evidence, drop: float | None = None) -> tuple[Miss, ...]:
        """Every limit that `got` breaks, measured against the original's `base`.

        `drop` (points) replaces the select-split drop where a better one was measured.
        """
        drop = got.drop.value if drop is None else drop
        rows = (
            ("max_drop", self.max_drop, drop, " pt", drop > _or(self.max_drop, math.inf)),
            (
                "max_size_mb",
                self.max_size_mb,
                got.size.mb,
                " MB",
                got.size.mb > _or(self.max_size_mb, math.inf),
            ),
            (
                "min_shrink",
                self.min_shrink,
                shrink(got, base),
                " %",
                shrink(got, base) < _or(self.min_shrink, -math.inf),
            ),
            (
                "max_latency_ms",
                self.max_latency_ms,
                got.p50(1),
                " ms",
                got.p50(1) > _or(self.max_latency_ms, math.inf),
            ),
            (
                "min_speedup",
                self.min_speedup,
                speedup(got, base),
                "x",
                speedup(got, base) < _or(self.min_speedup, -1.0),
            ),
            (
                "max_memory_mb",
                self.max_memory_mb,
                got.memory_mb,
                " MB",
                got.memory_mb > _or(self.max_memory_mb, math.inf),
            ),
        )
        return tuple(
            Miss(name, wanted, value, unit)
            for name, wanted, value, unit, broken in rows
            if wanted is not None and broken
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


# --- what is tried --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Bits of weights and activations; `exceptions` are (layer, weights, activations), so a mix is plain data."""

    weights: str = "float32"
    activations: str = "float32"
    exceptions: tuple[tuple[str, str, str], ...] = ()

    @property
    def quantized(self) -> bool:
        return self.weights not in FLOATS

    @property
    def title(self) -> str:
        names = {"float32": "weights only", "dynamic": "dynamic"}
        plain = self.weights == self.activations
        name = self.weights if plain else f"{self.weights}/{names.get(self.activations, self.activations)}"
        count = len(self.exceptions)
        return f"{name} ({count} layer{'s' if count > 1 else ''} otherwise)" if count else name


@dataclass(frozen=True)
class Step:
    """One method by name with its settings, as sorted pairs of plain values."""

    method: str
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Asked:
    """One way to quantize that a person asked for: the method, the bits, and settings of the step as sorted pairs."""

    method: str = "ptq"
    bits: str = "w8a8"
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Steps, precision, format: plain data, hashable, replayable."""

    steps: tuple[Step, ...] = ()
    precision: Precision = Precision()
    format: str = "onnx"

    @property
    def id(self) -> str:
        """Short name that is the same for the same recipe on every machine."""
        return digest(to_json(self))[:10]

    @property
    def title(self) -> str:
        methods = [s.method.replace("_", " ") for s in self.steps if s.method != "quantize"]
        return " + ".join([*methods, self.precision.title]) + f" · {self.format}"

    @property
    def complexity(self) -> int:
        """How many methods changed the network; a precision alone is no step."""
        return sum(s.method != "quantize" for s in self.steps)


@dataclass(frozen=True)
class Artifact:
    """A file (or a file with companions) that a runtime loads. `path` is relative to the run folder."""

    path: str
    format: str
    sha256: str
    companions: tuple[str, ...] = ()


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, over `n` images."""

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Latency:
    """Raw times of single-image runs at one thread count, warm-up excluded."""

    threads: int
    samples_ms: tuple[float, ...]

    @property
    def p50(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p95(self) -> float:
        ordered = sorted(self.samples_ms)
        return ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]


@dataclass(frozen=True)
class Weight:
    """One stored tensor: its true dtype in the file and how many of its values are zero."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    zeros: float


@dataclass(frozen=True)
class Size:
    """Bytes on disk, what gzip makes of them, and each tensor that is really stored."""

    bytes: int
    gzip_bytes: int
    weights: tuple[Weight, ...] = ()

    @property
    def mb(self) -> float:
        return self.bytes / 1e6


@dataclass(frozen=True)
class BoxDrift:
    """What became of `n` detections: mean overlap of the pairs that are still one object, mean difference of their
    scores, and in percent how many of both sides' detections have a partner. Boxes and scores are told apart."""

    iou: float
    score: float
    matched: float
    n: int


@dataclass(frozen=True)
class Agreement:
    """How alike two models answer the same images: same answers in percent (top-1; of a detector, boxes found again),
    differences of the raw outputs, and of a detector how far its boxes moved."""

    n: int
    same_top1: float
    mean_abs: float
    max_abs: float
    sqnr_db: float
    boxes: BoxDrift | None = None


@dataclass(frozen=True)
class ClassChange:
    """One class: accuracy in percent before and after, over `n` images."""

    name: str
    before: float
    after: float
    n: int


@dataclass(frozen=True)
class Beside:
    """Raw times of one image, one thread: the file and the original's file, in turns in one process.

    What else the machine does slows both, so that their ratio holds where single times do not.
    """

    ms: tuple[float, ...]
    original_ms: tuple[float, ...]

    @property
    def medians(self) -> tuple[float, float]:
        """Of the original and of the file, in ms."""
        return statistics.median(self.original_ms), statistics.median(self.ms)

    @property
    def ratio(self) -> float:
        """How many times faster than the original."""
        original, own = self.medians
        return original / own


@dataclass(frozen=True)
class Evidence:
    """All that was measured on one artifact, in its own runtime, on the `select` images."""

    metric_name: str
    metric: Estimate
    drop: Estimate
    extra: tuple[tuple[str, Estimate], ...]
    flipped: int
    classes: tuple[ClassChange, ...]
    latency: tuple[Latency, ...]
    throughput: float
    memory_mb: float
    size: Size
    fidelity: Agreement
    drift: Agreement
    runtime: str
    beside: Beside | None = None

    def p50(self, threads: int = 1) -> float:
        """Median latency in ms at `threads`, or at the nearest count that was measured."""
        return min(self.latency, key=lambda row: abs(row.threads - threads)).p50


def metric_title(name: str) -> str:
    """A metric's name as people write it."""
    return {"top1": "top-1"}.get(name, name)


def shrink(got: Evidence, base: Evidence) -> float:
    """Percent of the original's bytes that are gone."""
    return 100.0 * (1.0 - got.size.bytes / base.size.bytes)


def speedup(got: Evidence, base: Evidence) -> float:
    """Original's median latency over this one's, one thread each; taken in turns, where they were."""
    return got.beside.ratio if got.beside else base.p50(1) / got.p50(1)


def level_ms(got: Evidence, base: Evidence) -> float:
    """ms of one image as they would have been when the original was timed: what else the machine did then and now is
    taken out, so that times of different minutes can be held to each other."""
    return base.p50(1) / speedup(got, base)


@dataclass(frozen=True)
class Failure:
    """Why a trial has no evidence."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Predicted:
    """What a file was expected to take before it was built: bytes, and ms of one image on one thread."""

    bytes: float
    latency_ms: float | None = None


@dataclass(frozen=True)
class Trial:
    """A recipe and what came of it: evidence, or a failure that is kept just as well.

    `notes` are what its steps had to say, `predicted` what was expected of it before it was built, `network` the
    shapes of its layers where a step changed them (and of the original in the baseline, where one was searched).
    """

    recipe: Recipe
    artifact: Artifact | None = None
    evidence: Evidence | None = None
    failure: Failure | None = None
    build_s: float = 0.0
    layers: tuple[dict[str, Any], ...] = ()
    measure_s: float = 0.0
    notes: tuple[str, ...] = ()
    predicted: Predicted | None = None
    network: tuple[LayerShape, ...] = ()

    @property
    def id(self) -> str:
        return self.recipe.id


@dataclass(frozen=True)
class Exported:
    """What came of one file of `lighten export`. `status` is PASS, FAIL, "not run here", "refused", "missing" or "failed";
    `reason` says why.

    `evidence` is None where the file was not run; `original_bytes` is the original's float32 ONNX file; `pixels`: the file
    takes uint8 (N, H, W, C) and normalises inside. `boxes`: it gives boxes; times, memory and size are then the file's
    own, accuracy and agreement those of the raw outputs that its boxes are made from.
    """

    format: str
    precision: Precision
    status: str
    reason: str = ""
    path: str = ""
    bytes: int = 0
    original_bytes: int = 0
    fallbacks: tuple[str, ...] = ()
    evidence: Evidence | None = None
    seconds: float = 0.0
    pixels: bool = False
    boxes: bool = False

    @property
    def title(self) -> str:
        """The precision in words, and what the file takes and gives where that is not what the network does."""
        marks = ["uint8 pixels in"] * self.pixels + ["boxes out"] * self.boxes
        return ", ".join([self.precision.title, *marks])


@dataclass(frozen=True)
class Final:
    """The winner and the original on the `report` images, read once."""

    baseline: Estimate
    winner: Estimate
    drop: Estimate
    flipped: int
    classes: tuple[ClassChange, ...]
    extra: tuple[tuple[str, Estimate], ...] = ()
    extra_before: tuple[tuple[str, Estimate], ...] = ()


@dataclass(frozen=True)
class LayerCost:
    """One layer alone at one precision, everything else in float: what it damages, and what it stores and takes.

    `damage` is how far the answers are from the float ones: of a classifier the Kullback-Leibler divergence of the softmax,
    in nats an image, of a detector the distance of its raw outputs in distillation; `mse` the
    squared error of the raw outputs relative to their power; `drop` the points of top-1 lost, paired, where labels were
    given. `bytes` are those of this layer's weights at this precision (int4 two to a byte), its scales and its bias;
    `latency_ms` is its kernel alone in ONNX Runtime, one image, one thread.
    """

    layer: str
    op: str
    weights: str
    activations: str
    damage: float
    mse: float
    drop: Estimate | None
    bytes: int
    latency_ms: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells one row from another: layer, weights, activations."""
        return self.layer, self.weights, self.activations


@dataclass(frozen=True)
class LayerShape:
    """One convolution or linear layer as it runs on one image; `source` is the spatial size of its input.

    `op` is conv, conv_transpose or linear; a linear layer has no kernel, and its `source` are the leading dimensions
    of its input (tokens), none after pooling. `clip` says whether a ReLU or another clip follows at once.
    """

    name: str
    op: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    source: tuple[int, ...] = ()
    bias: bool = True
    clip: bool = False

    @property
    def weights(self) -> int:
        """How many weights it has, biases not counted."""
        return self.outputs * self.inputs // self.groups * math.prod(self.kernel)

    @property
    def target(self) -> tuple[int, ...]:
        """The spatial size of its output."""
        if self.op == "linear":
            return self.source
        rows = zip(self.source, self.kernel, self.stride, self.padding, self.dilation)
        if self.op == "conv_transpose":
            return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in rows)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rows)

    @property
    def macs(self) -> int:
        """Multiplications for one image."""
        places = self.source if self.op == "conv_transpose" else self.target
        return self.weights * math.prod(places)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together, by the name of the layer whose outputs lead them.

    `outputs` and `inputs` name every layer whose outputs or inputs follow, with the features that one channel is
    there (a channel of 4 x 4 pixels that is flattened is 16 inputs). Widths are multiples of `multiple` (grouped
    convolutions, attention heads).
    """

    name: str
    channels: int
    outputs: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[str, int], ...]
    multiple: int = 1


@dataclass(frozen=True)
class WidthCost:
    """One channel group alone at one width, everything else as it was, batch norms re-estimated, nothing trained.

    `damage` is how far the answers are from the original ones, as in `LayerCost`; `drop` the points of the metric lost,
    paired.
    """

    group: str
    width: int
    damage: float
    drop: Estimate | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What tells one row from another."""
        return self.group, self.width


@dataclass(frozen=True)
class Advice:
    """One sentence that a measurement supports, in both languages."""

    en: str
    zh: str


SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Result:
    """What `compress` returns and writes as result.json (docs/result-schema.md).

    `sensitivity` is what each layer costs at fewer bits, `widths` what each of the channel `groups` costs alone when
    it is narrowed; `spent` are the seconds of each part of the walk. `head` says what a detector's raw outputs mean.
    """

    verdict: str
    misses: tuple[Miss, ...]
    advice: tuple[Advice, ...]
    budget: Budget
    device: Device
    task: str
    model: str
    data: str
    classes: tuple[str, ...]
    classes_zh: tuple[str, ...]
    preprocess: Preprocess | None
    baseline: Trial
    trials: tuple[Trial, ...]
    winner: str
    final: Final
    environment: dict[str, str]
    command: str
    images: dict[str, int]
    flips: tuple[dict[str, Any], ...] = ()
    schema_version: int = SCHEMA_VERSION
    path: str = ""
    sensitivity: tuple[LayerCost, ...] = ()
    widths: tuple[WidthCost, ...] = ()
    groups: tuple[ChannelGroup, ...] = ()
    spent: tuple[tuple[str, float], ...] = ()
    head: Head | None = None

    @property
    def passed(self) -> bool:
        return self.verdict == "PASS"

    @property
    def winning(self) -> Trial:
        return next(t for t in (*self.trials, self.baseline) if t.id == self.winner)


# --- how a job is handed to a method ----------------------------------------------------------------

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total); a terminal bar, a log line or nothing."""


def silent(what: str, done: int, total: int) -> None:
    """The progress callback of those who want none."""


Say = Callable[[str], None]
"""Called with one line that the user should know and the record keeps (a rollback, an early stop)."""


def unsaid(line: str) -> None:
    """The callback of those who keep no notes."""


@dataclass(frozen=True)
class Job:
    """What a method may use beside the model it owns: data, task, target, and the untouched original (the teacher).

    `scratch` is a folder where long steps keep unfinished state between two calls; empty where there is none. `arch`
    is the name that the original can be built by, empty for a module of the user's own. `head` says what a detector's
    raw outputs mean; None for other tasks.
    """

    data: Data
    task: str
    device: Device
    preprocess: Preprocess | None
    original: Any = None
    precision: Precision = Precision()
    seed: int = 0
    progress: Progress = field(default=silent, compare=False)
    scratch: str = ""
    say: Say = field(default=unsaid, compare=False)
    arch: str = ""
    head: Head | None = None
