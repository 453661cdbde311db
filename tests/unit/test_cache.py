"""Files and folders appear whole or not at all, and a full disk says so."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from lighten.data import cache
from lighten.data.cache import cache_dir, room_to_write, sha256_file, whole_folder, write_whole
from lighten.errors import DiskFull


def fails(number: int) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIGHTEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "lighten"
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_write_whole_makes_folders_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "a.json"
    write_whole(file, "猫")
    assert file.read_bytes() == "猫".encode()
    write_whole(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    assert names(file.parent) == ["a.json"]
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "old")
    monkeypatch.setattr(cache.os, step, fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["fsync", "fdopen", "replace"])
def test_a_full_disk_is_named(number: int, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.os, step, fails(number))
    with pytest.raises(DiskFull, match=r"a\.txt") as caught:
        write_whole(tmp_path / "a.txt", "x")
    assert "Free some space" in caught.value.to_do
    assert names(tmp_path) == []


def test_a_full_disk_as_numpy_tells_it() -> None:
    with pytest.raises(DiskFull), room_to_write(Path("x.npy")):
        raise OSError("3000000 requested and 2097024 written")  # ndarray.tofile, which sets no errno
    with pytest.raises(FileNotFoundError), room_to_write(Path("x.npy")):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_whole_folder_appears_at_the_end_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "set"
    for text in ("one", "two"):
        before = (target / "a").read_text() if target.exists() else None
        with whole_folder(target) as room:
            (room / "sub").mkdir()
            (room / "a").write_text(text)
            assert ((target / "a").read_text() if target.exists() else None) == before
        assert (target / "a").read_text() == text
        assert (target / "sub").is_dir()
    assert names(tmp_path) == ["set"]


def half_way(target: Path, error: type[BaseException]) -> None:
    with whole_folder(target) as room:
        (room / "a").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_the_old_one(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "set"
    with whole_folder(target) as room:
        (room / "a").write_text("old")
    with pytest.raises(error):
        half_way(target, error)
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["set"]


def test_a_disk_that_fills_up_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With delayed allocation it is fsync that finds no room."""
    monkeypatch.setattr(cache.os, "fsync", fails(errno.ENOSPC))
    with pytest.raises(DiskFull), whole_folder(tmp_path / "set") as room:
        (room / "a").write_text("x")
    assert names(tmp_path) == []


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
