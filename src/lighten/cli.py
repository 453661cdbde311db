"""Arguments to functions; everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from lighten import errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a trained vision model and a budget to verified files that run on the device.",
)


def _option(kind: Any, told: str) -> Any:
    """An option that may be left out."""
    return Annotated[kind | None, typer.Option(help=told)]


Lang = Annotated[str, typer.Option(help="Language of labels and reports: en or zh.")]
Numbers = Annotated[str | None, typer.Option(help="Comma-separated, one per channel, e.g. 0.485,0.456,0.406.")]
BundleArg = Annotated[Path, typer.Argument(help="A bundle folder, e.g. runs/NAME/bundle.")]
Model = Annotated[str | None, typer.Argument(help="Weights (.safetensors or .pth), or demo.")]
Config = Annotated[Path | None, typer.Option(help="YAML with any of these options (lighten init writes one).")]
Arch = Annotated[str | None, typer.Option(help="torchvision:NAME, timm:NAME, lighten:NAME or FILE.py:CALLABLE.")]
Classes = Annotated[int | None, typer.Option(help="Read off the weights if not given.")]
Images = Annotated[
    str | None,
    typer.Option(help="Folder of class folders, a COCO, YOLO or VOC set, or cifar10, fashion-mnist, composed, demo."),
]
Target = Annotated[str | None, typer.Option(help="Target device [this-machine].")]
MaxDrop = Annotated[float | None, typer.Option(help="Points of top-1, or of a detector's mAP, that may be lost.")]
MinShrink = Annotated[float | None, typer.Option(help="Percent of the bytes that must go.")]
MaxSize = Annotated[float | None, typer.Option("--max-size-mb")]
InputSize = Annotated[str | None, typer.Option(help="224, or 224x320 (height x width).")]
Resize = Annotated[
    int | None, typer.Option(help="Shorter side before the centre crop; without it images are stretched.")
]
Letterbox = Annotated[
    bool | None, typer.Option("--letterbox/--no-letterbox", help="Keep the whole image, with grey bars.")
]
Interpolation = Annotated[str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")]
ChannelOrder = Annotated[str | None, typer.Option(help="RGB, BGR or GRAY.")]
Formats = Annotated[str | None, typer.Option(help="Comma-separated; else those of the device.")]
Ranges = Annotated[
    str | None,
    typer.Option(
        help="One method for every range: min-max, percentile, mse, moving-average, entropy, reconstruction [auto]."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the run folder.")]
Out = Annotated[Path | None, typer.Option(help="Where run folders are [runs].")]
Seed = Annotated[int | None, typer.Option(help="Seed of the splits and of all that is learned [0].")]
Messages = Annotated[str | None, typer.Option("--lang", help="Report and messages: en or zh [en].")]
Strict = Annotated[bool | None, typer.Option("--strict", help="Refuse data with unreadable images.")]
Fresh = Annotated[bool | None, typer.Option("--fresh", help="Throw the earlier run of this name away.")]
TrustCode = Annotated[bool | None, typer.Option("--trust-code", help="Allow FILE.py:CALLABLE architectures.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from lighten import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


@app.command()
def doctor() -> None:
    """What this machine has: CPU features, GPU, each backend, how to get the missing ones."""
    from lighten.doctor import diagnose
    from lighten.terminal import console, pairs

    found = diagnose()
    pairs("machine", found.machine)
    pairs("backends", found.backends)
    pairs("device profile", found.profile)
    console.print(found.verdict, soft_wrap=True)


@app.command()
def data(name: Annotated[str, typer.Argument(help="cifar10 or fashion-mnist.")]) -> None:
    """Fetch and check a built-in dataset."""
    from lighten.data import load
    from lighten.data.builtin import fetch
    from lighten.terminal import pairs, progress_bar

    with progress_bar() as bar:
        folder = fetch(name, bar)
        found = load(name)
    rows = {
        "folder": folder,
        "classes": ", ".join(f"{en} {zh}" for en, zh in zip(found.classes, found.classes_zh)),
    }
    pairs(name, rows | {k: f"{len(s)} images" for k, s in found.splits.items()})


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="e.g. configs/resnet18-cifar10.yaml")],
    out: Annotated[Path | None, typer.Option(help="Folder of checkpoint and record; overrides the config's.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow FILE.py:CALLABLE architectures.")] = False,
) -> None:
    """Train a baseline as a YAML says; run it again to resume. Several GPUs: torchrun --no-python lighten train ..."""
    _need_torch("train")
    import torch

    from lighten.models.train import train as run
    from lighten.terminal import progress_bar, say

    if threads:
        torch.set_num_threads(threads)
    with progress_bar() as bar:
        record = run(config, out=out, progress=bar, trust_code=trust_code, log=say)
    for split, score in record["scores"].items():
        say(f"{split}: {record['metric']} {score['value']:.2f} ± {score['error']:.2f} % on {score['n']} images")
    say(f"weights: {record['folder']}/model.safetensors")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Weights (.safetensors or .pth), or demo.")],
    arch: Arch = None,
    classes: Classes = None,
    data: Images = None,
    device: Annotated[str, typer.Option(help="Target device.")] = "this-machine",
    input_size: InputSize = None,
    resize: Resize = None,
    letterbox: Letterbox = None,
    interpolation: Interpolation = None,
    mean: Numbers = None,
    std: Numbers = None,
    channel_order: ChannelOrder = None,
    trust_code: TrustCode = None,
) -> None:
    """What a model is, what its data is like, and which formats can take it. Nothing is built."""
    from lighten.frontdesk import ModelIn, inspect_model
    from lighten.terminal import console, pairs, progress_bar, say

    wanted = ModelIn(
        model,
        arch,
        classes,
        bool(trust_code),
        {
            "input_size": input_size,
            "resize": resize,
            "letterbox": letterbox,
            "interpolation": interpolation,
            "mean": mean,
            "std": std,
            "channel_order": channel_order,
        },
    )
    with progress_bar() as bar:
        found = inspect_model(wanted, data, device, bar)
    pairs("model", found.model)
    pairs("layers by type", found.layers)
    pairs(f"formats on {device}", found.formats)
    if found.data:
        pairs("data", found.data)
    for line in found.findings:
        say(line)
    if data is not None and not found.findings:
        console.print("[green]The calibration doctor found nothing wrong.[/]")


Command = Callable[..., None]
INPUT = (
    "model", "config", "arch", "classes", "data", "task", "held_out", "device", "max_drop", "min_shrink", "max_size_mb", "time",
)  # fmt: skip
RUN = (
    "input_size", "resize", "letterbox", "interpolation", "mean", "std", "channel_order", "formats", "name", "out", "seed",
    "lang", "strict", "fresh", "trust_code",
)  # fmt: skip
TRAINING = ("epochs", "lr")
OPTIONS: dict[str, Any] = {
    "model": Model,
    "config": Config,
    "arch": Arch,
    "classes": Classes,
    "data": Images,
    "task": _option(str, "classification or detection [that of the data]."),
    "held_out": _option(Path, "Text file: training images that the model was not trained on, one a line."),
    "device": Target,
    "max_drop": MaxDrop,
    "min_shrink": MinShrink,
    "max_size_mb": MaxSize,
    "min_speedup": _option(float, "Times faster than the original's ONNX file, one thread."),
    "max_latency_ms": _option(float, "Median, one image, one thread, on this machine."),
    "max_memory_mb": _option(float, "Peak of the process that runs single images."),
    "time": _option(str, "All the time there is, e.g. 90s, 20m, 1h."),
    "input_size": InputSize,
    "resize": Resize,
    "letterbox": Letterbox,
    "interpolation": Interpolation,
    "mean": Numbers,
    "std": Numbers,
    "channel_order": ChannelOrder,
    "formats": Formats,
    "precisions": _option(
        str, "Comma-separated of float32, float16, int8, int4, int8-dynamic, int8-weights, int4-weights."
    ),
    "ranges": Ranges,
    "sensitivity": Annotated[
        bool | None, typer.Option("--sensitivity/--no-sensitivity", help="Measure what each layer costs alone.")
    ],
    "narrow": Annotated[
        bool | None,
        typer.Option("--narrow/--no-narrow", help="Prune and train where quantization misses the budget [yes]."),
    ],
    "name": Name,
    "out": Out,
    "seed": Seed,
    "lang": Messages,
    "strict": Strict,
    "fresh": Fresh,
    "trust_code": TrustCode,
    "method": _option(str, "ptq, qat, dynamic or weight-only [ptq]."),
    "bits": _option(str, "w8a8, w4a8, w4a4 or mixed; w8 or w4 where weights alone are [w8a8, w8]."),
    "rounding": _option(str, "nearest, adaround, brecq or qdrop [learned where weights have 4 bits]."),
    "iterations": _option(int, "Steps of learned rounding, for each block."),
    "equalize": Annotated[bool | None, typer.Option("--equalize", help="Equalize channels across layers first.")],
    "split": _option(float, "Share of outlier channels to split in two, e.g. 0.02."),
    "bias": _option(str, "Correct biases: analytic, empirical or reestimate."),
    "block": _option(int, "weight-only: consecutive weights that share a scale."),
    "images": _option(int, "Calibration images."),
    "epochs": _option(float, "Passes over the training images; 0.5 is half of them once."),
    "lr": _option(float, "Peak of the learning rate."),
    "ratio": _option(float, "Share to remove: of the channels (prune) or of the weights (sparsify)."),
    "scope": _option(str, "global: compared over all layers; local: the same share of each."),
    "importance": _option(str, "l1, l2, bn-scale, taylor, hessian or random."),
    "keep": _option(str, "Comma-separated layers to leave alone."),
    "rounds": _option(int, "Remove in so many rounds, with recovery between."),
    "recover": _option(int, "Training images between two rounds."),
    "max_damage": _option(
        float, "Stop pruning where this many points of top-1 or mAP are lost, and go back one round."
    ),
    "sparse": _option(float, "Epochs of training towards sparse channel groups before pruning."),
    "pattern": _option(str, "unstructured, or N:M such as 2:4 (N of M weights are kept)."),
    "energy": _option(float, "Share of each layer's response that its factors keep, e.g. 0.95."),
    "student": _option(str, "Another architecture to train instead, e.g. timm:NAME."),
    "teacher_share": _option(float, "The teacher's share of the loss; at 1 labels are not read [0.9]."),
    "temperature": _option(float, "Of the softened answers [4]."),
    "loss": _option(str, "kd or dkd."),
    "features": _option(float, "Weight of matching the features inside [0]."),
}
"""Every option of the commands that walk; each is a field of frontdesk.Options."""


def _walks(*names: str) -> Callable[[Callable[[], None]], Command]:
    """A command with the options `names`; its function only says what it is called and, in its docstring, does."""

    def make(described: Callable[[], None]) -> Command:
        def command(**given: Any) -> None:
            config = given.pop("config", None)
            chosen = {k: v for k, v in given.items() if v is not None}
            _walk({**METHODS.get(described.__name__, {}), **chosen}, config)

        rows = [Parameter(n, Parameter.KEYWORD_ONLY, default=None, annotation=OPTIONS[n]) for n in names]
        command.__signature__ = Signature(rows)  # type: ignore[attr-defined]
        command.__annotations__ = {n: OPTIONS[n] for n in names}
        command.__name__, command.__doc__ = described.__name__, described.__doc__
        return app.command()(command)

    return make


METHODS = {
    "quantize": {"method": "ptq"},
    **{name: {"method": name} for name in ("prune", "distill", "finetune", "sparsify", "factorize")},
}


@_walks(*INPUT, "min_speedup", "max_latency_ms", "max_memory_mb", "precisions", "ranges", "sensitivity", "narrow", *RUN)
def compress() -> None:
    """Find the best file inside a budget; exit code 0 PASS, 3 FAIL. Run it again to continue."""


@_walks(
    *INPUT, "method", "bits", "rounding", "iterations", "equalize", "split", "bias", "block", "images", *TRAINING,
    "ranges", "sensitivity", *RUN,
)  # fmt: skip
def quantize() -> None:
    """Quantize one way, measure it, and say which layer is guilty; exit code 0 PASS, 3 FAIL (--max-drop)."""


@_walks(
    *INPUT, "ratio", "scope", "importance", "keep", "rounds", "recover", "max_damage", "sparse", *TRAINING,
    "precisions", *RUN,
)  # fmt: skip
def prune() -> None:
    """Remove channels and let the original teach what is left; writes network.safetensors beside each file."""


@_walks(
    *INPUT, "student", "teacher_share", "temperature", "loss", "features", *TRAINING, "precisions", *RUN,
)  # fmt: skip
def distill() -> None:
    """Train on with the original as the teacher, or train a smaller student (--student timm:NAME)."""


@_walks(*INPUT, *TRAINING, "precisions", *RUN)
def finetune() -> None:
    """Re-estimate batch norms and train on with the labels alone."""


@_walks(*INPUT, "ratio", "pattern", "scope", "rounds", "keep", *TRAINING, "precisions", *RUN)
def sparsify() -> None:
    """Set weights to zero, single ones or N of M; says what zeros do to size and time, and what they do not."""


@_walks(*INPUT, "energy", "keep", *TRAINING, "precisions", *RUN)
def factorize() -> None:
    """Replace wide layers by two narrow ones of low rank, where that pays."""


def _walk(given: dict[str, Any], config: Path | None) -> None:
    from lighten.frontdesk import compress_options, run_compress
    from lighten.terminal import print_result, progress_bar, say

    options = compress_options(given, config, _command())
    with progress_bar() as bar:
        result = run_compress(options, bar, say)
    print_result(result, options.lang)
    raise typer.Exit(errors.EXIT_PASS if result.passed else errors.EXIT_BUDGET)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A finished run, e.g. runs/NAME.")],
    formats: Annotated[str, typer.Option("--format", "--formats", help="Comma-separated, or all.")] = "all",
    precisions: Annotated[
        str | None,
        typer.Option(
            "--precision", "--precisions", help="Of float32, float16, plan [these]; palette4, 6, 8 (Core ML)."
        ),
    ] = None,
    data: Images = None,
    images: Annotated[int, typer.Option(min=16, help="Report images that each file answers.")] = 1000,
    device: Annotated[str | None, typer.Option(help="Write for another device than the run did.")] = None,
    bake_preprocessing: Annotated[
        bool, typer.Option("--bake-preprocessing", help="Files that take uint8 pixels (N, H, W, C), normalised inside.")
    ] = False,
    with_nms: Annotated[
        bool,
        typer.Option("--with-nms", help="ONNX files of a detector that give boxes: decoded and suppressed inside."),
    ] = False,
    lang: Lang = "en",
) -> None:
    """Write a run's winner in other formats, prove each file in its own runtime; exit code 3 where one is not right."""
    _need_torch("export")
    from lighten import devices, exports
    from lighten.plugins import names
    from lighten.terminal import print_exports, progress_bar, say

    wanted = names("formats") if formats == "all" else _words(formats)
    target = devices.load(device) if device else None
    with progress_bar() as bar:
        rows = exports.export(
            folder,
            wanted,
            _words(precisions or ""),
            data=data,
            images=images,
            device=target,
            bake_preprocessing=bake_preprocessing,
            with_nms=with_nms,
            progress=bar,
            log=say,
        )
    print_exports(rows, str(folder), _language(lang))
    bad = any(row.status in ("FAIL", "failed") for row in rows)
    raise typer.Exit(errors.EXIT_BUDGET if bad else errors.EXIT_PASS)


