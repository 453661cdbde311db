"""Boxes put inside an ONNX file: decoding and suppression behind the network, as kit/boxes has them in numpy."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lighten.errors import BadModel
from lighten.heads import Head
from lighten.kit.boxes import CANDIDATES, anchors, pairs
from lighten.plain import from_json, to_json
from lighten.types import Beside

BOXES = "boxes"
"""Name of the output, of the note in the file's metadata, and before every name that is added."""
COLUMNS = ("image", "x1", "y1", "x2", "y2", "score", "class")
MEANING = "image, x1, y1, x2, y2, score, class, in pixels of the input"
SAME_BOX, SAME_SCORE = 0.999, 1e-3
"""Overlap and score difference up to which a box out of a file is the one that numpy finds in its raw outputs."""
OPSET = 18
"""The first in which every reduction takes its axes as an input."""


@dataclass(frozen=True)
class BoxRules:
    """What `kit.boxes.detections` is told: the head, the size (width, height) that boxes are cut to where known, and
    score threshold, overlap, and most boxes of an image."""

    head: Head
    size: tuple[int, int] | None = None
    threshold: float = 0.3
    iou: float = 0.6
    most: int = 100


def into_onnx(model: Any, rules: BoxRules) -> Any:
    """Give an ONNX ModelProto with raw outputs (N, places, values) the output `boxes` in place of its own: float32
    (found, 7) of `COLUMNS`, image by image, best first. Changes and returns `model`.

    The steps are those of `kit.boxes.detections`, in the same order: the best candidates of all classes are chosen before
    anything is decoded, so that few boxes are; of equal scores the first wins. Standard operators alone; the thresholds
    are the constants boxes_threshold, boxes_iou, boxes_most. Raises BadModel where the outputs are not the head's.
    """
    raw = _raw_output(model, rules.head)
    tail = _Tail()
    found = _kept(tail, *_candidates(tail, raw, rules), rules)
    tail.node("Identity", found, out=BOXES)
    model.graph.node.extend(tail.nodes)
    model.graph.initializer.extend(tail.constants)
    _set_output(model, BOXES, ["found", len(COLUMNS)], f"float32 (found, {len(COLUMNS)}): {MEANING}")
    note = model.metadata_props.add()
    note.key, note.value = BOXES, json.dumps({"columns": COLUMNS, "raw": raw, **to_json(rules)})
    return model


def out_of_onnx(model: Any) -> Any:
    """The same model as before `into_onnx`: its own output, no boxes. Changes and returns `model`.

    Raises BadModel where there are no boxes inside.
    """
    note = next((p for p in model.metadata_props if p.key == BOXES), None)
    if note is None:
        raise BadModel("The ONNX file has no boxes inside.", "Give one that `lighten export --with-nms` wrote.")
    told = json.loads(note.value)
    head = from_json(Head, told["head"])
    model.metadata_props.remove(note)
    for group in (model.graph.node, model.graph.initializer):
        kept = [one for one in group if not one.name.startswith(f"{BOXES}_")]
        del group[:]
        group.extend(kept)
    _set_output(model, told["raw"], [_batch(model), head.places, head.values], "")
    return model


