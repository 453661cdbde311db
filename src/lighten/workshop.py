"""Recipe to artifact (build), artifact to evidence (examine)."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import itertools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten import bench
from lighten.data.cache import room_to_write, sha256_file, whole_folder
from lighten.data.splits import Split
from lighten.errors import DiskFull, LightenError, RefusedFormat
from lighten.plugins import get, task_of
from lighten.types import (
    Agreement,
    Artifact,
    Evidence,
    Failure,
    Job,
    LayerShape,
    Precision,
    Recipe,
    Size,
    Step,
    Trial,
    digest,
    to_json,
)

FIDELITY_IMAGES = 256


@dataclass(frozen=True)
class Built:
    """An artifact on disk, and the torch module it was exported from (for fidelity), with what that answers on the first
    select images where it is known.
    """

    artifact: Artifact
    module: Any
    layers: tuple[dict[str, Any], ...]
    seconds: float
    notes: tuple[str, ...] = ()
    network: tuple[LayerShape, ...] = ()
    answers: np.ndarray | None = None


@dataclass(frozen=True)
class Reference:
    """What the untouched original answers, in torch: drop and drift are measured against it.

    `original` is its own file, in front of which others are timed; None while that is being made.
    """

    select: Split
    outputs: np.ndarray
    original: Artifact | None = None


@dataclass(frozen=True)
class Module:
    """What the steps of a recipe made: what is exported, the network before it was quantized, what the steps said."""

    exported: Any
    network: Any
    notes: tuple[str, ...] = ()


Made = dict[tuple[tuple[Step, ...], Precision | None], Module]
"""The module of the last steps and precision: the next format of the same plan takes it as it is. Without a precision:
the network before it was quantized, from which the next precision goes on."""
QUANTIZERS = ("quantize", "qat")
PROGRAMS = "programs"
"""The folder beside the artifacts with one program a plan: `lighten export` writes other formats from it."""
NETWORK = "network.safetensors"
"""The network that a recipe trained or narrowed, in float, beside the artifact: it can be trained on, or exported."""


def attempt(
    recipe: Recipe, job: Job, reference: Reference, folder: Path, timing: bench.Timing, made: Made | None = None
) -> Trial:
    """Build and examine; what fails becomes a failed trial with its stage and reason, never a failed run."""
    stage = "being built"
    try:
        built = build(recipe, job, folder, made)
        stage, began = "being measured", time.perf_counter()
        evidence = examine(built, job, reference, folder, timing)
        return Trial(
            recipe,
            built.artifact,
            evidence,
            build_s=built.seconds,
            measure_s=time.perf_counter() - began,
            layers=built.layers,
            notes=built.notes,
            network=built.network,
        )
    except DiskFull:
        raise
    except LightenError as e:
        return Trial(recipe, failure=Failure(stage, e.what))
    except Exception as e:  # noqa: BLE001 - the one broad catch: a backend's own exceptions become a failed trial
        return Trial(recipe, failure=Failure(stage, f"{type(e).__name__}: {str(e)[:300]}"))


def build(recipe: Recipe, job: Job, folder: Path, made: Made | None = None) -> Built:
    """Copy the model once, let each step own the copy, export whole or not at all to `folder`/ID."""
    began = time.perf_counter()
    format = get("formats", recipe.format, needs="REQUIRES")
    if reason := format.refuses(recipe.precision, job.device):
        raise RefusedFormat(f"{recipe.format} refuses: {reason}.")
    module = apply_steps(recipe, job, {} if made is None else made)
    changed = any(s.method not in QUANTIZERS for s in recipe.steps)
    with whole_folder(folder / recipe.id) as room:
        file = room / f"model{format.SUFFIX}"
        companions = format.export(module.exported, input_shape(job), file, recipe.precision, job.device)
        notes = (*module.notes, *(keep_network(module.network, arch_of(recipe, job), job, room) if changed else ()))
    notes = (*notes, *keep_program(recipe, module, job, folder))
    path = folder / recipe.id / f"model{format.SUFFIX}"
    artifact = Artifact(
        f"{folder.name}/{path.relative_to(folder)}",
        recipe.format,
        sha256_file(path),
        tuple(str(c.relative_to(file.parent)) for c in companions),
    )
    layers = tuple(getattr(module.exported, "meta", {}).get("layers", ()))
    network = shapes_of(module.network, job) if changed or not recipe.steps else ()
    return Built(artifact, module.exported, layers, time.perf_counter() - began, notes, network)


def arch_of(recipe: Recipe, job: Job) -> str:
    """What the network before its changes is built by: the original's architecture, or that of a student."""
    students = [dict(s.settings).get("student") for s in recipe.steps]
    return next((s for s in students if s), job.arch)


