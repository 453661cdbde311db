"""A trial in another process is the same trial; whatever ends that process ends one trial, and nothing outlives us."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deadly
from lighten import Preprocess, load_data, worker, workshop
from lighten.bench import Timing
from lighten.errors import DiskFull
from lighten.types import Device, Job, Precision, Recipe, Step, Trial

QUICK = Timing(warmup=1, runs=2, least=2, seconds=0.1)
HOW = Preprocess(16, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
INT8 = Recipe((Step("quantize"),), Precision("int8", "int8"))
FLOAT = Recipe()
CHEAP = Recipe(format="papyrus")
"""A whole trial that fails before anything is exported: a first export costs each new process seconds."""


def pictures(n: int = 120) -> list[tuple[np.ndarray, int]]:
    """Noise with a label: what the networks answer does not matter here."""
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8), k % 3) for k in range(n)]


class Heard:
    """The callbacks of a job, and what they were called with."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: list[tuple[str, int, int]] = []

    def step(self, what: str, done: int, total: int) -> None:
        self.progress.append((what, done, total))


def setup(model: nn.Module, heard: Heard, device: Device, **changes: Any) -> tuple[Job, workshop.Reference]:
    data = load_data(pictures())
    parts = {k: s.prepare(HOW) for k, s in data.splits.items() if k != "train"}
    data = dataclasses.replace(data, **parts)
    job = Job(data, "classification", device, HOW, model, progress=heard.step, say=heard.lines.append, **changes)
    return job, workshop.Reference(data.select, workshop.torch_outputs(deadly.Tiny().eval(), job, data.select))


Make = Callable[[nn.Module], worker.Worker]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def make(tmp_path: Path, here: Device, heard: Heard) -> Iterator[Make]:
    """model -> its worker, ended with the test."""
    made: list[worker.Worker] = []

    def build(model: nn.Module) -> worker.Worker:
        made.append(worker.Worker(*setup(model.eval(), heard, here), tmp_path / "run", QUICK))
        return made[-1]

    yield build
    for one in made:
        one.close()


def same(a: Trial, b: Trial) -> None:
    """All but times and memory, which no two processes share."""
    assert a.artifact == b.artifact
    assert a.evidence is not None
    assert b.evidence is not None
    for name in ("metric", "drop", "extra", "classes", "size", "fidelity", "drift", "runtime", "flipped"):
        assert getattr(a.evidence, name) == getattr(b.evidence, name), name
    assert (a.recipe, a.layers, a.failure) == (b.recipe, b.layers, b.failure)


def lives(one: worker.Worker) -> bool:
    """Whether a trial comes back from the workshop, through the messages."""
    trial = one.attempt(CHEAP)
    return trial.failure is not None and "no format named 'papyrus'" in trial.failure.reason


def pid(one: worker.Worker) -> int:
    assert one.child is not None
    return one.child.process.pid


