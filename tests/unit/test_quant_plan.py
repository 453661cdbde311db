"""The quantization plan against a network of integers written by hand in numpy."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from lighten.errors import BadData, BadModel
from lighten.kit.trace import trace
from lighten.quant.plan import Quantized, quantize
from lighten.types import Device, Precision

torch.set_num_threads(1)
SHAPE = (3, 9, 9)
INT8 = Precision("int8", "int8")
PLAIN = Device("plain", "plain", "plain", ("onnx",))
SYMMETRIC = replace(PLAIN, symmetric_activations=True)
REDUCED = replace(PLAIN, reduce_range=True)
CLIPS = ("relu", "hardtanh", "clamp")


class Tiny(nn.Module):
    """Two convolutions (one with batch norm), both kinds of clip, a pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3, 2, 0)
        self.relu6 = nn.ReLU6()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        x = self.relu6(self.conv2(x))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def tiny() -> Tiny:
    torch.manual_seed(0)
    model = Tiny().eval()
    with torch.no_grad():
        model.bn.running_mean.normal_(0, 0.5)
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.weight.uniform_(0.5, 2)
        model.bn.bias.normal_(0, 0.5)
        model.conv2.weight.mul_(8)  # so that ReLU6 has something to clip
    return model


def images(n: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, device: Device = PLAIN, precision: Precision = INT8, **more: Any) -> Quantized:
    return quantize(model, SHAPE, images().split(8), precision, device, **more)


@pytest.fixture(scope="module")
def plan() -> Callable[[str], Quantized]:
    """The converted network for each kind of device, by min-max, which numpy repeats without any search."""
    made: dict[str, Quantized] = {}
    devices = {"plain": PLAIN, "symmetric": SYMMETRIC, "reduced": REDUCED}

    def get(name: str) -> Quantized:
        if name not in made:
            made[name] = converted(tiny(), devices[name], methods=("min-max",))
        return made[name]

    return get


# --- the same network in numpy ------------------------------------------------------------------------


