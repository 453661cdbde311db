"""Channel groups: what is cut is what was foretold, and the narrow network answers as the wide one with those channels off."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lighten.errors import BadConfig, BadModel
from lighten.kit import channels
from lighten.shapes import resized
from lighten.types import ChannelGroup, LayerShape
from nets import SHAPE, net

torch.set_num_threads(1)


class Concat(nn.Module):
    """Three branches concatenated, a residual around them, flattened with four pixels a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4 + k, 3, 1, 1, bias=False)) for k in range(3)
        )
        self.around = nn.Conv2d(3, 23, 1)
        self.fc = nn.Linear(92, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.cat([y, *(branch(y) for branch in self.branches)], 1) + self.around(x)
        return self.fc(nn.functional.adaptive_avg_pool2d(y, 2).flatten(1))


class Nested(nn.Module):
    """DenseNet: concatenations of concatenations, with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * k, 4, 3, 1, 1) for k in range(3))
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for layer in self.layers:
            y = torch.cat([y, layer(y).relu()], 1)
        return self.fc(y.mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolutions in a row, two of their sorts, a chunk gate, a depthwise with twice the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.four = nn.Sequential(nn.Conv2d(24, 16, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Conv2d(16, 24, 1, groups=2)
        self.gate = nn.Conv2d(24, 16, 1)
        self.wide = nn.Conv2d(8, 16, 3, 1, 1, groups=8)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.four(self.stem(x).relu())).relu()
        a, b = self.gate(y).chunk(2, 1)
        return self.fc(self.wide(a * b.sigmoid()).mean((2, 3)))


class Tokens(nn.Module):
    """torch's own attention, without norms, so that a channel that is off is a channel that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc = nn.Linear(16, 10)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        return self.fc((y + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def torchvision_net(name: str, **more: Any) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    model: nn.Module = getattr(models, name)(weights=None, **more)
    return model


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    more = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **more)


def torch_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small": (lambda: net("small"), 16),
    "mobile": (lambda: net("mobile"), 16),
    "concat": (Concat, 16),
    "nested": (Nested, 16),
    "grouped": (Grouped, 16),
    "tokens": (Tokens, 16),
    "mobilenet_v3_small": (lambda: torchvision_net("mobilenet_v3_small"), 32),
    "shufflenet": (lambda: torchvision_net("shufflenet_v2_x0_5"), 32),
    "regnet": (lambda: torchvision_net("regnet_y_400mf"), 32),
    "resnet18": (lambda: torchvision_net("resnet18"), 32),
    "vit": (vit, 32),
    "torch_vit": (torch_vit, 32),
}


