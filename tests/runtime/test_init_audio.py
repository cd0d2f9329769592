"""Recordings to begin from, short windows and one CFG half: against plain formulas on the engines' own parts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import invoke, one_object
from tiny import OOBLECK, OOBLECK_LATENTS, write_oobleck_checkpoint

import peers
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.exporters import oobleck
from dit_trt.runtime.init_audio import InitAudio
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.runtime.settings import Settings
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.workflow import build

RATE = 8000
RATIO = 256


def built(home: Path, folder: Path, name: str, **diffusion: object) -> Pipeline:
    write_oobleck_checkpoint(folder, peers.oobleck(OOBLECK))
    config = json.loads((folder / "model_config.json").read_text())
    config["model"]["diffusion"] |= diffusion
    (folder / "model_config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oobleck, "TILE_SAMPLES", 40 * RATIO)
        return Pipeline(build(Recipe("none"), str(folder), "openvino", home / "fixtures" / name).bundle)


@pytest.fixture(scope="module")
def pipeline(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return built(home, tmp_path_factory.mktemp("models") / "v", "init-v")


@pytest.fixture(scope="module")
def flow(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("models") / "flow"
    return built(home, folder, "init-flow", diffusion_objective="rf_denoiser", distribution_shift_options={"a": 1})


def tone(seconds: float, rate: int = RATE, channels: int = 2) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([np.sin(2 * np.pi * 300 * (c + 1) * t) for c in range(channels)]).astype(np.float32)


def first_input(pipeline: Pipeline, settings: Settings, start: tuple | None, window: int | None = None) -> np.ndarray:
    """What the model sees first."""
    seen: list[np.ndarray] = []
    conditioning = pipeline.condition("dog", settings, 1.0)
    observe = lambda step, inputs, _: seen.append(copy.copy(inputs["x"]))  # noqa: E731
    pipeline.sample(conditioning, settings, observe=observe, window=window, start=start)
    return seen[0]


def drawn(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The noise of a seed, and that of its encoder."""
    own = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1])))
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)
    return noise, own.standard_normal(shape, np.float32)


def test_noise_is_added_to_the_recording(pipeline: Pipeline) -> None:
    """stable-audio-tools' sample_k: sigma_max becomes the noise level, x = latents + sigma_max * noise."""
    settings = InitAudio(tone(1), RATE, 2.0).settings(Settings(steps=3, seed=9))
    assert settings.sigmas[0] == pytest.approx(2) and settings.sigmas[-2] == pytest.approx(0.3)
    start = InitAudio(tone(1), RATE).encoded(pipeline, OOBLECK_LATENTS)
    mean, stdev = pipeline.encode(np.pad(tone(1), ((0, 0), (0, OOBLECK_LATENTS * RATIO - RATE))))
    for found, expected in zip(start, (mean, stdev)):
        np.testing.assert_array_equal(found, expected)
    noise, own = drawn(9, mean.shape)
    expected = (mean + stdev * own + 2 * noise) / np.sqrt(1 + 2**2)  # c_in of v prediction
    found = first_input(pipeline, settings, start)
    assert len(found) == 2
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
    plain = first_input(pipeline, settings, None)
    assert np.abs(plain[0] - found[0]).max() > 0.1


def test_a_flows_noise_takes_the_place_of_the_recording(flow: Pipeline) -> None:
    """sample_rf: x = latents * (1 - sigma_max) + noise * sigma_max; without guidance there is one CFG half."""
    settings = InitAudio(tone(1), RATE).settings(flow.settings(seed=4))
    assert settings.sigmas[0] == 0.5 and len(settings.sigmas) == 9
    mean, stdev = start = InitAudio(tone(1), RATE).encoded(flow, OOBLECK_LATENTS)
    noise, own = drawn(4, mean.shape)
    found = first_input(flow, settings, start)
    assert len(found) == 1
    np.testing.assert_allclose(found[0], 0.5 * (mean + stdev * own) + 0.5 * noise, rtol=1e-5, atol=1e-5)


def test_one_half_is_the_prompts_own_velocity(flow: Pipeline) -> None:
    """A guidance scale of 1 is the prompt's half; a hair more takes both, and is a hair away."""
    settings = flow.settings(steps=3, sampler="euler")
    audio = [flow("dog", seconds=1, steps=3, sampler="euler", cfg_scale=cfg)[0] for cfg in (1.0, 1.0 + 1e-6, 3.0)]
    assert np.abs(audio[0] - audio[1]).max() < 1e-3 < np.abs(audio[0] - audio[2]).max()
    guided = flow.settings(steps=3, sampler="euler", cfg_scale=2.0)
    assert [flow.condition("dog", chosen, 1.0).batch for chosen in (settings, guided)] == [1, 2]
    with pytest.raises(UserError, match="the sampler dpmpp-2m is not for this model"):
        flow.condition("dog", Settings(sampler="dpmpp-2m"), 1.0)


