"""Feature matching: which layers of two networks compare, and attention transfer between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Pair:
    """Two layers, by their names in `named_modules`, whose outputs have maps of the same `size` (height, width)."""

    student: str
    teacher: str
    size: tuple[int, int]


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named layers give while this is open; the hooks are gone afterwards, whatever happens."""
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:

            def keep(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
                seen[name] = out

            handles.append(model.get_submodule(name).register_forward_hook(keep))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def pairs(student: nn.Module, teacher: nn.Module, x: Tensor) -> tuple[Pair, ...]:
    """The ends of the stages that both networks have: the last layer at each size of map, from large to small.

    By name where the student has a layer of the teacher's name with maps of that size, as a pruned copy does; else by
    the size alone. Maps of one pixel are left out: their attention says nothing. `x` (N, C, H, W) is run through both.
    """
    ours, theirs = _sizes(student, x), _sizes(teacher, x)
    ends = _ends(student, ours)
    found = []
    for size, name in sorted(_ends(teacher, theirs).items(), reverse=True):
        if ours.get(name) == size:
            found.append(Pair(name, name, size))
        elif size in ends:
            found.append(Pair(ends[size], name, size))
    return tuple(found)


def attention_loss(maps: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis, 2017, "Paying More Attention to Attention", eq. 2, without its beta).

    `maps` are the student's (N, C, H, W) and the teacher's (N, K, H, W): half the squared distance of their attention,
    each scaled to length 1, summed over the pairs, mean over images. Squared, as in the authors' code: the bare
    distance has no gradient at zero. Channels are summed over, so C and K may differ and nothing is learned beside.
    """
    parts = [(attention(ours) - attention(theirs).detach()).square().sum(1).mean() / 2 for ours, theirs in maps]
    return torch.stack(parts).sum()


def attention(maps: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W): the squares summed over channels, each image's scaled to length 1."""
    return normalize(maps.float().square().sum(1).flatten(1), dim=1)


def _sizes(model: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """Height and width of what each layer gives, in the order in which they finish; 4-dimensional outputs alone."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = []

    def keep(name: str, out: object) -> None:
        if isinstance(out, Tensor) and out.ndim == 4:
            sizes.pop(name, None)  # a layer that is called twice finishes last
            sizes[name] = (out.shape[2], out.shape[3])

    was = {m: m.training for m in model.modules()}
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out)))
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for m, training in was.items():
            m.training = training
    return sizes


def _ends(model: nn.Module, sizes: dict[str, tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The last layer of each size that some convolution gives: only those are surely (N, C, H, W)."""
    spatial = {sizes[name] for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name in sizes}
    return {size: name for name, size in sizes.items() if size in spatial and size != (1, 1)}