@app.command()
def run(
    bundle: BundleArg,
    images: Annotated[list[Path] | None, typer.Argument(help="Images, folders of them, or videos.")] = None,
    lang: Lang = "en",
    top: Annotated[int | None, typer.Option(min=1, help="How many labels [3], or boxes [all], to show.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Lowest score of a box [the bundle's].")] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Draw what is seen: out.jpg, out.mp4, or a folder for several.")
    ] = None,
    font: Annotated[
        Path | None, typer.Option(help="Font file to draw with, where none has the names' letters.")
    ] = None,
    camera: Annotated[int | None, typer.Option(min=0, help="Watch this camera until Ctrl-C; the first is 0.")] = None,
) -> None:
    """Labels or boxes of images, videos and a camera, in English or 中文."""
    from lighten.runner import answers
    from lighten.terminal import console, escape

    failed, wanted = 0, {"threshold": threshold, "draw": draw, "font": font, "camera": camera}
    stop = _until_interrupted() if camera is not None else lambda: False
    for row in answers(bundle, images or [], lang, top, **wanted, stop=stop):  # type: ignore[arg-type]
        if row.problem:
            failed += 1
            console.print(f"[red]✗[/] {escape(row.problem)}", soft_wrap=True)
        if row.pace is not None:
            console.print(escape(f"{row.image}  {row.pace.text(lang)}"), soft_wrap=True)
        elif not row.problem:
            console.print(escape(row.text(lang)), soft_wrap=True)
    raise typer.Exit(errors.EXIT_INPUT if failed else errors.EXIT_PASS)


