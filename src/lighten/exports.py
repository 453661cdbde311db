"""`lighten export`: the plan of a finished run in other formats, each file proven in its own runtime.

A format is written in a process of its own, and run in another one: a tool that crashes is one failed row.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten import bench, bundle, workshop
from lighten.bench import Timing
from lighten.data.cache import sha256_file, whole_folder, write_whole
from lighten.errors import BadBundle, BadConfig, LightenError
from lighten.kit.onnx_boxes import BoxesFound, BoxRules, boxes_found
from lighten.plugins import get, missing_backends, names, task_of
from lighten.types import (
    Artifact,
    Data,
    Device,
    Evidence,
    Exported,
    Job,
    Precision,
    Preprocess,
    Progress,
    Recipe,
    Result,
    Trial,
    from_json,
    metric_title,
    silent,
    to_json,
)

FOLDER, RECORD = "exports", "exports.json"
PLAN = "plan"
PALETTES = {name: Precision(name, "float32") for name in ("palette4", "palette6", "palette8")}
"""Weights in tables of few values, which the float network gets as the file is written: Core ML has them."""
SAME = {"float32": 99.9, "float16": 99.5}
SAME_INTEGER, SAME_INTEGER_BOXES = 99.5, 97.0
"""Percent of the images that a file must answer like the program it was written from; of a detector, of its boxes that the
file must find again. Of integers that are fewer: one step of rounding decides between two boxes that are nearly tied."""
SAME_BOXES = 99.5
"""Percent of the boxes that a file gives and numpy finds in its raw outputs which must be the same."""
BOXED_IMAGES = 64
"""Images, run at once, whose boxes are compared so."""
WRITING_S = 1800.0
TIMING = Timing()
Log = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """One file to be made: a format, a precision, the program that it is written from; the preprocessing, and how boxes
    are found, where those go inside the file."""

    format: str
    precision: Precision
    program: Path
    inside: Preprocess | None = None
    boxes: BoxRules | None = None

    @property
    def name(self) -> str:
        """The folder of the file, e.g. "onnx-int8"."""
        words = (self.precision.weights, *({"float32": ["weights"], "dynamic": ["dynamic"]}.get(self._inputs, [])))
        marks = {"mixed": self.precision.exceptions, "pixels": self.inside, "boxes": self.boxes}
        return "-".join((self.format, *words, *(mark for mark, is_so in marks.items() if is_so)))

    @property
    def _inputs(self) -> str:
        return self.precision.activations if self.precision.quantized else ""


Row = Exported


def export(
    run: Path,
    formats: Sequence[str],
    precisions: Sequence[str] = (),
    *,
    data: Any = None,
    images: int = 1000,
    device: Device | None = None,
    bake_preprocessing: bool = False,
    with_nms: bool = False,
    timing: Timing = TIMING,
    progress: Progress = silent,
    log: Log = lambda line: None,
) -> tuple[Row, ...]:
    """Write the winner of the finished run in folder `run` in every one of `formats` at every one of `precisions`
    ("float32", "float16", "plan": what the run decided; default these three; "palette4", "palette6", "palette8") under `run`/exports, and measure each file.

    `data` is what the run was given (default: the built-in set of that name); `images` of its report split are used.
    `bake_preprocessing` puts normalisation and layout inside each file, which then takes uint8 pixels (N, H, W, C);
    `with_nms` decoding and suppression inside a detector's, which then gives boxes (`kit.onnx_boxes`).
    The record, exports.json, keeps rows of earlier calls; the run's report is written again with them. Raises BadBundle
    where the run is not finished or was made by an older version, UnknownName, BadConfig.
    """
    from lighten.report import read_result

    result = read_result(run)
    read_record(run)  # one that is damaged is told before hours are spent
    todo = wanted(result, run, formats, precisions)
    if bake_preprocessing:
        todo = tuple(dataclasses.replace(w, inside=_inside(result)) for w in todo)
    if with_nms:
        todo = tuple(dataclasses.replace(w, boxes=_rules(result)) for w in todo)
    programs = Programs(*job_of(result, run, data, images, device or result.device, progress))
    rows: list[Row] = []
    for one in groups(todo):
        for row in made(one, result, run, programs, timing):
            log(line_of(row))
            rows.append(row)
            _record(run / FOLDER / RECORD, row)
    _report(result, run, log)
    return tuple(rows)


def _report(result: Result, run: Path, log: Log) -> None:
    """The run's report again, with the files in it, in the language it is in. The files stand without it."""
    from lighten import report

    try:
        page, _ = report.write(result, run, lang=report.language(run))
    except Exception as e:  # noqa: BLE001 - hours of exports do not fail for a page that `lighten report` can write again
        why = e.what if isinstance(e, LightenError) else f"{type(e).__name__}: {e}"
        log(f"The report could not be written again, without it the files are whole: {why}")
    else:
        log(f"{page} shows them too.")


