"""Image classification: top-1, how sure we are of it, and what changed per class."""

from __future__ import annotations

from typing import Any

import numpy as np

from lighten.types import ClassChange, Estimate

METRIC = "top1"
REQUIRES = ()


def score(outputs: np.ndarray, labels: np.ndarray) -> Estimate:
    """Top-1 in percent with its binomial standard error. `outputs` (N, classes), `labels` (N,)."""
    return _share(outputs.argmax(1) == labels)


def extra(outputs: np.ndarray, labels: np.ndarray) -> tuple[tuple[str, Estimate], ...]:
    """Top-5 where there are over 20 classes."""
    if outputs.shape[1] <= 20:
        return ()
    five = np.argpartition(-outputs, 5, axis=1)[:, :5]
    return (("top5", _share((five == labels[:, None]).any(1))),)


def drop(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Estimate:
    """Points of top-1 lost, and its standard error over the *same* images, which is far smaller than that of two
    separate scores: only images that changed sides count (McNemar, 1947)."""
    lost = (before.argmax(1) == labels).astype(float) - (after.argmax(1) == labels)
    n = len(lost)
    error = lost.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    return Estimate(100 * float(lost.mean()), 100 * float(error), n)


def flipped(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Rows whose answer changed."""
    return np.flatnonzero(before.argmax(1) != after.argmax(1))


def agreement(reference: np.ndarray, got: np.ndarray) -> float:
    """Percent of images with the same top-1."""
    return 100.0 * float((reference.argmax(1) == got.argmax(1)).mean())


def drift(before: np.ndarray, after: np.ndarray) -> None:
    """Nothing beside the answers: a classifier has no boxes that could move."""


def per_class(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, names: tuple[str, ...]
) -> tuple[ClassChange, ...]:
    """Accuracy of each class before and after, in percent; classes without images are left out."""
    rows = []
    for k, name in enumerate(names):
        mine = labels == k
        if mine.any():
            rows.append(
                ClassChange(
                    name,
                    100 * float((before[mine].argmax(1) == k).mean()),
                    100 * float((after[mine].argmax(1) == k).mean()),
                    int(mine.sum()),
                )
            )
    return tuple(rows)


def decode(outputs: np.ndarray, names: tuple[str, ...], top: int = 5) -> list[tuple[str, float]]:
    """The `top` names of one image with their softmax probability. `outputs` (classes,)."""
    z = np.exp(outputs - outputs.max())
    p = z / z.sum()
    return [(names[k], float(p[k])) for k in np.argsort(-p)[:top]]


def loss(model: Any, x: Any, y: Any, label_smoothing: float = 0.0) -> Any:
    """Cross-entropy of a batch."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(x).float(), y, label_smoothing=label_smoothing)


def distill_loss(student: Any, teacher: Any, temperature: float = 4.0) -> Any:
    """KL from the teacher's softened answers, times T^2 (Hinton et al., 2015, "Distilling the Knowledge in a NN")."""
    from torch.nn.functional import kl_div, log_softmax

    t = temperature
    logs = log_softmax(student.float() / t, 1), log_softmax(teacher.float() / t, 1)
    return kl_div(*logs, reduction="batchmean", log_target=True) * t * t


def dkd_loss(
    student: Any, teacher: Any, labels: Any = None, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Any:
    """alpha * TCKD + beta * NCKD, times T^2 (Zhao et al., 2022, "Decoupled Knowledge Distillation", eq. 7).

    TCKD is the KL of (target, all others), NCKD that of the others among themselves; both outputs are (N, classes).
    Without `labels` (N,) the target is the class that the teacher finds most likely.
    """
    import torch
    from torch.nn.functional import kl_div, one_hot

    n, classes = student.shape
    target = one_hot(teacher.argmax(1) if labels is None else labels, classes).bool()

    def parts(outputs: Any) -> tuple[Any, Any]:
        z = outputs.float() / temperature
        rest = z[~target].view(n, classes - 1)
        two = torch.stack([z[target], rest.logsumexp(1)], 1).log_softmax(1)
        return two, rest.log_softmax(1)

    (ours, our_rest), (theirs, their_rest) = parts(student), parts(teacher)
    tckd = kl_div(ours, theirs, reduction="batchmean", log_target=True)
    nckd = kl_div(our_rest, their_rest, reduction="batchmean", log_target=True)
    return (alpha * tckd + beta * nckd) * temperature**2


def damage(before: Any, after: Any) -> Any:
    """How far answers are from those `before`, one value an image: KL of their softmax in nats, float64, never under 0."""
    from lighten.quant.sensitivity import divergences

    return divergences(before, after)


def protect(model: Any) -> tuple[str, ...]:
    """Names of layers whose outputs are the answer and must keep their width: the last Linear or convolution."""
    from torch import nn

    ends = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return tuple(ends[-1:])


def _share(right: np.ndarray) -> Estimate:
    n = len(right)
    p = float(right.mean()) if n else float("nan")
    return Estimate(100 * p, 100 * float(np.sqrt(p * (1 - p) / n)) if n else float("nan"), n)
