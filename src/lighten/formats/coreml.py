"""Core ML (.mlpackage), for iPhone, iPad and Mac; written and compared anywhere, run on macOS only."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle, RefusedFormat
from lighten.types import Device, Precision, Weight

REQUIRES = ("coremltools", "torch", "torchao")
RUNS_ON = ("coremltools",)
EXTRA = "coreml"
SUFFIX = ".mlpackage/Manifest.json"
BATCH = "one"

INTEGERS = "quantized_decomposed"


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.palettes import BITS
    from lighten.kit.precisions import impossible, is_dynamic

    if precision.weights in BITS and precision.activations == "float32":
        return "one palette serves the whole network: no single layers otherwise" if precision.exceptions else None
    if reason := impossible(precision):
        return reason
    if is_dynamic(precision):
        return "Core ML quantizes no activations as it runs"
    if "int4" in (precision.activations, *(a for *_, a in precision.exceptions)):
        return "Core ML has no 4-bit activations"
    if "float16" in {w for _, w, _ in precision.exceptions}:
        return "Core ML computes a whole program in float32 or float16: no single layers in float16"
    return None


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The operator that coremltools has no conversion for, or None; from its own table."""
    from lighten.kit.quiet import quiet

    with quiet():
        import coremltools  # noqa: F401  # fills the table
        from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    def known(name: str) -> bool:
        names = name, name.rpartition(".")[0]
        return any(_TORCH_OPS_REGISTRY.get_func(n) for n in names) or _is_composite(name)

    missing = [name for name in sorted(operators) if not name.startswith("_operator.") and not known(name)]
    return f"coremltools has no conversion for {missing[0]}" if missing else None


