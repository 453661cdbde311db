"""NNCF's post-training quantization of the ONNX file, and of the same network in OpenVINO; all defaults."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import nncf
import onnx
import openvino as ov
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from peer import Job, Made, Make, NotOffered, run


def contenders(job: Job) -> dict[str, Make]:
    return {"NNCF, onnx": partial(to_onnx, job), "NNCF, openvino": partial(to_openvino, job)}


def to_onnx(job: Job, folder: Path) -> Made:
    if job.weight_bits != 8:
        raise NotOffered("its ONNX backend quantizes to 8 bits only; its INT4 weight compression is for MatMul")
    rows = nncf.Dataset(list(job.calibration), lambda one: {"input": one[None]})
    model = nncf.quantize(onnx.load(job.float_onnx), rows, subset_size=len(job.calibration))
    onnx.save(model, folder / "model.onnx")
    return Made()


def to_openvino(job: Job, folder: Path) -> Made:
    rows = nncf.Dataset(list(job.calibration), lambda one: one[None])
    options = {} if job.weight_bits == 8 else few_bits(job.weight_bits)
    model = nncf.quantize(ov.Core().read_model(job.float_onnx), rows, subset_size=len(job.calibration), **options)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return Made("" if job.weight_bits == 8 else "target_device NPU, the one with 4-bit weights; every layer alike")


def few_bits(bits: int) -> dict[str, Any]:
    """Of NNCF's targets only the NPU knows 4-bit weights of convolutions; its file runs on the CPU too."""
    weights = QuantizationParameters(num_bits=bits)
    return {
        "target_device": nncf.TargetDevice.NPU,
        "advanced_parameters": AdvancedQuantizationParameters(weights_quantization_params=weights),
    }


if __name__ == "__main__":
    run(contenders, "nncf", "openvino")