def _until_interrupted() -> Callable[[], bool]:
    """Whether Ctrl-C was pressed: it ends a camera well, its film too. The second one is the ordinary interruption."""
    import signal
    import threading

    pressed = threading.Event()

    def first(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, first)
    return pressed.is_set


@app.command()
def bench(
    bundle: BundleArg,
    out: Annotated[Path | None, typer.Option(help="Also write the readings as JSON.")] = None,
    ssh: Annotated[str | None, typer.Option(help="Measure on another device: user@host, or user@host:port.")] = None,
    ssh_option: Annotated[list[str] | None, typer.Option(help="As ssh -o has it, e.g. IdentityFile=KEY.")] = None,
    python: Annotated[str, typer.Option(help="Python on that device.")] = "python3",
) -> None:
    """Latency, throughput and memory of a bundle, on this machine or on a device over ssh."""
    from lighten import remote
    from lighten.runner import bench_bundle
    from lighten.terminal import pairs, progress_bar, say

    if ssh is None:
        pairs(f"{bundle}", bench_bundle(bundle, out))
        return
    with progress_bar() as bar:
        record = remote.bench(bundle, ssh, options=ssh_option or (), python=python, progress=bar, log=say)
    if out is not None:
        _write_json(out, record)
    pairs(f"{bundle} on {ssh}", remote.rows(record))


