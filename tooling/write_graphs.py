"""Quantized ranges of a model become the graph files of a bundle, linted, and the step graphs' scale tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from ..engines.base import INT8, Dialect
from ..engines.home import home
from ..engines.manifest import SCALES, step_graphs
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import export_topologies
from ..exporters.half import GRAPHS as half_graphs
from ..exporters.lint import lint
from ..exporters.qdq import write_graph
from .quantize import QuantizedRange, range_bounds
from .scale_tables import fit_knots, save_scales
from .smoothing import Smoothing

Say = Callable[[str], object]


@dataclass(frozen=True)
class WrittenGraphs:
    """step_sigmas: the falling bounds between the step graphs; step_scales: the width of their input of that name."""

    step_sigmas: list[float]
    step_scales: int


def write_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    ranges: Sequence[QuantizedRange],
    say: Say = lambda message: None,
    dialect: Dialect = INT8,
    half: bool = False,
) -> WrittenGraphs:
    """Write all graphs into `folder` with the float, folded and quantized weights of `ranges`, one step graph each.

    half: store the other matrices of what runs once a clip in FP16.
    """
    bounds = range_bounds(ranges)
    step_scales = 0
    for name, topology in export_topologies(checkpoint.config, home() / "graphs").items():
        graphs = step_graphs(bounds) if name == "step" else (name,)
        for graph, one in zip(graphs, ranges):
            say(f"writing {graph}.onnx")
            path = folder / f"{graph}.onnx"
            weights = folded_weights(checkpoint, one.smoothing)
            halves, narrow = half and name in half_graphs, name == "step"
            written = write_graph(topology, path, weights, one.exported(), dialect, halves, narrow)
            lint(path, dialect)
            if written.slots:
                knots, logs = fit_knots(one.sigmas, one.tables)
                step_scales = save_scales(folder / SCALES.format(graph), knots, logs, written.slots)
    return WrittenGraphs(bounds, step_scales)


def folded_weights(checkpoint: Checkpoint, smoothing: Smoothing) -> Callable[[str], NDArray]:
    """The float weights of the smoothed model by graph name: equal to the original as a function, not as numbers."""
    parts = {linear.graph_name(part): (linear, part) for linear in checkpoint.linears for part in linear.parts}

    def weight(name: str) -> NDArray:
        value = checkpoint.tensor(name)
        if name in parts:
            return smoothing.weight(*parts[name], value)
        return smoothing.vector(name, value)

    return weight
