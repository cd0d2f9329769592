"""The decoders' comparison: zero of the same sound, and a table of every class and decoder."""

from __future__ import annotations

import numpy as np
import pytest

from dit_trt.tooling.train_demo import features
from dit_trt.tooling.train_demo.compare_decoders import compare, log_spectral_distance, markdown
from dit_trt.tooling.train_demo.corpus import CLASSES

CLIP = 8 * 2048


def test_log_spectral_distance() -> None:
    audio = np.random.default_rng(0).standard_normal(CLIP).astype(np.float32)
    assert log_spectral_distance(audio, audio) == 0
    assert log_spectral_distance(audio, audio / 2) == pytest.approx(20 * np.log10(2), rel=1e-3)


def test_a_table_of_classes_and_decoders() -> None:
    rng, filters = np.random.default_rng(0), features.mel_filters()
    audio = (8000 * rng.standard_normal((3, CLIP)).clip(-3, 3)).astype(np.int16)
    mels = np.stack([features.log_mel(clip / np.float32(32767), filters) for clip in audio])
    buffers, _ = features.fit_pca(mels, 1.0, (16,))
    seen = []

    def perfect(latents: np.ndarray) -> np.ndarray:
        seen.append(latents)
        return audio[len(seen) - 1] / np.float32(32767)

    def half(latents: np.ndarray) -> np.ndarray:
        return audio[len(seen) - 1] / np.float32(2 * 32767)

    labels = np.array([CLASSES.index(name) for name in ("dog", "cat", "dog")])
    table = compare(audio, labels, buffers, {"perfect": perfect, "half": half}, None)
    assert {label: len(row["perfect STFT"]) for label, row in table.items()} == {"dog": 2, "cat": 1}
    assert table["dog"]["perfect STFT"][0] == 0 and table["dog"]["half LSD, dB"][0] > 5
    np.testing.assert_allclose(seen[0], features.encode(mels[0], buffers), atol=1e-4)
    lines = markdown(table).splitlines()
    assert lines[0] == "| class | clips | perfect STFT | half STFT | perfect LSD, dB | half LSD, dB |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dog", "| cat", "| mean of classes"]
    assert len({line.count("|") for line in lines}) == 1
