"""Trials in a process of their own: one that dies is a failed trial, not a failed run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import mmap
import os
import pickle
import queue
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, BinaryIO

import numpy as np

from lighten import workshop
from lighten.bench import Timing
from lighten.data.splits import ListImages, Split
from lighten.errors import DiskFull
from lighten.types import Failure, Job, Recipe, Trial, from_json, silent, to_json, unsaid

PROGRESS_S = 0.1
"""Seconds between two progress messages of one child."""
_TAIL = 4000
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lighten.worker import main; main(sys.argv[2])"
# `-c` and not `-m`: a class of the user's __main__ must not be looked up among the names of this file.


@dataclass(frozen=True)
class _Task:
    """What every trial of a run needs; sent to a child once."""

    job: Job
    reference: workshop.Reference
    folder: Path
    timing: Timing
    threads: int


class _Dead(Exception):
    """The child is gone; the message says how."""


class _Refused(Exception):
    """The task cannot be had in another process; the message says why."""


# --- the parent -------------------------------------------------------------------------------------


class Worker:
    """Runs one trial after another in a child that starts with the first one, and again after a death.

    The child gets everything but the report split. What was built for the last trial stays there for the next format
    of the same plan. Where the model or the data cannot be sent, trials run in this process, and `job.say` hears so.
    """

    def __init__(self, job: Job, reference: workshop.Reference, folder: Path, timing: Timing) -> None:
        self.job, self.reference, self.folder, self.timing = job, reference, folder, timing
        self.here = False
        self.made: workshop.Made = {}
        self.child: _Child | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child and all that it started; its temporary files go too."""
        child, self.child = self.child, None
        if child is not None:
            child.end()

    def start(self) -> None:
        """Start the child, where none waits yet: who has a limit on all time counts its start."""
        try:
            if not self.here:
                self._ready()
        except BaseException:
            self.close()
            raise

    def attempt(self, recipe: Recipe, limit_s: float | None = None) -> Trial:
        """The trial of a recipe, as `workshop.attempt` gives it. Raises DiskFull.

        A child that dies, or works longer than `limit_s` (not counting its start), is a failed trial.
        """
        try:
            if not self.here and self._ready():
                assert self.child is not None
                return self._tried(self.child, recipe, limit_s)
        except BaseException:  # Ctrl-C, a full disk, a callback's own error: the child is in the middle of something
            self.close()
            raise
        artifacts = self.folder / "artifacts"
        return workshop.attempt(recipe, self.job, self.reference, artifacts, self.timing, self.made)

    def _ready(self) -> bool:
        """Whether a child waits for recipes; where none can, trials run here from now on."""
        if self.child is not None and self.child.process.poll() is None:
            return True
        self.close()
        try:
            sent = _packed(_task(self.job, self.reference, self.folder, self.timing))
            self.child = _Child()
            self.child.send(sent)
            first = next(self.child.messages(None))
            if first["kind"] == "refused":
                raise _Refused(first["reason"])
        except (_Refused, _Dead) as e:
            self.close()
            self.here = True
            what = "The model or its data cannot be sent to another process"
            self.job.say(f"{what} ({e}): trials run in this one, so a crash would end the run")
        return not self.here

    def _tried(self, child: _Child, recipe: Recipe, limit_s: float | None) -> Trial:
        said: list[str] = []
        try:
            child.ask(recipe)
            for message in child.messages(limit_s):
                if message["kind"] == "trial":
                    return dataclasses.replace(from_json(Trial, message["trial"]), recipe=recipe)
                if message["kind"] == "disk full":
                    raise DiskFull(message["what"], message["to_do"])
                if message["kind"] == "say":
                    said.append(message["line"])
                    self.job.say(message["line"])
                else:
                    self.job.progress(message["what"], message["done"], message["total"])
        except _Dead as e:
            self.close()
            return Trial(recipe, failure=Failure("being built", str(e)), notes=tuple(said))
        raise AssertionError("messages end in a death")


