"""From what a person typed to what the functions take: options, YAML, model, preprocessing. Decides nothing else."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.config import read_yaml
from lighten.errors import BadConfig, LightenError, MissingBackend, UnknownName
from lighten.search import WAYS
from lighten.types import Asked, Budget, Device, Preprocess, Progress, Result, Step, silent

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ModelIn:
    """A model as named on the command line. `preprocess` holds the options as typed; None means not given."""

    path: str
    arch: str | None = None
    classes: int | None = None
    trust_code: bool = False
    preprocess: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Every option of `lighten compress` and of the commands of single methods, as a YAML file or the command line
    gives it.

    With a `method` one way is tried (with the settings after it), without one the search has its way.
    """

    model: str | None = None
    arch: str | None = None
    classes: int | None = None
    data: Any = None
    task: str | None = None
    held_out: Any = None
    device: str = "this-machine"
    max_drop: float | None = None
    min_shrink: float | None = None
    max_size_mb: float | None = None
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    time: str | None = None
    input_size: Any = None
    resize: int | None = None
    letterbox: bool | None = None
    interpolation: str | None = None
    mean: Any = None
    std: Any = None
    channel_order: str | None = None
    formats: Any = None
    precisions: Any = None
    ranges: str = "auto"
    sensitivity: bool | None = None
    narrow: bool = True
    method: str | None = None
    bits: str | None = None
    rounding: str | None = None
    iterations: int | None = None
    equalize: bool | None = None
    split: float | None = None
    bias: str | None = None
    block: int | None = None
    epochs: float | None = None
    lr: float | None = None
    images: int | None = None
    ratio: float | None = None
    scope: str | None = None
    importance: str | None = None
    keep: Any = None
    rounds: int | None = None
    recover: int | None = None
    max_damage: float | None = None
    sparse: float | None = None
    pattern: str | None = None
    energy: float | None = None
    student: str | None = None
    teacher_share: float | None = None
    temperature: float | None = None
    loss: str | None = None
    features: float | None = None
    name: str | None = None
    out: Any = "runs"
    seed: int = 0
    lang: str = "en"
    strict: bool = False
    fresh: bool = False
    trust_code: bool = False
    command: str = ""


INPUT = ("input_size", "resize", "letterbox", "interpolation", "mean", "std", "channel_order")
"""The options that say how an image becomes an input."""
KEYS = tuple(f.name for f in dataclasses.fields(Options) if f.name != "command")
NUMBERS = ("max_drop", "min_shrink", "max_size_mb", "min_speedup", "max_latency_ms", "max_memory_mb")


def compress_options(given: dict[str, Any], config: Path | None, command: str) -> Options:
    """The YAML's options with those of the command line over them. Raises BadConfig naming file, line and key."""
    values = read_yaml(config, KEYS) if config else {}
    for key in set(values) & set(NUMBERS):
        if isinstance(values[key], bool) or not isinstance(values[key], int | float | None):
            raise BadConfig(f"{config}: {key} is {values[key]!r}, not a number.")
    options = Options(**{**{k: v for k, v in values.items() if v is not None}, **given}, command=command)
    missing = [k for k in ("model", "data") if getattr(options, k) is None and options.model != "demo"]
    if missing:
        raise BadConfig(
            f"Not given: {', '.join(missing)}.",
            "lighten compress MODEL --arch ... --data ..., or --config FILE (see lighten init).",
        )
    if options.lang not in ("en", "zh"):
        raise BadConfig(f"lang is {options.lang!r}.", "Choose en or zh.")
    return options


