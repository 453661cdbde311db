"""AOTInductor (.pt2): the network compiled to native code for this machine's processor, with its weights beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import BadBundle, MissingBackend, RefusedFormat
from lighten.machine import this_machine
from lighten.types import Device, Precision, Weight

REQUIRES = ("torch", "torchao")
RUNS_ON = ("torch",)
EXTRA = "compress"
SUFFIX = ".pt2"
BATCH = "any"

OWN = ("aten.", "prim.", "_operator.", "operator.")
FOLDER = "data/aotinductor/model/"
CODE, BLOB, TABLE = "model.wrapper.so", "model.wrapper_weights.blob", "lighten.json"
MEMBERS = ("archive_format", "archive_version", FOLDER + CODE, FOLDER + BLOB, FOLDER + TABLE)
ALIGN = 64
"""Constants begin at multiples of this many bytes (torch/_inductor/codecache.py, ALIGN_BYTES)."""

MOST_UNPACKED = 64
"""A package may unpack to this many times its own size: weights that are mostly zeros do, a bomb asks for more."""
CONSTANT = re.compile(r"constants_info_\[(\d+)\]\.(name|dtype|data_size|shape|from_folded|layout) = (.*);")
CALL = re.compile(r"aoti_torch_cpu_+(\w+)\(")
FUSED = re.compile(r"^(?!extern).*\b(cpp_fused_\w+)\(", re.M)
INTEGER = ("qconv", "qlinear")
"""Beginnings of the names of oneDNN's integer kernels."""


def refuses(precision: Precision, device: Device) -> str | None:
    """Why this format cannot give `precision` for `device`, or None."""
    from lighten.kit.precisions import impossible

    if reason := impossible(precision):
        return reason
    return _not_for(precision) or _not_on(device) or (None if _compiler() else NO_COMPILER)


NO_COMPILER = "AOTInductor needs a C++ compiler (g++), and none is installed"


def _not_for(precision: Precision) -> str | None:
    pairs = {(precision.weights, precision.activations), *((w, a) for _, w, a in precision.exceptions)}
    if ("float16", "float16") in pairs:
        return "AOTInductor computes in float32 on processors, and would store halves widened"
    if not pairs <= {("float32", "float32"), ("int8", "int8")}:
        return "AOTInductor has integer kernels for int8 weights with int8 activations only"
    if ("int8", "int8") in pairs and this_machine().arch != "x86_64":
        return "AOTInductor's integer kernels are those of x86 processors"
    return None


def _not_on(device: Device) -> str | None:
    """Native code is for the processor it was compiled on: one with fewer instructions would die of it."""
    here = this_machine()
    if device.arch != here.arch or not set(here.features) <= set(device.features):
        return f"AOTInductor compiles for this machine's processor ({here.arch}), and {device.name} has another"
    return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def lacks(operators: Mapping[str, int], shape: tuple[int, ...]) -> str | None:
    """The operator that is not torch's own, or None: Inductor compiles those, or calls LibTorch's kernel."""
    strange = sorted(name for name in operators if not name.startswith((*OWN, "quantized_decomposed.")))
    return f"{strange[0]} is not one of torch's own operators: compiled code cannot call it" if strange else None


def export(module: Any, shape: tuple[int, ...], path: Path, precision: Precision, device: Device) -> tuple[Path, ...]:
    """Compile `module` and write it to `path`; no companions. Raises MissingBackend without a compiler, RefusedFormat
    where it cannot be compiled, or an integer plan would run in float. Takes half a minute, more the first time.
    """
    import torch

    from lighten.kit.trace import trace
    from lighten.quant.graph import fold

    if not _compiler():
        raise MissingBackend("g++ (a C++ compiler, needed by AOTInductor)", EXTRA)
    graph = _unsigned(module) if precision.quantized else fold(module, shape)
    with torch.no_grad():
        program = trace(graph, shape)
    with tempfile.TemporaryDirectory() as room:
        made = Path(room) / "model.pt2"
        _compile(program, made, precision.quantized)
        table = _table(made)
        if precision.quantized and not any(name.startswith(INTEGER) for name in table["kernels"]):
            raise RefusedFormat("AOTInductor would run every layer of this plan in float.", "Choose another format.")
        _repack(made, path, table)
    return ()