class _Child:
    """A fresh interpreter with the same import path, in a process group of its own.

    Ctrl-C then reaches the parent alone, which ends the whole group: the runtimes that the child had started too.
    """

    def __init__(self) -> None:
        self.room = tempfile.mkdtemp(prefix="lighten-worker-")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([str(p) for p in sys.path]), self.room],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": self.room},
            process_group=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.inbox: Any = self.process.stdin
        self.partial, self.tail, self.killed = b"", b"", False
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ, "out")
        self.selector.register(self.process.stderr, selectors.EVENT_READ, "err")

    def send(self, frames: list[bytes | memoryview]) -> None:
        """Raises _Dead."""
        try:
            for frame in frames:
                self.inbox.write(frame)
            self.inbox.flush()
        except OSError as e:
            raise _Dead(self.last_words()) from e

    def ask(self, recipe: Recipe) -> None:
        """Raises _Dead."""
        self.send([json.dumps(to_json(recipe)).encode() + b"\n"])

    def messages(self, limit_s: float | None) -> Iterator[dict[str, Any]]:
        """What the child says, line by line. Raises _Dead after its last whole line, or after `limit_s`."""
        end = time.monotonic() + limit_s if limit_s is not None else None
        while True:
            while b"\n" in self.partial:
                line, _, self.partial = self.partial.partition(b"\n")
                yield json.loads(line)
            if end is not None and time.monotonic() > end:
                raise _Dead(f"it took longer than the {limit_s:.0f} s that were left, and was stopped")
            if not self._more(1.0 if end is None else min(1.0, max(0.0, end - time.monotonic()))):
                raise _Dead(self.last_words())

    def _more(self, wait_s: float) -> bool:
        """Read what there is; False once nothing more can come."""
        ready = self.selector.select(wait_s)
        for key, _ in ready:
            data = os.read(key.fd, 1 << 16)
            if not data:
                self.selector.unregister(key.fileobj)
            if key.data == "err":
                self.tail = (self.tail + data)[-_TAIL:]
            elif data:
                self.partial += data
            else:
                return False
        # A process that the child forked may hold its pipe open after it.
        return bool(ready) or self.process.poll() is None

    def last_words(self) -> str:
        """How it ended, and the end of what it wrote to stderr."""
        code = self._kill()
        fd = self.process.stderr.fileno()  # type: ignore[union-attr]
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(fd, 1 << 16):
                self.tail = (self.tail + data)[-_TAIL:]
        if code == -signal.SIGKILL:
            how = "its process was killed (SIGKILL): perhaps out of memory"
        elif code < 0:
            how = f"its process died ({signal.Signals(-code).name})"
        else:
            how = f"its process ended (exit code {code})"
        tail = " ".join(self.tail.decode(errors="replace").strip().splitlines()[-3:])[-300:]
        return f"{how}. {tail}" if tail else how

    def _kill(self) -> int:
        """The exit status. Who is dying already keeps the reason it had; its own children go with it."""
        if not self.killed:
            self.killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def end(self) -> None:
        """Nothing of it is left when this returns."""
        self._kill()
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):  # unwritten bytes of a pipe that nobody reads any more
                pipe.close()  # type: ignore[union-attr]
        shutil.rmtree(self.room, ignore_errors=True)


# --- what is sent -----------------------------------------------------------------------------------


def _task(job: Job, reference: workshop.Reference, folder: Path, timing: Timing) -> _Task:
    """Without the callbacks, and without the report split: no trial may see it."""
    import torch

    none = Split(ListImages((), np.zeros(0, np.int64)), np.zeros(0, np.int64))
    data = dataclasses.replace(job.data, report=none)
    job = dataclasses.replace(job, data=data, progress=silent, say=unsaid)
    return _Task(job, reference, folder.resolve(), timing, torch.get_num_threads())