def run_compress(options: Options, progress: Progress, log: Any) -> Result:
    """Load the model and walk. Problems of model, budget and choices are collected and told together."""
    _need_compress()
    from lighten.walk import Settings, compress

    problems: list[LightenError] = []
    budget = _collect(problems, lambda: _budget(options))
    settings = _collect(
        problems,
        lambda: Settings(
            name=options.name,
            out=Path(options.out),
            seed=options.seed,
            formats=_words(options.formats),
            precisions=_words(options.precisions),
            ranges=options.ranges,
            asked=asked(options),
            steps=steps(options),
            sensitivity=options.method in WAYS if options.sensitivity is None else options.sensitivity,
            narrow=options.narrow,
            strict=options.strict,
            fresh=options.fresh,
            lang=options.lang,
            task=options.task or "",
            model_name=model_name(options),
            command=options.command,
        ),
    )
    device = _collect(problems, lambda: _device(options.device))
    loaded = _collect(problems, lambda: load_model(_model_in(options)))
    if settings is not None:  # else its own step has said what is wrong
        _collect(problems, lambda: _check_names(options, loaded.module if loaded else None))
    if problems:
        raise _together(problems)
    assert loaded is not None
    assert settings is not None
    for notice in loaded.notices:
        log(notice)
    data = "demo" if options.data is None else options.data
    if options.held_out is not None:
        from lighten.data import load, read_held_out

        data = load(data, seed=options.seed, held_out=read_held_out(Path(options.held_out)), progress=progress)
    return compress(
        loaded.module,
        data,
        budget,
        device or "this-machine",
        preprocess=loaded.preprocess,
        settings=dataclasses.replace(settings, arch=loaded.arch),
        progress=progress,
        log=log,
    )


STEPS = {
    "ptq": ("rounding", "iterations", "equalize", "split", "bias", "images"),
    "qat": ("epochs", "lr", "images"),
    "dynamic": ("block",),
    "weight-only": ("block",),
    "prune": ("ratio", "scope", "importance", "keep", "rounds", "recover", "max_damage", "sparse", "epochs", "lr"),
    "distill": ("student", "teacher_share", "temperature", "loss", "features", "epochs", "lr"),
    "finetune": ("epochs", "lr"),
    "sparsify": ("ratio", "pattern", "scope", "rounds", "keep", "epochs", "lr"),
    "factorize": ("energy", "keep", "epochs", "lr"),
}
"""Which settings each method has."""
PLUGINS = {"prune": "channel_prune", "factorize": "low_rank"}
"""Methods whose command is called otherwise than their file."""
TRAINING_SHARE = 0.7
"""Of the time given, how much a command of one method may train."""


def given_settings(options: Options) -> dict[str, Any]:
    """The settings that were given. Raises BadConfig on one that the method does not have."""
    every = dict.fromkeys(name for names in STEPS.values() for name in names)
    given = {k: getattr(options, k) for k in every if getattr(options, k) is not None}
    if options.method is None and (given or options.bits):
        raise BadConfig(
            f"{next(iter([*given, 'bits']))} is given without a method.",
            "Add --method, or use the method's own command (lighten quantize, lighten prune, ...).",
        )
    if options.method is not None and options.method not in STEPS:
        raise BadConfig(f"There is no method {options.method!r}.", f"Choose one of {', '.join(STEPS)}.")
    if strange := [k for k in given if k not in STEPS.get(options.method or "", ())]:
        raise BadConfig(
            f"method {options.method} has no setting {strange[0]}.",
            f"It has {', '.join(STEPS[options.method or ''])}.",
        )
    return given


def asked(options: Options) -> Asked | None:
    """The one way to quantize that the options name. Raises BadConfig on a setting that the method does not have."""
    given = given_settings(options)
    if options.method not in WAYS:
        return None
    if isinstance(given.get("epochs"), float) and given["epochs"].is_integer():
        given["epochs"] = int(given["epochs"])
    bits = options.bits or ("w8" if options.method in ("dynamic", "weight-only") else "w8a8")
    if options.ranges != "auto":
        given["ranges"] = options.ranges
    return Asked(options.method, bits, tuple(sorted(given.items())))


