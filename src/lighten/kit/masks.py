"""Which weights become zero: the smallest of all layers or of each alone, or all but N of every M; and what gzip makes of it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GZIP_LEVEL = 6
"""The default of the command gzip."""


# --- which weights there are --------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of a Linear, a convolution or an attention projection, by the parameter's name, shared ones once.

    Axis 0 are outputs and axis 1 inputs, as views of the parameters: filling one in place fills the network. Not here:
    transposed convolutions in groups, whose inputs no axis holds, and weights that a parametrization computes.
    """
    found: dict[str, Tensor] = {}
    for layer, module in model.named_modules():
        own = _own_weight(module)
        if own is not None and all(own[1] is not other for other in found.values()):
            found[f"{layer}.{own[0]}" if layer else own[0]] = own[1]
    return {name: _inputs_second(model, name, weight) for name, weight in found.items()}


def _own_weight(module: nn.Module) -> tuple[str, Tensor] | None:
    if isinstance(module, nn.MultiheadAttention):
        return None if module.in_proj_weight is None else ("in_proj_weight", module.in_proj_weight)
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and "weight" in module._parameters:
        grouped = getattr(module, "transposed", False) and module.groups > 1
        return None if grouped else ("weight", module.weight)
    return None


def _inputs_second(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    transposed = getattr(model.get_submodule(layer_of(name)), "transposed", False)
    return weight.detach().transpose(0, 1) if transposed else weight.detach()


def layer_of(parameter: str) -> str:
    """ "features.0.weight" -> "features.0"."""
    return parameter.rpartition(".")[0]


def depthwise(model: nn.Module) -> tuple[str, ...]:
    """Convolutions whose filters read one channel each."""
    return tuple(
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.conv._ConvNd) and 1 < m.groups == m.in_channels
    )


def under(layer: str, names: Iterable[str]) -> bool:
    """Whether `layer` is one of `names` or inside one of them."""
    return any(layer == name or layer.startswith(f"{name}.") for name in names)


# --- how many go --------------------------------------------------------------------------------------


def schedule(final: float, done: int, rounds: int) -> float:
    """Share of zeros after round `done` of `rounds`: much at first, little at the end.

    Zhu & Gupta, 2017, "To Prune, or Not to Prune", eq. 1, from an initial sparsity of zero.
    """
    return final * (1.0 - (1.0 - done / rounds) ** 3)


# --- which ones go ------------------------------------------------------------------------------------


def smallest(values: Tensor, count: int) -> Tensor:
    """True at exactly `count` of the smallest `values`; among equal ones the first in row-major order go first."""
    flat = values.reshape(-1)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    below, equal = flat < threshold, flat == threshold
    room = count - below.sum()
    return (below | (equal & (equal.cumsum(0) <= room))).reshape(values.shape)


def each_alone(tensors: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Zeros of every layer by itself: round(ratio * weights) of its smallest magnitudes (Han et al., 2015)."""
    return {name: smallest(w.abs(), round(ratio * w.numel())) for name, w in tensors.items()}


def over_all(tensors: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """One threshold for all layers: round(ratio * all weights) of the smallest magnitudes, wherever they are."""
    together = torch.cat([w.abs().reshape(-1) for w in tensors.values()])
    gone = smallest(together, round(ratio * together.numel()))
    parts = gone.split([w.numel() for w in tensors.values()])
    return {name: part.reshape(w.shape) for (name, w), part in zip(tensors.items(), parts)}


def n_of_m(weight: Tensor, kept: int, of: int) -> Tensor:
    """True at all but the `kept` largest magnitudes of every `of` consecutive inputs (axis 1), at each kernel position.

    That is the layout of sparse tensor cores (Mishra et al., 2021, "Accelerating Sparse Deep Neural Networks", section
    3): input channels run fastest there. Among equal ones the earlier go. Raises ValueError where the number of inputs
    is no multiple of `of`.
    """
    if weight.shape[1] % of:
        raise ValueError(f"{weight.shape[1]} inputs are no multiple of {of}")
    rows = weight.abs().movedim(1, -1)
    blocks = rows.reshape(-1, of)
    order = blocks.argsort(dim=1, stable=True)
    gone = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, order[:, : of - kept], True)
    return gone.reshape(rows.shape).movedim(-1, 1)


@torch.no_grad()
def hold(model: nn.Module, gone: dict[str, Tensor]) -> None:
    """Zero the weights that are gone, in place. `gone` moves to where the model is, and stays there."""
    found = weights(model)
    for name in gone:
        gone[name] = gone[name].to(found[name].device)
        found[name].masked_fill_(gone[name], 0.0)


# --- what it brings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Bytes of a network's weights, dense and after gzip, as float32 and as int8."""

    float32: int
    float32_gzip: int
    int8: int
    int8_gzip: int

    @property
    def float32_saved(self) -> float:
        """Percent that gzip takes off."""
        return 100.0 * (1.0 - self.float32_gzip / self.float32)

    @property
    def int8_saved(self) -> float:
        return 100.0 * (1.0 - self.int8_gzip / self.int8)


def packed(tensors: Iterable[Tensor]) -> Packed:
    """Really compressed, not estimated. int8: rounded symmetrically with one scale an output, scales not counted."""
    with torch.no_grad():
        rows = [t.detach().float().cpu() for t in tensors]
        floats = b"".join(t.contiguous().numpy().tobytes() for t in rows)
        integers = b"".join(_int8(t).contiguous().numpy().tobytes() for t in rows)
    sizes = [n for part in (floats, integers) for n in (len(part), len(zlib.compress(part, GZIP_LEVEL)))]
    return Packed(*sizes)


def _int8(weight: Tensor) -> Tensor:
    outputs = weight.reshape(weight.shape[0], -1)
    scale = outputs.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (outputs / scale).round().clamp(-127, 127).to(torch.int8)


def zeros(tensors: Iterable[Tensor]) -> float:
    """Share of exact zeros."""
    counts = [(int((t == 0).sum()), t.numel()) for t in tensors]
    return sum(z for z, _ in counts) / max(1, math.fsum(n for _, n in counts))