class _Pickler(pickle.Pickler):
    """Notes the modules that are named; an array that is mapped from a file goes as the file's name."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType):
            self.modules.add(str(obj.__module__))
        elif type(obj) is np.memmap and _is_whole_file(obj):
            order = "C" if obj.flags.c_contiguous else "F"
            return _map, (str(obj.filename), obj.dtype, obj.shape, obj.offset, order)
        return NotImplemented


def _is_whole_file(array: np.memmap) -> bool:
    """Whether it can be mapped anew by its own offset: a slice of it cannot, nor one whose file is gone."""
    try:
        found = os.stat(str(array.filename)).st_size
    except OSError:
        return False
    return array.mode == "r" and isinstance(array.base, mmap.mmap) and found >= array.offset + array.nbytes


def _map(file: str, dtype: Any, shape: tuple[int, ...], offset: int, order: Any) -> np.memmap:
    return np.memmap(file, dtype, "r", offset, shape, order)


def _packed(task: _Task) -> list[bytes | memoryview]:
    """A line that tells the sizes, then the pickle, then the arrays as they lie in memory. Raises _Refused.

    Pickle runs code of whoever wrote it. Here that is this process, through a pipe that only its child can read: the
    child runs nothing that its parent did not hold already. Nothing of it is ever a file.
    """
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = _Pickler(stream, buffers)
    try:
        pickler.dump(task)
        files = _files(pickler.modules)
    except Exception as e:  # the user's own classes may raise anything
        raise _Refused(_reason(e)) from e
    frames = [stream.getbuffer(), *(b.raw() for b in buffers)]
    head = {"sizes": [f.nbytes for f in frames], "files": files}
    return [json.dumps(head).encode() + b"\n", *frames]


def _files(modules: set[str]) -> dict[str, str]:
    """The files of modules that a fresh process would not find by name (--arch FILE.py:CALLABLE)."""
    found = {}
    for name in sorted(modules - {"__main__", "builtins"}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and "." not in name and not any(f.find_spec(name, None) for f in sys.meta_path):
            found[name] = str(Path(file).resolve())
    return found


def _reason(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


# --- the child --------------------------------------------------------------------------------------


def main(room: str) -> None:
    """Reads the task, then recipes, from stdin; `room` is for temporary files and goes when the parent does."""
    with open(os.devnull, "rb") as nothing:
        inbox, outbox = os.fdopen(os.dup(0), "rb"), _Outbox(os.dup(1))
        os.dup2(nothing.fileno(), 0)  # processes that are started here must not hold the parent's pipe
    os.dup2(2, 1)  # libraries print; messages keep the pipe to themselves
    try:
        head, frames = _received(inbox)
    except (EOFError, ValueError):
        return
    recipes: queue.SimpleQueue[Recipe] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox, recipes, room), daemon=True).start()
    try:
        task = _unpacked(head, frames)
    except Exception as e:  # noqa: BLE001 - whatever stops it, the parent is told
        return outbox.tell("refused", reason=_reason(e))
    outbox.tell("ready")
    made: workshop.Made = {}
    while True:
        _try(recipes.get(), task, made, outbox)


def _try(recipe: Recipe, task: _Task, made: workshop.Made, outbox: _Outbox) -> None:
    job = dataclasses.replace(task.job, progress=outbox.progress, say=lambda line: outbox.tell("say", line=line))
    try:
        trial = workshop.attempt(recipe, job, task.reference, task.folder / "artifacts", task.timing, made)
        outbox.tell("trial", trial=to_json(trial))
    except DiskFull as e:
        outbox.tell("disk full", what=e.what, to_do=e.to_do)


def _received(inbox: BinaryIO) -> tuple[dict[str, Any], list[bytearray]]:
    """The sizes and files, and each frame. Raises EOFError where the parent is gone."""
    line = inbox.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    return head, [_exactly(inbox, size) for size in head["sizes"]]


def _exactly(inbox: BinaryIO, size: int) -> bytearray:
    data, got = bytearray(size), 0
    while got < size:
        n = inbox.readinto(memoryview(data)[got:])  # type: ignore[attr-defined]
        if not n:
            raise EOFError
        got += n
    return data


def _unpacked(head: dict[str, Any], frames: list[bytearray]) -> _Task:
    import torch

    for name, file in head["files"].items():
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} cannot be imported")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    task: _Task = pickle.loads(frames[0], buffers=frames[1:])  # noqa: S301 - from the parent, see _packed
    torch.set_num_threads(task.threads)
    return task


def _listen(inbox: BinaryIO, recipes: queue.SimpleQueue[Recipe], room: str) -> None:
    """Blocks on the parent's pipe, which ends with the parent, even when that was killed by -9."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        for line in inbox:
            recipes.put(from_json(Recipe, json.loads(line)))
    shutil.rmtree(room, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


class _Outbox:
    """Messages to the parent, one JSON line each, from any thread."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.lock = pipe, threading.Lock()
        self.last, self.shown = 0.0, set[str]()

    def tell(self, kind: str, **what: Any) -> None:
        data = memoryview(json.dumps({"kind": kind, **what}).encode() + b"\n")
        with self.lock:
            while data:
                data = data[os.write(self.pipe, data) :]

    def progress(self, what: str, done: int, total: int) -> None:
        """Now and then; the end of what was shown always, so that its bar goes."""
        over = done >= total and what in self.shown
        if not over and time.monotonic() - self.last < PROGRESS_S:
            return
        self.last = time.monotonic()
        (self.shown.discard if over else self.shown.add)(what)
        self.tell("progress", what=what, done=done, total=total)