def built(name: str) -> tuple[nn.Module, channels.Shape, tuple[str, ...]]:
    """A network with lived-in batch norms, its input, and its last layer."""
    torch.manual_seed(0)
    make, size = NETS[name]
    model = make().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
            m.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    last = [k for k, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    return model, (3, size, size), (last,)


def by_place(group: Any) -> Tensor:
    """Importance that knows nothing of weights: the same for two networks of the same shape."""
    return torch.rand(len(group[0].idxs), generator=torch.Generator().manual_seed(len(group[0].idxs)))


def some_widths(groups: tuple[ChannelGroup, ...], seed: int = 0) -> dict[str, int]:
    dice = random.Random(seed)
    return {g.name: g.multiple * dice.randint(1, g.channels // g.multiple - 1) for g in groups}


# --- what is foretold is what is cut -----------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_pruned_layers_measure_what_was_foretold(name: str) -> None:
    model, shape, last = built(name)
    before = channels.shapes(model, shape)
    groups = channels.groups(model, shape, last)
    assert groups
    widths = some_widths(groups)
    foretold = resized(before, groups, widths)
    channels.prune(model, shape, widths, by_place, last)
    assert channels.shapes(model, shape) == foretold
    weights = sum(s.weights for s in foretold.values())
    assert weights < sum(s.weights for s in before.values())
    mine = [m.weight.numel() for m in model.modules() if isinstance(m, channels.LAYERS)]
    if not any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        assert sum(mine) == weights  # channels are gone from the weights
    assert model(torch.randn(2, *shape)).shape[1] == before[last[0]].outputs
    left = {g.name: g.channels for g in channels.groups(model, shape, last)}
    assert all(left.get(name, width) == width for name, width in widths.items())


def kept_inputs(name: str, widths: dict[str, int]) -> dict[str, list[int]]:
    """Which inputs of each layer stay: a copy whose weights are the numbers of their inputs is pruned alike."""
    model, shape, last = built(name)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, channels.LAYERS):
                row = torch.arange(m.weight.shape[1]).float()
                m.weight.copy_(row.view(1, -1, *[1] * (m.weight.ndim - 2)).expand_as(m.weight))
    channels.prune(model, shape, widths, by_place, last)
    rows = {k: m.weight[0].flatten(1)[:, 0] if m.weight.ndim > 2 else m.weight[0] for k, m in layers(model)}
    return {k: [int(v) for v in row] for k, row in rows.items()}


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(k, m) for k, m in model.named_modules() if isinstance(m, channels.LAYERS)]


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("tokens", "torch_vit")])
def test_a_pruned_network_answers_as_the_whole_one_with_those_channels_off(name: str) -> None:
    """Off: no layer reads them. Norms over channels (ViT's residual stream) would see them, so these are left whole."""
    model, shape, last = built(name)
    groups = channels.groups(model, shape, last)
    widths = some_widths(groups, seed=1)
    if name == "vit":
        widths.pop("patch_embed.proj")
    masked = copy.deepcopy(model)
    kept = kept_inputs(name, widths)
    with torch.no_grad():
        for k, m in layers(masked):
            off = sorted(set(range(m.weight.shape[1])) - set(kept[k]))
            m.weight[:, off] = 0
    channels.prune(model, shape, widths, by_place, last)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        wanted, got = masked(x), model(x)
    assert (wanted - masked(x.flip(0)).flip(0)).abs().max() < 1e-4
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_torch_attention_keeps_the_products_of_queries_and_keys() -> None:
    """Equal dimensions leave every head, and the root of the head's width, which torch divides by, is made up for."""
    model, shape, last = built("tokens")
    (group,) = channels.groups(model, shape, last)
    assert group.multiple == 4
    masked, kept = copy.deepcopy(model), kept_inputs("tokens", {"patch": 8})["fc"]
    assert sorted(k % 4 for k in kept) == sorted(list({k % 4 for k in kept}) * 4)
    off = sorted(set(range(16)) - set(kept))
    with torch.no_grad():
        a: Any = masked.attention
        rows = [k + 16 * part for part in range(3) for k in off]
        a.in_proj_weight[rows] = 0
        a.in_proj_bias[rows] = 0
        a.in_proj_weight[:, off] = 0
        a.out_proj.weight[:, off] = 0
        masked.fc.weight[:, off] = 0  # type: ignore[index]
    channels.prune(model, shape, {"patch": 8}, by_place, last)
    assert (model.attention.embed_dim, model.attention.num_heads, model.attention.head_dim) == (8, 4, 2)
    x = torch.randn(4, *shape)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-4, atol=1e-5)


def test_whole_heads_leave_a_timm_attention() -> None:
    model, shape, last = built("vit")
    groups = {g.name: g for g in channels.groups(model, shape, last)}
    assert groups["blocks.0.attn.qkv"].multiple == 8
    assert groups["blocks.0.attn.qkv"].outputs == (("blocks.0.attn.qkv", 3),)
    channels.prune(model, shape, {"blocks.0.attn.qkv": 16}, by_place, last)
    attention: Any = model.blocks[0].attn  # type: ignore[index]
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 8, 16)
    assert attention.qkv.out_features == 48


# --- groups, by hand ---------------------------------------------------------------------------------


