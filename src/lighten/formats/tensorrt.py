"""TensorRT: an ONNX file prepared for it, and the engine where TensorRT and a GPU are."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle, MissingBackend, RefusedFormat
from lighten.plugins import get
from lighten.types import Device, Precision, Weight

REQUIRES = ("onnx", "onnxscript")
RUNS_ON = ("onnx",)
EXTRA = "tensorrt"
SUFFIX = ".trt.onnx"
BATCH = "any"
MOST_BATCH = 32
BUILD_S = 1800


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible

    if reason := impossible(precision):
        return reason
    if precision.quantized and (precision.weights, precision.activations) != ("int8", "int8"):
        return "TensorRT runs convolutions at 8 bits, weights and activations, or in float"
    if any(w not in ("int8", "float32") for _, w, _ in precision.exceptions):
        return "TensorRT has no convolutions with 4-bit weights"
    return None


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """Why a network of these ATen operators cannot be written, or None: it goes by way of ONNX."""
    from lighten.kit.operators import lacks_onnx

    return lacks_onnx(operators)


def not_here() -> str | None:
    """Why no engine can be built and run on this machine, or None."""
    if not _has_gpu():
        return "TensorRT needs an NVIDIA GPU: the ONNX file was checked against its rules"
    if _builder() is None:
        return "TensorRT is not installed here: the ONNX file was checked against its rules"
    return None


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def _builder() -> str | None:
    """What can build an engine here: "trtexec", "python", or None."""
    import importlib.util

    if shutil.which("trtexec"):
        return "trtexec"
    return "python" if importlib.util.find_spec("tensorrt") else None


def command(path: Path, shape: tuple[int, ...], precision: Precision) -> list[str]:
    """The exact command that builds the engine of an ONNX file with inputs (N, C, H, W)."""
    sizes = {name: "x".join(map(str, (n, *shape))) for name, n in (("min", 1), ("opt", 1), ("max", MOST_BATCH))}
    flags = ["--int8", "--fp16"] if precision.quantized else ["--fp16"] if precision.weights == "float16" else []
    files = [f"--onnx={path}", f"--saveEngine={_engine(path)}"]
    return ["trtexec", *files, *flags, *(f"--{k}Shapes=input:{v}" for k, v in sizes.items())]


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write the ONNX file that TensorRT reads, build.sh with the command, and the engine where one can be built here.

    int8: activations are made symmetric (`fallbacks` says so), biases stay float. Raises RefusedFormat naming the rule
    that the graph breaks.
    """
    if precision.quantized:
        _write_symmetric(module, shape, path)
    else:
        get("formats", "onnx").export(module, shape, path, precision, device)
    script = path.with_name("build.sh")
    words = [w.replace(f"{path.parent}/", "") for w in command(path, shape, precision)]
    script.write_text("#!/bin/sh\n# Run on the device: an engine fits one GPU and one version of TensorRT.\n")
    with script.open("a") as out:
        out.write(" ".join(words) + "\n")
    return (script, *_built(path, shape, precision))


def _write_symmetric(module: Any, shape: tuple[int, ...], path: Path) -> None:
    import onnx

    from lighten.kit.onnx_graph import lower, to_onnx
    from lighten.kit.tensorrt_rules import broken_rules, make_symmetric

    model = lower(to_onnx(module, shape), unsigned=False, biases=False)
    make_symmetric(model)
    drop_unused_constants(model)
    get("formats", "onnx").strip(model, keep_names=True)  # TensorRT's messages name them
    onnx.checker.check_model(model)
    if broken := broken_rules(model):
        raise RefusedFormat(f"tensorrt cannot take this graph: {broken[0]}.", "Leave that layer in float.")
    path.write_bytes(model.SerializeToString())


def drop_unused_constants(model: Any) -> None:
    """Take out initializers that no node reads any more."""
    used = {name for node in model.graph.node for name in node.input}
    for one in [i for i in model.graph.initializer if i.name not in used]:
        model.graph.initializer.remove(one)


