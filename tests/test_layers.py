"""Imports point down: the house of the design, held by its imports; a device needs neither torch nor exporters."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "src" / "lighten"

BASE = {"types", "errors", "plain"}
"""`plain` is the half of the nouns that turns them into JSON; it and types are the standard library only."""
TOP = {
    "cli",
    "report",
    "serve",
    "terminal",
    "doctor",
    "frontdesk",
    "walk",
    "runner",
    "runs",
    "compress",
    "emulate",
    "remote",
    "exports",
}
ROOMS = {
    "workshop",
    "worker",
    "cost",
    "scout",
    "search",
    "advice",
    "ledger",
    "bench",
    "bundle",
    "clock",
    "trials",
    "narrow",
    "vault",
    "userland",
    "eye",
    "video",
    "targets",
}
PLUGINS = {"methods", "formats", "tasks"}
HELPERS = {"quant", "kit", "data", "machine", "config", "devices", "models", "shapes", "heads"}

PACKAGE = "lighten"
MAY = {
    "plain": set(),
    "types": {"plain", "heads"},
    "errors": set(),
    "machine": set(),
    "shapes": {"types"},
    "heads": set(),
    "config": BASE,
    # Written in the design: plugins -> errors.
    "plugins": {"errors"},
    "quant": {*BASE, "quant", "kit"},
    "data": {*BASE, "data", "plugins"},
    "kit": {*BASE, "kit", "data", "shapes", "heads"},
    "devices": {*BASE, "machine"},
    # Demo models and how to train them: training scores itself by the task, and reads its YAML by config.
    "models": {*BASE, "models", "data", "kit", "config", "plugins", "heads"},
    # A student of another architecture is built by its name.
    "methods": {*BASE, "quant", "kit", "data", "machine", "models", "plugins"},
    "formats": {*BASE, "quant", "kit", "data", "machine", "plugins"},
    "tasks": {*BASE, "quant", "kit", "data", "machine", "plugins", "heads"},
    "search": {"types", "shapes", "search"},
    "advice": {"types"},
    "ledger": {*BASE, "data"},
    "bench": {*BASE, "data", "machine", "plugins"},
    "examples": {*BASE},
    "bundle": {*BASE, "data", "bench", "plugins", "examples", "heads"},
    "workshop": {*BASE, "data", "kit", "quant", "models", "plugins", "bench"},
    # Measures on little data what the search then reads.
    "scout": {*BASE, "quant", "kit", "plugins", "cost", "search", "workshop"},
    "worker": {*BASE, "data", "workshop", "bench"},
    "clock": set(),
    "trials": {*BASE, "plugins", "bench", "clock", "ledger", "search", "workshop", "worker"},
    "narrow": {*BASE, "ledger", "scout", "search", "trials", "workshop"},
    "vault": {*BASE, "data", "kit", "ledger", "plugins", "trials", "workshop"},
    # Times the one-layer files of quant/timing in the format's own runtime.
    "cost": {*BASE, "quant", "data", "machine", "plugins"},
    "video": {*BASE, "data", "plugins"},
    "targets": {*BASE, "data", "video"},
    # Draws what is seen.
    "eye": {*BASE, "data", "kit", "machine", "plugins", "bench", "bundle"},
    "runner": {*BASE, "data", "machine", "bench", "bundle", "eye", "targets", "video"},
    "userland": {*BASE, "data"},
    "emulate": {*BASE, "data", "machine", "plugins", "bench", "bundle", "userland"},
    "remote": {*BASE, "data", "plugins", "bundle"},
    # A finished run, read back by report, in other formats.
    "exports": {*BASE, "data", "kit", "quant", "plugins", "bench", "bundle", "workshop", "report"},
    "doctor": {*BASE, "devices", "machine", "plugins"},
    "runs": {*BASE, "search", "ledger", "report"},
    # Which trials are short.
    "terminal": {*BASE, "runs", "exports", "search"},
    # Which trials are short, and what a plan was expected to damage: pure, and said once.
    "report": {*BASE, "report", "data", "plugins", "search"},
    "serve": {*BASE, "serve", "data", "plugins", "runner", "bundle", "bench", "machine"},
    "walk": {*BASE, *HELPERS, *ROOMS, "plugins", "methods", "report"},
    "frontdesk": {*BASE, *HELPERS, *ROOMS, "plugins", "methods", "walk"},
    "cli": {*BASE, *HELPERS, *ROOMS, *TOP, "plugins", PACKAGE},
}  # fmt: skip
"""Who may import whom. `walk` and `frontdesk` ask methods/quantize which precisions are worth a trial; nothing below
them knows a plug-in by name."""

PUBLIC = {"walk", "data", "models", "types"}
"""What the package's own __init__ gives out, when it is asked for."""