def gone(process: int, within_s: float = 10) -> bool:
    """Whether a process that is not our child ends in time; a zombie that nobody waits for has ended."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# --- the same trial ---------------------------------------------------------------------------------


def test_a_trial_in_another_process_is_the_trial_of_this_one(
    make: Make, heard: Heard, here: Device, tmp_path: Path
) -> None:
    """And the next format of the same plan finds the module there: another copy would kill the process."""
    flag = tmp_path / "flag"
    one = make(deadly.Deadly(flag))
    got = one.attempt(INT8)
    job, reference = setup(deadly.Tiny().eval(), Heard(), here)
    same(got, workshop.attempt(INT8, job, reference, tmp_path / "here" / "artifacts", QUICK))
    assert workshop.is_whole(got, tmp_path / "run")
    assert not one.here
    assert heard.progress
    assert heard.lines == []
    first = pid(one)
    assert first != os.getpid()
    flag.write_text("SIGKILL")
    second = one.attempt(dataclasses.replace(INT8, format="openvino"))
    assert second.failure is None
    assert second.layers == got.layers
    assert pid(one) == first
    assert one.attempt(FLOAT).failure is not None, "another plan is built anew"


def test_a_file_of_the_user_is_found_there_too(make: Make, tmp_path: Path) -> None:
    from lighten.models.load import build

    (tmp_path / "beside.py").write_text("classes = 3\n")
    (tmp_path / "own.py").write_text(
        "import beside\nfrom deadly import Tiny\n\nclass Own(Tiny):\n    def __init__(self):\n        super().__init__(beside.classes)\n"
    )
    one = make(build(f"{tmp_path / 'own.py'}:Own", trust_code=True))
    assert lives(one)
    assert not one.here


def test_threads_and_the_report_split(here: Device, tmp_path: Path) -> None:
    job, reference = setup(deadly.Tiny(), Heard(), here)
    task = worker._task(job, reference, tmp_path, QUICK)
    assert task.threads == torch.get_num_threads()
    assert len(task.job.data.report) == 0
    assert len(job.data.report) > 0
    assert task.job.data.select is job.data.select


# --- what is sent -----------------------------------------------------------------------------------


def returned(value: Any) -> tuple[Any, int]:
    """`value` after the journey, and how many bytes went."""
    frames = worker._packed(value)
    raw = b"".join(bytes(f) for f in frames)
    import io

    head, parts = worker._received(io.BytesIO(raw))
    assert head["sizes"] == [len(bytes(f)) for f in frames[1:]]
    return pickle.loads(parts[0], buffers=parts[1:]), len(raw)


def test_a_mapped_array_is_mapped_there_and_not_sent(tmp_path: Path) -> None:
    whole = np.arange(400_000, dtype=np.uint8).reshape(100, 4000)
    np.save(tmp_path / "a.npy", whole)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    (got, part), sent = returned((mapped, mapped[3:5]))
    assert sent < 10_000
    assert isinstance(got, np.memmap)
    np.testing.assert_array_equal(got, whole)
    np.testing.assert_array_equal(part, whole[3:5])
    got, _ = returned(np.asfortranarray(whole))
    np.testing.assert_array_equal(got, whole)


def test_a_mapped_array_whose_file_is_gone_is_sent_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(4000))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    (tmp_path / "a.npy").unlink()
    np.testing.assert_array_equal(returned(mapped)[0], np.arange(4000))


def test_an_array_that_two_splits_share_is_sent_once() -> None:
    pixels = np.ones(1_000_000, np.uint8)
    (a, b), sent = returned((pixels, pixels))
    assert a is b
    assert sent < 1_010_000
    a[0] = 2  # torch warns about arrays that cannot be written


def test_half_a_task_is_no_task() -> None:
    import io

    with pytest.raises(EOFError):
        worker._received(io.BytesIO(b'{"sizes": [10], "files": {}}\nabc'))
    with pytest.raises(EOFError):
        worker._received(io.BytesIO(b'{"sizes": [10]'))


# --- deaths -----------------------------------------------------------------------------------------


DEATHS = {
    "SIGKILL": "its process was killed (SIGKILL): perhaps out of memory",
    "exit": "its process ended (exit code 7). the last words of a library",
    "mid-message": "its process died (SIGSEGV)",
}


def test_a_death_is_one_failed_trial_and_the_next_one_lives(make: Make, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    one = make(deadly.Deadly(flag))
    for how, says in DEATHS.items():
        flag.write_text(how)
        dead = one.attempt(FLOAT)
        assert dead.recipe == FLOAT
        assert dead.failure is not None
        assert (dead.failure.stage, dead.failure.reason) == ("being built", says)
    assert lives(one)
    os.kill(pid(one), signal.SIGKILL)
    assert one.child is not None
    one.child.process.wait(30)
    assert lives(one), "a death between two trials costs none"
    assert not one.here


def test_a_full_disk_ends_the_run_and_nothing_is_left(make: Make, tmp_path: Path) -> None:
    (tmp_path / "flag").write_text("full")
    one = make(deadly.Deadly(tmp_path / "flag"))
    assert lives(one)
    child, room = pid(one), Path(one.child.room)  # type: ignore[union-attr]
    assert room.is_dir()
    with pytest.raises(DiskFull) as e:
        one.attempt(FLOAT)
    assert (e.value.what, e.value.to_do) == ("The disk is full.", "Free some space.")
    assert one.child is None
    assert gone(child, 0.1)
    assert not room.exists()


def test_a_trial_over_its_time_is_stopped(make: Make, tmp_path: Path) -> None:
    (tmp_path / "flag").write_text("sleep")
    one = make(deadly.Deadly(tmp_path / "flag"))
    one.start()
    began = time.monotonic()
    trial = one.attempt(FLOAT, limit_s=2)
    assert trial.failure is not None
    assert "longer than the 2 s" in trial.failure.reason
    assert time.monotonic() - began < 200  # the start was before
    assert gone(int((tmp_path / "flag.pid").read_text()))


# --- models that cannot travel ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "why"), [(deadly.Unsendable, "lambda"), (deadly.NotFound, "users_own")])
def test_what_cannot_be_sent_runs_here_and_says_so_once(
    make: Make, heard: Heard, kind: type[nn.Module], why: str
) -> None:
    one = make(kind())
    assert lives(one)
    assert lives(one)
    assert one.here
    assert one.child is None
    assert len(heard.lines) == 1
    assert heard.lines[0].endswith("trials run in this one, so a crash would end the run")
    assert why in heard.lines[0]


# --- the parent's end -------------------------------------------------------------------------------

PARENT = """
    import signal, sys
    sys.path[:0] = {paths!r}
    from pathlib import Path
    import deadly, test_worker
    from lighten import devices, worker

    class Mine(deadly.Tiny):
        pass

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits an ignored one
        tmp = Path(sys.argv[1])
        heard = test_worker.Heard()
        model = Mine() if sys.argv[2] == "own" else deadly.Deadly(tmp / "flag")
        job, reference = test_worker.setup(model.eval(), heard, devices.load("this-machine"))
        with worker.Worker(job, reference, tmp / "run", test_worker.QUICK) as one:
            if sys.argv[2] != "own":
                (tmp / "flag").write_text("sleep")
            trial = one.attempt(test_worker.CHEAP if sys.argv[2] == "own" else test_worker.FLOAT)
            print(one.here, heard.lines)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """A script that runs one trial: of a network that sleeps, or of a class of its own __main__."""
    tests = Path(__file__).parents[1]
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PARENT).format(paths=[str(tests), str(tests / "unit")]))
    started = []

    def start(what: str) -> subprocess.Popen:
        command = [sys.executable, str(script), str(tmp_path), what]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def sleeping(tmp_path: Path) -> int:
    """The child's process, once it is in its trial."""
    file, end = tmp_path / "flag.pid", time.monotonic() + 200
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(file.read_text())


