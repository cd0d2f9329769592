"""OpenVINO: an ONNX graph becomes a compiled model on a CPU (or another OpenVINO device)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from .errors import UserError
from .layers import Layer
from .openvino_int4 import GROUP, dynamic_group, expand_weights, int4_matmuls, memory_weights, name_biases


def unusable() -> str | None:
    """Why nothing can run with it here; None when it has its CPU device."""
    if "CPU" in (devices := ov.Core().available_devices):
        return None
    return f"OpenVINO lists no CPU device (only: {', '.join(devices) or 'none'}); reinstall openvino"


def runtime_version() -> str:
    return ov.__version__


def check_device(device: str) -> None:
    """Raises UserError, naming those there are, for a device that is not."""
    devices = ov.Core().available_devices
    if device.split(".")[0] not in {name.split(".")[0] for name in devices}:
        raise UserError(f"OpenVINO has no device {device!r} here; available: {', '.join(devices)}")


def has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINOEngine:
    """One compiled graph with fixed shapes.

    precision: of what is not quantized, `f32` or `bf16` (faster where `has_bf16`, and less exact). profile: `layers`
    says then what each layer takes.
    run(inputs) -> outputs, by name, float32 or int64 numpy arrays. Inputs stay bound: a later `run` may give only
    those that changed. Not thread-safe.
    """

    backend = "openvino"

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        device: str = "CPU",
        cache: Path | None = None,
        threads: int | None = None,
        precision: str = "f32",
        profile: bool = False,
    ):
        check_device(device)
        core = ov.Core()
        model = core.read_model(path)
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        expand_weights(model)
        options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        if kept := memory_weights(model):
            name_biases(model)
            options[GROUP] = dynamic_group(kept)
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        if profile:
            options["PERF_COUNT"] = True
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self.compiled = core.compile_model(model, device, options)
        self._device, self._keeps_int4 = device, bool(kept)
        self._request = self.compiled.create_infer_request()
        self.inputs = {port.any_name: tuple(port.shape) for port in self.compiled.inputs}
        self.outputs = [port.any_name for port in self.compiled.outputs]
        self._bound: dict[str, ov.Tensor] = {}

    def bind(self, name: str, array: NDArray) -> None:
        """Copy `array` into the engine's input `name`, where it stays until bound again.

        Raises ValueError for another shape than the engine's: numpy would repeat the array to fit.
        """
        if array.shape != self.inputs[name]:
            raise ValueError(f"{name} has shape {array.shape}, the engine takes {self.inputs[name]}")
        if name not in self._bound:
            self._bound[name] = self._request.get_tensor(name)
        self._bound[name].data[...] = array

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        for name, array in inputs.items():
            self.bind(name, array)
        if missing := self.inputs.keys() - self._bound.keys():
            raise ValueError(f"inputs never given: {', '.join(sorted(missing))}")
        self._request.infer()
        return {name: np.array(self._request.get_tensor(name).data) for name in self.outputs}

    def int8_matmuls(self) -> set[str]:
        """Names of the ONNX MatMul nodes whose kernel multiplies 8 bits by 8 bits, read from the runtime's own graph.

        OpenVINO says `_i8` of a kernel for int8 activations and `_I8` of one for uint8 activations. Products by weights
        that stay in 4 bits count when OpenVINO quantizes their activation: see `int4_matmuls`.
        """
        kernels = matmul_kernels(self.compiled)
        found = {name for kernel, names in kernels if "_i8" in kernel.lower() for name in names}
        return found | int4_matmuls(self.compiled, self._device) if self._keeps_int4 else found

    def layers(self) -> tuple[Layer, ...]:
        """What each layer took, the mean of all runs, in their order; those that take no time are left out."""
        found = []
        for op in self.compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            micros = _text(info, "execTimeMcs")
            if not micros.isdigit() or int(micros) == 0:
                continue
            names = (op.get_friendly_name(), *_text(info, "originalLayersNames").split(","), *_weight_names(op))
            kind, kernel = _text(info, "layerType"), _text(info, "primitiveType")
            weighs = kind == "Convolution" or bool(_weight_names(op))
            found.append(Layer(names, kind, kernel, "_i8" in kernel.lower(), weighs, int(micros) / 1e6))
        return tuple(found)

    def float_matmuls(self) -> set[str]:
        """The other matrix products: attention, embedders, and any Linear that lost its int8 kernel."""
        return {name for _, names in matmul_kernels(self.compiled) for name in names} - self.int8_matmuls()


def matmul_kernels(compiled: ov.CompiledModel) -> Iterator[tuple[str, list[str]]]:
    """For every matrix product of the execution graph: its kernel (`brgemm_avx512_i8`, ...) and its ONNX nodes.

    The execution graph names a quantized product after the dequantization it was merged with (`<node>/...`), or
    invents a name; its weight still carries the node's (`<node>.int8`), so both are looked at.
    """
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        if _text(info, "layerType") in ("FullyConnected", "MatMul", "GatherMatmul"):
            names = _text(info, "originalLayersNames").split(",") + _weight_names(op)
            yield _text(info, "primitiveType"), [name.split("/")[0].removesuffix(".int8") for name in names]


def _weight_names(op: ov.Node) -> list[str]:
    """Names of the nodes between a product's second input and its constant (at most a Transpose and a Reorder)."""
    names: list[str] = []
    node = op
    for index in (1, 0, 0, 0):
        if node.get_input_size() <= index:
            break
        node = node.input_value(index).get_node()
        if _text(node.get_rt_info(), "layerType") not in ("Const", "Transpose", "Reorder", "Reshape"):
            break
        names.append(node.get_friendly_name())
    return names


def _text(info: Mapping, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""
