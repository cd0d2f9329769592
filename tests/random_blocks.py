"""Quantized graphs of any size without a checkpoint or a calibration: random integers and weights, all from one buffer.

What a builder makes of a graph depends on its form and its sizes, not on its numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from numpy.typing import NDArray

from dit_trt.engines.base import BACKENDS
from dit_trt.exporters.float_graphs import ModelSizes
from dit_trt.exporters.linears import Linear, block_linears
from dit_trt.exporters.lint import lint
from dit_trt.exporters.qdq import write_graph
from dit_trt.exporters.quantized import Activation, LowRank, QuantizedLinear, Weight
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.tooling.build import Proven, bundle_sizes, prove


@dataclass(frozen=True)
class Form:
    """How every Linear is quantized. range: of `Activation`, or `requantize`; group: 0: a scale an output channel.

    graphs: how many step graphs there are (SQD `grouped`); pair: the guidance pair is coded as a difference.
    """

    range: str = "static"
    bits: int = 8
    group: int = 0
    rank: int = 0
    graphs: int = 1
    pair: bool = False


def prove_blocks(
    folder: Path,
    config: dict,
    topologies: dict[str, onnx.ModelProto],
    form: Form,
    trunk: str,
    plan: dict | None = None,
    context: int = 1,
) -> tuple[list[Linear], Proven]:
    """Write a model's conditioning and step graphs for TensorRT, lint them, build their plans and read these.

    config: a `model_config.json`; topologies: its two weightless graphs by name; plan: see `prove`; context: of how
    many halves (2: as with a negative prompt).
    """
    model, dialect = ModelSizes(config), BACKENDS["tensorrt"].dialects[trunk]
    linears = block_linears(model.dit)
    items = {linear.name: _quantized(linear, form) for linear in linears}
    sizes, bounds = bundle_sizes(SimpleNamespace(sizes=model)), [10.0 / i for i in range(1, form.graphs)]
    steps = ("step", *(f"step-{i}" for i in range(1, form.graphs)))
    for graph in ("conditioning", *steps):
        topology, path = topologies[graph.partition("-")[0]], folder / f"{graph}.onnx"
        written = write_graph(topology, path, Weights(topology), items, dialect, narrow=graph in steps)
        lint(path, dialect)
        if written.slots:
            sizes["step_scales"] = sum(slot.width for slot in written.slots)
    shapes = graph_shapes(sizes, step_sigmas=bounds, context=2 if form.pair else context)
    asked = {name: shapes[name] for name in ("conditioning", *steps)}
    return linears, prove(folder, "tensorrt", asked, linears, {"trunk": trunk}, plan=plan)


class Weights:
    """The float weights of a weightless graph; betas of norms are zeros, as published."""

    def __init__(self, topology: onnx.ModelProto):
        self._shapes = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in topology.graph.input
        }

    def __call__(self, name: str) -> NDArray[np.float32]:
        shape = self._shapes[name]
        return np.zeros(shape, np.float32) if name.endswith("beta") else _of_shape(shape, np.float32)


@cache
def _buffer(dtype: type[np.generic]) -> NDArray:
    """Integers of 4 bits, or as many small floats, none of them zero."""
    integers = np.random.default_rng(0).integers(-7, 8, 1 << 24, dtype=np.int8)
    return integers if dtype is np.int8 else (integers.astype(dtype) + dtype(0.5)) / dtype(200)  # type: ignore[call-arg]


def _of_shape(shape: list[int], dtype: type[np.generic]) -> NDArray:
    return _buffer(dtype)[: math.prod(shape)].reshape(shape)


def _quantized(linear: Linear, form: Form) -> QuantizedLinear:
    random = np.random.default_rng(0)
    of_step = linear.graph == "step"
    again = form.range == "requantize" and of_step  # the weight is rounded at every step
    kind = form.range if form.range == "token" or of_step else "static"

    def weight(part: str) -> Weight:
        outputs = linear.parts[part]
        shape = (outputs, linear.in_features // form.group) if form.group else (outputs,)
        integers = _of_shape([outputs, linear.in_features], np.int8)
        return Weight(integers, random.uniform(5e-4, 1e-3, shape).astype(np.float32), form.bits)  # type: ignore[arg-type]

    def low_rank() -> LowRank:
        a, b = (linear.in_features, form.rank), (form.rank, linear.out_features)
        return LowRank(_of_shape(list(a), np.float16), _of_shape(list(b), np.float16))

    return QuantizedLinear(
        linear,
        Activation("step" if again else kind, 1.0 if again else 0.03, 1.0 if form.pair and of_step else None),  # type: ignore[arg-type]
        weight,
        low_rank if form.rank else None,
        random.uniform(0.5, 2, linear.in_features).astype(np.float32) if again else None,
    )