def room(module: str) -> str:
    """ "lighten.kit.fit" -> "kit"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def module_of(file: Path) -> str:
    parts = file.relative_to(HOUSE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> list[Path]:
    return [f for f in sorted(HOUSE.rglob("*.py")) if "bundle_files" not in f.parts]


@cache
def imports(file: Path) -> tuple[tuple[str, int], ...]:
    """Every module that a file imports, inside functions too, with the line; `from lighten import x` is lighten.x."""
    found: list[tuple[str, int]] = []
    inside = module_of(file).split(".")
    here = inside if file.stem == "__init__" else inside[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            if base == PACKAGE:
                rooms = [a.name for a in node.names]
                found += [(f"{PACKAGE}.{r}" if exists(r) else PACKAGE, node.lineno) for r in rooms]
            else:
                found.append((base, node.lineno))
    return tuple(found)


def exists(name: str) -> bool:
    return (HOUSE / f"{name}.py").exists() or (HOUSE / name / "__init__.py").exists()


def ours(file: Path) -> list[tuple[str, int]]:
    return [(m, line) for m, line in imports(file) if m.split(".")[0] == PACKAGE]


def files_of(name: str) -> list[Path]:
    """The one file of a room, or all in its folder."""
    return [HOUSE / f"{name}.py"] if (HOUSE / f"{name}.py").exists() else sorted((HOUSE / name).glob("*.py"))


def breaches() -> list[str]:
    rows = []
    for file in files():
        me = room(module_of(file))
        allowed = PUBLIC if me == PACKAGE else MAY.get(me, set())
        for module, line in ours(file):
            if room(module) not in allowed and module_of(file) != module:
                rows.append(f"{file.relative_to(HOUSE)}:{line} imports {module}")
    return rows


def test_imports_point_down() -> None:
    assert breaches() == []


def test_every_room_has_its_place_in_the_design() -> None:
    assert {room(module_of(f)) for f in files()} <= {*MAY, PACKAGE}


def test_the_rules_of_the_table_point_down_themselves() -> None:
    """What the design forbids in words, whatever the table above grows into."""
    above = {*TOP, *ROOMS}
    for low in ("quant", "kit", "data"):
        assert not MAY[low] & {*PLUGINS, *above}, low
    for plugin in PLUGINS:
        assert not MAY[plugin] & {*PLUGINS, *above}, plugin
    for one in ROOMS:
        assert not MAY[one] & {*TOP, *PLUGINS}, one
    assert MAY["types"] == {"plain", "heads"}  # parts of the nouns themselves
    assert MAY["plain"] == MAY["heads"] == set()
    assert MAY["search"] == {"types", "shapes", "search"}


@pytest.mark.parametrize("kind", sorted(PLUGINS))
def test_plug_ins_never_import_each_other(kind: str) -> None:
    for file in (HOUSE / kind).glob("*.py"):
        assert not [m for m, _ in ours(file) if room(m) in PLUGINS], file.name


@pytest.mark.parametrize("name", ["types", "plain", "heads", "errors", "machine", "search", "shapes"])
def test_the_lowest_rooms_need_only_the_standard_library(name: str) -> None:
    for file in files_of(name):
        for module, line in imports(file):
            top = module.split(".")[0]
            assert top in (*sys.stdlib_module_names, PACKAGE), f"{file.name}:{line} imports {module}"


@pytest.mark.parametrize("name", ["search", "ledger", "bundle", "bench", "eye", "runner", "targets", "video", "report"])
def test_rooms_that_a_device_or_a_reader_uses_know_no_torch(name: str) -> None:
    for file in files_of(name):
        assert not [m for m, _ in imports(file) if m.split(".")[0] in ("torch", "torchvision", "torchao", "onnx")]


def test_torch_is_imported_only_inside_functions_outside_its_own_rooms() -> None:
    """At the top of a file only quant, kit and models may name it."""
    for file in files():
        if room(module_of(file)) in ("quant", "kit", "models"):
            continue
        for node in ast.parse(file.read_text("utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("torch", "torchvision", "torchao", "timm")], file


# --- what is really loaded ----------------------------------------------------------------------------


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


HEAVY = ("torch", "onnxruntime", "openvino", "onnx", "numpy", "PIL", "torchvision", "typer", "jinja2")


def test_importing_lighten_loads_nothing_heavy() -> None:
    done = python(f"import lighten, sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_nouns_load_nothing_heavy_either() -> None:
    code = f"from lighten import Budget; import lighten.search, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_help_and_doctor_of_the_command_line_load_no_torch() -> None:
    code = """
