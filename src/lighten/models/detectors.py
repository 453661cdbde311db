"""Detectors of others as networks with one raw output: torchvision's, and how any other is told what it must say of itself."""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lighten.errors import BadModel, UnknownName
from lighten.heads import Head, Level
from lighten.kit.boxes import anchors as anchors_of
from lighten.plugins import require
from lighten.types import Preprocess

Shape = tuple[int, int, int]
"""Channels, height, width of one input."""

KNOWN = ("ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn")  # fmt: skip
"""torchvision's detectors of one stage. Those of two (Faster R-CNN) choose regions inside the graph and have no raw output."""

BRANCHES = ("bbox_regression", "bbox_ctrness", "cls_logits")
"""What the heads of torchvision's detectors call their answers, in the order of raw outputs."""
LAST = ("bbox_reg", "bbox_ctrness", "cls_logits")
"""What they call the layers that give them."""
TOLERANCE = 1e-3
"""Pixels by which anchors that are told as levels may differ from those of the model."""


@runtime_checkable
class Detector(Protocol):
    """What makes any nn.Module a detector here: `forward` gives raw outputs (N, places, values)."""

    def head(self, input_shape: Shape) -> Head:
        """What they mean for inputs of this shape."""

    def head_layers(self) -> tuple[str, ...]:
        """Names of the last layer of each branch, which keep their width and are watched when they are quantized."""


