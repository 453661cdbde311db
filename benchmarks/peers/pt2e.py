"""torchao's PT2E with ExecuTorch's XNNPACKQuantizer at its defaults, exported to ONNX."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from peer import Job, Made, Make, run
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


def contenders(job: Job) -> dict[str, Make]:
    return {
        "torchao PT2E, XNNPACKQuantizer default": partial(make, job, False),
        "torchao PT2E, XNNPACKQuantizer per channel": partial(make, job, True),
    }


def make(job: Job, per_channel: bool, folder: Path) -> Made:
    example = (torch.from_numpy(job.calibration[:2].copy()),)
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    program = torch.export.export(job.model(), example, dynamic_shapes=(batch,))
    prepared = prepare_pt2e(program.module(), quantizer(job, per_channel))
    with torch.no_grad():
        for x in job.batches():
            prepared(x)
    again = torch.export.export(convert_pt2e(prepared), example, dynamic_shapes=(batch,))
    torch.onnx.export(
        again,
        dynamo=True,
        input_names=["input"],
        output_names=["output"],
        verbose=False,
        external_data=False,
        f=str(folder / "model.onnx"),
    )
    return Made("" if job.weight_bits == 8 else "weight_qmin/qmax -7..7, stored as int8; first and last layer 8 bits")


def quantizer(job: Job, per_channel: bool) -> XNNPACKQuantizer:
    eight = get_symmetric_quantization_config(is_per_channel=per_channel)
    if job.weight_bits == 8:
        return XNNPACKQuantizer().set_global(eight)
    few = get_symmetric_quantization_config(is_per_channel=per_channel, weight_qmin=-7, weight_qmax=7)
    return EndsAtEight(eight.weight).set_global(few)


class EndsAtEight(XNNPACKQuantizer):
    """First and last layer with weights of `spec`. `set_module_name` would leave a convolution with a ReLU float: it
    asks for the whole pattern to lie in one module."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec

    def annotate(self, model: Any) -> Any:
        model = super().annotate(model)
        kinds = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
        layers = [node for node in model.graph.nodes if node.target in kinds]
        for node in (layers[0], layers[-1]):
            node.meta["quantization_annotation"].input_qspec_map[node.args[1]] = self.spec
        return model


if __name__ == "__main__":
    run(contenders, "torchao", "executorch")