def steps(options: Options) -> tuple[Step, ...]:
    """The steps of the one method that the options name, if it does not quantize: pruning is followed by training
    with the original as the teacher. Raises BadConfig on a setting that the method does not have."""
    given = given_settings(options)
    if options.method is None or options.method in WAYS:
        return ()
    if options.bits:
        raise BadConfig(f"bits are given with method {options.method}.", "Use --precisions int8, or lighten quantize.")
    if "keep" in given:
        given["keep"] = _words(given["keep"])
    if "teacher_share" in given:
        given["distill"] = given.pop("teacher_share")
    limit = seconds(options.time)
    allowed = {} if limit is None else {"seconds": round(TRAINING_SHARE * limit, 1)}
    method = PLUGINS.get(options.method, options.method)
    if options.method != "prune":
        timed = allowed if options.method in ("distill", "finetune") or given.get("epochs") else {}
        return (_step(method, {**given, **timed}),)
    training: dict[str, Any] = {k: given.pop(k) for k in ("epochs", "lr") if k in given}
    if training.get("epochs") == 0:
        return (_step(method, given),)
    return _step(method, given), _step("distill", {**training, **allowed})


def _check_names(options: Options, module: Any) -> None:
    """Architecture of a student and layers to keep, before anything costly. Raises UnknownName and its kin."""
    if options.student:
        import torch

        from lighten.models.load import build

        with torch.device("meta"):
            build(options.student)
    layers = [] if module is None else [name for name, _ in module.named_modules() if name]
    for name in _words(options.keep):
        if layers and name not in layers:
            raise UnknownName("layer", name, layers)


def _step(method: str, settings: dict[str, Any]) -> Step:
    return Step(method, tuple(sorted(settings.items())))


def model_name(options: Options) -> str:
    """A short name for run folder and report."""
    name = (options.arch or Path(options.model or "model").stem).rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name) or "model"


def _model_in(options: Options) -> ModelIn:
    how = {k: getattr(options, k) for k in INPUT}
    return ModelIn(options.model or "", options.arch, options.classes, options.trust_code, how)


def _device(name: str) -> Device:
    from lighten import devices

    return devices.load(name)


def _collect(problems: list[LightenError], make: Any) -> Any:
    try:
        return make()
    except LightenError as e:
        problems.append(e)
    except (TypeError, ValueError) as e:
        problems.append(BadConfig(f"{e}."))
    return None


def _together(problems: list[LightenError]) -> LightenError:
    if len(problems) == 1:
        return problems[0]
    what = f"{len(problems)} problems:\n" + "\n".join(f"  {i}. {p.what} {p.to_do}" for i, p in enumerate(problems, 1))
    return BadConfig(what, "Mend them all, then run it again.")


def _budget(options: Options) -> Budget:
    return Budget(**{k: getattr(options, k) for k in NUMBERS}, time_s=seconds(options.time))


def seconds(text: Any) -> float | None:
    """ "90s", "20m", "1.5h" or a plain number of seconds. Raises BadConfig."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(text))
    if not found:
        raise BadConfig(f"time is {text!r}.", "Write 90s, 20m or 1.5h.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _words(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(w.strip() for w in (value.split(",") if isinstance(value, str) else map(str, value)) if w.strip())


# --- the model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A module with its preprocessing and what there is to tell about how it was read."""

    module: Any
    preprocess: Preprocess | None
    notices: tuple[str, ...]
    arch: str


def load_model(wanted: ModelIn) -> Loaded:
    """Architecture, weights and preprocessing. Raises BadModel and its kin."""
    _need_compress()
    from lighten.data import demo
    from lighten.models import saved
    from lighten.models.load import load, own_preprocess

    if wanted.path == "demo":
        module, _ = load(demo.WEIGHTS, "lighten:resnet20", classes=10)
        return Loaded(module, demo.PREPROCESS, (), "lighten:resnet20")
    if Path(wanted.path).suffix.lower() == ".onnx":
        return _from_onnx(wanted)
    told = saved.told(Path(wanted.path)) or {}
    arch = wanted.arch or told.get("arch")
    if not arch:
        raise BadConfig(
            "--arch is not given.",
            "Write --arch torchvision:NAME, timm:NAME, lighten:NAME or FILE.py:CALLABLE.",
        )
    module, notices = load(Path(wanted.path), arch, classes=wanted.classes, trust_code=wanted.trust_code)
    known = saved.preprocess_in(told) or own_preprocess(arch, module)
    how = preprocess_of(wanted.preprocess, known)
    if how is known and known is not None:
        notices = (
            *notices,
            f"preprocessing is taken from {known.source}: if you trained with another, give --input-size, --mean, --std.",
        )
    return Loaded(module, how, notices, arch)


