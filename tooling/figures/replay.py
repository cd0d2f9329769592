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

from ...engines.bundle import Bundle
from ...engines.home import home
from ...exporters.checkpoint import Checkpoint
from ...exporters.float_graphs import export_topologies
from ...exporters.linears import Linear
from ...exporters.qdq import write_graph
from ...exporters.taps import add_taps
from ...runtime.denoiser import guide
from ...runtime.pipeline import Settings
from ..calibrate import TappedPipeline

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
        tap = _LastTap(linear, reference.manifest["sizes"])
        pipeline = TappedPipeline(reference, path.parent, tap)
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
                kept.append(tap.input)

        latents = pipeline.sample(conditioning, settings, lambda index: done(index + 1), observe)
        return Replay(np.stack(xs), np.stack(velocities), latents, kept[0])


class _LastTap:
    """Keeps what one Linear was given in the newest call of its graph, every token of it."""

    def __init__(self, linear: Linear, sizes: Mapping[str, int]):
        self._linear = linear
        self._tokens = sizes["max_latents"] + 1 if linear.graph == "step" else sizes["context_tokens"]
        self.input: Float = np.zeros((0, 0), np.float32)

    def rows_per_call(self, graph: str) -> int:
        return 2 * self._tokens

    def rows(self, graph: str) -> NDArray[np.int64]:
        return np.arange(2 * self._tokens)

    def replay(self) -> None:
        return None

    def record(self, graph: str, taps: dict[str, NDArray], outputs: dict[str, NDArray]) -> None:
        self.input = taps[f"rows/{self._linear.name}"].reshape(2, -1, self._linear.in_features)