def _engine(path: Path) -> Path:
    return path.with_name("model.engine")


def _built(path: Path, shape: tuple[int, ...], precision: Precision) -> tuple[Path, ...]:
    """The engine, where this machine can build one."""
    if not_here() is not None:
        return ()
    if _builder() == "trtexec":
        done = subprocess.run(command(path, shape, precision), capture_output=True, text=True, timeout=BUILD_S)
        if done.returncode:
            raise RefusedFormat(f"trtexec failed: {done.stdout.strip()[-300:]}", "See build.sh for the command.")
    else:
        _engine(path).write_bytes(_built_in_python(path, shape, precision))
    return (_engine(path),)


def _built_in_python(path: Path, shape: tuple[int, ...], precision: Precision) -> bytes:
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser, config = trt.OnnxParser(network, logger), builder.create_builder_config()
    if not parser.parse(path.read_bytes()):
        raise RefusedFormat(f"TensorRT cannot read the graph: {parser.get_error(0)}", "Replace that operator.")
    if precision.quantized:
        config.set_flag(trt.BuilderFlag.INT8)
    if precision.quantized or precision.weights == "float16":
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", (1, *shape), (1, *shape), (MOST_BATCH, *shape))
    config.add_optimization_profile(profile)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RefusedFormat("TensorRT built no engine.", "Run build.sh to see why.")
    return bytes(made)


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs on the GPU. Raises BadBundle, MissingBackend."""
    if not path.is_file() or not path.stat().st_size:
        raise BadBundle(f"{path} is missing or empty.", "Build the file again.")
    if not_here() is not None:
        raise MissingBackend(f"TensorRT with an NVIDIA GPU (needed to run {path.name})", EXTRA)
    if not _engine(path).is_file():
        raise BadBundle(f"{_engine(path)} is missing.", f"Build it: sh {path.with_name('build.sh')}")
    return _runner(_engine(path))


def _runner(engine_file: Path) -> Callable[[np.ndarray], np.ndarray]:
    import tensorrt as trt
    import torch

    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine_file.read_bytes())
    if engine is None:
        raise BadBundle(f"{engine_file} is not an engine of this GPU and this TensorRT.", "Run build.sh again.")
    context, names = engine.create_execution_context(), [engine.get_tensor_name(k) for k in (0, 1)]

    def run(x: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(x), MOST_BATCH):
            given = torch.from_numpy(np.ascontiguousarray(x[start : start + MOST_BATCH])).cuda()
            context.set_input_shape(names[0], tuple(given.shape))
            out = torch.empty(tuple(context.get_tensor_shape(names[1])), device="cuda")
            for name, tensor in zip(names, (given, out)):
                context.set_tensor_address(name, tensor.data_ptr())
            context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            parts.append(out.float().cpu().numpy())
        return np.concatenate(parts)

    return run


def runtime() -> str:
    """The runtime and its version."""
    import importlib.util

    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT, none installed: 0"
    import tensorrt

    return f"TensorRT {tensorrt.__version__}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor of the ONNX file with its true type."""
    found: tuple[Weight, ...] = get("formats", "onnx").weights(path)
    return found


def fallbacks(path: Path) -> tuple[str, ...]:
    """What is not as the plan has it: activations that were made symmetric."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    made = sum(i.name.endswith("_symmetric") for i in model.graph.initializer)
    return (f"{made} activations made symmetric, as TensorRT wants them",) if made else ()


def check(path: Path, module: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Rules of TensorRT that the file breaks, and whether it answers like `module` in ONNX Runtime; () where all is well."""
    import onnx
    import torch

    from lighten.kit.tensorrt_rules import broken_rules
    from lighten.kit.trace import example_input

    x = example_input(shape, 16)
    with torch.inference_mode():
        want = module(x).float().numpy()
    got = get("formats", "onnx").load(path, 1)(x.numpy())
    far = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-6))
    rows = broken_rules(onnx.load(str(path), load_external_data=False))
    return rows if far < 0.25 else (*rows, f"its answers are {100 * far:.0f} % of the largest away from the program's")