def wanted(result: Result, run: Path, formats: Sequence[str], precisions: Sequence[str]) -> tuple[Wanted, ...]:
    """Every file that was asked for, format by format. Raises UnknownName, BadConfig, BadBundle."""
    for format in formats:
        get("formats", format)
    floats = {p.title: p for p in (Precision(), Precision("float16", "float16"))}
    known, plan = {**floats, **PALETTES}, planned(result)
    for name in precisions:
        if name not in (*known, PLAN) and (plan is None or name != plan.precision.weights):
            raise BadConfig(f"The run has no plan at precision {name!r}.", f"Known: {', '.join((*known, PLAN))}.")
    chosen: dict[Precision, Recipe] = {}
    for name in precisions or (*floats, PLAN):
        if name in known:  # palettes too are written from the float network
            chosen[known[name]] = Recipe(result.winning.recipe.steps)
        elif plan is not None:
            chosen[plan.precision] = plan
    files = {p: workshop.program_of(r, run / "artifacts") for p, r in chosen.items()}
    if missing := [p.title for p, f in files.items() if not f.exists()]:
        raise BadBundle(
            f"{run} keeps no program for {', '.join(missing)}: it was made by an older lighten, or cleaned.",
            "Run the same `lighten compress` again with --fresh.",
        )
    return tuple(Wanted(f, p, files[p]) for f in dict.fromkeys(formats) for p in chosen)


def planned(result: Result) -> Recipe | None:
    """The quantized recipe that is exported as "plan": the winner's, or the most accurate int8 one of its steps."""
    if result.winning.recipe.precision.quantized:
        return result.winning.recipe
    tried = [t for t in result.trials if t.evidence and t.recipe.precision.weights == "int8"]
    best = max(tried, key=lambda t: t.evidence.metric.value if t.evidence else 0.0, default=None)
    return best.recipe if best else None


def _inside(result: Result) -> Preprocess:
    if result.preprocess is None:
        raise BadConfig(
            "The run's model takes ready float inputs: there is no preprocessing to put inside.",
            "Leave --bake-preprocessing out.",
        )
    return dataclasses.replace(result.preprocess, inside=True)


def _rules(result: Result) -> BoxRules:
    """How the run's task finds the boxes that a user is shown."""
    if result.head is None:
        raise BadConfig(f"The run's task is {result.task}: there are no boxes to give.", "Leave --with-nms out.")
    task = task_of(result)
    return BoxRules(task.head, task.size, task.threshold, task.iou, task.most)


def groups(todo: Sequence[Wanted]) -> Iterator[tuple[Wanted, ...]]:
    """The files of one format together: its tools are loaded once."""
    for format in dict.fromkeys(w.format for w in todo):
        yield tuple(w for w in todo if w.format == format)


def job_of(
    result: Result, run: Path, data: Any, images: int, device: Device, progress: Progress
) -> tuple[Job, workshop.Reference]:
    """Data and the original's answers. Raises what `lighten.data.load` raises, BadConfig where classes differ."""
    from lighten.data import framed, load
    from lighten.quant import program

    try:
        loaded: Data = load(result.data.split(" (")[0] if data is None else data, progress=progress)
    except LightenError as e:
        if data is not None:
            raise
        raise BadConfig(f"The run's data, {result.data}, is not found by its name.", "Give it again: --data.") from e
    if loaded.classes != result.classes:
        raise BadConfig(
            f"The data has other classes than the run: {', '.join(loaded.classes[:5])}...", "Give the run's own --data."
        )
    loaded = framed(loaded, result.preprocess)
    split = loaded.report.take(images).prepare(result.preprocess, progress, "report")
    loaded = dataclasses.replace(loaded, select=split)
    original = program.read(workshop.program_of(Recipe(), run / "artifacts"))
    job = Job(loaded, result.task, device, result.preprocess, original, progress=progress, head=result.head)
    outputs = workshop.torch_outputs(original, job, split)
    return job, workshop.Reference(split, outputs, result.baseline.artifact)


