"""A stand-in for an NVIDIA GPU: CUDA's runtime on host memory, and plans that ONNX Runtime executes.

What TensorRT computes is not tested with it, but all that is ours: which bytes are copied when, what is bound where,
what is captured and launched, which plan is built, kept and opened, and what is freed. The builder and its plans are
real.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_rtx
from numpy.typing import NDArray

from dit_trt.engines import cuda, tensorrt, tensorrt_api
from dit_trt.engines.cpu import has_vnni
from dit_trt.engines.tensorrt_account import products_of_plan
from dit_trt.engines.tensorrt_build import build_plan

DEVICES = 2
MEMORY = 10**10


class FakeCuda:
    """`cuda.bindings.runtime`, as far as engines/cuda.py asks it: every call returns (error, *values).

    counts: how often each was called. memory, streams, graphs: what is alive.
    """

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], object]] | None] = {}  # what a capture has collected
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self._handles = itertools.count(1)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and not name.endswith(("Mode", "Kind", "Attr")):
            self.counts[name] += 1
        return object.__getattribute__(self, name)

    def enqueue(self, stream: int, work: Callable[[], object]) -> None:
        """Run now, which is within what a stream promises, or collect."""
        collected = self.streams[stream]
        work() if collected is None else collected.append(work)

    def array(self, address: int, shape: tuple[int, ...], dtype: object) -> NDArray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize  # type: ignore[call-overload]
        assert len(self.memory[address]) == size
        return np.frombuffer(self.memory[address], dtype).reshape(shape)  # type: ignore[call-overload]

    # -------------------- the bindings' own names

    def cudaGetErrorString(self, error: int) -> tuple:
        return 0, f"error {error}".encode()

    def cudaGetDeviceCount(self) -> tuple:
        return 0, DEVICES

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        return 0, SimpleNamespace(name=b"Stand-in")

    def cudaDriverGetVersion(self) -> tuple:
        return 0, 13010

    def cudaMemGetInfo(self) -> tuple:
        return 0, MEMORY - sum(len(memory) for memory in self.memory.values()), MEMORY

    def cudaSetDevice(self, device: int) -> tuple:
        return (0 if device < DEVICES else 101,)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple:
        return 0, {75: 8, 76: 9}[attribute]

    def cudaMalloc(self, size: int) -> tuple:
        assert all(collected is None for collected in self.streams.values()), "no allocation while capturing"
        memory = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple:
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, to: int, of: int, size: int, kind: int, stream: int) -> tuple:
        assert len(self.memory[to]) == len(self.memory[of]) == size and kind in (1, 2)
        self.enqueue(stream, lambda: ctypes.memmove(to, of, size))
        return (0,)

    def cudaStreamCreate(self) -> tuple:
        handle = next(self._handles)
        self.streams[handle] = None
        return 0, handle

    def cudaStreamDestroy(self, stream: int) -> tuple:
        del self.streams[stream]
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        return (0 if self.streams[stream] is None else 901,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        self.streams[stream] = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        handle = next(self._handles)
        self.graphs[handle] = self.streams[stream] or []
        self.streams[stream] = None
        return 0, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple:
        handle = next(self._handles)
        self.graphs[handle] = list(self.graphs[graph])
        return 0, handle

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple:
        for work in self.graphs[graph]:
            self.enqueue(stream, work)
        return (0,)

    def cudaGraphDestroy(self, graph: int) -> tuple:
        del self.graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy


class FakeGPU:
    """TensorRT-RTX's module, or (full) one that looks like TensorRT's, with a runtime of our own; builds are counted.

    fails: what executing says instead of computing. kernels: what compiling gives; compiled: how often it was done.
    """

    def __init__(self, full: bool):
        self.cuda, self.full = FakeCuda(), full
        self.builds: list[str] = []
        self.fails = False
        self.kernels, self.compiled = b"kernels for this driver", 0
        self._graphs: dict[str, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        if self.full and name in ("CudaGraphStrategy", "ComputeCapability"):
            raise AttributeError(name)
        return getattr(tensorrt_rtx, name)

    def build_plan(self, path: Path, *args: Any, **options: Any) -> bytes:
        plan = build_plan(path, *args, **options)
        self.builds.append(path.name)
        self._graphs[hashlib.sha256(plan).hexdigest()] = onnx.load(path).SerializeToString()  # its folder may move
        return plan

    def Runtime(self, log: object) -> Any:
        def deserialize(plan: bytes) -> Engine | None:
            graph = self._graphs.get(hashlib.sha256(plan).hexdigest())
            return None if graph is None else Engine(self, graph, plan)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class Engine:
    """One plan's graph, by ONNX Runtime."""

    def __init__(self, gpu: FakeGPU, graph: bytes, plan: bytes):
        self.gpu, self._plan = gpu, plan
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not has_vnni():  # a GPU adds int8 products in 32 bits
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value.type for value in self.session.get_inputs()}
        self.shapes = {
            value.name: tuple(size if isinstance(size, int) else -1 for size in value.shape)
            for value in self.session.get_inputs()
        }
        self._outputs = {value.name: value.type for value in self.session.get_outputs()}
        self._names = [*self._inputs, *self._outputs]
        self.num_io_tensors = len(self._names)
        self.weight_streaming_budget_v2 = 0

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        kinds = tensorrt_rtx.TensorIOMode
        return kinds.INPUT if name in self._inputs else kinds.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        kind = {**self._inputs, **self._outputs}[name]
        return {"tensor(float)": tensorrt_rtx.float32, "tensor(int64)": tensorrt_rtx.int64}[kind]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_format(self, name: str, profile: int) -> Any:
        return tensorrt_rtx.TensorFormat.LINEAR

    def create_runtime_config(self) -> RuntimeConfig:
        assert not self.gpu.full
        return RuntimeConfig(self.gpu)

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        if config is not None:
            assert not self.gpu.full
            assert config.cuda_graph_strategy == tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return Context(self, None if config is None else config.cache)

    def create_engine_inspector(self) -> SimpleNamespace:
        layers = [
            {
                "Name": "k",
                "LayerType": "gemm" if product.kind == "gemm" else "mha",
                "Inputs": [{"Format/Datatype": kind} for kind in product.operands],
                "Metadata": "".join(f"[ONNX Layer: {node}]" for node in product.nodes),
            }
            for product in products_of_plan(self._plan)
        ]
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))


