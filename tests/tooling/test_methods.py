"""Every combination of method, bits, rank and pair on every backend: all in int8, and as the simulation says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hardware import dynamic_int4, simulated_linear
from numpy.typing import NDArray

from dit_trt.engines.base import BACKENDS
from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.build import build_bundle
from dit_trt.tooling.quantize import QuantizedRange, quantize_model
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.scale_tables import fit_knots
from dit_trt.tooling.simulate import SimulatedLinear, SimulatedModel, SimulatedPipeline
from dit_trt.tooling.smoothing import Smoothing
from dit_trt.tooling.tables import load_calibration

Velocities = list[NDArray[np.float32]]
SETTINGS = Settings(steps=6, cfg_scale=3.0)  # between the calibrated 8 steps
METHODS = {
    "sqs": {"method": "sqs"},
    "plain": {"method": "sqs", "smooth": False},
    "sqd": {"method": "sqd"},
    "grouped": {"method": "sqd", "sqd_weights": "grouped:2"},
    "requantize": {"method": "sqd", "sqd_weights": "requantize"},
    "sqt": {"method": "sqt"},
}
BITS = {"w8a8": {}, "w4a8": {"bits": "w4a8", "group_size": 0}, "w4a8-g64": {"bits": "w4a8", "group_size": 64}}
RANKS = {"": {}, "-svdquant": {"lora_rank": 8}, "-residual": {"lora_rank": 8, "lora_form": "residual"}}
PAIRS = {"": {}, "-pair": {"cfg_pair": "difference"}}


def combinations() -> dict[str, Recipe]:
    found = {}
    for method, m in METHODS.items():
        for bits, b in BITS.items():
            for rank, r in RANKS.items():
                for pair, p in PAIRS.items():
                    # Every method x bits x rank; the pair's difference with every method and bits, and both ranks.
                    if (method == "requantize" and bits != "w8a8") or (method == "plain" and (rank or pair)):
                        continue
                    if pair and (rank == "-residual" or bits == "w4a8-g64"):
                        continue
                    found[f"{method}-{bits}{rank}{pair}"] = Recipe(**{**m, **b, **r, **p})  # type: ignore[arg-type]
    searched = {"alpha": "auto", "clip": True}
    return {
        **found,
        "sqs-searched": Recipe("sqs", **searched),  # type: ignore[arg-type]
        "sqd-searched-pair": Recipe("sqd", cfg_pair="difference", **searched),  # type: ignore[arg-type]
        "sqt-best": Recipe("sqt", "w4a8", rounding="gptq", lora_rank=8, cfg_pair="difference", **searched),  # type: ignore[arg-type]
        "memory": Recipe("sqt", "w4a8", w4="memory", group_size=64),
        "memory-channel": Recipe("sqt", "w4a8", w4="memory", group_size=0),
        "memory-svdquant-pair": Recipe("sqt", "w4a8", w4="memory", lora_rank=8, cfg_pair="difference"),
        "sqs-w7a8": Recipe("sqs", "w7a8"),
        "sqd-w7a8-svdquant": Recipe("sqd", "w7a8", lora_rank=8),
        "sqt-w7a8-pair": Recipe("sqt", "w7a8", cfg_pair="difference"),
        "mixed-w7a8": Recipe("sqs", bits_for=(("ff.*", "w7a8"),)),
        "mixed": Recipe("sqd", bits_for=(("ff.*", "w4a8"), ("*to_q", "float")), cfg_pair="difference"),
    }


# What the simulation takes of the checkpoint in FP32 the bundle has in FP32: context on a rounding edge decides a lot.
RECIPES = {name: replace(recipe, decoder_bits=32) for name, recipe in combinations().items()}


@pytest.fixture(scope="module")
def trajectory(tiny_float: Bundle) -> tuple[Velocities, Velocities]:
    """x and velocity [2, channels, latents] of every step of an FP32 run."""
    pipeline, xs, velocities = Pipeline(tiny_float), [], []
    conditioning = pipeline.condition("dog barking", SETTINGS, 0.7)

    def observe(step: int, inputs: dict, outputs: dict) -> None:
        xs.append(inputs["x"].copy())
        velocities.append(outputs["velocity"].copy())

    pipeline.sample(conditioning, SETTINGS, observe=observe)
    return xs, velocities


def forced(pipeline: Pipeline, xs: Velocities) -> Velocities:
    conditioning = pipeline.condition("dog barking", SETTINGS, 0.7)
    engine = pipeline.step_engine_for(conditioning)
    return [engine.run(conditioning, step, x)["velocity"] for step, x in enumerate(xs)]


def distance(found: Velocities, expected: Velocities) -> float:
    """Mean over steps of the relative error of the velocity of both halves."""
    return float(np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]))


def as_the_engine_has_them(one: QuantizedRange) -> QuantizedRange:
    """The range with its tables at their knots, as they are stored."""
    if not one.tables:
        return one
    knots, logs = fit_knots(one.sigmas, one.tables)
    tables = {name: np.exp(log[::-1].astype(np.float64)).astype(np.float32) for name, log in logs.items()}
    return replace(one, sigmas=np.exp(knots[::-1].astype(np.float64)), tables=tables)


@cache
def quantized(tiny: Path, table: Path, name: str) -> list[QuantizedRange]:
    checkpoint, recipe = Checkpoint.open(str(tiny)), RECIPES[name]
    return quantize_model(checkpoint, recipe, load_calibration(table, checkpoint, recipe.needs_rows))


@cache
def simulated(tiny: Path, table: Path, reference: Path, name: str, linear: type[SimulatedLinear]) -> SimulatedPipeline:
    ranges = [as_the_engine_has_them(one) for one in quantized(tiny, table, name)]
    return SimulatedPipeline(Bundle(reference), SimulatedModel(Checkpoint.open(str(tiny)), ranges, linear))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("name", RECIPES)
def test_engine_and_simulation(
    tiny: Path,
    tiny_float: Bundle,
    tiny_table_file: Path,
    trajectory: tuple[Velocities, Velocities],
    name: str,
    backend: str,
    tmp_path: Path,
) -> None:
    recipe, (xs, exact) = RECIPES[name], trajectory
    if recipe.w4 == "memory":
        dynamic_int4(backend)
    built = build_bundle(Checkpoint.open(str(tiny)), recipe, backend, tmp_path / "bundle", tiny_table_file)
    assert built.linears == built.int8_linears == (12 if name == "mixed" else 14)
    expected = forced(simulated(tiny, tiny_table_file, tiny_float.folder, name, simulated_linear(backend)), xs)
    found = forced(Pipeline(built.bundle.verify()), xs)
    of_method, of_engine = distance(expected, exact), distance(found, expected)
    assert 0 < of_method < 0.7
    # Integers on a rounding edge may fall either way. OpenVINO's branch is in bf16 and has this model's outliers.
    in_bf16 = recipe.lora_rank > 0 and BACKENDS[backend].dialect.branch == "bfloat16"
    assert of_engine < 0.2 * of_method + (0.025 if in_bf16 else 0.006), f"{of_engine:.4f}, the method {of_method:.4f}"


def test_nothing_quantized_is_the_float_model(
    tiny: Path, tiny_float: Bundle, trajectory: tuple[Velocities, Velocities]
) -> None:
    xs, exact = trajectory
    nothing = QuantizedRange({}, Smoothing(), SETTINGS.sigmas[:-1])
    model = SimulatedModel(Checkpoint.open(str(tiny)), [nothing])
    assert distance(forced(SimulatedPipeline(tiny_float, model), xs), exact) < 1e-5
