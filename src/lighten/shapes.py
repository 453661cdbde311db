"""What a network's layers will measure once channel groups are narrower: arithmetic on nouns, nothing is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lighten.types import ChannelGroup, LayerShape


def resized(
    shapes: Mapping[str, LayerShape], groups: Iterable[ChannelGroup], widths: Mapping[str, int]
) -> dict[str, LayerShape]:
    """The layer shapes at `widths` (channels by group name); groups that are not named keep theirs.

    A layer that follows several groups (concatenation) loses what each of them loses. Depthwise convolutions keep one
    group a channel; grouped ones keep their number of groups.
    """
    gone_out: Counter[str] = Counter()
    gone_in: Counter[str] = Counter()
    for group in groups:
        fewer = group.channels - widths.get(group.name, group.channels)
        for gone, layers in ((gone_out, group.outputs), (gone_in, group.inputs)):
            for layer, features in layers:
                gone[layer] += fewer * features
    return {name: _narrowed(shape, gone_in[name], gone_out[name]) for name, shape in shapes.items()}


def is_depthwise(shape: LayerShape) -> bool:
    """Whether each channel has a filter of its own, so that inputs, outputs and groups are one number."""
    return shape.groups > 1 and shape.groups == shape.inputs == shape.outputs


def _narrowed(shape: LayerShape, fewer_in: int, fewer_out: int) -> LayerShape:
    outputs = shape.outputs - fewer_out
    if is_depthwise(shape):
        return replace(shape, inputs=outputs, outputs=outputs, groups=outputs)
    return replace(shape, inputs=shape.inputs - fewer_in, outputs=outputs)
