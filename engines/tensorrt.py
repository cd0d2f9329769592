"""TensorRT: an ONNX graph becomes a plan, which an NVIDIA GPU runs.

A plan is a cache: what ships is the ONNX. It is built for one version of TensorRT and one GPU (TensorRT-RTX: for many),
and deserializing one is running code, so that only those are opened which this user built on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cuda, tensorrt_api
from .errors import UserError
from .home import keep
from .tensorrt_account import Product, attention_nodes, int8_nodes, products_of_inspector, products_of_plan
from .tensorrt_build import CURRENT, PlanOptions, Say, build_plan, check_targets
from .tensorrt_kernels import KernelCache

PORTABLE = "portable"  # TensorRT-RTX's plans, where no target is chosen: for all of these but 7.5
RTX_GPUS, RTX_FROM = ("7.5", "8.0", "8.6", "8.9"), 12  # compute capabilities that TensorRT-RTX runs on, it says
STEP_INPUT = "x"  # of the step graph, [batch, channels, latents]


def unbuildable() -> str | None:
    """Why no plan can be built here; None when one can: with TensorRT-RTX everywhere, else where there is a GPU."""
    module, why = tensorrt_api.found()
    if module is None:
        return f"{why}: {tensorrt_api.INSTALL}"
    return None if tensorrt_api.is_rtx() else _no_gpu()


def unusable() -> str | None:
    """Why nothing can run with it here."""
    if why := unbuildable() or _no_gpu():
        return why
    reasons = [_foreign(device) for device in range(cuda.device_count())]
    return None if None in reasons else reasons[0]


def _no_gpu() -> str | None:
    try:
        if cuda.device_count():
            return None
        return "no NVIDIA GPU is there, or no driver for it; run the bundle where one is, or build for another backend"
    except RuntimeError as error:
        return str(error)


def _foreign(device: int) -> str | None:
    """Why TensorRT-RTX does not run on this GPU. An H200 opened no plan: docs/gpu-results.md has what it said."""
    own = cuda.compute_capability(device)
    if not tensorrt_api.is_rtx() or own in RTX_GPUS or int(own.partition(".")[0]) >= RTX_FROM:
        return None
    known = f"{', '.join(RTX_GPUS)} and {RTX_FROM}.0 and later"
    return f"TensorRT-RTX runs on compute capability {known}, cuda:{device} has {own}: install tensorrt"


def runtime_version() -> str:
    return tensorrt_api.version()


def check_device(device: str) -> None:
    """Raises UserError, naming those there are, for a device that is not, and for one it does not run on."""
    if (why := _foreign(_index(device))) is not None:
        raise UserError(why)


def _index(device: str) -> int:
    """`cuda:1` -> 1"""
    count = cuda.device_count()
    known = [f"cuda:{i}" for i in range(count)]
    name = device.lower()
    name = "cuda:0" if name in ("cuda", "gpu") else name
    if name not in known:
        raise UserError(f"TensorRT has no device {device!r} here; available: {', '.join(known) or 'none'}")
    return known.index(name)


def plan_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], options: Mapping[str, Any] | None
) -> dict[str, tuple[int, ...]]:
    """What of a graph's shapes its plan depends on: with a profile not the latents that the step graph sees."""
    profile = _of_graph(path, options).profile
    return {n: (*s[:2], *profile) if n == STEP_INPUT and profile is not None else tuple(s) for n, s in shapes.items()}


def _of_graph(path: Path, options: Mapping[str, Any] | None) -> PlanOptions:
    """A profile is the step graph's: the decoder sees tiles of one size, the others no latents."""
    found = PlanOptions.from_dict(options or {})
    return found if path.stem.partition("-")[0] == "step" else replace(found, profile=None)


class StalePlanError(UserError):
    """The plan at hand is another TensorRT's, or another GPU's."""


