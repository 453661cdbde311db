"""Timing by a clock that the test holds; outputs that are the runtime's own; deaths that are one failed row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lighten import bench
from lighten.bench import Timing, samples_ms
from lighten.errors import BadBundle, CrashedRuntime, MissingBackend, UnknownName
from lighten.types import Preprocess

HOW = Preprocess(6, 5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
QUICK = Timing(warmup=1, runs=3, least=2, seconds=5)


class Clock:
    """Time stands still but for what each run takes."""

    def __init__(self, takes: Iterator[float]) -> None:
        self.now, self.takes, self.calls = 100.0, takes, 0

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.calls += 1
        self.now += next(self.takes)


def steady(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def timed(takes: Iterator[float], timing: Timing) -> tuple[tuple[float, ...], int]:
    clock = Clock(takes)
    return samples_ms(clock.run, timing, clock), clock.calls


def test_samples_are_each_runs_own_time_in_ms_and_warm_up_is_not_among_them() -> None:
    takes = iter([0.5, 0.25, 0.125, 0.001, 0.002, 0.004, 0.003])
    samples, calls = timed(takes, Timing(warmup=3, runs=4, least=1, seconds=100))
    assert samples == pytest.approx((1.0, 2.0, 4.0, 3.0))
    assert calls == 7


def test_fast_runs_stop_at_their_number() -> None:
    samples, calls = timed(steady(1e-4), Timing(warmup=10, runs=60, least=10, seconds=4))
    assert len(samples) == 60
    assert calls == 70


def test_slow_runs_stop_when_the_seconds_are_up() -> None:
    # 0.5 s each: warm-up ends when over 2 s have gone (5 runs), measuring when 4 s have (8 runs).
    samples, calls = timed(steady(0.5), Timing(warmup=10, runs=60, least=2, seconds=4))
    assert len(samples) == 8
    assert calls == 8 + 5


def test_there_are_never_fewer_than_least() -> None:
    samples, calls = timed(steady(30), Timing(warmup=10, runs=60, least=10, seconds=4))
    assert samples == pytest.approx([30_000] * 10)
    assert calls == 11  # one run of warm-up was enough to see that it is slow


def test_no_warm_up_means_none() -> None:
    samples, calls = timed(steady(0.25), Timing(warmup=0, runs=2, least=1, seconds=4))
    assert samples == pytest.approx((250.0, 250.0))
    assert calls == 2


# --- a process of its own -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores that hang on every pixel: a dense layer over the flattened image."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["output"])], "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 6, 5])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path_factory.mktemp("bench") / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)


def test_readings_are_the_runtimes_own(model: Path) -> None:
    import onnxruntime as ort

    x = ((pixels(70) / 255.0 - HOW.mean) / HOW.std).transpose(0, 3, 1, 2).astype(np.float32)
    want = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]
    got = bench.measure(model, "onnx", pixels(70), HOW, timing=QUICK, batch=32)
    np.testing.assert_allclose(got.outputs, want, rtol=1e-5, atol=1e-5)
    assert got.outputs.dtype == np.float32
    assert got.runtime == f"ONNX Runtime {ort.__version__}"
    assert [row.threads for row in got.latency] == sorted({1, len(os.sched_getaffinity(0))})
    assert all(2 <= len(row.samples_ms) <= 3 and min(row.samples_ms) > 0 for row in got.latency)
    assert got.throughput > 0
    assert 10 < got.memory_mb < 500  # a runtime's own process; the test's, with torch in it, is larger


def test_ready_inputs_pass_unchanged_and_no_timing_means_none(model: Path) -> None:
    x = np.random.default_rng(2).normal(size=(3, 3, 6, 5)).astype(np.float32)
    got = bench.measure(model, "onnx", x, None, timing=None)
    import onnxruntime as ort

    want = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]
    np.testing.assert_allclose(got.outputs, want, rtol=1e-5, atol=1e-5)
    assert got.latency == ()


def test_damaged_file_is_a_bad_bundle_not_a_crash(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model.read_bytes()[:100])
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        bench.measure(tmp_path / "model.onnx", "onnx", pixels(2), HOW, timing=None)


def test_unknown_and_missing_formats_cost_no_process(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_run_child", lambda *a: pytest.fail("a process was started"))
    with pytest.raises(UnknownName):
        bench.measure(model, "onyx", pixels(1), HOW)
    monkeypatch.setattr("lighten.plugins.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingBackend):
        bench.measure(model, "onnx", pixels(1), HOW)


Fake = Callable[[str], Path]


@pytest.fixture
def fake_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a runtime of the test's own in the child's way; its `run` does what the test says. Returns its pid file."""

    def put(body: str) -> Path:
        room = tmp_path / "site"
        room.mkdir()
        pid = tmp_path / "pid"
        (room / "onnxruntime.py").write_text(
            f"""
import os, signal, sys, time
__version__ = "0.0"
open({str(pid)!r}, "w").write(str(os.getpid()))

class SessionOptions:
    def add_session_config_entry(self, key, value):
        pass

class InferenceSession:
    def __init__(self, *a, **k):
        pass

    def get_inputs(self):
        return [SessionOptions]

    def run(self, *a):
        {body}

SessionOptions.name = "input"
"""
        )
        monkeypatch.setenv("PYTHONPATH", str(room))
        return pid

    return put


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGILL"])
def test_a_runtime_that_dies_is_named_with_its_signal(model: Path, fake_runtime: Fake, name: str) -> None:
    fake_runtime(f"os.kill(os.getpid(), signal.{name})")
    with pytest.raises(CrashedRuntime, match=rf"model\.onnx.*{name}"):
        bench.measure(model, "onnx", pixels(2), HOW, timing=QUICK)