class Programs:
    """What each program answers to the images: run once, in torch, however many formats are written from it."""

    def __init__(self, job: Job, reference: workshop.Reference) -> None:
        self.job, self.reference = job, reference
        self.known: dict[Path, tuple[Any, np.ndarray]] = {}

    def read(self, file: Path) -> tuple[Any, np.ndarray]:
        """The module, and its answers to all images of the reference."""
        from lighten.quant import program

        if file not in self.known:
            module = program.read(file)
            self.known[file] = module, workshop.torch_outputs(module, self.job, self.reference.select)
        return self.known[file]


def made(group: Sequence[Wanted], result: Result, run: Path, programs: Programs, timing: Timing) -> Iterator[Row]:
    """The rows of one format."""
    job, reference = programs.job, programs.reference
    name, format = group[0].format, get("formats", group[0].format)
    base = result.baseline.evidence.size.bytes if result.baseline.evidence else 0

    def row_of(one: Wanted, status: str, reason: str, seconds: float = 0.0) -> Row:
        pixels, boxes = one.inside is not None, one.boxes is not None
        return Row(
            name, one.precision, status, reason, original_bytes=base, seconds=seconds, pixels=pixels, boxes=boxes
        )

    if missing := missing_backends(format):
        reason = f"needs {', '.join(missing)}: pip install 'lighten[{format.EXTRA}]'"
        yield from (row_of(w, "missing", reason) for w in group)
        return
    folder = run / FOLDER
    for one, reply in written(group, workshop.input_shape(job), job.device, folder):
        row = row_of(one, reply["status"], reply["reason"], reply["seconds"])
        if row.status:
            yield row
            continue
        artifact = from_json(Artifact, reply["artifact"])
        path = folder / one.name / artifact.path
        size = sum(f.stat().st_size for f in workshop.files_of(path, artifact))
        row = dataclasses.replace(row, path=str(path.relative_to(run)), bytes=size, fallbacks=tuple(reply["fallbacks"]))
        if reply["not_here"]:
            told = _simulated(path, one, format, programs)
            yield dataclasses.replace(row, status="not run here", reason=reply["not_here"] + told)
            continue
        module, answers = programs.read(one.program)
        artifact = dataclasses.replace(artifact, path=str(path.relative_to(run)))
        built = workshop.Built(artifact, module, (), row.seconds, answers=answers)
        given = dataclasses.replace(job, preprocess=one.inside or job.preprocess)
        row = judged(row, built, given, reference, run, timing)
        if row.status == "PASS" and not row.boxes:  # a bundle's runner takes raw outputs
            bundled(row, artifact, result, run, given)
        yield row


def _simulated(path: Path, one: Wanted, format: Any, programs: Programs) -> str:
    """Of a file that cannot run here: how its weights, read back from it, answer in torch. Nothing for plans, which
    `check` holds to the last integer."""
    if not hasattr(format, "simulate") or (one.precision.quantized and one.precision not in PALETTES.values()):
        return ""
    job, select = programs.job, programs.reference.select
    module, before = programs.read(one.program)
    after = workshop.torch_outputs(format.simulate(path, module, workshop.input_shape(job)), job, select)
    task = task_of(job)
    same, right = task.agreement(before, after), task.score(after, select.labels)
    return f"; in torch, its weights answer like the program on {same:.1f} % of {len(select)} images, {right} %"


def judged(row: Row, built: workshop.Built, job: Job, reference: workshop.Reference, run: Path, timing: Timing) -> Row:
    """The row with what was measured on the file."""
    found = None
    try:
        if row.boxes:
            evidence, found = _boxed(built, job, reference, run, timing)
        else:
            evidence = workshop.examine(built, job, reference, run / "artifacts", timing)
    except LightenError as e:
        return dataclasses.replace(row, status="failed", reason=e.what)
    limit = SAME.get(row.precision.weights, SAME_INTEGER if job.head is None else SAME_INTEGER_BOXES)
    same, told = evidence.fidelity.same_top1, str(found or "")
    if same < limit:
        what = f"answers like the program on {same:.1f} % of"
        what = what if job.head is None else f"finds {same:.1f} % of the program's boxes again in"
        reason = f"{what} {evidence.fidelity.n} images, not {limit:g} %"
        return dataclasses.replace(row, status="FAIL", reason=reason, evidence=evidence)
    status = "FAIL" if found and found.same < SAME_BOXES else "PASS"
    return dataclasses.replace(row, status=status, reason=told, evidence=evidence)


