"""What timing a step takes, wherever it is done: a step engine of one's own, turns that are fair, the cores there are.

Light: a contender's process imports it before anything is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence

from ..engines.base import open_engine, precision_of
from ..engines.manifest import step_graphs
from ..runtime.graph_shapes import graph_shapes
from ..runtime.pipeline import Pipeline
from ..runtime.step_engine import Conditioning, StepEngine


def open_step_engine(
    pipeline: Pipeline,
    conditioning: Conditioning,
    threads: int | None,
    precision: str | None = None,
    latents: int | None = None,
    profile: bool | None = None,
) -> StepEngine:
    """The step graphs of a bundle as `conditioning` needs them, compiled anew: no blob of an earlier time is taken, or
    left.

    threads, precision, profile: see `open_engine` (precision: by default the bundle's own); latents: of the clip
    (default: the model's full length).
    """
    bundle, bounds = pipeline.bundle, pipeline.step_sigmas
    rows = {"batch": conditioning.batch, "context": pipeline.context_rows(conditioning)}
    shapes = graph_shapes(pipeline.sizes, step_sigmas=bounds, latents=latents, **rows)
    engines = {
        graph: open_engine(
            bundle.backend,
            bundle.path(f"{graph}.onnx"),
            shapes[graph],
            threads=threads,
            precision=precision or precision_of(bundle.backend, bundle.manifest, graph),
            profile=profile,
        )
        for graph in step_graphs(bounds)
    }
    return StepEngine(engines, bounds)


SHORT, LONG = 0.05, 1.0  # seconds: a turn repeats its step for at least so long; one that takes longer is not repeated


def turn(step: Callable[[], object]) -> float:
    """Seconds of a step, behind one that is not counted, but for very long ones; of a short one the mean of several."""
    start = time.perf_counter()
    step()
    once = time.perf_counter() - start
    if once > LONG:
        return once
    start, calls = time.perf_counter(), 0
    while calls < 1 or time.perf_counter() - start < SHORT:
        step()
        calls += 1
    return (time.perf_counter() - start) / calls


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The names of every round, each of them first in turn: a busy machine slows down whoever runs just then."""
    for index in range(rounds):
        shift = index % len(names)
        yield [*names[shift:], *names[:shift]]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