import sys
from lighten import cli
sys.argv = ["lighten", *sys.argv[1:]]
try:
    cli.main()
except SystemExit:
    pass
print("LOADED", [m for m in ("torch", "onnxruntime", "openvino", "onnx") if m in sys.modules])
"""
    for words in (["--help"], ["compress", "--help"], ["doctor"]):
        done = python(code, *words)
        assert done.stdout.strip().splitlines()[-1] == "LOADED []", (words, done.stdout[-300:], done.stderr[-300:])


def best(code: str, runs: int) -> float:
    """Shortest of several fresh processes, in seconds, by each child's own processor time: other work on the machine
    is not counted."""
    import resource

    times = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(code).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_importing_lighten_takes_under_0_3_s() -> None:
    assert best("import lighten", 5) < 0.3


def test_help_takes_under_0_6_s() -> None:
    code = "import sys; sys.argv = ['lighten', '--help']; from lighten.cli import main; main()"
    assert best(f"try:\n    {code.replace('; ', chr(10) + '    ')}\nexcept SystemExit:\n    pass", 7) < 0.6


BLOCKED = """
import sys

class Blocked:
    names = ("torch", "torchvision", "torchao", "timm", "onnx", "onnxscript", "openvino", "jinja2", "safetensors")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is not on this device")

sys.meta_path.insert(0, Blocked())
import lighten.runner, lighten.bundle, lighten.bench, lighten.formats.onnx
from pathlib import Path
for answer in lighten.runner.answers(Path(sys.argv[1]), [Path(sys.argv[2])], "en", 2):
    print([name for name, _ in answer.labels])
"""


def test_a_device_without_torch_runs_a_bundle(tmp_path: Path) -> None:
    """Imports of everything but the base installation fail; the bundle still answers."""
    pytest.importorskip("onnx")
    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(Path(__file__).parent / "unit"))
    try:
        from test_bundle import CLASSES, write_bundle
    finally:
        sys.path.pop(0)
    folder = write_bundle(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    done = python(BLOCKED, str(folder), str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    names = ast.literal_eval(done.stdout.strip())
    assert len(names) == 2
    assert set(names) <= set(CLASSES)


def test_the_block_does_block() -> None:
    code = BLOCKED.split("import lighten.runner")[0] + "\nimport onnx"
    assert "not on this device" in python(code).stderr
