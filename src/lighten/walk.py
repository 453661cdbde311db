"""The walk: front desk, weigh-in, menu, workshop, scales, ledger, judge, vault, reading room."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lighten import advice, bundle, devices, ledger, report, scout, search, workshop
from lighten.bench import Timing
from lighten.data import load as load_data
from lighten.data.cache import write_whole
from lighten.data.doctor import Finding, raise_errors, suspect_channel_order, suspect_normalization
from lighten.data.doctor import examine as examine_data
from lighten.data.splits import FileImages
from lighten.errors import BadConfig, BadModel
from lighten.machine import environment, this_machine
from lighten.methods.quantize import NAMED, precisions
from lighten.methods.quantize import Step as QuantizeStep
from lighten.plugins import get, missing_backends
from lighten.search import reach
from lighten.types import (
    Asked,
    Budget,
    ChannelGroup,
    Data,
    Device,
    Evidence,
    Final,
    Job,
    LayerCost,
    Precision,
    Predicted,
    Preprocess,
    Progress,
    Recipe,
    Result,
    Step,
    Trial,
    digest,
    silent,
    to_json,
)
from lighten.worker import Worker

Log = Callable[[str], None]
FLIPS_SHOWN = 24
SCAN_IMAGES = 128
SCRATCH = "scratch"
MIXES = 4
DOUBT_IMAGES = 256
SCAN_SHARE = 0.12
"""Of the time that is left, how much measuring single groups and layers may take."""
TRAINED = re.compile(r"trained [\d.]+ epochs in (\d+) s")
SPARE_S, SPARE_SHARE = 10.0, 0.05
"""Seconds that are kept back for what is not foreseen, and the share of the time given that they are at most."""


@dataclass(frozen=True)
class Settings:
    """What a compression may be told beside model, data, budget and device.

    `asked` is the one method and bits of `lighten quantize`, instead of the whole menu; `steps` come before every
    precision, as `lighten prune` and its kin ask for them. `sensitivity` measures what each layer costs alone; a mix of
    precisions needs it and has it measured anyway. `narrow` lets the search prune and train where quantization misses
    the budget. `arch` is the name that the model can be built by; `isolate` tries recipes in a process of their own.
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
    timing: Timing = field(default_factory=Timing)
    model_name: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        QuantizeStep(ranges=self.ranges)
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
    log: Log = lambda line: None,
) -> Result:
    """Find the best file of `model` inside `budget`, measured on the file itself, and write run folder and bundle.

    `model` is a classifier (torch.nn.Module: float32 (N, C, H, W) to (N, classes)). `data` is a folder, a built-in
    name, a `Data`, or an iterable of (image, label). `preprocess` is needed unless the data yields ready float inputs
    or the model carries timm's description. The same call continues an interrupted run and repeats no finished trial.
    """
    budget = budget or Budget()
    clock = Clock(time.monotonic(), budget.time_s)
    job, lines = front_desk(model, data, device, preprocess, settings, progress)
    formats(job.device, settings)  # refuses what cannot be tried before anything is
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
        with clock.part("weigh-in"):
            book, baseline, reference = weigh_in(book, job, folder, settings, log)
        with clock.part("sensitivity"):
            book, costs = scan(book, job, settings, log)
        menu = recipes(job, settings, budget, baseline, costs)
        with bench_for(job, reference, folder, settings) as bench:
            with clock.part("trials"):
                book = try_all(book, menu, baseline, job, bench, folder, clock, settings, log)
            book = narrowed(book, menu, baseline, job, bench, folder, budget, clock, settings, log)
        result = judge(book, menu, baseline, job, folder, budget, settings, costs, clock, log)
        report.write(result, folder, lang=settings.lang)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    return result


@dataclass(frozen=True)
class Clock:
    """The time that was given, from the call on, and where it went."""

    began: float
    limit_s: float | None
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def left_s(self) -> float | None:
        return None if self.limit_s is None else self.limit_s - (time.monotonic() - self.began)

    def share(self, part: float) -> Callable[[], bool]:
        """Whether this share of what is left now is spent; never, where the time is not limited."""
        until = None if self.left_s is None else time.monotonic() + part * self.left_s
        return lambda: until is not None and time.monotonic() > until

    @property
    def is_up(self) -> bool:
        return self.left_s is not None and self.left_s <= 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to the part `name` of the walk."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - began