def convolve(x: np.ndarray, weight: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """Cross-correlation in the type of its inputs, integers included. `x` is padded with 0."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, weight)


@dataclass
class Layer:
    """One layer of the integer network: integer weights, their scales, a float bias."""

    q: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


@dataclass
class Tensor8:
    """Scale and zero point of one activation, from the smallest and largest value that calibration saw."""

    scale: float
    zero: int

    def integers(self, x: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(x / self.scale) + self.zero, -128, 127).astype(np.int64)


def activation(values: np.ndarray, symmetric: bool) -> Tensor8:
    lo, hi = min(values.min(), 0.0), max(values.max(), 0.0)
    if symmetric:
        return Tensor8(float(np.float32(max(-lo, hi) / 127)), 0)
    scale = (hi - lo) / 255
    return Tensor8(float(np.float32(scale)), int(np.rint(-128 - lo / scale)))


def layer(weight: np.ndarray, bias: np.ndarray, reach: int) -> Layer:
    flat = np.abs(weight).reshape(len(weight), -1).max(1)
    scale = (flat / reach).astype(np.float32).astype(np.float64)
    view = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return Layer(np.clip(np.rint(weight / view), -reach, reach).astype(np.int64), scale, bias)


@dataclass
class Simulated:
    """The integer network of `Tiny`, decided and run in numpy alone."""

    tensors: list[Tensor8]
    layers: list[Layer]
    outputs: np.ndarray


def simulate(model: Tiny, seen: np.ndarray, x: np.ndarray, *, reach: int, symmetric: bool) -> Simulated:
    p = {k: v.double().numpy() for k, v in model.state_dict().items()}
    factor = p["bn.weight"] / np.sqrt(p["bn.running_var"] + model.bn.eps)
    w1 = p["conv1.weight"] * factor[:, None, None, None]
    b1 = p["bn.bias"] - p["bn.running_mean"] * factor
    w2, b2, w3, b3 = (p[k] for k in ("conv2.weight", "conv2.bias", "fc.weight", "fc.bias"))

    one = np.maximum(convolve(seen, w1, 1, 1) + b1[:, None, None], 0)
    two = np.clip(convolve(one, w2, 2, 0) + b2[:, None, None], 0, 6)
    assert two.max() == 6  # the clip is at work
    tensors = [activation(v, symmetric) for v in (seen, one, two, two.mean((2, 3)))]
    layers = [layer(w, b, reach) for w, b in ((w1, b1), (w2, b2), (w3, b3))]

    q = tensors[0].integers(x)
    for k, (stride, pad, top) in enumerate(((1, 1, np.inf), (2, 0, 6.0))):
        held, t = layers[k], tensors[k]
        sums = convolve(q - t.zero, held.q, stride, pad)  # integers: padding is the real 0, which is the zero point
        real = sums * (t.scale * held.scale)[:, None, None] + held.bias[:, None, None]
        q = tensors[k + 1].integers(np.clip(real, 0, top))
    pooled = (q - tensors[2].zero).mean((2, 3)) * tensors[2].scale
    q = tensors[3].integers(pooled)
    sums = (q - tensors[3].zero) @ layers[2].q.T
    return Simulated(tensors, layers, sums * tensors[3].scale * layers[2].scale + layers[2].bias)


# --- what the converted graph holds --------------------------------------------------------------------


def called(module: Any, name: str) -> list[Any]:
    return [n for n in module.graph.nodes if n.op == "call_function" and name in str(n.target)]


def value(module: Any, node: Any) -> np.ndarray:
    return operator.attrgetter(node.target)(module).detach().numpy()


def stored(module: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Integers, scales, zero points and axis of each per-channel weight, in the graph's order."""
    nodes = called(module, "dequantize_per_channel")
    return [(*(value(module, a) for a in n.args[:3]), n.args[3]) for n in nodes]


def activations(module: Any) -> list[tuple[float, int]]:
    """Scale and zero point of each activation that is quantized, without repeats."""
    nodes = called(module, ".quantize_per_tensor")
    return list(dict.fromkeys((float(n.args[1]), int(n.args[2])) for n in nodes))


SETTINGS = {"plain": (127, False), "symmetric": (127, True), "reduced": (63, False)}


@pytest.mark.parametrize("name", SETTINGS)
def test_converted_network_answers_like_integers_in_numpy(plan: Callable[[str], Quantized], name: str) -> None:
    reach, symmetric = SETTINGS[name]
    x = images(12, seed=5)
    want = simulate(tiny(), images().double().numpy(), x.double().numpy(), reach=reach, symmetric=symmetric)
    module = plan(name).module
    with torch.no_grad():
        got = module(x).numpy()
        float_outputs = tiny()(x).numpy()
    np.testing.assert_allclose(got, want.outputs, rtol=0, atol=1e-4)
    assert np.abs(float_outputs - want.outputs).max() > 1e-3  # rounding is there to be seen


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_the_folded_ones_rounded_per_channel(plan: Callable[[str], Quantized], name: str) -> None:
    reach, symmetric = SETTINGS[name]
    seen = images().double().numpy()
    want = simulate(tiny(), seen, seen[:1], reach=reach, symmetric=symmetric).layers
    found = stored(plan(name).module)
    assert len(found) == len(want)
    for (q, scale, zero, axis), by_hand in zip(found, want):
        assert q.dtype == np.int8
        assert axis == 0
        assert scale.shape == (len(q),)
        assert not zero.any()
        assert np.abs(q.astype(int)).max() == reach  # never -128, never beyond 7 bits with reduce_range
        np.testing.assert_allclose(scale, by_hand.scale, rtol=1e-5)
        off = np.abs(q - by_hand.q)
        assert off.max() <= 1
        assert off.mean() < 0.01  # a tie may fall the other way in float32


@pytest.mark.parametrize("name", SETTINGS)
def test_activation_scales_cover_what_calibration_saw(plan: Callable[[str], Quantized], name: str) -> None:
    reach, symmetric = SETTINGS[name]
    seen = images().double().numpy()
    want = simulate(tiny(), seen, seen[:1], reach=reach, symmetric=symmetric).tensors
    found = activations(plan(name).module)
    assert len(found) == len(want)
    np.testing.assert_allclose([s for s, _ in found], [t.scale for t in want], rtol=1e-5)
    assert [z for _, z in found] == [t.zero for t in want]
    if symmetric:
        assert {z for _, z in found} == {0}


def test_batch_norm_is_folded_and_nothing_else_changes() -> None:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    from lighten.quant.quantizer import PolicyQuantizer

    model, x = tiny(), images(6, seed=9)
    assert called(trace(model, SHAPE).module(), "batch_norm")
    prepared = prepare_pt2e(trace(model, SHAPE).module(), PolicyQuantizer(INT8, PLAIN))
    assert not called(prepared, "batch_norm")
    with torch.no_grad():
        np.testing.assert_allclose(prepared(x).numpy(), model(x).numpy(), rtol=0, atol=1e-5)


def test_no_batch_norm_is_left(plan: Callable[[str], Quantized]) -> None:
    assert not called(plan("plain").module, "batch_norm")


def test_a_convolution_and_its_clip_are_not_quantized_apart(plan: Callable[[str], Quantized]) -> None:
    module = plan("plain").module
    convolutions = called(module, "conv2d")
    assert len(convolutions) == 2
    for node in convolutions:
        (clip,) = node.users
        assert any(word in str(clip.target) for word in CLIPS), clip
        assert all("quantize_per_tensor" in str(after.target) for after in clip.users)


def test_the_answer_is_not_rounded(plan: Callable[[str], Quantized]) -> None:
    module = plan("plain").module
    (out,) = [n for n in module.graph.nodes if n.op == "output"]
    (answer,) = torch.utils._pytree.tree_leaves(out.args)
    assert "linear" in str(answer.target)


def test_rows_say_what_was_decided(plan: Callable[[str], Quantized]) -> None:
    seen = images().double().numpy()
    want = simulate(tiny(), seen, seen[:1], reach=127, symmetric=False)
    rows = plan("plain").layers
    assert [r["layer"] for r in rows] == ["conv1", "conv2", "fc"]
    assert [r["op"] for r in rows] == ["conv2d", "conv2d", "linear"]
    for row, t, by_hand in zip(rows, (want.tensors[0], want.tensors[1], want.tensors[3]), want.layers):
        assert row["weights"] == "int8"
        assert row["shape"] == by_hand.q.shape
        assert row["range_method"] == "min-max"
        assert row["input_scale"] == pytest.approx(t.scale, rel=1e-5)
        assert row["input_zero_point"] == t.zero
    np.testing.assert_allclose(rows[0]["input_seen"], (seen.min(), seen.max()), atol=1e-5)
    weight = tiny().fc.weight.detach().double().numpy()
    noise = weight - want.layers[2].q * want.layers[2].scale[:, None]
    sqnr = 10 * np.log10((weight**2).sum() / (noise**2).sum())
    assert rows[2]["weight_sqnr_db"] == pytest.approx(sqnr, abs=0.02)


def test_reduced_range_rows_are_named_by_their_true_bits(plan: Callable[[str], Quantized]) -> None:
    assert {r["weights"] for r in plan("reduced").layers} == {"int7"}


# --- exceptions, refusals, edges -------------------------------------------------------------------------


def test_an_exception_keeps_its_layer_in_float_and_the_row_says_why() -> None:
    model = tiny()
    done = converted(model, precision=Precision("int8", "int8", (("conv2", "float32", "float32"),)))
    row = next(r for r in done.layers if r["layer"] == "conv2")
    assert row["weights"] == "float32"
    assert "precision" in row["reason"]
    assert [r["weights"] for r in done.layers if r["layer"] != "conv2"] == ["int8", "int8"]
    assert [q.shape for q, *_ in stored(done.module)] == [(6, 3, 3, 3), (5, 8)]
    (kept,) = [n for n in called(done.module, "conv2d") if "dequantize" not in str(n.args[1].target)]
    np.testing.assert_array_equal(value(done.module, kept.args[1]), model.conv2.weight.detach().numpy())


def test_an_exception_for_a_layer_that_is_not_there_is_refused() -> None:
    """A typo must not quietly quantize the layer it meant to keep (the design: never alter a request silently)."""
    with pytest.raises((BadModel, ValueError), match="no_such"):
        converted(tiny(), precision=Precision("int8", "int8", (("no_such", "float32", "float32"),)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_refused_naming_the_images(bad: float) -> None:
    x = images(16)
    x[11, 0, 0, 0] = bad
    with pytest.raises(BadData, match="8 to 15"):
        quantize(tiny(), SHAPE, x.split(8), INT8, PLAIN)


def test_no_calibration_images_are_refused() -> None:
    with pytest.raises(BadData, match="no calibration images"):
        quantize(tiny(), SHAPE, [], INT8, PLAIN)


def test_one_image_is_enough_to_go_on() -> None:
    told: list[int] = []
    x = images(1)
    done = quantize(tiny(), SHAPE, [x], INT8, PLAIN, step=told.append)
    assert told == [1]
    with torch.no_grad():
        got, want = done.module(x).numpy(), tiny()(x).numpy()
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_an_activation_that_overflows_is_the_models_fault() -> None:
    model = tiny()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(BadModel, match="NaN or infinity"):
        converted(model)


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(x).mean((2, 3))

    with pytest.raises(BadModel, match="no layer"):
        converted(Empty())


def test_a_model_whose_layers_all_stay_float_is_refused() -> None:
    kept = tuple((name, "float32", "float32") for name in ("conv1", "conv2", "fc"))
    with pytest.raises(BadModel):
        converted(tiny(), precision=Precision("int8", "int8", kept))


def test_the_original_is_not_changed() -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converted(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_the_default_ranges_are_no_worse_than_min_max(plan: Callable[[str], Quantized]) -> None:
    x = images(64, seed=21)
    with torch.no_grad():
        want = tiny()(x)
        best, plain = converted(tiny()).module(x), plan("plain").module(x)
    assert ((best - want) ** 2).mean() <= 1.1 * ((plain - want) ** 2).mean()


def test_transposed_convolution_has_scales_along_its_output_channels() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.ConvTranspose2d(3, 5, 2, 2)
            self.fc = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.up(x).relu().mean((2, 3)))

    model = Up().eval()
    done = converted(model, methods=("min-max",))
    (q, scale, _, axis), _ = stored(done.module)
    assert axis == 1
    np.testing.assert_allclose(scale, np.abs(model.up.weight.detach().numpy()).max((0, 2, 3)) / 127, rtol=1e-5)
    assert q.shape == (3, 5, 2, 2)


@pytest.mark.parametrize("filters", [0.0, 1e-12])
def test_the_bias_of_a_dead_filter_survives_in_the_fused_file(filters: float, tmp_path: Path) -> None:
    """Pruned filters, and those of a batch norm whose gamma went to 0: at their own scale the bias would not fit 32 bits,
    and onnxruntime fuses it at input scale x weight scale, whatever scale stands beside it."""
    from lighten.formats import onnx as format

    model = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1:3] = filters
        model[0].bias.copy_(torch.tensor([0.1, 3.0, -2.0, 0.2]))
    done = converted(model)
    format.export(done.module, SHAPE, tmp_path / "m.onnx", INT8, PLAIN)
    x = images(4, seed=5)
    with torch.no_grad():
        want = model(x).numpy()
    got = format.load(tmp_path / "m.onnx", 1)(x.numpy())
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_one_scale_a_layer_and_powers_of_two_where_the_device_wants_them(power_of_two: bool, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    from lighten.formats import onnx as format

    device = replace(PLAIN, per_channel_weights=False, power_of_two_scales=power_of_two)
    done = converted(tiny(), device)
    format.export(done.module, SHAPE, tmp_path / "m.onnx", INT8, device)
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    weights = [
        n
        for n in graph.node
        if n.op_type == "DequantizeLinear" and stored.get(n.input[0], np.zeros(1)).dtype == np.int8
    ]
    assert len(weights) == 3
    assert all(stored[n.input[1]].size == 1 for n in weights)
    scales = [stored[n.input[1]] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    exact = [bool((np.frexp(s)[0] == 0.5).all()) for s in scales]
    assert all(exact) == power_of_two
    x = images(4, seed=2)
    with torch.no_grad():
        want, float_answer = done.module(x).numpy(), tiny()(x).numpy()
    got = format.load(tmp_path / "m.onnx", 1)(x.numpy())
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
    np.testing.assert_allclose(got, float_answer, atol=0.2 * np.abs(float_answer).max())


class Turned(nn.Module):
    """A position table computed in forward from nothing but a buffer, as rotary embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, 3), nn.Linear(8, 5)
        self.register_buffer("frequency", torch.tensor([1.0, 0.5, 0.25, 0.125]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        angle = torch.arange(9, dtype=torch.float32)[:, None] * self.frequency
        sin, cos = (torch.cat([t, t], -1) for t in (angle.sin(), angle.cos()))
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return self.fc((x * cos + half * sin).mean(1))


def test_what_no_input_reaches_is_left_in_float_and_the_file_loads(tmp_path: Path) -> None:
    """Exporters fold such tables into constants; one that was half quantized is refused by ONNX Runtime."""
    from lighten.formats import onnx as format

    torch.manual_seed(0)
    model = Turned().eval()
    done = converted(model)
    rounded = {n.args[0] for n in done.module.graph.nodes if "quantize_per_tensor" in str(n.target)}
    assert not any("sin" in n.name or "cos" in n.name for n in rounded)
    format.export(done.module, SHAPE, tmp_path / "m.onnx", INT8, PLAIN)
    x = images(4, seed=5)
    with torch.no_grad():
        want, before = done.module(x).numpy(), model(x).numpy()
    got = format.load(tmp_path / "m.onnx", 1)(x.numpy())
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
    np.testing.assert_allclose(got, before, atol=0.1 * np.abs(before).max())
