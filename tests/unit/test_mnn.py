"""MNN: the file's integers are the plan's, its bytes are the same each time, and damage is found before MNN reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lighten.errors import BadBundle, RefusedFormat
from lighten.formats import mnn as format
from lighten.kit.mnn_net import Net
from lighten.types import Device, Precision

DEVICE = Device("here", "Here", "这里", ("mnn",))
MIXED = Precision("int4", "float32", (("stem.0", "int8", "float32"), ("fc", "float32", "float32")))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.fx.GraphModule, Path]:
    """The "small" net with 4-bit weights, but two layers at other widths; and its file."""
    pytest.importorskip("MNN")
    pytest.importorskip("onnxscript")
    from lighten.quant.weight_only import quantize_weights
    from nets import SHAPE, net

    module = quantize_weights(net("small"), SHAPE, MIXED, DEVICE).module
    path = tmp_path_factory.mktemp("mnn") / "model.mnn"
    format.export(module, SHAPE, path, MIXED, DEVICE)
    return module, path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("MNN")
    pytest.importorskip("onnxscript")
    from nets import SHAPE, net

    path = tmp_path_factory.mktemp("mnn16") / "model.mnn"
    format.export(net("small"), SHAPE, path, Precision("float16", "float16"), DEVICE)
    return path


def test_the_files_integers_and_scales_are_the_plans(mixed: tuple[torch.fx.GraphModule, Path]) -> None:
    module, path = mixed
    net = Net(path.read_bytes())
    packed = [t for t in net.tensors if t.alpha is not None]
    plan = {one.q.tobytes(): one for one in module.meta["packed"].values()}
    assert len(packed) == len(plan) == 6
    for tensor in packed:
        one = plan[net.array(tensor).tobytes()]
        assert tensor.dtype == f"int{one.bits}"
        (scales,) = [t for t in net.tensors if t.op == tensor.op and t.name == "scales"]
        lowest, scale = net.array(scales).reshape(-1, 2).T
        np.testing.assert_array_equal(scale, one.scale)
        np.testing.assert_array_equal(lowest, one.scale * np.float32(-(2 ** (one.bits - 1))))


def test_layers_kept_in_float_are_in_float(mixed: tuple[torch.fx.GraphModule, Path]) -> None:
    rows = [row for row in format.weights(mixed[1]) if row.name.endswith(".weight")]
    assert [row.dtype for row in rows].count("int4") == 5
    assert {row.shape: row.dtype for row in rows}[16, 3, 3, 3] == "int8"
    assert {row.shape: row.dtype for row in rows}[10, 96, 1, 1] == "float32"
    assert format.fallbacks(mixed[1]) == ()


def test_float16_weights_are_rounded_to_nearest(half: Path) -> None:
    from lighten.quant.graph import fold
    from nets import SHAPE, net

    graph = fold(net("small"), SHAPE)
    want = [p.detach().numpy() for p in graph.state_dict().values() if p.ndim > 1]
    file = Net(half.read_bytes())
    got = [file.array(t) for t in file.tensors if t.dtype == "float16"]
    assert len(got) == len(want) == 7
    for w in want:
        near = [g for g in got if g.size == w.size and np.allclose(g.reshape(-1), w.reshape(-1), atol=2e-3)]
        step = np.spacing(np.abs(w).astype(np.float16)).astype(np.float32).reshape(-1)
        assert any((np.abs(g.reshape(-1) - w.reshape(-1)) <= 0.5001 * step + 1e-6).all() for g in near)


def test_truncated_anywhere_is_a_bad_bundle(half: Path, tmp_path: Path) -> None:
    raw, path = half.read_bytes(), tmp_path / "cut.mnn"
    for size in [*range(0, 200, 7), *np.linspace(200, len(raw) - 64, 40).astype(int)]:
        path.write_bytes(raw[:size])
        with pytest.raises(BadBundle, match=r"cut\.mnn"):
            format.load(path, 1)


def test_noise_in_the_structure_never_leaves_the_file(half: Path) -> None:
    raw, dice = half.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(raw)
        for at in dice.integers(0, 2000, 20):
            broken[at] = dice.integers(0, 256)
        try:
            rows = Net(bytes(broken)).tensors
        except BadBundle:
            continue
        assert all(t.start + t.bytes <= len(raw) for t in rows)


def test_the_id_depends_on_the_content_alone(half: Path, mixed: tuple[torch.fx.GraphModule, Path]) -> None:
    from lighten.kit.mnn_net import settled

    ids = []
    for path in (half, mixed[1]):
        raw = path.read_bytes()
        at = Net(raw).identity
        assert settled(raw[:at] + b"x" * 36 + raw[at + 36 :]) == raw
        ids.append(raw[at : at + 36])
    assert ids[0] != ids[1]


def test_what_the_converter_cannot_read_is_refused_not_a_crash(tmp_path: Path) -> None:
    pytest.importorskip("MNN")
    (tmp_path / "net.onnx").write_bytes(b"no graph")
    with pytest.raises(RefusedFormat, match="MNN"):
        format._converted(tmp_path)


def test_loading_says_nothing_on_the_process_own_stdout(half: Path, capfd: pytest.CaptureFixture[str]) -> None:
    format.load(half, 1)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "precision, word",
    [
        (Precision("int8", "int8"), "crashes"), (Precision("int4", "int8"), "crashes"), (Precision("int8", "dynamic"), "switch"),
        (Precision("int4", "float32", (("fc", "float16", "float16"),)), "float16"),
    ],
)  # fmt: skip
def test_refuses_with_the_reason(precision: Precision, word: str) -> None:
    reason = format.refuses(precision, DEVICE)
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize(
    "precision", [Precision(), Precision("float16", "float16"), Precision("int8", "float32"), MIXED]
)
def test_gives_floats_and_integer_weights(precision: Precision) -> None:
    assert format.refuses(precision, DEVICE) is None


def test_an_operator_that_mnn_cannot_read_is_named() -> None:
    assert format.lacks({"aten.conv2d.default": 3}, (3, 16, 16)) is None
    reason = format.lacks({"aten.conv2d.default": 3, "aten._fft_r2c.default": 1}, (3, 16, 16))
    assert reason is not None
    assert "aten._fft_r2c" in reason
