"""torch's checkpoints (.ckpt, .pt, .bin), read one tensor at a time and never unpickled as code.

Such a file is a zip archive: a pickle that describes the tensors, and the bytes of each storage, uncompressed. torch
reads the description (`weights_only=True`, onto the meta device) and notes where each storage lies; the bytes are
read from there.
"""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines.errors import UserError
from .tensor_files import LFS_POINTER, check_dtype

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LOCAL_HEADER = 30  # bytes of a zip record's header before its name; the name's and extra field's lengths end it


class TorchCheckpoint:
    """The tensors of a state dict, bare or under `state_dict`, that `torch.save` wrote.

    Raises UserError for objects that only code could make, for torch's old format, and for damaged files.
    """

    def __init__(self, path: Path):
        self._path = path
        self.files: tuple[Path, ...] = (path,)
        records = _records(path)
        self._tensors = _state_dict(path, "meta")
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        self._offsets = _offsets(self._tensors, records)

    def dtype(self, key: str) -> str:
        dtype = self._tensors[key].dtype
        return _NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def file_of(self, key: str) -> Path:
        return self._path

    def read(self, key: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        check_dtype(self, key)
        whole = self._tensors[key]
        if self._offsets is None:  # mapped anew for every tensor, for the sake of memory
            whole = _state_dict(self._path, "cpu")[key]
            return np.array((whole if rows == slice(None) else whole[rows]).float().numpy(), order="C")
        part = whole if rows == slice(None) else whole[rows]
        if part.numel() == 0:
            return np.zeros(part.shape, np.float32)
        count = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride()))
        buffer = bytearray(count * part.itemsize)
        try:
            with self._path.open("rb") as file:
                file.seek(self._offsets[key] + int(part.storage_offset()) * part.itemsize)
                read = file.readinto(buffer)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror}") from None
        if read < len(buffer):
            raise UserError(f"{self._path} has become shorter since it was opened: {key} cannot be read")
        values = torch.frombuffer(buffer, dtype=part.dtype).as_strided(part.shape, part.stride())
        return values.float().contiguous().numpy()


def _records(path: Path) -> dict[int, int]:
    """Where a record's bytes begin in the file -> how many there are.

    Raises UserError for what is not a zip archive of torch's, or one whose records were compressed since.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(LFS_POINTER))
            if magic == LFS_POINTER:
                raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
            if magic.startswith(b"\x80"):  # a bare pickle
                raise UserError(
                    f"{path} is in torch's format before 1.6, which is read by running it: save it again with a newer "
                    "torch, or as safetensors"
                )
            if not magic.startswith(b"PK"):
                raise UserError(f"{path} is not a torch checkpoint")
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                orders = {archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")}
            names = [entry.filename.partition("/")[2] for entry in entries]
            if "data.pkl" not in names:
                raise UserError(f"{path} is a zip archive, but not one of torch.save")
            if "constants.pkl" in names:
                raise UserError(f"{path} is a TorchScript program: give its weights alone, as safetensors")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path} was compressed after torch.save wrote it: save it again")
            if orders - {sys.byteorder.encode()}:
                raise UserError(
                    f"{path} was written on a machine of another byte order: save it again on one like this"
                )
            found = {}
            for entry in entries:
                file.seek(entry.header_offset + _LOCAL_HEADER - 4)
                lengths = file.read(4)
                skipped = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                found[entry.header_offset + _LOCAL_HEADER + skipped] = entry.file_size
            return found
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is cut off or damaged (no zip directory at its end): copy or download it again"
        ) from None


def _state_dict(path: Path, device: str) -> dict[str, Tensor]:
    """The tensors by key: on "meta" their description alone, on "cpu" the file mapped."""
    damaged = f"{path} is damaged: torch cannot read what it says of its tensors; copy or download it again"
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=device == "cpu")
    except pickle.UnpicklingError as error:
        if (found := re.search(r"GLOBAL (\S+)", str(error))) is not None:
            raise UserError(
                f"{path} holds objects that are code ({found[1]}) and is not read; stable-audio-tools makes weights of "
                f"it: unwrap_model.py --model-config model_config.json --ckpt-path {path.name} --use-safetensors"
            ) from None
        raise UserError(damaged) from None
    except Exception:  # whatever torch's reader makes of damaged bytes
        raise UserError(damaged) from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = {key: value for key, value in _items(state) if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no state dict: neither itself nor its entry 'state_dict' is a dict of tensors")
    return {key: value.detach() for key, value in tensors.items()}


def _items(state: object) -> list[tuple[object, object]]:
    return list(state.items()) if isinstance(state, Mapping) else []


def _offsets(tensors: Mapping[str, Tensor], records: Mapping[int, int]) -> dict[str, int] | None:
    """Where in the file the storage of each tensor begins; None if this torch does not say so plausibly.

    `_checkpoint_offset` is not public. So it is believed only where a record of just the storage's size begins.
    """
    offsets = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None or records.get(offset) != storage.nbytes():
            return None
        offsets[key] = offset
    return offsets