def _from_onnx(wanted: ModelIn) -> Loaded:
    """A network that comes as an ONNX file: its input size is read off the file, where it is fixed there."""
    from lighten.models import onnx_in

    if wanted.arch is not None:
        raise BadConfig("An ONNX file holds its own architecture.", "Leave out --arch.")
    module, shape = onnx_in.load(Path(wanted.path))
    given = {k: v for k, v in wanted.preprocess.items() if v is not None}
    if shape is not None:
        size = f"{shape[1]}x{shape[2]}"
        if _size(given.setdefault("input_size", size)) != shape[1:]:
            raise BadConfig(f"--input-size is {given['input_size']}, {wanted.path} takes {size}.", "Leave it out.")
        if shape[0] == 1:
            given.setdefault("channel_order", "GRAY")
    notice = f"{wanted.path} answers in torch as in ONNX Runtime; how its images were normalized is not in the file"
    notices = () if {"mean", "std"} <= set(given) else (f"{notice}: check --mean and --std.",)
    return Loaded(module, preprocess_of(given, None), notices, "")


def preprocess_of(given: dict[str, Any], known: Preprocess | None) -> Preprocess | None:
    """The options as typed, over the weights' own description. Without a size there is none. Raises BadConfig."""
    given = {k: v for k, v in given.items() if v is not None}
    if not given:
        return known
    settings: dict[str, Any] = {k: v for k, v in given.items() if k in ("interpolation", "channel_order")}
    settings |= {k: _numbers(k, given[k]) for k in ("mean", "std") if k in given}
    if "input_size" in given:
        settings["height"], settings["width"] = _size(given["input_size"])
    elif known is None:
        raise BadConfig(
            "--input-size is not given, and this architecture has no description of its own.",
            "Add e.g. --input-size 224.",
        )
    settings |= _fitting(given, known)
    if known is None and settings.get("channel_order") == "GRAY":
        settings = {"mean": (0.5,), "std": (0.5,)} | settings
    try:
        return dataclasses.replace(
            known or Preprocess(1, 1), source="given on the command line or in the settings file", **settings
        )
    except (TypeError, ValueError) as e:
        raise BadConfig(
            f"Preprocessing: {e}.",
            "See --input-size, --resize, --letterbox, --interpolation, --mean, --std, --channel-order.",
        ) from e


def _fitting(given: dict[str, Any], known: Preprocess | None) -> dict[str, Any]:
    """Whether images are cropped, letterboxed or stretched; who letterboxed before keeps to it at another size."""
    boxed = given.get("letterbox")
    if boxed and "resize" in given:
        raise BadConfig("--resize and --letterbox are both given.", "Crop the centre, or keep the whole image.")
    if "resize" in given:
        return {"mode": "crop", "resize": int(given["resize"])}
    if boxed or (boxed is None and known is not None and known.mode == "letterbox"):
        return {"mode": "letterbox", "resize": None}
    return {"mode": "stretch", "resize": None} if "input_size" in given or boxed is False else {}


def _size(value: Any) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,4})(?:\s*[xX,]\s*(\d{1,4}))?", str(value).strip("[]() "))
    if not found:
        raise BadConfig(f"input_size is {value!r}.", "Write 224, or 224x320 (height x width).")
    return int(found[1]), int(found[2] or found[1])


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        raise BadConfig(f"{key} is {value!r}.", "Write comma-separated numbers, one per channel.") from None


def _need_compress() -> None:
    import importlib.util

    for package in ("torch", "torchao", "onnx"):
        if importlib.util.find_spec(package) is None:
            raise MissingBackend(f"{package} (needed to compress)", "compress")


# --- inspect ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """What `lighten inspect` shows."""

    model: dict[str, Any]
    layers: dict[str, Any]
    formats: dict[str, str]
    data: dict[str, Any]
    findings: tuple[str, ...]


