"""Smoothing: eq. 3 by hand, and folds that change every weight but not the function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tiny import DEAD_CHANNEL

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.quantize import QuantizedRange, quantize_model
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.smoothing import activation_scales, smoothing_factor
from dit_trt.tooling.tables import Calibration
from dit_trt.tooling.write_graphs import write_graphs

Float = NDArray[np.float32]
positive = st.floats(0, 1e4, width=32)


def test_equation_3() -> None:
    s = smoothing_factor(np.float32([16, 1]), np.float32([4, 0.25]), 0.5)
    np.testing.assert_allclose(s, [2, 2])
    s = smoothing_factor(np.float32([16, 1]), np.float32([4, 0.25]), 0.75)
    np.testing.assert_allclose(s, [8 / 4**0.25, 1 / 0.25**0.25])


@example(np.full(8, 3.9e-44, np.float32), np.zeros(8, np.float32), 0.0)  # the least float32s
@example(np.zeros(8, np.float32), np.full(8, 3.9e-44, np.float32), 0.0)
@example(np.full(8, 1e-19, np.float32), np.full(8, 1e-20, np.float32), 0.0)
@given(arrays(np.float32, 8, elements=positive), arrays(np.float32, 8, elements=positive), st.floats(0, 1))
def test_factors_are_positive_and_finite(x: Float, w: Float, alpha: float) -> None:
    s = smoothing_factor(x, w, alpha)
    assert (s > 0).all() and np.isfinite([s, 1 / s]).all()
    [delta] = activation_scales(x[None], s)
    assert delta > 0 and np.isfinite([delta, 1 / delta]).all()


def test_smoothing_halves_the_range_in_the_exponent() -> None:
    """With alpha 0.5 and equal weights an outlier of 100 x becomes one of 10 x."""
    x, w = np.float32([100, 1]), np.float32([1, 1])
    smoothed = x / smoothing_factor(x, w, 0.5)
    assert smoothed[0] / smoothed[1] == pytest.approx(10)


def run_all(folder: Path, reference: Bundle) -> dict[str, NDArray]:
    """velocity of one step with graphs in `folder`, ORT, through conditioning and step; row 1 is unconditional."""
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("conditioning", "step")
    }
    rng = np.random.default_rng(3)
    pipeline = Pipeline(reference)
    outputs = sessions["conditioning"].run(
        None,
        {
            "prompt_embeds": np.concatenate([pipeline._embed("dog barking"), pipeline._embed("rain")]),
            "seconds_start": np.zeros(2, np.float32),
            "seconds_total": np.full(2, 0.7, np.float32),
            "keep": np.float32([1, 0]),
            "t": np.float32([0.9]),
        },
    )
    names = [output.name for output in sessions["conditioning"].get_outputs()]
    constants = dict(zip(names, outputs, strict=True))
    time_embed = constants.pop("time_embed")[0]
    x = rng.standard_normal((2, 16, 24)).astype(np.float32)
    (velocity,) = sessions["step"].run(None, {**constants, "x": x, "time_embed": time_embed})
    return {"velocity": velocity, **constants}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("sqs"),
        Recipe("sqs", alpha=0.8),
        Recipe("sqs", include=("ff.ff.2",)),
        Recipe("sqs", include=("*to_out",)),
        Recipe("sqs", include=("transformer.layers.1.cross_attn.to_kv", "cross_attn.to_out")),
        Recipe("sqs", exclude=("*.to_qkv", "ff.ff.0.proj")),
    ],
    ids=["all", "alpha", "ff.2 alone", "to_out alone", "one to_kv", "producers in float"],
)
def test_folded_float_graph_equals_the_unfolded(
    tiny: Path, tiny_float: Bundle, tiny_table: Calibration, recipe: Recipe, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    smoothing = quantize_model(checkpoint, recipe, tiny_table)[0].smoothing
    write_graphs(checkpoint, tmp_path, [QuantizedRange({}, smoothing, tiny_table.sigmas)])
    expected, found = run_all(tiny_float.folder, tiny_float), run_all(tmp_path, tiny_float)
    assert np.abs(found["velocity"] - expected["velocity"]).max() <= 2e-5 * np.abs(expected["velocity"]).max()
    np.testing.assert_array_equal(found["global_embed"], expected["global_embed"])


def test_folding_changed_the_weights(tiny: Path, tiny_float: Bundle, tiny_table: Calibration, tmp_path: Path) -> None:
    """The test above would pass on a fold that does nothing; and V must really carry 1/s."""
    checkpoint = Checkpoint.open(str(tiny))
    smoothing = quantize_model(checkpoint, Recipe("sqs"), tiny_table)[0].smoothing
    write_graphs(checkpoint, tmp_path, [QuantizedRange({}, smoothing, tiny_table.sigmas)])
    expected, found = run_all(tiny_float.folder, tiny_float), run_all(tmp_path, tiny_float)
    assert np.abs(found["context_v.0"] - expected["context_v.0"]).max() > 0.1 * np.abs(expected["context_v.0"]).max()
    for s in smoothing.factor.values():
        assert s.std() > 1e-3 * s.mean()


def test_a_fold_on_the_wrong_rows_is_caught(
    tiny: Path, tiny_float: Bundle, tiny_table: Calibration, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    smoothing = quantize_model(checkpoint, Recipe("sqs"), tiny_table)[0].smoothing
    name = "transformer.layers.0.self_attn.to_qkv"
    smoothing.rows[name] = np.roll(smoothing.rows[name], 1)
    write_graphs(checkpoint, tmp_path, [QuantizedRange({}, smoothing, tiny_table.sigmas)])
    expected, found = run_all(tiny_float.folder, tiny_float), run_all(tmp_path, tiny_float)
    assert np.abs(found["velocity"] - expected["velocity"]).max() > 1e-3 * np.abs(expected["velocity"]).max()


def test_query_heads_that_share_a_kv_head_share_their_factor(tiny: Path, tiny_table: Calibration) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    smoothing = quantize_model(checkpoint, Recipe("sqs"), tiny_table)[0].smoothing
    config = checkpoint.sizes.dit
    assert (config.num_heads, config.kv_heads) == (4, 2)
    s = smoothing.factor["transformer.layers.1.cross_attn.to_out"].reshape(4, 32)
    np.testing.assert_array_equal(s[0], s[1])
    np.testing.assert_array_equal(s[2], s[3])
    assert not np.array_equal(s[0], s[2])


def test_dead_channel_and_zero_context(tiny: Path, tiny_table: Calibration, tiny_sqs: Bundle) -> None:
    """A channel nothing ever excites, and the unconditional half whose context is all zero: no NaN, no infinity."""
    dead = tiny_table.absmax["transformer.layers.0.ff.ff.2"][:, DEAD_CHANNEL]
    assert not dead.any(), "the tiny model's dead channel must be dead"
    found = run_all(tiny_sqs.folder, tiny_sqs)
    for name, value in found.items():
        assert np.isfinite(value).all(), name
    assert not found["context_k.0"][1].any() and not found["context_v.1"][1].any()
    latents = Pipeline(tiny_sqs).sample(Pipeline(tiny_sqs).condition("dog", Settings(steps=5), 0.7), Settings(steps=5))
    assert np.isfinite(latents).all()