def _boxed(
    built: workshop.Built, job: Job, reference: workshop.Reference, run: Path, timing: Timing
) -> tuple[Evidence, BoxesFound]:
    """What is measured on a file with boxes inside: the network by its raw outputs, from the same file with the boxes
    taken out; times, memory, size and the boxes by the file itself."""
    artifact, how = built.artifact, job.preprocess
    path, format = run / artifact.path, get("formats", artifact.format)
    some = workshop.decoded(reference.select.take(BOXED_IMAGES))
    with tempfile.TemporaryDirectory(prefix="lighten-") as room:
        raw = Path(room).resolve() / path.name
        format.take_boxes_out(path, raw)
        twin = dataclasses.replace(built, artifact=dataclasses.replace(artifact, path=str(raw)))
        evidence = workshop.examine(twin, job, reference, run / "artifacts", timing)
        # One batch: a file with boxes counts images within it. Beside it runs what takes the network's own inputs.
        one = functools.partial(bench.measure, format=artifact.format, pixels=some, how=how, batch=len(some))
        outputs = one(raw, timing=None).outputs
        beside = None if how is not None and how.inside else (raw, artifact.format)
        got = one(path, timing=timing, beside=beside)
    found = boxes_found(task_of(job).shown(outputs), got.outputs, got.beside)
    evidence = dataclasses.replace(
        evidence,
        latency=got.latency,
        throughput=got.throughput,
        memory_mb=got.memory_mb,
        size=workshop.size_of(path, artifact),
        beside=None,
    )
    return evidence, found


def bundled(row: Row, artifact: Artifact, result: Result, run: Path, job: Job) -> None:
    """Turn the folder of a file that passed into a bundle: manifest, labels, golden vectors, runner."""
    assert row.evidence is not None
    recipe = Recipe(result.winning.recipe.steps, row.precision, row.format)
    trial = Trial(recipe, dataclasses.replace(artifact, path=row.path), row.evidence)
    final = dataclasses.replace(result.final, winner=row.evidence.metric, drop=row.evidence.drop)
    own = dataclasses.replace(
        result, trials=(trial,), winner=trial.id, final=final, verdict="PASS", misses=(), preprocess=job.preprocess
    )
    some = job.data.select.take(bundle.GOLDEN_IMAGES)
    outputs = workshop.final_outputs(trial, run, some, job)
    folder = run.joinpath(*Path(row.path).parts[:2])  # some formats are a folder in it
    bundle.write(own, run, workshop.decoded(some), outputs, folder)


# --- the process that writes ------------------------------------------------------------------------------


def written(
    group: Sequence[Wanted], shape: tuple[int, ...], device: Device, folder: Path
) -> Iterator[tuple[Wanted, dict[str, Any]]]:
    """Every file of the group with what its writer said; where the writer dies, the next file gets a new one."""
    left = list(group)
    while left:
        replies, why = _child(left, shape, device, folder)
        yield from zip(left, replies)
        left = left[len(replies) :]
        if left:
            yield left.pop(0), _reply("failed", f"the writer {why}")


