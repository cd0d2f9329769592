"""One replay of the tiny model, which several tests hold against torch and numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from replays import FF2, PROMPT, SETTINGS, STEP

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.tooling.fidelity import Forced
from dit_trt.tooling.figures.replay import Replay, replay
from dit_trt.tooling.quantize import QuantizedRange
from dit_trt.tooling.simulate import SimulatedModel, SimulatedPipeline
from dit_trt.tooling.smoothing import Smoothing


@pytest.fixture(scope="session")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(str(tiny))


@pytest.fixture(scope="session")
def replayed(checkpoint: Checkpoint, tiny_float: Bundle) -> Callable[[str], Replay]:
    """The replay that hands out the input of the Linear of that name."""
    kept: dict[str, Replay] = {}

    def of(name: str) -> Replay:
        if name not in kept:
            [linear] = [one for one in checkpoint.linears if one.name == name]
            kept[name] = replay(checkpoint, tiny_float, PROMPT, SETTINGS, linear, STEP)
        return kept[name]

    return of


@pytest.fixture(scope="session")
def torch_inputs(
    checkpoint: Checkpoint, tiny_float: Bundle, replayed: Callable[[str], Replay]
) -> dict[str, list[NDArray[np.float32]]]:
    """By Linear name, its input [2, tokens, in] at every step (to_kv: once), by hooks on the float DiT in torch."""
    model = SimulatedModel(checkpoint, [QuantizedRange({}, Smoothing(), SETTINGS.sigmas[:-1])])
    found: dict[str, list[NDArray[np.float32]]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.setdefault(name, []).append(args[0].numpy().copy())

    for linear in checkpoint.linears:
        graph: torch.nn.Module = model._conditioning if linear.graph == "conditioning" else model._steps[0]
        graph.dit.get_submodule(linear.name).register_forward_hook(hook(linear.name))  # type: ignore[union-attr,operator]
    pipeline: Pipeline = SimulatedPipeline(tiny_float, model)
    conditioning = pipeline.condition(PROMPT, SETTINGS, pipeline.check_seconds(None))
    velocity = Forced(pipeline, conditioning, SETTINGS.cfg_scale)
    for step, x in enumerate(replayed(FF2).x):
        velocity(x, step)
    return found
