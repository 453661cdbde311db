"""Quantization-aware training: it wins back what rounding cost, resumes, and refuses what makes no sense."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lighten.data.splits import ArrayImages, Split
from lighten.errors import BadConfig
from lighten.methods.qat import Step
from lighten.quant.plan import quantize
from lighten.types import Data, Device, Job, Precision
from nets import CLASSES, SHAPE, images, net

torch.set_num_threads(1)
PLAIN = Device("plain", "plain", "plain", ("onnx",))
FOUR = Precision("int4", "int4", (("stem.0", "int8", "int8"), ("fc", "int8", "int8")))
QUICK = Step(epochs=6, batch=32, lr=3e-3, scale_lr=3e-3, ema=0.9, images=64)


@cache
def data() -> Data:
    x, labels = images(512, seed=2)
    held = ArrayImages(x.numpy(), labels.numpy())
    names = tuple(f"class {k}" for k in range(CLASSES))
    rows = {"train": (0, 256), "calibrate": (256, 320), "select": (320, 512), "report": (320, 512)}
    splits = {k: Split(held, np.arange(*ends)) for k, ends in rows.items()}
    return Data("made up", names, names, **splits, fingerprint="f")


@cache
def original(name: str = "small") -> Any:
    return net(name)


def job(**changed: Any) -> Job:
    return replace(Job(data(), "classification", PLAIN, None, original(), FOUR), **changed)


def unseen() -> Tensor:
    return images(256, seed=77)[0]


@cache
def without_training() -> Any:
    """The network that training starts from, converted as it is."""
    x = torch.from_numpy(data().calibrate.inputs(None))
    return quantize(original(), SHAPE, x.split(32), FOUR, PLAIN).module


def error(model: Any) -> float:
    """Mean squared difference from the float network's answers, relative to their power."""
    with torch.no_grad():
        got, want = model(unseen()), original()(unseen())
    return float(((got - want) ** 2).mean() / (want**2).mean())


def test_with_the_teacher_alone_it_comes_nearer_to_the_float_answers_on_images_it_never_saw() -> None:
    rounded = without_training()
    trained = replace(QUICK, distill=1.0).apply(copy.deepcopy(original()), job())
    assert error(trained) < 0.8 * error(rounded)
    with torch.no_grad():
        wanted = original()(unseen()).argmax(1)
        agreed = [(m(unseen()).argmax(1) == wanted).float().mean() for m in (trained, rounded)]
    assert agreed[0] >= agreed[1]


def test_with_the_labels_alone_it_is_surer_of_them_on_images_it_never_saw() -> None:
    rounded = without_training()
    trained = replace(QUICK, distill=0.0).apply(copy.deepcopy(original()), job())
    x, labels = images(256, seed=77)
    with torch.no_grad():
        surprise = [float(torch.nn.functional.cross_entropy(m(x), labels)) for m in (trained, rounded)]
    assert surprise[0] < surprise[1]


def test_the_same_seed_gives_the_same_network_and_another_another() -> None:
    short = replace(QUICK, epochs=1)
    first, again, other = (short.apply(copy.deepcopy(original()), job(seed=s))(unseen()) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_interrupted_and_resumed_in_the_scratch_folder_gives_the_same_answers(tmp_path: Path) -> None:
    class Killed(Exception):
        """Stands for the power cut."""

    def cut(what: str, _done: int, _total: int) -> None:
        if what.startswith("epoch 2/"):
            raise Killed

    short = replace(QUICK, epochs=2)
    whole = short.apply(copy.deepcopy(original()), job())(unseen())
    with pytest.raises(Killed):
        short.apply(copy.deepcopy(original()), job(scratch=str(tmp_path), progress=cut))
    epochs: list[str] = []
    resumed = short.apply(
        copy.deepcopy(original()), job(scratch=str(tmp_path), progress=lambda what, *_: epochs.append(what))
    )
    assert not any(what.startswith("epoch 1/") for what in epochs)
    assert torch.equal(resumed(unseen()), whole)


def test_another_precision_does_not_go_on_from_the_same_scratch(tmp_path: Path) -> None:
    short = replace(QUICK, epochs=1)
    short.apply(copy.deepcopy(original()), job(scratch=str(tmp_path)))
    fine = short.apply(copy.deepcopy(original()), job(scratch=str(tmp_path), precision=Precision("int8", "int8")))
    assert torch.equal(
        fine(unseen()),
        short.apply(copy.deepcopy(original()), job(precision=Precision("int8", "int8")))(unseen()),
    )


def test_rows_say_that_the_ranges_are_learned_and_are_plain_json() -> None:
    done = replace(QUICK, epochs=1).apply(copy.deepcopy(original()), job())
    rows = done.meta["layers"]
    assert {r["layer"]: r["weights"] for r in rows} == {
        "stem.0": "int8", "inner.0": "int4", "depthwise.0": "int4", "left.0": "int4", "right.0": "int4",
        "skip": "int4", "fc": "int8",
    }  # fmt: skip
    assert {r["range_method"] for r in rows} == {"learned"}
    json.dumps(rows, allow_nan=False)


def test_a_float_precision_is_left_alone() -> None:
    model = copy.deepcopy(original())
    assert QUICK.apply(model, job(precision=Precision())) is model


@pytest.mark.parametrize("split", [None, "empty"])
def test_no_training_images_are_refused(split: str | None) -> None:
    nothing = None if split is None else Split(data().train.images, np.arange(0))
    with pytest.raises(BadConfig, match="qat: there are no training images"):
        QUICK.apply(copy.deepcopy(original()), job(data=replace(data(), train=nothing)))


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"batch": 1}, {"lr": 0.0}, {"lr": 1.0}, {"scale_lr": 0.0}, {"scale_lr": float("nan")},
        {"distill": 1.1}, {"distill": -0.1}, {"temperature": 0.0}, {"ema": 1.0}, {"shift": 1.0}, {"images": 0},
        {"ranges": "widest"},
    ],
)  # fmt: skip
def test_nonsense_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=f"^qat: .*{next(iter(bad))}"):
        Step(**bad)