def _unsigned(module: Any) -> Any:
    """A copy whose int8 activations are uint8: the same scale, zero point + 128. oneDNN's kernels take no others."""
    import copy

    import torch

    graph = copy.deepcopy(module)
    for node in graph.graph.nodes:
        if "quantized_decomposed" in str(node.target) and "per_tensor" in str(node.target):
            x, scale, zero, low, high, dtype = node.args
            if dtype == torch.int8:
                node.args = (x, scale, zero + 128, low + 128, high + 128, torch.uint8)
    graph.recompile()
    return graph


def _compile(program: Any, path: Path, quantized: bool) -> None:
    import torch
    import torch._inductor

    from lighten.kit.quiet import quiet

    settings = {
        "freezing": True,  # packs weights for the kernels; without it no integer kernel is found
        "cpp.dynamic_threads": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "binary_blob",
        "aot_inductor.model_name_for_generated_files": "model",
    }
    try:
        with quiet(), torch.no_grad(), torch._inductor.config.patch(freezing=True):
            if quantized:
                from torchao.quantization.pt2e.inductor_passes.x86 import _register_quantization_weight_pack_pass

                _register_quantization_weight_pack_pass()
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except Exception as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise RefusedFormat(f"AOTInductor cannot compile this model: {reason[:300]}", "Choose another format.") from e


def _table(package: Path) -> dict[str, Any]:
    """What the generated C++ says: the constants in the order they are stored, and how often each kernel is called."""
    with zipfile.ZipFile(package) as archive:
        text = next(archive.read(n) for n in archive.namelist() if n.endswith(".wrapper.cpp")).decode()
    rows: dict[int, dict[str, str]] = {}
    for index, key, value in CONSTANT.findall(text):
        rows.setdefault(int(index), {})[key] = value
    kernels = Counter(CALL.findall(text)) + Counter(FUSED.findall(text))
    return {"constants": list(_stored(rows)), "kernels": dict(sorted(kernels.items()))}


