"""The folder an analysis goes to: whole or absent, and never in the place of anything but an older analysis."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ...engines.errors import UserError
from ...engines.folders import new_folder

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
def new_analysis(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to fill, which takes its place when the block ends well."""
    check_folder(target)
    with new_folder(target) as work:
        yield work


def _own(folder: Path) -> set[str]:
    """The files of an analysis that stands there."""
    try:
        return {INDEX, *json.loads((folder / INDEX).read_text("utf-8"))["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
