"""The home folder and what all who write into it need: paths as users write them, locks, flushing, checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from .errors import UserError


def expanded(path: str) -> Path:
    """A path as a user writes it, with `~` for a home folder. Raises UserError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder; write the whole path") from None


def home() -> Path:
    """`$DIT_TRT_HOME`, or the user's cache folder."""
    named = os.environ.get("DIT_TRT_HOME")
    return expanded(named) if named else Path(platformdirs.user_cache_dir("dit-trt"))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Let what was written reach the disk before it is relied on: a rename may overtake its data in a power cut."""
    if os.name != "posix":  # elsewhere only what was opened to be written can be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for whatever makes `path`; the others wait here. The lock ends with its process."""
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = locks / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    lock.touch()
    with flocked(lock):
        yield


@contextlib.contextmanager
def flocked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file or folder. Raises BlockingIOError when another process has it and `wait` is False."""
    try:
        import fcntl
    except ImportError:  # not a Unix: two builds of one thing at once are then the user's to avoid
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
