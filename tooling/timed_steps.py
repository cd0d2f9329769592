"""What timing a step takes, wherever it is done: a step engine of one's own, turns that are fair, the cores there are.

Light: a contender's process imports it before anything is measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ..engines.base import open_engine
from ..engines.manifest import step_graphs
from ..runtime.pipeline import Pipeline, graph_shapes
from ..runtime.step_engine import StepEngine


def open_step_engine(
    pipeline: Pipeline, threads: int, precision: str | None = None, latents: int | None = None
) -> StepEngine:
    """The step graphs of a bundle, compiled anew: no blob of an earlier time is taken, or left.

    threads, precision: see `open_engine`; latents: of the clip (default: the model's full length). Both CFG halves.
    """
    bundle, bounds = pipeline.bundle, pipeline.step_sigmas
    shapes = graph_shapes(pipeline.sizes, step_sigmas=bounds, latents=latents)
    engines = {
        graph: open_engine(
            bundle.backend, bundle.path(f"{graph}.onnx"), shapes[graph], threads=threads, precision=precision
        )
        for graph in step_graphs(bounds)
    }
    return StepEngine(engines, bounds)


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The names of every round, each of them first in turn: a busy machine slows down whoever runs just then."""
    for index in range(rounds):
        shift = index % len(names)
        yield [*names[shift:], *names[:shift]]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
