"""The walk: front desk, weigh-in, menu, workshop, scales, ledger, judge, vault, reading room."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lighten import advice, bundle, devices, ledger, report, search, workshop
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
from lighten.types import (
    Asked,
    Budget,
    Data,
    Device,
    Final,
    Job,
    LayerCost,
    Precision,
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

Log = Callable[[str], None]
FLIPS_SHOWN = 24
SCAN_IMAGES = 128
SCRATCH = "scratch"
MIXES = 4
DOUBT_IMAGES = 256


@dataclass(frozen=True)
class Settings:
    """What a compression may be told beside model, data, budget and device.

    `asked` is the one method and bits of `lighten quantize`, instead of the whole menu. `sensitivity` measures what
    each layer costs alone; a mix of precisions needs it and has it measured anyway.
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
    sensitivity: bool = False
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
        job = dataclasses.replace(job, scratch=str(folder / SCRATCH))
        book = ledger.open_ledger(folder, fingerprint)
        book, baseline, reference = weigh_in(book, job, folder, settings, log)
        book, costs = scan(book, job, settings, log)
        menu = recipes(job, settings, budget, baseline, costs)
        book = try_all(book, menu, baseline, job, reference, folder, budget, settings, log)
        result = judge(book, menu, baseline, job, folder, budget, settings, costs, log)
        report.write(result, folder, lang=settings.lang)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    return result


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
    book, baseline = tried(book, recipe, job, reference, folder, settings, log)
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


def tried(
    book: ledger.Ledger,
    recipe: Recipe,
    job: Job,
    reference: workshop.Reference,
    folder: Path,
    settings: Settings,
    log: Log,
    made: workshop.Made | None = None,
) -> tuple[ledger.Ledger, Trial]:
    """The trial of a recipe: from the ledger where its files are whole, else made and recorded."""
    known = next((t for t in book.trials if t.id == recipe.id), None)
    if known is not None and workshop.is_whole(known, folder):
        log(f"{recipe.title}: done before")
        return book, known
    workshop.sweep(folder / "artifacts")
    trial = workshop.attempt(recipe, job, reference, folder / "artifacts", settings.timing, made)
    log(line_of(trial))
    return book.append("trial", trial), trial


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
        wanted = [NAMED[p] for p in settings.precisions] or precisions(job.device)
        # The default step has no settings of its own, so that its recipe is the same one in every version.
        chosen = () if settings.ranges == "auto" else (("ranges", settings.ranges),)
        return search.menu(names, wanted, Step("quantize", chosen))
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
    reference: workshop.Reference,
    folder: Path,
    budget: Budget,
    settings: Settings,
    log: Log,
) -> ledger.Ledger:
    """The only loop."""
    began, done = time.monotonic(), [baseline]
    made: workshop.Made = {}
    for line in left_out(job.device, settings):
        log(line)
    while (recipe := search.next_recipe(menu, done)) is not None:
        if budget.time_s is not None and time.monotonic() - began > budget.time_s:
            log(f"time is up after {len(done)} trials")
            break
        job.progress("trials", len(done), len(menu))
        book, trial = tried(book, recipe, job, reference, folder, settings, log, made)
        done.append(trial)
    job.progress("trials", len(menu), len(menu))
    return book


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
    log: Log,
) -> Result:
    """Choose, measure the winner once on the report split, write bundle and result.json."""
    same_machine = _same_machine(job.device)
    asked = {r.id for r in menu}
    trials = tuple(t for t in book.trials if t.id in {baseline.id, *asked} and workshop.is_whole(t, folder))
    winner = search.judge([t for t in trials if t.id in asked], baseline, budget, same_machine)
    report_split = job.data.report.prepare(job.preprocess, job.progress, "report")
    final, before, after = read_report(book, baseline, winner, report_split, job, folder, log)
    assert winner.evidence is not None
    assert baseline.evidence is not None
    misses = budget.misses(winner.evidence, baseline.evidence, drop=final.drop.value)
    result = Result(
        verdict="FAIL" if misses or winner.id not in asked else "PASS",  # the original is no answer to another question
        misses=misses,
        advice=(
            *search.advise(trials, baseline, job.device, same_machine, misses),
            *search.next_step(settings.asked, misses),
            *advice.guilty(costs),
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
        sensitivity=costs,
    )
    bundle.write(result, folder, _spread(report_split.ready), _spread(after))
    write_whole(folder / "result.json", json.dumps(to_json(result), indent=1, ensure_ascii=False, allow_nan=False))
    return result


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
