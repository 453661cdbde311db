"""The self-describing checkpoint: what is loaded is compared with the live changed network; strangers' files are refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets import Small, images

pytest.importorskip("safetensors")

import safetensors.torch
from safetensors import safe_open
from torch.nn.utils import parametrizations, prune

import lighten
from lighten.errors import BadModel, UnknownName, UntrustedCode
from lighten.frontdesk import ModelIn, load_model
from lighten.models import saved
from lighten.models.changes import difference
from lighten.models.load import build
from lighten.models.load import load as load_any
from lighten.types import Preprocess

ARCH = "lighten:resnet20"
HOW = Preprocess(32, 32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), source="given")


# --- networks that were changed -------------------------------------------------------------------------


def lived(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with statistics of their own, so that a lost buffer shows."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
        model.train()(torch.cat([x, x + 1]))
    return model.eval()


def pruned(model: nn.Module, x: Tensor, ratio: float = 0.4, **options: Any) -> nn.Module:
    """Channels taken out by Torch-Pruning itself, the classifier's outputs kept."""
    tp = pytest.importorskip("torch_pruning")
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    importance = tp.importance.MagnitudeImportance(p=1)
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    pruner = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=ratio, ignored_layers=last, in_channel_groups={}, out_channel_groups={},
        num_heads=heads, **options
    )  # fmt: skip
    pruner.step()
    for m in model.modules():
        if hasattr(m, "qkv"):
            m.num_heads = pruner.num_heads[m.qkv]
            m.attn_dim = m.qkv.out_features // 3
            m.head_dim = m.attn_dim // m.num_heads
    return model


def shuffled(x: Tensor) -> nn.Module:
    """ShuffleNet with the inner channels of every branch cut by hand to two thirds: full, depthwise, batch norm."""
    model = build("torchvision:shufflenet_v2_x0_5", classes=10)
    for block in model.modules():
        if type(block).__name__ == "InvertedResidual":
            first, norm, depth, norm2, _, last = (block.branch2[k] for k in (0, 1, 3, 4, 4, 5))
            keep = torch.arange(first.out_channels)[: first.out_channels * 2 // 3]
            for layer in (first, depth):
                layer.weight = nn.Parameter(layer.weight.data[keep])
                layer.out_channels = len(keep)
            depth.groups = depth.in_channels = last.in_channels = len(keep)
            last.weight = nn.Parameter(last.weight.data[:, keep])
            for bn in (norm, norm2):
                bn.weight, bn.bias = nn.Parameter(bn.weight.data[keep]), nn.Parameter(bn.bias.data[keep])
                bn.running_mean, bn.running_var = bn.running_mean[keep], bn.running_var[keep]
                bn.num_features = len(keep)
    return model


def made(arch: str, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    model = shuffled(x) if "shufflenet" in arch else pruned(build(arch, classes=10), x[:1])
    return lived(model, x), x


def stepped(model: nn.Module, x: Tensor) -> nn.Module:
    """One step of training, dropout and all."""
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
        optimizer.step()
    return model.eval()


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


NETWORKS = [
    ("lighten:resnet20", 32),
    ("torchvision:resnet18", 32),
    ("torchvision:mobilenet_v3_small", 64),
    ("torchvision:shufflenet_v2_x0_5", 64),
    ("timm:test_convnext", 64),
    ("timm:test_vit", 160),
]


@pytest.mark.parametrize("arch, size", NETWORKS)
def test_a_pruned_network_comes_back_and_trains_the_same(arch: str, size: int, tmp_path: Path) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    model, x = made(arch, size)
    whole = sum(p.numel() for p in build(arch, classes=10).parameters())
    assert sum(p.numel() for p in model.parameters()) < 0.9 * whole
    file = tmp_path / "network.safetensors"
    lighten.save(file, model, arch, classes=10, example=x)
    again = lighten.load(file)
    assert not any(m.training for m in again.modules())
    assert torch.equal(answers(again, x), answers(model, x))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert torch.equal(answers(stepped(again, x), x), answers(stepped(model, x), x))


def test_the_loaded_network_is_exported_and_saved_again(tmp_path: Path) -> None:
    model, x = made(ARCH, 32)
    lighten.save(tmp_path / "a.safetensors", model, ARCH, classes=10)
    again = lighten.load(tmp_path / "a.safetensors")
    program = torch.export.export(again, (x,)).module()
    assert torch.allclose(answers(program, x), answers(model, x), atol=1e-5)
    smaller = pruned(stepped(again, x), x[:1], 0.3).eval()
    lighten.save(tmp_path / "b.safetensors", smaller, ARCH, classes=10)
    assert torch.equal(answers(lighten.load(tmp_path / "b.safetensors"), x), answers(smaller, x))
    assert (tmp_path / "b.safetensors").stat().st_size < (tmp_path / "a.safetensors").stat().st_size


def test_another_process_loads_it_without_the_pruning_library(tmp_path: Path) -> None:
    model, x = made(ARCH, 32)
    lighten.save(tmp_path / "a.safetensors", model, ARCH, classes=10)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import torch, lighten\n"
        "torch.set_num_threads(1)\n"
        "print(lighten.load(sys.argv[1])(torch.load(sys.argv[2])).tolist())"
    )
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "x.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), answers(model, x), atol=1e-6)


def test_a_fine_tuned_network_has_no_changes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 32, 32)
    model = stepped(build(ARCH, classes=7), x)
    lighten.save(tmp_path / "n.safetensors", model, ARCH, classes=7, preprocess=HOW, class_names=list("abcdefg"))
    told = saved.describe(tmp_path / "n.safetensors")
    assert (told["arch"], told["classes"], told["class_names"], told["changes"]) == (ARCH, 7, list("abcdefg"), {})
    assert torch.equal(answers(lighten.load(tmp_path / "n.safetensors"), x), answers(model, x))


