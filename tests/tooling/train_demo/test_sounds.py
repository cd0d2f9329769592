"""How the demo's training clips are made: recordings of any kind in, labelled clips out, the same for the same seed."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from dit_trt.tooling.train_demo import captions, containers, corpus
from dit_trt.tooling.train_demo.corpus import CLASSES, Recording
from dit_trt.tooling.train_demo.features import CLIP, FRAMES_PER_LATENT, HOP, SAMPLE_RATE
from dit_trt.tooling.train_demo.pool import INSTRUMENTS, Clips, augment, augment_pair, build_latents


def recordings(seconds: float = 0.4) -> list[Recording]:
    """Two of every class: decaying noise."""
    rng = np.random.default_rng(0)
    decay = np.exp(-np.linspace(0, 6, int(seconds * SAMPLE_RATE))).astype(np.float32)
    return [
        Recording(
            label, f"all.sf2: {label} {i}", "a package", decay * rng.uniform(-1, 1, len(decay)).astype(np.float32)
        )
        for label in CLASSES
        for i in range(2)
    ]


def test_every_class_has_recordings_words_and_a_prompt():
    tables = (
        *(corpus.FLUID_GS_SAMPLES, corpus.FLUID_GM_SAMPLES, corpus.SONIC_PI_FILES, corpus.CLONK_FILES),
        *(corpus.GCOMPRIS_FILES, corpus.DOOM_LUMPS, corpus.PONY_FILES),
    )
    assert {*corpus.ANIMALS, *(label for table in tables for label in table)} == set(CLASSES)
    assert captions.WORDINGS.keys() == set(CLASSES) and len(CLASSES) == len(set(CLASSES)) >= 24
    assert all(len(set(wordings)) == len(wordings) >= 8 for wordings in captions.WORDINGS.values())
    assert captions.PROMPTS["dog"] == "dog barking"


def test_no_recording_is_both_trained_on_and_held_out():
    trained = {name for names in corpus.GCOMPRIS_FILES.values() for name in names}
    held_out = {name for names in corpus.HELD_OUT_GCOMPRIS.values() for name in names}
    assert not trained & held_out
    assert not set(corpus.DEBS) & set(corpus.HELD_OUT_DEBS)
    tables = (corpus.HELD_OUT_GCOMPRIS, corpus.HELD_OUT_TUXPAINT, corpus.HELD_OUT_DESKTOP, corpus.HELD_OUT_MATE)
    labels = {label for table in tables for label in table}
    assert "dog" in labels and len(labels) >= 6 and labels <= set(CLASSES)


def test_a_pair_s_caption_names_both():
    words = random.Random(0)
    for _ in range(50):
        text = captions.pair_caption("dog", "rain", words)
        assert any(wording in text for wording in captions.WORDINGS["dog"])
        assert any(wording in text for wording in captions.WORDINGS["rain"])
    assert len({captions.caption("dog", words) for _ in range(200)}) > 50


@pytest.mark.parametrize("label", CLASSES)
def test_a_clip_of_every_class(label):
    own = [each for each in recordings() if each.label == label]
    clip, seconds = augment(label, own, np.random.default_rng(1))
    assert clip.shape == (CLIP,) and clip.dtype == np.float32 and 0.59 < np.abs(clip).max() <= 1
    assert 1 <= seconds <= CLIP / SAMPLE_RATE
    assert not clip[min(CLIP, int(seconds * SAMPLE_RATE)) :].any()
    again, _ = augment(label, own, np.random.default_rng(1))
    np.testing.assert_array_equal(clip, again)
    assert not np.array_equal(clip, augment(label, own, np.random.default_rng(2))[0])


@pytest.mark.parametrize("label", INSTRUMENTS)
def test_a_recorded_instrument_is_played_as_it_is(label):
    audio = np.random.default_rng(0).uniform(-1, 1, SAMPLE_RATE).astype(np.float32)
    clip, _ = augment(label, [Recording(label, "instruments/it.ogg", "a package", audio)], np.random.default_rng(1))
    assert 0.59 < np.abs(clip).max() <= 1


def test_two_sounds_at_once_are_both_heard():
    def tone(label: str, hertz: float) -> list[Recording]:
        audio = np.sin(2 * np.pi * hertz * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
        return [Recording(label, "a tone", "a package", audio)]

    clip, _ = augment_pair(("dog", "rain"), (tone("dog", 400), tone("rain", 6000)), np.random.default_rng(0))
    power = np.abs(np.fft.rfft(clip)) ** 2
    hertz = np.fft.rfftfreq(CLIP, 1 / SAMPLE_RATE)
    low, high = power[(hertz > 300) & (hertz < 550)].sum(), power[(hertz > 4500) & (hertz < 8000)].sum()
    assert low > 0.02 * power.sum() and high > 0.02 * power.sum()


def test_a_clip_depends_on_its_index_and_the_seed_alone():
    one, other = Clips(recordings(), seed=3), Clips(recordings(), seed=3)
    backwards = {index: other.draw(index) for index in reversed(range(12))}
    for index in range(12):
        clip, first, second, seconds = one.draw(index)
        np.testing.assert_array_equal(clip, backwards[index][0])
        assert (first, second, seconds) == backwards[index][1:] and first != second
    assert not np.array_equal(one.draw(0)[0], Clips(recordings(), seed=4).draw(0)[0])


def test_the_pool_is_the_same_for_any_number_of_processes():
    single, double = (build_latents(recordings(), 6, audio=2, processes=n) for n in (1, 2))
    assert single["latents"].shape == (6, 128, CLIP // (HOP * FRAMES_PER_LATENT)) and single["audio"].shape == (2, CLIP)
    for name in ("first", "second", "seconds"):
        np.testing.assert_array_equal(single[name], double[name])
    # Audio is rounded to 16 bits; resampling on another core may differ in its last bit.
    assert np.abs(single["audio"].astype(int) - double["audio"]).max() <= 1


def test_packed_recordings_come_back(tmp_path):
    corpus.pack(recordings(), tmp_path / "all.npz")
    back = corpus.unpack(tmp_path / "all.npz")
    for before, after in zip(recordings(), back, strict=True):
        assert (before.label, before.origin, before.source) == (after.label, after.origin, after.source)
        np.testing.assert_allclose(before.audio, after.audio, atol=1 / 32767)


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"has no freedoom_\*\.deb; run: python -m"):
        corpus.find(tmp_path, "freedoom_*.deb")


def test_sounds_of_a_wad():
    samples = bytes([128] * 16 + [0, 255, 128, 192] + [128] * 16)
    sound = struct.pack("<HHi", 3, 11025, len(samples)) + samples
    lumps = {b"DSBOOM": sound, b"MAP01": b"not a sound", b"DPBOOM": sound}
    directory, content = b"", b""
    for name, data in lumps.items():
        directory += struct.pack("<ii8s", 12 + len(content), len(data), name)
        content += data
    [(name, (audio, rate))] = containers.wad_sounds(
        b"IWAD" + struct.pack("<ii", len(lumps), 12 + len(content)) + content + directory
    ).items()
    assert (name, rate, audio.dtype) == ("DSBOOM", 11025, np.float32)
    np.testing.assert_allclose(audio, [-1, 127 / 128, 0, 0.5])


def test_samples_of_a_soundfont():
    pcm = np.arange(-4, 4, dtype="<i2") * 4096
    headers = [("Dog Bark", 2, 6, 22050), ("EOS", 0, 0, 0)]
    packed = b"".join(
        struct.pack("<20s5IBbHH", name.encode(), start, end, 0, 0, rate, 60, 0, 0, 1)
        for name, start, end, rate in headers
    )
    chunks = b"".join(
        tag + struct.pack("<I", len(data)) + data for tag, data in ((b"smpl", pcm.tobytes()), (b"shdr", packed))
    )
    [(name, (audio, rate))] = containers.soundfont_samples(chunks).items()
    assert (name, rate) == ("Dog Bark", 22050)
    np.testing.assert_allclose(audio, np.array([-2, -1, 0, 1]) / 8)


def test_a_recording_is_trimmed_resampled_and_of_peak_1():
    quiet = np.zeros(8000)
    tone = 0.1 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    audio = corpus.to_44100(np.concatenate((quiet, tone, quiet)), 16000)
    assert audio.dtype == np.float32 and np.abs(audio).max() == 1
    assert abs(len(audio) - SAMPLE_RATE) < 1000
    assert len(corpus.to_44100(np.tile(tone, 20), 16000, longest=3.0)) == 3 * SAMPLE_RATE
