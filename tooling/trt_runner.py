"""A TensorRT engine of ours, executed by Polygraphy's own `TrtRunner`: the same plan, none of our runtime.

Where the two differ, the fault is in how we copy, bind or capture, not in the plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from numpy.typing import NDArray
from polygraphy import config
from polygraphy.datatype import tensorrt as datatype
from polygraphy.mod.trt_importer import lazy_import_trt

from ..engines import tensorrt_api

if TYPE_CHECKING:
    from ..engines.base import Engine
    from ..engines.tensorrt import TensorRTEngine
    from ..runtime.step_engine import StepEngine


class _ByTrtRunner:
    """The interface of an Engine, whose inputs stay bound, around an active TrtRunner."""

    def __init__(self, engine: TensorRTEngine):
        _let_polygraphy_use(tensorrt_api.is_rtx())
        from polygraphy.backend.trt import TrtRunner

        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.int8_matmuls = engine.int8_matmuls
        self._given: dict[str, NDArray] = {}
        self.runner = TrtRunner(engine.cuda_engine)
        self.runner.activate()

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        self._given |= inputs
        found = self.runner.infer(OrderedDict(self._given), check_inputs=False)
        return {name: found[name].copy() for name in self.outputs}

    def close(self) -> None:
        """Polygraphy frees its inputs, not its outputs."""
        for buffer in self.runner.output_allocator.buffers.values():
            buffer.free()
        self.runner.deactivate()


def _let_polygraphy_use(rtx: bool) -> None:
    """Which of the two modules it takes: its types asked when they were first imported, its backend does only now."""
    config.USE_TENSORRT_RTX = rtx
    datatype.trt = lazy_import_trt()


@contextmanager
def by_trt_runner(step_engine: StepEngine) -> Iterator[StepEngine]:
    """The step graphs of a TensorRT bundle as Polygraphy runs them, until the end of the block.

    Raises PolygraphyException, or OSError where it finds no `libcudart.so`, when it cannot run.
    """
    wrapped: list[_ByTrtRunner] = []

    def wrap(engine: Engine) -> Engine:
        wrapped.append(_ByTrtRunner(engine))  # type: ignore[arg-type]
        return wrapped[-1]

    try:
        yield step_engine.through(wrap)
    finally:
        for engine in wrapped:
            engine.close()
