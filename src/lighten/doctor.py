"""`lighten doctor`: what this machine has, and how to get what it lacks. Decisions over readings."""

from __future__ import annotations

from dataclasses import dataclass

from lighten import devices, plugins
from lighten.machine import environment, this_machine, version

TOOLS = {
    "torch": "compress",
    "torchao": "compress",
    "torchvision": "compress",
    "timm": "compress",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "jinja2": "compress",
    "faster_coco_eval": "detection",
    "cv2": "video",
}


@dataclass(frozen=True)
class Diagnosis:
    """Three tables and a verdict."""

    machine: dict[str, str]
    backends: dict[str, str]
    profile: dict[str, str]
    verdict: str


def diagnose() -> Diagnosis:
    """Nothing heavy is imported: packages are looked up, not loaded."""
    machine = this_machine()
    device = devices.load("this-machine")
    rows = {
        k: v
        for k, v in environment().items()
        if k in ("processor", "features", "memory", "system", "python", "lighten", "onnxruntime")
    }
    rows["gpu"] = ", ".join(machine.gpus) or "none found (nvidia-smi)"
    backends = {name: _backend(name, extra) for name, extra in TOOLS.items()}
    ready = {needs: _formats(needs) for needs in ("REQUIRES", "RUNS_ON")}
    profile = {
        "integer kernels": device.kernels,
        "formats built here": ready["REQUIRES"],
        "formats run here": ready["RUNS_ON"],
        "threads": str(device.threads),
    }
    return Diagnosis(rows, backends, profile, _verdict(backends))


def _formats(needs: str) -> str:
    modules = {f: plugins.get("formats", f) for f in plugins.names("formats")}
    return ", ".join(f for f, m in modules.items() if not plugins.missing_backends(m, needs)) or "none"


def _backend(name: str, extra: str) -> str:
    found = version(name)
    return found if found else f"missing: pip install 'lighten[{extra}]'"


def _verdict(backends: dict[str, str]) -> str:
    missing = [name for name, state in backends.items() if state.startswith("missing")]
    if not missing:
        return "[green]Ready to compress.[/]"
    if "torch" in missing:
        return "[yellow]Ready to run bundles.[/] To compress: pip install 'lighten\\[compress]'"
    return f"[yellow]Ready to compress, without {', '.join(missing)}.[/]"
