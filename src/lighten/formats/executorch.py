"""ExecuTorch (.pte) with the XNNPACK delegate: PyTorch Mobile's successor on phones; one image at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lighten.kit import pte
from lighten.types import Device, Precision, Weight

REQUIRES = ("executorch", "torchao")
RUNS_ON = ("executorch",)
EXTRA = "executorch"
SUFFIX = ".pte"
BATCH = "one"


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible

    if reason := impossible(precision):
        return reason
    pairs = {(precision.weights, precision.activations), *((w, a) for _, w, a in precision.exceptions)}
    if strange := sorted(pairs - {("float32", "float32"), ("int8", "int8")}):
        weights, activations = strange[0]
        return f"XNNPACK has no convolution of {weights} weights with {activations} activations"
    return None


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The operator that is neither in the delegate nor among ExecuTorch's portable kernels, or None."""
    from lighten.kit.pt2e import lacking

    known = _portable()
    # A view is copied where the program is made functional (aten.view becomes aten.view_copy).
    missing = lacking(operators, lambda op: bool({op._schema.name, f"{op._schema.name}_copy"} & known))
    return f"ExecuTorch has no kernel for {missing}" if missing else None


@cache
def _portable() -> frozenset[str]:
    """Names of the runtime's own kernels without their overloads: "aten::add"."""
    return frozenset(name.split(".")[0] for name in _runtime()._get_operator_names())


@cache
def _runtime() -> Any:
    """ExecuTorch's bindings, imported in silence."""
    from lighten.kit.pt2e import silent

    with silent():
        from executorch.extension.pybindings import portable_lib

        portable_lib._threadpool_get_thread_count()  # reads the processor, and says so, the first time
    return portable_lib


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Write `module` (float, or made by the plan) to `path`; returns companion files (none).

    Raises RefusedFormat where the converter cannot take the network.
    """
    from lighten.kit import pt2e
    from lighten.kit.trace import example_input

    with pt2e.converting("ExecuTorch"):
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        graph = pt2e.with_open_hardsigmoids(pt2e.one_image(module, shape))
        graph = pt2e.with_outer_biases(pt2e.with_aligned_cats(graph)) if precision.quantized else graph
        with torch.no_grad():
            program = torch.export.export(graph, (example_input(shape, 1),), strict=False)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=_delegate_config())])
            path.write_bytes(bytes(lowered.to_executorch().buffer))
    return ()


@cache
def _delegate_config() -> Any:
    """XNNPACK's partitioner, which also takes a linear layer of integer weights whose input and output are float.

    XNNPACK has that kernel (f32-qc8w); ExecuTorch's own partitioner would leave a network's last layer, whose answer
    is not rounded, to a portable kernel that widens the weights at every run.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, LinearConfig
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_quant, tag_as_implicit_q_dq

    class FloatOutput(LinearConfig):
        def get_deps(self, node: Any, ep: Any) -> tuple[bool, list[Any]]:
            weight = node.args[1]
            if len(node.args) > 2 or not is_dequant(weight) or any(is_quant(user) for user in node.users):
                return super().get_deps(node, ep)
            tag_as_implicit_q_dq(weight)
            return True, [weight, *weight.all_input_nodes]

    return [FloatOutput if one is LinearConfig else one for one in ALL_PARTITIONER_CONFIGS]


# --- running it -----------------------------------------------------------------------------------------


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads, image by image.

    The threads are one pool of the whole process: a function that finds another number sets its own, and what it
    loaded is loaded again. Raises BadBundle on a damaged file.
    """
    raw = pte.read(path)
    method = _Method(raw, threads, path)

    def run(x: np.ndarray) -> np.ndarray:
        import torch

        images = torch.from_numpy(np.ascontiguousarray(x, np.float32))
        return np.concatenate([method((image[None],)) for image in images])

    return run


class _Method:
    """A loaded program that is loaded anew where the pool of threads it was given is gone."""

    pools = 0
    """How many pools this process has had."""

    def __init__(self, raw: bytes, threads: int, path: Path) -> None:
        self.raw, self.threads, self.path, self.pool = raw, threads, path, -1
        self._load()

    def __call__(self, inputs: tuple[Any, ...]) -> np.ndarray:
        self._load()
        (out,) = self.method.call(inputs)
        answer: np.ndarray = out.numpy().copy()
        return answer

    def _load(self) -> None:
        from lighten.kit.pt2e import silent

        runtime = _runtime()
        if runtime._threadpool_get_thread_count() != self.threads:
            with silent():
                runtime._unsafe_reset_threadpool(self.threads)
            _Method.pools += 1
        if self.pool == _Method.pools:
            return
        try:
            with silent():
                check = runtime.Verification.InternalConsistency
                self.program = runtime._load_program_from_buffer(self.raw, program_verification=check)
                self.method = self.program.load_method("forward")
        except Exception as e:
            raise pte.damaged(self.path, str(e)) from e
        self.pool = _Method.pools


def runtime() -> str:
    """The runtime and its version."""
    from importlib.metadata import version

    return f"ExecuTorch {version('executorch')}"


def not_here() -> str | None:
    """Nothing: it runs wherever its package is."""
    return None


# --- what is in a file ------------------------------------------------------------------------------------


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored tensor with its true type: XNNPACK's (scales too) and those of the portable kernels."""
    file = pte.parsed(path)
    rows = [row for graph, constants in pte.delegates(file) for row in pte.stored(graph, constants, file.named_data)]
    return (*rows, *pte.portable_tensors(file.program))


def fallbacks(path: Path) -> tuple[str, ...]:
    """Operators outside the delegate, and those that compute in float32 in a file whose layers compute in integers."""
    file = pte.parsed(path)
    plan = file.program.execution_plan[0]
    kernels = [i.instr_args.op_index for chain in plan.chains for i in chain.instructions if pte.is_kernel(i)]
    outside = Counter(plan.operators[k].name.removeprefix("aten::") for k in kernels)
    inside: Counter[str] = Counter()
    for graph, _ in pte.delegates(file):
        inside += pte.float_work(graph)
    rows = [f"{n} x {kind} outside the delegate" for kind, n in outside.items()]
    return (*rows, *(f"{n} x {kind} in float32" for kind, n in inside.items()))