def room_of(process: int) -> Path:
    environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return Path(next(e for e in environment if e.startswith(b"TMPDIR=")).decode()[7:])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_orphan_is_left_where_the_parent_is_killed(parent: Callable[[str], Any], tmp_path: Path) -> None:
    running = parent("sleep")
    child = sleeping(tmp_path)
    room = room_of(child)
    running.kill()
    assert gone(child)
    assert not room.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_interrupts_the_parent_and_the_child_goes_quietly(parent: Callable[[str], Any], tmp_path: Path) -> None:
    running = parent("sleep")
    child = sleeping(tmp_path)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert errors.count("Traceback") == 1
    assert gone(child)


def test_a_class_of_the_main_script_runs_here(parent: Callable[[str], Any]) -> None:
    out, errors = parent("own").communicate(timeout=300)
    assert out.startswith("True"), errors
    assert "Mine" in out
    assert "trials run in this one" in out


# --- messages ---------------------------------------------------------------------------------------


def test_progress_is_thinned_out_but_its_end_always_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    clock = iter(np.arange(100.0, 200.0, 0.01).tolist())
    monkeypatch.setattr(worker.time, "monotonic", lambda: next(clock))
    box = worker._Outbox(-1)
    monkeypatch.setattr(box, "tell", lambda kind, what, done, total: told.append((what, done)))
    for k in range(1, 101):
        box.progress("epoch", k, 100)
    box.progress("never shown", 1, 1)
    assert told[-1] == ("epoch", 100)
    assert 5 <= len(told) <= 20
    assert ("never shown", 1) not in told