def inspect_model(wanted: ModelIn, data: str | None, device: str, progress: Progress = silent) -> Inspection:
    """Parameters, layers, preprocessing, format matrix and, with `data`, what the calibration doctor says."""
    _need_compress()
    from lighten import devices
    from lighten.data.preprocess import describe

    target, loaded = devices.load(device), load_model(wanted)
    model, how = loaded.module, loaded.preprocess
    count = sum(p.numel() for p in model.parameters())
    rows = {
        "weights": wanted.path,
        "architecture": loaded.arch,
        "parameters": f"{count / 1e6:.2f} million ({count * 4 / 1e6:.1f} MB as float32)",
        "preprocessing": describe(how) if how else "not known: give --input-size, --mean, --std",
    }
    if how is not None:
        rows |= _answers(model, how)
    kinds = Counter(type(m).__name__ for m in model.modules() if not list(m.children()))
    shown, findings = _inspect_data(data, how, progress) if data else ({}, ())
    matrix = format_matrix(target, model, how.input_shape if how else None)
    return Inspection(rows, dict(kinds.most_common()), matrix, shown, (*loaded.notices, *findings))


def _answers(model: Any, how: Preprocess) -> dict[str, str]:
    """What the model answers: classes, and of a detector how many places its head has and what it tells of them."""
    from lighten.kit.trace import check_output
    from lighten.models import detectors

    if not detectors.is_detector(model):
        return {"classes": str(check_output(model, how.input_shape, None))}
    head = detectors.check(model, how.input_shape)
    maps = ", ".join(f"{level.columns} x {level.rows}" for level in head.levels)
    each = " from logits of whole steps" if head.box == "distribution" else ""
    parts = [f"{head.box}{each}", *(["centerness"] if head.centerness else []), f"{head.score} scores"]
    return {
        "classes": str(head.classes),
        "detector": f"{head.places} places of {head.values} values ({', '.join(parts)}) on maps of {maps}",
        "ends of the head": ", ".join(model.head_layers()),
    }


def format_matrix(device: Device, model: Any = None, shape: tuple[int, ...] | None = None) -> dict[str, str]:
    """For each format: which precisions it gives for the device, or why not; what of the model with inputs of `shape`
    (C, H, W) it cannot write. Nothing is built."""
    from lighten.kit.operators import operators
    from lighten.plugins import names

    found = operators(model, shape) if model is not None and shape else {}
    return {name: _format_cell(name, device, found, shape or ()) for name in names("formats")}


def _format_cell(name: str, device: Device, operators: dict[str, int], shape: tuple[int, ...]) -> str:
    from lighten.methods.quantize import precisions
    from lighten.plugins import get, missing_backends

    module = get("formats", name)
    if missing := missing_backends(module):
        return f"needs {', '.join(missing)}: pip install 'lighten[{module.EXTRA}]'"
    if name not in (*device.formats, *device.also):
        return f"not a format of {device.title}"
    if operators and (reason := module.lacks(operators, shape)):
        return f"refused: {reason}"
    reasons = {p.title: module.refuses(p, device) for p in precisions(device)}
    able = ", ".join(title for title, reason in reasons.items() if reason is None)
    words = [able or "nothing", *(["batches of one"] if module.BATCH == "one" else [])]
    words += [f"not {title} ({reason})" for title, reason in reasons.items() if reason is not None]
    return "; ".join([*words, *([why] if (why := module.not_here()) else [])])


def _inspect_data(data: str, how: Preprocess | None, progress: Progress) -> tuple[dict[str, Any], tuple[str, ...]]:
    from lighten.data import box_doctor, doctor, framed, has_boxes, load

    found = framed(load(data, progress=progress), how)
    if how is not None:
        ready = {k: s.prepare(how, progress, k) for k, s in found.splits.items() if k != "train"}
        found = dataclasses.replace(found, **ready)
    rows = {
        "classes": f"{len(found.classes)}: {', '.join(found.classes[:20])}",
        **{k: f"{len(s)} images" for k, s in found.splits.items()},
    }
    findings = (box_doctor if has_boxes(found) else doctor).examine(found, how)
    return rows, (*found.notices, *(f"{f.level}: {f.what} {f.to_do}" for f in findings))