# --- 1. front desk ----------------------------------------------------------------------------------


def front_desk(
    model: Any, data: Any, device: str | Device, preprocess: Preprocess | None, settings: Settings, progress: Progress
) -> tuple[Job, list[str]]:
    """Load and check everything before anything costly; warnings come back as lines, errors all at once."""
    from lighten.kit.trace import check_output
    from lighten.models.load import own_preprocess

    target = devices.load(device) if isinstance(device, str) else device
    loaded: Data = load_data(data, seed=settings.seed, progress=progress)
    ready = _ready_inputs(loaded)
    how = None if ready and preprocess is None else preprocess or own_preprocess("", model)
    if how is None and not ready:
        raise BadConfig(
            "How the model wants its images is not known.",
            "Give the input size, mean and std (--input-size 224 --mean ... --std ...).",
        )
    prepared = {k: s.prepare(how, progress, k) for k, s in loaded.splits.items() if k != "train"}
    loaded = dataclasses.replace(loaded, **prepared)
    findings = list(examine_data(loaded, how, strict=settings.strict))
    raise_errors(findings)
    model = model.eval().cpu()
    job = Job(loaded, "classification", target, how, model, seed=settings.seed, progress=progress)
    check_output(model, workshop.input_shape(job), len(loaded.classes))
    return job, [*loaded.notices, *(f"{f.level}: {f.what} {f.to_do}" for f in findings)]


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


def weigh_in(
    book: ledger.Ledger, job: Job, folder: Path, settings: Settings, log: Log
) -> tuple[ledger.Ledger, Trial, workshop.Reference]:
    """The original, unchanged, as a file and in torch. Raises BadModel where it cannot be exported."""
    select = job.data.select
    outputs = workshop.torch_outputs(job.original, job, select)
    score = get("tasks", job.task).score(outputs, select.labels)
    log(f"original in torch: top-1 {score} % on {len(select)} select images")
    for doubt in doubts(job, outputs):
        log(f"{doubt.level}: {doubt.what} {doubt.to_do}")
    reference = workshop.Reference(select, outputs)
    recipe = Recipe(format="onnx")
    here = Here(job, reference, folder, settings.timing)
    book, baseline = tried(book, recipe, here, folder, log)
    if baseline.failure:
        raise BadModel(
            f"The unchanged model cannot be exported and measured: {baseline.failure.reason}",
            "Mend the model first; nothing else was tried.",
        )
    return book, baseline, reference


def doubts(job: Job, outputs: np.ndarray) -> list[Finding]:
    """Whether the model seems to want other preprocessing than it gets: no better than guessing, or better as BGR."""
    task, sample = get("tasks", job.task), job.data.select.take(DOUBT_IMAGES)
    score = task.score(outputs, job.data.select.labels)
    found = [suspect_normalization(score.value, len(job.data.classes), score.n)]

    def accuracy(pixels: np.ndarray) -> float:
        turned = dataclasses.replace(sample, ready=pixels)
        return float(task.score(workshop.torch_outputs(job.original, job, turned), sample.labels).value)

    if job.preprocess is not None and workshop.decoded(sample).dtype == np.uint8:
        found.append(suspect_channel_order(accuracy, workshop.decoded(sample)))
    return [f for f in found if f is not None]


class Here:
    """Tries recipes in this process; what `Worker` does in another one."""

    def __init__(self, job: Job, reference: workshop.Reference, folder: Path, timing: Timing) -> None:
        self.job, self.reference, self.folder, self.timing = job, reference, folder, timing
        self.made: workshop.Made = {}

    def start(self) -> None:
        """There is nothing to start."""

    def attempt(self, recipe: Recipe, limit_s: float | None = None) -> Trial:
        """As `Worker.attempt`, but a crash ends the run, and `limit_s` is not held."""
        artifacts = self.folder / "artifacts"
        return workshop.attempt(recipe, self.job, self.reference, artifacts, self.timing, self.made)


Bench = Worker | Here


@contextlib.contextmanager
def bench_for(job: Job, reference: workshop.Reference, folder: Path, settings: Settings) -> Iterator[Bench]:
    """Where recipes are tried."""
    if not settings.isolate:
        yield Here(job, reference, folder, settings.timing)
        return
    with Worker(job, reference, folder, settings.timing) as worker:
        yield worker


