"""The engine bundle: a folder that holds all a prompt needs to become sound, and a manifest that says what it is.

    manifest.json      format, recipe, model and its licence, sizes, schedule, versions, bytes and sha256 of every file
    text.onnx, conditioning.onnx, step.onnx, decoder.onnx, and encoder.onnx where the model has one, each with its .data
    scales.safetensors what quantization decided: per Linear its activation scale and smoothing factor
    tokenizer.json

A bundle is whole or absent: it is written under a temporary name, flushed to the disk and swapped in, so that neither
a killed build nor a power cut leaves half of one. Every byte is covered by a sha256, the manifest's own by its field
`sha256`. That protects against damage, not against a forger, who can write hashes too. Compiled blobs are not part of
a bundle.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from .errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
_GRAPHS = ("text.onnx", "conditioning.onnx", "step.onnx", "decoder.onnx")
REQUIRED = frozenset({*_GRAPHS, *(f"{name}.data" for name in _GRAPHS), "scales.safetensors", "tokenizer.json"})
_BLANK = "0" * 64  # stands in the manifest's own `sha256` while that is computed
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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

    Raises UserError when the folder is not a bundle, is of another format, is damaged or lacks a file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict = _read_manifest(folder)
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


def _read_manifest(folder: Path) -> dict:
    """The manifest of `folder`: unchanged since it was written, and every field that other code reads well formed."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a bundle (no {MANIFEST}); make one with: dit-trt build") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); build the bundle again") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is not int or found != FORMAT:
        raise UserError(f"{folder} has bundle format {found!r:.40}, this version reads {FORMAT}; build it again")
    stamp = manifest.get("sha256")
    if not _is_sha256(stamp) or _own_sha256(raw.replace(stamp.encode(), _BLANK.encode(), 1)) != stamp:
        raise UserError(f"{path} is damaged (it does not match its own sha256); build the bundle again")
    files = manifest.get("files")
    fields = _FIELDS | (_TILING if isinstance(files, dict) and "encoder.onnx" in files else {})
    faults = [name for name, is_good in fields.items() if not is_good(_field(manifest, name))]
    if faults:
        raise UserError(f"{path} lacks or misstates {', '.join(faults)}; build the bundle again")
    files = manifest["files"]
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise UserError(f"the bundle {folder.name} names a file outside itself: {name!r:.60}; build it again")
    needed = REQUIRED | {f"{name}.data" for name in files if name.endswith(".onnx")}
    if missing := sorted(needed - files.keys()):
        raise UserError(f"{path} does not list {', '.join(missing)}; build the bundle again")
    return manifest


def _own_sha256(blanked: bytes) -> str:
    return hashlib.sha256(blanked).hexdigest()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _field(manifest: dict, dotted: str) -> object:
    value: object = manifest
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_pretransform(value: object) -> bool:
    if not (isinstance(value, dict) and _is_text(value.get("type")) and isinstance(value.get("config"), dict)):
        return False
    needed = ("n_fft", "hop_length", "griffin_lim_iterations") if value["type"] == "mel_pca" else ()
    return all(_is_size(value["config"].get(name)) for name in needed)


def _are_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and _is_count(entry.get("bytes")) and _is_sha256(entry.get("sha256"))
        for entry in value.values()
    )


def _are_layers(value: object) -> bool:
    texts, counts = ("name", "kind", "graph", "bits"), ("in_features", "out_features", "float_bytes", "bytes")
    return isinstance(value, list) and all(
        isinstance(layer, dict)
        and all(_is_text(layer.get(name)) for name in texts)
        and all(_is_count(layer.get(name)) for name in counts)
        for layer in value
    )


# What other code reads of a manifest, and what it must be. Fields that are not named here are not looked at.
_FIELDS: dict[str, Callable[[object], bool]] = {
    "backend": _is_text,
    "created": _is_text,
    "files": _are_files,
    "layers": _are_layers,
    "linears": _is_count,
    "int8_linears": _is_count,
    "recipe.method": _is_text,
    "recipe.bits": _is_text,
    "model.name": _is_string,
    "model.source": _is_string,
    "model.digest": _is_sha256,
    "model.licence": _is_string,
    "model.pretransform": _is_pretransform,
    **{
        f"sizes.{name}": _is_size
        for name in (
            *("io_channels", "embed_dim", "depth", "num_heads", "dim_heads", "cond_dim"),
            *("prompt_tokens", "context_tokens", "max_latents", "downsampling_ratio", "sample_rate"),
        )
    },
    "schedule.steps": _is_size,
    "schedule.sampler": _is_text,
    "schedule.seed": _is_count,
    **{f"schedule.{name}": _is_number for name in ("cfg", "sigma_min", "sigma_max")},
}

