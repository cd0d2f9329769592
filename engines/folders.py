"""Folders that are whole or absent: filled under another name, flushed to the disk, then swapped in."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .home import flocked, flush, locked


@contextlib.contextmanager
def new_folder(target: Path, sweep_all: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` to fill; when the block ends well it takes the place of `target`.

    Whatever is there is replaced: whether it may be is the caller's to check. When the block fails, or is interrupted,
    nothing is left; what a killed process left is removed by the next one that makes `target` (sweep_all: any folder
    beside it, all of which are made here).
    """
    target = target.resolve()  # a link to a folder stays one, and what it points at is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with locked(target.parent):
            _sweep(target, sweep_all)
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", dir=target.parent))
            held.enter_context(flocked(work))  # tells the sweep of another process that this one lives
        old = work.with_name(work.name + ".old")
        try:
            yield work
            work.chmod(0o755)
            for file in work.iterdir():
                file.chmod(0o644)  # some writers make private files; these are to be shared
                flush(file)
            flush(work)
            with locked(target.parent):
                if not (target.exists() and exchange(work, target)):
                    if target.exists():
                        target.rename(old)
                    work.rename(target)
            flush(target.parent)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that nobody ever finds neither; False where the system cannot (not Linux)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_cwd, swap = -100, 2
    return renameat2(at_cwd, os.fsencode(one.absolute()), at_cwd, os.fsencode(other.absolute()), swap) == 0


def _sweep(target: Path, every: bool) -> None:
    """Mend what killed processes left behind: work folders that nobody holds any more, a folder set aside."""
    name = "*" if every else glob.escape(target.name)
    for folder in target.parent.glob(f".{name}.*-*"):
        found = re.fullmatch(r"\.(.+)\.[0-9]+-[^.]+(\.old)?", folder.name)
        with contextlib.suppress(OSError), flocked(folder, wait=False):
            whole = folder.with_name(found[1]) if found else None
            if found and found[2] and whole and not whole.exists():
                folder.rename(whole)
            elif found:
                shutil.rmtree(folder, ignore_errors=True)
