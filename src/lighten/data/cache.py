"""Where data sets are kept, and writing that is never read half-done."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lighten.errors import DiskFull


def cache_dir() -> Path:
    """`$LIGHTEN_CACHE`, else `$XDG_CACHE_HOME/lighten`, else `~/.cache/lighten`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LIGHTEN_CACHE") or Path(base) / "lighten")


@contextlib.contextmanager
def room_to_write(where: Path) -> Iterator[None]:
    """Turns a full disk into an error that says where and what to do."""
    try:
        yield
    except OSError as e:
        # numpy's tofile gives no errno: "3000000 requested and 2097024 written".
        if e.errno in (errno.ENOSPC, errno.EDQUOT) or (e.errno is None and " requested and " in str(e)):
            raise DiskFull(
                f"The disk is full while writing {where}.",
                "Free some space, then run the same command: it continues.",
            ) from e
        raise


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees all of it or none: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    with room_to_write(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(raw)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under `path` only when everything in it is written; it replaces an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with room_to_write(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as f:
                        os.fsync(f.fileno())
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sha256_file(path: Path) -> str:
    """Hex digest, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
