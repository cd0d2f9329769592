"""aiSFX: its front end against Essentia's numbers, its network against the package's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hearing import RATE, installed, noise

from dit_trt.engines.errors import UserError
from dit_trt.tooling.evaluation import aisfx
from dit_trt.tooling.evaluation.embedders import open_embedder
from dit_trt.tooling.evaluation.frechet import Gaussian, frechet_distance


def test_the_spectrogram_is_essentias() -> None:
    """Values by essentia 2.1-beta6 and aisfx 0.1.2's own chain, of this sound."""
    t = np.arange(3 * RATE) / RATE
    rng = np.random.default_rng(0)
    sound = (0.3 * np.sin(2 * np.pi * 440 * t * (1 + 0.2 * t)) + 0.05 * rng.standard_normal(3 * RATE)).astype(
        np.float32
    )
    found = aisfx.mel_spectrogram(sound)
    assert found.shape == (131, 96) and found.mean() == pytest.approx(4.3145099, abs=1e-5)
    expected = [
        [5.364808, 5.460032, 5.648251, 4.142520, 4.117449],
        [4.485093, 4.655002, 3.922285, 4.592296, 4.191811],
        [4.693966, 4.799957, 4.286660, 4.011876, 4.376627],
        [2.546280, 2.570337, 2.767455, 1.202596, 0.702348],
    ]
    np.testing.assert_allclose(found[[0, 1, 64, 130]][:, [0, 1, 7, 40, 95]], expected, atol=2e-5)


@pytest.fixture(scope="module")
def effects(home: Path) -> aisfx.AiSFX:
    installed("aisfx", aisfx.INSTALL)
    return open_embedder("aisfx")  # type: ignore[return-value]


def originals(file: str) -> ModuleType:
    """A module of aisfx by its file: the package's own __init__ would want essentia and librosa."""
    spec = importlib.util.find_spec("aisfx")
    assert spec is not None and spec.origin is not None
    found = importlib.util.spec_from_file_location(Path(file).stem, Path(spec.origin).parent / file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seconds", [1.0, 2.4, 4.0, 7.0])
def test_aisfx_is_its_own_network_on_its_own_blocks(effects: aisfx.AiSFX, seconds: float) -> None:
    import torch

    network, blocks = originals("models/cnn2d.py").EmbeddingNet("max", 3, 1, 64), originals("preprocessing.py")
    network.load_state_dict({name.removeprefix("embedding_net."): value for name, value in effects._state.items()})
    network.eval()
    audio = noise(2, seconds)
    spectrogram = blocks.spectrogram_normalize(aisfx.mel_spectrogram(audio.mean(axis=0)))
    if len(spectrogram) > 50:  # aisfx refuses anything shorter
        hop = blocks.compute_hopSize(100, 0.5, spectrogram)
        given = blocks.blocking(spectrogram, block_size=100, hop_size=hop, drop_partial_block=True)
    else:
        given = np.pad(spectrogram, ((0, 100 - len(spectrogram)), (0, 0)))[None]
    with torch.inference_mode():
        expected = network(torch.Tensor(given)).numpy()
    np.testing.assert_allclose(effects.embed(audio, RATE), expected, rtol=1e-4, atol=1e-5)


def test_aisfx_sees_noise(effects: aisfx.AiSFX) -> None:
    """The distance to clean sounds grows with what is added to them."""
    rng = np.random.default_rng(1)
    t = np.arange(3 * RATE) / RATE
    tones = [np.sin(2 * np.pi * rng.uniform(100, 3000) * t)[None].astype(np.float32) for _ in range(12)]
    clean = Gaussian.of(np.concatenate([effects.embed(tone, RATE) for tone in tones]))
    found = []
    for level in (0.0, 0.01, 0.1, 1.0):
        worse = [effects.embed(tone + level * noise(i)[:1], RATE) for i, tone in enumerate(tones)]
        found.append(frechet_distance(clean, Gaussian.of(np.concatenate(worse))))
    assert found[0] == pytest.approx(0, abs=1e-6) and found == sorted(found)


def test_aisfx_is_deterministic_and_as_long_as_the_sound(effects: aisfx.AiSFX) -> None:
    long, short = effects.embed(noise(0, 10.0), RATE), effects.embed(noise(0, 1.0), RATE)
    assert long.shape == (7, 512) and short.shape == (1, 512) and np.isfinite(long).all()
    np.testing.assert_array_equal(long, effects.embed(noise(0, 10.0), RATE))


def test_another_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path))
    (tmp_path / "checkpoint.pth").write_bytes(b"code")
    with pytest.raises(
        UserError, match=r"is not the checkpoint of aisfx 0\.1\.2: pip install --no-deps aisfx==0\.1\.2"
    ):
        open_embedder("aisfx", tmp_path / "checkpoint.pth")
