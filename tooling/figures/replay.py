"""One prompt through the FP32 graphs again: the trajectory, its latents, and one Linear's input at one step.

The float graph gets calibration's taps for that Linear alone, asked for every token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engines.base import Engine, open_engine
from ...engines.bundle import Bundle
from ...engines.home import home
from ...exporters.checkpoint import Checkpoint
from ...exporters.float_graphs import export_topologies
from ...exporters.linears import Linear
from ...exporters.qdq import write_graph
from ...exporters.taps import ROWS, add_taps
from ...runtime.denoiser import guide
from ...runtime.pipeline import Pipeline, Settings, graph_shapes

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Replay:
    """What FP32 did with a prompt: x as the model sees it and the CFG-combined velocity, [steps, channels, latents].

    latents [channels, latents]: the final ones. input [2, tokens, in]: of the Linear asked for, at the step asked for,
    the prompt's half first; of a Linear that runs once a prompt, that once.
    """

    x: Float
    velocity: Float
    latents: Float
    input: Float


def replay(
    checkpoint: Checkpoint,
    reference: Bundle,
    prompt: str,
    settings: Settings,
    linear: Linear,
    step: int,
    done: Callable[[int], object] = lambda steps: None,
) -> Replay:
    """Sample `prompt` with the float bundle of `checkpoint`; done(steps) counts up to settings.steps.

    The tapped graph, as large as the model, is written to the home folder for as long as it takes.
    """
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".replay-", dir=home()) as folder:
        path = Path(folder) / f"{linear.graph}.onnx"
        topology = export_topologies(checkpoint.config, home() / "graphs")[linear.graph]
        write_graph(add_taps(topology, [linear]), path, checkpoint.tensor)
        pipeline = _ReplayPipeline(reference, linear, path)
        # Without guidance no unconditional half is ever computed: both are then the prompt's.
        other = prompt if settings.cfg_scale == 1 else None
        conditioning = pipeline.condition(prompt, settings, pipeline.check_seconds(None), other)
        xs: list[Float] = []
        velocities: list[Float] = []
        kept: list[Float] = []

        def observe(index: int, inputs: Mapping[str, Float], outputs: Mapping[str, Float]) -> None:
            xs.append(inputs["x"][0].copy())
            velocities.append(guide(outputs["velocity"], settings.cfg_scale))
            if index == step:
                kept.append(pipeline.tapped())

        latents = pipeline.sample(conditioning, settings, lambda index: done(index + 1), observe)
        return Replay(np.stack(xs), np.stack(velocities), latents, kept[0])


class _ReplayPipeline(Pipeline):
    """The production pipeline on float graphs, one of them the tapped one at `path`."""

    always_pairs = True  # the taps compare the halves

    def __init__(self, reference: Bundle, linear: Linear, path: Path):
        super().__init__(reference)
        self._linear, self._path = linear, path
        self._recorder: _Recorder | None = None

    def _open(self, graph: str, steps: int, latents: int, batch: int) -> Engine:
        if graph != self._linear.graph:
            return super()._open(graph, steps, latents, batch)
        tokens = self.sizes["max_latents"] + 1 if graph == "step" else self.sizes["context_tokens"]
        shapes = {**graph_shapes(self.sizes, steps)[graph], ROWS: (2 * tokens,)}
        self._recorder = _Recorder(open_engine(self._backend, self._path, shapes), f"rows/{self._linear.name}", tokens)
        return self._recorder

    def tapped(self) -> Float:
        """[2, tokens, in], of the newest call."""
        assert self._recorder is not None
        return self._recorder.newest.reshape(2, -1, self._linear.in_features)


class _Recorder:
    """An engine with taps that looks like one without, and keeps what one of them said last."""

    def __init__(self, engine: Engine, tap: str, tokens: int):
        self._engine, self._tap = engine, tap
        self._rows = np.arange(2 * tokens)
        self.inputs = {name: shape for name, shape in engine.inputs.items() if name != ROWS}
        self.outputs = [name for name in engine.outputs if "/" not in name]
        self.newest: Float = np.zeros((0, 0), np.float32)

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        outputs = self._engine.run({**inputs, ROWS: self._rows})
        self.newest = outputs[self._tap]
        return {name: outputs[name] for name in self.outputs}

    def int8_matmuls(self) -> set[str]:
        return self._engine.int8_matmuls()
