"""Importance against sums written out in numpy, and against gradients worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from lighten.errors import BadConfig, BadData
from lighten.kit.importance import KINDS, LEARNED, scorer
from nets import SHAPE, images, net

torch.set_num_threads(1)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def group_of(model: nn.Module, module: Any, x: Tensor | None = None) -> Any:
    x = torch.randn(2, *SHAPE) if x is None else x
    graph = tp.DependencyGraph().build_dependency(model, x, forward_fn=lambda m, x: m(x), verbose=False)
    outputs = list(range(module.weight.shape[0]))
    return graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, outputs)


def small() -> tuple[Any, Any]:
    """The group of `left`: 64 filters, their batch norm, and the inputs of two convolutions."""
    model: Any = net("small")
    return model, group_of(model, model.left[0])


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_adds_up_all_layers_of_a_group(kind: str, power: int) -> None:
    model, group = small()
    w = {k: v.double().numpy() for k, v in model.state_dict().items()}
    wanted = (abs(w["left.0.weight"]) ** power).sum((1, 2, 3)) + abs(w["left.1.weight"]) ** power
    wanted += (abs(w["right.0.weight"]) ** power).sum((0, 2, 3)) + (abs(w["skip.weight"]) ** power).sum((0, 2, 3))
    np.testing.assert_allclose(scorer(kind, model)(group), wanted, rtol=1e-5)


def test_batch_norm_scale_is_its_size_and_weights_stand_in_where_there_is_none() -> None:
    model, group = small()
    np.testing.assert_allclose(scorer("bn-scale", model)(group), model.left[1].weight.detach().abs(), rtol=1e-6)
    skip = group_of(model, model.skip)
    np.testing.assert_allclose(scorer("bn-scale", model)(skip), scorer("l1", model)(skip))


def test_random_is_seeded_and_never_the_same_twice() -> None:
    model, group = small()
    first, again, other = (scorer("random", model, seed=s) for s in (1, 1, 2))
    one = first(group)
    assert torch.equal(one, again(group))
    assert not torch.equal(one, other(group))
    assert not torch.equal(one, first(group))


class Line(nn.Module):
    """y = b . (a * x) for one input number; loss (y - t)^2 / 2 has slopes that fit on one line."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0], [2.0], [-0.5]]))
            self.last.weight.copy_(torch.tensor([[0.5, 1.0, 4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (0.5 * (model(x)[:, 0] - y) ** 2).mean()


def test_first_and_second_order_by_hand() -> None:
    """a = (1, 2, -1/2), b = (1/2, 1, 4): y = x/2. w dL/dw of a_c and of b_c are both (y - t) a_c b_c x."""
    model = Line().eval()
    x, t = torch.tensor([[2.0], [1.0], [3.0], [1.0]]), torch.tensor([0.0, 1.0, 2.0, 0.0])
    ab = np.array([0.5, 2.0, -2.0])
    slopes = np.array([(0.5 * v - u) * v for v, u in zip((2, 1, 3, 1), (0, 1, 2, 0))])[:, None] * ab  # (images, 3)
    batches = [(x[:2], t[:2]), (x[2:], t[2:])]
    group = group_of(model, model.first, torch.randn(2, 1))
    of_batches = np.stack([slopes[:2].mean(0), slopes[2:].mean(0)])
    taylor = scorer("taylor", model, batches, squared)(group)
    np.testing.assert_allclose(taylor, 2 * abs(of_batches).mean(0), rtol=1e-5)
    hessian = scorer("hessian", model, batches, squared)(group)
    np.testing.assert_allclose(hessian, 2 * 0.5 * (slopes**2).mean(0), rtol=1e-5)


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_scores_follow_channels_through_residuals_depthwise_and_concat(kind: str) -> None:
    """Written out in numpy from torch's own gradients; the linear layer reads `skip` at 80 and beyond."""
    model: Any = net("small")
    x, y = images(6)
    parts = [(x[k : k + 1], y[k : k + 1]) for k in range(6)] if kind == "hessian" else [(x[:3], y[:3]), (x[3:], y[3:])]
    names = dict(model.named_parameters())
    worth = {k: np.zeros(v.shape) for k, v in names.items()}
    for a, b in parts:
        slopes = torch.autograd.grad(loss(model, a, b), list(names.values()))
        for (k, w), slope in zip(names.items(), slopes):
            product = w.detach().double().numpy() * slope.double().numpy()
            worth[k] += (abs(product) if kind == "taylor" else product**2 / 2) / len(parts)
    score = scorer(kind, model, [(x[:3], y[:3]), (x[3:], y[3:])], loss)
    skip = worth["skip.weight"].sum((1, 2, 3)) + worth["skip.bias"] + worth["fc.weight"].sum(0)[80:]
    np.testing.assert_allclose(score(group_of(model, model.skip)), skip, rtol=1e-3, atol=1e-12)
    stem = sum(worth[f"{k}.0.weight"].sum((1, 2, 3)) for k in ("stem", "inner", "depthwise"))
    stem = stem + sum(worth[f"{k}.1.{v}"] for k in ("stem", "inner", "depthwise") for v in ("weight", "bias"))
    stem = stem + sum(worth[f"{k}.0.weight"].sum((0, 2, 3)) for k in ("inner", "left"))
    np.testing.assert_allclose(score(group_of(model, model.stem[0])), stem, rtol=1e-3, atol=1e-12)


def test_a_grouped_convolution_reads_its_inputs_in_its_own_group_only() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 6, 3, groups=2, bias=False)).eval()
    x = torch.randn(4, 3, 5, 5)
    slopes = torch.autograd.grad(squared_mean(model, x, x), list(model.parameters()))
    first, second = ((w.detach() * s).abs().double().numpy() for w, s in zip(model.parameters(), slopes))
    reads = np.concatenate([second[:3].sum((0, 2, 3)), second[3:].sum((0, 2, 3))])
    got = scorer("taylor", model, [(x, x)], squared_mean)(group_of(model, model[0], x))
    np.testing.assert_allclose(got, first.sum((1, 2, 3)) + reads, rtol=1e-4)


def squared_mean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) ** 2).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_model_changes(kind: str) -> None:
    model, group = small()
    model.train()
    model.fc.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    score = scorer(kind, model, [images(4)], loss)(group)
    assert score.shape == (64,)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not model.fc.weight.requires_grad


def test_bad_input_is_named() -> None:
    model = net("small")
    with pytest.raises(BadConfig, match="taylor"):
        scorer("tailor", model)
    with pytest.raises(BadConfig, match="loss"):
        scorer("taylor", model, [images(4)])
    with pytest.raises(BadData, match="hessian"):
        scorer("hessian", model, [], loss)