def tried(
    book: ledger.Ledger,
    recipe: Recipe,
    bench: Bench,
    folder: Path,
    log: Log,
    *,
    predicted: Predicted | None = None,
    limit_s: float | None = None,
) -> tuple[ledger.Ledger, Trial]:
    """The trial of a recipe: from the ledger where its files are whole, else made and recorded."""
    known = next((t for t in book.trials if t.id == recipe.id), None)
    if known is not None and workshop.is_whole(known, folder):
        log(f"{recipe.title}: done before")
        return book, known
    workshop.sweep(folder / "artifacts")
    began = time.monotonic()
    bench.start()
    if limit_s is not None:
        limit_s = max(limit_s - (time.monotonic() - began), 0.0)
    trial = dataclasses.replace(bench.attempt(recipe, limit_s), predicted=predicted)
    book = book.append("trial", trial)
    log(line_of(trial))
    return book, trial


def line_of(trial: Trial) -> str:
    """One trial in one line."""
    if trial.evidence is None:
        return f"{trial.recipe.title}: failed, {trial.failure.reason if trial.failure else 'no evidence'}"
    e = trial.evidence
    return f"{trial.recipe.title}: {e.size.mb:.2f} MB, top-1 {e.metric} %, drop {e.drop.value:.2f} pt, {e.p50(1):.2f} ms, {e.memory_mb:.0f} MB of memory"


# --- 3 to 6. menu, workshop, scales, ledger -----------------------------------------------------------


