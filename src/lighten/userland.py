"""An arm64 userland on this machine: a Debian tree, aarch64 wheels and qemu-user, built once. And Python run in it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from lighten.data.cache import whole_folder, write_whole
from lighten.errors import BadConfig, CrashedRuntime, MissingTool

QEMU = "qemu-aarch64-static"
TOOLS = {QEMU: "qemu-user-static", "mmdebstrap": "mmdebstrap"}
"""Programs, and the Debian packages that bring them."""
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
PYTHON = {"bookworm": "3.11", "trixie": "3.13"}
"""Debian releases that the userland may be of, and their Python."""
GLIBC_MINOR = 36
"""Of bookworm, the older one: wheels built for an older glibc run too."""
BASE = ("numpy>=1.26", "pillow>=10.3")
BUILD_S = 900.0


@dataclass(frozen=True)
class Core:
    """A processor core: its board, the "CPU part" and features that the board's Linux shows."""

    name: str
    board: str
    part: str
    variant: str
    revision: str
    features: str

    def cpuinfo(self) -> str:
        """/proc/cpuinfo of the board, which ONNX Runtime and others read to choose kernels."""
        rows = {
            "BogoMIPS\t": "108.00",
            "Features\t": self.features,
            "CPU implementer\t": "0x41",
            "CPU architecture": "8",
            "CPU variant\t": self.variant,
            "CPU part\t": self.part,
            "CPU revision\t": self.revision,
        }
        body = "".join(f"{k}: {v}\n" for k, v in rows.items())
        return "".join(f"processor\t: {i}\n{body}\n" for i in range(4)) + f"Model\t\t: {self.board}\n"


