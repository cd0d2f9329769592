"""`dit-trt list`: the bundles of the home folder, newest first, the broken ones with what is wrong."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from ...engines.bundle import Bundle, bundles_folder, list_bundles, unusable_bundles
from ...engines.home import home
from .common import dit_command, megabytes, show, show_table

EPILOG = """\b
Examples:
  dit-trt list
  dit-trt list --json | python -m json.tool
"""


@click.command(epilog=EPILOG)
@dit_command
def command() -> dict:
    """List the bundles in the home folder ($DIT_TRT_HOME), newest first.

    Sizes are checked, not contents: `dit-trt inspect` reads every byte.
    """
    found = list_entries()
    whole = [entry for entry in found if entry["error"] is None]
    if whole:
        show_table([("name", "method", "bits", "backend", "size", "created"), *map(_row, whole)], left=4)
    for entry in found:
        if entry["error"] is not None:
            show(f"{entry['name']}  broken: {entry['error']}")
    if not found:
        show(f"no bundle in {bundles_folder()} yet; make one with: dit-trt build --method sqs --bits w8a8")
    return {"home": str(home()), "bundles": found}


def list_entries() -> list[dict]:
    """One entry a folder, newest first, broken ones last; `error` says what is wrong, and is None for a whole one."""
    broken = [_broken(folder, error) for folder, error in unusable_bundles().items()]
    return [_whole(bundle) for bundle in list_bundles()] + sorted(broken, key=lambda entry: entry["name"])


def _whole(bundle: Bundle) -> dict:
    recipe = bundle.manifest["recipe"]
    return {
        "name": bundle.folder.name,
        "bundle": str(bundle.folder),
        "method": recipe["method"],
        "bits": recipe["bits"],
        "backend": bundle.backend,
        "linears": bundle.manifest["linears"],
        "size_bytes": bundle.size_bytes,
        "created": bundle.manifest["created"],
        "error": None,
    }


def _broken(folder: Path, error: str) -> dict:
    unknown = dict.fromkeys(("method", "bits", "backend", "linears", "size_bytes", "created"))
    return {"name": folder.name, "bundle": str(folder), **unknown, "error": _reason(error, folder)}


def _reason(message: str, folder: Path) -> str:
    """What a Bundle says of a folder, without the folder's name, which the table has, and without the fix."""
    reason = message.partition(";")[0]
    for prefix in (f"the bundle {folder.name} ", f"{folder}/", f"{folder} "):
        reason = reason.removeprefix(prefix)
    return reason


def _when(created: str) -> datetime:
    return datetime.fromisoformat(created).astimezone()


def _row(entry: dict) -> tuple:
    size, created = megabytes(entry["size_bytes"]), f"{_when(entry['created']):%Y-%m-%d %H:%M}"
    return entry["name"], entry["method"], entry["bits"], entry["backend"], size, created