@pytest.mark.parametrize(
    ("audio", "rate", "expected"),
    [
        (tone(0.5, channels=1), RATE, np.repeat(tone(0.5, channels=1), 2, axis=0)),
        (tone(0.5, channels=3), RATE, tone(0.5, channels=3)[:2]),
        (tone(9), RATE, tone(9)[:, : OOBLECK_LATENTS * RATIO]),
    ],
    ids=["mono", "three channels", "too long"],
)
def test_other_recordings_are_brought_into_form(
    pipeline: Pipeline, audio: np.ndarray, rate: int, expected: np.ndarray
) -> None:
    found = InitAudio(audio, rate).encoded(pipeline, OOBLECK_LATENTS)[0]
    padded = np.pad(expected, ((0, 0), (0, OOBLECK_LATENTS * RATIO - expected.shape[1])))
    np.testing.assert_array_equal(found, pipeline.encode(padded)[0])


def test_another_sample_rate_is_the_same_sound(pipeline: Pipeline) -> None:
    ours, theirs = (InitAudio(tone(1, rate), rate).encoded(pipeline, OOBLECK_LATENTS)[0] for rate in (RATE, 44100))
    inner = slice(8, 20)  # away from the ends, where a resampler rings
    assert np.abs(ours[:, inner] - theirs[:, inner]).max() < 0.02 * np.abs(ours[:, inner]).max()


def test_levels_that_are_not_the_models(pipeline: Pipeline, flow: Pipeline) -> None:
    with pytest.raises(UserError, match=r"init_noise_level 0\.3 is outside 0\.3\.\.500"):
        InitAudio(tone(1), RATE, 0.3).settings(pipeline.settings())
    with pytest.raises(UserError, match=r"init_noise_level 2 is outside 0\.12\.\.1"):
        InitAudio(tone(1), RATE, 2).settings(flow.settings())
    with pytest.raises(UserError, match=r"init_noise_level 0\.1 is outside 0\.12\.\.1"):
        InitAudio(tone(1), RATE, 0.1).settings(flow.settings())


def test_a_short_window_computes_no_more_than_it_needs(pipeline: Pipeline) -> None:
    settings = Settings(steps=3)
    window = pipeline.window(1.0)
    assert window == -(-RATE // RATIO) < pipeline.sizes["tile_latents"] < OOBLECK_LATENTS
    assert first_input(pipeline, settings, None, window).shape == (2, 16, window)
    clip = next(pipeline.generate(["dog"], settings, 1.0, short_window=True))
    assert clip.audio.shape == (2, RATE)
    conditioning = pipeline.condition("dog", settings, 1.0)
    latents = pipeline.sample(conditioning, settings, window=window)
    whole = np.pad(latents, ((0, 0), (0, OOBLECK_LATENTS - window)))
    inner = (window - pipeline.sizes["tile_overlap"]) * RATIO
    np.testing.assert_allclose(pipeline.decode(latents)[:, :inner], pipeline.decode(whole)[:, :inner], atol=1e-5)
    faithful = next(pipeline.generate(["dog"], settings, 1.0))
    assert np.abs(faithful.audio - clip.audio).max() > 0.01, "another window is another sound"


def test_run_takes_them_all(pipeline: Pipeline, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.flac", tone(1, 16000).T, 16000)
    run = ("run", "dog", "--bundle", pipeline.bundle.folder, "--steps", 2, "--seconds", 1, "--seed", 3, "--json")
    given = (*run, "--init-audio", tmp_path / "in.flac", "--init-noise-level", 2, "--short-window")
    result = invoke(*given, "--output", tmp_path / "a.wav")
    assert "was trained on windows of 2.3 s" in result.stderr
    [file] = one_object(result.stdout)["files"]
    audio, _ = soundfile.read(file, dtype="float32")
    start = InitAudio.read(tmp_path / "in.flac", 2)
    clip = next(pipeline.generate(["dog"], Settings(steps=2, seed=3), 1, short_window=True, init_audio=start))
    np.testing.assert_allclose(audio.T, clip.audio, atol=1e-4)


def test_stop_after_times_steps_and_writes_no_sound(pipeline: Pipeline, tmp_path: Path) -> None:
    given = ("run", "dog", "rain", "--bundle", pipeline.bundle.folder, "--steps", 3, "--output", tmp_path / "out")
    for stop_after, steps in ((2, 2), (5, 5), (50, 6)):
        result = one_object(invoke(*given, "--stop-after", stop_after, "--json").stdout)
        assert result["files"] == [] and result["step_ms"] > 0
        assert f"stopped after {steps} steps" in invoke(*given, "--stop-after", stop_after).stdout
    assert not (tmp_path / "out").exists()


def test_a_heavy_graph_does_not_stay_open(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def open_after_a_clip() -> set[str]:
        one = Pipeline(Bundle(pipeline.bundle.folder))
        next(one.generate(["dog"], Settings(steps=1), 1, init_audio=InitAudio(tone(1), RATE)))
        return {graph for graph, *_ in one._engines}

    assert open_after_a_clip() == {"text", "conditioning", "step", "decoder", "encoder"}
    monkeypatch.setattr("dit_trt.runtime.open_bundle.HEAVY", 10_000)
    assert open_after_a_clip() == {"text", "step"}, "the tiny text table is not heavy"
