"""Arguments to functions; everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
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

Lang = Annotated[str, typer.Option(help="Language of labels and reports: en or zh.")]
Numbers = Annotated[str | None, typer.Option(help="Comma-separated, one per channel, e.g. 0.485,0.456,0.406.")]
BundleArg = Annotated[Path, typer.Argument(help="A bundle folder, e.g. runs/NAME/bundle.")]
Model = Annotated[str | None, typer.Argument(help="Weights (.safetensors or .pth), or demo.")]
Config = Annotated[Path | None, typer.Option(help="YAML with any of these options (lighten init writes one).")]
Arch = Annotated[str | None, typer.Option(help="torchvision:NAME, timm:NAME, lighten:NAME or FILE.py:CALLABLE.")]
Classes = Annotated[int | None, typer.Option(help="Read off the weights if not given.")]
Images = Annotated[str | None, typer.Option(help="Folder of class folders, or cifar10, fashion-mnist, demo.")]
Target = Annotated[str | None, typer.Option(help="Target device [this-machine].")]
MaxDrop = Annotated[float | None, typer.Option(help="Points of top-1 that may be lost.")]
MinShrink = Annotated[float | None, typer.Option(help="Percent of the bytes that must go.")]
MaxSize = Annotated[float | None, typer.Option("--max-size-mb")]
InputSize = Annotated[str | None, typer.Option(help="224, or 224x320 (height x width).")]
Resize = Annotated[
    int | None, typer.Option(help="Shorter side before the centre crop; without it images are stretched.")
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
        say(f"{split}: top-1 {score['value']:.2f} ± {score['error']:.2f} % on {score['n']} images")
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
        _preprocess(input_size, resize, interpolation, mean, std, channel_order),
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


@app.command()
def compress(
    model: Model = None,
    config: Config = None,
    arch: Arch = None,
    classes: Classes = None,
    data: Images = None,
    device: Target = None,
    max_drop: MaxDrop = None,
    min_shrink: MinShrink = None,
    max_size_mb: MaxSize = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Times faster than the original's ONNX file, one thread.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Median, one image, one thread, on this machine.")
    ] = None,
    max_memory_mb: Annotated[float | None, typer.Option(help="Peak of the process that runs single images.")] = None,
    time: Annotated[str | None, typer.Option(help="Start no new trial after, e.g. 90s, 20m, 1h.")] = None,
    input_size: InputSize = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    mean: Numbers = None,
    std: Numbers = None,
    channel_order: ChannelOrder = None,
    formats: Formats = None,
    precisions: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated of float32, float16, int8, int4, int8-dynamic, int8-weights, int4-weights "
            "[float32,float16,int8]."
        ),
    ] = None,
    ranges: Ranges = None,
    sensitivity: Annotated[
        bool | None, typer.Option("--sensitivity", help="Also measure what each layer costs alone.")
    ] = None,
    name: Name = None,
    out: Out = None,
    seed: Seed = None,
    lang: Messages = None,
    strict: Strict = None,
    fresh: Fresh = None,
    trust_code: TrustCode = None,
) -> None:
    """Find the best file inside a budget; exit code 0 PASS, 3 FAIL. Run it again to continue."""
    given = {k: v for k, v in locals().items() if k != "config" and v is not None}
    _walk(given, config)


@app.command()
def quantize(
    model: Model = None,
    config: Config = None,
    arch: Arch = None,
    classes: Classes = None,
    data: Images = None,
    device: Target = None,
    max_drop: MaxDrop = None,
    min_shrink: MinShrink = None,
    max_size_mb: MaxSize = None,
    method: Annotated[str, typer.Option(help="ptq, qat, dynamic or weight-only.")] = "ptq",
    bits: Annotated[
        str | None, typer.Option(help="w8a8, w4a8, w4a4 or mixed; w8 or w4 where weights alone are [w8a8, w8].")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="nearest, adaround, brecq or qdrop [learned where weights have 4 bits].")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps of learned rounding, for each block.")] = None,
    equalize: Annotated[bool | None, typer.Option("--equalize", help="Equalize channels across layers first.")] = None,
    split: Annotated[float | None, typer.Option(help="Share of outlier channels to split in two, e.g. 0.02.")] = None,
    bias: Annotated[str | None, typer.Option(help="Correct biases: analytic, empirical or reestimate.")] = None,
    block: Annotated[int | None, typer.Option(help="weight-only: consecutive weights that share a scale.")] = None,
    epochs: Annotated[int | None, typer.Option(help="qat: passes over the training images.")] = None,
    lr: Annotated[float | None, typer.Option(help="qat: learning rate.")] = None,
    images: Annotated[int | None, typer.Option(help="Calibration images.")] = None,
    input_size: InputSize = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    mean: Numbers = None,
    std: Numbers = None,
    channel_order: ChannelOrder = None,
    formats: Formats = None,
    ranges: Ranges = None,
    sensitivity: Annotated[
        bool | None, typer.Option("--sensitivity/--no-sensitivity", help="Measure what each layer costs alone [yes].")
    ] = None,
    name: Name = None,
    out: Out = None,
    seed: Seed = None,
    lang: Messages = None,
    strict: Strict = None,
    fresh: Fresh = None,
    trust_code: TrustCode = None,
) -> None:
    """Quantize one way, measure it, and say which layer is guilty; exit code 0 PASS, 3 FAIL (--max-drop)."""
    given = {k: v for k, v in locals().items() if k != "config" and v is not None}
    _walk(given, config)


def _walk(given: dict[str, Any], config: Path | None) -> None:
    from lighten.frontdesk import compress_options, run_compress
    from lighten.terminal import print_result, progress_bar, say

    options = compress_options(given, config, _command())
    with progress_bar() as bar:
        result = run_compress(options, bar, say)
    print_result(result, options.lang)
    raise typer.Exit(errors.EXIT_PASS if result.passed else errors.EXIT_BUDGET)


@app.command()
def run(
    bundle: BundleArg,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    lang: Lang = "en",
    top: Annotated[int, typer.Option(min=1, help="How many labels to show.")] = 3,
) -> None:
    """Labels of images, in English or 中文."""
    from lighten.runner import answers
    from lighten.terminal import console, escape

    failed = 0
    for row in answers(bundle, images, lang, top):
        if row.problem:
            failed += 1
            console.print(f"[red]✗[/] {escape(row.problem)}", soft_wrap=True)
        else:
            console.print(
                f"{escape(str(row.image))}  " + "  ".join(f"{escape(n)} {100 * p:.1f} %" for n, p in row.labels),
                soft_wrap=True,
            )
    raise typer.Exit(errors.EXIT_INPUT if failed else errors.EXIT_PASS)


@app.command()
def bench(
    bundle: BundleArg,
    out: Annotated[Path | None, typer.Option(help="Also write the readings as JSON.")] = None,
) -> None:
    """Latency, throughput and memory of a bundle on this machine."""
    from lighten.runner import bench_bundle
    from lighten.terminal import pairs

    pairs(f"{bundle}", bench_bundle(bundle, out))


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


def _preprocess(
    input_size: str | None,
    resize: int | None,
    interpolation: str | None,
    mean: str | None,
    std: str | None,
    channel_order: str | None,
) -> dict[str, Any]:
    return {
        "input_size": input_size,
        "resize": resize,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
        "channel_order": channel_order,
    }


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
