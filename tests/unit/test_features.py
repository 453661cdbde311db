"""Which layers compare is decided by their maps; attention transfer is what the paper's formula says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lighten.kit.features import Pair, attention, attention_loss, pairs, watched
from nets import SHAPE, images, net

torch.set_num_threads(1)


def numpy_attention(maps: np.ndarray) -> np.ndarray:
    """Q / ||Q||, Q = vec(sum over channels of |A|^2), in float64 and by loops."""
    rows = []
    for one in maps.astype(np.float64):
        q = sum(np.abs(channel) ** 2 for channel in one).ravel()
        rows.append(q / np.sqrt((q**2).sum()))
    return np.array(rows)


def test_the_loss_is_numpys_for_other_channel_counts() -> None:
    torch.manual_seed(0)
    shapes = [((4, 5, 6, 7), (4, 9, 6, 7)), ((4, 2, 3, 3), (4, 2, 3, 3))]
    maps = [(torch.randn(a), torch.randn(b)) for a, b in shapes]
    want = 0.0
    for ours, theirs in maps:
        apart = numpy_attention(ours.numpy()) - numpy_attention(theirs.numpy())
        want += 0.5 * np.mean([(row**2).sum() for row in apart])
    assert attention_loss(maps).item() == pytest.approx(want, rel=1e-5)


def test_the_gradient_reaches_the_student_alone_and_is_that_of_differences() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 4, 2, 2)
    student, teacher = ours.float().requires_grad_(), theirs.requires_grad_()
    attention_loss([(student, teacher)]).backward()
    assert teacher.grad is None
    q = numpy_attention(theirs.detach().numpy())

    def value(a: np.ndarray) -> float:
        return float(0.5 * np.mean([(row**2).sum() for row in numpy_attention(a) - q]))

    for at in [(0, 0, 0, 0), (1, 2, 1, 0), (0, 1, 0, 1)]:
        up, down = ours.numpy().copy(), ours.numpy().copy()
        up[at] += 1e-5
        down[at] -= 1e-5
        assert student.grad[at].item() == pytest.approx((value(up) - value(down)) / 2e-5, rel=1e-3, abs=1e-6)


def test_equal_maps_cost_nothing_and_dead_ones_stay_finite() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert attention_loss([(x, x.clone())]).item() == 0
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_loss([(dead, x)]).backward()
    assert torch.isfinite(dead.grad).all()
    assert torch.equal(attention(torch.zeros(1, 2, 3, 3)), torch.zeros(1, 9))


def test_the_ends_of_the_stages_are_found_by_name_in_a_copy() -> None:
    """By hand: 16 x 16 ends with the ReLU after the residual; 8 x 8 with the ReLU6 of `left`; 4 x 4 with `skip`."""
    found = pairs(net("small"), net("small", 1), torch.zeros(1, *SHAPE))
    assert found == (Pair("relu", "relu", (16, 16)), Pair("left", "left", (8, 8)), Pair("skip", "skip", (4, 4)))


def test_a_resnets_pairs_are_its_stages() -> None:
    models = pytest.importorskip("torchvision").models
    teacher, student = models.resnet18(num_classes=10).eval(), models.resnet34(num_classes=10)
    found = pairs(student, teacher, torch.zeros(1, 3, 64, 64))
    assert [(p.student, p.teacher) for p in found] == [
        ("relu", "relu"), ("layer1", "layer1"), ("layer2", "layer2"), ("layer3", "layer3"), ("layer4", "layer4"),
    ]  # fmt: skip
    assert student.training


def test_another_architecture_is_matched_by_the_size_of_its_maps() -> None:
    found = pairs(net("mobile"), net("small"), torch.zeros(1, *SHAPE))
    assert found == (Pair("head", "left", (8, 8)),)


def test_networks_without_common_maps_have_no_pairs() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    assert pairs(flat, net("small"), torch.zeros(1, *SHAPE)) == ()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        raise ValueError("it broke")


def test_hooks_are_gone_afterwards_even_on_an_error() -> None:
    model, broken, x = net("small"), Broken(), images(2)[0]
    with watched(model, ["stem", "left"]) as seen:
        model(x)
    assert {k: tuple(v.shape) for k, v in seen.items()} == {"stem": (2, 16, 16, 16), "left": (2, 64, 8, 8)}
    with pytest.raises(ValueError, match="it broke"), watched(broken, ["conv"]):
        broken(x)
    with pytest.raises(ValueError, match="it broke"):
        pairs(broken, model, x)
    with pytest.raises(AttributeError), watched(model, ["stem", "no such layer"]):
        pass
    assert hooks(model) == hooks(broken) == 0
    assert broken.training
