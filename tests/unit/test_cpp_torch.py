"""The C++ examples for LibTorch: they compile against the wheel, and print the scores that Python gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchao")

import torch

from lighten.formats import aoti, torchscript
from lighten.types import Device, Precision
from nets import SHAPE, images, net

SOURCES = Path(aoti.__file__).parents[1] / "bundle_files" / "cpp"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="no C++ compiler, or other flags"
)


def build(source: Path, program: Path) -> None:
    """As the head of the source says, without optimisation: it is the headers that take the time."""
    home = Path(torch.__path__[0])
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    linker = [f"-Wl,-rpath,{home / 'lib'}", "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined"]
    libraries = [f"-L{home / 'lib'}", *linker, "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [str(COMPILER), "-std=c++20", "-O0", str(source), "-o", str(program), *includes, *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("format", [torchscript, aoti], ids=["torchscript", "aoti"])
def test_cpp_prints_the_scores_that_python_gets(format: ModuleType, tmp_path: Path, here: Device) -> None:
    name = format.__name__.rpartition(".")[2]
    path, x = tmp_path / f"model{format.SUFFIX}", images(3)[0].numpy()
    format.export(net("small"), SHAPE, path, Precision(), here)
    x.tofile(tmp_path / "inputs.bin")
    build(SOURCES / f"{name}.cpp", tmp_path / name)
    command = [str(tmp_path / name), str(path), str(tmp_path / "inputs.bin"), *map(str, SHAPE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = np.array([[float(v) for v in line.split()] for line in done.stdout.splitlines()])
    np.testing.assert_allclose(printed, format.load(path, 1)(x), rtol=0, atol=1e-4)
    wrong = subprocess.run([*command[:-1], "17"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 1
    assert "whole number of images" in wrong.stderr