def _child(
    group: Sequence[Wanted], shape: tuple[int, ...], device: Device, folder: Path
) -> tuple[list[dict[str, Any]], str]:
    """What a writer said before it ended, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="lighten-") as room:
        request = {
            "shape": list(shape),
            "device": to_json(device),
            "folder": str(folder.resolve()),
            "wanted": [
                [w.format, to_json(w.precision), str(w.program.resolve()), to_json(w.inside), to_json(w.boxes)]
                for w in group
            ],
        }
        write_whole(Path(room) / "request.json", json.dumps(request))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lighten.exports", room], capture_output=True, text=True, timeout=WRITING_S
            )
            dead = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
            why = f"died ({dead}): {' '.join(done.stderr.strip().splitlines()[-2:])[-300:]}"
        except subprocess.TimeoutExpired:
            why = f"took longer than {WRITING_S:.0f} s"
        replies = Path(room) / "replies.jsonl"
        lines = replies.read_text().splitlines() if replies.exists() else []
        return [json.loads(line) for line in lines], why


def _reply(status: str = "", reason: str = "", **more: Any) -> dict[str, Any]:
    """A line of the writer; an empty status: the file is there."""
    return {"status": status, "reason": reason, "seconds": 0.0, "fallbacks": [], "not_here": None, **more}


def write(one: Wanted, shape: tuple[int, ...], device: Device, folder: Path) -> dict[str, Any]:
    """Make one file in `folder`/NAME, whole or not at all, and say what it is; what cannot be is a status and a reason."""
    from lighten.kit.operators import of_graph
    from lighten.quant import program

    began, format = time.perf_counter(), get("formats", one.format)
    try:
        if reason := format.refuses(one.precision, device):
            return _reply("refused", reason)
        for what, asked, how in (("normalisation is", one.inside, "bake"), ("boxes are", one.boxes, "put_boxes_in")):
            if asked and not hasattr(format, how):
                able = [n for n in names("formats") if hasattr(get("formats", n), how)]
                return _reply("refused", f"{what} put inside files of {' and '.join(able)} only")
        module = program.read(one.program)
        if reason := format.lacks(of_graph(module), shape):
            return _reply("refused", reason)
        with whole_folder(folder / one.name) as room:
            file = room / f"model{format.SUFFIX}"
            file.parent.mkdir(exist_ok=True)
            companions = format.export(module, shape, file, one.precision, device)
            if one.inside:
                format.bake(file, one.inside)
            fallbacks = list(format.fallbacks(file))  # of the network: boxes are found in float by anyone
            if one.boxes:
                format.put_boxes_in(file, one.boxes)
            others = tuple(str(c.relative_to(file.parent)) for c in companions)
            artifact = Artifact(str(file.relative_to(room)), one.format, sha256_file(file), others)
            problems = format.check(file, module, shape) if format.not_here() and hasattr(format, "check") else ()
    except LightenError as e:
        return _reply("failed", e.what)
    except Exception as e:  # noqa: BLE001 - a tool's own exceptions are one failed row
        return _reply("failed", f"{type(e).__name__}: {str(e)[:300]}")
    if problems:
        return _reply("failed", problems[0])
    seconds = time.perf_counter() - began
    return _reply(artifact=to_json(artifact), seconds=seconds, fallbacks=fallbacks, not_here=format.not_here())


def _main(room: Path) -> None:
    """The writer: one line for each file, as soon as it is there."""
    request = json.loads((room / "request.json").read_text())
    device, folder = from_json(Device, request["device"]), Path(request["folder"])
    for format, precision, program, how, rules in request["wanted"]:
        inside = from_json(Preprocess, how) if how else None
        boxes = from_json(BoxRules, rules) if rules else None
        one = Wanted(format, from_json(Precision, precision), Path(program), inside, boxes)
        reply = write(one, tuple(request["shape"]), device, folder)
        with (room / "replies.jsonl").open("a") as out:
            out.write(json.dumps(reply) + "\n")


# --- the record -------------------------------------------------------------------------------------------


def line_of(row: Row) -> str:
    """One row in one line."""
    what = f"{row.format} {row.title}"
    if row.evidence is None:
        return f"{what}: {row.status}{': ' if row.reason else ''}{row.reason}"
    e = row.evidence
    return (
        f"{what}: {row.status}, {row.bytes / 1e6:.2f} MB, same answer {e.fidelity.same_top1:.1f} %, "
        f"{metric_title(e.metric_name)} {e.metric} %, "
        f"{e.p50(1):.2f} ms, {e.memory_mb:.0f} MB of memory{'; ' if row.reason else ''}{row.reason}"
    )


def read_record(run: Path) -> tuple[Row, ...]:
    """The rows that were exported from a run, () before the first. Raises BadBundle on a damaged record."""
    file = run / FOLDER / RECORD
    if not file.exists():
        return ()
    try:
        return tuple(from_json(Row, r) for r in json.loads(file.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadBundle(
            f"{file} is damaged ({str(e)[:200]}).", "Move it away: its files stay, and can be exported again."
        ) from e


def _record(file: Path, row: Row) -> None:
    kept = (*read_record(file.parent.parent), row)
    rows = {(r.format, r.precision, r.pixels, r.boxes): r for r in kept}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(to_json(tuple(rows.values())), indent=1, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
