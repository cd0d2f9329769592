"""The neural decoder's training: its features and inverse STFT are numpy's, its crops, a step, its files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit_trt.exporters.mel_vocoder import MelVocoder
from dit_trt.runtime.griffin_lim import istft, stft
from dit_trt.tooling.train_demo import features
from dit_trt.tooling.train_demo.adversary import Features, SpectralDistance, inverse_stft
from dit_trt.tooling.train_demo.train_decoder import Crops, decoder_config, make_decoder, train

CLIP = 8 * 2048


def sounds(count: int = 3) -> np.ndarray:
    """Tones, noise and silence, float32 [count, CLIP]."""
    rng = np.random.default_rng(0)
    t = np.arange(CLIP) / features.SAMPLE_RATE
    tones = np.sin(2 * np.pi * t * rng.uniform(200, 4000, (count, 1)))
    audio = 0.3 * tones + 0.1 * rng.standard_normal((count, CLIP))
    audio[:, CLIP // 2 :] *= rng.random((count, 1)) < 0.5
    return audio.astype(np.float32)


@pytest.fixture(scope="module")
def buffers() -> dict[str, np.ndarray]:
    filters = features.mel_filters()
    mels = np.stack([features.log_mel(clip, filters) for clip in sounds(8)])
    return features.fit_pca(mels, 0.98, (16,))[0]


def test_latents_are_those_of_features(buffers: dict[str, np.ndarray]) -> None:
    audio, module = sounds(), Features()
    expected = np.stack([features.log_mel(clip, features.mel_filters()) for clip in audio])
    found = module.log_mel(torch.from_numpy(audio))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    components, mean, scale = (torch.from_numpy(buffers[name]) for name in ("components", "mean", "scale"))
    latents = module.latents(torch.from_numpy(expected), components, mean, scale)
    np.testing.assert_allclose(latents.numpy(), features.encode(expected, buffers), atol=1e-4)


def test_the_inverse_stft_is_the_runtimes() -> None:
    rng = np.random.default_rng(0)
    shape = 2, 12, features.N_FFT // 2 + 1
    spectra = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    spectra[1] = stft(sounds(1)[0, : 12 * 512], features.N_FFT, features.HOP)
    parts = np.stack((spectra.real, spectra.imag), axis=1).swapaxes(2, 3)
    found = inverse_stft(torch.from_numpy(parts), torch.hann_window(features.N_FFT)).numpy()
    for audio, spectrum in zip(found, spectra):
        expected = istft(spectrum, features.N_FFT, features.HOP)
        np.testing.assert_allclose(audio, expected, atol=1e-5 * np.abs(expected).max())


def test_the_distance_is_zero_of_equals_and_finite_with_silence() -> None:
    audio = torch.from_numpy(sounds(1)).requires_grad_()
    distance = SpectralDistance()
    assert [value.item() for value in distance(audio, audio.detach())] == [pytest.approx(0, abs=1e-5)] * 2
    silence = torch.zeros(1, CLIP, requires_grad=True)
    sum(distance(silence, torch.zeros(1, CLIP))).backward()
    assert silence.grad is not None and torch.isfinite(silence.grad).all()
    assert sum(distance(silence, audio.detach())) > 0.5


def test_crops_are_pieces_of_the_clips_the_quietest_left_out() -> None:
    audio = np.zeros((4, 3 * CLIP), np.int16)
    audio[:, :] = np.arange(3 * CLIP) % 30000 * (np.arange(4) < 3)[:, None]
    crops = Crops(audio, CLIP, seed=0, device=torch.device("cpu")).draw(12).numpy()
    assert crops.shape == (12, CLIP) and crops.dtype == np.float32
    steps = np.diff(crops * 32767, axis=1)
    assert (np.abs(steps - 1) < 0.1).mean() > 0.7  # rising by one, silent, or where the ramp starts again
    with pytest.raises(SystemExit, match="float32"):
        Crops(audio.astype(np.float32), CLIP, seed=0, device=torch.device("cpu"))


@pytest.mark.slow
def test_a_run_writes_weights_and_goes_on(buffers: dict[str, np.ndarray], tmp_path: Path) -> None:
    pool, run = tmp_path / "pool.npz", tmp_path / "run"
    audio = np.round(sounds(4) * 20000).astype(np.int16)
    np.savez(pool, audio=audio, allow_pickle=False, **{f"pca.{name}": value for name, value in buffers.items()})
    options = {"pool": pool, "run": run, "batch": 2, "crop": 4, "seed": 0, "device": "cpu", "threads": 1}
    train(argparse.Namespace(**options, seconds=6, warmup=0.3, resume=False))
    first = load_file(run / "decoder.safetensors")
    train(argparse.Namespace(**options, seconds=12, warmup=0.3, resume=True))
    weights = load_file(run / "decoder.safetensors")
    assert any(not torch.equal(first[name], weights[name]) for name in first)
    config = json.loads((run / "decoder.json").read_text())
    assert config == decoder_config(buffers)
    decoder = MelVocoder.from_config(config)
    decoder.load_state_dict(weights)
    for name, value in make_decoder(buffers, config).named_buffers():
        assert torch.equal(decoder.get_buffer(name), value)
    assert not list(run.glob("*.tmp"))
