"""Detectors of others: raw outputs and head give torchvision's own boxes, scores and labels; what is not known is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms

from lighten.errors import BadModel, UnknownName
from lighten.heads import Head, Level
from lighten.kit.boxes import decode
from lighten.kit.raw_boxes import places
from lighten.kit.trace import trace
from lighten.models import detectors
from lighten.models.load import fill

torch.set_num_threads(1)

SIZES = {
    "ssdlite320_mobilenet_v3_large": (320, 320),
    "retinanet_resnet50_fpn": (128, 160),
    "retinanet_resnet50_fpn_v2": (128, 128),
    "fcos_resnet50_fpn": (128, 256),
}
CLASSES = 5


@cache
def built(name: str) -> detectors.TorchvisionRaw:
    """With lived-in batch norms, and last layers that find something in any image."""
    torch.manual_seed(0)
    raw = detectors.build(name, CLASSES)
    model: Any = raw.model
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    if not raw.softmax:
        model.transform.min_size, model.transform.max_size = (min(SIZES[name]),), max(SIZES[name])
    x = model.transform(images(name))[0].tensors
    with torch.no_grad():
        raw.train()
        raw(x)
        lasts: list[Any] = [raw.get_submodule(layer) for layer in raw.head_layers()]
        seen: dict[Any, list[Tensor]] = {last: [last.bias.zero_()] for last in lasts}
        hooks = [m.register_forward_hook(lambda m, _i, out: seen[m].append(out.abs().max())) for m in lasts]
        raw.eval()(x)
        for last, hook in zip(lasts, hooks):
            hook.remove()
            last.weight.mul_((3 if last.out_channels % 4 else 1) / max(seen[last][1:]))
    if not raw.softmax:  # its class 0 is no class of ours, so that it must not be found
        with torch.no_grad():
            model.head.classification_head.cls_logits.bias.view(-1, CLASSES + 1)[:, 0] = -50
    return raw


def images(name: str, n: int = 2) -> list[Tensor]:
    dice = torch.Generator().manual_seed(3)
    coarse = torch.rand(n, 3, 8, 8, generator=dice)
    smooth = nn.functional.interpolate(coarse, SIZES[name], mode="bilinear")
    return list((smooth + 0.1 * torch.rand(n, 3, *SIZES[name], generator=dice)).clamp(0, 1))


def decoded(raw: np.ndarray, head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (P, 4) and scores (P, classes) of one image, in double precision, by what the docstring of Head says."""
    numbers, rest = np.split(raw.astype(np.float64), [head.numbers], 1)
    boxes, place = [], 0
    for level in head.levels:
        for row in range(level.rows):
            for column in range(level.columns):
                x, y = (column + level.offset) * level.step[0], (row + level.offset) * level.step[1]
                for w, h in level.shapes or [level.step]:
                    a = numbers[place]
                    place += 1
                    if head.box == "offsets":
                        a = a / head.weights
                        cx, cy = x + a[0] * w, y + a[1] * h
                        w, h = w * np.exp(min(a[2], head.clip)), h * np.exp(min(a[3], head.clip))
                        boxes.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
                    else:
                        left, top, right, bottom = np.maximum(a, 0)
                        boxes.append((x - left * w, y - top * h, x + right * w, y + bottom * h))
    if head.score == "softmax":
        e = np.exp(rest - rest.max(1, keepdims=True))
        return np.array(boxes), (e / e.sum(1, keepdims=True))[:, 1:]
    p = 1 / (1 + np.exp(-rest))
    return np.array(boxes), np.sqrt(p[:, 1:] * p[:, :1]) if head.centerness else p


def found(raw: np.ndarray, head: Head, model: Any, size: tuple[int, int]) -> list[Tensor]:
    """Boxes, scores and labels after thresholds and suppression as torchvision's models do them."""
    boxes, scores = (torch.from_numpy(a) for a in decoded(raw, head))
    boxes = boxes.reshape(-1, 2, 2).clamp(min=0).minimum(torch.tensor([size[1], size[0]])).reshape(-1, 4)
    if head.score == "softmax":
        parts = [torch.arange(len(boxes))[:, None] * head.classes + k for k in range(head.classes)]
    else:
        parts = list(torch.arange(scores.numel()).split([level.places * head.classes for level in head.levels]))
    kept = []
    for part in parts:
        part = part.flatten()
        part = part[scores.flatten()[part] > model.score_thresh]
        kept.append(part[scores.flatten()[part].topk(min(model.topk_candidates, len(part))).indices])
    at = torch.cat(kept)
    place, label = at // head.classes, at % head.classes
    chosen, sure = boxes[place].float(), scores.flatten()[at].float()
    keep = batched_nms(chosen, sure, label, model.nms_thresh)[: model.detections_per_img]
    return [chosen[keep], sure[keep], label[keep] + 1]


