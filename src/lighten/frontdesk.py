"""From what a person typed to what the functions take: options, YAML, model, preprocessing. Decides nothing else."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.config import read_yaml
from lighten.errors import BadConfig, LightenError, MissingBackend
from lighten.types import Asked, Budget, Device, Precision, Preprocess, Progress, Result, silent

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
    """Every option of `lighten compress` and `lighten quantize`, as a YAML file or the command line gives it.

    With a `method` one way to quantize is tried (with the settings after it), without one the whole menu.
    """

    model: str | None = None
    arch: str | None = None
    classes: int | None = None
    data: Any = None
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
    interpolation: str | None = None
    mean: Any = None
    std: Any = None
    channel_order: str | None = None
    formats: Any = None
    precisions: Any = None
    ranges: str = "auto"
    sensitivity: bool | None = None
    method: str | None = None
    bits: str | None = None
    rounding: str | None = None
    iterations: int | None = None
    equalize: bool | None = None
    split: float | None = None
    bias: str | None = None
    block: int | None = None
    epochs: int | None = None
    lr: float | None = None
    images: int | None = None
    name: str | None = None
    out: Any = "runs"
    seed: int = 0
    lang: str = "en"
    strict: bool = False
    fresh: bool = False
    trust_code: bool = False
    command: str = ""


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
            sensitivity=options.method is not None if options.sensitivity is None else options.sensitivity,
            strict=options.strict,
            fresh=options.fresh,
            lang=options.lang,
            model_name=model_name(options),
            command=options.command,
        ),
    )
    device = _collect(problems, lambda: _device(options.device))
    loaded = _collect(problems, lambda: load_model(_model_in(options)))
    if problems:
        raise _together(problems)
    assert loaded is not None
    assert settings is not None
    for notice in loaded.notices:
        log(notice)
    data = "demo" if options.data is None else options.data
    return compress(
        loaded.module,
        data,
        budget,
        device or "this-machine",
        preprocess=loaded.preprocess,
        settings=settings,
        progress=progress,
        log=log,
    )


STEPS = {
    "ptq": ("rounding", "iterations", "equalize", "split", "bias", "images"),
    "qat": ("epochs", "lr", "images"),
    "dynamic": ("block",),
    "weight-only": ("block",),
}
"""Which settings each method has."""


def asked(options: Options) -> Asked | None:
    """The one way to quantize that the options name. Raises BadConfig on a setting that the method does not have."""
    every = dict.fromkeys(name for names in STEPS.values() for name in names)
    given = {k: getattr(options, k) for k in every if getattr(options, k) is not None}
    if options.method is None:
        if given or options.bits:
            raise BadConfig(
                f"{next(iter([*given, 'bits']))} is given without a method.", "Add --method, or use lighten quantize."
            )
        return None
    if strange := [k for k in given if k not in STEPS.get(options.method, every)]:
        raise BadConfig(
            f"method {options.method} has no setting {strange[0]}.",
            f"It has {', '.join(STEPS[options.method])}.",
        )
    bits = options.bits or ("w8" if options.method in ("dynamic", "weight-only") else "w8a8")
    if options.ranges != "auto":
        given["ranges"] = options.ranges
    return Asked(options.method, bits, tuple(sorted(given.items())))


def model_name(options: Options) -> str:
    """A short name for run folder and report."""
    name = (options.arch or options.model or "model").rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name) or "model"


def _model_in(options: Options) -> ModelIn:
    how = {k: getattr(options, k) for k in ("input_size", "resize", "interpolation", "mean", "std", "channel_order")}
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


def load_model(wanted: ModelIn) -> Loaded:
    """Architecture, weights and preprocessing. Raises BadModel and its kin."""
    _need_compress()
    from lighten.data import demo
    from lighten.models.load import load, own_preprocess

    if wanted.path == "demo":
        module, _ = load(demo.WEIGHTS, "lighten:resnet20", classes=10)
        return Loaded(module, demo.PREPROCESS, ())
    if wanted.arch is None:
        raise BadConfig(
            "--arch is not given.",
            "Write --arch torchvision:NAME, timm:NAME, lighten:NAME or FILE.py:CALLABLE.",
        )
    module, notices = load(Path(wanted.path), wanted.arch, classes=wanted.classes, trust_code=wanted.trust_code)
    known = own_preprocess(wanted.arch, module)
    how = preprocess_of(wanted.preprocess, known)
    if how is known and known is not None:
        notices = (
            *notices,
            f"preprocessing is taken from {known.source}: if you trained with another, give --input-size, --mean, --std.",
        )
    return Loaded(module, how, notices)


def preprocess_of(given: dict[str, Any], known: Preprocess | None) -> Preprocess | None:
    """The options as typed, over the weights' own description. Without a size there is none. Raises BadConfig."""
    given = {k: v for k, v in given.items() if v is not None}
    if not given:
        return known
    settings: dict[str, Any] = {k: v for k, v in given.items() if k in ("interpolation", "channel_order")}
    settings |= {k: _numbers(k, given[k]) for k in ("mean", "std") if k in given}
    if "input_size" in given:
        settings["height"], settings["width"] = _size(given["input_size"])
        settings |= (
            {"mode": "crop", "resize": int(given["resize"])}
            if "resize" in given
            else {"mode": "stretch", "resize": None}
        )
    elif known is None:
        raise BadConfig(
            "--input-size is not given, and this architecture has no description of its own.",
            "Add e.g. --input-size 224.",
        )
    elif "resize" in given:
        settings |= {"mode": "crop", "resize": int(given["resize"])}
    if known is None and settings.get("channel_order") == "GRAY":
        settings = {"mean": (0.5,), "std": (0.5,)} | settings
    try:
        return dataclasses.replace(
            known or Preprocess(1, 1), source="given on the command line or in the settings file", **settings
        )
    except (TypeError, ValueError) as e:
        raise BadConfig(
            f"Preprocessing: {e}.",
            "See --input-size, --resize, --interpolation, --mean, --std, --channel-order.",
        ) from e


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
    from lighten.kit.trace import check_output

    target, loaded = devices.load(device), load_model(wanted)
    model, how = loaded.module, loaded.preprocess
    count = sum(p.numel() for p in model.parameters())
    rows = {
        "weights": wanted.path,
        "architecture": wanted.arch or "lighten:resnet20",
        "parameters": f"{count / 1e6:.2f} million ({count * 4 / 1e6:.1f} MB as float32)",
        "preprocessing": describe(how) if how else "not known: give --input-size, --mean, --std",
    }
    if how is not None:
        rows["classes"] = str(check_output(model, how.input_shape, None))
    kinds = Counter(type(m).__name__ for m in model.modules() if not list(m.children()))
    shown, findings = _inspect_data(data, how, progress) if data else ({}, ())
    return Inspection(rows, dict(kinds.most_common()), format_matrix(target), shown, (*loaded.notices, *findings))


