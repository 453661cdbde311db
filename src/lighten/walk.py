"""The walk: front desk, weigh-in, menu, workshop, scales, ledger, judge, vault, reading room."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lighten import advice, bundle, devices, ledger, report, scout, search, workshop
from lighten.bench import Timing
from lighten.clock import Clock
from lighten.data import box_doctor, framed, has_boxes
from lighten.data import load as load_data
from lighten.data.cache import write_whole
from lighten.data.doctor import Finding, raise_errors, suspect_blindness, suspect_channel_order, suspect_normalization
from lighten.data.doctor import examine as examine_data
from lighten.data.splits import FileImages
from lighten.errors import BadConfig, BadModel
from lighten.machine import environment, this_machine
from lighten.methods.quantize import NAMED, precisions
from lighten.methods.quantize import Step as QuantizeStep
from lighten.narrow import narrowed
from lighten.plugins import get, missing_backends, task_of
from lighten.trials import Here, Run, bench_for, evidence_of, tried, try_all
from lighten.types import (
    Asked,
    Budget,
    ChannelGroup,
    Data,
    Device,
    Job,
    LayerCost,
    Precision,
    Preprocess,
    Progress,
    Recipe,
    Result,
    Say,
    Step,
    digest,
    metric_title,
    silent,
    to_json,
)
from lighten.vault import read_report, thumbnails

SCAN_IMAGES = 128
SCRATCH = "scratch"
MIXES = 4
DOUBT_IMAGES = 256


@dataclass(frozen=True)
class Settings:
    """What a compression may be told beside model, data, budget and device.

    `asked` is the one method and bits of `lighten quantize`, instead of the whole menu; `steps` come before every
    precision, as `lighten prune` and its kin ask for them. `sensitivity` measures what each layer costs alone; a mix of
    precisions needs it and has it measured anyway. `narrow` lets the search prune and train where quantization misses
    the budget. `arch` is the name that the model can be built by; `isolate` tries recipes in a process of their own. `task`
    (classification, detection) is that of the data where it is not given.
    """

    name: str | None = None
    out: Path = Path("runs")
    seed: int = 0
    formats: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    ranges: str = "auto"
    strict: bool = False
    fresh: bool = False
    lang: str = "en"
    asked: Asked | None = None
    steps: tuple[Step, ...] = ()
    sensitivity: bool = False
    narrow: bool = True
    isolate: bool = True
    arch: str = ""
    task: str = ""
    timing: Timing = field(default_factory=Timing)
    model_name: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        QuantizeStep(ranges=self.ranges)
        if self.task:
            get("tasks", self.task)
        if self.asked:
            if reason := search.cannot(self.asked):
                raise BadConfig(reason)
            method = "qat" if self.asked.method == "qat" else "quantize"
            get("methods", method).Step(**dict(self.asked.settings))
        for step in self.steps:
            get("methods", step.method).Step(**dict(step.settings))
        for kind, given, known in (
            ("format", self.formats, None),
            ("precision", self.precisions, tuple(NAMED)),
        ):
            for one in given:
                if known is None:
                    get("formats", one)
                elif one not in known:
                    raise BadConfig(f"There is no {kind} named {one!r}.", f"Known: {', '.join(known)}")


def compress(
    model: Any,
    data: Any,
    budget: Budget | None = None,
    device: str | Device = "this-machine",
    *,
    preprocess: Preprocess | None = None,
    settings: Settings = Settings(),
    progress: Progress = silent,
    log: Say = lambda line: None,
) -> Result:
    """Find the best file of `model` inside `budget`, measured on the file itself, and write run folder and bundle.

    `model` is a classifier (torch.nn.Module: float32 (N, C, H, W) to (N, classes)) or a detector (to (N, places, values):
    `lighten.models.detectors`). `data` is a folder, a built-in name, a `Data`, or an iterable of (image, label). `preprocess` is needed unless the data yields ready float inputs
    or the model carries timm's description. The same call continues an interrupted run and repeats no finished trial.
    """
    budget = budget or Budget()
    clock = Clock(time.monotonic(), budget.time_s)
    job, lines = front_desk(model, data, device, preprocess, settings, progress)
    names = formats(job.device, settings)  # refuses what cannot be tried before anything is
    for line in lines:
        log(line)
    fingerprint = question(job, budget, settings)
    folder = settings.out / (
        settings.name or f"{(settings.model_name or type(model).__name__).lower()}-{fingerprint[:8]}"
    )
    with ledger.locked(folder):
        if settings.fresh:
            _clear(folder)
        job = dataclasses.replace(job, scratch=str(folder / SCRATCH), arch=settings.arch, say=log)
        book = ledger.open_ledger(folder, fingerprint)
        run = Run(job, folder, budget, clock, log, names, settings.formats, settings.timing, settings.isolate)
        with clock.part("weigh-in"):
            book, run, reference = weigh_in(book, run)
        with clock.part("sensitivity"):
            book, costs = scan(book, run, settings)
        menu = recipes(run, settings, costs)
        with bench_for(run, reference) as bench:
            with clock.part("trials"):
                book = try_all(book, menu, bench, run)
            if may_narrow(settings):
                book = narrowed(book, menu, bench, run)
        result = judge(book, menu, run, settings, costs)
        report.write(result, folder, lang=settings.lang)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    return result


def may_narrow(settings: Settings) -> bool:
    """Whether the search may change the network: nobody asked for one way, or for none."""
    return settings.narrow and not settings.asked and not settings.steps


# --- 1. front desk ----------------------------------------------------------------------------------


def front_desk(
    model: Any, data: Any, device: str | Device, preprocess: Preprocess | None, settings: Settings, progress: Progress
) -> tuple[Job, list[str]]:
    """Load and check everything before anything costly; warnings come back as lines, errors all at once."""
    from lighten.kit.trace import check_output
    from lighten.models import detectors
    from lighten.models.load import own_preprocess

    target = devices.load(device) if isinstance(device, str) else device
    loaded: Data = load_data(data, seed=settings.seed, progress=progress)
    task = task_for(loaded, settings)
    model = detectors.detector(model) if task == "detection" else model
    ready = _ready_inputs(loaded)
    how = None if ready and preprocess is None else preprocess or own_preprocess("", model)
    if how is None and not ready:
        raise BadConfig(
            "How the model wants its images is not known.",
            "Give the input size, mean and std (--input-size 224 --mean ... --std ...).",
        )
    loaded = framed(loaded, how)
    prepared = {k: s.prepare(how, progress, k) for k, s in loaded.splits.items() if k != "train"}
    loaded = dataclasses.replace(loaded, **prepared)
    examine = box_doctor.examine if task == "detection" else examine_data
    findings = list(examine(loaded, how, strict=settings.strict))
    raise_errors(findings)
    model = model.eval().cpu()
    job = Job(loaded, task, target, how, model, seed=settings.seed, progress=progress)
    if task == "detection":
        get("tasks", task, needs="REQUIRES")
        channels, height, width = workshop.input_shape(job)
        head = detectors.check(model, (channels, height, width), len(loaded.classes))
        job = dataclasses.replace(job, head=head)
    elif detectors.is_detector(model):
        raise BadModel(f"The model is a detector, but {loaded.name} has no boxes.", "Give a COCO, YOLO or VOC set.")
    else:
        check_output(model, workshop.input_shape(job), len(loaded.classes))
    return job, [*loaded.notices, *(f"{f.level}: {f.what} {f.to_do}" for f in findings)]


def task_for(data: Data, settings: Settings) -> str:
    """Detection where the data has boxes. Raises BadConfig where another task was asked for."""
    found = "detection" if has_boxes(data) else "classification"
    if settings.task not in ("", found):
        held = "boxes" if found == "detection" else "classes, no boxes"
        raise BadConfig(
            f"The task is {settings.task}, but the labels of {data.name} are {held}.",
            f"Leave --task out for {found}, or give other data.",
        )
    return found


def _ready_inputs(data: Data) -> bool:
    """Whether the data yields float network inputs instead of pictures."""
    if isinstance(data.calibrate.images, FileImages) or not len(data.calibrate):
        return False
    first = data.calibrate.images.read(int(data.calibrate.rows[0]))
    return isinstance(first, np.ndarray) and first.dtype != np.uint8


def question(job: Job, budget: Budget, settings: Settings) -> str:
    """What makes two runs the same: weights, data, preprocessing, device, budget, choices. Not the clock."""
    state = {k: v.detach().cpu().numpy() for k, v in job.original.state_dict().items()}
    choices = [settings.seed, settings.formats, settings.precisions, settings.ranges, to_json(settings.timing)]
    choices += [to_json(settings.asked), settings.sensitivity] if settings.asked or settings.sensitivity else []
    choices += [to_json(settings.steps), settings.narrow] if settings.steps or not settings.narrow else []
    device = to_json(job.device)
    device.pop("memory_mb")
    return digest(
        [
            bundle.digest_of(state),
            str(job.original),
            job.data.fingerprint,
            to_json(job.preprocess),
            device,
            to_json(budget),
            choices,
        ]
    )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- 2. weigh-in ------------------------------------------------------------------------------------


def weigh_in(book: ledger.Ledger, run: Run) -> tuple[ledger.Ledger, Run, workshop.Reference]:
    """The original, unchanged, as a file and in torch. Raises BadModel where it cannot be exported."""
    job, select = run.job, run.job.data.select
    outputs = workshop.torch_outputs(job.original, job, select)
    task = task_of(job)
    score = task.score(outputs, select.labels)
    run.log(f"original in torch: {metric_title(task.METRIC)} {score} % on {len(select)} select images")
    for doubt in doubts(job, outputs):
        run.log(f"{doubt.level}: {doubt.what} {doubt.to_do}")
    reference = workshop.Reference(select, outputs)
    book, baseline = tried(book, Recipe(format="onnx"), Here(run, reference), run)
    if baseline.failure:
        raise BadModel(
            f"The unchanged model cannot be exported and measured: {baseline.failure.reason}",
            "Mend the model first; nothing else was tried.",
        )
    return book, dataclasses.replace(run, weighed=baseline), dataclasses.replace(reference, original=baseline.artifact)


def doubts(job: Job, outputs: np.ndarray) -> list[Finding]:
    """Whether the model seems to want other preprocessing than it gets: no better than guessing, or better as BGR."""
    task, sample = task_of(job), job.data.select.take(DOUBT_IMAGES)
    score = task.score(outputs, job.data.select.labels)
    blind = suspect_blindness(score.value, score.n) if job.head else None
    found = [blind if job.head else suspect_normalization(score.value, len(job.data.classes), score.n)]

    def accuracy(pixels: np.ndarray) -> float:
        turned = dataclasses.replace(sample, ready=pixels)
        return float(task.score(workshop.torch_outputs(job.original, job, turned), sample.labels).value)

    if job.preprocess is not None and workshop.decoded(sample).dtype == np.uint8:
        found.append(suspect_channel_order(accuracy, workshop.decoded(sample)))
    return [f for f in found if f is not None]


# --- 3 to 6. menu, workshop, scales, ledger -----------------------------------------------------------


def scan(book: ledger.Ledger, run: Run, settings: Settings) -> tuple[ledger.Ledger, tuple[LayerCost, ...]]:
    """What each layer costs alone at each precision, on a few images; of a detector, where nobody asked for it, only
    what 8 bits do to the ends of its head, of a classifier nothing.

    Every finished row is in the ledger at once, so that an interrupted scan goes on.
    """
    from lighten.quant import sensitivity

    job, sample = run.job, run.job.data.calibrate.take(SCAN_IMAGES)
    everything = settings.sensitivity or bool(settings.asked and settings.asked.bits == "mixed")
    ends = (
        () if everything or job.head is None or settings.asked or settings.steps else task_of(job).protect(job.original)
    )
    if not everything and not ends:
        return book, ()
    what = "each layer costs" if everything else "8 bits cost each end of the detector's head"
    run.log(f"measuring what {what} alone, on {len(sample)} images")

    def keep(row: LayerCost) -> None:
        nonlocal book
        book = book.append("cost", row)

    costs = sensitivity.scan(
        job.original,
        workshop.input_shape(job),
        [torch_inputs(x) for x in sample.batches(job.preprocess, 32)],
        job.device,
        sensitivity.CHOICES if everything else (("int8", "int8"),),
        only=ends,
        damage=task_of(job).damage,
        labels=torch_inputs(sample.labels) if job.head is None else None,
        known=book.costs,
        made=keep,
        step=lambda done, total: job.progress("sensitivity of layers", done, total),
        timed=_same_machine(job.device),
    )
    return book, costs


def torch_inputs(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _same_machine(device: Device) -> bool:
    return not device.arch or device.arch == this_machine().arch


def formats(device: Device, settings: Settings) -> tuple[str, ...]:
    """The device's formats that are installed, or those asked for.

    Raises BadConfig for a format that the device does not take, MissingBackend where one that was asked for is not
    installed, or none is.
    """
    if strange := [f for f in settings.formats if f not in device.formats]:
        raise BadConfig(f"{device.title} does not take {strange[0]}.", f"It takes {', '.join(device.formats)}.")
    ready = tuple(f for f in device.formats if not missing_backends(get("formats", f)))
    for name in settings.formats or (() if ready else device.formats):
        get("formats", name, needs="REQUIRES")
    return settings.formats or ready


def recipes(run: Run, settings: Settings, costs: Sequence[LayerCost]) -> tuple[Recipe, ...]:
    """What will be tried: every format at every precision, or the one way to quantize that was asked for.

    Raises BadConfig where no mix of precisions can meet the budget.
    """
    names = run.formats
    if settings.asked is None:
        given = [NAMED[p] for p in settings.precisions]
        wanted = given or search.worth_a_trial(precisions(run.job.device), run.budget, evidence_of(run.baseline))
        # The default step has no settings of its own, so that its recipe is the same one in every version.
        chosen = () if settings.ranges == "auto" else (("ranges", settings.ranges),)
        if settings.steps:
            wanted = given or [NAMED["float32"]]
        elif run.job.head is not None and NAMED["int8"] in wanted:
            # Of all layers too, where they were measured, only the ends are left in float: their outputs are the answer.
            ends = search.sensitive_ends(
                row for row in costs if row.layer in task_of(run.job).protect(run.job.original)
            )
            wanted = [*wanted, *([search.sparing(NAMED["int8"], ends)] if ends else [])]
        return search.menu(names, wanted, Step("quantize", chosen), settings.steps)
    if settings.asked.bits == "mixed":
        mixes = _mixes(costs, run)
        return search.asked_menu(names, settings.asked, mixes)
    return search.asked_menu(names, settings.asked, [search.uniform(settings.asked, _ends(run.job, settings.asked))])


def _ends(job: Job, asked: Asked) -> tuple[str, ...]:
    """First and last layer, where the bits are few enough to spare them."""
    if search.BITS[asked.bits].weights != "int4":
        return ()
    return scout.ends_of(job)


def _mixes(costs: Sequence[LayerCost], run: Run) -> list[Precision]:
    """One mix for each limit on size or time, else some from the smallest to the most accurate: the files decide."""
    from lighten.quant.allocate import allocate, frontier

    size, budget = evidence_of(run.baseline).size, run.budget
    other = size.bytes - sum(row.bytes for row in costs if row.weights == "float32")
    limits = [m * 1e6 for m in (budget.max_size_mb,) if m is not None]
    limits += [size.bytes * (1 - s / 100) for s in (budget.min_shrink,) if s is not None]
    if limits:
        return [allocate(costs, max_bytes=min(limits), other_bytes=max(0, other)).precision]
    return [mix.precision for mix in frontier(costs, MIXES)]


# --- 7 and 8. judge, vault ----------------------------------------------------------------------------


def judge(
    book: ledger.Ledger, menu: Sequence[Recipe], run: Run, settings: Settings, costs: tuple[LayerCost, ...]
) -> Result:
    """Choose, measure the winner once on the report split, write bundle and result.json."""
    job, folder, budget, clock, baseline = run.job, run.folder, run.budget, run.clock, run.baseline
    same_machine = _same_machine(job.device)
    asked = {r.id for r in (*menu, *book.planned)}
    trials = tuple(t for t in book.trials if t.id in {baseline.id, *asked} and workshop.is_whole(t, folder))
    winner = search.judge([t for t in trials if t.id in asked], baseline, budget, same_machine)
    with clock.part("report images"):
        report_split = job.data.report.prepare(job.preprocess, job.progress, "report")
        final, before, after = read_report(book, winner, report_split, run)
    misses = budget.misses(evidence_of(winner), evidence_of(baseline), drop=final.drop.value)
    groups, unit = groups_of(book, job), advice.unit_of(job.task)
    result = Result(
        verdict="FAIL" if misses or winner.id not in asked else "PASS",  # the original is no answer to another question
        misses=misses,
        advice=(
            *search.advise(trials, baseline, job.device, same_machine, misses),
            *search.next_step(settings.asked, misses),
            *advice.guilty(costs, unit),
            *advice.seen_before(evidence_of(baseline).metric, final.baseline),
            *advice.narrowing(groups, book.widths, winner.recipe, trials, unit),
        ),
        budget=budget,
        device=job.device,
        task=job.task,
        model=settings.model_name or type(job.original).__name__,
        data=job.data.name,
        classes=job.data.classes,
        classes_zh=job.data.classes_zh,
        preprocess=job.preprocess,
        baseline=baseline,
        trials=tuple(t for t in trials if t.id != baseline.id),
        winner=winner.id,
        final=final,
        environment=environment(),
        command=settings.command,
        images={k: len(s) for k, s in job.data.splits.items()} | {"report": len(report_split)},
        flips=thumbnails(folder, report_split, before, after, job),
        path=str(folder),
        sensitivity=costs or book.costs,
        widths=book.widths,
        groups=groups,
        spent=tuple(clock.spent.items()),
        head=job.head,
    )
    bundle.write(result, folder, _spread(report_split.ready), _spread(after))
    write_whole(folder / "result.json", json.dumps(to_json(result), indent=1, ensure_ascii=False, allow_nan=False))
    return result


def groups_of(book: ledger.Ledger, job: Job) -> tuple[ChannelGroup, ...]:
    """The channel groups of the original, where they were searched."""
    return scout.groups_of(job) if book.widths else ()


def _spread(rows: Any) -> np.ndarray:
    """Golden vectors from all over the split, not from one class at its start."""
    return np.asarray(rows[:: max(1, len(rows) // bundle.GOLDEN_IMAGES)][: bundle.GOLDEN_IMAGES])
