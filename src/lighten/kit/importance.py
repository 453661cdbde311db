"""How much a channel is worth: magnitude, batch-norm scale, first and second order of the loss, and chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lighten.errors import BadConfig, BadData

KINDS = ("l1", "l2", "bn-scale", "taylor", "hessian", "random")
LEARNED = ("taylor", "hessian")
"""Those that read labelled batches."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, labels) -> mean loss of the batch."""


def scorer(
    kind: str,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    loss: Loss | None = None,
    seed: int = 0,
) -> Callable[[Any], Tensor]:
    """A function from a Torch-Pruning group to the importance of its root's channels, higher is worth more.

    Every kind adds up what it finds in all layers of the group, so that coupled channels are judged together (Fang et
    al., 2023, "DepGraph", section 3.3):
    l1, l2: sum of |w|, of w^2, over filters, the weights that read them and batch-norm scales;
    bn-scale: |gamma| (Liu et al., 2017, "Network Slimming"); groups without a batch norm fall back to l1;
    taylor: sum of |w dL/dw|, averaged over batches (Molchanov et al., 2019, "Importance Estimation", equation 8, in
    absolute value and with the gradient of a batch);
    hessian: sum of w^2 h / 2 with h the diagonal of the empirical Fisher matrix, from one gradient an image (LeCun et
    al., 1989, "Optimal Brain Damage", equation 5);
    random: uniform, from `seed`.
    Weights and gradients of `model` are left as they were. Raises BadConfig for an unknown kind, BadData where
    taylor or hessian have no labelled images.
    """
    if kind not in KINDS:
        raise BadConfig(f"There is no importance named {kind!r}.", f"Choose one of {', '.join(KINDS)}.")
    if kind == "random":
        return _random(seed)
    if kind in LEARNED:
        return _Table(_worth(kind, model, batches, loss))
    magnitude = tp.importance.GroupMagnitudeImportance(
        p=1 if kind != "l2" else 2, group_reduction="sum", normalizer=None
    )
    if kind != "bn-scale":
        return magnitude
    slimming = tp.importance.BNScaleImportance(group_reduction="sum", normalizer=None)
    return lambda group: slimming(group) if _has_scale(group) else magnitude(group)


def _has_scale(group: Any) -> bool:
    return any(isinstance(dep.target.module, _BatchNorm) and dep.target.module.affine for dep, _ in group)


def _random(seed: int) -> Callable[[Any], Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return lambda group: torch.rand(len(group[0].idxs), generator=dice)


def _worth(
    kind: str, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss | None
) -> dict[nn.Parameter, Tensor]:
    """What each single weight is worth, shaped as the weights. The model runs in eval mode: batch norms stand still."""
    if loss is None:
        raise BadConfig(f"Importance {kind} needs a loss.", "Use l1, l2 or bn-scale where there is none.")
    parts = list(batches)
    if kind == "hessian":
        parts = [(x[k : k + 1], y[k : k + 1]) for x, y in parts for k in range(len(x))]
    if not parts:
        raise BadData(f"Importance {kind} needs labelled images.", "Give some, or use l1, l2 or bn-scale.")
    weights = list(model.parameters())
    wanted = [p.requires_grad for p in weights]
    total = {p: torch.zeros_like(p) for p in weights}
    modes = {m: m.training for m in model.modules()}
    model.eval().requires_grad_(True)
    try:
        for x, y in parts:
            with torch.enable_grad():
                slopes = torch.autograd.grad(loss(model, x, y), weights, allow_unused=True)
            for p, slope in zip(weights, slopes):
                if slope is not None:
                    w = p.detach()
                    total[p] += (w * slope).abs() if kind == "taylor" else 0.5 * (w * slope) ** 2
    finally:
        for p, before in zip(weights, wanted):
            p.requires_grad_(before)
        for m, training in modes.items():
            m.training = training
    return {p: value / len(parts) for p, value in total.items()}


class _Table:
    """The worth of single weights, added up over a group's channels.

    Torch-Pruning's own Taylor and Hessian sort the places of a layer without the channels they belong to, pass batch
    norms over, and keep only the last image's gradient (1.6.1), hence this.
    """

    def __init__(self, worth: Mapping[nn.Parameter, Tensor]) -> None:
        self.worth = worth

    def __call__(self, group: Any) -> Tensor:
        total = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        graph = group._DG
        for item in group:
            leads = graph.is_out_channel_pruning_fn(item.dep.handler)
            places = self._places(item.dep.target.module, leads)
            if places is not None:
                total.index_add_(0, torch.tensor(item.root_idxs), places[list(item.idxs)].double().cpu())
        return total

    def _places(self, module: Any, leads: bool) -> Tensor | None:
        """Worth of each output (or input) channel of one layer."""
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            worth = self.worth[module.weight]
            turned = worth.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else worth
            if leads:
                rows = turned.flatten(1).sum(1)
                return rows if module.bias is None else rows + self.worth[module.bias]
            columns = turned.transpose(0, 1).flatten(1).sum(1)
            groups = getattr(module, "groups", 1)
            return self._by_group(module, worth, groups) if groups > 1 else columns
        if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
            rows = self.worth[module.weight]
            return rows if module.bias is None else rows + self.worth[module.bias]
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            q, k, v = self.worth[module.in_proj_weight].chunk(3)
            out = self.worth[module.out_proj.weight]
            return sum(part.sum(0) + part.sum(1) for part in (q, k, v, out))
        return None

    def _by_group(self, module: Any, worth: Tensor, groups: int) -> Tensor:
        """Input channel c of a grouped convolution is read by the outputs of its own group only."""
        if isinstance(module, nn.ConvTranspose2d):
            return worth.flatten(1).sum(1)
        blocks = worth.flatten(2).sum(2).reshape(groups, -1, worth.shape[1])
        return blocks.sum(1).flatten()
