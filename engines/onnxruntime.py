"""ONNX Runtime: int8 on any CPU, and float on CUDA to check accuracy there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .cpu import has_vnni
from .errors import UserError
from .layers import Layer
from .onnxruntime_int4 import OPTIONS, int4_matmuls

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
INT8_OPS = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul")
# Would turn `MatMul(DQ, DQ) + bias` into a float Gemm before the int8 fusion sees it.
_DISABLED = ["MatMulAddFusion"]


def unusable() -> str | None:
    """Why nothing can run with it here; None: its CPU provider always can."""
    return None


def runtime_version() -> str:
    return ort.__version__


class ONNXRuntimeEngine:
    """One session with fixed shapes.

    device: `cpu`, or `cuda` (which runs Q/DQ graphs in float: it has no int8 matrix product for them).
    precision: `int32`, of the sums of int8 products, or `int16` where two products always fit it: a CPU without VNNI
    then uses its faster kernels. exact: whether it was asked for the slower ones that never overflow.
    run(inputs) -> outputs, by name, numpy arrays. Inputs stay bound: a later `run` may give only those that changed.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        device: str = "cpu",
        threads: int | None = None,
        precision: str = "int32",
        profile: bool = False,
    ):
        self._path, self._provider, self._threads = path, _provider(device), threads
        self.exact = precision != "int16" and not has_vnni()
        self._profile = tempfile.TemporaryDirectory() if profile else None
        self._session = self._open()
        if self._provider not in self._session.get_providers():
            raise UserError(f"ONNX Runtime found no working {device} here; leave --device out to run on the CPU")
        self.inputs = {name: tuple(shape) for name, shape in shapes.items()}
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._types = {value.name: _dtype(value.type) for value in self._session.get_inputs()}
        if self._types.keys() != self.inputs.keys():
            raise RuntimeError(f"its inputs are {', '.join(self._types)}, not {', '.join(self.inputs)}")
        self._bound: dict[str, NDArray] = {}

    def _open(self, optimized: Path | None = None) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Idle threads must not spin: between two steps the sampler has the cores, and so has everybody else.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for name, value in OPTIONS.items():
            options.add_session_config_entry(name, value)
        if self.exact:  # slower kernels in the place of those that would overflow
            options.add_session_config_entry("session.x64quantprecision", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self._profile is not None and optimized is None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profile.name) / "times")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            # Weights beside the graph, which is then small enough for protobuf whatever the model's size.
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
            )
        try:
            return ort.InferenceSession(
                str(self._path), options, providers=[self._provider], disabled_optimizers=_DISABLED
            )
        except Exception as error:  # its exceptions have no common base but this
            raise RuntimeError(str(error)) from error

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        for name, array in inputs.items():
            if array.shape != self.inputs[name]:
                raise ValueError(f"{name} has shape {array.shape}, the engine takes {self.inputs[name]}")
            self._bound[name] = np.array(array, self._types[name], order="C")
        if missing := self.inputs.keys() - self._bound.keys():
            raise ValueError(f"inputs never given: {', '.join(sorted(missing))}")
        return dict(zip(self.outputs, self._session.run(self.outputs, self._bound)))

    def layers(self) -> tuple[Layer, ...]:
        """What each node of the graph took, the mean of all runs, in their order; counting ends here."""
        assert self._profile is not None, "opened without profile"
        events = json.loads(Path(self._session.end_profiling()).read_text("utf-8"))
        self._profile.cleanup()
        times: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
                times.setdefault(key, []).append(event["dur"] / 1e6)
        return tuple(
            Layer((name,), kind, kind, kind in INT8_OPS, "linear" in name or kind == "Conv", sum(each) / len(each))
            for (name, kind), each in times.items()
        )

    def int8_matmuls(self) -> set[str]:
        """Names of the MatMul nodes that became integer products, read from the graph as ONNX Runtime optimized it."""
        import onnx  # comes with the build extra; running a bundle needs none of this

        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._open(optimized)
            graph = onnx.load(optimized, load_external_data=False).graph
        found = {node.name for node in graph.node if node.op_type in INT8_OPS}
        return found | int4_matmuls(graph.node, self._provider)


def check_device(device: str) -> None:
    """Raises UserError, naming those there are, for a device that is not."""
    _provider(device)


def _provider(device: str) -> str:
    available = [name for name, provider in PROVIDERS.items() if provider in ort.get_available_providers()]
    if device.lower() not in available:
        hint = "" if "cuda" in available else "; cuda needs onnxruntime-gpu in the place of onnxruntime"
        raise UserError(f"ONNX Runtime has no device {device!r} here; available: {', '.join(available)}{hint}")
    return PROVIDERS[device.lower()]


def _dtype(text: str) -> type:
    """`tensor(float)` -> numpy's type."""
    return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[text]