class TensorRTPlan:
    """The plan of one graph, kept from an earlier build or built now; `int8_matmuls` says what it multiplies.

    cache: the folder that keeps it. rebuild: build it anew where the one there is another TensorRT's or GPU's, which is
    a StalePlanError otherwise.
    """

    backend = "tensorrt"

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        device: str = "cuda:0",
        cache: Path | None = None,
        options: Mapping[str, Any] | None = None,
        rebuild: bool = False,
        say: Say = lambda message: None,
    ):
        self.options = _of_graph(path, options)
        check_targets(self.options.targets)
        self._device = device
        portable = tensorrt_api.is_rtx() and CURRENT not in self.options.targets
        target = ("+".join(self.options.targets) or PORTABLE) if portable else self._gpu()
        identity = f"{tensorrt_api.version()} for {target}"
        timing = None if tensorrt_api.is_rtx() or cache is None else cache.parent / f"{identity}.timing"

        def build() -> bytes:
            return build_plan(path, shapes, self.options, say, timing)

        self._file = None if cache is None else cache / f"{identity.replace(' ', '-')}.plan"
        self._plan: bytes | None = _kept(path.name, identity, self._file, rebuild, build)

    def _gpu(self) -> str:
        return f"sm{cuda.compute_capability(_index(self._device)).replace('.', '')}"

    @property
    def plan(self) -> bytes:
        """Its bytes; once it is open they are no longer held, and read from the cache."""
        if self._plan is None:
            assert self._file is not None
            return self._file.read_bytes()
        return self._plan

    @cached_property
    def products(self) -> list[Product]:
        """Raises RuntimeError when the plan does not tell."""
        if tensorrt_api.is_rtx():
            found = products_of_plan(self.plan)
        else:
            trt = tensorrt_api.api()
            inspector = self._deserialize().create_engine_inspector()
            found = products_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        if not found:
            raise RuntimeError(f"the plans of {tensorrt_api.version()} are in a form that is not known")
        return found

    def int8_matmuls(self) -> set[str]:
        """Names of the ONNX MatMul nodes that the plan multiplies as int8 x int8."""
        return int8_nodes(self.products)

    def fused_nodes(self) -> set[str]:
        """Names of the ONNX nodes that are part of a fused attention."""
        return attention_nodes(self.products)

    def _deserialize(self) -> Any:
        trt, log = tensorrt_api.api(), tensorrt_api.log()
        log.errors.clear()
        check_device(self._device)
        cuda.use_device(_index(self._device))
        self._runtime = trt.Runtime(log)  # outlives its engines
        engine = self._runtime.deserialize_cuda_engine(self.plan)
        if engine is None:
            raise RuntimeError(log.take())
        if self._file is not None and self._file.is_file():
            self._plan = None  # the GPU has it: up to gigabytes that the process need not hold
        return engine


def _kept(graph: str, identity: str, file: Path | None, rebuild: bool, build: Callable[[], bytes]) -> bytes:
    """The plan of that identity from its file, where it is left after it was built."""
    if file is None:
        return build()
    if file.is_file():
        return file.read_bytes()
    others = sorted(path for path in file.parent.glob("*.plan"))
    if others and not rebuild:
        there = ", ".join(path.stem.replace("-for-", " for ") for path in others)
        raise StalePlanError(
            f"the plan of {graph} is one of {there}; here is {identity.replace(' ', '-').replace('-for-', ' for ')}: "
            "build it anew with --rebuild"
        )
    plan = build()
    for path in others:
        path.unlink()
    keep(file, plan)
    return plan


