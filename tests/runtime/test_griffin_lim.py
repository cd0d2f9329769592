import numpy as np
import pytest

from dit_trt.runtime.griffin_lim import griffin_lim, istft, stft

N_FFT, HOP = 1024, 256


@pytest.fixture
def sines() -> np.ndarray:
    t = np.arange(64 * HOP) / 44100
    mix = sum(np.sin(2 * np.pi * f * t + f) for f in (220.0, 441.0, 3000.0))
    return (mix * np.hanning(len(t)) / 3).astype(np.float32)


def test_istft_inverts_stft(sines):
    noise = np.random.default_rng(0).standard_normal(len(sines)).astype(np.float32)
    for audio in (sines, noise):
        spectrum = stft(audio, N_FFT, HOP)
        assert spectrum.shape == (64, N_FFT // 2 + 1)
        assert spectrum.dtype == np.complex64
        rebuilt = istft(spectrum, N_FFT, HOP)
        assert rebuilt.dtype == np.float32
        np.testing.assert_allclose(rebuilt, audio, atol=1e-5)


def test_resynthesis_converges(sines):
    magnitude = np.abs(stft(sines, N_FFT, HOP)).T

    def error(iterations: int) -> float:
        audio = griffin_lim(magnitude, N_FFT, HOP, iterations)
        assert audio.shape == sines.shape
        rebuilt = np.abs(stft(audio, N_FFT, HOP)).T
        return float(np.linalg.norm(rebuilt - magnitude) / np.linalg.norm(magnitude))

    assert error(64) < 0.1
    assert error(64) < 0.5 * error(1)


def test_same_seed_same_bytes(sines):
    magnitude = np.abs(stft(sines, N_FFT, HOP)).T
    first = griffin_lim(magnitude, N_FFT, HOP, 4, seed=7)
    assert first.dtype == np.float32
    assert first.tobytes() == griffin_lim(magnitude, N_FFT, HOP, 4, seed=7).tobytes()
    assert first.tobytes() != griffin_lim(magnitude, N_FFT, HOP, 4, seed=8).tobytes()


def test_silence_stays_silent():
    audio = griffin_lim(np.zeros((N_FFT // 2 + 1, 8), np.float32), N_FFT, HOP, 4)
    assert audio.shape == (8 * HOP,)
    assert not audio.any()


def test_refuses_a_hop_that_does_not_divide():
    with pytest.raises(ValueError, match="multiple of hop_length"):
        griffin_lim(np.ones((513, 4), np.float32), 1024, 300, 1)
    with pytest.raises(ValueError, match="a spectrum of 100 bins is not one of n_fft 1024"):
        istft(np.ones((4, 100), np.complex64), 1024, 256)