@pytest.mark.parametrize("name", SIZES)
def test_raw_outputs_and_head_give_torchvisions_own_detections(name: str) -> None:
    raw, size = built(name), SIZES[name]
    model: Any = raw.model
    with torch.inference_mode():
        theirs = model(images(name))
        x = model.transform(images(name))[0].tensors
        assert x.shape[2:] == size
        answers = raw(x).numpy()
    head = raw.head((3, *size))
    for ours, reference in zip(decode(answers[:1], head), decoded(answers[0], head)):
        np.testing.assert_allclose(ours[0], reference, rtol=1e-4, atol=1e-3)
    for answer, want in zip(answers, theirs):
        boxes, scores, labels = found(answer, head, model, size)
        assert len(want["boxes"]) == len(boxes) > 20
        same = labels[:, None] == want["labels"]
        same &= (scores[:, None] - want["scores"]).abs() < 1e-4
        same &= (boxes[:, None] - want["boxes"]).abs().amax(2) < 2e-2
        assert bool(same.any(0).all())  # in any order: rounding swaps scores that are nearly equal
        assert bool(same.any(1).all())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [(256, 384), (200, 300)])
def test_levels_are_the_generators_anchors_at_other_sizes_too(name: str, size: tuple[int, int]) -> None:
    raw = built(name)
    model: Any = raw.model
    if "fcos" in name and size != (256, 384):
        with pytest.raises(BadModel, match="multiples of 128"):
            raw.head((3, *size))
        return
    head = raw.head((3, *size))
    maps = [torch.zeros(1, 1, level.rows, level.columns) for level in head.levels]
    anchors = model.anchor_generator(ImageList(torch.zeros(1, 3, *size), [size]), maps)[0]
    torch.testing.assert_close(places(head, torch.device("cpu")).corners, anchors, rtol=0, atol=1e-3)


def test_reading_the_head_runs_no_network_and_leaves_it_as_it_was() -> None:
    raw = built("ssdlite320_mobilenet_v3_large")
    before = {k: v.clone() for k, v in raw.state_dict().items()}
    raw.train()
    raw.head((3, 320, 320))
    assert all(m.training for m in raw.modules())
    raw.eval()
    assert all(torch.equal(v, before[k]) for k, v in raw.state_dict().items())


def test_last_layers_are_the_ones_that_answer() -> None:
    raw = built("ssdlite320_mobilenet_v3_large")
    widths = {raw.get_submodule(k).out_channels for k in raw.head_layers()}
    assert widths == {6 * 4, 6 * (CLASSES + 1)}
    assert len(raw.head_layers()) == 12
    assert set(built("fcos_resnet50_fpn").head_layers()) == {
        "model.head.regression_head.bbox_reg",
        "model.head.regression_head.bbox_ctrness",
        "model.head.classification_head.cls_logits",
    }


def test_preprocessing_is_the_transforms() -> None:
    ssd = built("ssdlite320_mobilenet_v3_large").preprocess()
    assert (ssd.width, ssd.height, ssd.mode, ssd.mean) == (320, 320, "stretch", (0.5, 0.5, 0.5))
    how = detectors.build("fcos_resnet50_fpn", 2).preprocess()
    assert (how.width, how.height, how.mode, how.std) == (768, 768, "letterbox", (0.229, 0.224, 0.225))


def test_traced_once_it_takes_any_batch() -> None:
    raw = built("ssdlite320_mobilenet_v3_large")
    program = trace(raw, (3, 320, 320)).module()
    x = torch.randn(3, 3, 320, 320)
    torch.testing.assert_close(program(x), raw(x), rtol=1e-4, atol=1e-4)


