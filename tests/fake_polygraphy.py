"""Polygraphy's TrtRunner on the stand-in GPU of fake_gpu.py: copies, stream and buffers of its own, our plans."""

from __future__ import annotations

import ctypes
from typing import Any

import polygraphy.cuda.cuda as polygraphy_cuda
import pytest
import tensorrt_rtx
from fake_gpu import Context, Engine, FakeCuda, FakeGPU


class Wrapper(polygraphy_cuda.Cuda):
    """Polygraphy's way to CUDA, its ctypes calls answered by FakeCuda."""

    def __init__(self, cuda: FakeCuda):
        self._cuda = cuda

    def create_stream(self) -> int:
        return self._cuda.cudaStreamCreate()[1]

    def stream_synchronize(self, ptr: int) -> None:
        self._cuda.cudaStreamSynchronize(ptr)

    def destroy_stream(self, ptr: int) -> None:
        self._cuda.cudaStreamDestroy(ptr)

    def malloc(self, nbytes: int) -> int:
        return self._cuda.cudaMalloc(nbytes)[1]

    def free(self, ptr: int) -> None:
        if ptr:  # CUDA lets the null pointer be freed
            self._cuda.cudaFree(ptr)

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int | None = None) -> None:
        assert (dst if kind.value == polygraphy_cuda.MemcpyKind.HostToDevice.value else src) in self._cuda.memory
        ctypes.memmove(dst, src, nbytes)


class Trt:
    """What TrtRunner asks of the module: TensorRT-RTX's own, but for the classes that the stand-in has."""

    ICudaEngine, IExecutionContext = Engine, Context

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt_rtx, name)


def install(monkeypatch: pytest.MonkeyPatch, gpu: FakeGPU) -> None:
    """Let Polygraphy find the stand-in that `fake_gpu.install` made."""
    import polygraphy.backend.trt.runner as trt_runner
    import polygraphy.backend.trt.util as trt_util

    monkeypatch.setattr(polygraphy_cuda, "G_CUDA", Wrapper(gpu.cuda))
    monkeypatch.setattr(trt_runner, "trt", Trt())
    monkeypatch.setattr(trt_util, "trt", Trt())
