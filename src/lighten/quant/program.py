"""A finished plan on disk: the exported program that every format is written from, without the code or data behind it."""

from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

from lighten.errors import BadBundle
from lighten.kit.onnx_graph import Packed
from lighten.kit.quiet import quiet
from lighten.kit.trace import trace
from lighten.quant.weight_only import float_graph

SUFFIX = ".pt2"
FIELDS = ("axis", "bits", "block", "dynamic")
MOST_BYTES = 4 << 30


def save(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write the program of `module` (float, or made by a plan; input (C, H, W)) to `path`, and what stands beside it:
    the integers of weights that a float graph holds. Inputs that are rounded as the network runs are left to the
    formats. Raises BadModel where the graph cannot be captured."""
    program = trace(_slim(float_graph(module)), shape)
    with quiet():
        torch.export.save(program, path)
    if packed := dict(getattr(module, "meta", {}).get("packed", {})):
        _beside(path).write_bytes(_packed_bytes(packed))


def read(path: Path) -> Any:
    """The module that `save` wrote, ready for any format. Raises BadBundle where the file is damaged or is none."""
    _check(path)
    try:
        with quiet():
            module = torch.export.load(path).module(check_guards=False)
    except Exception as e:
        raise BadBundle(f"{path} cannot be read: {type(e).__name__}: {str(e)[:200]}", "Run compress again.") from e
    if _beside(path).exists():
        module.meta["packed"] = _packed(_beside(path))
    return module


def files(path: Path) -> tuple[Path, ...]:
    """The program and what stands beside it."""
    return tuple(p for p in (path, _beside(path)) if p.exists())


def _beside(path: Path) -> Path:
    return path.with_suffix(".packed.npz")


def _slim(module: nn.Module) -> nn.Module:
    """A copy without the tensors that the graph no longer reads: float weights that became integers."""
    if not isinstance(module, GraphModule):
        return module
    module = copy.deepcopy(module)
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for owner, one in list(module.named_modules()):
        if any(owner == c or owner.startswith(f"{c}.") for c in called):
            continue
        for table in (one._parameters, one._buffers):
            for name in [n for n in table if (f"{owner}.{n}" if owner else n) not in read]:
                del table[name]
    return module


def _check(path: Path) -> None:
    """A zip archive of a sane size, before anything reads it."""
    if not path.is_file():
        raise BadBundle(f"{path} is missing.", "Run compress again: it writes the program beside the trials.")
    if not zipfile.is_zipfile(path):
        raise BadBundle(f"{path} is not a program: no zip archive.", "Run compress again.")
    with zipfile.ZipFile(path) as archive:
        if sum(i.file_size for i in archive.infolist()) > MOST_BYTES:
            raise BadBundle(f"{path} unpacks to more than {MOST_BYTES >> 30} GB.", "Do not use this file.")


def _packed_bytes(packed: dict[str, Packed]) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    for name, one in packed.items():
        arrays |= {f"{name}|q": one.q, f"{name}|scale": one.scale}
        arrays[f"{name}|how"] = np.array([int(getattr(one, f)) for f in FIELDS])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _packed(path: Path) -> dict[str, Packed]:
    with np.load(path, allow_pickle=False) as found:
        names = [k[: -len("|q")] for k in found.files if k.endswith("|q")]
        rows = {n: (found[f"{n}|q"], found[f"{n}|scale"], [int(v) for v in found[f"{n}|how"]]) for n in names}
    return {n: Packed(q, scale, h[0], h[1], h[2], bool(h[3])) for n, (q, scale, h) in rows.items()}
