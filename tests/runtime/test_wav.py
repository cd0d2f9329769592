"""Finishing and writing sound: levels, lengths, atomic files, and refusals."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dit_trt.engines.errors import UserError
from dit_trt.runtime.wav import finish, write_wav

RATE = 44100
HUGE = float(np.float32(1e30))


def noise(channels=2, n=1000, gain=0.1):
    return (np.random.default_rng(0).standard_normal((channels, n)) * gain).astype(np.float32)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(0, 50)),
        elements=st.floats(-HUGE, HUGE, width=32),
    ),
    st.integers(1, 60),
)
def test_finish_is_stereo_trimmed_and_in_range(audio, samples):
    result = finish(audio, samples)
    kept = audio[:, :samples]
    assert result.dtype == np.float32
    assert result.shape == (2, kept.shape[1])
    peak = float(np.abs(kept).max(initial=0))
    factor = 1 / peak if peak >= 0.5 / 32767 else 1
    assert np.abs(result).max(initial=0) <= 1
    expected = np.broadcast_to(kept.astype(np.float64) * factor, result.shape)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-40)


def test_the_peak_is_of_the_kept_part():
    audio = noise()
    audio[0, 900] = 50.0
    assert np.abs(finish(audio, 800)).max() == 1


@pytest.mark.parametrize("level", [0.0, 1e-40, 1e-6])
def test_silence_stays_silent(level, tmp_path):
    result = finish(np.full((2, 100), level, dtype=np.float32), 100)
    assert (result == np.float32(level)).all()
    write_wav(tmp_path / "a.wav", result, RATE)
    assert (soundfile.read(tmp_path / "a.wav")[0] == 0).all()


def test_finish_leaves_its_input_alone():
    audio, silent = noise(), np.zeros((2, 10), np.float32)
    before = audio.copy()
    finish(audio, 500)
    finish(silent, 10)[:] = 1
    np.testing.assert_array_equal(audio, before)
    assert (silent == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_audio_is_refused_and_nothing_written(bad, tmp_path):
    audio = noise()
    audio[1, 7] = bad
    with pytest.raises(UserError, match="1 of 2000") as error:
        write_wav(tmp_path / "new" / "a.wav", audio, RATE)
    one_line(error)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="NaN or infinite"):
        finish(audio, 1000)
    assert np.isfinite(finish(audio, 7)).all()  # what is trimmed away does no harm


def test_the_file_holds_16_bit_pcm_of_the_samples(tmp_path):
    audio = np.array([[1.0, -1.0, 0.5, 0.0, 1e-5, 2.0], [0.25, -0.25, 0, 0, 0, -2.0]], dtype=np.float32)
    write_wav(tmp_path / "a.wav", audio, RATE)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.format, info.subtype, info.samplerate, info.channels, info.frames) == (
        "WAV",
        "PCM_16",
        RATE,
        2,
        6,
    )
    pcm, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    np.testing.assert_array_equal(pcm.T, [[32767, -32767, 16384, 0, 0, 32767], [8192, -8192, 0, 0, 0, -32767]])


@given(hnp.arrays(np.float32, (2, 20), elements=st.floats(-1, 1, width=32)))
def test_round_trip_is_within_half_a_step(tmp_path_factory, audio):
    path = tmp_path_factory.getbasetemp() / "trip.wav"
    write_wav(path, audio, RATE)
    pcm, _ = soundfile.read(path, dtype="int16", always_2d=True)
    assert np.abs(pcm.T / 32767 - audio).max() <= 0.5001 / 32767


def test_mono_is_written_as_stereo(tmp_path):
    write_wav(tmp_path / "a.wav", noise(channels=1), RATE)
    samples, _ = soundfile.read(tmp_path / "a.wav")
    assert samples.shape == (1000, 2)
    np.testing.assert_array_equal(samples[:, 0], samples[:, 1])


def test_parents_are_created_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep" / "er" / "a.wav"
    write_wav(str(path), noise(), RATE)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_full_disk_keeps_the_old_file(failing, tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def full(temporary, _):
        temporary.touch()  # a first part was written
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, failing, full)
    with pytest.raises(UserError, match="No space left on device") as error:
        write_wav(path, noise(), RATE)
    assert str(path) in one_line(error)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_wav(tmp_path / "a.wav", noise(), RATE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/a.wav", "folder", "."])
def test_an_impossible_place_is_named(place, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write") as error:
        write_wav(tmp_path / place, noise(), RATE)
    assert "--output" in one_line(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