def test_groups_of_a_network_worked_out_by_hand() -> None:
    model, shape, last = built("small")
    assert channels.groups(model, shape, last) == (
        ChannelGroup(
            "stem.0", 16, (("stem.0", 1), ("inner.0", 1), ("depthwise.0", 1)), (("inner.0", 1), ("left.0", 1))
        ),
        ChannelGroup("left.0", 64, (("left.0", 1),), (("right.0", 1), ("skip", 1))),
        ChannelGroup("right.0", 80, (("right.0", 1),), (("fc", 1),)),
        ChannelGroup("skip", 16, (("skip", 1),), (("fc", 1),)),
    )


def test_a_residual_around_a_concatenation_has_a_group_for_each_branch() -> None:
    model, shape, last = built("concat")
    found = {g.name: g for g in channels.groups(model, shape, last)}
    assert {name: g.channels for name, g in found.items()} == {
        "stem": 8, "branches.0.2": 4, "branches.1.2": 5, "branches.2.2": 6,
    }  # fmt: skip
    assert found["branches.1.2"].outputs == (("branches.1.2", 1), ("around", 1))
    assert found["branches.1.2"].inputs == (("fc", 4),)


def test_grouped_convolutions_and_chunks_tie_their_channels() -> None:
    """24 into 4 groups; 16 out of 4 and into 2 groups; halves of a gate; a depthwise that doubles."""
    model, shape, last = built("grouped")
    found = {g.name: g for g in channels.groups(model, shape, last)}
    assert {name: (g.channels, g.multiple) for name, g in found.items()} == {
        "stem": (24, 4), "four.0": (16, 4), "two": (24, 2), "wide": (16, 8),
    }  # fmt: skip


@pytest.mark.parametrize(("keep", "gone"), [("left.0", "left.0"), ("left", "left.0"), ("inner.0", "stem.0")])
def test_groups_of_protected_layers_are_left_out(keep: str, gone: str) -> None:
    model, shape, last = built("small")
    names = {g.name for g in channels.groups(model, shape, (*last, keep))}
    assert {g.name for g in channels.groups(model, shape, last)} - names == {gone}


def test_the_answer_and_the_input_are_never_narrowed() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Conv2d(3, 3, 3, 1, 1)
            self.body = nn.Conv2d(3, 8, 3)
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x + self.near(x)).mean((2, 3))).softmax(1)

    assert [g.name for g in channels.groups(Around().eval(), SHAPE)] == ["body"]


def test_channels_that_are_shuffled_are_left_alone() -> None:
    """Between the blocks of a ShuffleNet channels change places; inside a block's branch they do not."""
    model, shape, last = built("shufflenet")
    names = [g.name for g in channels.groups(model, shape, last)]
    assert "stage2.1.branch2.0" in names
    assert "stage2.1.branch2.5" not in names


def test_a_fixed_split_is_found_by_trying() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Conv2d(3, 16, 3)
            self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.split(self.both(x), [8, 8], 1)
            return self.fc((self.one(a) + self.two(b)).mean((2, 3)))

    assert [g.name for g in channels.groups(Split().eval(), SHAPE, ("fc",))] == ["one"]


# --- shapes and arithmetic ----------------------------------------------------------------------------


def test_shapes_are_those_of_torch_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, (3, 5), 2, (1, 0), dilation=(1, 2), bias=False)
            self.bn, self.act = nn.BatchNorm2d(6), nn.ReLU()
            self.up = nn.ConvTranspose2d(6, 4, 3, 2, 1)
            self.same = nn.Conv2d(4, 4, 3, padding="same", groups=4)
            self.fc = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            y = self.same(self.up(self.act(self.bn(self.conv(x)))))
            return self.fc(y.flatten(2).transpose(1, 2)).mean(1)

    got = channels.shapes(Odd(), SHAPE)
    assert got["conv"] == LayerShape(
        "conv", "conv", 3, 6, (3, 5), (2, 2), (1, 0), (1, 2), 1, (16, 16), bias=False, clip=True
    )
    assert got["conv"].target == got["up"].source == (8, 4)
    assert got["up"].target == got["same"].source == (15, 7)
    assert got["same"].padding == (1, 1)
    assert got["same"].target == (15, 7)
    assert got["fc"] == LayerShape("fc", "linear", 4, 10, source=(105,))