def _is_composite(name: str) -> bool:
    """Whether torch itself takes the operator apart before coremltools sees it."""
    import torch

    space, _, rest = name.partition(".")
    try:
        found = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{space}::{rest.removesuffix('.default')}", "CompositeImplicitAutograd"
        )
    except RuntimeError:
        return False
    return bool(found)


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` as the package that `path` (its Manifest.json) lies in; returns the package's other files.

    One image at a time: the Neural Engine takes fixed shapes only. With palettes (weights in tables of few values) all
    else is float16, what is computed as well; such files need iOS 18 or macOS 15, since which groups of channels may have
    tables of their own. Raises RefusedFormat naming the operator, or a weight whose blocks Core ML cannot hold.
    """
    from lighten.kit.coreml_check import BLOB, MODEL
    from lighten.kit.palettes import BITS

    made = _convert(_program(module, shape), shape, precision)
    if precision.weights in BITS:
        made = _palettized(made, BITS[precision.weights])
    spec = made.get_spec()
    spec.description.metadata.ClearField("userDefined")  # holds the day it was converted
    raw = spec.SerializeToString(deterministic=True)
    files = path.parent / MODEL, path.parent / BLOB
    files[1].parent.mkdir(parents=True, exist_ok=True)
    files[0].write_bytes(raw)
    shutil.copyfile(Path(made.weights_dir) / files[1].name, files[1])
    path.write_text(_manifest(raw), "utf-8")
    return files


def _program(module: Any, shape: tuple[int, ...]) -> Any:
    """The exported program for one image, its integer weights behind dequantization."""
    import torch

    from lighten.kit.quiet import quiet
    from lighten.kit.trace import example_input
    from lighten.quant.graph import fold
    from lighten.quant.weight_only import packed_weights

    graph = fold(module, shape) if not isinstance(module, torch.fx.GraphModule) else module
    if packed := packed_weights(module):
        graph = _with_integers(copy.deepcopy(graph), packed)
    with quiet(), torch.no_grad():
        return torch.export.export(graph, (example_input(shape, batch=1),), strict=False).run_decompositions({})


def _with_integers(graph: Any, packed: Mapping[str, Any]) -> Any:
    """Float weights replaced by their integers and scales, exactly those that were decided."""
    import torch

    for node in [n for n in graph.graph.nodes if n.op == "get_attr" and n.target in packed]:
        one = packed[str(node.target)]
        stem = "packed_" + str(node.target).replace(".", "_")
        scale, block = torch.from_numpy(one.scale), (1, one.block)
        if one.block and (one.q.ndim != 2 or one.axis != 0 or one.q.shape[1] % one.block):
            raise RefusedFormat(
                f"Core ML holds blocks of {one.block} weights only in linear layers whose inputs divide by it, not in {node.target}.",
                "Quantize with one scale a channel (block 0).",
            )
        for name, value in (
            ("q", torch.from_numpy(one.q)),
            ("scale", scale),
            ("zero", torch.zeros(scale.shape, dtype=torch.int8)),
        ):
            graph.register_buffer(f"{stem}_{name}", value)
        with graph.graph.inserting_before(node):
            q, s, z = (graph.graph.get_attr(f"{stem}_{name}") for name in ("q", "scale", "zero"))
            ends = -(2 ** (one.bits - 1)), 2 ** (one.bits - 1) - 1
            if one.block:
                from torchao.quantization.quant_primitives import _dequantize_affine  # noqa: F401  # registers the operator

                wide = graph.graph.call_function(
                    torch.ops.torchao.dequantize_affine.default, (q, block, s, z, torch.int8, *ends)
                )
            else:
                import torch.ao.quantization.fx._decomposed

                operator = torch.ops.quantized_decomposed.dequantize_per_channel.default
                wide = graph.graph.call_function(operator, (q, s, z, one.axis, *ends, torch.int8))
        node.replace_all_uses_with(wide)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _convert(program: Any, shape: tuple[int, ...], precision: Precision) -> Any:
    """coremltools' model: iOS 17 for 8-bit integers, iOS 18 for what only its operators hold.

    With integer activations the rest computes in float16, as the Neural Engine, which alone has integer kernels, needs.
    """
    from lighten.kit.coreml_check import INPUT, OUTPUT
    from lighten.kit.palettes import BITS
    from lighten.kit.precisions import has_int4
    from lighten.kit.quiet import quiet

    narrow = precision.weights in ("float16", *BITS) or precision.activations == "int8"
    newest = (
        has_int4(precision)
        or precision.weights in BITS
        or any("dequantize_affine" in str(n.target) for n in program.graph.nodes)
    )
    try:
        with quiet():
            import coremltools as ct

            return ct.convert(
                program,
                convert_to="mlprogram",
                inputs=[ct.TensorType(name=INPUT, shape=(1, *shape), dtype=np.float32)],
                outputs=[ct.TensorType(name=OUTPUT, dtype=np.float32)],
                minimum_deployment_target=ct.target.iOS18 if newest else ct.target.iOS17,
                compute_precision=ct.precision.FLOAT16 if narrow else ct.precision.FLOAT32,
                skip_model_load=True,
            )
    except Exception as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise RefusedFormat(f"Core ML cannot hold this model: {reason[:300]}", "Choose another format.") from e


def _palettized(model: Any, bits: int) -> Any:
    """The float16 model with its layers' weights in tables of 2^`bits` values; weights too small for one stay float16.

    Raises RefusedFormat where all are: it would be a float16 file by another name.
    """
    from lighten.kit.palettes import FEWEST, best_table
    from lighten.kit.quiet import quiet

    with quiet():
        from coremltools.optimize.coreml import OpPalettizerConfig, OptimizationConfig, palettize_weights

        how = {
            name: OpPalettizerConfig(
                mode="custom",
                lut_function=partial(best_table, bits=bits),
                granularity="per_grouped_channel",
                group_size=together,
                channel_axis=axis,
                weight_threshold=FEWEST,
            )
            for name, axis, together in _worth_a_table(model, bits)
        }
        if how:
            return palettize_weights(model, OptimizationConfig(op_name_configs=how))
    raise RefusedFormat(
        f"No layer has more than {FEWEST} weights: none is worth a table of {2**bits} values.", "Export it in float16."
    )


def _worth_a_table(model: Any, bits: int) -> Iterator[tuple[str, int, int]]:
    """Weights of layers by name, with their axis of output channels and how many of those share a table."""
    from coremltools.optimize.coreml import get_weights_metadata

    from lighten.kit.coreml_check import CHANNELS_OUT
    from lighten.kit.palettes import FEWEST, channels_together

    for name, weight in get_weights_metadata(model, weight_threshold=FEWEST).items():
        readers = {op.op_type for op in weight.child_ops if op.params_name_mapping.get("weight") == name}
        axes = {CHANNELS_OUT[kind] for kind in readers & set(CHANNELS_OUT)}
        if len(axes) == 1 and (together := channels_together(weight.val.shape, axis := axes.pop(), bits)):
            yield name, axis, together


def _manifest(raw: bytes) -> str:
    """The package's table of contents, its identifiers made of the content: the same model is the same file."""
    digest = hashlib.sha256(raw).hexdigest()
    model, weights_ = (str(uuid.uuid5(uuid.NAMESPACE_OID, digest + part)) for part in ("model", "weights"))
    entry = {"author": "com.apple.CoreML"}
    entries = {
        model: entry | {"description": "CoreML Model Specification", "name": "model.mlmodel", "path": "com.apple.CoreML/model.mlmodel"},
        weights_: entry | {"description": "CoreML Model Weights", "name": "weights", "path": "com.apple.CoreML/weights"},
    }  # fmt: skip
    whole = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": model}
    return json.dumps(whole, indent=4, sort_keys=True)


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, one image at a time; Core ML chooses processor and threads.

    Raises BadBundle on a damaged package, RefusedFormat where there is no Core ML.
    """
    from lighten.kit.coreml_check import INPUT, OUTPUT, read

    read(path)
    if reason := not_here():
        raise RefusedFormat(f"{path} cannot be run here: {reason}.", "Run `lighten bench` on a Mac.")
    import coremltools as ct

    try:
        model = ct.models.MLModel(str(path.parent))
    except Exception as e:
        raise BadBundle(f"{path} cannot be loaded by Core ML: {str(e)[:300]}", "Build the folder again.") from e

    def run(x: np.ndarray) -> np.ndarray:
        rows = [model.predict({INPUT: np.ascontiguousarray(one[None], np.float32)})[OUTPUT] for one in x]
        return np.concatenate(rows).astype(np.float32)

    return run


def check(path: Path, module: Any, shape: tuple[int, ...]) -> tuple[str, ...]:
    """What differs between a package and the module it was written from: names, shapes, types, operators, the values of
    every weight as the file holds them. Nothing where all is right. Stands in for running it where that is impossible.
    """
    import torch

    from lighten.kit.coreml_check import compare, read
    from lighten.kit.trace import example_input
    from lighten.quant.graph import fold

    graph = fold(module, shape) if _is_float(module) else module
    with torch.no_grad():
        answer = tuple(graph(example_input(shape)).shape[1:])
    return compare(read(path), _meant(graph), shape, answer, _rounded(graph))


def simulate(path: Path, module: Any, shape: tuple[int, ...]) -> Any:
    """`module`, float and for inputs (C, H, W), with the weights of its layers as the file holds them; batch norms are
    folded as in the file. It computes in float32, so it shows what the weights lose, not the rounding of float16.

    Raises BadBundle where the file is damaged, or holds no weights of a layer's shape.
    """
    import torch

    from lighten.kit.coreml_check import held, read
    from lighten.quant.graph import fold, layers, overwrite, parameter

    graph = fold(module, shape)
    names = [layer.weight for layer in layers(graph)]
    stored = held(read(path), {name: parameter(graph, name).detach().float().numpy() for name in names})
    if missing := [name for name in names if name not in stored]:
        raise BadBundle(f"{path} holds no weights of the shape of {missing[0]}.", "Build the folder again.")
    for name in names:
        overwrite(graph, name, torch.from_numpy(np.ascontiguousarray(stored[name])))
    return graph


def _is_float(module: Any) -> bool:
    """Whether nothing of a module is rounded: its batch norms may still stand beside the convolutions."""
    import torch

    if not isinstance(module, torch.fx.GraphModule):
        return True
    return not module.meta.get("packed") and not any("quantize" in str(n.target) for n in module.graph.nodes)


def _meant(graph: Any) -> dict[str, np.ndarray]:
    """The weights of a module's layers as it computes with them, by name of the layer's node."""
    import torch

    from lighten.quant import policy
    from lighten.quant.graph import parameter

    found = {}
    for node in graph.graph.nodes:
        if policy.packet(node) in policy.COMPUTE:
            weight = node.args[1]
            if weight.op == "get_attr":
                value = parameter(graph, str(weight.target))
            else:
                args = [parameter(graph, str(a.target)) if isinstance(a, torch.fx.Node) else a for a in weight.args]
                value = weight.target(*args)
            found[node.name] = value.detach().float().numpy()
    return found


def _rounded(graph: Any) -> int:
    """How many layers read a quantized activation."""
    from lighten.quant import policy

    layers = [n for n in graph.graph.nodes if policy.packet(n) in policy.COMPUTE]
    return sum(f"{INTEGERS}.dequantize" in str(n.args[0].target) for n in layers)


def runtime() -> str:
    """The converter and its version: the runtime is a part of macOS and iOS."""
    from importlib.metadata import version

    return f"Core ML Tools {version('coremltools')}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every tensor in weight.bin with its true type; of palettes the indices (their zeros: of the weights they mean) and
    the tables, `lut`."""
    from lighten.kit.coreml_check import read, tensors

    package = read(path)
    meant = tensors(package)
    return tuple(
        Weight(
            one.owner if one.role == "val" else f"{one.owner}.{one.role}",
            one.dtype.lower(),
            tuple(one.value.shape),
            one.bytes,
            float(np.mean((meant[one.owner] if one.role == "indices" else one.value) == 0)) if one.value.size else 0.0,
        )
        for one in package.constants
        if one.role != "axis"
    )


def fallbacks(path: Path) -> tuple[str, ...]:
    """Operators of an integer program that compute in float16, or layers of a palettized one that have no table; ()
    for float programs and integer weights alone."""
    from lighten.kit.coreml_check import in_float, palettes, read, without_table

    package = read(path)
    if palettes(package):
        return tuple(
            f"{count} x {kind} with weights in float16: too few for a table"
            for kind, count in sorted(without_table(package).items())
        )
    if not package.quantized:
        return ()
    return tuple(f"{count} x {kind} in float16" for kind, count in sorted(in_float(package).items()))


def not_here() -> str | None:
    """Why Core ML cannot run on this machine, or None."""
    return None if sys.platform == "darwin" else "Core ML is a part of macOS and iOS, and this is another system"
