"""Re-estimated batch norms hold the plain averages of what they saw, in numpy's float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lighten.errors import BadData
from lighten.kit.norms import reestimate
from nets import calibration, net

torch.set_num_threads(1)


def test_statistics_are_the_averages_over_batches() -> None:
    """Mean of batch means; mean of batch variances, each with n - 1; batches of different sizes count alike."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)).eval()
    batches = [torch.randn(n, 3, 6, 5) * n for n in (2, 5, 3)]
    reestimate(model, batches)
    seen = [model[0](b).detach().double().numpy() for b in batches]
    np.testing.assert_allclose(model[1].running_mean, np.mean([y.mean((0, 2, 3)) for y in seen], 0), rtol=1e-5)
    np.testing.assert_allclose(model[1].running_var, np.mean([y.var((0, 2, 3), ddof=1) for y in seen], 0), rtol=1e-5)
    assert model[1].momentum == 0.3
    assert int(model[1].num_batches_tracked) == 3


def test_a_second_norm_sees_what_the_first_gives_on_that_batch() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    (batch,) = [torch.randn(8, 3, 4, 4) * 3 + 2]
    reestimate(model, [batch])
    x = batch.double().numpy()
    first = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(model[1].running_mean, first.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(model[1].running_var, first.var((0, 2, 3), ddof=1), rtol=1e-5)


def test_weights_stay_and_dropout_is_off() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.drop, self.after = net("small"), nn.Dropout(0.9), nn.BatchNorm1d(10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.drop(self.body(x)))

    model = Drops().train()
    weights = copy.deepcopy(dict(model.named_parameters()))
    reestimate(model, calibration())
    one = {k: v.clone() for k, v in model.state_dict().items()}
    reestimate(model, calibration())
    assert all(torch.equal(one[k], v) for k, v in model.state_dict().items())  # nothing was drawn
    assert all(torch.equal(weights[k], v) for k, v in model.named_parameters())
    assert not any(m.training for m in model.modules())


def test_a_network_without_batch_norms_is_left_alone() -> None:
    model = nn.Linear(3, 2).train()
    reestimate(model, [])
    assert not model.training


def test_bad_batches_are_refused_and_the_model_is_usable_after() -> None:
    model = nn.BatchNorm2d(3, momentum=0.1)
    with pytest.raises(BadData, match="without images"):
        reestimate(model, [])
    with pytest.raises(BadData, match="two images"):
        reestimate(model, [torch.randn(1, 3, 1, 1)])
    assert model.momentum == 0.1
    assert not model.training
