"""NVIDIA's ModelOpt: its quantization of the ONNX file, and of the torch module with INT8_DEFAULT_CFG."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.onnx.quantization import quantize
from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata
from peer import Job, Made, Make, NotOffered, answers, first_line, run


def contenders(job: Job) -> dict[str, Make]:
    return {"ModelOpt, onnx": partial(from_onnx, job), "ModelOpt, torch": partial(from_torch, job)}


def from_onnx(job: Job, folder: Path) -> Made:
    """`dq_only` stores integer weights (by default they stay float), and float32 is what a CPU wants."""
    if job.weight_bits != 8:
        raise NotOffered("its 4-bit ONNX quantization is weight-only and for MatMul")
    quantize(
        str(job.float_onnx),
        quantize_mode="int8",
        calibration_data={"input": np.array(job.calibration)},
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        dq_only=True,
        output_path=str(folder / "model.onnx"),
    )
    return Made("entropy calibration (its default), dq_only, fp32 elsewhere")


def from_torch(job: Job, folder: Path) -> Made:
    def calibrate(m: Any) -> None:
        for x in job.batches():
            m(x)

    with torch.no_grad():
        module = mtq.quantize(job.model(), config(job), calibrate)
    if job.weight_bits != 8:
        # What it writes for 4-bit convolutions are operators of TensorRT, which ONNX Runtime does not load.
        note = "INT8_DEFAULT_CFG with 4-bit weights, first and last layer 8 bits; no file that ONNX Runtime loads"
        return Made(note, answers(module))
    example = torch.from_numpy(job.calibration[:2].copy())
    try:
        packed, _ = get_onnx_bytes_and_metadata(module, (example,), dynamic_axes={"x": {0: "batch"}}, dq_only=True)
        (folder / "model.onnx").write_bytes(OnnxBytes.from_bytes(packed).get_onnx_model_file_bytes())
    except Exception as e:  # noqa: BLE001 - the exporter's own exceptions
        (folder / "model.onnx").unlink(missing_ok=True)
        return Made(f"its export failed ({type(e).__name__}: {first_line(e)})", answers(module))
    return Made("INT8_DEFAULT_CFG, dq_only", answers(module))


def config(job: Job) -> Any:
    made = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    if job.weight_bits != 8:
        made["quant_cfg"].append(
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": job.weight_bits, "axis": 0}}
        )
        for name in job.ends:
            made["quant_cfg"].append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}})
    return made


if __name__ == "__main__":
    run(contenders, "nvidia-modelopt")
