"""ExecuTorch: the plan's own integers inside the delegate, threads as asked, nothing hostile reaches the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("executorch")

import torch
from torch import Tensor, nn

from lighten import devices
from lighten.errors import BadBundle, RefusedFormat
from lighten.formats import executorch
from lighten.quant.plan import quantize
from lighten.types import Precision

SHAPE = (3, 8, 8)
INT8 = Precision("int8", "int8")
HERE = devices.load("this-machine")


class Tiny(nn.Module):
    """A depthwise convolution, a hard sigmoid, a concatenation of two ranges, a mean, a float answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.gate, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        z = self.deep(y) * nn.functional.hardsigmoid(self.gate(y))
        return self.fc(torch.cat([y, 3.0 * z], 1).mean((2, 3)))


class Rolled(nn.Module):
    """An operator that XNNPACK does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 3).mean((2, 3))


def images(n: int = 16) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan() -> Any:
    return quantize(Tiny().eval(), SHAPE, [images()], INT8, HERE).module


@pytest.fixture(scope="module")
def file(plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("executorch") / "tiny.pte"
    assert executorch.export(plan, SHAPE, path, INT8, HERE) == ()
    return path


def layouts(value: np.ndarray) -> Iterator[np.ndarray]:
    yield value
    if value.ndim == 4:
        yield from (value.transpose(0, 2, 3, 1), value.transpose(1, 2, 3, 0))


def test_weights_in_the_file_are_the_integers_of_the_plan(plan: Any, file: Path) -> None:
    """Byte for byte somewhere in the file, in the layout of XNNPACK."""
    raw = file.read_bytes()
    wanted = [v.numpy() for v in plan.buffers() if v.dtype == torch.int8 and v.ndim > 1]
    assert len(wanted) == 4
    for value in wanted:
        assert any(np.ascontiguousarray(one).tobytes() in raw for one in layouts(value)), value.shape


def test_weights_lists_what_is_stored(plan: Any, file: Path) -> None:
    rows = executorch.weights(file)
    integers = [r for r in rows if r.dtype == "int8"]
    wanted = [v for v in plan.buffers() if v.dtype == torch.int8 and v.ndim > 1]
    assert sorted(r.bytes for r in integers) == sorted(v.numel() for v in wanted)
    assert sorted(r.zeros for r in integers) == pytest.approx(sorted(float((v == 0).float().mean()) for v in wanted))
    assert sum(r.bytes for r in rows) <= file.stat().st_size
    for row in rows:
        size = {"int8": 1, "int32": 4, "float32": 4, "int64": 8}[row.dtype]
        assert row.bytes == size * int(np.prod(row.shape)), row


def test_answers_are_those_of_the_plan(plan: Any, file: Path) -> None:
    with torch.inference_mode():
        want = plan(images()).numpy()
    got = executorch.load(file, 1)(images().numpy())
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))


def test_everything_is_in_the_delegate_and_what_is_float_is_named(file: Path) -> None:
    rows = executorch.fallbacks(file)
    assert not [r for r in rows if "outside" in r]
    assert "1 x FullyConnected in float32" in rows


def test_an_operator_outside_the_delegate_is_named_and_the_file_still_answers(tmp_path: Path) -> None:
    path = tmp_path / "rolled.pte"
    executorch.export(Rolled(), SHAPE, path, Precision(), HERE)
    assert [r for r in executorch.fallbacks(path) if r == "1 x cumsum outside the delegate"]
    want = Rolled()(images(3)).numpy()
    np.testing.assert_allclose(executorch.load(path, 1)(images(3).numpy()), want, rtol=0, atol=1e-5)


def test_two_loads_with_other_threads_both_go_on_answering(file: Path) -> None:
    """The pool is one for the process: whoever runs sets it, and what hung on the old one is loaded anew."""
    x = images(2).numpy()
    one, two = executorch.load(file, 1), executorch.load(file, 2)
    first = one(x)
    assert executorch._runtime()._threadpool_get_thread_count() == 1
    np.testing.assert_array_equal(two(x), first)
    assert executorch._runtime()._threadpool_get_thread_count() == 2
    np.testing.assert_array_equal(one(x), first)


@pytest.mark.parametrize("damage", ["magic", "header", "short", "empty", "missing"])
def test_a_file_that_is_not_one_never_reaches_the_runtime(
    file: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = file.read_bytes()
    bad = {
        "magic": raw[:4] + b"NOPE" + raw[8:],
        "header": raw[:8] + b"nope" + raw[12:],
        "short": raw[:-1],
        "empty": b"",
    }
    path = tmp_path / "bad.pte"
    if damage != "missing":
        path.write_bytes(bad[damage])
    monkeypatch.setattr(executorch, "_runtime", None)
    with pytest.raises(BadBundle, match=r"bad\.pte"):
        executorch.load(path, 1)


def test_refusals_say_why() -> None:
    assert executorch.refuses(INT8, HERE) is None
    assert executorch.refuses(Precision("int8", "int8", (("fc", "float32", "float32"),)), HERE) is None
    for unable in (Precision("float16", "float16"), Precision("int8", "float32"), Precision("int4", "int8")):
        assert f"{unable.weights} weights with {unable.activations} activations" in str(
            executorch.refuses(unable, HERE)
        )


def test_an_operator_without_kernel_is_named() -> None:
    common = {"aten.conv2d.default": 20, "aten.relu_.default": 3, "_operator.getitem": 2}
    assert executorch.lacks(common, SHAPE) is None
    assert "torchvision.nms" in str(executorch.lacks({**common, "torchvision.nms.default": 1}, SHAPE))


def test_what_the_converter_cannot_take_is_one_clear_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x.mean(1))[1]

    with pytest.raises(RefusedFormat, match="ExecuTorch cannot convert"):
        executorch.export(Odd(), SHAPE, tmp_path / "odd.pte", Precision(), HERE)
