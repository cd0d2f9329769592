"""Networks that hear, what all share: windows, rates, and who may bring another."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hearing import RATE, noise

from dit_trt.engines.errors import UserError
from dit_trt.tooling.evaluation import embedders
from dit_trt.tooling.evaluation.embedders import mono, open_embedder, windows


def test_windows() -> None:
    audio = np.arange(10, dtype=np.float32)
    assert windows(audio, 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(audio[:9], 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert windows(audio[:9], 4, 3, rest=True).tolist()[2:] == [[6, 7, 8, 0]]
    assert windows(audio[:2], 4, 3).tolist() == [[0, 1, 0, 0]]
    assert windows(audio, 4, 4, centred=True).tolist() == [[0, 0, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_rates() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    found = mono(np.stack([tone, tone]), RATE, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found.shape == (16000,) and np.abs(found - expected)[200:-200].max() < 1e-3


def test_a_third_partys_is_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("ears", "builtins:str", embedders.GROUP)
    monkeypatch.setattr(embedders, "entry_points", lambda group: [point] if group == embedders.GROUP else [])
    assert open_embedder("ears", Path("w")) == "w"  # type: ignore[comparison-overlap]
    with pytest.raises(
        UserError,
        match="no embedder 'eyes'; there are: birdnet, birdnet-embedding, aisfx, clap, openl3, passt, ears, onnx:FILE",
    ):
        open_embedder("eyes")


def test_soundfile_is_what_clips_are_read_with(tmp_path: Path) -> None:
    from dit_trt.tooling.evaluation.scores import sounds_in

    soundfile.write(tmp_path / "b.flac", noise().T, RATE)
    soundfile.write(tmp_path / "a.wav", noise(1).T, RATE)
    assert [sound.id for sound in sounds_in(tmp_path)] == ["a", "b"]
    assert sounds_in(tmp_path)[0].read()[0].shape == (2, 3 * RATE)
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"c\.wav cannot be read as sound"):
        sounds_in(tmp_path)[2].read()