def test_any_safetensors_reader_finds_the_state_dict(tmp_path: Path) -> None:
    model, _ = made(ARCH, 32)
    lighten.save(tmp_path / "n.safetensors", model, ARCH, classes=10)
    read = safetensors.torch.load_file(tmp_path / "n.safetensors")
    want = model.state_dict()
    assert set(read) == set(want)
    assert all(torch.equal(read[k], want[k]) and read[k].dtype == want[k].dtype for k in want)


# --- structure that changed -----------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers of one weight, a module under two names, and a table outside of the state_dict."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.shape = (1, width)
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.norm = nn.LayerNorm(width)
        self.again = self.norm
        self.register_buffer("table", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.b(self.norm(self.a(x)).relu()) + self.table)


def both(model: nn.Module, original: nn.Module, folder: Path, example: Tensor | None = None) -> nn.Module:
    file = folder / "network.safetensors"
    lighten.save(file, model, None, classes=None, original=original, example=example)
    return lighten.load(file, model=original)


def small() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = Small().eval()
    return original, copy.deepcopy(original)


def test_low_rank_layers_come_back(tmp_path: Path) -> None:
    original, model = small()
    model.fc = nn.Sequential(nn.Linear(96, 4, bias=False), nn.Linear(4, 10))
    model.right[0] = nn.Sequential(nn.Conv2d(64, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 80, 1))
    x = images(4)[0]
    again = both(model, original, tmp_path, x)
    assert torch.equal(answers(again, x), answers(model, x))
    assert torch.equal(answers(stepped(again, x), x), answers(stepped(model, x), x))
    assert saved.describe(tmp_path / "network.safetensors")["changes"]["fc"]["replace"]["type"] == "Sequential"


