"""The C++ example for ONNX Runtime: it compiles against the wheel's library, and prints the scores that Python gets."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_examples import manifest, photos

from lighten.data.cache import cache_dir
from lighten.data.preprocess import normalize
from lighten.examples import examples
from lighten.types import Preprocess

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="no C++ compiler, or other flags"
)
SCRIPT = Path(__file__).parents[2] / "scripts" / "onnxruntime_headers.sh"
HEADER = "onnxruntime_cxx_api.h"
FLOATS = Preprocess(12, 16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CASES = {
    "rgb": FLOATS,
    "grey": Preprocess(12, 16, channel_order="GRAY", mean=(0.4,), std=(0.3,)),
    "inside": Preprocess(12, 16, channel_order="BGR", inside=True),
}


@pytest.fixture(scope="session")
def headers() -> Path:
    """ONNX Runtime's C++ headers: named, installed, or from the package that a script fetches once."""
    kept = cache_dir() / "onnxruntime-headers"
    system = sorted(f.parent for f in Path("/usr/include").glob(f"onnxruntime*/**/{HEADER}"))
    for place in (os.environ.get("LIGHTEN_ORT_INCLUDE"), *system, kept):
        if place and (Path(place) / HEADER).is_file():
            return Path(place)
    try:
        done = subprocess.run([str(SCRIPT), str(kept)], capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as e:
        pytest.skip(f"no headers of ONNX Runtime: {e}")
    if done.returncode:
        pytest.skip(f"no headers of ONNX Runtime: {done.stderr.strip()[-200:]}")
    return kept


@pytest.fixture(scope="session")
def built(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Case -> the program, built as the head of the source says, without optimisation."""
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    made: dict[str, Path] = {}

    def build(case: str) -> Path:
        if case in made:
            return made[case]
        room = tmp_path_factory.mktemp(case)
        library = room / "libonnxruntime.so.1"
        wheel = sorted((Path(str(found.origin)).parent / "capi").glob("libonnxruntime.so.*"))
        if not wheel:
            pytest.skip("this onnxruntime comes without a library to link")
        library.symlink_to(wheel[-1])
        (room / "run.cpp").write_text(examples("onnx", manifest(CASES[case]))["run.cpp"], "utf-8")
        flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", f"-isystem{headers}"]
        command = [str(COMPILER), *flags, "run.cpp", "-o", "run", str(library), "-Wl,-rpath,$ORIGIN"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=room)
        assert done.returncode == 0, done.stderr[-3000:]
        made[case] = room / "run"
        return made[case]

    return build


def network(how: Preprocess, path: Path) -> None:
    """A convolution and a linear layer; where `how` says so, with the pixels' arithmetic inside."""
    from onnx import TensorProto, helper, numpy_helper

    dice = np.random.default_rng(3)
    held = {
        "k": dice.normal(size=(8, how.channels, 3, 3)).astype(np.float32),
        "w": dice.normal(size=(8, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["input", "k"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["output"]),
    ]
    size = ["n", *how.input_shape]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(v, k) for k, v in held.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if how.inside:
        from lighten.kit.inside import into_onnx

        model = into_onnx(model, how)
    path.write_bytes(model.SerializeToString())


def scores(path: Path, name: str, x: np.ndarray) -> np.ndarray:
    """Python's answers, one image at a time on one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in x])


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("case", CASES)
def test_cpp_prints_the_very_scores_that_python_gets(case: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    how = CASES[case]
    program, pixels = built(case), photos(how)
    network(how, tmp_path / "model.onnx")
    pixels.tofile(tmp_path / "images.rgb")
    done = run(program, tmp_path / "model.onnx", tmp_path / "images.rgb")
    assert done.returncode == 0, done.stderr
    printed = np.array([[float(v) for v in line.split()] for line in done.stdout.splitlines()], np.float32)
    x = (pixels, "pixels") if how.inside else (normalize(pixels, how), "input")
    want = scores(tmp_path / "model.onnx", x[1], x[0])
    assert printed.shape == want.shape == (len(pixels), 5)
    np.testing.assert_array_equal(printed, want)


def test_wrong_input_ends_with_one_and_a_clear_line(built: Callable[[str], Path], tmp_path: Path) -> None:
    program, model, image = built("rgb"), tmp_path / "model.onnx", tmp_path / "images.rgb"
    network(FLOATS, model)
    good = photos(FLOATS)[:1].tobytes()
    image.write_bytes(good)
    assert run(program, model, image, 2).returncode == 0
    missing = run(program, tmp_path / "none.onnx", image)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "none.onnx" in missing.stderr
    for data in (good[:-1], b""):
        image.write_bytes(data)
        short = run(program, model, image)
        assert (short.returncode, short.stdout) == (1, "")
        assert f"holds no whole number of images: it has {len(data)} bytes, and one image has 576" in short.stderr
    assert "cannot read" in run(program, model, tmp_path / "none.rgb").stderr
    model.write_bytes(b"\x08\x09 damaged")
    image.write_bytes(good)
    damaged = run(program, model, image)
    assert damaged.returncode == 1
    assert len(damaged.stderr.strip().splitlines()) == 1
    assert run(program, model, image, 0).returncode == run(program).returncode == 2


def test_a_file_that_normalises_inside_is_not_taken_for_another(built: Callable[[str], Path], tmp_path: Path) -> None:
    network(CASES["inside"], tmp_path / "model.onnx")
    photos(FLOATS)[:1].tofile(tmp_path / "images.rgb")
    done = run(built("rgb"), tmp_path / "model.onnx", tmp_path / "images.rgb")
    assert done.returncode == 1
    assert "input" in done.stderr


def test_the_script_says_in_one_line_where_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    taken = run("sh", SCRIPT, tmp_path / "full")
    assert taken.returncode == 1
    assert "holds no headers" in taken.stderr
    without = subprocess.run(
        ["/bin/sh", str(SCRIPT), str(tmp_path / "new")], capture_output=True, text=True, env={"PATH": "/nowhere"}
    )
    assert without.returncode == 1
    assert len(without.stderr.strip().splitlines()) == 1
    assert "Debian or Ubuntu" in without.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["full"]
