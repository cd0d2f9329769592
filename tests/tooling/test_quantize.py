"""The numbers of quantize_model against plain formulas: ranges, pair ratios, groups, clipping, shared alphas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling.low_rank import product
from dit_trt.tooling.quantize import QuantizedRange, quantize_model, range_bounds
from dit_trt.tooling.ranges import choose_alphas
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.tables import Calibration, load_calibration
from dit_trt.tooling.weights import dequantize_weight

FF2 = "transformer.layers.1.ff.ff.2"
PAIR = {"cfg_pair": "difference"}
GROUPED = {"method": "sqd", "sqd_weights": "grouped:2"}


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(str(tiny))


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint, tiny_table_file: Path) -> Calibration:
    return load_calibration(tiny_table_file, checkpoint, rows=True)


def test_static_and_token_ranges(checkpoint: Checkpoint, calibration: Calibration) -> None:
    for method in ("sqs", "sqt"):
        [one] = quantize_model(checkpoint, Recipe(method, **PAIR), calibration)  # type: ignore[arg-type]
        item = one.linears[FF2]
        delta = (calibration.absmax[FF2] / item.s).max() / 127
        of_difference = (calibration.difference[FF2] / item.s).max() / 127
        if method == "sqs":
            assert item.activation.scale == pytest.approx(delta, rel=1e-5)
            assert item.activation.difference == pytest.approx(delta / of_difference, rel=1e-5)
        else:
            assert item.activation.scale == pytest.approx(1e-8 * delta, rel=1e-5)
            assert item.activation.difference == 1
        assert one.linears["transformer.layers.0.cross_attn.to_kv"].activation.difference is None
        assert not one.tables


def test_step_ranges_and_groups(checkpoint: Checkpoint, calibration: Calibration) -> None:
    groups = quantize_model(checkpoint, Recipe("sqd", sqd_weights="grouped:3", **PAIR), calibration)  # type: ignore[arg-type]
    assert [len(one.sigmas) for one in groups] == [3, 2, 3]
    np.testing.assert_array_equal(np.concatenate([one.sigmas for one in groups]), calibration.sigmas)
    bounds = range_bounds(groups)
    for bound, high, low in zip(bounds, groups, groups[1:], strict=False):
        assert low.sigmas[0] < bound < high.sigmas[-1]
    first = 0
    for one in groups:
        steps = slice(first, first + len(one.sigmas))
        first = steps.stop
        item, s = one.linears[FF2], one.linears[FF2].s
        delta = (calibration.absmax[FF2][steps] / s).max(axis=1) / 127
        of_difference = (calibration.difference[FF2][steps] / s).max(axis=1) / 127
        assert item.activation.scale == pytest.approx(delta.max(), rel=1e-5)
        np.testing.assert_allclose(one.tables[f"range/{FF2}"][:, 0], delta.max() / delta, rtol=1e-5)
        np.testing.assert_allclose(one.tables[f"difference/{FF2}"][:, 0], delta / of_difference, rtol=1e-5)
    assert not np.allclose(groups[0].linears[FF2].s, groups[2].linears[FF2].s), "each has its own smoothing"
    shared = "transformer.layers.0.cross_attn.to_out"
    np.testing.assert_array_equal(groups[0].linears[shared].s, groups[2].linears[shared].s)


def test_more_groups_than_steps(checkpoint: Checkpoint, calibration: Calibration) -> None:
    with pytest.raises(UserError, match="needs 9 calibrated steps, not 8"):
        quantize_model(checkpoint, Recipe("sqd", sqd_weights="grouped:9"), calibration)


def own_error(one: QuantizedRange, calibration: Calibration, first: int) -> float:
    """Output error of ff.2 on the rows of the steps of a range, that begins with the step `first`, as numpy has it."""
    item = one.linears[FF2]
    weight, branch = item.whole()
    wanted = item.whole.smoothed() - (0 if branch is None else product(branch))  # type: ignore[attr-defined]
    rows, of_step = calibration.rows[FF2]
    here = (of_step >= first) & (of_step < first + len(one.sigmas))
    x = (rows[here] / item.s).astype(np.float64)
    delta = np.full(len(one.sigmas), item.activation.scale)
    if item.activation.range == "step":
        delta = item.activation.scale / one.tables[f"range/{FF2}"][:, 0]
    scale = delta[of_step[here] - first][:, None]
    rounded = np.clip(np.rint(x / scale), -128, 127) * scale
    return float(np.square(x @ wanted.T - rounded @ dequantize_weight(weight).T).sum())


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(
    "options", [{"method": "sqs"}, {"method": "sqd"}, {"method": "sqd", "sqd_weights": "grouped:2"}]
)
def test_clipping_never_raises_the_error_on_its_own_rows(
    checkpoint: Checkpoint, calibration: Calibration, options: dict, rank: int
) -> None:
    """Some rows far louder than their ranges' other rows: clipping has something to gain, and gains it."""
    plain = Recipe(**options, lora_rank=rank)
    for without, clipped in zip(
        quantize_model(checkpoint, plain, calibration),
        quantize_model(checkpoint, replace(plain, clip=True), calibration),
        strict=True,
    ):
        first = int(np.flatnonzero(calibration.sigmas == without.sigmas[0])[0])
        assert own_error(clipped, calibration, first) <= own_error(without, calibration, first) * (1 + 1e-6)
        assert clipped.linears[FF2].activation.scale <= without.linears[FF2].activation.scale


def test_a_pair_is_clipped_in_its_second_half_alone(checkpoint: Checkpoint, calibration: Calibration) -> None:
    [without], [clipped] = (
        quantize_model(checkpoint, Recipe("sqs", clip=clip, **PAIR), calibration)
        for clip in (False, True)  # type: ignore[arg-type]
    )
    for name, item in clipped.linears.items():
        before, after = without.linears[name].activation, item.activation
        if before.difference is not None and after.difference is not None:
            assert before.scale / before.difference == pytest.approx(after.scale / after.difference, rel=1e-5)


def test_all_to_kv_share_one_alpha(checkpoint: Checkpoint, calibration: Calibration) -> None:
    alphas = choose_alphas(checkpoint, Recipe(alpha="auto"), checkpoint.linears, calibration)
    kv = {alpha for name, alpha in alphas.items() if name.endswith("to_kv")}
    assert len(kv) == 1 and len(set(alphas.values())) > 2
    assert all(0 <= alpha <= 1 for alpha in alphas.values())


def test_groups_too_small_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="group_size 17 leaves groups of 1 in "):
        Recipe(bits="w4a8", group_size=17).chosen(checkpoint.linears)
