"""What a network is made of, and which formats have a word for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lighten.kit.operators import lacks_onnx, operators
from nets import SHAPE, net


def test_operators_are_counted_by_hand() -> None:
    found = operators(net("small"), SHAPE)
    assert found["aten.conv2d.default"] == 6
    assert found["aten.linear.default"] == 1
    assert found["aten.cat.default"] == 1


def test_real_networks_have_onnx_words() -> None:
    for name in ("small", "mobile"):
        assert lacks_onnx(operators(net(name), SHAPE)) is None


def test_an_operator_of_ones_own_is_named() -> None:
    @torch.library.custom_op("lightentest::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.lightentest.twice(x).flatten(1)

    reason = lacks_onnx(operators(Odd(), SHAPE))
    assert reason is not None
    assert "lightentest.twice" in reason
