"""The engine bundle: a folder that holds all a prompt needs to become sound, and a manifest that says what it is.

    manifest.json      format, recipe, model and its licence, sizes, schedule, versions, bytes and sha256 of every file
    text.onnx, conditioning.onnx, step.onnx, decoder.onnx, each with its .onnx.data
    scales.safetensors what quantization decided: per Linear its activation scale and smoothing factor
    tokenizer.json

A bundle is whole or absent: it is written under a temporary name and renamed. Compiled blobs are not part of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from .errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"


def home() -> Path:
    """`$DIT_TRT_HOME`, or the user's cache folder."""
    named = os.environ.get("DIT_TRT_HOME")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("dit-trt"))


def bundles_folder() -> Path:
    return home() / "bundles"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


class Bundle:
    """An existing bundle. Opening reads and checks the manifest; `verify` reads every byte.

    Raises UserError when the folder is not a bundle, is of another format, or lacks a file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} is not a bundle (no {MANIFEST}); make one with: dit-trt build") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); build the bundle again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise UserError(f"{folder} has bundle format {found}, this version reads {FORMAT}; build it again")
        missing = {"backend", "created", "files", "model", "recipe", "schedule", "sizes"} - manifest.keys()
        if missing:
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}; build the bundle again")
        files = manifest["files"]
        if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
            raise UserError(f"{path} is damaged (files); build the bundle again")
        self.manifest: dict = manifest
        for name, entry in self.manifest["files"].items():
            file = self.path(name)
            if not file.is_file():
                raise UserError(f"the bundle {folder.name} lacks {name}; build it again")
            if file.stat().st_size != entry["bytes"]:
                raise UserError(f"the bundle {folder.name} is damaged: {name} has the wrong size; build it again")

    @property
    def backend(self) -> str:
        return self.manifest["backend"]

    @property
    def size_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def path(self, name: str) -> Path:
        if Path(name).name != name:
            raise UserError(f"the bundle {self.folder.name} names a file outside itself: {name!r}")
        return self.folder / name

    def verify(self) -> Bundle:
        """Compare every file with the manifest's sha256. Raises UserError naming the first that differs."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.path(name)) != entry["sha256"]:
                raise UserError(
                    f"the bundle {self.folder.name} is damaged: {name} does not match its sha256; build it again"
                )
        return self


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def check_target(target: Path) -> None:
    """Raises UserError when something that is not a bundle stands where one is to be written."""
    if target.exists() and not (target / MANIFEST).is_file():
        raise UserError(f"{target} exists and is not a bundle; choose another --output")


@contextlib.contextmanager
def new_bundle(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to fill; when the block ends well it takes the place of `target`.

    An older bundle of that name is replaced; any other folder there is never touched. When the block fails, or is
    interrupted, nothing is left.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", dir=target.parent))
    old = work.with_name(work.name + ".old")
    try:
        yield work
        if not (work / MANIFEST).is_file():
            raise AssertionError("a bundle was finished without a manifest")
        work.chmod(0o755)
        for file in work.iterdir():
            file.chmod(0o644)  # some writers make private files; a bundle is to be shared
        with locked(target):
            if not (target.exists() and _exchange(work, target)):
                if target.exists():
                    target.rename(old)
                work.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that nobody ever finds neither; False where the system cannot (not Linux)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, swap = -100, 2
    return renameat2(at_cwd, os.fsencode(one.absolute()), at_cwd, os.fsencode(other.absolute()), swap) == 0


def _sweep(target: Path) -> None:
    """Mend what killed builds of this bundle left behind: work folders whose process is gone, a bundle set aside."""
    with locked(target):
        for folder in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
            pid = folder.name.removeprefix(f".{target.name}.").partition("-")[0]
            if not pid.isdigit() or Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists():
                continue
            if folder.name.endswith(".old") and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for whatever makes `path`; the others wait here. The lock ends with its process."""
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]).open("w") as file:
        try:
            import fcntl
        except ImportError:  # not a Unix: two builds of one thing at once are then the user's to avoid
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_manifest(folder: Path, manifest: dict) -> None:
    """Add `format` and the bytes and sha256 of every file in `folder`, and write it last."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    text = json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def list_bundles() -> list[Bundle]:
    """The readable bundles of the home folder, newest first."""
    found = []
    if bundles_folder().is_dir():
        for folder in bundles_folder().iterdir():
            if folder.name.startswith("."):
                continue
            with contextlib.suppress(UserError):
                found.append(Bundle(folder))
    return sorted(found, key=lambda bundle: bundle.manifest["created"], reverse=True)


def find_bundle(name: str | None, quantized: bool = False) -> Bundle:
    """A bundle by folder or by name in the home folder; without a name the newest (of the quantized ones)."""
    if name is not None:
        for folder in (Path(name).expanduser(), bundles_folder() / name):
            if folder.is_dir():
                return Bundle(folder.absolute())
        known = ", ".join(bundle.folder.name for bundle in list_bundles()[:5])
        raise UserError(f"no bundle {name!r}" + (f"; there are: {known}" if known else "; dit-trt build makes one"))
    bundles = [b for b in list_bundles() if not quantized or b.manifest["recipe"]["method"] != "none"]
    if not bundles:
        raise UserError("there is no bundle yet; make one with: dit-trt build --method sqs --bits w8a8")
    return bundles[0]