def test_resized_by_hand() -> None:
    """A concat layer follows two groups, a flattened channel is 16 inputs, a depthwise keeps a group a channel."""
    shapes = {
        "dw": LayerShape("dw", "conv", 8, 8, (3, 3), groups=8),
        "grouped": LayerShape("grouped", "conv", 8, 12, (1, 1), groups=4),
        "fc": LayerShape("fc", "linear", 20 * 16, 10),
    }
    groups = [
        ChannelGroup("a", 8, (("a", 1), ("dw", 1)), (("grouped", 1), ("fc", 16)), 4),
        ChannelGroup("b", 12, (("grouped", 1),), (("fc", 16),), 4),
    ]
    got = resized(shapes, groups, {"a": 4, "b": 8})
    assert (got["dw"].inputs, got["dw"].outputs, got["dw"].groups) == (4, 4, 4)
    assert (got["grouped"].inputs, got["grouped"].outputs, got["grouped"].groups) == (4, 8, 4)
    assert got["fc"].inputs == 320 - 16 * 4 - 16 * 4
    assert resized(shapes, groups, {}) == shapes


# --- choosing, and bad input --------------------------------------------------------------------------


def test_the_lowest_scores_go() -> None:
    model, shape, last = built("small")
    before = model.right[0].weight.clone()  # type: ignore[index]
    score = torch.arange(80).float()
    score[[3, 50, 79]] = -1
    channels.prune(model, shape, {"right.0": 77}, lambda group: score, last)
    stay = [k for k in range(80) if k not in (3, 50, 79)]
    assert torch.equal(model.right[0].weight, before[stay])  # type: ignore[index]
    assert torch.equal(model.right[1].running_mean, built("small")[0].right[1].running_mean[stay])  # type: ignore[index]


def test_scores_are_means_over_what_goes_together() -> None:
    model, shape, last = built("grouped")
    got = channels.scores(model, shape, lambda group: torch.arange(len(group[0].idxs)).float(), last)
    assert got["stem"] == tuple(sum(k + 6 * g for g in range(4)) / 4 for k in range(6))


def test_pruning_leaves_modes_and_frozen_weights_as_they_were() -> None:
    model, shape, last = built("small")
    model.train().requires_grad_(False)
    model.fc.requires_grad_(True)  # type: ignore[operator]
    channels.prune(model, shape, {"left.0": 40}, by_place, last)
    assert all(m.training for m in model.modules())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("widths", "says"), [({"left": 8}, "left.0"), ({"left.0": 0}, "left.0"), ({"left.0": 65}, "64")]
)
def test_bad_widths_are_refused(widths: dict[str, int], says: str) -> None:
    model, shape, last = built("small")
    with pytest.raises(BadConfig, match=says):
        channels.prune(model, shape, widths, by_place, last)


def test_a_width_between_the_groups_of_a_convolution_is_refused() -> None:
    model, shape, last = built("grouped")
    with pytest.raises(BadConfig, match="multiple of 4"):
        channels.prune(model, shape, {"stem": 10}, by_place, last)


def test_a_graph_that_cannot_be_traced_says_so() -> None:
    class Away(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.conv(x).detach().numpy()).mean((2, 3))

    with pytest.raises(BadModel, match="cannot be traced"):
        channels.groups(Away().eval(), SHAPE)
    with pytest.raises(BadModel, match="does not run"):
        channels.groups(nn.Linear(5, 5), SHAPE)


def test_regularising_pushes_small_channels_harder() -> None:
    """Equation 4 of DepGraph, by hand: the smallest channel decays 16 times as fast as the largest."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
        model[2].weight.zero_()
    push = channels.regularizer(model, (3, 1, 1), ("2",), strength=0.01)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    push()
    gamma = [0.01 * 16 ** ((4 - k) / 3) for k in (1, 2, 3, 4)]
    wanted = torch.tensor([g * k for g, k in zip(gamma, (1, 2, 3, 4))])
    torch.testing.assert_close(model[0].weight.grad[:, 0, 0, 0], wanted)  # type: ignore[index]
    assert len(list(itertools.chain(model.parameters()))) == 2
