"""The emulated Raspberry Pi: what it shows of itself, how answers are compared, a userland whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")

from quadrants import write_detector
from test_bundle import HOW, change, write_bundle

from lighten import bundle as bundles
from lighten import emulate, userland
from lighten.bundle import Bundle
from lighten.data.cache import cache_dir, sha256_file
from lighten.data.images import open_image
from lighten.data.preprocess import to_pixels
from lighten.emulate import Answers, Difference, compare, first_of, variations
from lighten.errors import BadConfig, CrashedRuntime, LightenError, MissingTool, RefusedFormat, UnknownName
from lighten.plugins import get
from lighten.types import Recipe
from lighten.userland import CORES, sources_in

PI4, PI5 = CORES["cortex-a72"], CORES["cortex-a76"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("run"))


# --- the boards -----------------------------------------------------------------------------------------


def test_a_board_shows_four_processors_of_its_own_kind() -> None:
    for core, part, dots in ((PI4, "0xd08", False), (PI5, "0xd0b", True)):
        rows = [r.split(":") for r in core.cpuinfo().splitlines() if ":" in r]
        values = [(k.strip(), v.strip()) for k, v in rows]
        assert [v for k, v in values if k == "processor"] == ["0", "1", "2", "3"]
        assert {v for k, v in values if k == "CPU part"} == {part}
        assert all(("asimddp" in v.split()) is dots for k, v in values if k == "Features")


def test_the_machines_own_debian_sources_are_used_and_no_others() -> None:
    told = "Debian|trixie|mirror:/d/|main\nDebian|trixie-security|mirror:/s/|main\nDebian|trixie|mirror:/d/|contrib\nOther|trixie|x:/|main\n"
    assert sources_in(told) == ("trixie", ("deb mirror:/d/ trixie main", "deb mirror:/s/ trixie-security main"))
    for nothing in ("", "Ubuntu|noble|mirror:/u/|main\n", "Debian|sid|mirror:/d/|main\n"):
        assert sources_in(nothing) == ("bookworm", ())


# --- what is refused before anything is built -----------------------------------------------------------


def test_wrong_requests_are_refused_at_once(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="cortex-a72"):
        emulate.check(made, "cortex-a7", cache=tmp_path)
    with pytest.raises(BadConfig, match="-1"):
        emulate.check(made, images=-1, cache=tmp_path)
    with pytest.raises(BadConfig, match="2 images are wanted, 0"):
        emulate.check(made, images=2, source=(_empty(tmp_path),), cache=tmp_path)
    assert not (tmp_path / "arm64").exists()


def _empty(folder: Path) -> Path:
    (folder / "none").mkdir()
    return folder / "none"


def test_a_format_without_an_arm_runtime_is_refused(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "b"))
    change(folder, lambda m: m["model"].update(format="coreml"))
    with pytest.raises(RefusedFormat, match="coreml"):
        emulate.check(folder, cache=tmp_path)


def test_a_missing_tool_is_one_line_with_its_command(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool) as e:
        emulate.check(made, cache=tmp_path)
    assert "qemu-aarch64-static is not installed" in e.value.what
    assert e.value.to_do.startswith("sudo apt-get install qemu-user-static mmdebstrap")
    assert e.value.exit_code == 4


# --- images ---------------------------------------------------------------------------------------------


def test_variations_are_new_images_and_always_the_same_ones() -> None:
    golden = np.random.default_rng(1).integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)
    first = variations(golden, 7)
    assert first.shape == (7, 8, 10, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, variations(golden, 7))
    assert len({image.tobytes() for image in (*golden, *first)}) == 10
    assert variations(golden, 0).shape == (0, 8, 10, 3)
    floats = variations(np.ones((2, 3, 4, 5), np.float32), 3)
    assert floats.shape == (3, 3, 4, 5)
    assert floats.dtype == np.float32


def test_images_of_a_folder_are_decoded_as_the_bundle_says(made: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(file)
    pixels, told = emulate._pixels(bundles.load(made), 2, (tmp_path,))
    assert len(pixels) == 16 + 2
    for got, file in zip(pixels[16:], files):
        np.testing.assert_array_equal(got, to_pixels(open_image(file), HOW))
    assert str(tmp_path) in told


# --- the comparison -------------------------------------------------------------------------------------


def _answers(outputs: np.ndarray) -> Answers:
    return Answers(outputs, "R 1", "3.11", "2", False)


@pytest.fixture
def compared(made: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., emulate.Emulated]:
    monkeypatch.setattr(emulate, "qemu_version", lambda: "qemu 7")

    def run(edit: Callable[[np.ndarray], Any], inside: Any = None, activations: str = "int8") -> emulate.Emulated:
        found = bundles.load(made)
        manifest = {**found.manifest, "recipe": {"precision": {"weights": "int8", "activations": activations}}}
        ours = found.golden()["outputs"]
        theirs = ours.copy()
        edit(theirs)
        return compare(
            Bundle(made, manifest), PI4, _answers(ours), _answers(theirs), inside, "golden images", (0.0, 1.0)
        )

    return run


def _nudge(outputs: np.ndarray) -> None:
    outputs[0, outputs[0].argmax()] += 1e-5


def test_equal_bits_pass_and_say_that_speed_is_not_proven(compared: Callable[..., emulate.Emulated]) -> None:
    got = compared(lambda outputs: None)
    assert got.passed
    assert got.bit_exact
    assert got.same == got.images == got.golden == got.golden_same == 16
    assert got.worst == 0
    assert "not speed" in " ".join(got.lines)
    assert got.lines[0].startswith("PASS cortex-a72")


def test_integers_must_be_equal_and_floats_need_not(compared: Callable[..., emulate.Emulated]) -> None:
    assert not compared(_nudge).passed
    assert compared(_nudge, activations="float32").passed
    assert not compared(_nudge, activations="float32").bit_exact


def test_integers_may_differ_only_where_the_runtime_itself_is_known_to(
    compared: Callable[..., emulate.Emulated],
) -> None:
    add, conv = Difference("QLinearAdd", True, 1), Difference("QLinearConv", True, 1)
    rounding = Difference("HardSigmoid", False, 1e-7)
    assert compared(_nudge, (add, rounding)).passed
    assert "qladd.cpp" in compared(_nudge, (add,)).remark
    for inside in ((), (conv,), (add, conv), (replace(add, by=2),), (replace(rounding, by=1e-3),)):
        got = compared(_nudge, inside)
        assert not got.passed, inside
        assert got.remark


def test_a_changed_label_or_a_nan_fails_whatever_is_allowed(compared: Callable[..., emulate.Emulated]) -> None:
    def flip(outputs: np.ndarray) -> None:
        order = outputs[0].argsort()
        outputs[0, order[-2]] = outputs[0, order[-1]] + 1e-6

    def nan(outputs: np.ndarray) -> None:
        outputs[3, 1] = np.nan

    for edit in (flip, nan):
        assert not compared(edit, activations="float32").passed


def test_a_detector_is_held_to_its_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulate, "qemu_version", lambda: "qemu 7")
    found = bundles.load(write_detector(tmp_path))
    ours = found.golden()["outputs"]

    def compared(theirs: np.ndarray) -> emulate.Emulated:
        return compare(found, PI4, _answers(ours), _answers(theirs), None, "golden images", (0.0, 1.0))

    same = compared(ours.copy())
    assert same.passed
    assert (same.what, same.same, same.compared, same.golden_same, same.golden) == ("boxes", 16, 16, 16, 16)
    assert "16 of 16 boxes are the same" in same.lines[0]
    moved = ours.copy()
    moved[3, :, :4] = 0.1
    assert not compared(moved).passed
    assert compared(moved).same == 15


def test_another_number_of_classes_is_no_comparison(made: Path) -> None:
    ours = bundles.load(made).golden()["outputs"]
    with pytest.raises(CrashedRuntime, match="shape"):
        compare(bundles.load(made), PI4, _answers(ours), _answers(ours[:, :2]), None, "", (0, 0))


def test_the_first_operator_that_differs_is_found() -> None:
    one = np.array([1, 2], np.uint8)
    assert first_of([("A", one, one)]) is None
    assert first_of([("A", one, one), ("B", one, one + 1), ("C", one, one + 9)]) == Difference("B", True, 1)
    x = np.array([4.0, 2.0], np.float32)
    found = first_of([("A", x, x + np.float32(1e-3))])
    assert found is not None
    assert found.by == pytest.approx(1e-3 / 4, rel=1e-3)


# --- the userland ---------------------------------------------------------------------------------------


def _sh(line: str) -> Callable[[Path], list[str]]:
    return lambda room: ["sh", "-c", line, "sh", str(room)]


def test_folders_are_built_side_by_side(tmp_path: Path) -> None:
    wait = 'until [ -e "$2" ]; do sleep 0.02; done; echo a > "$1/file"; echo b > "$3"'
    one, two = tmp_path / "one", tmp_path / "two"
    jobs = {
        one: lambda room: ["sh", "-c", wait, "sh", str(room), str(tmp_path / "b"), str(tmp_path / "a")],
        two: _sh(f'echo > {tmp_path}/b; until [ -e {tmp_path}/a ]; do sleep 0.02; done; echo b > "$1/file"'),
    }
    userland._build_all(jobs, lambda text: None)
    assert (one / "file").read_text() == "a\n"
    assert (two / "file").read_text() == "b\n"


def test_a_build_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    home = tmp_path / "home"
    jobs = {
        home / "good": _sh('echo > "$1/file"'),
        home / "bad": _sh('echo > "$1/half"; echo no such package >&2; exit 3'),
    }
    with pytest.raises(LightenError, match=r"bad could not be built \(exit code 3\): no such package"):
        userland._build_all(jobs, lambda text: None)
    assert list(home.iterdir()) == []


def test_a_build_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userland, "BUILD_S", 0.5)
    home, pid = tmp_path / "home", tmp_path / "pid"
    with pytest.raises(LightenError, match="not done"):
        userland._build_all(
            {home / "slow": _sh(f'sleep 60 & echo $! > {pid}; echo > "$1/half"; wait')}, lambda text: None
        )
    assert list(home.iterdir()) == []
    time.sleep(0.1)
    state = Path(f"/proc/{int(pid.read_text())}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, timeout: float | None = None) -> int:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        userland._build_all({tmp_path / "home" / "slow": _sh('echo > "$1/half"; sleep 60')}, lambda text: None)
    assert list((tmp_path / "home").iterdir()) == []


def test_one_builds_at_a_time_and_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".debian-bookworm.x1y2").mkdir()
    order: list[str] = []

    def second() -> None:
        with userland._alone(tmp_path):
            order.append("second")

    with userland._alone(tmp_path):
        assert [f.name for f in tmp_path.iterdir()] == [".lock"]
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.1)
        order.append("first")
    other.join(5)
    assert order == ["first", "second"]


def test_the_board_lies_over_the_system_without_changing_it(tmp_path: Path) -> None:
    system = tmp_path / "debian-bookworm"
    (system / "usr" / "bin").mkdir(parents=True)
    (system / "usr" / "bin" / "python3.11").write_text("py")
    root = userland._root_of(PI5, system, tmp_path)
    assert (root / "usr" / "bin" / "python3.11").read_text() == "py"
    assert (root / "proc" / "cpuinfo").read_text() == PI5.cpuinfo()
    assert (root / "sys/devices/system/cpu/possible").read_text() == "0-3\n"
    assert not (system / "proc").exists()


# --- the emulator itself, where it is installed and its userland has been built -------------------------


@pytest.fixture(scope="module")
def cache() -> Path:
    """$LIGHTEN_EMULATE_CACHE: a cache folder to build the userland in if need be; else the usual one, if it is there."""
    if shutil.which(userland.QEMU) is None:
        pytest.skip("qemu-aarch64-static is not installed")
    if named := os.environ.get("LIGHTEN_EMULATE_CACHE"):
        return Path(named)
    if not list((cache_dir() / "arm64").glob("debian-*-cortex-a72")):
        pytest.skip("no arm64 userland here yet (lighten check BUNDLE --on cortex-a72 builds it)")
    return cache_dir()


def test_a_float_bundle_gives_its_answers_there(cache: Path, tmp_path: Path) -> None:
    got = emulate.check(write_bundle(tmp_path, recipe=Recipe()), images=4, cache=cache)
    assert got.passed, got.lines
    assert got.images == 20
    assert not got.dot_products


@pytest.fixture
def integers(exported: Any, here: Any, tmp_path: Path) -> Path:
    """A bundle of the plan's int8 file of a small network, with inputs that are ready floats."""
    pytest.importorskip("torch")
    from nets import calibration

    file = exported("onnx", "small", "int8").path
    folder = write_bundle(tmp_path, how=None)
    shutil.copyfile(file, folder / "model.onnx")
    x = np.concatenate([np.asarray(b, np.float32) for b in calibration()])[:16]
    outputs = get("formats", "onnx").load(file, 1)(x)
    np.savez(folder / "golden.npz", pixels=x, outputs=outputs, atol=np.float32(0.05))
    sums = {n: sha256_file(folder / n) for n in ("model.onnx", "golden.npz")}
    change(folder, lambda m: m["files"].update(sums) or m["model"].update(sha256=sums["model.onnx"]))
    return folder


def test_an_int8_bundle_gives_the_same_bits_on_both_cores(cache: Path, integers: Path) -> None:
    for core in CORES:
        got = emulate.check(integers, core, images=16, cache=cache)
        assert got.passed, got.lines
        assert got.bit_exact or "QLinearAdd" in got.remark, got.lines
        assert got.dot_products == (core == "cortex-a76")


def test_a_model_that_takes_too_long_there_is_ended(cache: Path, made: Path) -> None:
    built = userland.build(PI4, get("formats", "onnx"), cache, print)
    with pytest.raises(CrashedRuntime, match="no answer in 0 s"):
        emulate.answers(built.python_there, bundles.load(made), bundles.load(made).golden()["pixels"], 0.2)


def test_a_process_that_dies_there_is_said(cache: Path, tmp_path: Path) -> None:
    built = userland.build(PI4, get("formats", "onnx"), cache, print)
    with pytest.raises(CrashedRuntime, match="cortex-a72"):
        built.python_there("import os; os.abort()", [], tmp_path, 60)