_TILING = {f"sizes.{name}": _is_size for name in ("tile_latents", "tile_overlap", "encoder_channels")}


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

    An older bundle of that name is replaced; any other folder there is never touched. When the block fails, or is
    interrupted, nothing is left; what a killed process left is removed by the next build of that bundle.
    """
    check_target(target)
    target = target.resolve()  # a link to a bundle stays one, and what it points at is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with locked(target.parent):
            _sweep(target)
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", dir=target.parent))
            held.enter_context(_flocked(work))  # tells the sweep of another build that this one lives
        old = work.with_name(work.name + ".old")
        try:
            yield work
            if not (work / MANIFEST).is_file():
                raise AssertionError("a bundle was finished without a manifest")
            Bundle(work)
            work.chmod(0o755)
            for file in work.iterdir():
                file.chmod(0o644)  # some writers make private files; a bundle is to be shared
                flush(file)
            flush(work)
            with locked(target.parent):
                if not (target.exists() and _exchange(work, target)):
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


def flush(path: Path) -> None:
    """Let what was written reach the disk before it is relied on: a rename may overtake its data in a power cut."""
    if os.name != "posix":  # elsewhere only what was opened to be written can be flushed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that nobody ever finds neither; False where the system cannot (not Linux)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at_cwd, swap = -100, 2
    return renameat2(at_cwd, os.fsencode(one.absolute()), at_cwd, os.fsencode(other.absolute()), swap) == 0


def _sweep(target: Path) -> None:
    """Mend what killed builds left behind: work folders that nobody holds any more, a bundle set aside.

    In the home folder those of every bundle, elsewhere only those of this one.
    """
    name = "*" if target.parent == bundles_folder().resolve() else glob.escape(target.name)
    for folder in target.parent.glob(f".{name}.*-*"):
        found = re.fullmatch(r"\.(.+)\.[0-9]+-[^.]+(\.old)?", folder.name)
        with contextlib.suppress(OSError), _flocked(folder, wait=False):
            whole = folder.with_name(found[1]) if found else None
            if found and found[2] and whole and not whole.exists():
                folder.rename(whole)
            elif found:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for whatever makes `path`; the others wait here. The lock ends with its process."""
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = locks / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    lock.touch()
    with _flocked(lock):
        yield


@contextlib.contextmanager
def _flocked(path: Path, wait: bool = True) -> Iterator[None]:
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


def write_manifest(folder: Path, manifest: dict) -> None:
    """Add `format`, the bytes and sha256 of every file in `folder`, and the manifest's own sha256; write it last."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    stamped = {"format": FORMAT, "sha256": _BLANK}
    text = json.dumps({**stamped, **manifest, **stamped, "files": files}, indent=1) + "\n"
    stamp = _own_sha256(text.encode())
    (folder / MANIFEST).write_bytes(text.replace(_BLANK, stamp, 1).encode())


def list_bundles() -> list[Bundle]:
    """The readable bundles of the home folder, newest first."""
    return _scan()[0]


def unusable_bundles() -> dict[Path, str]:
    """The other bundles of the home folder, newest first: why each cannot be opened, as one line."""
    return {folder: str(error) for folder, error in _scan()[1].items()}


def _scan() -> tuple[list[Bundle], dict[Path, UserError]]:
    """All folders of the home folder that have a manifest, newest first: those that open, and the others."""
    good: list[Bundle] = []
    bad: dict[Path, UserError] = {}
    folders = bundles_folder().iterdir() if bundles_folder().is_dir() else []
    for folder in folders:
        if folder.name.startswith(".") or not (folder / MANIFEST).is_file():
            continue
        try:
            good.append(Bundle(folder))
        except UserError as error:
            bad[folder] = error
    good.sort(key=lambda bundle: bundle.manifest["created"], reverse=True)
    return good, dict(sorted(bad.items(), key=lambda item: _claim(item[0], "created"), reverse=True))


def _claim(folder: Path, field: str) -> str:
    """What the manifest of an unusable bundle says of itself, if it can still be read at all."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = _field(json.loads((folder / MANIFEST).read_text("utf-8")), field)
        return value if isinstance(value, str) else ""
    return "unknown"  # later than any date: may well be the newest


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
        raise UserError(f"no bundle {name!r}" + (f"; there are: {known}" if known else "; dit-trt build makes one"))
    good, bad = _scan()
    good = [bundle for bundle in good if not quantized or bundle.manifest["recipe"]["method"] != "none"]
    for folder, error in bad.items():
        if quantized and _claim(folder, "recipe.method") == "none":
            continue
        if not good or _claim(folder, "created") > good[0].manifest["created"]:
            other = f", or choose one with --bundle, as {good[0].folder.name}" if good and not quantized else ""
            raise UserError(f"the newest bundle cannot be used: {error}{other}")
    if not good:
        raise UserError("there is no bundle yet; make one with: dit-trt build --method sqs --bits w8a8")
    return good[0]