def keep_network(network: Any, arch: str, job: Job, folder: Path) -> tuple[str, ...]:
    """Write the float network beside the artifact; a reason where it cannot be described."""
    from lighten.models import saved

    # An architecture that is a file of the user's, or none, is compared with the original itself.
    original = job.original if not arch or ".py:" in arch else None
    try:
        saved.save(
            folder / NETWORK,
            network,
            arch,
            classes=len(job.data.classes),
            preprocess=job.preprocess,
            class_names=job.data.classes,
            original=original,
        )
    except LightenError as e:
        return (f"{NETWORK} was not written: {e.what}",)
    return ()


def program_of(recipe: Recipe, folder: Path) -> Path:
    """Where the program of a recipe's plan lies; float16 is written from the float32 one."""
    precision = recipe.precision if recipe.precision.quantized else Precision()
    steps = [s for s in recipe.steps if recipe.precision.quantized or s.method not in QUANTIZERS]
    return folder / PROGRAMS / digest([to_json(steps), to_json(precision)])[:10] / "program.pt2"


def keep_program(recipe: Recipe, module: Module, job: Job, folder: Path) -> tuple[str, ...]:
    """Write the program of the plan, and of the network before it was quantized; a reason where that cannot be."""
    from lighten.quant import program

    before = tuple(s for s in recipe.steps if s.method not in QUANTIZERS)
    wanted = {program_of(recipe, folder): module.exported}
    if before:
        wanted[program_of(Recipe(before), folder)] = module.network
    try:
        for path, one in wanted.items():
            if not path.exists():
                with whole_folder(path.parent) as room:
                    program.save(one, input_shape(job), room / path.name)
    except DiskFull:
        raise
    except Exception as e:  # noqa: BLE001 - the trial stands without it; torch's exporter raises anything
        return (f"the program for `lighten export` was not written: {type(e).__name__}: {str(e)[:200]}",)
    return ()


def shapes_of(network: Any, job: Job) -> tuple[LayerShape, ...]:
    """The layers of a network as they run on one image."""
    from lighten.kit.channels import shapes

    return tuple(shapes(network, input_shape(job)).values())


def apply_steps(recipe: Recipe, job: Job, made: Made) -> Module:
    """What the recipe's steps make of a copy of the original; `made` keeps it for the next format."""
    key = (recipe.steps, recipe.precision)
    if key in made:
        return made[key]
    first = tuple(itertools.takewhile(lambda s: s.method not in QUANTIZERS, recipe.steps))
    known = made.get((first, None)) if first else None
    notes = list(known.notes) if known else []
    tell = job.say

    def say(line: str) -> None:
        notes.append(line)
        tell(line)

    module = network = copy.deepcopy(known.network if known else job.original).eval()
    # The next format of the same plan finds the unfinished state of this one.
    scratch = f"{job.scratch}/{digest(to_json(key))[:10]}" if job.scratch else ""
    job = dataclasses.replace(job, precision=recipe.precision, scratch=scratch, say=say)
    for step in recipe.steps[len(first) if known else 0 :]:
        module = get("methods", step.method, needs="REQUIRES").Step(**dict(step.settings)).apply(module, job)
        network = network if step.method in QUANTIZERS else module
        if step.method not in QUANTIZERS:
            trained = Module(module, network, tuple(notes))
    done = Module(module, network, tuple(notes))
    made.clear()
    made[key] = done
    if first:
        made[first, None] = known or trained
    return done


