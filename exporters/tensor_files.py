"""Where a checkpoint's tensors come from: files whose tensors are read one at a time, as fp32, by key.

`open_weights` takes a file or a folder: safetensors, one file or shards with an index, or a torch checkpoint (see
torch_files.py). No mapping of a file stays open between two reads: its touched pages would count as this process's
memory, and these files are larger than the memory an export may take.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..engines.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
LFS_POINTER = b"version https://git-lfs"
_ALL = slice(None)
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


class TensorSource(Protocol):
    """Tensors by key. Asked for a key that is not in `shapes`, its methods raise KeyError."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What a digest of the tensors must cover, in a fixed order."""

    def dtype(self, key: str) -> str:
        """The type in the file, by safetensors' name: `F32`, `F16`, `BF16`, `I64`, ..."""

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor, for messages."""

    def read(self, key: str, rows: slice = _ALL) -> NDArray[np.float32]:
        """A new array of the tensor, or of `rows` of its first axis (a slice without a step).

        Raises UserError for a type that is not in `FLOATS`, and for a file that can no longer be read.
        """


def check_dtype(source: TensorSource, key: str) -> None:
    """Raises UserError for a tensor that is no F64, F32, F16 or BF16."""
    if (dtype := source.dtype(key)) not in FLOATS:
        raise UserError(f"{source.file_of(key)}: {key} is of type {dtype}; only {', '.join(FLOATS)} can be read")


def open_weights(path: Path) -> TensorSource:
    """The tensors of a file, or of the weights that a folder holds, under stable-audio-tools' names.

    Of a training checkpoint of stable-audio-tools these are the model's, averaged where training kept an average.
    Raises UserError when there is no such file, when a folder holds none or several, or when one cannot be read.
    """
    if path.is_dir():
        path /= weights_among({file.name for file in path.iterdir() if file.is_file()}, path)
    source = open_file(path)
    names = unwrapped(source.shapes)
    if all(name == key for name, key in names.items()):
        return source
    return Renamed({name: Origin(source, (key,)) for name, key in names.items()})


def open_file(path: Path) -> TensorSource:
    """The tensors of one file under the keys it has, its kind told by its name."""
    if path.name.endswith(".safetensors.index.json"):
        return ShardedFiles(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES:
        from .torch_files import TorchCheckpoint

        return TorchCheckpoint(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    kinds = ", ".join((".safetensors", ".safetensors.index.json", *TORCH_SUFFIXES))
    raise UserError(f"{path} is no file of weights by its name; known endings: {kinds}")


def weights_among(names: Collection[str], place: object) -> str:
    """Which of the names in one folder, `place`, is its weights: the usual ones first, safetensors before torch's.

    Raises UserError when none is, or when several could be.
    """
    stems = ("model", "diffusion_pytorch_model")
    usual = [f"{stem}.safetensors{tail}" for stem in stems for tail in ("", ".index.json")]
    torch_usual = ["model.ckpt", "pytorch_model.bin", "diffusion_pytorch_model.bin"]
    for known, suffix in ((usual, ".safetensors"), (torch_usual, ".ckpt")):
        for name in known:
            if name in names:
                return name
        indexes = sorted(name for name in names if name.endswith(f"{suffix}.index.json"))
        found = indexes or sorted(name for name in names if name.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(found)
            raise UserError(f"{place} holds several files of weights ({listed}): give the file itself")
    raise UserError(f"{place} holds no weights: no model.safetensors, no other *.safetensors, no *.ckpt")


def unwrapped(keys: Iterable[str]) -> dict[str, str]:
    """stable-audio-tools' key -> the key in the file, for what its training saves and for plain weights.

    Training (`DiffusionCondTrainingWrapper`) keeps the model as `diffusion.` beside optimizer and losses, and the
    running average of the DiT as `diffusion_ema.ema_model.`; its `export_model` puts the average in the DiT's place.
    """
    keys = list(keys)
    wrapper, average = "diffusion.", "diffusion_ema.ema_model."
    if not any(key.startswith(wrapper) for key in keys):
        return {key: key for key in keys}
    names = {key.removeprefix(wrapper): key for key in keys if key.startswith(wrapper)}
    return names | {"model." + key.removeprefix(average): key for key in keys if key.startswith(average)}


class SafetensorsFile:
    """One safetensors file. Raises UserError that says what is wrong with it, and with which tensor."""

    def __init__(self, path: Path):
        self._path = path
        self.files: tuple[Path, ...] = (path,)
        with _opened(path) as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
            self.shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            self._dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}

    def dtype(self, key: str) -> str:
        return self._dtypes[key]

    def file_of(self, key: str) -> Path:
        return self._path

    def read(self, key: str, rows: slice = _ALL) -> NDArray[np.float32]:
        check_dtype(self, key)
        with _opened(self._path) as file:
            try:
                tensor = file.get_tensor(key) if rows == _ALL else file.get_slice(key)[rows]
            except SafetensorError as error:
                raise UserError(f"{self._path}: {key} cannot be read: {error}") from None
            return np.array(tensor.float().numpy())


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(_fault(path, error)) from None


def _fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors refuses."""
    again = "copy or download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = file.read(len(LFS_POINTER))
            file.seek(8)
            text = file.read(length) if length <= _LONGEST_HEADER else b""
    except OSError as problem:
        return f"{path} cannot be read: {problem.strerror}"
    if (length.to_bytes(8, "little") + start).startswith(LFS_POINTER):
        return f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in its folder"
    if size < 8 or not start.startswith(b"{") or length > _LONGEST_HEADER:
        return f"{path} ({size} bytes) is not a safetensors file"
    if len(text) < length:
        return f"{path} is cut off in its header of {length} bytes, the file has {size} in all: {again}"
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        ends = {key: 8 + length + int(entry["data_offsets"][1]) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"{path} has a damaged header: {again}"
    for key in sorted(ends, key=lambda key: ends[key]):
        if ends[key] > size:
            return f"{path} is cut off: {key} ends at byte {ends[key]}, the file at {size}; {again}"
    return f"{path} is not a readable safetensors file: {error}"


class ShardedFiles:
    """Several files and the `*.safetensors.index.json` that says which tensor is in which (its `weight_map`)."""

    def __init__(self, index: Path):
        try:
            places = dict(json.loads(index.read_text("utf-8"))["weight_map"])
            names = sorted(set(places.values()))
            foreign = [name for name in names if Path(name).name != name]
        except OSError as error:
            raise UserError(f"{index} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{index} is not an index of shards: no JSON object with a weight_map of names") from None
        if foreign:
            raise UserError(f"{index} names {foreign[0]!r}: shards are files beside their index")
        missing = [name for name in names if not (index.parent / name).is_file()]
        if missing:
            raise UserError(f"{index} names {', '.join(missing)}: not in its folder; copy or download what is missing")
        shards = {name: open_file(index.parent / name) for name in names}
        self._shard_of = {key: shards[name] for key, name in places.items()}
        for key, shard in self._shard_of.items():
            if key not in shard.shapes:
                raise UserError(f"{index} says that {key} is in {places[key]}, which does not have it")
        self.files = (index, *(index.parent / name for name in names))
        self.shapes = {key: shard.shapes[key] for key, shard in self._shard_of.items()}

    def dtype(self, key: str) -> str:
        return self._shard_of[key].dtype(key)

    def file_of(self, key: str) -> Path:
        return self._shard_of[key].file_of(key)

    def read(self, key: str, rows: slice = _ALL) -> NDArray[np.float32]:
        return self._shard_of[key].read(key, rows)


class Computed:
    """Tensors that no file holds, because they follow from a configuration file: `origin`, for messages."""

    files: tuple[Path, ...] = ()

    def __init__(self, origin: Path, arrays: Mapping[str, NDArray[np.float32]]):
        self._origin, self._arrays = origin, dict(arrays)
        self.shapes = {key: array.shape for key, array in self._arrays.items()}

    def dtype(self, key: str) -> str:
        return "F32"

    def file_of(self, key: str) -> Path:
        return self._origin

    def read(self, key: str, rows: slice = _ALL) -> NDArray[np.float32]:
        return self._arrays[key][rows].copy()


@dataclass(frozen=True)
class Origin:
    """What a tensor of `Renamed` is: `keys` of a source, joined along the first axis, or one key in another shape."""

    source: TensorSource
    keys: tuple[str, ...]
    shape: tuple[int, ...] | None = None

    def full_shape(self) -> tuple[int, ...]:
        """Raises UserError for tensors that cannot be joined, or not be brought into `shape`."""
        found = [self.source.shapes[key] for key in self.keys]
        place = f"{self.source.file_of(self.keys[0])}: {' and '.join(self.keys)}"
        if self.shape is not None:
            if np.prod(found[0], dtype=int) != np.prod(self.shape, dtype=int):
                raise UserError(f"{place} is {list(found[0])}, which cannot become {list(self.shape)}")
            return self.shape
        if len(found) > 1 and (not all(found) or len({shape[1:] for shape in found}) > 1):
            raise UserError(f"{place} are {', '.join(str(list(shape)) for shape in found)}: they cannot be joined")
        return found[0] if len(found) == 1 else (sum(shape[0] for shape in found), *found[0][1:])


class Renamed:
    """Tensors of other sources under other names: name -> Origin."""

    def __init__(self, origins: Mapping[str, Origin]):
        self._origins = dict(origins)
        self.shapes = {name: origin.full_shape() for name, origin in self._origins.items()}
        sources = {id(origin.source): origin.source for origin in self._origins.values()}
        self.files = tuple(dict.fromkeys(file for source in sources.values() for file in source.files))

    def dtype(self, key: str) -> str:
        origin = self._origins[key]
        return origin.source.dtype(origin.keys[0])

    def file_of(self, key: str) -> Path:
        origin = self._origins[key]
        return origin.source.file_of(origin.keys[0])

    def read(self, key: str, rows: slice = _ALL) -> NDArray[np.float32]:
        origin = self._origins[key]
        source, keys = origin.source, origin.keys
        if origin.shape is not None:  # of vectors only: reading all of one for some rows costs nothing
            return source.read(keys[0]).reshape(origin.shape)[rows]
        if len(keys) == 1:
            return source.read(keys[0], rows)
        start, stop, _ = rows.indices(self.shapes[key][0])
        joined = np.empty((max(stop - start, 0), *self.shapes[key][1:]), np.float32)
        first = 0
        for part in keys:
            size = source.shapes[part][0]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                wanted = _ALL if (low, high) == (0, size) else slice(low, high)
                joined[first + low - start : first + high - start] = source.read(part, wanted)
            first += size
        return joined