class Raw(nn.Module):
    """A network of others, under `model`; a subclass says how its answers become raw outputs, and what they mean.

    Weights of the network alone, without the prefix "model.", fit too. Give the subclass `forward`, `head` and
    `head_layers` (see `Detector`) and `check` it once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def last_convolution(self, name: str) -> str:
        """Name of the last convolution in the part `name` of the network."""
        part = self.model.get_submodule(name)
        found = [k for k, m in part.named_modules() if isinstance(m, nn.Conv2d)]
        if not found:
            raise BadModel(
                f"{name} of {type(self.model).__name__} has no convolution.", "Name the last layers yourself."
            )
        return ".".join(["model", name, *([found[-1]] if found[-1] else [])])


class TorchvisionRaw(Raw):
    """torchvision's SSD, SSDLite, RetinaNet or FCOS without its transform and its post-processing.

    `skip` leading classes are left out of the answer of sigmoid heads: torchvision's training counts from 1, so that its
    class 0 is never learned. A softmax keeps its background. Inputs are normalised already (`preprocess`).
    """

    def __init__(self, model: nn.Module, skip: int = 1) -> None:
        super().__init__(model)
        detection = _detection()
        if not isinstance(model, (detection.ssd.SSD, detection.RetinaNet, detection.FCOS)):
            raise _unknown(model)
        self.softmax = isinstance(model, detection.ssd.SSD)
        self.skip = 0 if self.softmax else skip

    def forward(self, x: Tensor) -> Tensor:
        answers = self.model.head(_listed(self.model.backbone(x)))
        if self.skip:
            answers = {**answers, "cls_logits": answers["cls_logits"][..., self.skip :]}
        return torch.cat([answers[k] for k in BRANCHES if k in answers], 2)

    def head(self, input_shape: Shape) -> Head:
        """Read off the model's own anchor generator, without running the network. Raises BadModel where the levels do
        not give its anchors back, or its raw outputs are others than the head says."""
        maps, values = self._sizes(input_shape)
        anchors = self._anchors(input_shape, maps)
        counts = [k * self._per_place(level) for level, k in enumerate(rows * columns for rows, columns in maps)]
        parts = anchors.split(counts) if sum(counts) == len(anchors) else []
        if not parts:
            raise BadModel(f"{self._name} makes {len(anchors)} anchors where its maps have room for {sum(counts)}.")
        points = hasattr(self.model, "center_sampling_radius")
        levels = tuple(_level(part, *size, input_shape, points) for part, size in zip(parts, maps))
        head = self._head(levels, values)
        _same_anchors(head, anchors, self._name, input_shape)
        if (head.places, head.values) != (len(anchors), values):
            raise BadModel(
                f"{self._name} answers {len(anchors)} x {values} values, its head {head.places} x {head.values}."
            )
        return head

    def head_layers(self) -> tuple[str, ...]:
        found = []
        for branch in ("regression_head", "classification_head"):
            part = self.model.get_submodule(f"head.{branch}")
            listed = getattr(part, "module_list", None)
            names = [f"module_list.{k}" for k in range(len(listed))] if listed is not None else []
            names = names or [k for k in LAST if hasattr(part, k)]
            found += [self.last_convolution(f"head.{branch}.{k}") for k in names]
        return tuple(found)

    def preprocess(self, size: int | None = None) -> Preprocess:
        """How images become its inputs, as its transform says: mean, std, size.

        SSD stretches to its own size. The others scale the shorter side to `min_size` and pad; a fixed frame is
        letterboxed instead, `size` a side, or the multiple of 128 (the widest step) at or under `min_size`.
        """
        how: Any = self.model.transform
        rest = ("bilinear", "RGB", tuple(how.image_mean), tuple(how.image_std), f"torchvision's {self._name}")
        if how.fixed_size is not None and size is None:
            width, height = how.fixed_size
            return Preprocess(height, width, "stretch", None, *rest)
        side = size or max(128, how.min_size[-1] // 128 * 128)
        return Preprocess(side, side, "stretch" if how.fixed_size is not None else "letterbox", None, *rest)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _per_place(self, level: int) -> int:
        counts = self.model.anchor_generator.num_anchors_per_location()
        return int(counts[level])

    def _sizes(self, input_shape: Shape) -> tuple[list[tuple[int, int]], int]:
        """Rows and columns of each map, and values of one place, by a run on shapes alone (the meta device)."""
        maps: list[tuple[int, int]] = []
        hook = self.model.backbone.register_forward_hook(lambda _m, _i, out: maps.extend(map(_size, _listed(out))))
        training = [m for m in self.modules() if m.training]
        state = {k: v.to("meta") for k, v in [*self.named_parameters(), *self.named_buffers()]}
        try:
            with torch.no_grad(), torch.device("meta"):  # two inputs: one value a channel is too few for some norms
                out = functional_call(self.eval(), state, (torch.empty(2, *input_shape),))
        except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as e:
            raise BadModel(
                f"{self._name} does not take an input of {input_shape}: {str(e).splitlines()[0] if str(e) else e!r}.",
                "Check the input size and the number of channels.",
            ) from e
        finally:
            hook.remove()
            for m in training:
                m.training = True
        return maps, int(out.shape[2])

    def _anchors(self, input_shape: Shape, maps: list[tuple[int, int]]) -> Tensor:
        """What its own generator makes for one image: (places, 4) corners in pixels."""
        from torchvision.models.detection.image_list import ImageList

        _, height, width = input_shape
        images = ImageList(torch.empty(1).expand(1, 3, height, width), [(height, width)])
        generator = copy.deepcopy(self.model.anchor_generator)  # it remembers what it was asked
        found: Tensor = generator(images, [torch.empty(1).expand(1, 1, *size) for size in maps])[0]
        return found.double()

    def _head(self, levels: tuple[Level, ...], values: int) -> Head:
        model: Any = self.model
        if hasattr(model, "center_sampling_radius"):
            return Head(levels, values - 5, "distances", centerness=True)
        coder = model.box_coder
        score = "softmax" if self.softmax else "sigmoid"
        x, y, w, h = (float(v) for v in coder.weights)
        classes = values - 4 - self.softmax
        return Head(levels, classes, "offsets", score, weights=(x, y, w, h), clip=coder.bbox_xform_clip)


# --- in and out -----------------------------------------------------------------------------------


def detector(model: nn.Module) -> nn.Module:
    """`model` where it says of itself what a detector must, else the adapter of torchvision's. Raises BadModel for others.

    Who cannot change the class derives one from `Raw`.
    """
    if is_detector(model):
        return model
    return TorchvisionRaw(model)


def is_detector(model: Any) -> bool:
    """Whether it has `head` and `head_layers` as functions; a torchvision detector's `head` is a module."""
    return isinstance(model, Detector) and not isinstance(model.head, nn.Module)


def build(name: str, classes: int | None = None) -> TorchvisionRaw:
    """torchvision's detector `name` with random weights for `classes` classes (COCO's 90 if not given), background not
    counted. Nothing is downloaded. Raises UnknownName."""
    detection = _detection()
    if name not in KNOWN:
        raise UnknownName("torchvision detector of one stage", name, KNOWN)
    count = 91 if classes is None else classes + 1
    return TorchvisionRaw(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=count))