@app.command()
def check(
    bundle: BundleArg,
    on: Annotated[str, typer.Option(help="Emulated core: cortex-a72 (Raspberry Pi 4) or cortex-a76 (Pi 5).")],
    images: Annotated[int, typer.Option(min=0, help="Images beside the golden ones.")] = 0,
    source: Annotated[list[Path] | None, typer.Option(help="Where those images are; else made of golden ones.")] = None,
) -> None:
    """Whether a bundle loads and answers the same on an emulated ARM core. Proves answers, not speed."""
    from lighten import emulate
    from lighten.terminal import console, escape, progress_bar, say

    with progress_bar() as bar:
        found = emulate.check(bundle, on, images, source=source or (), progress=bar, log=say)
    for line in found.lines:
        console.print(escape(line), soft_wrap=True)
    raise typer.Exit(errors.EXIT_PASS if found.passed else errors.EXIT_BUDGET)


@app.command()
def verify(bundle: BundleArg) -> None:
    """Whether every file is what its manifest says, and the golden vectors still give the golden answers."""
    from lighten import bundle as bundles
    from lighten.terminal import console

    fine, text = bundles.verify(bundles.load(bundle))
    console.print(f"[green]PASS[/] {text}" if fine else f"[red]FAIL[/] {text}", soft_wrap=True)
    raise typer.Exit(errors.EXIT_PASS if fine else errors.EXIT_BUDGET)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/NAME.")], lang: Lang = "en") -> None:
    """Rebuild the report of a run; nothing is measured again."""
    from lighten.report import read_result, write
    from lighten.terminal import console

    for path in write(read_result(folder), folder, lang=_language(lang)):
        console.print(str(path), soft_wrap=True)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where run folders are.")] = Path("runs"),
    as_json: Json = False,
    lang: Lang = "en",
) -> None:
    """The leaderboard of all runs in a folder; unfinished and damaged ones too."""
    from lighten.runs import leaderboard, read_runs
    from lighten.terminal import print_runs

    _language(lang)
    rows = leaderboard(read_runs(folder))
    _print_json(list(rows)) if as_json else print_runs(rows, str(folder), lang)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A run, by name or folder.")],
    b: Annotated[str, typer.Argument(help="The run to hold against it.")],
    out: Annotated[Path, typer.Option(help="Where run folders are.")] = Path("runs"),
    as_json: Json = False,
    lang: Lang = "en",
) -> None:
    """Two finished runs beside each other: recipe, budget, figures with their errors, classes."""
    from lighten.runs import compare as held_against
    from lighten.runs import find_run
    from lighten.terminal import print_comparison

    _language(lang)
    found = held_against(find_run(a, out), find_run(b, out))
    _print_json(found) if as_json else print_comparison(found, lang)


