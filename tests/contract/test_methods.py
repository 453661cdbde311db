"""Every method: a step is its settings, validated at birth; applying it leaves the original alone."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lighten.errors import BadConfig
from lighten.plugins import get, missing_backends, names
from lighten.types import Data, Device, Job, Precision, Recipe, from_json, to_json
from lighten.types import Step as Named

PLAIN = (str, int, float, bool, type(None))


@pytest.fixture(params=names("methods"))
def name(request: pytest.FixtureRequest) -> str:
    if missing := missing_backends(get("methods", request.param)):
        pytest.skip(f"{', '.join(missing)} not installed")
    return str(request.param)


@pytest.fixture
def method(name: str) -> ModuleType:
    return get("methods", name)


@pytest.fixture(scope="module")
def job(here: Device) -> Job:
    from lighten.data.splits import ArrayImages, Split
    from nets import CLASSES, images, net

    x, labels = images(96, seed=2)
    held = ArrayImages(x.numpy(), labels.numpy())
    rows = np.array_split(np.arange(96), 4)
    names = tuple(f"class {k}" for k in range(CLASSES))
    splits = {k: Split(held, r) for k, r in zip(("train", "calibrate", "select", "report"), rows)}
    data = Data("made up", names, names, **splits, fingerprint="f")
    return Job(data, "classification", here, None, net("mobile"), Precision("int8", "int8"))


def is_plain(value: Any) -> bool:
    return all(map(is_plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)


@pytest.mark.parametrize("plugin", names("methods"))
def test_has_every_name_of_the_contract(plugin: str) -> None:
    module = get("methods", plugin)
    assert isinstance(module.REQUIRES, tuple)
    assert isinstance(module.EXTRA, str)
    assert list(inspect.signature(module.Step.apply).parameters) == ["self", "model", "job"]
    assert list(inspect.signature(module.Step.proposals).parameters) == ["model", "device"]


def test_step_is_a_frozen_dataclass_of_plain_settings_with_defaults(method: ModuleType) -> None:
    step = method.Step()
    assert dataclasses.is_dataclass(method.Step)
    assert hash(step) == hash(method.Step())
    for field in dataclasses.fields(step):
        assert is_plain(getattr(step, field.name)), field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(step, field.name, None)


def test_settings_are_replayed_from_a_recipe_in_json(name: str, method: ModuleType) -> None:
    settings = tuple(sorted(dataclasses.asdict(method.Step()).items()))
    recipe = Recipe((Named(name, settings),))
    again = from_json(Recipe, json.loads(json.dumps(to_json(recipe), allow_nan=False)))
    assert again.id == recipe.id
    assert method.Step(**dict(again.steps[0].settings)) == method.Step()


def test_bad_settings_are_refused_at_birth(name: str, method: ModuleType) -> None:
    """A value that no such field can mean: a number below every range, a name that is no choice."""
    nonsense: dict[type, Any] = {int: -1, str: "no such choice", float: math.nan}
    tried = 0
    for field in dataclasses.fields(method.Step):
        bad = nonsense.get(type(getattr(method.Step(), field.name)))
        if bad is not None:
            with pytest.raises(BadConfig, match=name):
                method.Step(**{field.name: bad})
            tried += 1
    assert tried or not dataclasses.fields(method.Step)


def test_proposals_are_steps(method: ModuleType, job: Job) -> None:
    steps = list(method.Step.proposals(copy.deepcopy(job.original), job.device))
    assert steps
    assert all(type(step) is method.Step for step in steps)
    assert len(set(steps)) == len(steps)


def test_apply_gives_a_model_that_answers_and_leaves_the_original_untouched(method: ModuleType, job: Job) -> None:
    import torch

    from nets import CLASSES, images

    original = job.original
    before = {k: v.clone() for k, v in original.state_dict().items()}
    text = repr(original)
    done = method.Step().apply(copy.deepcopy(original), job)
    after = original.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert repr(original) == text
    assert not original.training
    x, _ = images(5, seed=8)
    with torch.inference_mode():
        out = done(x)
    assert out.shape == (5, CLASSES)
    assert torch.isfinite(out).all()


# --- quantize -----------------------------------------------------------------------------------------


def test_quantize_reads_no_labels_and_only_the_calibration_images(job: Job) -> None:
    """The others are not there at all."""
    data = dataclasses.replace(job.data, train=None, select=None, report=None)
    told: list[tuple[str, int, int]] = []
    small = dataclasses.replace(job, data=data, progress=lambda *a: told.append(a))
    done = get("methods", "quantize").Step(images=10, batch=4).apply(job.original, small)
    assert [row[1:] for row in told] == [(4, 10), (8, 10), (10, 10)]
    assert {row["weights"] for row in done.meta["layers"]} <= {"int8", "int7"}


def test_quantize_leaves_a_float_precision_alone(job: Job) -> None:
    plain = dataclasses.replace(job, precision=Precision("float16", "float16"))
    assert get("methods", "quantize").Step().apply(job.original, plain) is job.original


@pytest.mark.parametrize("bad", [{"ranges": "entropie"}, {"images": 0}, {"batch": 0}])
def test_quantize_names_a_bad_setting(bad: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=next(iter(bad))):
        get("methods", "quantize").Step(**bad)
