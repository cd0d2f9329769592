"""The runtime loop against the torch model driven by k-diffusion, and what users rely on: seeds, batches, lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import MAX_LATENTS, random_model

import peers
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.runtime.denoiser import guide
from dit_trt.runtime.pipeline import Pipeline, Settings, batch_size
from dit_trt.runtime.wav import write_wav

SHORT = Settings(steps=6)


@pytest.fixture(scope="module")
def pipeline(tiny_float: Bundle) -> Pipeline:
    return Pipeline(tiny_float)


def drawn_noise(seed: int, count: int) -> list[NDArray[np.float32]]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.standard_normal((16, MAX_LATENTS), np.float32) for _ in range(count)]


@pytest.mark.parametrize("negative", [None, "siren"])
def test_latents_equal_torch_and_k_diffusion(pipeline: Pipeline, negative: str | None) -> None:
    """Tokens, conditioning, CFG, v-denoiser, schedule and sampler in one: an independent torch loop agrees."""
    sampling = peers.k_diffusion("sampling")
    model, settings = random_model(), Settings(steps=12, sampler="dpmpp-2m", seed=5, cfg_scale=3.0)
    rows = []
    for text in ("dog barking", negative or "dog barking"):
        ids, mask, _ = pipeline._tokenizer(text)
        rows.append(model.conditioner.text(torch.from_numpy(ids), torch.from_numpy(mask)))
    numbers = model.conditioner.numbers(torch.zeros(2), torch.full((2,), 0.6))
    context = torch.cat((torch.cat(rows), numbers), dim=1)
    if negative is None:
        context[1] = 0

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = float(sigma[0])
        t = torch.full((2,), float(np.arctan(s) * 2 / np.pi))
        scaled = (x / (s**2 + 1) ** 0.5).float().repeat(2, 1, 1)
        conditional, unconditional = model.dit(scaled, t, context, numbers.flatten(1))
        velocity = unconditional + (conditional - unconditional) * 3.0
        return x / (s**2 + 1) - velocity * s / (s**2 + 1) ** 0.5

    sigmas = sampling.get_sigmas_polyexponential(12, 0.3, 500.0)
    start = torch.from_numpy(drawn_noise(5, 1)[0])[None] * sigmas[0]
    expected = sampling.sample_dpmpp_2m(denoise, start, sigmas, disable=True)[0].numpy()
    found = pipeline.sample(pipeline.condition("dog barking", settings, 0.6, negative), settings)
    assert found.dtype == np.float32
    # A random model amplifies rounding over the steps; a wrong time, sign or scale is off by more than tenths.
    assert np.abs(found - expected).max() <= 1e-2 * np.abs(expected).max()


def test_guidance() -> None:
    halves = np.stack([np.full((1, 2), 3.0, np.float32), np.full((1, 2), 1.0, np.float32)])
    assert guide(halves, 7.0).tolist() == [[15.0, 15.0]]
    assert guide(halves, 1.0).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("sampler", ["dpmpp-3m-sde", "dpmpp-2m-sde", "dpmpp-2m"])
def test_same_seed_same_bytes(tiny_sqs: Bundle, sampler: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    files = []
    for name in ("a", "b"):
        clip = next(Pipeline(tiny_sqs).generate(["dog"], Settings(steps=5, sampler=sampler), 0.5))
        write_wav(tmp_path / f"{name}.wav", clip.audio, clip.sample_rate)
        files.append((tmp_path / f"{name}.wav").read_bytes())
    assert files[0] == files[1]
    other = next(Pipeline(tiny_sqs).generate(["dog"], Settings(steps=5, sampler=sampler, seed=1), 0.5))
    assert not np.array_equal(other.audio, clip.audio)


def test_clip_i_of_a_batch_equals_its_single_run(tiny_sqs: Bundle) -> None:
    pipeline = Pipeline(tiny_sqs)
    batch = list(pipeline.generate(["dog", "rain"], SHORT, num_variations=2))
    assert [clip.seed for clip in batch] == [1000, 1001, 1002, 1003]
    assert [clip.prompt for clip in batch] == ["dog", "dog", "rain", "rain"]
    for clip in batch:
        single = next(pipeline.generate([clip.prompt], Settings(steps=6, seed=clip.seed)))
        np.testing.assert_array_equal(single.audio, clip.audio)


@pytest.mark.parametrize("batch", [2, 3, 64])
@pytest.mark.parametrize("cfg", [7.0, 1.0])
def test_clips_computed_at_once_equal_their_single_runs(tiny_sqs: Bundle, batch: int, cfg: float) -> None:
    """Of different prompts, lengths of the last batch and both numbers of CFG halves: no bit differs."""
    pipeline, settings = Pipeline(tiny_sqs), Settings(steps=6, cfg_scale=cfg)
    steps: list[tuple[int, int]] = []
    found = list(
        pipeline.generate(
            ["dog", "rain", "cat"],
            settings,
            num_variations=2,
            negative_prompt="siren",
            batch=batch,
            on_step=lambda clip, step: steps.append((clip, step)),
        )
    )
    assert sorted(steps) == [(clip, step) for clip in range(6) for step in range(-1, 6)]
    alone = pipeline.generate(["dog", "rain", "cat"], settings, num_variations=2, negative_prompt="siren")
    for clip, single in zip(found, alone, strict=True):
        assert (clip.prompt, clip.seed) == (single.prompt, single.seed) and len(clip.step_seconds) == 6
        np.testing.assert_array_equal(clip.audio, single.audio)


def test_batches_are_of_one_size() -> None:
    assert [batch_size(*case) for case in ((9, 8), (5, 4), (8, 8), (3, 64), (1, 8), (0, 8))] == [5, 3, 8, 3, 1, 1]


def test_a_conditioning_of_other_clips_is_refused(pipeline: Pipeline) -> None:
    conditioning = pipeline.condition("dog", SHORT, 0.5)
    with pytest.raises(ValueError, match="the conditioning is of 1 clips, not 2"):
        pipeline.sample_batch(conditioning, SHORT, [1, 2])


def test_a_batch_with_seeds_of_its_own(tiny_sqs: Bundle) -> None:
    pipeline = Pipeline(tiny_sqs)
    found = list(pipeline.generate(["dog", "rain"], SHORT, 0.5, batch=2, seeds=[9, 4]))
    for clip, seed in zip(found, (9, 4), strict=True):
        assert clip.seed == seed
        np.testing.assert_array_equal(clip.audio, pipeline(clip.prompt, 0.5, steps=6, seed=seed)[0])
    with pytest.raises(UserError, match="1 seeds for 2 clips; give one for each"):
        next(pipeline.generate(["dog", "rain"], SHORT, seeds=[1]))
    with pytest.raises(UserError, match="seed -1"):
        next(pipeline.generate(["dog"], SHORT, seeds=[-1]))
    assert list(pipeline.generate([], SHORT)) == []
    with pytest.raises(UserError, match="batch 0 is less than 1"):
        next(pipeline.generate(["dog"], SHORT, batch=0))


def test_prompt_negative_prompt_and_seconds_matter(pipeline: Pipeline) -> None:
    base = next(pipeline.generate(["dog"], SHORT, 0.5)).audio
    for other in (
        next(pipeline.generate(["rain"], SHORT, 0.5)).audio,
        next(pipeline.generate(["dog"], SHORT, 0.5, negative_prompt="siren")).audio,
        next(pipeline.generate(["dog"], Settings(steps=6, cfg_scale=1), 0.5)).audio,
    ):
        assert np.abs(other - base).max() > 1e-2


def test_audio_is_stereo_normalised_and_trimmed(pipeline: Pipeline) -> None:
    audio, rate = pipeline("dog", seconds=0.5, steps=4)
    assert audio.shape == (2, 4000) and rate == 8000 and audio.dtype == np.float32
    assert np.abs(audio).max() == pytest.approx(1, abs=1e-6)
    assert pipeline("dog", steps=4)[0].shape == (2, MAX_LATENTS * 256)


def test_the_callback_sees_every_step_of_every_clip(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    clips = list(pipeline.generate(["dog", "rain"], SHORT, on_step=lambda clip, step: seen.append((clip, step))))
    assert seen == [(clip, step) for clip in (0, 1) for step in range(-1, 6)]
    assert all(len(clip.step_seconds) == 6 and min(clip.step_seconds) > 0 for clip in clips)


def test_time_embeddings_of_all_steps_are_distinct(pipeline: Pipeline) -> None:
    """In 16 bits only 64 of the 100 t values stay distinct; they are computed in fp32."""
    embeds = pipeline.condition("dog", Settings(), 0.5).steps["time_embed"]
    assert embeds.dtype == np.float32 and len(np.unique(embeds, axis=0)) == 100


def test_long_prompts_are_cut_and_counted(pipeline: Pipeline) -> None:
    assert pipeline.count_cut_tokens("dog " * 9) == 3
    cut = next(pipeline.generate(["dog " * 9], SHORT)).audio
    np.testing.assert_array_equal(cut, next(pipeline.generate(["dog " * 6], SHORT)).audio)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps 0 is outside 1..1000"),
        ({"steps": 1001}, "steps 1001"),
        ({"sampler": "heun"}, "unknown sampler 'heun'"),
        ({"cfg_scale": -1}, "cfg -1"),
        ({"cfg_scale": float("nan")}, "cfg nan"),
        ({"seed": -1}, "seed -1"),
        ({"sigma_min": 0}, "sigma_min"),
        ({"sigma_min": 9, "sigma_max": 3}, "sigma_max"),
        ({"sigma_max": float("inf")}, "sigma_max"),
    ],
)
def test_settings_out_of_range(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("..", r"\.\.")):
        Settings(**settings)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"steps.*sampler.*cfg.*seed"):
        Settings(steps=0, sampler="x", cfg_scale=-1, seed=-1)


@pytest.mark.parametrize("seconds", [0, -1, 0.05, 0.8, 47, float("nan")])
def test_seconds_out_of_range(pipeline: Pipeline, seconds: float) -> None:
    with pytest.raises(UserError, match=r"outside 0\.1\.\.0\.77"):
        pipeline.check_seconds(seconds)


def test_one_step_and_extreme_guidance_are_finite(pipeline: Pipeline) -> None:
    for settings in (Settings(steps=1), Settings(steps=2, cfg_scale=0), Settings(steps=3, cfg_scale=100)):
        assert np.isfinite(next(pipeline.generate(["dog"], settings)).audio).all()


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_empty_prompts_are_refused_before_any_work(pipeline: Pipeline, prompt: str) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        next(pipeline.generate(["dog", prompt], SHORT))


@pytest.mark.parametrize("prompt", ["zebra", "🐕", "dog\u0000", "犬が吠える", "x" * 5000])
def test_any_other_prompt_is_accepted(pipeline: Pipeline, prompt: str) -> None:
    assert np.isfinite(next(pipeline.generate([prompt], Settings(steps=2))).audio).all()


@pytest.mark.parametrize("error", [RuntimeError("cancelled"), ValueError("cancelled")])
def test_what_a_callback_raises_is_the_callers(tiny_float, error):
    def cancel(clip, step):
        if step == 1:
            raise error

    with pytest.raises(type(error), match=r"^cancelled$"):
        list(Pipeline(tiny_float).generate(["dog"], Settings(steps=3), 0.2, on_step=cancel))


def test_an_engine_that_stops_is_one_line(tiny_float, monkeypatch):
    pipeline = Pipeline(tiny_float)

    def stop(inputs):
        raise RuntimeError("Check 'x' failed at a.cpp\n  bad allocation\n")

    monkeypatch.setattr(pipeline.engine("step", context=1), "run", stop)
    with pytest.raises(UserError, match=r"^openvino stopped \(bad allocation\); free memory"):
        pipeline("dog", seconds=0.2, steps=3)
