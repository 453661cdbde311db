"""Static quantization from start to end: what each part is for, what is refused, what is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lighten.errors import BadConfig, BadData
from lighten.quant.rounding import Rounding
from lighten.quant.static import Parts, ends, quantize
from lighten.types import Device, Precision
from nets import SHAPE, images, net

PLAIN = Device("plain", "plain", "plain", ("onnx",))
INT8, W4A8 = Precision("int8", "int8"), Precision("int4", "int8")


def error(parts: Parts, precision: Precision = W4A8, kind: str = "mobile") -> float:
    """Mean squared error of the answers for images that were not calibrated on."""
    model = net(kind)
    done = quantize(model, images(96, seed=1)[0], precision, PLAIN, parts)
    fresh, _ = images(64, seed=9)
    with torch.no_grad():
        return float((done.module(fresh) - model(fresh)).square().mean())


def test_parts_that_are_learned_or_corrected_lose_less_than_plain_rounding() -> None:
    plain = error(Parts(bias="none"))
    assert error(Parts(bias="reestimate")) < plain
    assert error(Parts(bias="none", rounding=Rounding("brecq", iterations=120, batch=16))) < 0.8 * plain


@pytest.mark.parametrize("kind", ["small", "mobile"])
def test_auto_is_never_much_worse_than_doing_nothing(kind: str) -> None:
    for precision in (INT8, W4A8):
        assert error(Parts(bias="auto"), precision, kind) < 1.1 * error(Parts(bias="none"), precision, kind)


@pytest.mark.parametrize(
    "parts",
    [
        Parts(equalize=True),
        Parts(split=0.1),
        Parts(bias="analytic"),
        Parts(bias="empirical"),
        Parts(ranges="reconstruction"),
        Parts(rounding=Rounding("adaround", iterations=3)),
    ],
)
def test_every_part_gives_a_network_that_answers_and_leaves_the_original_alone(parts: Parts) -> None:
    model = net("small")
    before = copy.deepcopy(model.state_dict())
    x, _ = images(48, seed=1)
    done = quantize(model, x, INT8, PLAIN, parts)
    with torch.no_grad():
        got, wanted = done.module(x), model(x)
    assert float((got - wanted).square().mean()) < 0.2 * float(wanted.square().mean())
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert {row["layer"] for row in done.layers} == {
        row["layer"] for row in quantize(model, x, INT8, PLAIN, Parts()).layers
    }


def test_first_and_last_layer_are_known_by_name() -> None:
    assert ends(net("small"), SHAPE) == ("stem.0", "fc")


def bad(value: float) -> Tensor:
    x, _ = images(8, seed=1)
    x[5, 0, 0, 0] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_named(value: float) -> None:
    with pytest.raises(BadData, match="image 5"):
        quantize(net("small"), bad(value), INT8, PLAIN, Parts())


def test_no_images_are_refused_and_one_is_taken() -> None:
    x, _ = images(1, seed=1)
    with pytest.raises(BadData, match="no calibration images"):
        quantize(net("small"), x[:0], INT8, PLAIN, Parts())
    done = quantize(net("small"), x, W4A8, PLAIN, Parts(rounding=Rounding(iterations=2)))
    assert torch.isfinite(done.module(x)).all()


def test_images_without_contrast_still_give_a_network_that_answers() -> None:
    """Every image the same grey: ranges have no width to speak of."""
    done = quantize(net("small"), torch.zeros(16, *SHAPE), INT8, PLAIN, Parts())
    fresh, _ = images(4, seed=2)
    assert torch.isfinite(done.module(fresh)).all()


@pytest.mark.parametrize("wrong", [{"ranges": "widest"}, {"bias": "some"}])
def test_a_bad_setting_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(BadConfig, match=next(iter(wrong))):
        Parts(**wrong)  # type: ignore[arg-type]