CORES = {
    core.name: core
    for core in (
        Core("cortex-a72", "Raspberry Pi 4 Model B Rev 1.4", "0xd08", "0x0", "3", "fp asimd evtstrm crc32 cpuid"),
        Core(
            "cortex-a76",
            "Raspberry Pi 5 Model B Rev 1.0",
            "0xd0b",
            "0x4",
            "1",
            "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        ),
    )
}


@dataclass(frozen=True)
class Userland:
    """A folder that qemu lays over /, Python in it, and folders of aarch64 wheels; `new` where it was just built."""

    core: Core
    root: Path
    python: Path
    wheels: tuple[Path, ...]
    bytecode: Path
    new: bool

    def python_there(self, code: str, words: list[str], room: Path, timeout_s: float) -> None:
        """Run Python `code` on the emulated core. Raises CrashedRuntime with what it said last."""
        environment = {
            "PATH": os.defpath,
            "HOME": str(room),
            "TMPDIR": str(room),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join(map(str, (*self.wheels, _own_code(room)))),
            "PYTHONPYCACHEPREFIX": str(self.bytecode),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        core = [QEMU, "-cpu", self.core.name, "-L", str(self.root), str(self.python), "-s", "-S", "-c", code]
        with _started([*core, *words], room / "said.txt", environment) as process:
            try:
                ended = process.wait(timeout_s)
            except subprocess.TimeoutExpired as e:
                what = f"The emulated {self.core.name} gave no answer in {timeout_s:.0f} s."
                raise CrashedRuntime(what, "Ask for fewer images; emulation is some twenty times slower.") from e
        if ended:
            what = f"Python died on the emulated {self.core.name} ({_ending(ended)}). {_tail(room / 'said.txt')}"
            raise CrashedRuntime(what.strip(), "The file does not run on this core: try another format or precision.")


def python_here(code: str, words: list[str], room: Path, timeout_s: float) -> None:
    """Run Python `code` on this machine, in a process of its own. Raises CrashedRuntime."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(_own_code(room)),
        "TMPDIR": str(room),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with _started([sys.executable, "-c", code, *words], room / "said.txt", environment) as process:
        try:
            ended = process.wait(timeout_s)
        except subprocess.TimeoutExpired as e:
            raise CrashedRuntime(f"This machine gave no answer in {timeout_s:.0f} s.", "Ask for fewer images.") from e
    if ended:
        said = _tail(room / "said.txt")
        raise CrashedRuntime(f"The runtime died on this machine ({_ending(ended)}). {said}".strip(), "lighten doctor")


def _own_code(room: Path) -> Path:
    """A folder to import lighten from, and nothing else: beside the package may lie this machine's other packages,
    built for another processor and Python."""
    (room / "code").mkdir(exist_ok=True)
    if not (room / "code" / "lighten").exists():
        (room / "code" / "lighten").symlink_to(Path(__file__).resolve().parent)
    return room / "code"


def build(core: Core, module: ModuleType, cache: Path, log: Callable[[str], None]) -> Userland:
    """The userland for `core` and the runtime of the format `module`, from `cache` or built there, whole or not at all.

    Raises MissingTool with the command that installs what is missing, BadConfig where a package cannot be had.
    """
    home = cache / "arm64"
    built = next((r for r in PYTHON if (home / f"debian-{r}").exists()), None)
    release, sources = (built, ()) if built else _debian()
    python = PYTHON[release]
    system = home / f"debian-{release}"
    wheels: dict[Path, tuple[str, ...]] = {home / f"py{python}-base": BASE}
    wheels |= {home / f"py{python}-{pin.replace('==', '-')}": (pin,) for pin in _pins(module)}
    _need(QEMU)
    home.mkdir(parents=True, exist_ok=True)
    with _alone(home):
        jobs: dict[Path, Callable[[Path], list[str]]] = {}
        if not system.exists():
            _need("mmdebstrap")
            jobs[system] = lambda room: _debian_command(room, release, sources)
        for folder, pins in wheels.items():
            if not folder.exists():
                jobs[folder] = lambda room, pins=pins: _pip_command(room, python, pins)  # type: ignore[misc]
        if jobs:
            size = "about 250 MB" if system in jobs else "only what is missing"
            log(f"building an arm64 userland in {home}, once: {size}")
            _build_all(jobs, log)
        root = _root_of(core, system, home)
    return Userland(
        core, root, system / "usr" / "bin" / f"python{python}", tuple(wheels), home / "bytecode", bool(jobs)
    )


def _root_of(core: Core, system: Path, home: Path) -> Path:
    """`system` with the board's /proc/cpuinfo and list of processors. qemu-user opens a file below this folder where
    there is one, and the machine's own file where there is none, so nothing needs to be mounted."""
    root = home / f"{system.name}-{core.name}"
    if root.exists():
        return root
    with whole_folder(root) as room:
        for entry in system.iterdir():
            if entry.name not in ("proc", "sys", "tmp", "dev"):
                (room / entry.name).symlink_to(Path("..") / system.name / entry.name)
        write_whole(room / "proc" / "cpuinfo", core.cpuinfo())
        for name in ("possible", "present"):
            write_whole(room / "sys" / "devices" / "system" / "cpu" / name, "0-3\n")
    return root


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One builder at a time; what an earlier one was killed over is cleared away."""
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in home.glob(".*.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        yield


def _build_all(jobs: dict[Path, Callable[[Path], list[str]]], log: Callable[[str], None]) -> None:
    """Every folder by its command, side by side. All are taken away again where one fails or is interrupted."""
    end = time.monotonic() + BUILD_S
    with tempfile.TemporaryDirectory(prefix="lighten-") as scratch, contextlib.ExitStack() as stack:
        started = []
        for folder, command in jobs.items():
            words = command(stack.enter_context(whole_folder(folder)))
            said = Path(scratch) / folder.name
            started.append((folder, words, said, stack.enter_context(_started(words, said))))
        for folder, words, said, process in started:
            try:
                code = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired as e:
                what = f"{Path(words[0]).name} was not done with {folder.name} in {BUILD_S:.0f} s. {_tail(said)}"
                raise BadConfig(what.strip(), "Check the network, then run it again.") from e
            if code:
                what = f"{folder.name} could not be built ({_ending(code)}): {_tail(said, 4)}"
                raise BadConfig(what, f"By hand: {' '.join(words)}")
            log(f"  {folder.name} is there")


@contextlib.contextmanager
def _started(
    words: list[str], said: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A child process with its output in the file `said`; it and its own children are ended with the context."""
    with said.open("w") as out:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _need(tool: str) -> None:
    if shutil.which(tool) is None:
        packages = " ".join(dict.fromkeys((*TOOLS.values(), "debian-archive-keyring")))
        raise MissingTool(f"{tool} is not installed (needed to emulate ARM).", f"sudo apt-get install {packages}")


def _debian() -> tuple[str, tuple[str, ...]]:
    """The release for the userland, and this machine's own sources of it; none where it has another system."""
    words = [
        "apt-get",
        "indextargets",
        "--format",
        "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(COMPONENT)",
        "Created-By: Packages",
    ]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    return sources_in(told)


def sources_in(told: str) -> tuple[str, tuple[str, ...]]:
    """A release and its lines for apt, from "Origin|codename|address|component" rows; the oldest release known, and no
    lines (mmdebstrap's own default), where the rows name none."""
    rows = [row.split("|") for row in told.splitlines() if row.count("|") == 3]
    mine = [(name, uri, part) for origin, name, uri, part in rows if origin == "Debian"]
    for release in PYTHON:
        if any(name == release and part == "main" for name, _, part in mine):
            wanted = (release, f"{release}-updates", f"{release}-security")
            lines = (f"deb {uri} {name} main" for name, uri, part in mine if part == "main" and name in wanted)
            return release, tuple(dict.fromkeys(lines))
    return next(iter(PYTHON)), ()


def _debian_command(room: Path, release: str, sources: tuple[str, ...]) -> list[str]:
    mode = "root" if os.geteuid() == 0 else "chrootless"
    return [
        "mmdebstrap",
        "--quiet",
        f"--mode={mode}",
        "--variant=extract",
        "--architectures=arm64",
        f"--include={','.join(PACKAGES)}",
        "--dpkgopt=path-exclude=/usr/share/*",
        release,
        str(room),
        *sources,
    ]


def _pip_command(room: Path, python: str, pins: tuple[str, ...]) -> list[str]:
    """Whichever installer is here, with this machine's own settings."""
    common = ["--target", str(room), "--python-version", python, "--no-deps"]
    if found := _pip():
        glibc = [f"manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC_MINOR + 1)]
        platforms = [word for tag in (*glibc, "manylinux2014_aarch64") for word in ("--platform", tag)]
        kind = ["--implementation", "cp", "--only-binary=:all:", "--no-compile", "--quiet", "--no-input"]
        return [*found, "install", *common, *platforms, *kind, *pins]
    if uv := shutil.which("uv"):
        return [
            uv,
            "pip",
            "install",
            *common,
            "--python-platform",
            "aarch64-manylinux_2_35",
            "--only-binary=:all:",
            *pins,
        ]
    raise MissingTool("pip is not installed (needed to fetch the ARM runtime).", "sudo apt-get install python3-pip")


def _pip() -> list[str] | None:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    path = shutil.which("pip") or shutil.which("pip3")
    return [path] if path else None


def _pins(module: ModuleType) -> tuple[str, ...]:
    """The format's runtime in the version that is installed here: two versions may answer differently."""
    pins = []
    for package in module.RUNS_ON:
        try:
            pins.append(f"{package}=={metadata.version(package)}")
        except metadata.PackageNotFoundError:  # of another name than its package: onnxruntime-gpu has no ARM wheels
            name = metadata.packages_distributions()[package][0]
            plain = "onnxruntime" if name.startswith("onnxruntime") else name
            pins.append(f"{plain}=={metadata.version(name)}")
    return tuple(pins)


def qemu_version() -> str:
    told = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=60).stdout
    return "qemu " + next((w for w in told.split() if w[:1].isdigit()), "?")


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _tail(said: Path, lines: int = 2) -> str:
    """The last lines that a process said, without pip's and apt's chatter about itself."""
    rows = [r.strip() for r in said.read_text(errors="replace").splitlines() if r.strip()]
    return " ".join([r for r in rows if not r.startswith(("WARNING:", "[notice]"))][-lines:])[-600:]
