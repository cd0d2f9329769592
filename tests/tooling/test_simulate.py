"""The paper's own simulation of SQD, against numpy: a range for every channel and step, W rounded from the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.tooling.build import bundle_sizes
from dit_trt.tooling.simulate import StepChannelLinear, step_channel_model
from dit_trt.tooling.tables import Calibration

FF2 = "transformer.layers.1.ff.ff.2"


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_step_channel_is_the_papers_formula(tiny: Path, tiny_table: Calibration, bits: int, largest: int) -> None:
    checkpoint, step = Checkpoint.open(str(tiny)), 5
    model = step_channel_model(checkpoint, tiny_table, 0.5, bits)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    shapes = graph_shapes(bundle_sizes(checkpoint))["step"]
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model.step({**inputs, "sigma": tiny_table.sigmas[step]})  # sets the tables to those of the step
    [found] = [
        module
        for module in model._steps[0].modules()
        if isinstance(module, StepChannelLinear) and module._item.linear.name == FF2
    ]
    weight = checkpoint.tensor(f"model.model.{FF2}.weight").astype(np.float64)
    absmax_x, absmax_w = tiny_table.absmax[FF2][step].astype(np.float64), np.abs(weight).max(axis=0)
    floored = (np.maximum(side, 1e-5 * side.max()) for side in (absmax_x, absmax_w))
    s = np.prod([side**power for side, power in zip(floored, (0.5, -0.5), strict=True)], axis=0)
    scale_w = np.abs(weight * s).max(axis=1, keepdims=True) / largest
    x = rng.uniform(-1.2, 1.2, (2, 3, len(s))) * absmax_x
    delta = np.maximum(absmax_x / s / 127, 1e-12)
    x_hat = np.clip(np.rint(x / s / delta), -128, 127) * delta
    expected = x_hat @ (np.rint(weight * s / scale_w) * scale_w).T + checkpoint.tensor(f"model.model.{FF2}.bias")
    with torch.inference_mode():
        y = found(torch.from_numpy(x.astype(np.float32))).numpy()
    # A few of the 1536 inputs stand on a rounding edge in one of the two precisions.
    assert np.median(np.abs(y - expected)) < 1e-4 * np.abs(expected).max()
    assert np.linalg.norm(y - expected) < 0.01 * np.linalg.norm(expected)
