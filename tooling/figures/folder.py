"""The folder an analysis goes to: whole or absent, and never in the place of anything but an older analysis."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...engines.errors import UserError

INDEX = "analysis.json"  # names every other file of the folder, under `files`


def check_folder(target: Path) -> None:
    """Raises UserError when an analysis cannot be written there: before the work, not after it."""
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write into {parent}; choose another place with --output")
    if target.is_dir() and (foreign := sorted({path.name for path in target.iterdir()} - _own(target))):
        raise UserError(f"{target} holds {foreign[0]}, which is of no analysis; choose another --output")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give --output a folder")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to fill, which takes its place when the block ends well."""
    check_folder(target)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = work.with_name(f"{work.name}.old")
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            target.rename(old)
        work.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _own(folder: Path) -> set[str]:
    """The files of an analysis that stands there."""
    try:
        return {INDEX, *json.loads((folder / INDEX).read_text("utf-8"))["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
