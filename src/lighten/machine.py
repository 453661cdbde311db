"""What this machine is: processor, features, memory, GPU, versions. Standard library only."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

INTERESTING = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "f16c",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "fphp",
    "asimdhp",
)
PACKAGES = (
    "lighten",
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "torchvision",
    "torchao",
    "timm",
    "onnx",
    "onnxscript",
)


@dataclass(frozen=True)
class Machine:
    """Processor, its features that matter for inference, threads this process may use, memory in MB."""

    arch: str
    processor: str
    features: tuple[str, ...]
    threads: int
    memory_mb: int
    gpus: tuple[str, ...] = ()


@cache
def this_machine() -> Machine:
    """Read once per process."""
    text = _read("/proc/cpuinfo")
    return Machine(_arch(), _processor(text), _features(text), usable_threads(), _memory_mb(), _gpus())


def usable_threads() -> int:
    """Threads this process may run on (cgroups and affinity respected where the system tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """What a reader of a report needs to repeat it."""
    m = this_machine()
    rows = {
        "processor": f"{m.processor} ({m.arch}, {m.threads} threads)",
        "features": " ".join(m.features),
        "memory": f"{m.memory_mb} MB",
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
    }
    return rows | {p: v for p in PACKAGES if (v := version(p))}


def version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _arch() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _processor(cpuinfo: str) -> str:
    for key in ("model name", "hardware", "model\t"):  # x86, older ARM kernels, Raspberry Pi OS
        for line in cpuinfo.splitlines():
            if line.lower().startswith(key):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def _features(cpuinfo: str) -> tuple[str, ...]:
    line = next((row for row in cpuinfo.splitlines() if row.lower().startswith(("flags", "features"))), "")
    return tuple(sorted(set(line.split(":", 1)[-1].split()) & set(INTERESTING)))


def _memory_mb() -> int:
    row = next((r for r in _read("/proc/meminfo").splitlines() if r.startswith("MemTotal")), "")
    return int(row.split()[1]) // 1024 if row else 0


def _gpus() -> tuple[str, ...]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(row.strip() for row in done.stdout.splitlines() if row.strip()) if done.returncode == 0 else ()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