def test_folded_removed_and_emptied_parts_come_back(tmp_path: Path) -> None:
    """A batch norm folded into its convolution, a layer off the end of a Sequential, a bias taken away."""
    original, model = small()
    conv, norm = model.stem[0], model.stem[1]
    model.stem[0] = nn.utils.fuse_conv_bn_eval(conv, norm)
    model.stem[1] = nn.Identity()
    del model.left[2]
    model.fc.bias = None
    x = images(4)[0]
    again = both(model, original, tmp_path, x)
    assert torch.equal(answers(again, x), answers(model, x))
    assert again.fc.bias is None
    assert isinstance(again.stem[1], nn.Identity)
    assert len(again.left) == 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(6, 6, 3, 2, 1, 1, groups=2),
        nn.Sequential(nn.Conv1d(6, 6, 3, padding="same", padding_mode="circular"), nn.BatchNorm1d(6, momentum=None)),
        nn.Sequential(nn.GroupNorm(2, 6), nn.LayerNorm([4, 4], bias=False), nn.GELU("tanh"), nn.LeakyReLU(0.3)),
        nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d((None, 2))),
        nn.Sequential(nn.BatchNorm2d(6, affine=False, track_running_stats=False), nn.Hardtanh(-2, 3), nn.Dropout(0.2)),
        nn.Sequential(nn.ReLU(True), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(), nn.Sigmoid(), nn.Tanh()),
        nn.Sequential(nn.Flatten(1), nn.Linear(96, 3, bias=False)),
    ],
    ids=lambda m: type(m[0] if isinstance(m, nn.Sequential) else m).__name__,
)  # fmt: skip
def test_every_layer_of_the_table_comes_back(layer: nn.Module, tmp_path: Path) -> None:
    original = nn.Sequential(nn.Identity())
    again = both(nn.Sequential(layer), original, tmp_path)
    x = torch.randn(2, 6, 4) if "Conv1d" in repr(layer) else torch.randn(2, 6, 4, 4)
    assert repr(again) == repr(nn.Sequential(layer).eval())
    assert torch.equal(answers(again[0], x), answers(layer.eval(), x))


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    original, model = Tied(), Tied()
    x = torch.randn(3, 6)
    again = both(model, original, tmp_path, x)
    assert again.a.weight is again.b.weight
    assert again.norm is again.again
    with safe_open(tmp_path / "network.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a.bias", "a.weight", "b.bias", "norm.bias", "norm.weight"]
    assert torch.equal(answers(stepped(again, x), x), answers(stepped(model, x), x))


def test_tables_outside_of_the_state_dict_and_tuples_come_back(tmp_path: Path) -> None:
    model = Tied(4)
    again = both(model, Tied(6), tmp_path, torch.randn(3, 4))
    assert torch.equal(again.table, torch.arange(4.0))
    assert again.shape == (1, 4)
    assert isinstance(again.shape, tuple)


def test_views_and_other_layouts_of_memory_are_written(tmp_path: Path) -> None:
    original, model = small()
    pool = torch.randn(2000)
    model.fc.weight = nn.Parameter(pool[:960].view(96, 10).t())
    model.fc.bias = nn.Parameter(pool[950:960])
    model.to(memory_format=torch.channels_last)
    x = images(4)[0]
    assert torch.allclose(answers(both(model, original, tmp_path, x), x), answers(model, x), atol=1e-5)


def test_neither_network_nor_dice_are_touched(tmp_path: Path) -> None:
    model, _ = made(ARCH, 32)
    model.blocks[0].train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    lighten.save(tmp_path / "n.safetensors", model, ARCH, classes=10, preprocess=HOW)
    lighten.load(tmp_path / "n.safetensors")
    assert torch.equal(torch.rand(1), want)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- what cannot be told --------------------------------------------------------------------------------


class Doubled(nn.Linear):
    """A layer of somebody's own."""


def _own_layer(m: Any) -> None:
    m.fc = Doubled(96, 10)


def _graph(m: Any) -> None:
    m.left = torch.fx.symbolic_trace(m.left)


def _parametrized(m: Any) -> None:
    parametrizations.weight_norm(m.fc)


def _masked(m: Any) -> None:
    prune.l1_unstructured(m.fc, "weight", 0.5)


def _patched(m: Any) -> None:
    m.fc.forward = lambda x: x


def _hooked(m: Any) -> None:
    m.fc.register_forward_hook(lambda _m, _i, out: out * 2)


def _missing(m: Any) -> None:
    del m.skip


def _broken(m: Any) -> None:
    m.fc.weight.data[0, 0] = torch.nan


def _int8(m: Any) -> None:
    m.fc.weight = nn.Parameter(torch.ones(10, 96, dtype=torch.int8), requires_grad=False)


def _dishonest(m: Any) -> None:
    m.fc.in_features = 95


