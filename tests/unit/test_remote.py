"""Measuring over ssh: against a real sshd on loopback, started here as an ordinary process with keys of its own."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")

from test_bundle import change, write_bundle

from lighten import bundle as bundles
from lighten import remote
from lighten.errors import BadBundle, BadConfig, CrashedRuntime, DiskFull, LightenError
from lighten.remote import BadTarget, Target, failure, parse, read_reply
from lighten.types import Latency, from_json

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
HERE = Target("me", "pi", 2222)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("run"))


# --- what needs no connection ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("pi@raspberrypi", Target("pi", "raspberrypi")),
        ("pi@10.0.0.7:2222", Target("pi", "10.0.0.7", 2222)),
        ("board", Target("", "board")),
        ("pi@[fe80::1%eth0]:22", Target("pi", "fe80::1%eth0", 22)),
    ],
)
def test_targets_are_read(text: str, want: Target) -> None:
    assert parse(text) == want


@pytest.mark.parametrize(
    "text",
    ["", "pi@", "@host", "-oProxyCommand=evil", "pi@-oProxyCommand=evil", "-l@host", "pi@host:0", "pi@host:70000",
     "pi@host;rm -rf", "a b@host", "pi@ho$(id)st", "pi@host\n", "pi@host:", "pi@host:٢٢", "ssh://pi@host"],
)  # fmt: skip
def test_what_is_no_target_is_refused_before_ssh_sees_it(text: str, made: Path) -> None:
    with pytest.raises(BadConfig):
        remote.bench(made, text)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("ssh: Could not resolve hostname pi: Name or service not known", "can be found"),
        ("ssh: connect to host pi port 22: Connection refused", "no ssh server"),
        ("ssh: connect to host pi port 22: Connection timed out", "no answer"),
        ("ssh: connect to host pi port 22: No route to host", "no route"),
        ("me@pi: Permission denied (publickey,password).", "did not let us in"),
        ("Host key verification failed.", "host key"),
        ("kex_exchange_identification: read: Connection reset by peer", "Connection reset"),
    ],
)
def test_each_way_that_ssh_fails_is_said_in_one_line(said: str, word: str) -> None:
    found = failure(255, said, HERE, "python3")
    assert isinstance(found, BadTarget)
    assert word in found.what
    assert "\n" not in found.what
    assert found.to_do


def test_a_full_disk_there_is_a_full_disk() -> None:
    said = "tar: bundle/model.onnx: Cannot write: No space left on device"
    assert isinstance(failure(92, said, HERE, "python3"), DiskFull)
    assert isinstance(failure(91, "mktemp: failed to create directory: No space left on device", HERE, "p"), DiskFull)
    assert not isinstance(failure(92, "sh: tar: not found", HERE, "p"), DiskFull)


def test_only_the_marked_line_is_the_reply() -> None:
    assert read_reply('Welcome!\nLIGHTEN:{"record": 1}\n') == {"record": 1}
    for noise in ("", "Welcome!", "LIGHTEN:{broken", "LIGHTEN:[1]"):
        assert read_reply(noise) is None


GOOD = {
    "latency": [{"threads": 1, "samples_ms": [1.0, 2.0]}], "throughput": 3.0, "memory_mb": 4.0, "runtime": "r",
    "environment": {"processor": "p"},
}  # fmt: skip


@pytest.mark.parametrize(
    "edit",
    [{"latency": []}, {"latency": None}, {"latency": [{"threads": 1, "samples_ms": []}]}, {"throughput": None},
     {"throughput": float("nan")}, {"memory_mb": -1}, {"environment": "x"}, {"runtime": 7}],
)  # fmt: skip
def test_a_reply_that_is_no_record_is_refused(edit: dict[str, Any], made: Path) -> None:
    found = bundles.load(made)
    good = GOOD | {"model_sha256": found.manifest["model"]["sha256"]}
    assert remote.checked({"record": good}, found, HERE) == good
    with pytest.raises(BadTarget):
        remote.checked({"record": good | edit}, found, HERE)


def test_a_record_of_another_model_is_refused(made: Path) -> None:
    with pytest.raises(BadBundle, match="another model"):
        remote.checked({"record": GOOD | {"model_sha256": "0" * 64}}, bundles.load(made), HERE)


def test_what_the_device_lacks_is_named_with_the_command() -> None:
    with pytest.raises(BadTarget) as e:
        remote.checked({"missing": ["numpy", "PIL"]}, None, HERE)  # type: ignore[arg-type]
    assert "numpy, PIL" in e.value.what
    assert "pip install numpy pillow" in e.value.to_do
    with pytest.raises(BadTarget, match=r"3\.9"):
        remote.checked({"python": "3.9"}, None, HERE)  # type: ignore[arg-type]


def test_the_parcel_holds_the_bundle_and_code_and_nothing_else(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "b"))
    (folder / "private.txt").write_text("not of the bundle")
    with (tmp_path / "parcel.tar").open("w+b") as out:
        remote._pack(out, bundles.load(folder), True, {})
    with tarfile.open(tmp_path / "parcel.tar") as tar:
        names = set(tar.getnames())
        assert all(m.isfile() for m in tar)
    of_bundle = {n for n in names if n.startswith("bundle/")}
    assert of_bundle == {f"bundle/{f.name}" for f in made.iterdir()}
    rest = names - of_bundle - {"asked.json", "go.py"}
    assert rest
    assert all(n.startswith("code/lighten/") and n.endswith(".py") for n in rest)


def test_a_changed_bundle_is_not_sent(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "b"))
    with (folder / "model.onnx").open("ab") as f:
        f.write(b"x")
    with pytest.raises(BadBundle, match="sha256"):
        remote.bench(folder, "me@pi")
    change(folder, lambda m: m["files"].update({"../evil": "0"}))
    with pytest.raises(BadBundle):
        remote.bench(folder, "me@pi")


# --- against a real server ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """An sshd on loopback. `room` is the TMPDIR of its sessions."""

    port: int
    folder: Path
    room: Path

    @property
    def target(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.port}"

    def options(self, key: str = "key", hosts: str = "known_hosts") -> tuple[str, ...]:
        return (f"IdentityFile={self.folder / key}", "IdentitiesOnly=yes", f"UserKnownHostsFile={self.folder / hosts}",
                "GlobalKnownHostsFile=/dev/null", "StrictHostKeyChecking=yes")  # fmt: skip

    def bench(self, bundle: Path, **more: Any) -> dict[str, Any]:
        return remote.bench(bundle, self.target, **{"options": self.options(), "python": sys.executable, **more})


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> bool:
    for _ in range(100):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return True
        if process.poll() is not None:
            return False
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no sshd here (apt-get install openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd wants to put itself; it asks for no more
    folder = tmp_path_factory.mktemp("ssh")
    folder.chmod(0o700)
    for name in ("host", "key", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port, room = _free_port(), folder / "room with 'quotes'"
    room.mkdir()
    host = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host[0]} {host[1]}\n")
    (folder / "empty").write_text("")
    shutil.copyfile(folder / "key.pub", folder / "authorized")
    # A value of SetEnv has no escapes for quotes: sessions get the room by a link.
    (folder / "room").symlink_to(room)
    config = [
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder / 'host'}", f"PidFile {folder / 'pid'}",
        f"AuthorizedKeysFile {folder / 'authorized'}", "StrictModes no", "UsePAM no", "PasswordAuthentication no",
        "KbdInteractiveAuthentication no", "PermitRootLogin yes", f"SetEnv TMPDIR={folder / 'room'}",
    ]  # fmt: skip
    (folder / "config").write_text("\n".join(config) + "\n")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stdout=log, stderr=log)
    try:
        if not _wait_for(port, process):
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-300:]}")
        yield Server(port, folder, room)
    finally:
        process.terminate()
        process.wait(10)


def test_a_bundle_is_measured_there_and_nothing_is_left_behind(server: Server, made: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    record = server.bench(made, progress=lambda *a: steps.append(a))
    assert record["model_sha256"] == bundles.load(made).manifest["model"]["sha256"]
    for row in record["latency"]:
        found = from_json(Latency, row)
        assert len(found.samples_ms) >= 10
        assert found.p50 > 0
    assert record["environment"]["python"] == sys.version.split()[0]
    assert record["target"].endswith("@127.0.0.1")
    assert steps[-1][1:] == (1, 1)
    assert json.loads(json.dumps(record)) == record
    assert any(k.startswith("latency, 1 thread") for k in remote.rows(record))
    assert list(server.room.iterdir()) == []


def test_a_key_that_is_not_known_there_is_refused_without_asking(server: Server, made: Path) -> None:
    with pytest.raises(BadTarget, match="did not let us in") as e:
        server.bench(made, options=server.options(key="stranger"))
    assert "ssh-copy-id" in e.value.to_do


def test_an_unknown_host_key_is_not_accepted(server: Server, made: Path) -> None:
    with pytest.raises(BadTarget, match="host key is not known"):
        server.bench(made, options=server.options(hosts="empty"))


def test_a_closed_port_is_said(server: Server, made: Path) -> None:
    with pytest.raises(BadTarget, match="no ssh server listens"):
        remote.bench(made, f"me@127.0.0.1:{_free_port()}", options=server.options())


def test_a_python_that_is_not_there_is_said(server: Server, made: Path) -> None:
    with pytest.raises(BadTarget, match=r"has no no-such-python; touch"):
        server.bench(made, python="no-such-python; touch hacked")
    assert list(server.room.iterdir()) == []


def _python(folder: Path, name: str, body: str) -> str:
    """A stand-in for the device's Python."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_packages_that_are_missing_there_are_named(server: Server, made: Path, tmp_path: Path) -> None:
    bare = _python(tmp_path, "bare", f'exec "{getattr(sys, "_base_executable", sys.executable)}" -I -S "$@"')
    with pytest.raises(BadTarget) as e:
        server.bench(made, python=bare)
    assert "lacks numpy, PIL, onnxruntime" in e.value.what
    assert "pip install" in e.value.to_do
    with pytest.raises(BadTarget, match="lighten") as e:
        server.bench(made, python=bare, send_code=False)
    assert list(server.room.iterdir()) == []


def test_a_python_that_dies_there_is_said_and_its_folder_removed(server: Server, made: Path, tmp_path: Path) -> None:
    with pytest.raises(CrashedRuntime, match="exit code 7"):
        server.bench(made, python=_python(tmp_path, "dies", "echo it broke >&2; exit 7"))
    with pytest.raises(LightenError, match="exit code"):
        server.bench(made, python=_python(tmp_path, "killed", "kill -9 $$"))
    assert list(server.room.iterdir()) == []


def test_a_model_that_takes_too_long_is_ended_there(server: Server, made: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\nif 'lighten.bench' in sys.orig_argv:\n    time.sleep(60)\n"
    )
    slow = _python(tmp_path, "slow", f'PYTHONPATH="{tmp_path}:$PYTHONPATH" exec {sys.executable} "$@"')
    with pytest.raises(CrashedRuntime, match="longer than 1 s"):
        server.bench(made, timeout_s=1, python=slow)
    assert list(server.room.iterdir()) == []


def test_no_room_there_is_said(server: Server, made: Path) -> None:
    (server.folder / "room").unlink()
    try:
        with pytest.raises(BadTarget, match="temporary folder"):
            server.bench(made)
    finally:
        (server.folder / "room").symlink_to(server.room)
