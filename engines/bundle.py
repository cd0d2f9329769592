"""The engine bundle: a folder that holds all a prompt needs to become sound, and a manifest that says what it is.

    manifest.json      format, recipe, model and its licence, sizes, schedule, versions, bytes and sha256 of every file
    text.onnx, conditioning.onnx, step.onnx, decoder.onnx, and encoder.onnx where the model has one, each with its .data
    step-1.onnx, ...   where several step graphs share the noise levels (`step_sigmas`), each with its .data
    scales.safetensors what quantization decided: per Linear its activation scale and smoothing factor
    step.scales.safetensors, ... what changes from step to step (SQD), one for each step graph
    tokenizer.json

A bundle is whole or absent: it is written under a temporary name, flushed to the disk and swapped in, so that neither
a killed build nor a power cut leaves half of one. Every byte is covered by a sha256, the manifest's own by its field
`sha256`. That protects against damage, not against a forger, who can write hashes too. Compiled blobs are not part of
a bundle.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .folders import new_folder
from .home import expanded, home, sha256
from .manifest import MANIFEST, field, read_manifest


def bundles_folder() -> Path:
    return home() / "bundles"


class Bundle:
    """An existing bundle. Opening reads and checks the manifest; `verify` reads every byte.

    Raises UserError when the folder is not a bundle, is of another format, is damaged or lacks a file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict = read_manifest(folder)
        for name, entry in self.manifest["files"].items():
            file = self.path(name)
            if file.is_symlink() or (file.exists() and not file.is_file()):
                raise UserError(f"the bundle {folder.name} is damaged: {name} is not a plain file; build it again")
            if not file.exists():
                raise UserError(f"the bundle {folder.name} lacks {name}; build it again")
            if file.stat().st_size != entry["bytes"]:
                raise UserError(f"the bundle {folder.name} is damaged: {name} has the wrong size; build it again")

    @property
    def backend(self) -> str:
        return self.manifest["backend"]

    @property
    def created(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.manifest["created"])

    @property
    def size_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def path(self, name: str) -> Path:
        return self.folder / name

    def verify(self) -> Bundle:
        """Compare every file with the manifest's sha256. Raises UserError naming the first that differs."""
        for name, entry in self.manifest["files"].items():
            try:
                found = sha256(self.path(name))
            except OSError as error:
                raise UserError(f"the bundle {self.folder.name}: {name} cannot be read ({error.strerror})") from None
            if found != entry["sha256"]:
                raise UserError(
                    f"the bundle {self.folder.name} is damaged: {name} does not match its sha256; build it again"
                )
        return self


def graph_digest(path: Path) -> str:
    """Of the bytes of a graph and its weights, as `Pipeline` has it from a manifest."""
    return sha256(path) + sha256(path.with_name(f"{path.name}.data"))


def check_target(target: Path) -> None:
    """Raises UserError when something that is not a bundle stands where one is to be written, or none can be."""
    if target.exists() and not (target / MANIFEST).is_file():
        raise UserError(f"{target} exists and is not a bundle; choose another --output")
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write into {parent}; choose another --output")


@contextlib.contextmanager
def new_bundle(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to fill; when the block ends well it takes the place of `target`.

    An older bundle of that name is replaced; any other folder there is never touched. See `new_folder`.
    """
    check_target(target)
    with new_folder(target, sweep_all=target.resolve().parent == bundles_folder().resolve()) as work:
        yield work
        if not (work / MANIFEST).is_file():
            raise AssertionError("a bundle was finished without a manifest")
        Bundle(work)


def list_bundles() -> list[Bundle]:
    """The readable bundles of the home folder, newest first."""
    return _scan()[0]


def unusable_bundles() -> dict[Path, str]:
    """The other folders there, newest first: why each cannot be opened, as one line."""
    return {folder: str(error) for folder, error in _scan()[1].items()}


def _scan() -> tuple[list[Bundle], dict[Path, UserError]]:
    """All folders of the home folder's bundles, newest first: those that open, and the others."""
    good: list[Bundle] = []
    bad: dict[Path, UserError] = {}
    folders = bundles_folder().iterdir() if bundles_folder().is_dir() else []
    for folder in folders:
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            good.append(Bundle(folder))
        except UserError as error:
            bad[folder] = error
    good.sort(key=lambda bundle: bundle.created, reverse=True)
    return good, dict(sorted(bad.items(), key=lambda item: _claimed_time(item[0]), reverse=True))


def _claim(folder: Path, dotted: str) -> object:
    """What the manifest of an unusable bundle says of itself, if it can still be read at all."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return field(json.loads((folder / MANIFEST).read_text("utf-8")), dotted)
    return None


def _claimed_time(folder: Path) -> datetime.datetime:
    """When an unusable bundle was made; the end of time when it does not tell: it may well be the newest."""
    with contextlib.suppress(TypeError, ValueError):
        claimed = datetime.datetime.fromisoformat(_claim(folder, "created"))  # type: ignore[arg-type]
        if claimed.tzinfo is not None:
            return claimed
    return datetime.datetime.max.replace(tzinfo=datetime.UTC)


def find_bundle(name: str | None, quantized: bool = False) -> Bundle:
    """A bundle by folder or by name in the home folder; without a name the newest (of the quantized ones).

    Raises UserError when there is none, and when the newest is unusable: an older one is never taken in its stead
    without a word.
    """
    if name is not None:
        for folder in (expanded(name), bundles_folder() / name):
            if folder.is_dir():
                return Bundle(folder.absolute())
        known = ", ".join(bundle.folder.name for bundle in list_bundles()[:5])
        told = f"; there are: {known} (dit-trt list)" if known else "; dit-trt build makes one"
        raise UserError(f"no bundle {name!r} in the home folder, and no such folder{told}")
    every, bad = _scan()
    good = [bundle for bundle in every if not quantized or bundle.manifest["recipe"]["method"] != "none"]
    for folder, error in bad.items():
        if not (folder / MANIFEST).is_file() or (quantized and _claim(folder, "recipe.method") == "none"):
            continue
        if not good or _claimed_time(folder) > good[0].created:
            other = f", or name another, as {good[0].folder.name}" if good else ""
            raise UserError(f"the newest bundle cannot be used: {error}{other}")
    if not good:
        none = "no quantized bundle yet, only FP32" if every else "no bundle yet"
        raise UserError(f"there is {none}; make one with: dit-trt build --method sqs --bits w8a8")
    return good[0]
