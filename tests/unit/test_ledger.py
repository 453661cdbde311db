"""The ledger survives what kills processes, and never mixes two runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import trial
from lighten import ledger
from lighten.errors import BadBundle, DiskFull, RunLocked
from lighten.types import Estimate, Failure, Final, Precision, Recipe, Step, Trial

ONE = trial(Recipe())
TWO = trial(Recipe((Step("quantize", (("images", 64),)),), Precision("int8", "int8")), top1=89.5, size=270_000)
LOST = Trial(Recipe(format="openvino"), failure=Failure("being built", "no kernel for «x»\nsecond line\u2028third"))
FINAL = Final(Estimate(90, 1, 100), Estimate(89, 1, 100), Estimate(1, 0.5, 100), 3, ())


def opened(folder: Path, *trials: Trial) -> ledger.Ledger:
    book = ledger.open_ledger(folder, "question")
    for one in trials:
        book = book.append("trial", one)
    return book


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    book = opened(tmp_path, ONE, TWO, LOST).append("final", {"winner": TWO.id, "final": FINAL})
    again = ledger.open_ledger(tmp_path, "question")
    assert again == book
    assert again.trials == (ONE, TWO, LOST)
    assert again.final == (TWO.id, FINAL)
    assert again.fingerprint == "question"


def test_each_fact_is_one_line_of_plain_json(tmp_path: Path) -> None:
    book = opened(tmp_path, ONE, LOST)
    raw = book.path.read_bytes()
    assert raw.endswith(b"\n")
    rows = [json.loads(line) for line in raw.split(b"\n")[:-1]]
    assert [r["kind"] for r in rows] == ["run", "trial", "trial"]
    assert "«x»" in raw.decode()  # readable, not escaped


def test_appending_never_rewrites_what_was_there(tmp_path: Path) -> None:
    book = opened(tmp_path, ONE)
    before = book.path.read_bytes()
    book.append("trial", TWO)
    assert book.path.read_bytes().startswith(before)


def test_the_last_record_of_a_trial_counts(tmp_path: Path) -> None:
    """A trial whose files were damaged is made again."""
    again = trial(ONE.recipe, top1=91.0)
    assert opened(tmp_path, ONE, TWO, again).trials == (again, TWO)


def test_not_a_number_survives_as_not_a_number(tmp_path: Path) -> None:
    assert ONE.evidence is not None
    odd = replace(ONE, evidence=replace(ONE.evidence, memory_mb=float("nan")))
    (back,) = opened(tmp_path, odd).trials
    assert back.evidence is not None
    assert back.evidence.memory_mb != back.evidence.memory_mb
    assert b"NaN" not in (tmp_path / ledger.NAME).read_bytes()


def test_half_written_last_line_is_cut_at_every_byte_and_the_rest_kept(tmp_path: Path) -> None:
    path = opened(tmp_path, ONE, TWO).path
    whole = path.read_bytes()
    kept = whole[: whole.rstrip(b"\n").rfind(b"\n") + 1]
    for cut in range(len(kept), len(whole)):
        path.write_bytes(whole[:cut])
        assert ledger.open_ledger(tmp_path, "question").trials == (ONE,), cut
        assert path.read_bytes() == kept
    path.write_bytes(whole)
    assert ledger.open_ledger(tmp_path, "question").trials == (ONE, TWO)


def test_first_line_half_written_starts_afresh(tmp_path: Path) -> None:
    path = opened(tmp_path).path
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert ledger.open_ledger(tmp_path, "question").trials == ()
        assert path.read_bytes() == whole


def test_a_run_goes_on_after_a_cut(tmp_path: Path) -> None:
    path = opened(tmp_path, ONE, TWO).path
    path.write_bytes(path.read_bytes()[:-5])
    assert opened(tmp_path, LOST).trials == (ONE, LOST)


@pytest.mark.parametrize(
    "damage", [b"{not json", b"[]", b'{"kind": "trial"}', b'{"kind": "trial", "value": {"recipe": 3}}', b"\xff\xfe"]
)
def test_damaged_middle_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = opened(tmp_path, ONE, TWO).path
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(BadBundle, match="line 2"):
        ledger.open_ledger(tmp_path, "question")


def test_another_question_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    path = opened(tmp_path, ONE).path
    before = path.read_bytes()
    with pytest.raises(BadBundle, match=tmp_path.name) as e:
        ledger.open_ledger(tmp_path, "other")
    assert "--fresh" in e.value.to_do
    assert path.read_bytes() == before


# --- lock ---------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from lighten import ledger
with ledger.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_locked_out_until_the_first_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=tmp_path.name), ledger.locked(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        assert holder.wait(10) == -signal.SIGKILL
        with ledger.locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait(10)
        if holder.stdout:
            holder.stdout.close()


def test_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ledger.locked(tmp_path):
        raise KeyError
    with ledger.locked(tmp_path / "other"), ledger.locked(tmp_path):
        pass


# --- a full disk ----------------------------------------------------------------------------------------


def test_full_disk_is_told_and_what_was_whole_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = opened(tmp_path, ONE)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match=r"ledger\.jsonl"):
            book.append("trial", TWO)
    assert ONE in ledger.open_ledger(tmp_path, "question").trials


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_that_is_really_full_is_told(tmp_path: Path) -> None:
    (tmp_path / ledger.NAME).symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        ledger.Ledger(tmp_path / ledger.NAME, "question").append("run", {"fingerprint": "question"})
