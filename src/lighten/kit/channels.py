"""Channels that can only go together, and taking them away: the one place that knows Torch-Pruning's dependency graph."""

from __future__ import annotations

import copy
import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping
from torch_pruning.ops import OPTYPE

from lighten.errors import BadConfig, BadModel
from lighten.kit.quiet import quiet
from lighten.kit.trace import example_input
from lighten.shapes import resized
from lighten.types import ChannelGroup, LayerShape

Shape = tuple[int, ...]
Scorer = Callable[[Any], Tensor]
"""A Torch-Pruning group -> importance (channels,) of its root's channels."""

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
CLIPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid)
PASSED_OVER = (nn.modules.batchnorm._BatchNorm, nn.Identity, nn.Dropout)
CANNOT = (BadModel, RuntimeError, AssertionError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What Torch-Pruning and a network that no longer fits together raise."""
PERMUTING = ("pixelshuffle", "pixelunshuffle", "channelshuffle", "roll", "flip", "indexselect", "gather")
"""Operations that move channels, where Torch-Pruning believes that they stay (by the name of their gradient)."""


# --- layers as they run ---------------------------------------------------------------------------


def shapes(model: nn.Module, input_shape: Shape) -> dict[str, LayerShape]:
    """Every Conv2d, ConvTranspose2d and Linear that one forward pass calls, by name, with the sizes it saw.

    A torch MultiheadAttention keeps its weights to itself: it counts as NAME.in_proj and NAME.out_proj. `clip` says
    whether the next module called, batch norms and dropout passed over, is a ReLU or another clip; a functional one
    is not seen. Raises BadModel where the model does not take `input_shape`.
    """
    called: list[tuple[str, nn.Module, tuple[int, ...]]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: called.append((name, m, tuple(args[0].shape))))
        for name, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention) or not list(m.children())
    ]
    try:
        with _evaluating(model), torch.no_grad():
            _forward(model, _example(model, input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, LayerShape] = {}
    for k, (name, module, seen) in enumerate(called):
        if isinstance(module, nn.MultiheadAttention):
            found |= _attention_shapes(name, module, seen)
        elif isinstance(module, LAYERS) and name not in found:
            found[name] = _shape(name, module, seen, _clipped(called[k + 1 :]))
    return found


def _clipped(later: list[tuple[str, nn.Module, tuple[int, ...]]]) -> bool:
    following = next((m for _, m, _ in later if not isinstance(m, PASSED_OVER)), None)
    return isinstance(following, CLIPS)


def _shape(name: str, m: Any, seen: tuple[int, ...], clip: bool) -> LayerShape:
    bias = m.bias is not None
    if isinstance(m, nn.Linear):
        return LayerShape(name, "linear", m.in_features, m.out_features, source=seen[1:-1], bias=bias, clip=clip)
    kind = "conv_transpose" if isinstance(m, nn.ConvTranspose2d) else "conv"
    padding = _padding(m)
    return LayerShape(
        name, kind, m.in_channels, m.out_channels, tuple(m.kernel_size), tuple(m.stride), padding,
        tuple(m.dilation), m.groups, seen[2:], bias, clip,
    )  # fmt: skip


def _padding(m: Any) -> tuple[int, ...]:
    """What "same" and "valid" mean in numbers."""
    if m.padding == "valid":
        return (0,) * len(m.kernel_size)
    if m.padding == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(m.kernel_size, m.dilation))
    return tuple(m.padding)


def _attention_shapes(name: str, m: nn.MultiheadAttention, seen: tuple[int, ...]) -> dict[str, LayerShape]:
    tokens = seen[1:-1] if m.batch_first else seen[:1]
    parts = {"in_proj": 3 * m.embed_dim, "out_proj": m.embed_dim}
    bias = m.in_proj_bias is not None
    return {
        f"{name}.{part}": LayerShape(f"{name}.{part}", "linear", m.embed_dim, outputs, source=tokens, bias=bias)
        for part, outputs in parts.items()
    }


# --- groups ---------------------------------------------------------------------------------------


def groups(model: nn.Module, input_shape: Shape, protect: Iterable[str] = ()) -> tuple[ChannelGroup, ...]:
    """Every set of channels that can be narrowed, in the order of the layers.

    Left out: what touches the outputs of a layer in `protect` (or of a module that holds it), the model's own input or
    answer, a channel shuffle (ShuffleNet between its blocks), or what cannot be taken away without breaking the
    forward pass (fixed splits, Swin's attention): one atom of every group is taken from a copy, to see.
    Raises BadModel where the graph cannot be traced.
    """
    protect = tuple(protect)
    found = _found(model, input_shape, protect)
    names = [f.group.name for f in found]
    if not _breaks(model, input_shape, protect, names):
        return tuple(f.group for f in found)
    return tuple(f.group for f in found if not _breaks(model, input_shape, protect, [f.group.name]))


def scores(
    model: nn.Module, input_shape: Shape, scorer: Scorer, protect: Iterable[str] = ()
) -> dict[str, tuple[float, ...]]:
    """Importance of what can be taken away, by group: one score for each `multiple` channels, in their order."""
    found = _found(model, input_shape, protect)
    ranked = _ranked(found, scorer)
    return {f.group.name: tuple(ranked[f.group.name].tolist()) for f in found}


def prune(
    model: nn.Module, input_shape: Shape, widths: Mapping[str, int], scorer: Scorer, protect: Iterable[str] = ()
) -> None:
    """Take the lowest-scoring channels away until each named group has its width; in place, weights and all.

    All scores are read before anything is cut. Grouped convolutions lose the same channels of every group, attention
    loses whole heads (timm) or the same dimensions of every head (torch). Raises BadConfig for a group that is not
    there or a width that it cannot have, BadModel where the graph cannot be traced or the result does not run.
    """
    found = _found(model, input_shape, protect)
    _check(widths, [f.group for f in found])
    wanted = [f for f in found if widths.get(f.group.name, f.group.channels) < f.group.channels]
    if not wanted:
        return
    ranked = _ranked(wanted, scorer)
    doomed = {}
    for f in wanted:
        order = torch.argsort(ranked[f.group.name], stable=True).tolist()
        count = (f.group.channels - widths[f.group.name]) // f.group.multiple
        doomed[f.group.name] = sorted(order[:count])
    _cut(model, wanted, doomed)
    with _evaluating(model), torch.no_grad():
        _forward(model, _example(model, input_shape))


def regularizer(
    model: nn.Module, input_shape: Shape, protect: Iterable[str] = (), strength: float = 1e-4
) -> Callable[[], None]:
    """A function that adds to the gradients of `model` what pushes whole groups towards zero, to call before each step.

    Group-level sparsity of Fang et al., 2023, "DepGraph", equation 4: the decay of a channel grows from `strength` to
    16 times that as the group norm falls from the largest to the smallest of its group.
    """
    found = _found(model, input_shape, protect)
    norm = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    wholes = list({id(f.whole): f.whole for f in found}.values())

    @torch.no_grad()
    def push() -> None:
        for whole in wholes:
            size = norm(whole).sqrt()
            gamma = strength * 16 ** ((size.max() - size) / (size.max() - size.min()).clamp_min(1e-12))
            for item in whole:
                _push(item, gamma[torch.tensor(item.root_idxs, device=gamma.device)], whole._DG)

    return push


def _push(item: Any, gamma: Tensor, graph: Any) -> None:
    """Decay the weights that one entry of a group names, each place by its own `gamma`."""
    module, leads = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
    weight = getattr(module, "weight", None)
    if weight is None or weight.grad is None:
        return
    rows = torch.tensor(item.idxs, device=weight.device)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        weight.grad[rows] += gamma * weight[rows]
    elif isinstance(module, LAYERS):
        turned = isinstance(module, nn.ConvTranspose2d)
        if leads != turned:
            weight.grad[rows] += gamma.view(-1, *[1] * (weight.ndim - 1)) * weight[rows]
        elif getattr(module, "groups", 1) == 1:
            weight.grad[:, rows] += gamma.view(1, -1, *[1] * (weight.ndim - 2)) * weight[:, rows]


@dataclass(frozen=True)
class _Found:
    """A group, and where Torch-Pruning finds it: `atoms` are root channels that can only go together."""

    group: ChannelGroup
    graph: Any
    whole: Any
    atoms: tuple[tuple[int, ...], ...]

    @property
    def root(self) -> tuple[nn.Module, Any]:
        return self.whole[0].dep.target.module, self.whole[0].dep.handler


class _Graph(tp.DependencyGraph):
    """Torch-Pruning's graph, where channel shuffles are marked and not taken for a flatten, and where splits
    and concatenations know the sizes of their parts from the tensors that went through."""

    def build_dependency(self, *args: Any, **kwargs: Any) -> Any:
        super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            if node.type == OPTYPE.SPLIT:
                _repair_split(node)
            if node.type == OPTYPE.CONCAT:
                _repair_concat(node)
        self.place()
        return self

    def place(self) -> None:
        """Work out which places follow which; needed again after every cut."""
        index_mapping.update_index_mapping(self)
        self._bound()

    def get_pruning_group(self, *args: Any, **kwargs: Any) -> Any:
        with _settled():
            return super().get_pruning_group(*args, **kwargs)

    def _bound(self) -> None:
        """Reshapes that no layer could read: Torch-Pruning multiplies channels without end in Swin's windows."""
        widest = max(
            (max(m.weight.shape[:2]) * getattr(m, "groups", 1) for m in self.module2node if _is_layer(m)), default=0
        )
        for dep in (d for node in self.module2node.values() for d in node.dependencies):
            if isinstance(dep.index_mapping[0], index_mapping._FlattenIndexMapping):
                dep.index_mapping[0] = _Bounded(dep.index_mapping[0], widest)

    def _build_dependency(self, module2node: Any) -> None:
        for node in module2node.values():
            node.permutes = _permutes(node)
            if node.type == OPTYPE.RESHAPE and node.permutes:
                node.type = OPTYPE.ELEMENTWISE
        super()._build_dependency(module2node)


@dataclass(frozen=True)
class _Bounded:
    """A mapping of places, all under `widest`."""

    mapping: Any
    widest: int

    def __call__(self, places: list[Any]) -> list[Any]:
        mapped: list[Any] = self.mapping(places)
        if any(p.idx >= self.widest for p in mapped):
            raise IndexError("a channel beyond the widest layer")
        return mapped


def _is_layer(module: Any) -> bool:
    return isinstance(module, LAYERS)


def _permutes(node: Any) -> bool:
    """Whether it moves channels: by name, or a view between (N, C, H, W) and (N, groups, C / groups, H, W)."""
    name = type(node.grad_fn).__name__.lower()
    if any(word in name for word in PERMUTING) and node.type == OPTYPE.ELEMENTWISE:
        return True
    if node.type != OPTYPE.RESHAPE:
        return False
    before = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
    after = [tuple(meta.shape) for meta in getattr(node.grad_fn, "_input_metadata", ())]
    return {len(before), *map(len, after)} == {4, 5}


def _repair_split(node: Any) -> None:
    """A part that is read twice, or not at all, is beyond Torch-Pruning's mapping: such a split is refused."""
    sizes = [int(meta.shape[1]) for meta in node.grad_fn._input_metadata if len(meta.shape) > 1]
    parts = [[k for f, k in o.grad_fn.next_functions if f is node.grad_fn] for o in node.outputs]
    if sorted(k for part in parts for k in part) != list(range(len(sizes))) or len(parts) != len(sizes):
        node.enable_index_mapping, node.permutes = False, True
        for dep in (d for n in (node, *node.outputs) for d in n.dependencies if node in (d.source, d.target)):
            dep.index_mapping[0] = None
        return
    node.outputs = [o for _, o in sorted(zip(parts, node.outputs), key=lambda row: row[0])]
    node.module.split_sizes = sizes
    node.module.offsets = [sum(sizes[:k]) for k in range(len(sizes) + 1)]


def _repair_concat(node: Any) -> None:
    """Torch-Pruning gives up where a concatenation is flattened with its pixels or concatenated again at once."""
    sources = [f._input_metadata[k].shape for f, k in node.grad_fn.next_functions if f is not None]
    if not node.enable_index_mapping or node.grad_fn._saved_dim != 1 or any(len(s) != 4 for s in sources):
        return
    if len(sources) != len(node.inputs) or len({id(n) for n in node.inputs}) != len(node.inputs):
        node.permutes = True
        return
    node.module.concat_sizes = [int(s[1]) for s in sources]
    for k, source in enumerate(node.inputs):
        for dep in (d for d in node.dependencies if d.target is source):
            dep.index_mapping[1] = _Place(node.module, k, -1)
        for dep in (d for d in source.dependencies if d.target is node):
            dep.index_mapping[1] = _Place(node.module, k, 1)


@dataclass(frozen=True)
class _Place:
    """Places of part `part` in its concatenation (`sign` 1), and back (-1); follows what is cut."""

    concat: Any
    part: int
    sign: int

    def __call__(self, places: list[Any]) -> list[Any]:
        start = sum(self.concat.concat_sizes[: self.part])
        end = start + self.concat.concat_sizes[self.part]
        if self.sign > 0:
            return [p._replace(idx=p.idx + start) for p in places]
        return [p._replace(idx=p.idx - start) for p in places if start <= p.idx < end]


@contextmanager
def _settled() -> Iterator[None]:
    """Torch-Pruning works out all places anew before every group; here that is done once, and after each cut."""
    before = index_mapping.update_index_mapping
    index_mapping.update_index_mapping = lambda graph: None
    try:
        yield
    finally:
        index_mapping.update_index_mapping = before


@contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    """Gradients on for all parameters, which is how Torch-Pruning sees the graph; as before afterwards."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.requires_grad_(True)
    try:
        with _evaluating(model), torch.enable_grad(), quiet():
            yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def _example(model: nn.Module, input_shape: Shape) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return example_input(tuple(input_shape)).to(device)


def _forward(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except Exception as e:
        shape = ", ".join(map(str, x.shape[1:]))
        raise BadModel(f"The model does not run on an input of shape (N, {shape}): {_line(e)}") from e


def _line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {(lines or ['no message'])[0][:300]}"


def _traced(model: nn.Module, input_shape: Shape) -> tuple[Any, Tensor]:
    x = _example(model, input_shape).requires_grad_(True)
    with _tracing(model):
        answer = _forward(model, x)
        try:
            if isinstance(answer, Tensor) and answer.grad_fn is None:
                raise RuntimeError("the answer has no gradient")
            graph = _Graph().build_dependency(model, x, forward_fn=lambda m, x: m(x), verbose=False)
        except Exception as e:
            raise BadModel(
                f"The channels of the model cannot be traced: {_line(e)}",
                "Layers that hand on something else than tensors, or work without gradients, are beyond tracing. "
                "Leave pruning out, or distill into a smaller student.",
            ) from e
    return graph, x


def _found(model: nn.Module, input_shape: Shape, protect: Iterable[str]) -> list[_Found]:
    graph, x = _traced(model, input_shape)
    names = {m: name for name, m in model.named_modules()}
    order = {name: k for k, name in enumerate(names.values())}
    protect = tuple(protect)
    kept = {m for m, name in names.items() if any(name == p or name.startswith(f"{p}.") for p in protect)}
    heads = _heads(model)
    found: list[_Found] = []
    with _tracing(model):
        for whole in _wholes(graph, heads):
            if not _refused(graph, whole, kept, x):
                found += _parts(graph, whole, names, heads, {f.group.name for f in found})
    return sorted(found, key=lambda f: order[f.group.name.split("#")[0]])


def _wholes(graph: Any, heads: Mapping[nn.Module, int]) -> Iterator[Any]:
    """Every Torch-Pruning group that a layer's outputs lead, once; those that it cannot follow are left out."""
    seen: set[nn.Module] = set()
    for module in [m for m in graph.module2node if isinstance(m, LAYERS)]:
        if module in seen:
            continue
        pruner = graph.get_pruner_of_module(module)
        try:
            every = list(range(pruner.get_out_channels(module)))
            whole = graph.get_pruning_group(module, pruner.prune_out_channels, every)
            seen |= {dep.target.module for dep, _ in whole if graph.is_out_channel_pruning_fn(dep.handler)}
            whole = _rerooted(graph, whole, heads)
        except CANNOT:
            continue
        yield whole


def _rerooted(graph: Any, whole: Any, heads: Mapping[nn.Module, int]) -> Any:
    """Attention is led by the inputs of its projection: one index there is one of q, one of k and one of v."""
    projection = [
        dep for dep, _ in whole if dep.target.module in heads and not graph.is_out_channel_pruning_fn(dep.handler)
    ]
    if not projection:
        return whole
    module = projection[0].target.module
    return graph.get_pruning_group(module, projection[0].handler, list(range(module.in_features)))


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Projections of attention blocks as timm writes them, with the width of one head."""
    wanted = ("qkv", "proj", "num_heads", "head_dim", "attn_dim")
    return {m.proj: m.head_dim for m in model.modules() if all(hasattr(m, a) for a in wanted)}


def _refused(graph: Any, whole: Any, kept: set[nn.Module], x: Tensor) -> bool:
    for item in whole:
        node, leads = item.dep.target, graph.is_out_channel_pruning_fn(item.dep.handler)
        module = node.module
        if (leads and module in kept) or getattr(node, "permutes", False):
            return True
        if not node.outputs and node.type != OPTYPE.PARAMETER and (leads or not isinstance(module, LAYERS)):
            return True
        if any(r is None for r in item.root_idxs):
            return True
        if not isinstance(module, LAYERS) and _reads(node.grad_fn, x):
            return True
    return False


def _reads(grad_fn: Any, x: Tensor) -> bool:
    """Whether the model's own input goes straight into it (a residual around the first layer)."""
    return any(getattr(f, "variable", None) is x for f, _ in getattr(grad_fn, "next_functions", ()) if f is not None)


def _parts(
    graph: Any, whole: Any, names: Mapping[nn.Module, str], heads: Mapping[nn.Module, int], taken: set[str]
) -> Iterator[_Found]:
    """`whole` in the parts that touch the same layers: a residual around a concatenation has one for each branch."""
    atoms = _atoms(graph, whole, heads)
    alike = _alike(graph, whole, names, atoms)
    if len(alike) > 1:
        atoms = _closed(graph, whole, atoms)
        alike = _alike(graph, whole, names, atoms)
    for (outs, ins), members in alike.items():
        if len(members) < 2 or not outs:
            continue
        unit = math.gcd(*(n for _, n in (*outs, *ins)))
        lead = next((name for name, _ in outs if name not in taken), "")
        name = lead or _numbered(outs[0][0], taken)
        taken.add(name)
        outputs, inputs = (tuple((layer, n // unit) for layer, n in part) for part in (outs, ins))
        group = ChannelGroup(name, unit * len(members), outputs, inputs, unit)
        yield _Found(group, graph, whole, tuple(atoms[k] for k in members))


def _alike(
    graph: Any, whole: Any, names: Mapping[nn.Module, str], atoms: list[tuple[int, ...]]
) -> dict[Any, list[int]]:
    """Atoms by the features of each layer that one of them is: ((layer, outputs), ...), ((layer, inputs), ...)."""
    outputs, inputs = ([Counter[str]() for _ in atoms] for _ in range(2))
    atom_of = {root: k for k, atom in enumerate(atoms) for root in atom}
    for item in whole:
        for layer, features, leads in _touched(graph, item, names):
            for root in item.root_idxs:
                (outputs if leads else inputs)[atom_of[root]][layer] += features
    order = {name: k for k, name in enumerate(names.values())}
    alike: dict[Any, list[int]] = defaultdict(list)
    for k in range(len(atoms)):
        both = (sorted(c.items(), key=lambda row: _order_of(order, row[0])) for c in (outputs[k], inputs[k]))
        alike[tuple(map(tuple, both))].append(k)
    return alike


def _closed(graph: Any, whole: Any, atoms: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Atoms that pull each other along, made one: GhostNet's cheap half follows the half that it is made of."""
    module, handler = whole[0].dep.target.module, whole[0].dep.handler
    pulled = [set(graph.get_pruning_group(module, handler, list(atom))[0].idxs) for atom in atoms]
    return _united(sorted(whole[0].root_idxs), pulled)


def _united(roots: Iterable[int], sets: Iterable[Iterable[int]]) -> list[tuple[int, ...]]:
    """The finest partition of `roots` that splits none of `sets`."""
    parent = {root: root for root in roots}

    def top(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    for one in sets:
        first, *rest = one
        for k in rest:
            parent[top(k)] = top(first)
    members: dict[int, list[int]] = defaultdict(list)
    for root in sorted(parent):
        members[top(root)].append(root)
    return sorted(tuple(m) for m in members.values())


def _order_of(order: Mapping[str, int], layer: str) -> int:
    """Where a layer stands; the two halves of an attention stand where it does."""
    return order.get(layer, order.get(layer.rsplit(".", 1)[0], len(order)))


def _numbered(name: str, taken: set[str]) -> str:
    return next(f"{name}#{k}" for k in range(2, len(taken) + 3) if f"{name}#{k}" not in taken)


def _touched(graph: Any, item: Any, names: Mapping[nn.Module, str]) -> Iterator[tuple[str, int, bool]]:
    """(layer, features a channel, whether they are outputs) of one entry of a group."""
    module, leads = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
    if isinstance(module, LAYERS):
        yield names[module], 1, leads
    elif isinstance(module, nn.MultiheadAttention):
        for part, features in (("in_proj", 3), ("out_proj", 1)):
            yield f"{names[module]}.{part}", features, True
            yield f"{names[module]}.{part}", 1, False


def _atoms(graph: Any, whole: Any, heads: Mapping[nn.Module, int]) -> list[tuple[int, ...]]:
    """Root channels that only go together: the same place in every group of a grouped layer, a whole head."""
    sets = []
    for item in whole:
        if key := _tie(graph, item, heads):
            places: dict[int, list[int]] = defaultdict(list)
            for index, root in zip(item.idxs, item.root_idxs):
                places[key(index)].append(root)
            sets += list(places.values())
    return _united(whole[0].root_idxs, sets)


def _tie(graph: Any, item: Any, heads: Mapping[nn.Module, int]) -> Callable[[int], int] | None:
    """Which places of a layer belong together: equal keys do."""
    node, leads = item.dep.target, graph.is_out_channel_pruning_fn(item.dep.handler)
    module, blocks, channels = node.module, 1, 0
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups > 1:
        if module.groups == module.in_channels == module.out_channels:
            return None
        blocks, channels = module.groups, module.out_channels if leads else module.in_channels
    elif isinstance(module, nn.GroupNorm):
        blocks, channels = module.num_groups, module.num_channels
    elif isinstance(module, nn.MultiheadAttention):
        blocks, channels = module.num_heads, module.embed_dim
    elif node.type == OPTYPE.SPLIT and module.split_sizes:
        blocks, channels = len(module.split_sizes), sum(c or 0 for c in module.split_sizes)
    elif not leads and module in heads:
        width = heads[module]
        return lambda k: k // width
    if blocks < 2 or channels < blocks:
        return None
    size = channels // blocks
    return lambda k: k % size


# --- cutting --------------------------------------------------------------------------------------


def _check(widths: Mapping[str, int], known: list[ChannelGroup]) -> None:
    by_name = {g.name: g for g in known}
    for name, width in widths.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4) or list(by_name)[:20]
            raise BadConfig(f"There is no channel group named {name!r}.", f"The nearest: {', '.join(near)}.")
        g = by_name[name]
        if not g.multiple <= width <= g.channels or width % g.multiple:
            raise BadConfig(
                f"Group {name} cannot have {width} channels.",
                f"Choose a multiple of {g.multiple} between {g.multiple} and {g.channels}.",
            )


def _ranked(found: Iterable[_Found], scorer: Scorer) -> dict[str, Tensor]:
    """Scores (atoms,) by group, each the mean over its channels."""
    seen: dict[int, Tensor] = {}
    ranked = {}
    for f in found:
        if id(f.whole) not in seen:
            seen[id(f.whole)] = scorer(f.whole).detach().double().cpu()
        values = seen[id(f.whole)]
        ranked[f.group.name] = torch.stack([values[list(atom)].mean() for atom in f.atoms])
    return ranked


def _cut(model: nn.Module, found: Iterable[_Found], doomed: Mapping[str, list[int]]) -> None:
    """Remove atoms by their number. Parts of one whole go at once: a cut moves the places of the others."""
    wholes: dict[int, tuple[_Found, list[int]]] = {}
    for f in found:
        rows = wholes.setdefault(id(f.whole), (f, []))[1]
        rows += [root for k in doomed[f.group.name] for root in f.atoms[k]]
    dims = {m: m.embed_dim // m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    with _tracing(model), torch.no_grad():
        for f, rows in wholes.values():
            f.graph.get_pruning_group(*f.root, sorted(rows)).prune()
            f.graph.place()
        _agree(model, dims)


def _agree(model: nn.Module, dims: Mapping[nn.MultiheadAttention, int]) -> None:
    """Numbers that modules keep beside their weights follow them.

    torch divides the products of queries and keys by the root of the *new* head's width: queries are scaled so that
    what is left of a product stays what it was.
    """
    for m in model.modules():
        if all(hasattr(m, a) for a in ("qkv", "proj", "num_heads", "head_dim", "attn_dim")):
            m.attn_dim = m.proj.in_features
            m.num_heads = m.attn_dim // m.head_dim
        if isinstance(m, nn.MultiheadAttention) and m.head_dim != dims[m]:
            queries = slice(0, m.embed_dim)
            for part in (m.in_proj_weight, m.in_proj_bias):
                if part is not None:
                    part[queries] *= math.sqrt(m.head_dim / dims[m])
        if hasattr(m, "hidden_dim") and isinstance(getattr(m, "conv_proj", None), nn.Conv2d):
            m.hidden_dim = m.conv_proj.out_channels


def _breaks(model: nn.Module, input_shape: Shape, protect: Iterable[str], names: list[str]) -> bool:
    """Whether a copy without one atom of each of these groups fails to run, or is not as narrow as it should be."""
    trial = copy.deepcopy(model)
    before = shapes(model, input_shape)
    try:
        found = [f for f in _found(trial, input_shape, protect) if f.group.name in names]
        _cut(trial, found, {name: [0] for name in names})
        widths = {f.group.name: f.group.channels - f.group.multiple for f in found}
        return shapes(trial, input_shape) != resized(before, [f.group for f in found], widths)
    except CANNOT:
        return True