class TensorRTEngine(TensorRTPlan):
    """One plan on a GPU, with fixed shapes; its tensors stay on the device, and so does what was given before.

    run(inputs) -> outputs, by name, float32 or int64 numpy arrays: only the inputs that are given are copied, then the
    whole step is launched as one CUDA graph, on one stream. Not thread-safe.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], **options: Any):
        super().__init__(path, shapes, **options)
        if (profile := self.options.profile) is not None:
            latents = shapes[STEP_INPUT][-1]
            if not profile[0] <= latents <= profile[2]:
                bounds = f"{profile[0]} to {profile[2]}"
                raise UserError(
                    f"{latents} latents are not among the {bounds} of this bundle's --profile: build a wider one"
                )
        trt = tensorrt_api.api()
        self.cuda_engine = self._deserialize()
        if self.options.weight_streaming is not None:
            self.cuda_engine.weight_streaming_budget_v2 = self.options.weight_streaming
        self._stream = cuda.Stream()
        self._context = self._open()
        self.inputs = {name: tuple(shape) for name, shape in shapes.items()}
        self.outputs: list[str] = []
        for i in range(self.cuda_engine.num_io_tensors):
            name = self.cuda_engine.get_tensor_name(i)
            if self.cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                self.outputs.append(name)
            elif not self._context.set_input_shape(name, self.inputs[name]):
                raise RuntimeError(f"the plan does not take {name} as {self.inputs[name]}")
        self._buffers: dict[str, cuda.Buffer] = {}
        for name in (*self.inputs, *self.outputs):
            dtype = trt.nptype(self.cuda_engine.get_tensor_dtype(name))
            buffer = cuda.Buffer(tuple(self._context.get_tensor_shape(name)), dtype, self._stream)
            self._buffers[name] = buffer
            self._context.set_tensor_address(name, buffer.address)
        self._bound: set[str] = set()
        self._runs = 0
        self._graph: cuda.Graph | None = None
        if self._kernels is not None and self._kernels.wanted:
            self._compile(self._kernels)

    def _compile(self, kernels: KernelCache) -> None:
        """Run once on zeros, so that every kernel there is to compile is compiled and kept."""
        for name in self.inputs:
            self._buffers[name].host[...] = 0
            self._buffers[name].upload()
        self.launch()
        kernels.keep()

    def _open(self) -> Any:
        """An execution context. TensorRT-RTX, which compiles its kernels here, captures its CUDA graph by itself."""
        trt, log = tensorrt_api.api(), tensorrt_api.log()
        self._captures = not hasattr(trt, "CudaGraphStrategy")
        self._kernels: KernelCache | None = None
        if self._captures:
            context = self.cuda_engine.create_execution_context()
        else:
            config = self.cuda_engine.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._kernels = KernelCache(config, None if self._file is None else self._file.parent)
            context = self.cuda_engine.create_execution_context(config)
        if context is None:
            raise RuntimeError(log.take())
        return context

    def bind(self, name: str, array: NDArray) -> None:
        """Queue the copy of `array` into the engine's input `name`, where it stays until bound again.

        Raises ValueError for another shape than the engine's: numpy would repeat the array to fit.
        """
        if array.shape != self.inputs[name]:
            raise ValueError(f"{name} has shape {array.shape}, the engine takes {self.inputs[name]}")
        buffer = self._buffers[name]
        buffer.host[...] = array
        buffer.upload()
        self._bound.add(name)

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        for name, array in inputs.items():
            self.bind(name, array)
        if missing := self.inputs.keys() - self._bound:
            raise ValueError(f"inputs never given: {', '.join(sorted(missing))}")
        self._execute()
        for name in self.outputs:
            self._buffers[name].download()
        self._stream.wait()
        return {name: np.array(self._buffers[name].host) for name in self.outputs}

    def launch(self) -> None:
        """The step again on what is on the device: nothing is copied, and it is waited for. What timing it takes."""
        self._execute()
        self._stream.wait()

    def _execute(self) -> None:
        """The first run sets up what must not be captured; the second is captured; from then on that is launched."""
        if self._graph is None and self._captures and self._runs == 1:
            self._stream.wait()
            self._graph = self._stream.capture(self._enqueue)
        self._runs += 1
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError(tensorrt_api.log().take())
