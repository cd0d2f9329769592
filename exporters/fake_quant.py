"""A step graph with fake-quantized Linears, as nvidia-modelopt exports it, becomes one that our engines take.

    x -> [* pre_quant_scale] -> Q -> DQ -> MatMul(Transpose(DQ(Q(float32 W)))) [+ x A B] [+ bias]

comes in, whatever its nodes are called. Out goes the same function with W stored as integers, activations in the
backend's dialect, every product named after its weight (which is how an engine's int8 products are counted) and the
low-rank factors A and B in FP16; all weights are in a data file beside the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from ..engines.base import Dialect
from ..engines.errors import UserError
from .activations import Activations
from .data_file import DataFile
from .half import cast_node, fits
from .linears import DIT_PREFIX, Linear
from .lint import GraphLintError, lint
from .quantized import Activation
from .rewriting import Rewriting

Float = NDArray[np.float32]
QDQ = ("QuantizeLinear", "DequantizeLinear")
_UNREAD = "export the step with its Q/DQ nodes by torch.onnx.export(dynamo=False)"


@dataclass
class Imported:
    """One quantized Linear, by part: the scale of its input, what that is divided by first ([in], or nothing).

    branch_bytes: of its low-rank factors, as stored.
    """

    scale: dict[str, float] = field(default_factory=dict)
    smoothing: dict[str, Float] = field(default_factory=dict)
    branch_bytes: int = 0


def import_step(
    source: Path, target: Path, linears: Sequence[Linear], inputs: Sequence[str], dialect: Dialect
) -> dict[str, Imported]:
    """Write `target` and `target + '.data'`; the Linears of the step that are quantized, by name.

    source: an ONNX file whose weights have the names of our DiT's (with any prefix). inputs: of the step graph.
    Raises UserError for a file that is none, has other inputs, quantizes what no block's Linear is or a part of one
    only, or does it in a way that is not int8 x int8 with symmetric ranges.
    """
    model = _load(source)
    _check_interface(source, model.graph, inputs)
    with DataFile(target.with_name(target.name + ".data")) as data:
        found = _Importer(source, model.graph, data, linears, dialect).run()
    del model.metadata_props[:]
    onnx.save_model(model, target)
    try:
        lint(target, dialect)
    except GraphLintError as error:
        raise UserError(f"{source}: {error}") from None
    return found


def _load(source: Path) -> onnx.ModelProto:
    try:
        return onnx.load(source)
    except (DecodeError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        line = str(error).partition("\n")[0]
        raise UserError(f"{source} cannot be read as ONNX ({line}); {_UNREAD}") from None


def _check_interface(source: Path, graph: onnx.GraphProto, inputs: Sequence[str]) -> None:
    constants = {tensor.name for tensor in graph.initializer}
    given = {value.name: value.type.tensor_type for value in graph.input if value.name not in constants}
    if missing := [*(set(inputs) - given.keys()), *(given.keys() - set(inputs))]:
        raise UserError(f"{source} is not a step graph of this model: {', '.join(sorted(missing))} missing or unknown")
    if [value.name for value in graph.output] != ["velocity"]:
        raise UserError(f"{source} is not a step graph: its output is not velocity alone")
    if wrong := [name for name, kind in given.items() if kind.elem_type != TensorProto.FLOAT]:
        raise UserError(f"{source}: {', '.join(wrong)} are not float32; export the model in float32")
    x = given["x"].shape.dim
    if len(x) != 3 or x[0].HasField("dim_value") or x[2].HasField("dim_value"):
        raise UserError(f"{source}: x has a fixed shape; export it with dynamic_axes for its axes 0 and 2")
    if other := sorted({node.domain for node in graph.node} - {"", "ai.onnx"}):
        raise UserError(f"{source} has nodes of {', '.join(other)}: of modelopt's formats only INT8 is taken")


class _Importer:
    def __init__(
        self, source: Path, graph: onnx.GraphProto, data: DataFile, linears: Sequence[Linear], dialect: Dialect
    ):
        self._source, self._graph, self._data = source, graph, data
        self._parts = {linear.graph_name(part): (linear, part) for linear in linears for part in linear.parts}
        self._linears = list(linears)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._rewriting = Rewriting(graph, data)
        self._activations = Activations(self._rewriting, dialect)
        self._pre_scaled: dict[tuple[str, bytes], str] = {}
        self._found: dict[str, Imported] = {}

    def run(self) -> dict[str, Imported]:
        del self._graph.initializer[:]  # they come back one by one, those that are still read
        nodes = [node for given in self._graph.node if (node := self._maker(given.output[0])) is not None]
        for node in nodes:  # torch stores equal weights once and makes the others' names Identities: they come back
            if node.op_type == "Identity" and node.input[0] in self._constants:
                self._constants[node.output[0]] = self._constants[node.input[0]]
                self._rewriting.remove(node)
        for node in nodes:
            if node.op_type == "MatMul":
                self._import(node)
        self._check_whole()
        self._rewriting.finish()
        self._sweep()
        self._store_branches()
        read = {name for node in self._graph.node for name in node.input}
        for name in sorted(read & self._constants.keys()):
            self._rewriting.constant(name, numpy_helper.to_array(self._constants[name]))
        runtime = [value for value in self._graph.input if value.name not in self._constants]
        del self._graph.input[:], self._graph.value_info[:], self._graph.quantization_annotation[:]
        self._graph.input.extend(runtime)
        return self._found

    # -------------------- one product

    def _import(self, matmul: NodeProto) -> None:
        dequantize = self._maker(matmul.input[1])
        transposed = dequantize is not None and dequantize.op_type == "Transpose"
        if transposed and dequantize is not None:
            dequantize = self._maker(dequantize.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return
        name, integers, scale = self._weight(dequantize)
        linear, part = self._linear(name)
        base = linear.graph_name(part).removesuffix(".weight")
        if transposed:
            integers = integers.T
        if integers.shape != (linear.in_features, linear.parts[part]):
            raise UserError(f"{self._source}: {name} is {list(integers.shape)}, not of this model")
        if _axis(dequantize, scale) != (0 if transposed else 1) and scale.ndim:
            raise UserError(f"{self._source}: {name} has no scale an output channel, but along its inputs")
        x, x_scale = self._activation(matmul, name)
        imported = self._found.setdefault(linear.name, Imported())
        if part in imported.scale:
            raise UserError(f"{self._source}: two products read {name}; every Linear is called once")
        x = self._smoothed(x, linear, part, imported)
        imported.scale[part] = x_scale
        matmul.input[0] = self._activations.quantize(x, Activation("static", x_scale), base).tensor
        matmul.input[1] = self._stored(base, integers, np.broadcast_to(scale, integers.shape[1]))
        matmul.name = base

    def _weight(self, dequantize: NodeProto) -> tuple[str, NDArray[np.int8], Float]:
        """Name, integers as the graph has them, scale [] or [out]."""
        quantize = self._maker(dequantize.input[0])
        name = dequantize.input[0] if quantize is None else quantize.input[0]
        scale, zero = self._parameters(dequantize, quantize, name)
        if zero.any() or zero.dtype != np.int8:
            raise UserError(f"{self._source}: {name} is not quantized symmetrically to int8")
        value = self._constant(name)
        if value is None:
            raise UserError(f"{self._source}: a product of two computed tensors is quantized ({name}); leave it float")
        axis = _axis(dequantize, scale)
        if value.ndim != 2 or (scale.ndim and scale.shape != value.shape[axis : axis + 1]):
            raise UserError(f"{self._source}: the scales of {name} {list(value.shape)} are not one an output channel")
        if quantize is None:
            if value.dtype != np.int8:
                raise UserError(f"{self._source}: {name} is stored as {value.dtype}, not as int8")
            return name, value, scale
        along = scale.reshape([-1 if i == axis else 1 for i in range(value.ndim)]) if scale.ndim else scale
        rounded = np.rint(value.astype(np.float32) / along)
        return name, np.clip(rounded, -128, 127).astype(np.int8), scale

    def _activation(self, matmul: NodeProto, name: str) -> tuple[str, float]:
        """What a product's input is made from, and its scale."""
        dequantize = self._maker(matmul.input[0])
        quantize = None if dequantize is None else self._maker(dequantize.input[0])
        if dequantize is None or quantize is None or (dequantize.op_type, quantize.op_type) != QDQ[::-1]:
            raise UserError(f"{self._source}: the weight {name} is quantized, its input is not: W8A8 needs both")
        scale, zero = self._parameters(dequantize, quantize, name)
        if scale.size != 1 or not np.isfinite(scale).all() or not (scale > 0).all():
            raise UserError(f"{self._source}: the input of {name} has no one positive scale a tensor")
        symmetric = np.array(128 if zero.dtype == np.uint8 else 0)
        if zero.dtype not in (np.int8, np.uint8) or (zero != symmetric).any():
            raise UserError(f"{self._source}: the input of {name} is not quantized symmetrically to 8 bits")
        return quantize.input[0], float(scale)

    def _parameters(self, dequantize: NodeProto, quantize: NodeProto | None, name: str) -> tuple[Float, NDArray]:
        """Scale, [] where it is one number, and zero point of a DQ, which are those of its Q where it has one."""
        found = []
        for node in (dequantize, quantize or dequantize):
            scale = self._constant(node.input[1])
            zero = self._constant(node.input[2]) if len(node.input) > 2 else np.array(np.int8(0))
            if scale is None or zero is None:
                raise UserError(f"{self._source}: the quantization of {name} has a scale that is computed")
            found.append((scale.astype(np.float32).reshape(() if scale.size == 1 else scale.shape), zero))
        (scale, zero), (of_q, zero_of_q) = found
        if not np.array_equal(scale, of_q) or not np.array_equal(zero, zero_of_q):
            raise UserError(f"{self._source}: {name} is dequantized by another scale than it is quantized by")
        return scale, zero

    def _smoothed(self, x: str, linear: Linear, part: str, imported: Imported) -> str:
        """x, or x * pre_quant_scale: one node for all parts that multiply the same x by the same."""
        maker = self._maker(x)
        if maker is None or maker.op_type != "Mul" or (factor := self._constant(maker.input[1])) is None:
            return x
        if factor.size != linear.in_features:
            return x
        imported.smoothing[part] = np.float32(1) / factor.reshape(-1).astype(np.float32)
        return self._pre_scaled.setdefault((maker.input[0], factor.tobytes()), x)

    def _stored(self, base: str, integers: NDArray[np.int8], scale: Float) -> str:
        parameters: dict[str, NDArray] = {
            "int8": np.ascontiguousarray(integers),
            "scale": np.ascontiguousarray(scale),
            "zero_point": np.zeros(scale.shape, np.int8),
        }
        names = [self._rewriting.constant(f"{base}.{kind}", value) for kind, value in parameters.items()]
        return self._rewriting.add("DequantizeLinear", names, f"{base}.dq", axis=1)

    def _linear(self, name: str) -> tuple[Linear, str]:
        """The part of a Linear that a weight is, by its name with any prefix, and ONNX Runtime's suffix of integers."""
        name = name.removesuffix("_quantized")
        for own, found in self._parts.items():
            suffix = own.removeprefix(DIT_PREFIX)
            if name == suffix or name.endswith(f".{suffix}"):
                return found
        for linear in self._linears:
            if name.endswith(f"{linear.name}.weight"):
                fix = "split its parts first (exporters.dit.split_fused)"
                raise UserError(f"{self._source}: {name} is one product of several outputs; {fix}")
        module = name.removesuffix(".weight").rpartition("dit.")[2]
        fix = f'leave it float ({{"quantizer_name": "*{module}.*", "enable": False}})'
        raise UserError(f"{self._source}: {name} is quantized, which is no Linear of a block; {fix}")

    # -------------------- the rest of the graph

    def _check_whole(self) -> None:
        if not self._found:
            raise UserError(f"{self._source} quantizes no Linear of this model's blocks; {_UNREAD}")
        for linear in self._linears:
            imported = self._found.get(linear.name)
            if imported is not None and imported.scale.keys() != linear.parts.keys():
                raise UserError(f"{self._source} quantizes only {', '.join(imported.scale)} of {linear.name}")

    def _sweep(self) -> None:
        """Nodes that nothing reads any more go; Q/DQ that is left is of what no engine would run in int8."""
        needed = {value.name for value in self._graph.output}
        kept: list[NodeProto] = []
        for node in reversed(self._graph.node):
            if not needed.isdisjoint(node.output):
                needed.update(node.input)
                kept.append(node)
        own = {tensor.name for tensor in self._graph.initializer}
        for node in kept:
            if node.op_type in QDQ and node.input[1] not in own:
                fix = "leave everything but the blocks' Linears float"
                raise UserError(f"{self._source}: {node.name} quantizes what no Linear of a block reads; {fix}")
        self._replace(kept[::-1])

    def _replace(self, nodes: Sequence[NodeProto]) -> None:
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self._graph.node[:]
        self._graph.node.extend(copies)

    def _store_branches(self) -> None:
        """Low-rank factors, two products by constants in a row, are stored in FP16 where they fit."""
        made = {node.output[0]: node for node in self._graph.node}
        products = {name: node for name, node in made.items() if node.op_type == "MatMul"}
        casts: list[NodeProto] = []
        for joined in [node for node in self._graph.node if node.op_type == "Add"]:
            for branch, other in (joined.input, reversed(joined.input)):
                second = products.get(branch)
                first = None if second is None else products.get(second.input[0])
                if first is None or second is None:
                    continue
                product = made.get(other)
                while product is not None and product.op_type == "Add":  # a bias
                    product = next((made[name] for name in product.input if name in made), None)
                owner = None if product is None else self._parts.get(f"{product.name}.weight")
                if owner is not None and {first.input[1], second.input[1]} <= self._constants.keys():
                    imported = self._found[owner[0].name]
                    for node in (first, second):
                        imported.branch_bytes += self._halved(node.input[1], casts)
        self._replace([*casts, *self._graph.node])

    def _halved(self, name: str, casts: list[NodeProto]) -> int:
        """Bytes of a constant that is stored in FP16 from now on, if it survives that."""
        value = numpy_helper.to_array(self._constants[name])
        if not fits(value):
            return value.nbytes
        self._rewriting.constant(f"{name}.half", value.astype(np.float16))
        casts.append(cast_node(name))
        del self._constants[name]
        return value.nbytes // 2

    def _maker(self, tensor: str) -> NodeProto | None:
        return self._rewriting.maker(tensor)

    def _constant(self, name: str) -> NDArray | None:
        """An initializer, or what Constant, Identity and Cast nodes make of one; None for what is computed."""
        if name in self._constants:
            return numpy_helper.to_array(self._constants[name])
        node = self._maker(name)
        if node is None or node.op_type not in ("Constant", "Identity", "Cast"):
            return None
        if node.op_type == "Constant":
            return numpy_helper.to_array(node.attribute[0].t)
        value = self._constant(node.input[0])
        if value is None or node.op_type == "Identity":
            return value
        return value.astype(onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i))


def _axis(node: NodeProto, scale: Float) -> int:
    """Along which axis of a weight [*, *] its scale runs."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    return axis % 2 if scale.ndim else 0
