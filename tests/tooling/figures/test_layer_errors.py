"""The error of one Linear on FP32's inputs, against the paper's formulas in numpy on a replay in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from replays import FF2, KV, PROMPT, QKV, SETTINGS

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling.figures.layer_errors import layer_errors
from dit_trt.tooling.figures.replay import Replay
from dit_trt.tooling.quantize import quantize_model
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.tables import Calibration

STEPS = (0, 3, 5)
Table = NDArray[np.float64]


@pytest.fixture(scope="module")
def errors(
    checkpoint: Checkpoint, tiny_float: Bundle, tiny_table: Calibration, replayed: Callable[[str], Replay]
) -> dict[str, Table]:
    ranges = quantize_model(checkpoint, Recipe("sqs", alpha=0.5), tiny_table)
    return layer_errors(checkpoint, ranges, tiny_float, PROMPT, SETTINGS, replayed(FF2).x, STEPS)


def by_formula(x: NDArray, weight: Table, bias: Table | float, absmax_x: Table) -> float:
    """SQS W8A8 (eq. 1-5): ||y' - y|| / ||y||"""
    absmax_w = np.abs(weight).max(axis=0)
    a, b = (np.maximum(side, 1e-5 * side.max()) for side in (absmax_x, absmax_w))
    s = (a / b) ** 0.5
    delta, scale = (absmax_x / s).max() / 127, np.abs(weight * s).max(axis=1, keepdims=True) / 127
    x_hat = np.clip(np.rint(x / s / delta), -128, 127) * delta
    y = x.astype(np.float64) @ weight.T + bias
    found = x_hat @ (np.rint(weight * s / scale) * scale).T + bias
    return float(np.linalg.norm(found - y) / np.linalg.norm(y))


@pytest.mark.parametrize("name", [FF2, QKV])
def test_sqs_is_the_papers_formula(
    name: str,
    errors: Mapping[str, Table],
    checkpoint: Checkpoint,
    tiny_table: Calibration,
    torch_inputs: Mapping[str, Sequence[NDArray[np.float32]]],
) -> None:
    weight = checkpoint.tensor(f"model.model.{name}.weight").astype(np.float64)
    bias = checkpoint.tensor(f"model.model.{name}.bias").astype(np.float64) if name == FF2 else 0.0
    absmax = tiny_table.absmax[name].max(axis=0).astype(np.float64)
    expected = [by_formula(torch_inputs[name][step], weight, bias, absmax) for step in STEPS]
    np.testing.assert_allclose(errors[name], expected, rtol=0.02)
    assert 1e-4 < min(expected) < 0.5


def test_every_linear_has_an_error_at_every_step(errors: Mapping[str, Table], checkpoint: Checkpoint) -> None:
    assert list(errors) == [linear.name for linear in checkpoint.linears]
    assert {table.shape for table in errors.values()} == {(len(STEPS),)}
    assert np.ptp(errors[KV]) == 0 < errors[KV][0]  # it runs once a prompt


@pytest.mark.parametrize(
    "recipe", [Recipe("sqd", sqd_weights="grouped:2"), Recipe("sqt", cfg_pair="difference", lora_rank=4)], ids=str
)
def test_an_error_is_its_own_linears_alone(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tiny_float: Bundle,
    tiny_table: Calibration,
    replayed: Callable[[str], Replay],
) -> None:
    """What is quantized before a Linear does not reach it: alone it has the same error."""
    measured = [
        layer_errors(checkpoint, ranges, tiny_float, PROMPT, SETTINGS, replayed(FF2).x, STEPS)[FF2]
        for ranges in (
            quantize_model(checkpoint, recipe, tiny_table),
            quantize_model(checkpoint, replace(recipe, include=(FF2,)), tiny_table),
        )
    ]
    np.testing.assert_allclose(*measured, rtol=0.01)
    assert measured[0].min() > 0
