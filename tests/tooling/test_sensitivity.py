"""The error of Linears quantized alone: nothing costs nothing, the parts are right, the worse is ranked first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.linears import Linear
from dit_trt.runtime.pipeline import Settings
from dit_trt.tooling.allocate import dit_bytes, rest_bytes
from dit_trt.tooling.quantize import QuantizedRange, quantize_model
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.sensitivity import (
    BY,
    Error,
    Part,
    Probe,
    measure_parts,
    parts_of,
    rank,
    sampled_steps,
    weight_bytes,
    without,
)
from dit_trt.tooling.sensitivity_plot import plot_errors
from dit_trt.tooling.smoothing import Smoothing
from dit_trt.tooling.tables import Calibration

SETTINGS = Settings(steps=8)
PROMPTS = ("rain", "dog barking")


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(str(tiny))


@pytest.fixture(scope="module")
def probe(checkpoint: Checkpoint, tiny_float: Bundle) -> Probe:
    return Probe(checkpoint, tiny_float, PROMPTS, SETTINGS, 3)


def test_nothing_quantized_costs_exactly_nothing(probe: Probe) -> None:
    error = probe.measure([QuantizedRange({}, Smoothing(), SETTINGS.sigmas[:-1])])
    assert error.steps == (0, 4, 7)
    assert error.squared.shape == (2, 3)
    assert not error.squared.any()
    assert error.relative_error == 0
    np.testing.assert_allclose(error.cosine, 1, rtol=1e-12)


def test_steps_go_from_the_first_to_the_last() -> None:
    assert sampled_steps(100, 8) == (0, 14, 28, 42, 57, 71, 85, 99)
    assert sampled_steps(3, 8) == (0, 1, 2)
    assert sampled_steps(1, 8) == (0,)


@pytest.mark.parametrize("by", BY)
def test_a_part_is_what_its_pattern_names(checkpoint: Checkpoint, by: str) -> None:
    parts = parts_of(checkpoint.linears, by)
    found = [linear.name for part in parts for linear in part.linears]
    assert sorted(found) == sorted(linear.name for linear in checkpoint.linears)
    assert len(parts) == {"layer": 14, "kind": 7, "block": 2}[by]
    for part in parts:
        assert Recipe(include=(part.name,)).chosen(checkpoint.linears) == list(part.linears)


@pytest.mark.parametrize("method", ["sqs", "sqd", "sqt"])
def test_a_part_alone_is_the_recipe_with_the_others_excluded(
    checkpoint: Checkpoint, probe: Probe, tiny_table: Calibration, method: str
) -> None:
    """Of a recipe that quantizes two kinds; one is measured by its part, and by excluding the other."""
    recipe = Recipe(method, include=("ff.ff.2", "cross_attn.to_kv"))
    parts = parts_of(recipe.chosen(checkpoint.linears), "kind")
    calls: list[int] = []
    errors = measure_parts(checkpoint, recipe, tiny_table, probe, parts, calls.append)
    assert calls == list(range(1, 2 * probe.points + 1))
    for part, other, error in zip(parts, reversed(parts), errors):
        expected = probe.measure(
            quantize_model(checkpoint, replace(recipe, include=("*",), exclude=_kinds(checkpoint, part)), tiny_table)
        )
        assert error.relative_error == expected.relative_error > 0, other
        assert 0 < error.worst_step_cosine < 1
        np.testing.assert_array_equal(error.cosine, expected.cosine)


def _kinds(checkpoint: Checkpoint, part: Part) -> tuple[str, ...]:
    return tuple({linear.kind for linear in checkpoint.linears} - {part.name})


def test_a_layer_made_worse_is_the_worst(
    checkpoint: Checkpoint, tiny_float: Bundle, tiny_table: Calibration, tiny: Path, tmp_path: Path
) -> None:
    """One norm's channel 3000 times louder and the weights behind it as much quieter: FP32 computes the same, but a
    range that reaches to that channel leaves no levels to the others."""
    victim, times = "transformer.layers.0.self_attn.to_qkv", 3000.0
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.model.transformer.layers.0.pre_norm.gamma"][7] *= times
    weights[f"model.model.{victim}.weight"][:, 7] /= times
    save_file(weights, tmp_path / "model.safetensors")
    absmax = {name: value.copy() for name, value in tiny_table.absmax.items()}
    absmax[victim][:, 7] *= times
    recipe = Recipe(smooth=False)
    parts = parts_of(checkpoint.linears, "layer")
    places = []
    for model, table in (
        (checkpoint, tiny_table),
        (Checkpoint.open(str(tmp_path)), replace(tiny_table, absmax=absmax)),
    ):
        probe = Probe(model, tiny_float, PROMPTS[:1], SETTINGS, 2)
        rows = rank(recipe, parts, measure_parts(model, recipe, table, probe, parts))
        errors = [row.error.mean_squared for row in rows]
        assert errors == sorted(errors, reverse=True)
        assert sum(row.share for row in rows) == pytest.approx(1)
        places.append([row.part.name for row in rows].index(victim))
    assert places[1] == 0 < places[0]


def _error(*squared: float) -> Error:
    values = np.array([squared])
    return Error(tuple(range(len(squared))), 1 - values, values)


def test_the_numbers_of_an_error() -> None:
    error = Error((0, 50, 99), np.array([[0.9, 1.0, 0.6], [0.7, 0.7, 1.0]]), np.array([[0.0, 0.01, 0.02]] * 2))
    assert error.relative_error == pytest.approx(0.1)
    assert (error.worst_step, error.worst_step_cosine) == (0, pytest.approx(0.8))


def test_velocities_that_are_no_numbers_are_the_worst(checkpoint: Checkpoint) -> None:
    parts = parts_of(checkpoint.linears[:3], "layer")
    rows = rank(Recipe(), parts, [_error(0.5), _error(float("nan")), _error(1.0)])
    assert [row.part for row in rows] == [parts[1], parts[2], parts[0]]
    assert [row.share for row in rows] == [1, 0, 0]


def test_what_is_left_out_is_excluded_and_not_all_of_it(checkpoint: Checkpoint) -> None:
    recipe = Recipe(exclude=("ff.ff.2",))
    parts = parts_of(recipe.chosen(checkpoint.linears), "kind")
    rows = rank(recipe, parts, [_error(index) for index in range(len(parts))])
    spared = without(recipe, checkpoint.linears, rows[:2])
    assert spared.exclude == ("ff.ff.2", "ff.ff.0.proj", "cross_attn.to_out")
    with pytest.raises(UserError, match="all there is to quantize"):
        without(recipe, checkpoint.linears, rows)


# -------------------- bytes


def test_the_bytes_of_float_are_those_of_the_checkpoint(checkpoint: Checkpoint, tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    dit = {name: 4 * w.numel() for name, w in weights.items() if name.startswith("model.model.")}
    dit = {name: size for name, size in dit.items() if not name.endswith("inv_freq")}  # is RoPE's tables in the graph
    linears = sum(dit[linear.key()] for linear in checkpoint.linears)
    assert dit_bytes(checkpoint, Recipe("none")) == sum(dit.values())
    assert rest_bytes(checkpoint, Recipe()) == sum(dit.values()) - linears


def test_the_bytes_of_a_weight_are_those_in_the_bundle(checkpoint: Checkpoint, tiny_sqs: Bundle) -> None:
    sizes: dict[str, int] = {}
    for graph in ("conditioning", "step"):
        model = onnx.load(tiny_sqs.path(f"{graph}.onnx"))
        sizes |= {t.name: onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer}
    found = {linear.name: _stored(sizes, linear) for linear in checkpoint.linears}
    assert found == {linear.name: weight_bytes(Recipe(), linear) for linear in checkpoint.linears}


def _stored(sizes: dict[str, int], linear: Linear) -> int:
    tensors = [linear.graph_name(part, kind) for part in linear.parts for kind in ("int8", "scale", "zero_point")]
    return sum(sizes[name] for name in tensors)


def test_the_bytes_of_four_bits_and_a_branch(checkpoint: Checkpoint) -> None:
    linear = next(linear for linear in checkpoint.linears if linear.kind == "self_attn.to_out")  # 128 x 128
    recipe = Recipe(bits="w4a8", group_size=32)
    expanded = 128 * 64 + 4 * 128 * 4 + 4 * 128 + 128  # integers, scales of 4 groups, c, zero points
    assert weight_bytes(recipe, linear) == expanded
    assert weight_bytes(replace(recipe, lora_rank=16), linear) == expanded + 2 * 16 * 256
    assert weight_bytes(replace(recipe, method="sqt", w4="memory"), linear) == 128 * 64 + 4 * 128 * 4
    assert weight_bytes(Recipe("none"), linear) == 4 * 128 * 128


def test_a_plot_bears_errors_that_are_no_numbers(tmp_path: Path) -> None:
    errors = {"w4a8": [float("inf"), 0.25, 0.0], "w8a8": [0.5, 0.125, 0.0]}
    for name in ("a.png", "a.svg"):
        plot_errors(tmp_path / name, ["a", "b", "c"], errors, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "a.svg").read_text()
