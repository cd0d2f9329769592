"""Compiled blobs: caches outside the bundle, one folder a graph and shape, checked before use and removed when old.

A blob is as good as code to the runtime that loads it. The folders are readable by their owner alone, every file's
sha256 is written down when the backend has made it, and one that has changed since is thrown away and compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .home import home, locked, sha256, write_whole

LIMIT = 4_000_000_000  # bytes kept over all graphs; what was used longest ago goes first
_SUMS = "sha256.json"


@contextlib.contextmanager
def blob_folder(key: object) -> Iterator[Path | None]:
    """The folder in which a backend finds or leaves its blobs for `key`; one process at a time.

    None when the home folder cannot be written: that costs compile time, not the run.
    """
    folder = home() / "compiled" / hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists() and (not _is_own(folder) or _files(folder) != _recorded(folder)):
                shutil.rmtree(folder)
            folder.mkdir(mode=0o700, exist_ok=True)
            os.utime(folder)
            usable = True
        except OSError:
            usable = False
        yield folder if usable else None
        if usable:
            try:
                _record(folder)
            except OSError:  # a full disk, most likely
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others prune too
                _prune(folder)


def _is_own(folder: Path) -> bool:
    """Nobody else made it or may write into it."""
    found = folder.lstat()
    if not hasattr(os, "getuid"):
        return True
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _files(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {path.name: sha256(path) for path in folder.iterdir() if path.name != _SUMS}


def _recorded(folder: Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / _SUMS).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return None


def _record(folder: Path) -> None:
    """Write down what is there, after every file of it: a process killed in between leaves files without a sum."""
    names = {path.name for path in folder.iterdir()}
    if not names:
        folder.rmdir()  # the backend kept nothing
    elif names != {*(_recorded(folder) or {}), _SUMS}:
        write_whole(folder / _SUMS, json.dumps(_files(folder)))


def _prune(current: Path) -> None:
    """Remove the folders used longest ago until what is left is within `LIMIT`; never the current one."""
    folders = sorted(
        (path for path in current.parent.iterdir() if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    total = 0
    for folder in folders:
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > LIMIT and folder != current:
            shutil.rmtree(folder, ignore_errors=True)
