"""Our own detector: raw outputs where its head says, narrow ones too, the same numbers after tracing and in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.errors import BadModel
from lighten.kit import channels
from lighten.kit.trace import trace
from lighten.models import changes
from lighten.models.nano_detector import NanoDetector, nano_detector

torch.set_num_threads(1)

SHAPE = (3, 64, 96)


def small(seed: int = 0) -> NanoDetector:
    """A narrow one with lived-in batch norms and last layers that say something."""
    torch.manual_seed(seed)
    model = NanoDetector(5, widths=(8, 16, 16, 24, 32), depths=(1, 1, 1, 1), neck=16, towers=1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.1, 0.3)
    with torch.no_grad():
        for head in model.heads:
            head.box.weight.normal_(0, 0.3)
            head.score.weight.normal_(0, 0.3)
        model.train()
        for _ in range(3):
            model(images(8))
    return model.eval()


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 96), (3, 192, 192)])
def test_raw_outputs_are_as_many_as_the_head_says(shape: tuple[int, int, int]) -> None:
    model = NanoDetector(5, widths=(8, 16, 16, 24, 32), depths=(1, 0, 0, 0), neck=16, towers=1).eval()
    head = model.head(shape)
    with torch.inference_mode():
        assert model(torch.zeros(2, *shape)).shape == (2, head.places, head.values)
    assert head.values == 4 * 8 + 5
    assert head.places == sum(shape[1] // s * (shape[2] // s) for s in (8, 16, 32))
    assert [level.step for level in head.levels] == [(8, 8), (16, 16), (32, 32)]


def test_places_run_level_by_level_row_by_row_column_by_column() -> None:
    model, seen = small(), []
    for head in model.heads:
        head.register_forward_hook(lambda _m, _i, out: seen.append(out))
    raw = model(images(2))
    start = 0
    for level, y in zip(model.head(SHAPE).levels, seen):
        for row in range(level.rows):
            for column in range(level.columns):
                assert torch.equal(raw[:, start + row * level.columns + column], y[:, :, row, column])
        start += level.places


def test_before_training_nothing_is_seen_and_boxes_are_about_four_steps_wide() -> None:
    torch.manual_seed(0)
    raw = nano_detector(10).eval()(torch.randn(1, 3, 64, 64)).detach()
    boxes = raw[..., :32].unflatten(-1, (4, 8)).softmax(-1) @ torch.arange(8.0)
    assert 3 < float(2 * boxes.mean()) < 5
    assert float(raw[..., 32:].sigmoid().mean()) == pytest.approx(0.01, rel=0.3)


def test_it_is_made_of_what_integer_kernels_do_well() -> None:
    model = nano_detector()
    kinds = {type(m) for m in model.modules() if not list(m.children())}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU}
    assert all(m.groups == 1 for m in model.modules() if isinstance(m, nn.Conv2d))
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2.5e6


def test_every_layer_runs_once_so_that_each_has_a_scale_of_its_own() -> None:
    model, calls = small(), Counter[str]()
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda _m, _i, _o, name=name: calls.update([name]))
    model(images(2))
    assert set(calls.values()) == {1}
    assert len(calls) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_the_last_layers_give_the_answer() -> None:
    model = small()
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name in model.head_layers():
            layers[name].weight.zero_()
            layers[name].bias.fill_(7.0)
        assert (model(images(2)) == 7).all()


def test_a_size_that_is_no_multiple_of_32_is_refused_with_the_nearest() -> None:
    with pytest.raises(BadModel, match=r"100x64[\s\S]*96x64"):
        small().head((3, 64, 100))


# --- narrowed -------------------------------------------------------------------------------------


def test_narrowed_to_half_it_answers_with_the_same_shape() -> None:
    model = small()
    before, raw = sum(p.numel() for p in model.parameters()), model(images(2)).shape
    groups = channels.groups(model, SHAPE, model.head_layers())
    inner = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)} - set(model.head_layers())
    assert {name for g in groups for name, _ in g.outputs} == inner
    channels.prune(model, SHAPE, {g.name: g.channels // 2 for g in groups}, by_weight, model.head_layers())
    assert model(images(2)).shape == raw
    assert sum(p.numel() for p in model.parameters()) < 0.35 * before
    assert model.head(SHAPE).values == raw[2]


def by_weight(group: object) -> Tensor:
    first = group[0]  # type: ignore[index]
    return first.dep.target.module.weight.flatten(1).norm(dim=1)[torch.tensor(first.idxs)]


def test_a_narrowed_one_comes_back_from_its_description() -> None:
    narrow, fresh = small(), small()
    groups = channels.groups(narrow, SHAPE, narrow.head_layers())
    channels.prune(narrow, SHAPE, {g.name: g.channels // 2 for g in groups}, by_weight, narrow.head_layers())
    changes.apply(fresh, changes.difference(small(), narrow))
    assert {k: getattr(m, "out_channels", 0) for k, m in fresh.named_modules()} == {
        k: getattr(m, "out_channels", 0) for k, m in narrow.named_modules()
    }


# --- exported -------------------------------------------------------------------------------------


def test_traced_once_it_takes_any_batch() -> None:
    model = small()
    program = trace(model, SHAPE).module()
    for n in (1, 3):
        torch.testing.assert_close(program(images(n)), model(images(n)), rtol=1e-5, atol=1e-5)


def test_onnx_runtime_gives_the_same_raw_outputs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from lighten.kit.onnx_graph import to_onnx

    model = small()
    file = tmp_path / "model.onnx"
    file.write_bytes(to_onnx(model, SHAPE).SerializeToString())
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for n in (1, 3):
        (raw,) = session.run(None, {session.get_inputs()[0].name: images(n).numpy()})
        np.testing.assert_allclose(raw, model(images(n)).detach().numpy(), rtol=1e-4, atol=1e-4)