@pytest.mark.parametrize(
    "change, named",
    [
        (_own_layer, "fc"),
        (_graph, "left"),
        (_parametrized, "fc"),
        (_masked, "fc"),
        (_patched, "fc"),
        (_hooked, "fc"),
        (_missing, "skip"),
        (_broken, "fc.weight"),
        (_int8, "fc.weight"),
        (_dishonest, "fc"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name_and_leaves_the_old_file(
    change: Callable[[Any], None], named: str, tmp_path: Path
) -> None:
    original, model = small()
    change(model)
    (tmp_path / "network.safetensors").write_text("the good one")
    with pytest.raises(BadModel, match=named):
        both(model, original, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["network.safetensors"]
    assert (tmp_path / "network.safetensors").read_text() == "the good one"


def test_quantized_and_traced_networks_are_refused(tmp_path: Path) -> None:
    original, model = small()
    quant = pytest.importorskip("torchao.quantization")
    quant.quantize_(model, quant.Int8WeightOnlyConfig())
    with pytest.raises(BadModel, match=r"fc|stem|inner"):
        both(model, original, tmp_path)
    for other in (torch.fx.symbolic_trace(original), torch.jit.trace(original, images(1)[0])):
        with pytest.raises(BadModel, match="the original is a Small"):
            both(other, original, tmp_path)
    with pytest.raises(BadModel, match=r"no nn\.Module"):
        both(torch.export.export(original, (images(2)[0],)), original, tmp_path)  # type: ignore[arg-type]


def test_weights_of_another_kind_of_tensor_are_refused(tmp_path: Path) -> None:
    original, model = small()
    for strange in (torch.ones(10, 96).to_sparse(), torch.ones(10, 96, device="meta")):
        model.fc.weight = nn.Parameter(strange)
        with pytest.raises(BadModel, match=r"fc\.weight is no dense tensor"):
            both(model, original, tmp_path)


class Secret(nn.Module):
    """Computes with a setting that hides in a closure."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.scale = lambda x: x * factor

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.fc(x))


def test_a_network_that_would_answer_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="answers otherwise"):
        both(Secret(2.0), Secret(1.0), tmp_path, torch.ones(1, 2))


def test_a_wrong_original_or_input_is_refused(tmp_path: Path) -> None:
    model, _ = made(ARCH, 32)
    file = tmp_path / "n.safetensors"
    with pytest.raises(BadModel, match=rf"^{re.escape(str(file))}: 'stem\.0'.*\(16, 3, 3, 3\).*\(9, 3, 3, 3\)"):
        lighten.save(file, model, ARCH, classes=10, original=copy.deepcopy(model))
    with pytest.raises(BadModel, match="cannot take an input"):
        lighten.save(file, model, ARCH, classes=10, example=torch.zeros(1, 4, 8, 8))
    with pytest.raises(BadModel, match="Neither arch nor original"):
        lighten.save(file, model, None, classes=10)
    assert not file.exists()


# --- strangers' files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("good") / "network.safetensors"
    model, _ = made(ARCH, 32)
    model.fc = nn.Sequential(nn.Linear(model.fc.in_features, 4, bias=False), nn.Linear(4, 10))
    lighten.save(file, model, ARCH, classes=10, preprocess=HOW)
    return file


def forged(good: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """The good file with description or tensors changed by somebody else."""
    tensors, told = safetensors.torch.load_file(good), saved.describe(good)
    text = change(told, tensors)
    file = folder / "forged.safetensors"
    metadata = {"lighten": text if isinstance(text, str) else json.dumps(told)}
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    return file


def test_the_forger_itself_changes_nothing(good: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    again = lighten.load(forged(good, tmp_path, lambda d, t: None))
    assert torch.equal(answers(again, x), answers(lighten.load(good), x))


def changes(name: str, **row: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda told, _: told["changes"].__setitem__(name, row)


def tree(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"type": kind, "arguments": arguments}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "Sequential", "children": {"0": nested(depth - 1)}} if depth else tree("Identity")


def entry(**values: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda told, _: told.update(values)


def tensor(name: str, value: Tensor | None) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda _, tensors: tensors.pop(name) if value is None else tensors.__setitem__(name, value)


LINEAR = {"in_features": 40, "out_features": 10, "bias": True}
HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "no such module": changes("blocks.99.conv1", set={"groups": 1}),
    "no such parent": changes("a.b.c", replace=tree("Identity")),
    "the root replaced": changes("", replace=tree("Identity")),
    "no such setting": changes("fc.0", set={"evil": 1}),
    "a method": changes("fc.0", set={"forward": "os.system"}),
    "a method of the class": changes("", set={"train": 1}),
    "a dunder": changes("fc.0", set={"__class__": "Evil"}),
    "a store of the module": changes("fc.0", set={"_parameters": [1]}),
    "its hooks": changes("fc.0", set={"_forward_hooks": None}),
    "whether it trains": changes("fc.0", set={"training": True}),
    "a path as name": changes("fc.0", set={"weight.data": 1}),
    "a table as value": changes("fc.0", set={"in_features": {"a": 1}}),
    "text for a number": changes("fc.0", set={"in_features": "40"}),
    "truth for a number": changes("fc.0", set={"in_features": True}),
    "a fraction of channels": changes("fc.0", set={"in_features": 4.5}),
    "a size beyond reason": changes("fc.0", set={"in_features": 10**12}),
    "NaN as a setting": changes("stem.1", set={"eps": float("nan")}),
    "infinity as a setting": changes("stem.1", set={"eps": float("inf")}),
    "sizes unlike the weights": changes("stem.0", set={"out_channels": 15}),
    "no groups at all": changes("stem.0", set={"groups": 0}),
    "settings that are a list": changes("fc.0", set=["in_features"]),
    "another verb": changes("fc.0", call="forward"),
    "an empty row": changes("fc.0"),
    "an unknown layer": changes("fc", replace=tree("Bilinear", in1_features=1)),
    "a class that is no layer": changes("fc", replace=tree("Module")),
    "a path to a class": changes("fc", replace=tree("os.system", command="true")),
    "a layer that is a list": changes("fc", replace=tree(["Linear"])),
    "a tree that is text": changes("fc", replace="Linear"),
    "too few arguments": changes("fc", replace=tree("Linear", in_features=40)),
    "too many arguments": changes("fc", replace=tree("Linear", **LINEAR, device="cuda")),
    "arguments of nonsense": changes("fc", replace=tree("Linear", **{**LINEAR, "in_features": -3})),
    "arguments of text": changes("fc", replace=tree("Linear", **{**LINEAR, "in_features": "x"})),
    "a layer too large": changes("fc", replace=tree("Linear", **{**LINEAR, "in_features": 2**24, "out_features": 2**24})),
    "children of a leaf": changes("fc", replace={**tree("Linear", **LINEAR), "children": {"0": tree("Identity")}}),
    "a child named like a method": changes("fc", replace={"type": "Sequential", "children": {"forward": tree("Identity")}}),
    "a child with a path": changes("fc", replace={"type": "Sequential", "children": {"a.b": tree("Identity")}}),
    "a tree too deep": changes("fc", replace=nested(40)),
    "removal from a block": changes("blocks.0", remove=["conv1"]),
    "removal of nothing": changes("blocks", remove=["77"]),
    "removal by number": changes("blocks", remove=3),
    "removal of what has weights": changes("blocks", remove=["8"]),
    "emptying nothing": changes("fc.0", none=["nothing"]),
    "emptying what has weights": changes("fc.1", none=["bias"]),
    "a missing tensor": tensor("fc.1.bias", None),
    "a tensor too many": tensor("fc.1.scale", torch.ones(10)),
    "NaN weights": tensor("fc.1.bias", torch.full((10,), torch.nan)),
    "whole numbers for weights": tensor("fc.1.bias", torch.ones(10, dtype=torch.int32)),
    "another rank": tensor("fc.1.bias", torch.ones(10, 1)),
    "no channels at all": tensor("fc.1.bias", torch.ones(0)),
    "another size": tensor("fc.1.bias", torch.ones(11)),
    "tied to nothing": entry(tied={"fc.1.bias": "fc.9.bias"}),
    "tied and stored": entry(tied={"fc.1.bias": "fc.1.weight"}),
    "tied by a list": entry(tied=[["a", "b"]]),
    "tied to a number": entry(tied={"fc.1.bias": 3}),
    "another version": entry(version=99),
    "no version": lambda told, _: told.pop("version"),
    "an architecture of nowhere": entry(arch="evil:net"),
    "no architecture": entry(arch=""),
    "an architecture that is a list": entry(arch=["torchvision:resnet18"]),
    "classes that are text": entry(classes="10"),
    "classes beyond reason": entry(classes=10**9),
    "classes below reason": entry(classes=-1),
    "other classes": entry(classes=11, changes={}),
    "names that are numbers": entry(class_names=[1, 2]),
    "changes that are a list": entry(changes=[1]),
    "preprocessing of nonsense": entry(preprocess={"height": -1, "width": 3}),
    "preprocessing of fractions": entry(preprocess={"height": 4.5, "width": 3}),
    "preprocessing that is text": entry(preprocess="resize"),
    "no JSON": lambda told, _: "{",
    "JSON that is a list": lambda told, _: "[]",
    "JSON without a bottom": lambda told, _: "[" * 200_000,
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_says_what_no_network_could_is_refused(case: str, good: Path, tmp_path: Path) -> None:
    file = forged(good, tmp_path, HOSTILE[case])
    with pytest.raises(BadModel, match=r"forged\.safetensors") as caught:
        lighten.load(file)
    assert caught.value.to_do


def test_an_unknown_architecture_is_named(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="resnet20"):
        lighten.load(forged(good, tmp_path, entry(arch="lighten:resnet21")))


def test_code_in_the_file_runs_only_with_trust(good: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from lighten.models.resnet import resnet20\n"
    )
    file = forged(good, tmp_path, entry(arch=f"{tmp_path / 'net.py'}:resnet20"))
    with pytest.raises(UntrustedCode):
        lighten.load(file)
    assert not (tmp_path / "ran").exists()
    assert lighten.load(file, trust_code=True).fc[1].out_features == 10


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(share: float, good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(BadModel):
        lighten.load(tmp_path / "cut.safetensors")


def test_files_that_say_nothing_of_themselves(tmp_path: Path) -> None:
    model = build(ARCH, classes=10)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        assert saved.told(tmp_path / name) is None
        with pytest.raises(BadModel, match="does not describe itself"):
            lighten.load(tmp_path / name)
        with pytest.raises(BadModel, match="--arch"):
            load_any(tmp_path / name, None)
    with pytest.raises(BadModel, match="does not exist"):
        lighten.load(tmp_path / "nothing.safetensors")


# --- where it is used -----------------------------------------------------------------------------------


def test_a_users_own_class_is_loaded_from_its_file_or_its_instance(tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes=3):\n"
        "        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3))\n"
        "        self.fc = nn.Linear(8, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.model(x).mean((2, 3)))\n"
    )
    arch, x = f"{code}:Net", torch.randn(2, 3, 12, 12)
    original = build(arch, classes=5, trust_code=True)
    model = lived(pruned(copy.deepcopy(original), x[:1]), x)
    for trust in (True, False):  # the class of a file that is read anew is another object
        lighten.save(tmp_path / "n.safetensors", model, arch, classes=5, original=original, trust_code=trust)
        assert torch.equal(answers(lighten.load(tmp_path / "n.safetensors", trust_code=True), x), answers(model, x))
    kept = copy.deepcopy(original.state_dict())
    assert torch.equal(answers(lighten.load(tmp_path / "n.safetensors", model=original), x), answers(model, x))
    assert all(torch.equal(v, kept[k]) for k, v in original.state_dict().items())


def test_densenet_by_its_instance(tmp_path: Path) -> None:
    """Concatenated channels, whose batch norms are cut in places far from the layers that lead them."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    original = models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    model = lived(pruned(copy.deepcopy(original), x[:1]), x)
    again = both(model, original, tmp_path, x)
    assert torch.equal(answers(again, x), answers(model, x))
    assert torch.equal(answers(stepped(again, x), x), answers(stepped(model, x), x))


def test_the_general_loader_takes_architecture_from_the_file(good: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    want = answers(lighten.load(good), x)
    for arch in (None, "", ARCH):
        assert torch.equal(answers(load_any(good, arch)[0], x), want)
    with pytest.raises(BadModel, match=r"lighten:resnet20.*lighten:resnet56"):
        load_any(good, "lighten:resnet56")
    with pytest.raises(BadModel, match=r"10.*12"):
        load_any(good, ARCH, classes=12)


def test_the_front_desk_needs_neither_architecture_nor_preprocessing(good: Path) -> None:
    pytest.importorskip("torchao")
    loaded = load_model(ModelIn(str(good)))
    assert loaded.preprocess is not None
    assert (loaded.preprocess.input_shape, loaded.preprocess.std) == ((3, 32, 32), HOW.std)
    assert "checkpoint" in loaded.preprocess.source
    assert difference(lighten.load(good), loaded.module) == {}
    asked = load_model(ModelIn(str(good), preprocess={"input_size": 48}))
    assert asked.preprocess is not None
    assert asked.preprocess.input_shape == (3, 48, 48)
