"""Sony's Model Compression Toolkit: its post-training quantization at its defaults, for its default target (IMX500)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import model_compression_toolkit as mct
import numpy as np
import torch
from model_compression_toolkit.core.common.matchers.node_matcher import BaseNodeMatcher
from model_compression_toolkit.exporter.model_exporter.pytorch.export_serialization_format import (
    PytorchExportSerializationFormat as Serialization,
)
from peer import Job, Made, Make, answers, first_line, run


def contenders(job: Job) -> dict[str, Make]:
    made = {"MCT, default": partial(by_default, job)}
    if job.weight_bits != 8:
        made["MCT, gradient-based (GPTQ)"] = partial(by_gradients, job)
    return made


def by_default(job: Job, folder: Path) -> Made:
    module, _ = mct.ptq.pytorch_post_training_quantization(job.model(), images(job), core_config=config(job))
    return finish(job, module, folder)


def by_gradients(job: Job, folder: Path) -> Made:
    """As many steps over the calibration images as AdaRound takes for one layer: it trains all layers at once."""
    epochs = max(1, round(job.iterations * 32 / len(job.calibration)))
    tuning = mct.gptq.get_pytorch_gptq_config(n_epochs=epochs)
    module, _ = mct.gptq.pytorch_gradient_post_training_quantization(
        job.model(), images(job), core_config=config(job), gptq_config=tuning, gptq_representative_data_gen=images(job)
    )
    return finish(job, module, folder, f"{epochs} epochs; ")


def images(job: Job) -> Any:
    def batches() -> Iterator[list[np.ndarray]]:
        for x in job.batches():
            yield [x.numpy()]

    return batches


class Middle(BaseNodeMatcher):
    """Every convolution and linear layer but the first and the last."""

    def __init__(self, ends: tuple[str, ...]) -> None:
        names = [name.replace(".", "_") for name in ends]
        self.ends = {*names, *(f"{name}_bn" for name in names)}

    def apply(self, node: Any) -> bool:
        return node.type in (torch.nn.Conv2d, torch.nn.Linear) and node.name not in self.ends


def config(job: Job) -> Any:
    if job.weight_bits == 8:
        return mct.core.CoreConfig()
    bits = mct.core.BitWidthConfig()
    bits.set_manual_weights_bit_width(Middle(job.ends), job.weight_bits, "weight")
    return mct.core.CoreConfig(bit_width_config=bits)


def finish(job: Job, module: Any, folder: Path, note: str = "") -> Made:
    """Its exporter writes fake-quantized float weights; where it fails, the module answers instead.

    It calls torch.onnx.export as it was before torch 2.9 changed the default to dynamo, so it is given that, and a
    copy, since it changes the module.
    """
    module.eval()
    note += f"{job.weight_bits}-bit weights; " if job.weight_bits != 8 else ""
    try:
        torch.onnx.export = partial(torch.onnx.export, dynamo=False)
        mct.exporter.pytorch_export_model(
            copy.deepcopy(module),
            save_model_path=str(folder / "model.onnx"),
            repr_dataset=images(job),
            serialization_format=Serialization.ONNX,
            quantization_format=mct.exporter.QuantizationFormat.FAKELY_QUANT,
        )
    except Exception as e:  # noqa: BLE001 - the exporter's own exceptions
        for left in folder.glob("model*"):
            left.unlink()
        return Made(f"{note}its export failed ({type(e).__name__}: {first_line(e)})", answers(module))
    return Made(f"{note}its file holds float weights", answers(module))


if __name__ == "__main__":
    run(contenders, "model-compression-toolkit")
