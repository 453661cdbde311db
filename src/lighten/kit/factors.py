"""A wide layer as two narrow ones: bases from weights or from responses, ranks that pay, and putting them in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

KINDS = (nn.Linear, nn.Conv2d)
"""Exactly these: a subclass may pad or multiply in its own way."""


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions that are not grouped, by name; those that share a weight with another are not here."""
    own = {name: m for name, m in model.named_modules() if type(m) in KINDS and "weight" in m._parameters}
    uses = [id(w) for m in model.modules() for w in m.parameters(recurse=False)]
    return {n: m for n, m in own.items() if getattr(m, "groups", 1) == 1 and uses.count(id(m.weight)) == 1}


# --- what a layer answers -----------------------------------------------------------------------------


@dataclass
class Responses:
    """Mean (d) and sum of squared deviations (d, d) of a layer's outputs over all places, float64, batch by batch.

    Chan, Golub & LeVeque, 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", eq. 2.1.
    """

    places: int = 0
    images: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """`rows` (places, d)."""
        rows = rows.double()
        mean, n = rows.mean(0), len(rows)
        scatter = (rows - mean).T @ (rows - mean)
        if self.places:
            gap, total = mean - self.mean, self.places + n
            scatter = self.scatter + scatter + torch.outer(gap, gap) * (self.places * n / total)
            mean = self.mean + gap * (n / total)
        self.places, self.mean, self.scatter = self.places + n, mean, scatter

    @property
    def places_per_image(self) -> float:
        return self.places / self.images


def responses(model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Responses]:
    """How each layer answers `batches`. A layer whose forward is never called (its weight is read by another) is absent."""
    seen: dict[str, Responses] = {}
    wanted = {name: model.get_submodule(name) for name in names}
    with torch.inference_mode(), _watching(wanted, seen):
        for x in batches:
            model.eval()(x)
            for one in seen.values():
                one.images += len(x)
    return seen


@contextmanager
def _watching(wanted: Mapping[str, nn.Module], seen: dict[str, Responses]) -> Any:
    def watch(name: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Tensor) -> None:
            rows = out.movedim(1, -1) if isinstance(module, nn.Conv2d) else out
            seen.setdefault(name, Responses()).add(rows.reshape(-1, rows.shape[-1]))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in wanted.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- bases and ranks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions of a layer's outputs (columns, d x d), strongest first, with the energy in each (d)."""

    directions: Tensor
    energies: Tensor


def of_responses(seen: Responses) -> Basis:
    """Principal axes of the responses; energies are variances (Zhang et al., 2016, "Accelerating Very Deep Convolutional
    Networks", section 3.1.1, eq. 4: the best y ~ M y + b of a given rank)."""
    return _spectrum(seen.scatter / seen.places)


def of_weight(weight: Tensor) -> Basis:
    """Left singular vectors of the weight (d, all else); energies are squared singular values (Denton et al., 2014)."""
    flat = weight.detach().reshape(weight.shape[0], -1).double()
    return _spectrum(flat @ flat.T)


def _spectrum(symmetric: Tensor) -> Basis:
    energies, directions = torch.linalg.eigh(symmetric.cpu())
    return Basis(directions.flip(1), energies.flip(0).clamp_min(0.0))


def rank_for_energy(energies: Tensor, share: float) -> int:
    """The fewest directions that hold `share` of the energy; 1 where there is none at all."""
    held = energies.cumsum(0)
    return min(len(energies), 1 + int((held < share * held[-1] * (1 - 1e-12)).sum()))


def rank_for_ratio(weight: Tensor, share: float) -> int:
    """The most directions with which the two factors hold at most `share` of the layer's weights; 1 at least."""
    return max(1, math.floor(share * weight.numel() / per_rank(weight)))


def per_rank(weight: Tensor) -> int:
    """Weights of both factors for one direction: all inputs of a filter, and one weight an output."""
    return weight.shape[0] + weight.numel() // weight.shape[0]


def pays(weight: Tensor, rank: int) -> bool:
    """Whether the factors have fewer weights and fewer multiplications.

    One condition for both: each weight of either factor is used once at every place of the output, as the layer's are.
    """
    return rank * per_rank(weight) < weight.numel()


# --- the two layers -----------------------------------------------------------------------------------


def pair(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two layers with the shape of the factors, weights not yet set: the layer with `rank` outputs and no bias, then a
    linear layer or 1 x 1 convolution with the bias."""
    if isinstance(layer, nn.Linear):
        first: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
        second: nn.Module = nn.Linear(rank, layer.out_features)
    else:
        assert isinstance(layer, nn.Conv2d)
        how = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        first = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **how)
        second = nn.Conv2d(rank, layer.out_channels, 1)
    like = layer.weight
    return nn.Sequential(first, second).to(like.device, like.dtype).train(layer.training)


@torch.no_grad()
def factorise(layer: nn.Module, basis: Basis, rank: int, mean: Tensor | None = None) -> nn.Sequential:
    """y = U U^T (W x + b - mean) + mean as U (U^T W x) + bias, with the first `rank` directions U (Zhang et al., 2016,
    section 3.1.1). `mean` (d) of the responses; without it the bias stays as it is, y = U U^T W x + b."""
    done = pair(layer, rank)
    u = basis.directions[:, :rank]
    weight = layer.weight.detach().double().cpu()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    bias = bias if layer.bias is None else layer.bias.detach().double().cpu()
    first = (u.T @ weight.reshape(len(weight), -1)).reshape(rank, *weight.shape[1:])
    done[0].weight.copy_(first)
    done[1].weight.copy_(u.reshape(done[1].weight.shape))
    done[1].bias.copy_(bias if mean is None else u @ (u.T @ (bias - mean.cpu())) + mean.cpu())
    return done


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """`new` in place of the module called `name`, wherever it is used."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # named_children would skip the second name
            if child is old:
                setattr(parent, key, new)
