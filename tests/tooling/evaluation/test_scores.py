"""Scores of sets of sounds, by networks of our own with known answers; kept, and refused where they must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from dit_trt.engines.errors import UserError
from dit_trt.engines.home import sha256
from dit_trt.tooling.evaluation.divergence import clip_probabilities, kl_divergence
from dit_trt.tooling.evaluation.frechet import Gaussian, frechet_distance, kernel_distance
from dit_trt.tooling.evaluation.scores import Heard, Sound, flat, score

RATE = 16000


class Moments:
    """An embedder: mean of absolute values and of squares of each half of a clip, [2, 2]."""

    name, version, kind = "Moments", "1", "embedding"
    notice = None

    def __init__(self) -> None:
        self.calls = 0

    def embed(self, audio: NDArray, rate: int) -> NDArray[np.float32]:
        self.calls += 1
        halves = np.array_split(audio[0], 2)
        return np.array([[np.abs(half).mean(), (half**2).mean()] for half in halves], np.float32)


class Tagger(Moments):
    name, kind = "Tagger", "logits"


class Wide(Moments):
    """64 dimensions."""

    name = "Wide"

    def embed(self, audio: NDArray, rate: int) -> NDArray[np.float32]:
        return np.abs(np.fft.rfft(audio[0], 128))[None, :64].astype(np.float32)


class Captions(Moments):
    name, kind = "Captions", "text-audio"

    def embed_text(self, captions: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[1.0, 0.0] if caption == "loud" else [0.0, 1.0] for caption in captions], np.float32)


def sounds(folder: Path, count: int, level: float, seed: int, caption: str | None = "loud") -> list[Sound]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(count):
        rng = np.random.default_rng(seed + i)
        audio = level * rng.uniform(0.5, 1) * rng.standard_normal((RATE, 2)).clip(-3, 3) / 3
        path = folder / f"{i}.wav"
        soundfile.write(path, audio, RATE)
        found.append(Sound(str(i), str(i), caption, path, sha256(path)))
    return found


@pytest.fixture
def sets(tmp_path: Path) -> tuple[list[Sound], list[Sound]]:
    return sounds(tmp_path / "own", 12, 0.5, 0), sounds(tmp_path / "fp32", 12, 0.7, 100)


def embeddings(of: list[Sound]) -> NDArray[np.float32]:
    return np.concatenate([Moments().embed(*sound.read()) for sound in of])


def test_a_distance_with_rows_enough_is_frechets(sets: tuple, tmp_path: Path) -> None:
    own, fp32 = sets
    found = score(own, fp32[::-1], [Heard(Moments(), tmp_path / "kept")])
    expected = frechet_distance(*(Gaussian.of(embeddings(each)) for each in sets))
    estimate = found["fd_moments"]
    assert estimate is not None and estimate.value == pytest.approx(expected) and estimate.n == 12
    assert estimate.low <= estimate.value <= estimate.high
    assert "kid_moments" not in found


def test_with_too_few_it_is_that_of_components_and_kernels(tmp_path: Path) -> None:
    own, fp32 = sounds(tmp_path / "own", 12, 0.5, 0), sounds(tmp_path / "fp32", 12, 0.7, 100)
    found = score(own, fp32, [Heard(Wide(), tmp_path / "kept")])
    assert "fd_wide" not in found
    mine, theirs = (np.concatenate([Wide().embed(*sound.read()) for sound in each]) for each in (own, fp32))
    scale = np.sqrt(np.square(theirs.astype(np.float64)).mean())
    kid, pca = found["kid_wide"], found["pca_fd_wide"]
    assert kid is not None and kid.value == pytest.approx(
        kernel_distance(theirs / scale, mine / scale, paired=True), rel=1e-6
    )
    centred = theirs.astype(np.float64) - theirs.mean(0)
    axes = np.linalg.svd(centred)[2][:3].T  # 12 rows: 3 components
    expected = frechet_distance(Gaussian.of(theirs @ axes), Gaussian.of(mine @ axes))
    assert pca is not None and pca.value == pytest.approx(expected, rel=1e-4)


def test_a_divergence_is_between_clips_of_one_id(sets: tuple, tmp_path: Path) -> None:
    own, fp32 = sets
    found = score(own, fp32[::-1], [Heard(Tagger(), tmp_path)])["kl_tagger"]
    heard = [[clip_probabilities(Tagger().embed(*sound.read())) for sound in each] for each in sets]
    expected = np.mean([kl_divergence(r, e) for e, r in zip(*heard)])
    assert found is not None and found.value == pytest.approx(expected, abs=1e-9)


def test_a_fit_is_between_clip_and_caption(sets: tuple, tmp_path: Path) -> None:
    own, fp32 = sets
    scores = score(own, fp32[::-1], [Heard(Captions(), tmp_path)])
    found, change = scores["captions"], scores["captions_change"]
    rows, theirs = ([Moments().embed(*sound.read()).mean(0) for sound in each] for each in sets)
    mine, others = ([row[0] / np.linalg.norm(row) for row in each] for each in (rows, theirs))
    assert found is not None and change is not None
    assert found.value == pytest.approx(np.mean(mine), rel=1e-5)
    assert change.value == pytest.approx(np.mean(np.subtract(mine, others)), abs=1e-7) and change.value != 0
    assert score(own, own, [Heard(Captions(), tmp_path)])["captions_change"] is None
    silent = sounds(tmp_path / "nameless", 4, 0.5, 0, None)
    with pytest.raises(UserError, match="Captions compares with captions, which these clips do not have"):
        score(silent, silent, [Heard(Captions(), tmp_path)])

    class Deaf(Moments):
        name, kind = "Deaf", "text-audio"

    with pytest.raises(UserError, match="Deaf is of the kind text-audio, but has no embed_text"):
        score(own, fp32, [Heard(Deaf(), tmp_path)])


def test_real_recordings_and_statistics_are_other_references(sets: tuple, tmp_path: Path) -> None:
    own, fp32 = sets
    real = sounds(tmp_path / "real", 30, 0.9, 300)
    heard = [Heard(Moments(), tmp_path), Heard(Tagger(), tmp_path)]
    found = score(own, fp32, heard, real)
    expected = frechet_distance(Gaussian.of(embeddings(real)), Gaussian.of(embeddings(own)))
    assert found["fd_moments"] is not None and found["fd_moments"].value == pytest.approx(expected)
    assert found["kl_tagger"] is not None  # the ids 0 to 11 are among them
    assert score(own, fp32, heard, real[5:])["kl_tagger"] is None
    variations = [replace(sound, caption_id=str(int(sound.id) % 6)) for sound in own]  # two of each caption
    assert score(variations, fp32, heard, real[:6])["kl_tagger"] is not None
    rows = embeddings(real)
    np.savez(tmp_path / "real.npz", mu_ref=rows.mean(0), sigma_ref=np.cov(rows, rowvar=False))
    by_file = score(own, fp32, heard, tmp_path / "real.npz")
    assert by_file["fd_moments"] is not None and by_file["fd_moments"].value == pytest.approx(expected, rel=1e-5)
    assert by_file["kl_tagger"] is None
    few = sets[0]
    reference, mine = (
        np.concatenate([Wide().embed(*s.read()) for s in each]).astype(np.float64) for each in (real, few)
    )
    np.savez(tmp_path / "wide.npz", mu_ref=reference.mean(0), sigma_ref=np.cov(reference, rowvar=False))
    by_components = score(few, fp32, [Heard(Wide(), tmp_path)], tmp_path / "wide.npz")
    axes = np.linalg.svd(reference - reference.mean(0))[2][:3].T  # 12 rows: 3 components
    expected = frechet_distance(Gaussian.of(reference @ axes), Gaussian.of(mine @ axes))
    assert by_components["pca_fd_wide"] is not None and "fd_wide" not in by_components
    assert by_components["pca_fd_wide"].value == pytest.approx(expected, rel=1e-5)
    np.savez(tmp_path / "wrong.npz", mu_ref=np.zeros(3), sigma_ref=np.eye(3))
    with pytest.raises(UserError, match="is of 3 dimensions, Moments of 2"):
        score(own, fp32, heard[:1], tmp_path / "wrong.npz")


def test_fp32_beside_itself_has_no_distance(sets: tuple, tmp_path: Path) -> None:
    fp32 = sets[1]
    found = score(fp32, fp32, [Heard(Moments(), tmp_path), Heard(Tagger(), tmp_path)])
    assert {key for key, value in found.items() if value is not None} == {"clipped_percent", "lufs"}
    assert flat(found)["kl_tagger_low"] is None


def test_what_was_heard_is_kept(sets: tuple, tmp_path: Path) -> None:
    own, fp32 = sets
    counted: list[int] = []
    first = Moments()
    expected = score(own, fp32, [Heard(first, tmp_path)], done=lambda: counted.append(1))
    assert first.calls == 24 and len(counted) == 24  # 12 waveforms, 12 clips
    again = Moments()
    assert score(own, fp32, [Heard(again, tmp_path)]) == expected and again.calls == 0
    other = Moments()
    other.version = "2"
    score(own, fp32, [Heard(other, tmp_path)])
    assert other.calls == 24


def test_broken_sets_are_named(sets: tuple, tmp_path: Path) -> None:
    own, fp32 = sets
    with pytest.raises(UserError, match=r"FP32 has no clip 5 \(7 missing\)"):
        score(own, fp32[:5], [])

    class Broken(Moments):
        name = "Broken"

        def embed(self, audio: NDArray, rate: int) -> NDArray[np.float32]:
            return np.full((1, 2), np.nan, np.float32)

    with pytest.raises(UserError, match=r"Broken makes NaN or infinity of .*0\.wav"):
        score(own, fp32, [Heard(Broken(), tmp_path)])
    soundfile.write(own[3].path, np.zeros((RATE, 2)), RATE)
    with pytest.raises(UserError, match=r"3\.wav is silent: nothing can be compared with it"):
        score(own, fp32, [])
    one = own[:1]
    with pytest.raises(UserError, match="an interval of a distance needs four clips, there are 1"):
        score(one, fp32, [Heard(Moments(), tmp_path)])
