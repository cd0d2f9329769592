"""4-bit weights in OpenVINO: made int8 before it compiles, or kept, with proof that it multiplies them in int8."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from math import prod

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.utils import replace_node

from .home import home
from .int4 import expand, unpack

LARGE = 256_000_000  # bytes of expanded weights from which on they are in a file
GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# How many input channels share a range when OpenVINO quantizes an activation by itself; larger is faster, less exact.
GROUPS = (128, 64, 32, 16)


def expand_weights(model: ov.Model) -> None:
    """Put int8 constants in the place of the `DQ(int4) -> Transpose -> Q` of `expanded` weights.

    OpenVINO folds them itself, but first all of them in float, and its rounding misses some ties. It holds on to them
    beside its own form of them; so those of a large model are in a file of no name, which the system can page out.
    """
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    bases = [name.removesuffix(".int8") for name in nodes if name.endswith(".int8")]
    bases = [base for base in bases if f"{base}.int4" in nodes]
    room = _room(sum(prod(nodes[f"{base}.int4"].get_output_shape(0)) for base in bases))
    first = 0
    for base in bases:
        weight, scale = nodes[f"{base}.int4"], nodes[f"{base}.scale"]
        integers = unpack(weight.data, tuple(weight.get_output_shape(0)))
        if f"{base}.int8_scale" in nodes:
            integers = expand(integers, scale.data, nodes[f"{base}.int8_scale"].data)
        expanded = room[first : first + integers.size].reshape(integers.T.shape)
        expanded[...] = integers.T
        first += integers.size
        constant = ov.op.Constant(expanded, shared_memory=True)
        constant.set_friendly_name(f"{base}.int8")
        replace_node(nodes[f"{base}.int8"], constant)


def _room(size: int) -> NDArray[np.int8]:
    """So many bytes: mapped from an unlinked file of the home folder where they are many and there is room for it."""
    if size >= LARGE:
        with contextlib.suppress(OSError):
            folder = home() / "expanded"
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free > 2 * size:  # a full disk would be a fault on access, not an error
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.truncate(size)
                    return np.memmap(file, np.int8, "r+", shape=(size,))
    return np.empty(size, np.int8)


def memory_weights(model: ov.Model) -> set[tuple[int, int]]:
    """Of the weights that stay in 4 bits: input channels, and how many scales an output channel has along them."""
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    found = set()
    for name, node in nodes.items():
        if name.endswith(".int4"):
            scale = nodes[f"{name.removesuffix('.int4')}.scale"].get_output_shape(0)
            found.add((node.get_output_shape(0)[0], scale[0] if len(scale) == 2 else 1))
    return found


def dynamic_group(weights: set[tuple[int, int]]) -> int:
    """The largest of `GROUPS` that OpenVINO takes for all: no more than a weight has input channels, and a divisor of
    its groups where it has several. 0 when there is none: the products are float then."""

    def suits(size: int) -> bool:
        return all(size <= k if groups == 1 else (k // groups) % size == 0 for k, groups in weights)

    return next(filter(suits, GROUPS), 0)


def name_biases(model: ov.Model) -> None:
    """Name the biases of MatMuls `<MatMul>/bias`: the execution graph calls a product by the bias merged with it."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Add":
            products = [
                value.get_node() for value in node.input_values() if value.get_node().get_type_name() == "MatMul"
            ]
            constants = [v for v in node.input_values() if v.get_node().get_type_name() == "Constant"]
            if products and constants:
                node.set_friendly_name(f"{products[0].get_friendly_name()}/bias")


def int4_matmuls(compiled: ov.CompiledModel, device: str) -> set[str]:
    """Names of the products of a float activation and a 4-bit weight that OpenVINO multiplies in int8.

    Its execution graph calls their kernels `..._f32` whether it quantizes the activation or not, so each is tried
    once for its shape: with the activation quantized the numbers are other ones.
    """
    group, precision = compiled.get_property(GROUP), compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return {
        name
        for name, rows, in_features, groups in _int4_products(compiled)
        if quantizes_activations(rows, in_features, groups, group, precision, device)
    }


def _int4_products(compiled: ov.CompiledModel) -> Iterator[tuple[str, int, int, int]]:
    """Name, rows, input channels and groups of input channels of every product by a 4-bit weight without zero point."""
    for op in compiled.get_runtime_model().get_ordered_ops():
        if op.get_input_size() == 5 and op.get_input_element_type(1) == ov.Type.i4:
            *rows, in_features = op.get_input_shape(0)
            scale = op.get_input_shape(3)
            if op.get_input_element_type(4) == ov.Type.dynamic:
                yield op.get_friendly_name().split("/")[0], prod(rows), in_features, scale[1] if len(scale) == 2 else 1


@cache
def quantizes_activations(
    rows: int, in_features: int, groups: int, group: int, precision: str, device: str = "CPU"
) -> bool:
    """Whether a product of these sizes gives other numbers than with dynamic quantization switched off.

    groups: how many scales every output channel of the weight has. group: of the activation's input channels.
    """
    if group == 0:
        return False
    random = np.random.default_rng(0)
    x = random.standard_normal((min(rows, 64), in_features)).astype(np.float32)
    weight = ov.op.Constant(
        ov.Type.i4, ov.Shape([64, groups, in_features // groups]), random.integers(-7, 8, 64 * in_features)
    )
    scale = random.uniform(0.5, 1, (64, groups, 1)).astype(np.float32)
    parameter = ops.parameter(x.shape, np.float32)
    dequantized = ops.reshape(ops.multiply(ops.convert(weight, np.float32), scale), [64, in_features], False)
    model = ov.Model([ops.matmul(parameter, dequantized, False, True)], [parameter])
    options = {"INFERENCE_PRECISION_HINT": precision}
    found, exact = (
        ov.Core().compile_model(model, device, {**options, GROUP: size})(x)[0].copy() for size in (group, 0)
    )
    return not np.array_equal(found, exact)
