"""Which operators a network is made of, and which of them the ONNX exporter has no word for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from lighten.kit.trace import trace

AHEAD = ("quantized_decomposed.", "_operator.", "aten._assert")
"""Prefixes of what every writer of a plan knows by itself, or leaves out."""


def operators(module: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """How often each ATen operator stands in the program that is exported: {"aten.conv2d.default": 20, ...}.

    `shape` is (C, H, W). Raises BadModel where the graph cannot be captured.
    """
    return of_graph(trace(module, shape))


def of_graph(program: Any) -> dict[str, int]:
    """The same of a graph that was captured already."""
    counted = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    return {k: v for k, v in counted.items() if not k.startswith(("<", "sym_", "aten.sym_"))}


def overload(name: str) -> Any:
    """The operator by that name (out of place where it has such a twin), or None where this torch has none."""
    namespace, packet, kind = (*name.split("."), "default")[:3]
    for one in (packet.removesuffix("_"), packet):
        found = getattr(getattr(getattr(torch.ops, namespace, None), one, None), kind, None)
        if found is not None:
            return found
    return None


def lacks_onnx(operators: Mapping[str, int]) -> str | None:
    """Why torch's ONNX exporter cannot write a network of these operators: the first without a translation."""
    for name, count in operators.items():
        if not name.startswith(AHEAD) and not _translated(name):
            return f"ONNX has no translation of {name} ({count} in this network)"
    return None


@cache
def _translated(name: str) -> bool:
    one = overload(name)
    return one is not None and (one in _known() or one._can_decompose())


@cache
def _known() -> frozenset[Any]:
    """Operators that torch's exporter translates, and those it takes apart into such ones."""
    from torch.onnx._internal.exporter import _decomp, _registration

    written = set(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))
    return frozenset(written | set(_decomp.create_onnx_friendly_decomposition_table(written)))
