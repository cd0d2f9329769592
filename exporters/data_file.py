"""The external-data file beside an ONNX graph: tensors are appended as they are made, so that one is in memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ALIGNMENT = 64
INLINE = 1024  # bytes; smaller weights stay in the graph itself


class DataFile:
    """One external-data file, appended to; every tensor starts on a multiple of 64 bytes."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> DataFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, array: NDArray) -> TensorProto:
        """The initializer of `array`: inline when small, else a reference to bytes written here and now."""
        array = np.asarray(array, order="C")
        if array.nbytes < INLINE:
            return numpy_helper.from_array(array, name)
        offset = math.ceil(self._file.tell() / ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        self._file.write(array.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
