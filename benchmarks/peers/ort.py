"""ONNX Runtime's quantize_static, as its documentation says: pre-processing, then static quantization with a data reader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from peer import Job, Made, Make, run


class Reader(CalibrationDataReader):
    def __init__(self, rows: np.ndarray) -> None:
        self.rows: Iterator[np.ndarray] = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        one = next(self.rows, None)
        return None if one is None else {"input": np.array(one[None])}


def contenders(job: Job) -> dict[str, Make]:
    return {
        "ONNX Runtime quantize_static, default": partial(make, job, False),
        "ONNX Runtime quantize_static, per channel": partial(make, job, True),
    }


def make(job: Job, per_channel: bool, folder: Path) -> Made:
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(job.float_onnx), str(prepared))
    options = {} if job.weight_bits == 8 else four_bits(prepared)
    quantize_static(
        str(prepared), str(folder / "model.onnx"), Reader(job.calibration), per_channel=per_channel, **options
    )
    return Made("" if job.weight_bits == 8 else "weight_type QInt4, first and last layer QInt8")


def four_bits(file: Path) -> dict:
    """QInt4 weights, but QInt8 for those of the first and the last layer."""
    graph = onnx.load(file).graph
    constants = {init.name for init in graph.initializer}
    weights = [n.input[1] for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in constants]
    ends = {name: [{"quant_type": QuantType.QInt8}] for name in (weights[0], weights[-1])}
    return {"weight_type": QuantType.QInt4, "extra_options": {"TensorQuantOverrides": ends}}


if __name__ == "__main__":
    run(contenders, "onnxruntime")
