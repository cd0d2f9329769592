"""Steps that differ by more than their time: scales of every step, several step graphs, against engines fed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from manifests import stamped
from numpy.typing import NDArray
from step_bundles import FIRST, KNOTS, LAST, LOGS, edited, grouped_bundle, scaled_bundle, set_tensor, slots_of

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import MANIFEST
from dit_trt.engines.openvino import OpenVINOEngine
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.runtime.step_engine import Conditioning, StepEngine, graph_index

SCHEDULES = [
    Settings(steps=6),
    Settings(steps=9, sampler="dpmpp-2m", sigma_min=0.1, sigma_max=900),
    Settings(steps=1, sampler="dpmpp-2m-sde", sigma_max=20),
]


def scales_by_hand(bundle: Bundle, sigma: float, shift: float = 0.0) -> NDArray:
    """Both gains at a noise level, float64: those of the graph times r, and times wide^2 / r."""
    first, last = slots_of(bundle)
    at = np.log(sigma)
    r, *wide = (
        np.exp(np.interp(at, KNOTS.astype(np.float64), column + shift))
        for table in (LOGS["range/first"], LOGS["wide"])
        for column in table.T.astype(np.float64)
    )
    return np.concatenate([first.constant * r, last.constant * np.square(wide) / r])


def recorded(
    pipeline: Pipeline, settings: Settings, prompt: str = "dog barking"
) -> tuple[Conditioning, list[tuple[dict, NDArray]]]:
    """What the step engine was given and gave, step by step."""
    conditioning = pipeline.condition(prompt, settings, 0.7)
    calls: list[tuple[dict, NDArray]] = []
    pipeline.sample(
        conditioning,
        settings,
        observe=lambda step, inputs, outputs: calls.append((dict(inputs), outputs["velocity"])),
    )
    return conditioning, calls


def opened(bundle: Bundle, graph: str) -> OpenVINOEngine:
    manifest = bundle.manifest
    shapes = graph_shapes(manifest["sizes"], step_sigmas=manifest.get("step_sigmas", []))[graph]
    return OpenVINOEngine(bundle.path(f"{graph}.onnx"), shapes)


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: f"{s.steps} {s.sampler}")
def test_a_run_is_the_engine_fed_by_hand(tiny_float: Bundle, tiny_scaled: Bundle, settings: Settings) -> None:
    conditioning, calls = recorded(Pipeline(tiny_scaled), settings)
    engine = opened(tiny_scaled, "step")
    assert len(calls) == settings.steps
    for sigma, (inputs, velocity) in zip(settings.sigmas, calls):
        assert set(inputs) == {"x", "time_embed", "step_scales"}
        np.testing.assert_allclose(inputs["step_scales"], scales_by_hand(tiny_float, sigma), rtol=1e-4)
        np.testing.assert_array_equal(velocity, engine.run({**conditioning.constants, **inputs})["velocity"])


def test_the_pieces_stand_where_the_weights_stood(tiny_float: Bundle, tiny_scaled: Bundle, tmp_path: Path) -> None:
    """At every step the graph equals the one without scales whose gains are that step's."""
    conditioning, calls = recorded(Pipeline(tiny_scaled), Settings(steps=4))
    for step, (inputs, velocity) in enumerate(calls):
        gains = np.split(scales_by_hand(tiny_float, conditioning.sigmas[step]), 2)

        def set_gains(graph, gains=gains):  # type: ignore[no-untyped-def]
            for name, gain in zip((FIRST, LAST), gains):
                set_tensor(graph, name, lambda _, gain=gain: gain)

        shapes = graph_shapes(tiny_float.manifest["sizes"])["step"]
        for name in ("step.onnx", "step.onnx.data"):
            (tmp_path / name).write_bytes(tiny_float.path(name).read_bytes())
        edited(tmp_path, "fixed", set_gains)
        fed = {**conditioning.constants, "x": inputs["x"], "time_embed": inputs["time_embed"]}
        expected = OpenVINOEngine(tmp_path / "fixed.onnx", shapes).run(fed)["velocity"]
        assert np.abs(velocity - expected).max() < 1e-4 * np.abs(expected).max()
        plain = opened(tiny_float, "step").run(fed)["velocity"]
        assert np.abs(velocity - plain).max() > 1e-2 * np.abs(plain).max(), "the scales do something"


def test_the_noise_level_chooses_the_graph_exactly_at_the_bounds() -> None:
    bounds = [100.0, 7.5, 0.3]
    for index, bound in enumerate(bounds):
        assert graph_index(bound, bounds) == index
        assert graph_index(np.nextafter(bound, np.inf), bounds) == index
        assert graph_index(np.nextafter(bound, 0), bounds) == index + 1
    assert graph_index(1e6, bounds) == 0 and graph_index(1e-6, bounds) == 3
    assert graph_index(5.0, []) == 0


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: f"{s.steps} {s.sampler}")
def test_every_step_runs_in_its_own_graph_with_its_own_tables(
    tiny_float: Bundle, tiny_grouped: Bundle, settings: Settings
) -> None:
    conditioning, calls = recorded(Pipeline(tiny_grouped), settings)
    high, low = tiny_grouped.manifest["step_sigmas"]
    engines = [opened(tiny_grouped, graph) for graph in ("step", "step-1", "step-2")]
    used = []
    for sigma, (inputs, velocity) in zip(settings.sigmas, calls):
        index = 0 if sigma >= high else 1 if sigma >= low else 2
        scales = scales_by_hand(tiny_float, sigma, shift=0.1 * index)
        np.testing.assert_allclose(inputs["step_scales"], scales, rtol=2e-4)
        found = [engine.run({**conditioning.constants, **inputs})["velocity"] for engine in engines]
        np.testing.assert_array_equal(velocity, found[index])
        others = [np.abs(velocity - v).max() for i, v in enumerate(found) if i != index]
        assert min(others) > 1e-2 * np.abs(velocity).max()
        used.append(index)
    if settings.steps == 6:
        assert used == [0, 0, 1, 1, 2, 2]