class RuntimeConfig:
    def __init__(self, gpu: FakeGPU):
        self._gpu, self.cuda_graph_strategy, self.cache = gpu, None, None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._gpu)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Compiled kernels, told by what compiled them; a context that runs without them compiles."""

    def __init__(self, gpu: FakeGPU):
        self._gpu, self.content = gpu, b""

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, blob: bytes) -> bool:
        if blob != self._gpu.kernels:
            return False
        self.content = blob
        return True


class Context:
    def __init__(self, engine: Engine, kernels: RuntimeCache | None):
        self._engine, self._kernels = engine, kernels
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self.engine, self.active_optimization_profile = engine, 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine.shapes and name not in self._shapes:
            return self._engine.shapes[name]
        if name not in self._shapes:
            feeds = {n: np.zeros(shape, self._dtype(n)) for n, shape in self._shapes.items()}
            outputs = [value.name for value in self._engine.session.get_outputs()]
            shapes = [value.shape for value in self._engine.session.run(outputs, feeds)]
            self._shapes |= dict(zip(outputs, shapes))
        return self._shapes[name]

    def _dtype(self, name: str) -> Any:
        return tensorrt_rtx.nptype(self._engine.get_tensor_dtype(name))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self._allocators[name] = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self._engine.gpu.fails:
            return False
        self._engine.gpu.cuda.enqueue(stream, self._compute)
        return True

    def _compute(self) -> None:
        gpu = self._engine.gpu
        if self._kernels is not None and self._kernels.content != gpu.kernels:
            gpu.compiled += 1
            self._kernels.content = gpu.kernels

        def tensor(name: str) -> NDArray:
            return self._engine.gpu.cuda.array(self._addresses[name], self.get_tensor_shape(name), self._dtype(name))

        names = [value.name for value in self._engine.session.get_inputs()]
        outputs = [value.name for value in self._engine.session.get_outputs()]
        for name, value in zip(outputs, self._engine.session.run(outputs, {name: tensor(name) for name in names})):
            if name in self._allocators:
                allocator = self._allocators[name]
                self._addresses[name] = allocator.reallocate_output_async(name, 0, value.nbytes, 1, 0)
                allocator.notify_shape(name, value.shape)
                self._shapes[name] = value.shape
            tensor(name)[...] = value


def install(monkeypatch: pytest.MonkeyPatch, full: bool = False) -> FakeGPU:
    """Let the backend find this GPU."""
    gpu = FakeGPU(full)
    name = "TensorRT" if full else "TensorRT-RTX"
    monkeypatch.setattr(cuda, "runtime", lambda: gpu.cuda)
    monkeypatch.setattr(tensorrt_api, "found", lambda: (gpu, name))
    monkeypatch.setattr(tensorrt, "build_plan", gpu.build_plan)
    return gpu
