"""The few calls of the CUDA runtime that an engine needs, by NVIDIA's own bindings: memory, one stream, a graph."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

INSTALL = "pip install cuda-bindings"


@cache
def runtime() -> Any:
    """`cuda.bindings.runtime`. Raises RuntimeError when it is not installed."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise RuntimeError(f"NVIDIA's cuda.bindings cannot be imported ({error}): {INSTALL}") from None


def _checked(result: tuple) -> Any:
    """What a call of the bindings returned beside its error code. Raises RuntimeError in words for any but success."""
    error, *values = result
    if int(error) != 0:
        _, text = runtime().cudaGetErrorString(error)
        raise RuntimeError(f"CUDA: {text.decode() if isinstance(text, bytes) else text}")
    return values[0] if len(values) == 1 else values or None


def device_count() -> int:
    """How many GPUs this process can use; 0 where there is no driver, too."""
    error, count = runtime().cudaGetDeviceCount()
    return int(count) if int(error) == 0 else 0


def compute_capability(device: int) -> str:
    """`9.0` and the like."""
    kinds = runtime().cudaDeviceAttr
    attributes = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(int(_checked(runtime().cudaDeviceGetAttribute(kind, device)))) for kind in attributes)


def device_name(device: int) -> str:
    name = _checked(runtime().cudaGetDeviceProperties(device)).name
    return (name.decode() if isinstance(name, bytes) else str(name)).rstrip("\0")


def driver_version() -> str:
    """The newest CUDA that the driver runs, as `13.1`."""
    version = int(_checked(runtime().cudaDriverGetVersion()))
    return f"{version // 1000}.{version % 1000 // 10}"


def memory() -> tuple[int, int]:
    """Free bytes of the current device, and all it has."""
    free, total = _checked(runtime().cudaMemGetInfo())
    return int(free), int(total)


def use_device(device: int) -> None:
    _checked(runtime().cudaSetDevice(device))


class Stream:
    """One queue of work: what is given to it runs in order."""

    def __init__(self) -> None:
        self.handle = int(_checked(runtime().cudaStreamCreate()))
        weakref.finalize(self, _free, "cudaStreamDestroy", self.handle)

    def wait(self) -> None:
        """Until all that was given so far is done. Raises RuntimeError when any of it failed."""
        _checked(runtime().cudaStreamSynchronize(self.handle))

    def capture(self, work: Callable[[], object]) -> Graph:
        """The graph of what `work` gives to this stream; nothing of it runs yet."""
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(runtime().cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        finally:
            graph = _checked(runtime().cudaStreamEndCapture(self.handle))
        return Graph(graph, self)


class Graph:
    """Captured work, ready to run again and again."""

    def __init__(self, graph: Any, stream: Stream):
        self._stream = stream
        self._executable = _checked(runtime().cudaGraphInstantiate(graph, 0))
        _free("cudaGraphDestroy", graph)
        weakref.finalize(self, _free, "cudaGraphExecDestroy", self._executable)

    def launch(self) -> None:
        _checked(runtime().cudaGraphLaunch(self._executable, self._stream.handle))


class Buffer:
    """A tensor on the device and its mirror in page-locked host memory, which `host` shows as an array."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, stream: Stream):
        self._stream = stream
        self._bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.address = int(_checked(runtime().cudaMalloc(self._bytes)))
        weakref.finalize(self, _free, "cudaFree", self.address)
        self._host_address = int(_checked(runtime().cudaMallocHost(self._bytes)))
        weakref.finalize(self, _free, "cudaFreeHost", self._host_address)
        memory = memoryview((ctypes.c_byte * self._bytes).from_address(self._host_address))
        self.host: NDArray = np.frombuffer(memory, dtype).reshape(shape)

    def upload(self) -> None:
        """Queue the copy of `host` to the device."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        copy = self.address, self._host_address, self._bytes, kind, self._stream.handle
        _checked(runtime().cudaMemcpyAsync(*copy))

    def download(self) -> None:
        """Queue the copy of the device's tensor to `host`, where it is once the stream was waited for."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        copy = self._host_address, self.address, self._bytes, kind, self._stream.handle
        _checked(runtime().cudaMemcpyAsync(*copy))


def _free(call: str, handle: Any) -> None:
    """Errors are of no use here: a process that ends takes all with it."""
    getattr(runtime(), call)(handle)