def test_weights_of_the_model_alone_fit_and_say_how_many_classes_they_have() -> None:
    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(1)
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=8).eval()
    tensors = theirs.state_dict()
    assert detectors.classes_in(name, tensors) == 7
    assert detectors.classes_in(name, {"fc.bias": torch.zeros(3)}) is None
    raw = detectors.build(name, 7).eval()
    fill(raw, tensors, "weights.pth", f"torchvision:{name}")
    x = torch.rand(1, 3, 320, 320)
    out = theirs.head(list(theirs.backbone(x).values()))
    assert torch.equal(raw(x), torch.cat([out["bbox_regression"], out["cls_logits"]], 2))


# --- any other network ----------------------------------------------------------------------------


class Centers(nn.Module):
    """Like CenterNet (Zhou et al., 2019): a heat map of centres, and half widths and heights in steps of 4 pixels."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.heat = nn.Conv2d(16, classes, 1)
        self.size = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"heat": self.heat(y), "size": self.size(y).relu()}


class CentersRaw(detectors.Raw):
    """Half a width to the left is half a width to the right."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return torch.cat([out["size"], out["size"], out["heat"]], 1).permute(0, 2, 3, 1).flatten(1, 2)

    def head(self, input_shape: detectors.Shape) -> Head:
        rows, columns = (-(-k // 4) for k in input_shape[1:])
        return Head((Level(rows, columns, (4.0, 4.0)),), self.model.heat.out_channels)

    def head_layers(self) -> tuple[str, ...]:
        return (self.last_convolution("size"), self.last_convolution("heat"))


def test_a_detector_that_is_none_of_these_needs_a_class_of_ten_lines() -> None:
    model = Centers()
    raw = CentersRaw(model)
    head = detectors.check(raw, (3, 32, 48))
    assert (head.places, head.values) == (8 * 12, 7)
    assert detectors.detector(raw) is raw
    x = torch.randn(2, 3, 32, 48)
    boxes, scores = decoded(raw(x)[1].detach().numpy(), head)
    out = {k: v.detach() for k, v in model(x).items()}
    w, h = (float(v) for v in out["size"][1, :, 5, 7])
    np.testing.assert_allclose(boxes[5 * 12 + 7], [30 - 4 * w, 22 - 4 * h, 30 + 4 * w, 22 + 4 * h], rtol=1e-5)
    np.testing.assert_allclose(scores[5 * 12 + 7], out["heat"][1, :, 5, 7].sigmoid(), rtol=1e-5)
    torch.testing.assert_close(trace(raw, (3, 32, 48)).module()(x), raw(x))


def test_what_an_adapter_gets_wrong_is_named() -> None:
    class Short(CentersRaw):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 1:]

    class Nameless(CentersRaw):
        def head_layers(self) -> tuple[str, ...]:
            return ("model.sizes",)

    with pytest.raises(BadModel, match=r"answers \(2, 95, 7\)[\s\S]*\(2, 96, 7\)"):
        detectors.check(Short(Centers()), (3, 32, 48))
    with pytest.raises(BadModel, match=r"model\.sizes"):
        detectors.check(Nameless(Centers()), (3, 32, 48))


def test_detectors_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(BadModel, match="Centers"):
        detectors.detector(Centers())
    with pytest.raises(BadModel, match="Centers"):
        detectors.check(Centers(), (3, 32, 48))
    with pytest.raises(UnknownName, match="fasterrcnn"):
        detectors.build("fasterrcnn_resnet50_fpn")
    two = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(BadModel, match=r"FasterRCNN[\s\S]*RoIHeads"):
        detectors.detector(two)


def test_anchors_that_are_no_grid_are_refused() -> None:
    raw = detectors.build("ssdlite320_mobilenet_v3_large", 2)

    class Uneven(nn.Module):
        def __init__(self, real: Any) -> None:
            super().__init__()
            self.real = real

        def num_anchors_per_location(self) -> list[int]:
            return self.real.num_anchors_per_location()

        def forward(self, *args: Any) -> list[Tensor]:
            return [a + torch.linspace(0, 1, len(a))[:, None] ** 2 for a in self.real(*args)]

    raw.model.anchor_generator = Uneven(raw.model.anchor_generator)
    with pytest.raises(BadModel, match="no grid"):
        raw.head((3, 320, 320))


def test_a_size_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(BadModel, match="does not take"):
        built("ssdlite320_mobilenet_v3_large").head((4, 320, 320))
