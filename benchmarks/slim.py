"""What onnxslim does to the files that lighten writes: nodes, bytes, answers, time; nothing where it helps nothing.

python benchmarks/slim.py MODEL.onnx [MODEL.onnx ...]
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxslim

import common
from lighten.formats import onnx as onnx_format

HEADER = ("file", "nodes", "bytes", "answers", "ms: ours, slimmed", "what it changed")
IMAGES = 64


def main() -> None:
    common.put("slim", common.table(HEADER, [row(Path(name)) for name in sys.argv[1:]]))


def row(path: Path) -> list[str]:
    """One file beside what onnxslim makes of it."""
    ours = onnx.load(str(path))
    slim = onnxslim.slim(copy.deepcopy(ours))
    before, after = ours.SerializeToString(), slim.SerializeToString()
    with tempfile.TemporaryDirectory() as room:
        (file := Path(room) / "slim.onnx").write_bytes(after)
        runs = {"ours": onnx_format.load(path, 1), "slim": onnx_format.load(file, 1)}
        shape = [d.dim_value for d in ours.graph.input[0].type.tensor_type.shape.dim][1:]
        x = np.random.default_rng(0).standard_normal((IMAGES, *shape), np.float32)
        first, second = (run(x) for run in runs.values())
        ms = common.medians(common.interleaved_ms(runs, x[:1]))
    gap = float(np.abs(first - second).max())
    return [
        f"{path.parent.parent.parent.name} {path.parent.name}",
        f"{len(ours.graph.node)} → {len(slim.graph.node)}",
        f"{len(before):,} → {len(after):,} ({100 * (len(after) / len(before) - 1):+.2f} %)",
        "the same, bit for bit" if gap == 0 else f"differ by {gap:.2g}",
        f"{ms['ours']:.3f}, {ms['slim']:.3f}",
        changes(ours, slim),
    ]


def changes(ours: onnx.ModelProto, slim: onnx.ModelProto) -> str:
    """Operators by how many more or fewer there are."""
    one, two = (Counter(node.op_type for node in m.graph.node) for m in (ours, slim))
    return ", ".join(f"{two[k] - one[k]:+d} {k}" for k in sorted(one | two) if one[k] != two[k]) or "nothing"


if __name__ == "__main__":
    main()
