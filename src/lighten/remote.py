"""A bundle measured on another device over ssh: copied there, run there, the raw readings brought back."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lighten import bundle as bundles
from lighten.bundle import Bundle
from lighten.errors import BadBundle, BadConfig, BadTarget, CrashedRuntime, DiskFull, LightenError
from lighten.plugins import get
from lighten.types import Latency, Progress, from_json, silent

CONNECT_S, MEASURE_S = 15, 900
NO_ROOM, NO_COPY, NO_PYTHON = 91, 92, 93
"""Exit codes of the script that runs on the device; it has no others of its own."""
SSH_FAILED = 255
MARK = "LIGHTEN:"


@dataclass(frozen=True)
class Target:
    """Where to connect: `user` may be empty, `port` 0 is ssh's own choice (its configuration, else 22)."""

    user: str
    host: str
    port: int = 0

    @property
    def name(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host


def parse(text: str) -> Target:
    """user@host, user@host:port, host, user@[ipv6]:port. Raises BadConfig."""
    user, at, rest = text.rpartition("@")
    host = r"\[(?P<six>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*)"
    found = re.fullmatch(rf"(?:{host})(?::(?P<port>\d{{1,5}}))?", rest, re.ASCII)
    if not found or (at and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", user, re.ASCII)):
        raise BadConfig(f"{text!r} is not a device to connect to.", "Write it as user@host or user@host:port.")
    port = int(found["port"] or 0)
    if found["port"] and not 0 < port < 65536:
        raise BadConfig(f"{text!r}: {port} is not a port.", "Ports are 1 to 65535.")
    return Target(user, found["six"] or found["host"], port)


def _quiet(text: str) -> None:
    """Says nothing."""


def bench(
    bundle_folder: Path,
    target: str,
    *,
    options: Sequence[str] = (),
    python: str = "python3",
    send_code: bool = True,
    timeout_s: int = MEASURE_S,
    progress: Progress = silent,
    log: Callable[[str], None] = _quiet,
) -> dict[str, Any]:
    """The record that `lighten bench --out` writes, measured on `target`, with every raw sample; see runner.bench_bundle.

    `options` are ssh's own ("IdentityFile=~/.ssh/pi", "ProxyJump=gate"), beside what ~/.ssh/config says; a password is
    never asked for. With `send_code` this lighten measures there, so the device needs only Python 3.11, numpy, Pillow
    and the format's runtime; else the lighten that is installed there does. Everything is copied into one new folder
    below the device's TMPDIR [/tmp], which is removed again, failed or not.
    Raises BadConfig, BadBundle, BadTarget, DiskFull, and CrashedRuntime where the model does not run there.
    """
    found, where = bundles.load(bundle_folder), parse(target)
    module = get("formats", found.format)
    needs = ("numpy", "PIL", *module.RUNS_ON, *(() if send_code else ("lighten",)))
    command = [*_ssh(where, options), _script(python)]
    with tempfile.TemporaryFile() as parcel:
        _pack(parcel, found, send_code, {"needs": needs, "seconds": timeout_s})
        log(f"copying {parcel.tell() / 1e6:.1f} MB to {where.name}, then measuring there")
        parcel.seek(0)
        progress(f"measuring on {where.name}", 0, 1)
        done = _run(command, parcel, where, timeout_s)
        progress(f"measuring on {where.name}", 1, 1)
    record = read_reply(done.stdout) if done.returncode == 0 else None
    if record is None:
        raise failure(done.returncode, done.stderr, where, python)
    return checked(record, found, where) | {"target": where.name}


def rows(record: dict[str, Any]) -> dict[str, str]:
    """A record as a person reads it."""
    found = {"device": str(record["target"])} if "target" in record else {}
    found |= {"runtime": record["runtime"], "processor": record["environment"]["processor"]}
    for row in (from_json(Latency, r) for r in record["latency"]):
        spread = f"p50 {row.p50:.2f} ms, p95 {row.p95:.2f} ms ({len(row.samples_ms)} runs)"
        found[f"latency, {row.threads} thread{'s' if row.threads > 1 else ''}"] = spread
    found["throughput"] = f"{record['throughput']:.0f} images/s (batches of 32, all threads)"
    return found | {"peak memory": f"{record['memory_mb']:.0f} MB"}


# --- there ------------------------------------------------------------------------------------------

SCRIPT = """
umask 077
room=$(mktemp -d "${TMPDIR:-/tmp}/lighten.XXXXXXXX") || exit 91
trap 'cd /; rm -rf "$room"' EXIT
trap 'exit 1' HUP INT TERM PIPE
cd "$room" || exit 91
tar -xof - || exit 92
command -v "$1" >/dev/null 2>&1 || exit 93
TMPDIR="$room" PYTHONPATH="$room/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 "$1" go.py </dev/null
"""
"""Runs in the device's sh. ONNX Runtime leaves a `.ses` in TMPDIR, so that is the room too. The parcel comes on its standard input; names of files are only ever in the parcel."""

GO = """
import importlib.util, json, signal, sys
from pathlib import Path

def reply(**said):
    print("\\nLIGHTEN:" + json.dumps(said))
    sys.exit(0)

def late(number, frame):
    raise TimeoutError

asked = json.loads(Path("asked.json").read_text())
if sys.version_info < (3, 11):
    reply(python="%d.%d" % sys.version_info[:2])
missing = [m for m in asked["needs"] if importlib.util.find_spec(m) is None]
if missing:
    reply(missing=missing)
from lighten.errors import LightenError
from lighten.runner import bench_bundle

signal.signal(signal.SIGALRM, late)
signal.alarm(asked["seconds"])
try:
    bench_bundle(Path("bundle"), Path("bench.json"))
except LightenError as e:
    reply(what=e.what, to_do=e.to_do)
except TimeoutError:
    reply(what="It took longer than %d s." % asked["seconds"], to_do="Try a smaller model.")
reply(record=json.loads(Path("bench.json").read_text()))
"""
"""Also read by Pythons that are too old, so that they can say so."""


def _script(python: str) -> str:
    return f"sh -c {shlex.quote(SCRIPT)} lighten {shlex.quote(python)}"


def _ssh(where: Target, options: Sequence[str]) -> list[str]:
    if shutil.which("ssh") is None:
        raise BadTarget("ssh is not installed.", "sudo apt-get install openssh-client")
    fixed = ("BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=15", "ServerAliveCountMax=4")
    words = ["ssh", "-T", "-a", "-x"]
    for option in (*fixed, "LogLevel=ERROR", *options):
        words += ["-o", option]
    return [*words, *(("-p", str(where.port)) if where.port else ()), "--", where.name]


def _pack(out: IO[bytes], found: Bundle, send_code: bool, asked: dict[str, Any]) -> None:
    """The parcel: the bundle's own files (those in its manifest, no others), what to do, and lighten where wanted."""
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in sorted({*found.manifest["files"], "manifest.json"}):
            tar.add(found.folder / name, f"bundle/{name}", recursive=False, filter=_plain)
        _add(tar, "asked.json", json.dumps(asked).encode())
        _add(tar, "go.py", GO.encode())
        house = Path(__file__).parent
        for file in sorted(house.rglob("*.py")) if send_code else ():
            tar.add(file, f"code/lighten/{file.relative_to(house).as_posix()}", recursive=False, filter=_plain)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    info.mode = 0o600
    return info


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = _plain(tarfile.TarInfo(name))
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _run(command: list[str], parcel: IO[bytes], where: Target, timeout_s: int) -> subprocess.CompletedProcess[str]:
    limit = timeout_s + 60 + CONNECT_S  # the device's own limit comes first; this is for a line that hangs
    try:
        return subprocess.run(command, stdin=parcel, capture_output=True, timeout=limit, text=True, errors="replace")
    except subprocess.TimeoutExpired as e:
        raise BadTarget(f"{where.name} gave no answer in {limit} s.", "Check the connection, then try again.") from e


# --- back here --------------------------------------------------------------------------------------


def read_reply(said: str) -> dict[str, Any] | None:
    """What the device replied: the last marked line. A login script may have said other things before."""
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    try:
        reply = json.loads(lines[-1].removeprefix(MARK)) if lines else None
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None


def checked(reply: dict[str, Any], found: Bundle, where: Target) -> dict[str, Any]:
    """The record in a reply, if it is one and is of this very model. Raises what the reply says instead."""
    if "python" in reply:
        what = f"{where.name} has Python {reply['python']}; lighten needs 3.11 or newer."
        raise BadTarget(what, "Install a newer Python there, or name one: --python python3.11")
    if "missing" in reply:
        raise _missing([str(m) for m in reply["missing"]], where)
    if "what" in reply:
        raise CrashedRuntime(f"On {where.name}: {reply['what']}", str(reply.get("to_do", "")))
    record: Any = reply.get("record")
    try:
        latency = [from_json(Latency, row) for row in record["latency"]]
        numbers = [record["throughput"], record["memory_mb"], *(ms for row in latency for ms in row.samples_ms)]
        fine = latency and all(row.samples_ms for row in latency) and all(math.isfinite(n) and n >= 0 for n in numbers)
        strings = [record["runtime"], record["environment"]["processor"], record["model_sha256"]]
        fine = fine and all(isinstance(s, str) for s in strings)
    except (TypeError, KeyError, ValueError, AttributeError) as e:
        raise BadTarget(f"{where.name} sent back something that is no record ({e!r}).", "Try again.") from e
    if not fine:
        raise BadTarget(f"{where.name} sent back a record without readings.", "Try again.")
    if record["model_sha256"] != found.manifest["model"]["sha256"]:
        raise BadBundle(f"{where.name} measured another model (its sha256 differs).", "Try again.")
    return dict(record)


def _missing(names: list[str], where: Target) -> BadTarget:
    wheels = {"PIL": "pillow", "ai_edge_litert": "ai-edge-litert"}
    wanted = "lighten" if "lighten" in names else " ".join(wheels.get(n, n) for n in names)
    return BadTarget(
        f"{where.name} lacks {', '.join(names)}.",
        f"There: python3 -m pip install {shlex.quote(wanted) if ' ' not in wanted else wanted}",
    )


SAYINGS: tuple[tuple[str, str, str], ...] = (
    ("Could not resolve hostname", "{host} is not a host that can be found.", "Check the name, or give its address."),
    ("IDENTIFICATION HAS CHANGED", "{host} is not the machine it was (its host key has changed).", "If that is right: ssh-keygen -R {host}"),
    ("Host key verification failed", "{host} has never been connected to (its host key is not known).", "Connect once by hand and accept its key: ssh {name}"),
    ("Permission denied", "{name} did not let us in: no key of ours is accepted there.", "ssh-copy-id {name}  (a password is never asked for here)"),
    ("Too many authentication failures", "{name} did not let us in: too many keys were offered.", "Name the right one: --ssh-option IdentityFile=FILE --ssh-option IdentitiesOnly=yes"),
    ("Connection refused", "{host} refuses connections: no ssh server listens there.", "Start one (sudo systemctl start ssh), or give its port: user@host:port"),
    ("timed out", "{host} cannot be reached (no answer in time).", "Is it switched on, and in this network?"),
    ("No route to host", "{host} cannot be reached (no route to it).", "Is it switched on, and in this network?"),
    ("Network is unreachable", "{host} cannot be reached (no network).", "Is this machine connected?"),
)  # fmt: skip
"""What ssh says, what it means, what to do."""


def failure(code: int, said: str, where: Target, python: str) -> LightenError:
    """The error for an ssh that ended with `code` and `said` this on its standard error."""
    tail = " ".join(said.strip().splitlines()[-2:])[-300:]
    if code == SSH_FAILED:
        for saying, what, to_do in SAYINGS:
            if saying in said:
                names = {"host": where.host, "name": where.name}
                return BadTarget(what.format(**names), to_do.format(**names))
        return BadTarget(f"ssh to {where.name} failed: {tail or 'it gave no reason'}", f"Try by hand: ssh {where.name}")
    if code in (NO_ROOM, NO_COPY) and re.search("no space left|quota", said, re.IGNORECASE):
        return DiskFull(
            f"The disk of {where.name} is full.", "Free some space there, or set its TMPDIR to a larger disk."
        )
    if code in (NO_ROOM, NO_COPY):
        step = "make a temporary folder" if code == NO_ROOM else "unpack the bundle"
        return BadTarget(f"{where.name} could not {step}: {tail}", "See to that there, then try again.")
    if code == NO_PYTHON:
        return BadTarget(
            f"{where.name} has no {python}.", "There: sudo apt-get install python3; or name another one: --python FILE"
        )
    return CrashedRuntime(
        f"Measuring on {where.name} ended with exit code {code}. {tail}".strip(), "Try again, or another format."
    )
