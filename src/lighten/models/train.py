"""`lighten train`: a YAML of architecture, data, preprocessing and fit settings becomes a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lighten.config import check_keys, read_yaml
from lighten.data import load as load_data
from lighten.data.cache import write_whole
from lighten.errors import BadConfig
from lighten.plugins import get
from lighten.types import Device, Job, Preprocess, Progress, silent, to_json

KEYS = ("arch", "classes", "weights", "data", "preprocess", "fit", "out", "seed")


def train(
    config: Path, *, out: Path | None = None, progress: Progress = silent, trust_code: bool = False, log: Any = print
) -> dict[str, Any]:
    """Train as `config` says; writes `model.safetensors` and `training.json` into the out folder, and resumes there.

    Returns the contents of training.json: top-1 on the select and report splits, the settings, the history.
    """
    values = read_yaml(config, KEYS)
    for key in ("arch", "data", "preprocess", "out"):
        if key not in values:
            raise BadConfig(f"{config} lacks the key {key!r}.", f"A training needs: {', '.join(KEYS)}.")
    from lighten.kit.fit import FitSettings, best_device, fit
    from lighten.kit.infer import outputs

    task = get("tasks", "classification")
    check_keys(values["preprocess"], [f.name for f in dataclasses.fields(Preprocess)], f"{config}, preprocess")
    check_keys(values.get("fit", {}), [f.name for f in dataclasses.fields(FitSettings)], f"{config}, fit")
    how, settings = _settings(config, values, FitSettings)
    folder = out or Path(values["out"])
    data = load_data(values["data"], seed=values.get("seed", 0), progress=progress)
    model = _model(values, len(data.classes), trust_code)
    select = data.select.prepare(how, progress, "select")
    job = Job(data, "classification", Device("", "", "", ()), how, seed=settings.seed, progress=progress)
    history: list[dict[str, float]] = []

    def after(epoch: int, current: Any, mean_loss: float) -> None:
        if epoch % 5 and epoch != settings.epochs:
            return
        got = task.score(outputs(current, select, how, batch=500), select.labels)
        history.append({"epoch": epoch, "loss": round(mean_loss, 4), "select_top1": round(got.value, 2)})
        log(f"{folder.name}  epoch {epoch:3d}  loss {mean_loss:.4f}  select top-1 {got} %")

    def loss(net: Any, x: Any, y: Any) -> Any:
        return task.loss(net, x, y, settings.label_smoothing)

    trained = fit(model, settings, loss, job, checkpoint=folder / "last.pt", after_epoch=after)
    trained.to(best_device())
    report = data.report.prepare(how, progress, "report")
    scores = {
        name: task.score(outputs(trained, split, how, batch=500), split.labels)
        for name, split in (("select", select), ("report", report))
    }
    record = _save(folder, trained.cpu(), values, how, settings, scores, history, data)
    return {**record, "folder": str(folder)}


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
    data: Any,
) -> dict[str, Any]:
    from safetensors.torch import save

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
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_whole(folder / "model.safetensors", save(state, metadata={"arch": values["arch"]}))
    write_whole(folder / "training.json", json.dumps(record, indent=1, ensure_ascii=False))
    return record