def test_a_runtime_that_leaves_is_named_with_its_exit_code(model: Path, fake_runtime: Fake) -> None:
    fake_runtime("os._exit(7)")
    with pytest.raises(CrashedRuntime, match="exit code 7"):
        bench.measure(model, "onnx", pixels(2), HOW, timing=None)


def test_a_runtime_that_leaves_quietly_has_still_not_answered(model: Path, fake_runtime: Fake) -> None:
    fake_runtime("os._exit(0)")
    with pytest.raises(CrashedRuntime, match="exit code 0"):
        bench.measure(model, "onnx", pixels(2), HOW, timing=None)


def test_what_the_runtime_complained_of_last_is_kept(model: Path, fake_runtime: Fake) -> None:
    fake_runtime("raise RuntimeError('no kernel for Frobnicate(11)')")
    with pytest.raises(CrashedRuntime, match=r"Frobnicate\(11\)"):
        bench.measure(model, "onnx", pixels(2), HOW, timing=None)


def test_a_runtime_that_hangs_is_ended_and_told(model: Path, fake_runtime: Fake) -> None:
    pid = fake_runtime("time.sleep(600)")
    with pytest.raises(CrashedRuntime, match="no answer in 4 s"):
        bench.measure(model, "onnx", pixels(2), HOW, timing=None, timeout_s=4)
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_files_in_turns_keep_their_ratio_when_the_machine_slows_down() -> None:
    """The clock slows threefold half way: single medians move, the ratio of both does not."""
    now, calls = [0.0], [0]

    def taking(seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls[0] += 1
            now[0] += seconds * (3 if now[0] > 1.5 else 1)

        return run

    got = bench.in_turns_ms(taking(0.01), taking(0.04), Timing(runs=60, seconds=4.0), lambda: now[0])
    assert got.ratio == pytest.approx(4.0, rel=0.05)
    assert min(len(got.ms), len(got.original_ms)) >= 15
    assert max(got.ms) == pytest.approx(30, rel=1e-6)
    assert now[0] < 3 * 4.0 + 2