def _raw_output(model: Any, head: Head) -> str:
    """The name of the model's one output, checked."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OPSET:
        raise BadModel(f"The ONNX file has operator set {opset}; boxes inside need {OPSET}.", "Export it again.")
    (output,) = model.graph.output
    kind = output.type.tensor_type
    shape = [d.dim_value for d in kind.shape.dim]
    if kind.elem_type != 1 or len(shape) != 3 or shape[1:] != [head.places, head.values]:
        raise BadModel(
            f"The output of the ONNX file is {shape[1:]}; the head describes {[head.places, head.values]} in float32.",
            "Give the head of this network at this input size.",
        )
    return str(output.name)


def _set_output(model: Any, name: str, shape: list[int | str], told: str) -> None:
    from onnx import TensorProto, helper

    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape, told))


def _batch(model: Any) -> int | str:
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    return batch.dim_param or batch.dim_value


class _Tail:
    """Nodes and constants to be added, all named boxes_*."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.known: dict[Any, str] = {}

    def node(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """One node; the name of what it gives."""
        from onnx import helper

        name = f"{BOXES}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out or f"{name}_out"], name, **attributes))
        return out or f"{name}_out"

    def constant(self, value: Any, kind: Any = np.int64, name: str = "") -> str:
        """A stored array, equal ones without a name once; its name."""
        from onnx import numpy_helper

        array = np.asarray(value, kind)
        key = name or (str(array.dtype), array.shape, array.tobytes())
        name = f"{BOXES}_{name or len(self.constants)}"
        if key not in self.known:
            self.known[key] = name
            self.constants.append(numpy_helper.from_array(array, name))
        return self.known[key]

    def number(self, value: Any) -> str:
        return self.constant(value, np.float32)

    def threshold(self, rules: BoxRules) -> str:
        """(1,): scores above it count."""
        return self.constant([max(rules.threshold, 0.0)], np.float32, "threshold")

    def cut(self, x: str, start: int, end: int) -> str:
        """The values from `start` to `end` along the last axis."""
        return self.node("Slice", x, *(self.constant([v]) for v in (start, end, -1)))

    def filled(self, shape: str, value: int) -> str:
        """int32 everywhere."""
        from onnx import helper

        return self.node("ConstantOfShape", shape, value=helper.make_tensor("value", 6, [1], [value]))

    def finite(self, x: str) -> str:
        """bool (..., 1): nothing along the last axis is infinite or NaN, which times 0 are NaN."""
        nothing = self.node("Mul", x, self.number(0))
        return self.node("Not", self.node("IsNaN", self.node("ReduceSum", nothing, self.constant([-1]), keepdims=1)))

    def last(self, x: str) -> str:
        """(..., n) as (..., n, 1)."""
        return self.node("Unsqueeze", x, self.constant([-1]))


def _candidates(t: _Tail, raw: str, rules: BoxRules) -> tuple[str, str, str]:
    """The best candidates of each image: boxes (N, K, 4), scores and classes (N, K); what is no box scores 0."""
    head = rules.head
    scores = t.node("Reshape", _scores(t, raw, head), t.constant([0, -1]))
    score, row = f"{BOXES}_best", f"{BOXES}_rows"
    t.nodes.append(_top(scores, _count(t, scores, rules), score, row))
    each = t.constant(head.classes)
    place, kind = t.node("Div", row, each), t.node("Mod", row, each)
    mine = t.node("GatherND", raw, t.last(place), batch_dims=1)
    corners = _corners(t, t.cut(mine, 0, head.numbers), place, head)
    if rules.size is not None:
        corners = t.node("Min", t.node("Max", corners, t.number(0)), t.number([*rules.size] * 2))
    sides = t.node("Sub", t.cut(corners, 2, 4), t.cut(corners, 0, 2))
    wide = t.node("Greater", t.node("ReduceMin", sides, t.constant([-1]), keepdims=1), t.number(0))
    whole = t.node("Squeeze", t.node("And", t.finite(corners), wide), t.constant([-1]))
    return corners, t.node("Where", whole, score, t.number(0)), kind


def _count(t: _Tail, scores: str, rules: BoxRules) -> str:
    """How many candidates: as many as score above the threshold in the image that has most of them, so that quiet images
    cost little; at least 1, which every runtime takes."""
    above = t.node("Cast", t.node("Greater", scores, t.threshold(rules)), to=7)
    each = t.node("ReduceSum", above, t.constant([-1]), keepdims=0)
    most = t.node("ReduceMax", each, t.constant([0]), keepdims=1)
    limit = min(CANDIDATES, rules.head.places * rules.head.classes)
    return t.node("Max", t.node("Min", most, t.constant([limit])), t.constant([1]))


def _top(scores: str, k: str, score: str, row: str) -> Any:
    """The node of two outputs: the highest scores and where they are; of equal ones the first."""
    from onnx import helper

    return helper.make_node("TopK", [scores, k], [score, row], f"{BOXES}_top", axis=-1, largest=1, sorted=1)


def _scores(t: _Tail, raw: str, head: Head) -> str:
    """Scores (N, places, classes); 0 where a value of the place is not finite."""
    first = head.numbers + head.centerness
    logits = t.cut(raw, first, head.values)
    if head.score == "softmax":
        scores = t.cut(t.node("Softmax", logits, axis=-1), 1, head.classes + 1)
    else:
        scores = t.node("Sigmoid", logits)
    if head.centerness:
        centre = t.node("Sigmoid", t.cut(raw, head.numbers, first))
        scores = t.node("Sqrt", t.node("Mul", scores, centre))
    return t.node("Where", t.finite(raw), scores, t.number(0))


def _corners(t: _Tail, numbers: str, place: str, head: Head) -> str:
    """Box numbers (N, K, numbers) of the places (N, K) as corners (N, K, 4)."""
    middles, spans = anchors(head)
    centre = t.node("Gather", t.constant(middles, np.float32, "centres"), place, axis=0)
    size = t.node("Gather", t.constant(spans, np.float32, "sizes"), place, axis=0)
    if head.box == "offsets":
        moved = t.node("Div", numbers, t.number(head.weights))
        middle = t.node("Add", t.node("Mul", t.cut(moved, 0, 2), size), centre)
        grown = t.node("Exp", t.node("Min", t.cut(moved, 2, 4), t.number(head.clip)))
        half = t.node("Mul", t.node("Mul", grown, size), t.number(0.5))
        ends = t.node("Sub", middle, half), t.node("Add", middle, half)
        return t.node("Concat", *ends, axis=-1)
    if head.box == "distribution":
        bins = t.node("Softmax", t.node("Reshape", numbers, t.constant([0, 0, 4, head.bins])), axis=-1)
        mean = t.node("MatMul", bins, t.number(np.arange(head.bins)[:, None]))
        numbers = t.node("Squeeze", mean, t.constant([-1]))
    reach = t.node("Relu", numbers)
    low = t.node("Sub", centre, t.node("Mul", t.cut(reach, 0, 2), size))
    high = t.node("Add", centre, t.node("Mul", t.cut(reach, 2, 4), size))
    return t.node("Concat", low, high, axis=-1)


def _kept(t: _Tail, corners: str, score: str, kind: str, rules: BoxRules) -> str:
    """What is left of the candidates: (found, 7).

    Suppression gives its picks class by class; marked in the candidates' own order, which is best first, they are
    counted, and the first `most` of each image stay.
    """
    first = t.constant([1])
    classes = t.constant(np.arange(rules.head.classes)[None, :, None])
    mine = t.node("Equal", t.node("Unsqueeze", kind, first), classes)
    apart = t.node("Where", mine, t.node("Unsqueeze", score, first), t.number(0))
    most = t.constant([rules.most], name="most")
    iou = t.constant([rules.iou], np.float32, "iou")
    picks = t.node("NonMaxSuppression", corners, apart, most, iou, t.threshold(rules))
    at = t.node("Gather", picks, t.constant([0, 2]), axis=1)
    ones = t.filled(t.node("Shape", picks, start=0, end=1), 1)
    marks = t.node("ScatterND", t.filled(t.node("Shape", score), 0), at, ones)
    rank = t.node("Cast", t.node("CumSum", marks, t.constant(1)), to=7)
    stays = t.node("And", t.node("Cast", marks, to=9), t.node("LessOrEqual", rank, most))
    rows = t.node("Transpose", t.node("NonZero", stays), perm=[1, 0])
    columns = corners, t.last(score), t.last(t.node("Cast", kind, to=1))
    chosen = t.node("GatherND", t.node("Concat", *columns, axis=-1), rows)
    image = t.node("Cast", t.cut(rows, 0, 1), to=1)
    return t.node("Concat", image, chosen, axis=1)


# --- whether they are the same boxes -------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxesFound:
    """How many boxes a file gave for `images` images, how many numpy finds in its raw outputs, and how many are in both;
    `added_ms` is how much longer one image takes with them than without, in turns; nan where no times were taken."""

    images: int
    given: int
    wanted: int
    both: int
    added_ms: float = math.nan

    @property
    def same(self) -> float:
        """Percent of all that are in both."""
        total = self.given + self.wanted
        return 200.0 * self.both / total if total else 100.0

    def __str__(self) -> str:
        more = "" if math.isnan(self.added_ms) else f", {self.added_ms:+.2f} ms for them"
        return f"{self.given} boxes in {self.images} images, {self.same:.1f} % as in numpy{more}"


def boxes_found(wanted: Sequence[np.ndarray], given: np.ndarray, beside: Beside | None = None) -> BoxesFound:
    """What a file gave, (found, 7) of `COLUMNS`, held to what numpy finds: (K, 6) for each image. `beside`: times of the
    file, and of the same without boxes."""
    mine = (given[given[:, 0] == n, 1:] for n in range(len(wanted)))
    both = sum(len(pairs(a, b, SAME_BOX, SAME_SCORE)[0]) for a, b in zip(wanted, mine))
    added = statistics.median(beside.ms) - statistics.median(beside.original_ms) if beside else math.nan
    return BoxesFound(len(wanted), len(given), sum(map(len, wanted)), both, added)