def _stored(rows: Mapping[int, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    offset = 0
    for _, row in sorted(rows.items()):
        if row["from_folded"] == "true":
            continue
        size = int(row["data_size"])
        shape = [int(n) for n in re.findall(r"\d+", row["shape"])]
        dtype = row["dtype"].removeprefix("cached_torch_dtype_")
        packed = "mkldnn" in row["layout"]
        yield {
            "name": row["name"].strip('"'),
            "dtype": dtype,
            "shape": shape,
            "offset": offset,
            "bytes": size,
            "packed": packed,
        }
        offset += -(-size // ALIGN) * ALIGN


def _repack(made: Path, path: Path, table: dict[str, Any]) -> None:
    """The package without sources, symbols and times of day, so that the same code is the same file. Compressed: the
    loader unpacks it into a folder anyway, and kernels want their weights filled up with zeros."""
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w") as new:
        for name in sorted(old.namelist()):
            inner = name.partition("/")[2]
            if inner.endswith((".cpp", "serialization_id")):
                continue
            data = _stripped(old.read(name)) if inner.endswith(".so") else old.read(name)
            new.writestr(zipfile.ZipInfo(f"model/{inner}"), data, zipfile.ZIP_DEFLATED, 9)
        rows = json.dumps(table, sort_keys=True)
        new.writestr(zipfile.ZipInfo(f"model/{FOLDER}{TABLE}"), rows, zipfile.ZIP_DEFLATED, 9)


def _stripped(code: bytes) -> bytes:
    """A shared library without its debugging symbols, two thirds of it; as it is where there is no strip."""
    if not (tool := shutil.which("strip")):
        return code
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / CODE
        file.write_bytes(code)
        subprocess.run([tool, "--strip-unneeded", str(file)], check=True, capture_output=True)
        return file.read_bytes()


def load(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from inputs (N, C, H, W) to outputs, on `threads` CPU threads (a setting of the whole process).

    The file holds native code that runs with all the rights of this process: load none that you would not run. Raises
    BadBundle where it is damaged, or compiled for another processor.
    """
    import torch
    import torch._inductor

    from lighten.kit.quiet import quiet

    _table_of(path)
    torch.set_num_threads(threads)
    try:
        with quiet():
            compiled = torch._inductor.aoti_load_package(str(path))
    except Exception as e:
        raise BadBundle(f"{path} cannot be loaded by torch: {str(e)[:300]}", "Build the file again here.") from e

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            out: np.ndarray = compiled(torch.tensor(x, dtype=torch.float32)).numpy()
            return out

    return run


def _table_of(path: Path) -> dict[str, Any]:
    """The table in a package whose layout and checksums are right. Raises BadBundle on any other."""
    to_do = "Fetch or build the file again."
    try:
        with zipfile.ZipFile(path) as archive:
            problem = _damage(archive)
            table: dict[str, Any] = {} if problem else json.loads(archive.read(f"model/{FOLDER}{TABLE}"))
    except (
        OSError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        zlib.error,
    ) as e:
        raise BadBundle(f"{path} is not an AOTInductor package: {str(e)[:300]}", to_do) from e
    if problem:
        raise BadBundle(f"{path} is not an AOTInductor package: {problem}", to_do)
    return table


def _damage(archive: zipfile.ZipFile) -> str | None:
    """What is wrong with the archive; reads it whole, so that every checksum is compared."""
    rows = archive.infolist()
    names = [row.filename for row in rows]
    if any(not name.startswith("model/") or ".." in name.split("/") for name in names):
        return "a name in it leads out of its folder"
    if lost := [name for name in MEMBERS if f"model/{name}" not in names]:
        return f"{lost[0]} is missing"
    if sum(row.file_size for row in rows) > MOST_UNPACKED * max(1, sum(row.compress_size for row in rows)):
        return "it unpacks to too much"
    if broken := archive.testzip():
        return f"{broken} is damaged"
    if sum(name.endswith(".so") for name in names) != 1:
        return "it holds several libraries"
    metadata = json.loads(archive.read(f"model/{FOLDER}model.wrapper_metadata.json"))
    if metadata.get("AOTI_MACHINE") != this_machine().arch:
        return f"it was compiled for {metadata.get('AOTI_MACHINE')}, and this is {this_machine().arch}"
    return None


def runtime() -> str:
    """The runtime and its version."""
    from importlib.metadata import version

    return f"AOTInductor {version('torch').split('+')[0]}"


def weights(path: Path) -> tuple[Weight, ...]:
    """Every stored constant with its true type; zeros are counted in the bytes that the kernels read."""
    table = _table_of(path)
    with zipfile.ZipFile(path) as archive:
        blob = archive.read(f"model/{FOLDER}{BLOB}")
    return tuple(_row(one, blob[one["offset"] : one["offset"] + one["bytes"]]) for one in table["constants"])


def _row(one: Mapping[str, Any], raw: bytes) -> Weight:
    kind = np.dtype(one["dtype"])
    count = int(np.prod(one["shape"]))
    values = np.frombuffer(raw, kind, len(raw) // kind.itemsize)
    # Packed weights are filled up with zeros; behind packed integers there may be a sum a channel (of zero points).
    values = values if one["packed"] else values[:count]
    zeros = max(0.0, 1 - float(np.count_nonzero(values)) / count) if count else 0.0
    return Weight(one["name"], one["dtype"], tuple(one["shape"]), count * kind.itemsize, zeros)


def fallbacks(path: Path) -> tuple[str, ...]:
    """Kernels of an integer file that compute in float; () for float files."""
    kernels: dict[str, int] = _table_of(path)["kernels"]
    if not any(name.startswith(INTEGER) for name in kernels):
        return ()
    found: Counter[str] = Counter()
    for name, count in kernels.items():
        if words := _in_float(name):
            found[words] += count
    return tuple(f"{count} x {words} in float32" for words, count in sorted(found.items()))


def _in_float(kernel: str) -> str:
    """What a kernel computes in float, in words; nothing where it is an integer one or only rounds."""
    if not kernel.startswith("cpp_fused_"):
        return "" if kernel.startswith(INTEGER) else re.sub(r"mkldnn|mkl|pointwise|_+", " ", kernel).strip()
    name = re.sub(r"(de)?quantize_per_(tensor|channel)", "", kernel.removeprefix("cpp_fused_"))
    words = [w for w in re.sub(r"_\d+$", "", name).split("_") if w]
    return " + ".join(words)


def not_here() -> str | None:
    """Nothing keeps a package that was compiled here from running here."""
    return None
