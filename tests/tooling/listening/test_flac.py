"""FLAC files of one size: what is heard is the sound itself, what is seen is the same for all."""

import io

import numpy as np
import soundfile

from dit_trt.tooling.listening.flac import flac_files


def test_files_of_one_size_hold_their_sounds():
    rng = np.random.default_rng(0)
    time = np.arange(30000) / 44100
    sounds = [
        rng.uniform(-0.9, 0.9, (2, 30000)),
        0.5 * np.stack([np.sin(2 * np.pi * 440 * time)] * 2),
        np.zeros((2, 30000)),
    ]
    files = flac_files(sounds, 44100)
    assert len({len(file) for file in files}) == 1
    assert len({file[:8] for file in files}) == 1
    for file, sound in zip(files, sounds):
        assert b"libFLAC" not in file
        audio, rate = soundfile.read(io.BytesIO(file), dtype="int16")
        assert rate == 44100
        np.testing.assert_array_equal(audio.T, np.rint(sound * 32767))
