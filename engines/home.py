"""The home folder and what all who write into it need: paths as users write them, locks, flushing, checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from .errors import UserError


def expanded(path: str) -> Path:
    """A path as a user writes it, with `~` for a home folder. Raises UserError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder; write the whole path") from None


def read_json(path: Path, missing: str | None = None) -> dict:
    """The JSON object of a file. Raises UserError for one that is not there (missing: what that means), or none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and missing is not None:
            raise UserError(f"{path.parent} has no {path.name}: {missing}") from None
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


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


SMALL = 64_000_000  # bytes; a smaller file is read again each time


def sha256_kept(path: Path) -> str:
    """sha256 of a file; of a large one it is remembered in the home folder while place, size and time are the same."""
    found = path.stat()
    if found.st_size < SMALL:
        return sha256(path)
    facts = [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino]
    note = home() / "digests" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", known := note.read_text("utf-8")):
            return known
    digest = sha256(path)
    keep(note, digest)
    return digest


def save_tensors(tensors: dict[str, NDArray], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises OSError for what the system refuses (a full disk), not safetensors' own error."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def flush(path: Path) -> None:
    """Let what was written reach the disk before it is relied on: a rename may overtake its data in a power cut."""
    if os.name != "posix":  # elsewhere only what was opened to be written can be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file at once. Whatever happens to the process: it is the old one or the new one, and whole.

    A killed process leaves `.<name>.<pid>.tmp` beside it at most, which `sweep` removes.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of `write_whole`: of that file in `folder`, or of any there and below it.

    No other process may be at them.
    """
    of = ".+" if name is None else re.escape(name)
    for part in folder.rglob(".*.tmp") if name is None else folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.{of}\.[0-9]+\.tmp", part.name):
            part.unlink()


def keep(path: Path, content: str | bytes) -> None:
    """`write_whole` of what saves time alone: where it cannot be written (a full disk) it is made again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


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
