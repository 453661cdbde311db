"""`lighten train`: a YAML of architecture, data, preprocessing and fit settings becomes a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lighten.config import check_keys, read_yaml
from lighten.data import framed, has_boxes
from lighten.data import load as load_data
from lighten.data.cache import write_whole
from lighten.errors import BadConfig
from lighten.plugins import get, task_of
from lighten.types import Data, Device, Job, Preprocess, Progress, metric_title, silent, to_json

KEYS = ("arch", "classes", "weights", "data", "preprocess", "fit", "out", "seed")


def train(
    config: Path, *, out: Path | None = None, progress: Progress = silent, trust_code: bool = False, log: Any = print
) -> dict[str, Any]:
    """Train as `config` says; writes `model.safetensors` and `training.json` into the out folder, and resumes there.

    Data with boxes trains a detector. Returns the contents of training.json: top-1 or mAP on the select and report
    splits, the settings, the history. The checkpoint describes itself: architecture, classes, preprocessing.
    """
    values = read_yaml(config, KEYS)
    for key in ("arch", "data", "preprocess", "out"):
        if key not in values:
            raise BadConfig(f"{config} lacks the key {key!r}.", f"A training needs: {', '.join(KEYS)}.")
    from lighten.kit.fit import FitSettings, best_device, fit
    from lighten.kit.infer import outputs

    check_keys(values["preprocess"], [f.name for f in dataclasses.fields(Preprocess)], f"{config}, preprocess")
    check_keys(values.get("fit", {}), [f.name for f in dataclasses.fields(FitSettings)], f"{config}, fit")
    how, settings = _settings(config, values, FitSettings)
    folder = out or Path(values["out"])
    data = framed(load_data(values["data"], seed=values.get("seed", 0), progress=progress), how)
    model = _model(values, len(data.classes), trust_code)
    select = data.select.prepare(how, progress, "select")
    job = _job(model, data, how, settings.seed, progress)
    task = task_of(job)
    metric = metric_title(task.METRIC)
    history: list[dict[str, float]] = []

    def after(epoch: int, current: Any, mean_loss: float) -> None:
        if epoch % 5 and epoch != settings.epochs:
            return
        got = task.score(outputs(current, select, how, batch=500), select.labels)
        history.append({"epoch": epoch, "loss": round(mean_loss, 4), f"select_{task.METRIC}": round(got.value, 2)})
        log(f"{folder.name}  epoch {epoch:3d}  loss {mean_loss:.4f}  select {metric} {got} %")

    def loss(net: Any, x: Any, y: Any) -> Any:
        return task.loss(net, x, y, settings.label_smoothing)

    trained = fit(model, settings, loss, job, checkpoint=folder / "last.pt", after_epoch=after)
    trained.to(best_device())
    report = data.report.prepare(how, progress, "report")
    scores = {
        name: task.score(outputs(trained, split, how, batch=500), split.labels)
        for name, split in (("select", select), ("report", report))
    }
    record = _save(folder, trained.cpu(), values, how, settings, scores, history, data, trust_code)
    return {**record, "metric": metric, "folder": str(folder)}


def _job(model: Any, data: Data, how: Preprocess, seed: int, progress: Progress) -> Job:
    """What the fit loop and the task read; of a detector its head too. Raises BadModel, MissingBackend."""
    job = Job(data, "classification", Device("", "", "", ()), how, seed=seed, progress=progress)
    if not has_boxes(data):
        return job
    from lighten.models import detectors

    get("tasks", "detection", needs="REQUIRES")
    head = detectors.check(model, how.input_shape, len(data.classes))
    return dataclasses.replace(job, task="detection", head=head)


def _settings(config: Path, values: dict[str, Any], kind: Any) -> tuple[Preprocess, Any]:
    fit_values = {"seed": values.get("seed", 0), **values.get("fit", {})}
    listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["preprocess"].items()}
    try:
        return Preprocess(**{"source": "the training's settings", **listed}), kind(**fit_values)
    except (TypeError, ValueError) as e:
        raise BadConfig(f"{config}: {e}.") from e


def _model(values: dict[str, Any], classes: int, trust_code: bool) -> Any:
    from lighten.models.load import build, fill, read_weights

    count = values.get("classes", classes)
    if count != classes:
        raise BadConfig(f"classes is {count}, but the data has {classes}.", "Leave the key out.")
    model = build(values["arch"], classes=classes, trust_code=trust_code)
    if values.get("weights"):
        tensors, _ = read_weights(Path(values["weights"]))
        want = model.state_dict()
        # A head of other classes starts fresh; everything else must fit.
        tensors = {k: v if v.shape == want.get(k, v).shape else want[k] for k, v in tensors.items()}
        fill(model, tensors, values["weights"], values["arch"])
    return model


def _save(
    folder: Path,
    model: Any,
    values: dict[str, Any],
    how: Preprocess,
    settings: Any,
    scores: dict[str, Any],
    history: list[dict[str, float]],
    data: Data,
    trust_code: bool,
) -> dict[str, Any]:
    from lighten.models.saved import save

    record = {
        "arch": values["arch"],
        "classes": data.classes,
        "data": data.name,
        "seed": values.get("seed", 0),
        "preprocess": to_json(how),
        "fit": to_json(settings),
        "scores": to_json(scores),
        "history": history,
    }
    save(
        folder / "model.safetensors",
        model,
        values["arch"],
        classes=len(data.classes),
        preprocess=how,
        class_names=data.classes,
        trust_code=trust_code,
    )
    write_whole(folder / "training.json", json.dumps(record, indent=1, ensure_ascii=False))
    return record