def _write_json(path: Path, value: Any) -> None:
    import json

    from lighten.data.cache import write_whole
    from lighten.types import to_json

    write_whole(path, json.dumps(to_json(value), indent=1))


def _print_json(value: Any) -> None:
    import json

    from lighten.types import to_json

    typer.echo(json.dumps(to_json(value), indent=1, ensure_ascii=False, allow_nan=False))


@app.command()
def init(path: Annotated[Path, typer.Argument()] = Path("lighten.yaml")) -> None:
    """Write a commented settings file for `lighten compress --config`."""
    from lighten.frontdesk import EXAMPLE

    if path.exists():
        raise errors.BadConfig(f"{path} exists already.", "Remove it, or give another name.")
    from lighten.data.cache import write_whole

    write_whole(path, EXAMPLE)
    typer.echo(f"wrote {path}; edit it, then: lighten compress --config {path}")


# --- helpers ----------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(w.strip() for w in text.split(",") if w.strip())


def _language(lang: str) -> str:
    if lang not in ("en", "zh"):
        raise errors.BadConfig(f"lang is {lang!r}.", "Choose en or zh.")
    return lang


def _need_torch(why: str) -> None:
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise errors.MissingBackend(f"torch (needed to {why})", "compress")


def _command() -> str:
    return shlex.join(["lighten", *sys.argv[1:]])


