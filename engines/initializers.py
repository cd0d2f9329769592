"""The initializers of an ONNX file (names, shapes, bytes) without the onnx package, which the small runtime lacks.

Only what `inspect` needs of protobuf's wire format (protobuf.dev/programming-guides/encoding) and of onnx.proto:
ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto.dims = 1, .data_type = 2, .name = 8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}  # TensorProto.DataType -> bytes an item
_GRAPH, _INITIALIZER, _DIMS, _DATA_TYPE, _NAME = 7, 5, 1, 2, 8


@dataclass(frozen=True)
class Initializer:
    """One constant of a graph; its bytes are in the file itself or in the data file beside it."""

    name: str
    shape: tuple[int, ...]
    item_bytes: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def initializers(path: Path) -> list[Initializer]:
    """All initializers of the ONNX file at `path`. Raises UserError when it is not one."""
    try:
        content = memoryview(path.read_bytes())
        return [_tensor(tensor) for graph in _messages(content, _GRAPH) for tensor in _messages(graph, _INITIALIZER)]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable ONNX file ({error!r}); build the bundle again") from None


def _tensor(content: memoryview) -> Initializer:
    dims: list[int] = []
    name, item_bytes = "", 0
    for field, value in _fields(content):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif field == _DATA_TYPE and isinstance(value, int):
            item_bytes = _ITEM_BYTES[value]
        elif field == _NAME and not isinstance(value, int):
            name = bytes(value).decode()
    return Initializer(name, tuple(dims), item_bytes)


def _messages(content: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in _fields(content):
        if field == wanted:
            if isinstance(value, int):
                raise ValueError(f"field {field} is a number")
            yield value


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one message; a value is an int, or the bytes of a string, message or packed list."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(content):
            raise ValueError("it ends too early")
        yield field, content[at : at + size]
        at += size


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varints(content: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(content):
        value, at = _varint(content, at)
        found.append(value)
    return found