def format_matrix(device: Device) -> dict[str, str]:
    """For each format: which precisions it gives for the device, or why not."""
    from lighten.methods.quantize import precisions
    from lighten.plugins import get, missing_backends, names

    rows = {}
    for name in names("formats"):
        module = get("formats", name)
        if missing := missing_backends(module):
            rows[name] = f"needs {', '.join(missing)}: pip install 'lighten[{module.EXTRA}]'"
        elif name not in device.formats:
            rows[name] = f"not a format of {device.title}"
        else:
            rows[name] = ", ".join(_precision_cell(p, module.refuses(p, device)) for p in precisions(device))
    return rows


def _precision_cell(precision: Precision, reason: str | None) -> str:
    return precision.title if reason is None else f"{precision.title} refused ({reason})"


def _inspect_data(data: str, how: Preprocess | None, progress: Progress) -> tuple[dict[str, Any], tuple[str, ...]]:
    from lighten.data import load
    from lighten.data.doctor import examine

    found = load(data, progress=progress)
    if how is not None:
        ready = {k: s.prepare(how, progress, k) for k, s in found.splits.items() if k != "train"}
        found = dataclasses.replace(found, **ready)
    rows = {
        "classes": f"{len(found.classes)}: {', '.join(found.classes[:20])}",
        **{k: f"{len(s)} images" for k, s in found.splits.items()},
    }
    findings = examine(found, how)
    return rows, (*found.notices, *(f"{f.level}: {f.what} {f.to_do}" for f in findings))


EXAMPLE = """\
# Settings of `lighten compress` and `lighten quantize`, by --config lighten.yaml. Every key is also an option of the command line
# (max_drop is --max-drop), which wins where both are given. Lines that start with # are off.

model: model.safetensors          # weights: .safetensors, or a .pth of state_dict()
arch: torchvision:resnet18        # torchvision:NAME, timm:NAME, lighten:NAME or FILE.py:CALLABLE
# classes: 10                     # read off the weights if not given
data: photos                      # a folder of class folders (or train/ and val/ of them), cifar10, fashion-mnist
device: this-machine              # x86-vnni, x86-avx2, raspberry-pi-4, raspberry-pi-5, android-arm64

# The budget. Leave out what does not matter.
max_drop: 1.0                     # points of top-1 that may be lost
min_shrink: 70                    # percent of the bytes that must go
# max_size_mb: 5
# min_speedup: 2                  # times faster than the original's ONNX file, one thread
# max_latency_ms: 20              # median of one image, one thread, on this machine
# max_memory_mb: 200
# time: 20m                       # start no new trial after this

# How an image becomes an input. Only where the weights' own description (timm, torchvision) is not right.
# input_size: 224                 # or 224x320, height x width
# resize: 256                     # shorter side before the centre crop; without it images are stretched
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
# epochs: 1                       # qat: passes over the training images
# lr: 0.0001                      # qat
# images: 512                     # calibration images
# name: my-run                    # the folder runs/my-run
# seed: 0
# lang: en                        # zh
# strict: false                   # true: refuse data with unreadable images
"""