def scan(book: ledger.Ledger, job: Job, settings: Settings, log: Log) -> tuple[ledger.Ledger, tuple[LayerCost, ...]]:
    """What each layer costs alone at each precision, on a few images; nothing where nobody asked for it.

    Every finished row is in the ledger at once, so that an interrupted scan goes on.
    """
    if not (settings.sensitivity or (settings.asked and settings.asked.bits == "mixed")):
        return book, ()
    from lighten.quant import sensitivity

    sample = job.data.calibrate.take(SCAN_IMAGES)
    log(f"measuring what each layer costs alone, on {len(sample)} images")

    def keep(row: LayerCost) -> None:
        nonlocal book
        book = book.append("cost", row)

    costs = sensitivity.scan(
        job.original,
        workshop.input_shape(job),
        [torch_inputs(x) for x in sample.batches(job.preprocess, 32)],
        job.device,
        labels=torch_inputs(sample.labels),
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


def recipes(
    job: Job, settings: Settings, budget: Budget, baseline: Trial, costs: Sequence[LayerCost]
) -> tuple[Recipe, ...]:
    """What will be tried: every format at every precision, or the one way to quantize that was asked for.

    Raises BadConfig where no mix of precisions can meet the budget.
    """
    names = formats(job.device, settings)
    if settings.asked is None:
        given = [NAMED[p] for p in settings.precisions]
        wanted = given or search.worth_a_trial(precisions(job.device), budget, evidence_of(baseline))
        # The default step has no settings of its own, so that its recipe is the same one in every version.
        chosen = () if settings.ranges == "auto" else (("ranges", settings.ranges),)
        if settings.steps:
            wanted = given or [NAMED["float32"]]
        return search.menu(names, wanted, Step("quantize", chosen), settings.steps)
    if settings.asked.bits == "mixed":
        mixes = _mixes(costs, budget, baseline)
        return search.asked_menu(names, settings.asked, mixes)
    return search.asked_menu(names, settings.asked, [search.uniform(settings.asked, _ends(job, settings.asked))])


def _ends(job: Job, asked: Asked) -> tuple[str, ...]:
    """First and last layer, where the bits are few enough to spare them."""
    if search.BITS[asked.bits].weights != "int4":
        return ()
    from lighten.quant.static import ends

    return ends(job.original, workshop.input_shape(job))


def _mixes(costs: Sequence[LayerCost], budget: Budget, baseline: Trial) -> list[Precision]:
    """One mix for each limit on size or time, else some from the smallest to the most accurate: the files decide."""
    from lighten.quant.allocate import allocate, frontier

    assert baseline.evidence is not None
    size = baseline.evidence.size
    other = size.bytes - sum(row.bytes for row in costs if row.weights == "float32")
    limits = [m * 1e6 for m in (budget.max_size_mb,) if m is not None]
    limits += [size.bytes * (1 - s / 100) for s in (budget.min_shrink,) if s is not None]
    if limits:
        return [allocate(costs, max_bytes=min(limits), other_bytes=max(0, other)).precision]
    return [mix.precision for mix in frontier(costs, MIXES)]


def left_out(device: Device, settings: Settings) -> list[str]:
    """Formats of the device that are not tried because their tools are missing, and how to get them."""
    rows = [(f, get("formats", f)) for f in (() if settings.formats else device.formats)]
    return [f"{f} is left out: pip install 'lighten[{m.EXTRA}]'" for f, m in rows if missing_backends(m)]


def try_all(
    book: ledger.Ledger,
    menu: Sequence[Recipe],
    baseline: Trial,
    job: Job,
    bench: Bench,
    folder: Path,
    clock: Clock,
    settings: Settings,
    log: Log,
) -> ledger.Ledger:
    """Every recipe of the menu, in order, until the time is up."""
    done = [baseline]
    for line in left_out(job.device, settings):
        log(line)
    while (recipe := search.next_recipe(menu, done)) is not None:
        limit_s = limit_of(book, baseline, job, clock)
        if limit_s is not None and limit_s <= 0:
            log(f"time is up after {len(done)} trials")
            break
        job.progress("trials", len(done), len(menu))
        book, trial = tried(book, recipe, bench, folder, log, limit_s=limit_s)
        done.append(trial)
    job.progress("trials", len(menu), len(menu))
    return book


# --- the same loop, where only a narrower network can meet the budget -----------------------------------


def narrowed(
    book: ledger.Ledger,
    menu: Sequence[Recipe],
    baseline: Trial,
    job: Job,
    bench: Bench,
    folder: Path,
    budget: Budget,
    clock: Clock,
    settings: Settings,
    log: Log,
) -> ledger.Ledger:
    """Measure what channels cost, plan widths, probe, train the best as long as the time allows.

    What is decided is recorded before it is tried: an interrupted run goes on with the same recipes.
    """
    mine = {r.id for r in menu}
    if not may_narrow(settings) or not reach.needed([t for t in book.trials if t.id in mine], baseline, budget):
        return book
    if reason := hindered(book, baseline, job, clock):
        log(f"quantization alone misses the budget, and the network is not narrowed: {reason}")
        return book
    names = formats(job.device, settings)
    log("quantization alone misses the budget: measuring what each channel group costs, on little data")

    def keep(kind: str, row: Any) -> None:
        nonlocal book
        book = book.append(kind, row)

    bytes_limited = reach.goal(budget, evidence_of(baseline)).bytes is not None
    enough = clock.share(SCAN_SHARE)
    try:
        with clock.part("sensitivity"):
            found = scout.scout(
                job, names, bits=bytes_limited, widths=book.widths, costs=book.costs, keep=keep, enough=enough
            )
            ends = scout.ends_of(job)
    except BadModel as e:
        log(f"the network is not narrowed: {e.what} {e.to_do}")
        return book
    while todo := next_narrow(book, found, ends, names, baseline, job, folder, budget, clock):
        for recipe in todo:
            if recipe not in book.planned:
                book = book.append("planned", recipe)
        for recipe in todo:
            limit_s = limit_of(book, baseline, job, clock)
            if limit_s is not None and limit_s <= 0:
                log("time is up")
                return book
            means = means_of(book, found, ends, names, baseline, job, budget, clock)
            expected = reach.expected(means, recipe)
            log(f"{recipe.title}: {said(recipe, found, expected)}")
            with clock.part("probes" if reach.is_probe(recipe) else "training"):
                book, _ = tried(book, recipe, bench, folder, log, predicted=expected, limit_s=limit_s)
    if clock.is_up:
        log("time is up")
    elif not book.planned:
        log("no channel widths are expected to meet the budget: nothing was narrowed")
    elif clock.left_s is not None and all(map(reach.is_probe, book.planned)):
        log(f"the long training is left out: {clock.left_s:.0f} s are left, and what follows it takes most of them")
    return book


def evidence_of(trial: Trial) -> Evidence:
    """Of a trial that has some."""
    assert trial.evidence is not None
    return trial.evidence


def may_narrow(settings: Settings) -> bool:
    """Whether the search may change the network: nobody asked for one way, or for none."""
    return settings.narrow and not settings.asked and not settings.steps


def hindered(book: ledger.Ledger, baseline: Trial, job: Job, clock: Clock) -> str | None:
    """Why narrowing cannot even begin, or None."""
    if not len(job.data.train):
        return "there are no training images to recover on"
    if clock.left_s is not None and clock.left_s < closing_s(book, baseline, job) + 2 * reach.LEAST_TRAINING_S:
        return f"only {max(clock.left_s, 0):.0f} s are left"
    return None


def next_narrow(
    book: ledger.Ledger,
    found: scout.Scouted,
    ends: Sequence[str],
    names: Sequence[str],
    baseline: Trial,
    job: Job,
    folder: Path,
    budget: Budget,
    clock: Clock,
) -> list[Recipe]:
    """What was decided before and is not tried yet, or whose files are no longer whole; else what is decided now."""
    tried_before = {t.id for t in book.trials if workshop.is_whole(t, folder)}
    if open_ := [r for r in book.planned if r.id not in tried_before]:
        return open_
    if clock.is_up:
        return []
    done = [t for t in book.trials if t.recipe in book.planned]
    todo = reach.next_recipes(means_of(book, found, ends, names, baseline, job, budget, clock), done)
    return [r for r in todo if r.id not in tried_before]


def means_of(
    book: ledger.Ledger,
    found: scout.Scouted,
    ends: Sequence[str],
    names: Sequence[str],
    baseline: Trial,
    job: Job,
    budget: Budget,
    clock: Clock,
) -> reach.Means:
    """What is known now: costs held to every file that was measured so far, and the time that is left."""
    costs = {f: scout.costs(found, f, book.trials, job, ends) for f in names}
    return reach.Means(
        costs, tuple(names), baseline, budget, tuple(ends), clock.left_s, tail_s(book, names, baseline, job, clock)
    )


def tail_s(book: ledger.Ledger, names: Sequence[str], baseline: Trial, job: Job, clock: Clock) -> float:
    """Seconds that follow the last training: quantize, export and measure each format, then read the report images."""
    known = [t for t in book.trials if t.evidence and t.recipe.steps]  # a first export loads half a world of modules
    each = [max((untrained_s(t) for t in known if t.recipe.format == f), default=20.0) for f in names]
    spare = min(SPARE_S, SPARE_SHARE * (clock.limit_s or 0.0))
    return spare + sum(each) + closing_s(book, baseline, job)


def closing_s(book: ledger.Ledger, baseline: Trial, job: Job) -> float:
    """Seconds that follow the last trial: original and winner answer the report images, each in a new process."""
    known = [(t, t.evidence) for t in (baseline, *book.trials) if t.evidence]
    rate = max(min(e.throughput for _, e in known), 1e-3)
    start = min(max(t.measure_s - len(job.data.select) / e.throughput, 0.0) for t, e in known)
    return 2 * (start + len(job.data.report) / rate)


def limit_of(book: ledger.Ledger, baseline: Trial, job: Job, clock: Clock) -> float | None:
    """Seconds after which a trial is stopped, so that what follows keeps within the time."""
    return None if clock.left_s is None else clock.left_s - closing_s(book, baseline, job)


def untrained_s(trial: Trial) -> float:
    """Seconds of a trial without those of its training, as `kit.fit` told them: it may end before its time."""
    trained = sum(int(found[1]) for note in trial.notes if (found := TRAINED.match(note)))
    return max(trial.build_s - trained, 0.0) + trial.measure_s


def said(recipe: Recipe, found: scout.Scouted, expected: Predicted | None) -> str:
    """What a narrowed recipe is expected to be, in one line."""
    channels = {g.name: g.channels for g in found.groups}
    kept = dict(reach.widths_of(recipe))
    share = sum(kept.get(n, c) for n, c in channels.items()) / max(sum(channels.values()), 1)
    words = [f"{100 * share:.0f} % of the channels kept"]
    if expected is not None:
        words.append(f"{expected.bytes / 1e6:.2f} MB expected")
        words += [f"{expected.latency_ms:.2f} ms expected"] if expected.latency_ms else []
    training = reach.training_of(recipe)
    limit = f"at most {training['seconds']:.0f} s" if training["seconds"] else f"{training['epochs']:g} epochs"
    return ", ".join([*words, f"training {limit}"])


# --- 7 and 8. judge, vault ----------------------------------------------------------------------------


def judge(
    book: ledger.Ledger,
    menu: Sequence[Recipe],
    baseline: Trial,
    job: Job,
    folder: Path,
    budget: Budget,
    settings: Settings,
    costs: tuple[LayerCost, ...],
    clock: Clock,
    log: Log,
) -> Result:
    """Choose, measure the winner once on the report split, write bundle and result.json."""
    same_machine = _same_machine(job.device)
    asked = {r.id for r in (*menu, *book.planned)}
    trials = tuple(t for t in book.trials if t.id in {baseline.id, *asked} and workshop.is_whole(t, folder))
    winner = search.judge([t for t in trials if t.id in asked], baseline, budget, same_machine)
    with clock.part("report images"):
        report_split = job.data.report.prepare(job.preprocess, job.progress, "report")
        final, before, after = read_report(book, baseline, winner, report_split, job, folder, log)
    assert winner.evidence is not None
    assert baseline.evidence is not None
    misses = budget.misses(winner.evidence, baseline.evidence, drop=final.drop.value)
    groups = groups_of(book, job)
    result = Result(
        verdict="FAIL" if misses or winner.id not in asked else "PASS",  # the original is no answer to another question
        misses=misses,
        advice=(
            *search.advise(trials, baseline, job.device, same_machine, misses),
            *search.next_step(settings.asked, misses),
            *advice.guilty(costs),
            *advice.seen_before(evidence_of(baseline).metric, final.baseline),
            *advice.narrowing(groups, book.widths, winner.recipe, trials),
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
        flips=thumbnails(folder, report_split, before, after),
        path=str(folder),
        sensitivity=costs or book.costs,
        widths=book.widths,
        groups=groups,
        spent=tuple(clock.spent.items()),
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


def read_report(
    book: ledger.Ledger, baseline: Trial, winner: Trial, split: Any, job: Job, folder: Path, log: Log
) -> tuple[Final, np.ndarray, np.ndarray]:
    """Original and winner on the report images. The answers are kept, so that a resumed run reads them back."""
    file = folder / "artifacts" / f"report-{winner.id}.npz"
    if book.final and book.final[0] == winner.id and file.exists():
        with np.load(file, allow_pickle=False) as kept:
            return book.final[1], kept["before"], kept["after"]
    log(f"reading the {len(split)} report images once, for {winner.recipe.title}")
    before = workshop.final_outputs(baseline, folder, split, job)
    after = before if winner.id == baseline.id else workshop.final_outputs(winner, folder, split, job)
    task, labels = get("tasks", job.task), split.labels
    final = Final(
        task.score(before, labels),
        task.score(after, labels),
        task.drop(before, after, labels),
        len(task.flipped(before, after)),
        task.per_class(before, after, labels, job.data.classes),
        task.extra(after, labels),
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, before=before, after=after)
    write_whole(file, buffer.getvalue())
    book.append("final", {"winner": winner.id, "final": final})
    return final, before, after


def thumbnails(folder: Path, split: Any, before: np.ndarray, after: np.ndarray) -> tuple[dict[str, Any], ...]:
    """Small pictures of report images whose answer changed, with all three answers."""
    rows = np.flatnonzero(before.argmax(1) != after.argmax(1))[:FLIPS_SHOWN]
    labels, shown = split.labels, []
    for k, row in enumerate(rows.tolist()):
        pixels = split.ready[row]
        entry = {
            "image": split.images.name(int(split.rows[row])),
            "truth": int(labels[row]),
            "before": int(before[row].argmax()),
            "after": int(after[row].argmax()),
        }
        if pixels.dtype == np.uint8:
            entry["thumbnail"] = f"flips/{k}.png"
            write_whole(folder / "flips" / f"{k}.png", _png(pixels))
        shown.append(entry)
    return tuple(shown)


def _png(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((128, 128))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