def classes_in(name: str, tensors: dict[str, Tensor]) -> int | None:
    """How many classes, background not counted, the weights of torchvision's detector `name` were made for.

    None where they are not weights of it.
    """
    with torch.device("meta"):
        fresh = build(name)
    ends = [k for k in fresh.head_layers() if "classification_head" in k]
    rows = {k: tensors.get(f"{k.removeprefix('model.')}.bias") for k in ends}
    counts = set()
    for k, bias in rows.items():
        anchors = fresh.get_submodule(k).out_channels // 91
        if bias is None or bias.ndim != 1 or len(bias) % anchors:
            return None
        counts.add(len(bias) // anchors)
    return counts.pop() - 1 if len(counts) == 1 else None


def check(model: nn.Module, input_shape: Shape, classes: int | None = None) -> Head:
    """The head of a detector, held to what it answers, and to the number of classes where that is known. Raises BadModel
    naming what does not fit together."""
    if not is_detector(model):
        raise _unknown(model)
    head: Head = model.head(input_shape)
    if classes is not None and head.classes != classes:
        raise BadModel(
            f"The detector has {head.classes} classes, the data {classes}.",
            "Check --classes and the data's class list.",
        )
    with torch.inference_mode():
        out = copy.deepcopy(model).eval()(torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)))
    want = (2, head.places, head.values)
    if not isinstance(out, Tensor) or tuple(out.shape) != want:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise BadModel(
            f"{type(model).__name__} answers {got} to two inputs of {input_shape}; its head says {want}.",
            "forward gives (N, places, values): box numbers, centerness, class scores, level by level, row by row.",
        )
    if not torch.isfinite(out).all():
        raise BadModel("The detector answers NaN or infinity for a random image.", "Check the weights.")
    layers = dict(model.named_modules())
    if missing := [k for k in model.head_layers() if k not in layers]:
        raise BadModel(f"{type(model).__name__} names the last layer {missing[0]!r}, which it does not have.")
    return head


def _detection() -> Any:
    require("torchvision", "compress", "use its detectors")
    from torchvision.models import detection

    return detection


def _unknown(model: nn.Module) -> BadModel:
    head = getattr(model, "head", getattr(model, "roi_heads", None))
    named = f" with the head {type(head).__name__}" if isinstance(head, nn.Module) else ""
    return BadModel(
        f"{type(model).__name__}{named} is no detector whose raw outputs are known.",
        "Derive a class from lighten.models.detectors.Raw whose forward gives (N, places, values), with head and head_layers.",
    )


def _listed(maps: Any) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps.values())


def _size(x: Tensor) -> tuple[int, int]:
    return int(x.shape[2]), int(x.shape[3])


# --- anchors --------------------------------------------------------------------------------------


def _level(anchors: Tensor, rows: int, columns: int, input_shape: Shape, points: bool) -> Level:
    """The level that has these anchors (rows * columns * A, 4), as far as they are a grid; `points`: one distance is the
    width of an anchor, which is no shape then."""
    grid = anchors.view(rows, columns, -1, 4)
    centres, sizes = (grid[..., :2] + grid[..., 2:]) / 2, grid[0, 0, :, 2:] - grid[0, 0, :, :2]
    step = (
        _spacing(centres[0, :, 0, 0], input_shape[2]),
        _spacing(centres[:, 0, 0, 1], input_shape[1]),
    )
    first = float(centres[0, 0, 0, 0]) / step[0]
    shapes = () if points else tuple((round(w, 6), round(h, 6)) for w, h in sizes.tolist())
    return Level(rows, columns, step, round(first, 6), shapes)


def _spacing(centres: Tensor, length: int) -> float:
    """Between neighbours; of one alone, the length of the image."""
    if len(centres) == 1:
        return float(length)
    return round(float(centres[-1] - centres[0]) / (len(centres) - 1), 6)


def _same_anchors(head: Head, anchors: Tensor, name: str, input_shape: Shape) -> None:
    centres, sizes = (torch.tensor(part).double() for part in anchors_of(head))
    off = (torch.cat([centres - sizes / 2, centres + sizes / 2], 1) - anchors).abs().amax(1)
    if float(off.max()) <= TOLERANCE:
        return
    at, starts = int(off.argmax()), [0]
    for level in head.levels:
        starts.append(starts[-1] + level.places)
    k = next(k for k, end in enumerate(starts[1:]) if at < end)
    level, size = head.levels[k], anchors[at, 2:] - anchors[at, :2]
    if not level.shapes:
        raise BadModel(
            f"{name} counts distances by {float(size[0]):g} pixels where its places are {level.step[0]:g} x "
            f"{level.step[1]:g} apart, with inputs of {input_shape[2]} x {input_shape[1]}.",
            "Choose a width and a height that are multiples of 128.",
        )
    raise BadModel(
        f"The anchors of {name} are no grid: number {at - starts[k]} of level {k} is {float(off.max()):.3g} pixels off."
    )
