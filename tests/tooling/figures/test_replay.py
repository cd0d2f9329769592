"""The input that a replay hands out is the one torch sees there; the trajectory is the production pipeline's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from replays import FF2, KV, PROMPT, QKV, SETTINGS, STEP

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.fidelity import trajectory
from dit_trt.tooling.figures.replay import Replay, replay


@pytest.mark.parametrize("name", [FF2, QKV, KV])
def test_the_input_is_torchs(
    name: str, replayed: Callable[[str], Replay], torch_inputs: Mapping[str, Sequence[NDArray[np.float32]]]
) -> None:
    expected = torch_inputs[name][0 if name == KV else STEP]
    found = replayed(name).input
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    if name != KV:
        assert np.abs(found - torch_inputs[name][STEP - 1]).max() > 1e-2 * np.abs(expected).max()  # the step counts


def test_the_trajectory_is_the_pipelines(replayed: Callable[[str], Replay], tiny_float: Bundle) -> None:
    pipeline = Pipeline(tiny_float)
    conditioning = pipeline.condition(PROMPT, SETTINGS, pipeline.check_seconds(None))
    x, velocity = trajectory(pipeline, conditioning, SETTINGS)
    np.testing.assert_allclose(replayed(FF2).x, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())
    np.testing.assert_allclose(replayed(FF2).velocity, velocity, rtol=1e-4, atol=1e-3 * np.abs(velocity).max())
    latents = pipeline.sample(conditioning, SETTINGS)
    np.testing.assert_allclose(replayed(KV).latents, latents, rtol=1e-3, atol=1e-3 * np.abs(latents).max())


def test_steps_are_counted_and_no_graph_stays(checkpoint: Checkpoint, tiny_float: Bundle, home: Path) -> None:
    before = {path.name for path in home.iterdir()}
    steps: list[int] = []
    replay(checkpoint, tiny_float, PROMPT, Settings(steps=2), checkpoint.linears[0], 0, steps.append)
    assert steps[-2:] == [1, 2]
    assert {path.name for path in home.iterdir()} <= before | {"graphs", "compiled"}


def test_without_guidance_both_halves_are_the_prompts(checkpoint: Checkpoint, tiny_float: Bundle) -> None:
    alone = Settings(steps=2, cfg_scale=1)
    [linear] = [one for one in checkpoint.linears if one.name == FF2]
    found = replay(checkpoint, tiny_float, PROMPT, alone, linear, 1)
    np.testing.assert_allclose(found.input[0], found.input[1], rtol=1e-4, atol=1e-5)