EXAMPLE = """\
# Settings of `lighten compress` and `lighten quantize`, by --config lighten.yaml. Every key is also an option of the command line
# (max_drop is --max-drop), which wins where both are given. Lines that start with # are off.

model: model.safetensors          # weights: .safetensors, or a .pth of state_dict()
arch: torchvision:resnet18        # torchvision:NAME, timm:NAME, lighten:NAME or FILE.py:CALLABLE
# classes: 10                     # read off the weights if not given
data: photos                      # a folder of class folders (or train/ and val/ of them), cifar10, fashion-mnist
                                  # with boxes: a COCO, YOLO or Pascal VOC folder, its JSON or YAML, or composed
# task: detection                 # that of the data where it is not given: classification, or detection where it has boxes
# held_out: held-out.txt          # images that the model was not trained on, one a line: only these are calibrated and
                                  # selected on (else drops look larger than they are)
device: this-machine              # x86-vnni, x86-avx2, raspberry-pi-4, raspberry-pi-5, android-arm64

# The budget. Leave out what does not matter.
max_drop: 1.0                     # points of top-1 (detectors: mAP) that may be lost
min_shrink: 70                    # percent of the bytes that must go
# max_size_mb: 5
# min_speedup: 2                  # times faster than the original's ONNX file, one thread
# max_latency_ms: 20              # median of one image, one thread, on this machine
# max_memory_mb: 200
# time: 20m                       # all the time there is

# How an image becomes an input. Only where the weights' own description (timm, torchvision) is not right.
# input_size: 224                 # or 224x320, height x width
# resize: 256                     # shorter side before the centre crop; without it images are stretched
# letterbox: true                 # the whole image, with grey bars
# interpolation: bilinear
# mean: [0.485, 0.456, 0.406]
# std: [0.229, 0.224, 0.225]
# channel_order: RGB              # BGR, GRAY

# formats: [onnx, openvino]       # else all that the device takes
# precisions: [float32, float16, int8]   # also int4, int8-dynamic, int8-weights, int4-weights
# ranges: auto                    # or one method for every tensor: min-max, percentile, mse, moving-average,
                                  # entropy, reconstruction
# sensitivity: false              # true: measure what each layer costs alone (which layer is guilty)

# One way to quantize instead of the whole menu, as `lighten quantize` does.
# method: ptq                     # qat, dynamic, weight-only
# bits: w8a8                      # w4a8, w4a4, mixed; w8 or w4 where weights alone are quantized
# rounding: brecq                 # nearest, adaround, qdrop
# iterations: 300                 # steps of learned rounding, for each block
# equalize: false                 # true: equalize channels across layers first
# split: 0.02                     # share of outlier channels that are split in two
# bias: none                      # analytic, empirical, reestimate
# block: 32                       # weight-only: consecutive weights that share a scale
# epochs: 1                       # passes over the training images, for every method that trains
# lr: 0.0001                      # peak of the learning rate

# One method instead of the search, as `lighten prune` and its kin do; then precisions says what is exported.
# method: prune                   # distill, finetune, sparsify, factorize
# ratio: 0.5                      # prune: share of the channels; sparsify: share of the weights
# scope: global                   # local: the same share of each layer
# importance: l2                  # l1, bn-scale, taylor, hessian, random
# keep: [fc]                      # layers to leave alone
# rounds: 1                       # prune and sparsify in so many rounds
# recover: 5000                   # prune: training images between two rounds
# max_damage: 5                   # prune: stop where so many points of top-1 are lost
# sparse: 1                       # prune: epochs of training towards sparse channel groups first
# pattern: 2:4                    # sparsify: N of M weights are kept; else unstructured
# energy: 0.95                    # factorize: share of each layer's response that is kept
# student: timm:mobilenetv3_small_100   # distill: another architecture to train instead
# teacher_share: 0.9              # distill: at 1 labels are not read
# temperature: 4                  # distill
# loss: kd                        # distill: or dkd
# features: 0                     # distill: weight of matching the features inside
# narrow: true                    # false: compress never prunes or trains
# images: 512                     # calibration images
# name: my-run                    # the folder runs/my-run
# seed: 0
# lang: en                        # zh
# strict: false                   # true: refuse data with unreadable images
"""