def test_a_bound_just_above_a_step_moves_it_to_the_next_graph(tiny_float: Bundle, tmp_path: Path) -> None:
    settings = Settings(steps=3)
    sigma = float(settings.sigmas[1])
    at, above = (
        Pipeline(grouped_bundle(tiny_float, tmp_path / name, [bound]))
        for name, bound in (("at", sigma), ("above", float(np.nextafter(sigma, np.inf))))
    )
    conditioning = at.condition("dog", settings, 0.7)
    assert [at.step_engine_of().graph(conditioning, step) for step in range(3)] == ["step", "step", "step-1"]
    assert [above.step_engine_of().graph(conditioning, step) for step in range(3)] == ["step", "step-1", "step-1"]


def test_every_prompt_binds_its_own_conditioning_to_every_graph(tiny_grouped: Bundle) -> None:
    """Two prompts in a row, then the first again: each as if it were alone. And two at once, taking turns."""
    settings = Settings(steps=6)
    prompts = ["dog", "rain", "dog"]
    alone = {prompt: Pipeline(tiny_grouped)(prompt, steps=6)[0] for prompt in ("dog", "rain")}
    assert np.abs(alone["dog"] - alone["rain"]).max() > 1e-3
    one = Pipeline(tiny_grouped)
    for prompt in prompts:
        np.testing.assert_array_equal(one(prompt, steps=6)[0], alone[prompt])
    conditionings = [one.condition(prompt, settings, 0.7) for prompt in ("dog", "rain")]
    x = np.random.default_rng(0).standard_normal((2, *one.step_engine_of().latent_shape)).astype(np.float32)
    turns = [[one.step_engine_of().run(c, step, x)["velocity"] for c in conditionings] for step in range(6)]
    for index, conditioning in enumerate(conditionings):
        fresh = Pipeline(tiny_grouped).step_engine_of()
        for step in range(6):
            np.testing.assert_array_equal(turns[step][index], fresh.run(conditioning, step, x)["velocity"])


class Refusing:
    """An engine that refuses its second inputs, and keeps account of what it is given."""

    inputs: dict[str, tuple[int, ...]]

    def __init__(self) -> None:
        self.inputs, self.outputs, self.given = {"x": (2, 1, 1)}, ["velocity"], []  # type: ignore[var-annotated]

    def run(self, inputs: dict) -> dict:
        self.given.append(set(inputs))
        if len(self.given) == 2:
            raise ValueError("no")
        return {"velocity": inputs["x"]}

    def int8_matmuls(self) -> set[str]:
        return set()


def test_constants_are_handed_over_once_and_again_after_a_refusal() -> None:
    x = np.zeros((2, 1, 1), np.float32)
    one, other = (Conditioning({"global_embed": x}, {"t": np.zeros((2, 3))}, np.array([9.0, 1.0])) for _ in range(2))  # type: ignore[dict-item]
    engine = Refusing()
    step = StepEngine({"step": engine})
    step.run(one, 0, x)
    with pytest.raises(ValueError, match=r"^no$"):
        step.run(other, 0, x)
    for conditioning in (one, one, other, other, one):
        step.run(conditioning, 0, x)
    full, changing = {"x", "t", "global_embed"}, {"x", "t"}
    assert engine.given == [full, full, full, changing, full, changing, full]


def test_the_conditioning_of_another_schedule_is_refused(tiny_float: Bundle) -> None:
    pipeline = Pipeline(tiny_float)
    conditioning = pipeline.condition("dog", Settings(steps=4), 0.7)
    for other in (Settings(steps=5), Settings(steps=4, sigma_min=0.2)):
        with pytest.raises(ValueError, match="another schedule"):
            pipeline.sample(conditioning, other)


def test_shapes_of_every_graph(tiny_grouped: Bundle, tiny_float: Bundle) -> None:
    sizes = tiny_grouped.manifest["sizes"]
    shapes = graph_shapes(sizes, step_sigmas=[9.0, 1.0])
    assert shapes["step"]["step_scales"] == (sizes["step_scales"],) == (256,)
    assert shapes["step"] == shapes["step-1"] == shapes["step-2"] and "step-3" not in shapes
    assert {name for name in graph_shapes(sizes) if name.startswith("step")} == {"step"}
    assert "step_scales" not in graph_shapes(tiny_float.manifest["sizes"])["step"]


def test_scales_that_the_manifest_misstates_are_one_line(
    tiny_scaled: Bundle, tiny_float: Bundle, tmp_path: Path
) -> None:
    """Of another number; not of this graph; not mentioned."""
    cases = {
        "its pieces are 256 floats, the step graph takes 255": (tiny_scaled, 255),
        "openvino cannot compile step.onnx": (tiny_float, 256),
        "do not fit together": (tiny_scaled, None),
    }
    for index, (message, (source, n)) in enumerate(cases.items()):
        bundle = scaled_bundle(tiny_float, tmp_path / str(index))
        for name in ("step.onnx", "step.onnx.data"):
            bundle.path(name).write_bytes(source.path(name).read_bytes())
        manifest = {**bundle.manifest, "sizes": {**tiny_float.manifest["sizes"]}}
        if n is not None:
            manifest["sizes"]["step_scales"] = n
        for name in ("step.onnx", "step.onnx.data"):
            manifest["files"][name] = source.manifest["files"][name]
        (bundle.folder / MANIFEST).write_text(stamped(manifest))
        with pytest.raises(UserError, match=message):
            Pipeline.open(bundle.folder)("dog", steps=2)