def examine(built: Built, job: Job, reference: Reference, folder: Path, timing: bench.Timing) -> Evidence:
    """Everything that is known of an artifact, from the file itself in its own runtime."""
    task, select = task_of(job), reference.select
    path = folder.parent / built.artifact.path
    base = reference.original
    beside = (folder.parent / base.path, base.format) if base else None
    got = bench.measure(path, built.artifact.format, decoded(select), job.preprocess, timing=timing, beside=beside)
    before, labels, wanted = reference.outputs, select.labels, built.answers
    if wanted is None:
        wanted = torch_outputs(built.module, job, select.take(FIDELITY_IMAGES))
    return Evidence(
        metric_name=task.METRIC,
        metric=task.score(got.outputs, labels),
        drop=task.drop(before, got.outputs, labels),
        extra=task.extra(got.outputs, labels),
        flipped=len(task.flipped(before, got.outputs)),
        classes=task.per_class(before, got.outputs, labels, job.data.classes),
        latency=got.latency,
        throughput=got.throughput,
        memory_mb=got.memory_mb,
        size=size_of(path, built.artifact),
        fidelity=agreement(task, wanted, got.outputs[: len(wanted)]),
        drift=agreement(task, before, got.outputs),
        runtime=got.runtime,
        beside=got.beside,
    )


def torch_outputs(module: Any, job: Job, split: Split) -> np.ndarray:
    """What the torch module itself answers, in batches of bench's size: dynamic ranges are those of a batch."""
    from lighten.kit.infer import outputs

    return outputs(module, split, job.preprocess, batch=bench.BATCH, progress=job.progress)


def agreement(task: Any, reference: np.ndarray, got: np.ndarray) -> Agreement:
    """How alike two sets of outputs (N, ...) are."""
    difference = np.abs(reference.astype(np.float64) - got)
    noise, signal = float((difference**2).sum()), float((reference.astype(np.float64) ** 2).sum())
    sqnr = 10 * float(np.log10(signal / noise)) if noise and signal else float("inf")
    same, boxes = task.agreement(reference, got), task.drift(reference, got)
    return Agreement(len(got), same, float(difference.mean()), float(difference.max()), min(sqnr, 999.0), boxes)


def files_of(path: Path, artifact: Artifact) -> tuple[Path, ...]:
    """The artifact and its companions."""
    return (path, *(path.parent / name for name in artifact.companions))


def size_of(path: Path, artifact: Artifact) -> Size:
    """Bytes on disk of every file of the artifact, gzipped too, and each stored tensor."""
    files = files_of(path, artifact)
    zipped = sum(len(gzip.compress(f.read_bytes(), 6)) for f in files)
    return Size(sum(f.stat().st_size for f in files), zipped, get("formats", artifact.format).weights(path))


def final_outputs(trial: Trial, run_folder: Path, split: Split, job: Job) -> np.ndarray:
    """The artifact's answers on one split, without timing."""
    assert trial.artifact is not None
    path = run_folder / trial.artifact.path
    return bench.measure(path, trial.artifact.format, decoded(split), job.preprocess, timing=None).outputs


def is_whole(trial: Trial, run_folder: Path) -> bool:
    """Whether a finished trial's files are still what they were."""
    if trial.artifact is None:
        return True
    path = run_folder / trial.artifact.path
    files = files_of(path, trial.artifact)
    return all(f.exists() for f in files) and sha256_file(path) == trial.artifact.sha256


def sweep(folder: Path) -> None:
    """Remove what an interrupted build left half-written."""
    if folder.is_dir():
        with room_to_write(folder):
            for left in folder.glob(".*"):
                shutil.rmtree(left, ignore_errors=True)


def input_shape(job: Job) -> tuple[int, ...]:
    """(C, H, W) of one input."""
    if job.preprocess is not None:
        return job.preprocess.input_shape
    first = job.data.calibrate.inputs(None, slice(0, 1))
    return tuple(first.shape[1:])


def decoded(split: Split) -> np.ndarray:
    """The pixels of a split that was prepared."""
    assert split.ready is not None, "prepare the split first"
    return split.ready