def main(argv: list[str] | None = None) -> int:
    """Entry point: every failure becomes one clear message and its own exit code."""
    try:
        code = app(argv, standalone_mode=False)
        if code == errors.EXIT_INTERRUPTED:  # some versions of typer turn Ctrl-C into this code
            raise KeyboardInterrupt
        return sys.exit(code if isinstance(code, int) else 0)
    except errors.LightenError as e:
        _complain(e.what, e.to_do)
        return sys.exit(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _complain("Interrupted.", "Run the same command to continue; finished trials are kept.")
        return sys.exit(errors.EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return sys.exit(errors.EXIT_BUG)
    except Exception as e:  # noqa: BLE001 - the last resort
        if (told := getattr(e, "format_message", None)) is not None:  # a usage error of typer, whose class moves about
            text = told()
            typer.echo(text) if text.startswith("Usage:") else _complain(text, "lighten --help shows every command.")
            return sys.exit(errors.EXIT_INPUT)
        _complain(
            f"This is a bug of lighten: {type(e).__name__}: {e}",
            f"Please report it with the log: {_write_log()}",
        )
        return sys.exit(errors.EXIT_BUG)


def _complain(what: str, to_do: str) -> None:
    from rich.markup import escape

    from lighten.terminal import errors as console

    console.print(f"[bold red]✗[/] {escape(what)}", soft_wrap=True)
    if to_do:
        console.print(f"  → {escape(to_do)}", soft_wrap=True)


def _write_log() -> Path:
    from lighten.data.cache import cache_dir
    from lighten.machine import environment

    path = cache_dir() / "logs" / time.strftime("%Y%m%d-%H%M%S.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = "\n".join(f"{k}: {v}" for k, v in environment().items())
    path.write_text(f"{_command()}\n{versions}\n\n{traceback.format_exc()}")
    return path


if __name__ == "__main__":
    main()
