"""AIMET's post-training flow: fold batch norms, simulate at its default configuration, calibrate; then its options."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import aimet_torch
import torch
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.model_preparer import prepare_model
from aimet_torch.quantsim import QuantizationSimModel
from peer import Job, Made, Make, answers, first_line, run


def contenders(job: Job) -> dict[str, Make]:
    made = {
        "AIMET, default": partial(make, job),
        "AIMET, cross-layer equalization": partial(make, job, equalize=True),
    }
    if job.weight_bits != 8:
        made[f"AIMET, AdaRound {job.iterations}"] = partial(make, job, adaround=True)
    return made


def make(job: Job, folder: Path, equalize: bool = False, adaround: bool = False) -> Made:
    example = torch.from_numpy(job.calibration[:1].copy())
    model = prepare_model(job.model())
    if equalize:
        equalize_model(model, dummy_input=example)  # folds batch norms too
    else:
        fold_all_batch_norms(model, input_shapes=tuple(example.shape), dummy_input=example)
    if adaround:
        sim = rounded(job, model, example)
    else:
        sim = simulation(job, model, example)
    with torch.no_grad():
        sim.compute_encodings(lambda m: [m(x) for x in job.batches()])
    return export(job, sim, example, folder)


def simulation(job: Job, model: Any, example: Any) -> Any:
    """A simulation at the weights' bits, its first and last layer at 8."""
    sim = QuantizationSimModel(model, example, default_param_bw=job.weight_bits)
    if job.weight_bits != 8:
        for name in job.ends:
            end(sim.model, name).param_quantizers["weight"].bitwidth = 8
    return sim


def end(model: Any, name: str) -> Any:
    """The layer of that name; the prepared model may write a dot as an underscore."""
    layers = dict(model.named_modules())
    return layers[name] if name in layers else layers[name.replace(".", "_")]


def rounded(job: Job, model: Any, example: Any) -> Any:
    """AdaRound of every layer, then a simulation with those roundings frozen."""
    rows = list(job.batches())
    settings = AdaroundParameters(rows, len(rows), default_num_iterations=job.iterations, forward_fn=lambda m, x: m(x))
    with tempfile.TemporaryDirectory() as room:
        model = Adaround.apply_adaround(
            model,
            example,
            settings,
            path=room,
            filename_prefix="adaround",
            default_param_bw=job.weight_bits,
            param_bw_override_list=[(end(model, name), 8) for name in job.ends],
        )
        sim = simulation(job, model, example)
        sim.set_and_freeze_param_encodings(str(Path(room) / "adaround.encodings"))
    return sim


def export(job: Job, sim: Any, example: Any, folder: Path) -> Made:
    """Its ONNX file with Q/DQ and integer weights; where that fails, the simulation answers instead."""
    try:
        aimet_torch.onnx.export(
            sim.model,
            example,
            str(folder / "model.onnx"),
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            opset_version=13 if job.weight_bits == 8 else 21,
            dynamo=False,
            prequantize_constants=True,
        )
    except Exception as e:  # noqa: BLE001 - the exporter's own exceptions
        for left in folder.glob("model*"):
            left.unlink()
        return Made(f"its export failed ({type(e).__name__}: {first_line(e)})", answers(sim.model))
    return Made("", answers(sim.model))


if __name__ == "__main__":
    run(contenders, "aimet-torch")
