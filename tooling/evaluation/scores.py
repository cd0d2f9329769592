"""Finished clips in, every bundle's metrics out: each a number with its 95 % interval. What a network heard is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from ...engines.errors import UserError
from ...engines.home import sha256, write_whole
from ..intervals import Estimate, mean_interval, paired, set_interval
from ..loudness import integrated_loudness
from . import waveform
from .clips import Clip
from .divergence import clip_probabilities, cosine, kl_divergence
from .embedders import Embedder, Float, TextEmbedder
from .frechet import (
    SAMPLES_A_DIMENSION,
    Gaussian,
    enough,
    frechet_distance,
    kernel_distance,
    principal_axes,
    reference_gaussian,
)

COMPONENTS = 32  # of the Frechet distance of principal components
KEPT = ".heard"  # folder of an evaluation's that holds what networks heard

Scores = dict[str, Estimate | None]


@dataclass(frozen=True)
class Sound:
    """A WAV of a set: its id pairs it with FP32's of the same, its caption_id with a recording.

    caption: None where there is none.
    """

    id: str
    caption_id: str
    caption: str | None
    path: Path
    sha256: str

    def read(self) -> tuple[Float, int]:
        """audio float32 [channels, samples], rate. Raises UserError, naming the file, for what is no sound."""
        audio, rate = self._samples()
        waveform.check_sound(audio, str(self.path))
        return audio, rate

    def is_silent(self) -> bool:
        return not self._samples()[0].any()

    def _samples(self) -> tuple[Float, int]:
        try:
            audio, rate = soundfile.read(self.path, dtype="float32", always_2d=True)
        except (OSError, soundfile.LibsndfileError) as error:
            raise UserError(f"{self.path} cannot be read as sound: {error}") from None
        return audio.T, rate


def sounds_of(folder: Path, clips: Sequence[Clip], caption_ids: Mapping[str, str] | None = None) -> list[Sound]:
    """Generated clips. caption_ids: clip id -> that of its caption (default: they are the same)."""
    own = caption_ids or {}
    return [Sound(clip.id, own.get(clip.id, clip.id), clip.caption, folder / clip.file, clip.sha256) for clip in clips]


def without_silence(sounds: Mapping[str, Sequence[Sound]]) -> tuple[dict[str, list[Sound]], dict[str, list[str]]]:
    """The clips of ids that are silent in no set, as nothing can be compared with silence; by set, its silent ids."""
    silent = {name: [sound.id for sound in each if sound.is_silent()] for name, each in sounds.items()}
    gone = {each for ids in silent.values() for each in ids}
    kept = {name: [sound for sound in each if sound.id not in gone] for name, each in sounds.items()}
    return kept, {name: ids for name, ids in silent.items() if ids}


def sounds_in(folder: Path) -> list[Sound]:
    """Real recordings: every WAV or FLAC of a folder, by name, its id the name without the suffix."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".wav", ".flac"))
    if not files:
        raise UserError(f"{folder} holds no .wav or .flac: give --reference a folder of recordings, or an .npz")
    return [Sound(path.stem, path.stem, None, path, sha256(path)) for path in files]


class Heard:
    """What one embedder makes of sounds: [windows, d] each, kept by the sound's bytes and the embedder's version."""

    def __init__(self, embedder: Embedder, folder: Path):
        self.embedder = embedder
        key = hashlib.sha256(f"{embedder.name} {embedder.version}".encode()).hexdigest()[:16]
        self._folder = folder / f"{embedder.name.lower()}-{key}"

    def __call__(self, sound: Sound) -> Float:
        file = self._folder / f"{sound.sha256}.npy"
        if file.is_file():
            return np.load(file, allow_pickle=False)
        found = self.embedder.embed(*sound.read())
        if not np.isfinite(found).all():
            raise UserError(f"{self.embedder.name} makes NaN or infinity of {sound.path}")
        self._folder.mkdir(parents=True, exist_ok=True)
        content = BytesIO()
        np.save(content, found)
        write_whole(file, content.getvalue())
        return found

    @cached_property
    def key(self) -> str:
        return self.embedder.name.lower()


def score(
    sounds: Sequence[Sound],
    fp32: Sequence[Sound],
    heard: Sequence[Heard],
    reference: Path | Sequence[Sound] | None = None,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> Scores:
    """One bundle's metrics, by key; done() is called for every clip and network, and for every clip's waveform.

    fp32: the reference's clips of the same ids, in any order. reference: what distances of sets are taken to, real
    recordings or an .npz of stable-audio-metrics (default: FP32's clips). A metric that compares a set with itself is
    None. Raises UserError for sets that do not fit.
    """
    by_id = {sound.id: sound for sound in fp32}
    if missing := [sound.id for sound in sounds if sound.id not in by_id]:
        raise UserError(f"FP32 has no clip {missing[0]} ({len(missing)} missing): evaluate the same captions with it")
    pairs = [(sound, by_id[sound.id]) for sound in sounds]
    itself = all(a.sha256 == b.sha256 for a, b in pairs)
    found = _waveforms(pairs, itself, seed, done)
    for each in heard:
        kind, of = each.embedder.kind, each.key
        if kind == "text-audio":
            found |= _fit(of, each, pairs, itself, seed, done)
            continue
        mine = _all(each, sounds, done)
        if kind == "logits":
            theirs = _paired_reference(each, pairs, reference)
            found[f"kl_{of}"] = (
                None if theirs is None or (itself and reference is None) else _divergence(theirs, mine, seed)
            )
        else:
            found |= _distances(of, mine, each, pairs, reference, itself, seed)
    return found


def _waveforms(
    pairs: Sequence[tuple[Sound, Sound]], itself: bool, seed: int, done: Callable[[], object]
) -> dict[str, Estimate | None]:
    compared: dict[str, list[float]] = {"log_mel_db": [], "multi_resolution_stft": [], "rms_correlation": []}
    alone: dict[str, list[float]] = {"clipped_percent": [], "lufs": []}
    for sound, other in pairs:
        audio, rate = sound.read()
        alone["clipped_percent"].append(100 * waveform.clipped_share(audio))
        alone["lufs"].append(integrated_loudness(audio, rate))
        if not itself:
            expected, _ = other.read()
            compared["log_mel_db"].append(waveform.log_mel_db(expected, audio, rate))
            compared["multi_resolution_stft"].append(waveform.multi_resolution_stft(expected, audio))
            compared["rms_correlation"].append(waveform.rms_correlation(expected, audio, rate))
        done()
    return {key: mean_interval(each, seed) if each else None for key, each in {**compared, **alone}.items()}


def _all(heard: Heard, sounds: Sequence[Sound], done: Callable[[], object] = lambda: None) -> list[Float]:
    found = []
    for sound in sounds:
        found.append(heard(sound))
        done()
    return found


def _fit(
    of: str,
    heard: Heard,
    pairs: Sequence[tuple[Sound, Sound]],
    itself: bool,
    seed: int,
    done: Callable[[], object],
) -> Scores:
    """The mean cosine of each clip with its caption, and how much it is above that of FP32's clip of the same caption.

    What captions differ by cancels in the second, so its interval is that of the bundle's own effect.
    """
    embedder = heard.embedder
    if not isinstance(embedder, TextEmbedder):
        raise UserError(f"{embedder.name} is of the kind text-audio, but has no embed_text: its package is broken")
    texts: dict[str, NDArray] = {}

    def fit(sound: Sound) -> float:
        if sound.caption is None:
            raise UserError(f"{embedder.name} compares with captions, which these clips do not have")
        if sound.caption not in texts:
            texts[sound.caption] = embedder.embed_text([sound.caption])[0]
        return cosine(texts[sound.caption], heard(sound).mean(axis=0))

    mine, theirs = [], []
    for sound, other in pairs:
        mine.append(fit(sound))
        if not itself:
            theirs.append(fit(other))
        done()
    return {of: mean_interval(mine, seed), f"{of}_change": None if itself else paired(mine, theirs, seed)}


def _paired_reference(
    heard: Heard, pairs: Sequence[tuple[Sound, Sound]], reference: Path | Sequence[Sound] | None
) -> list[Float] | None:
    """What the tagger hears in each clip's own reference; None where there are statistics alone, or no pairs."""
    if isinstance(reference, Path):
        return None
    if reference is None:
        return [heard(other) for _, other in pairs]
    by_id = {sound.id: sound for sound in reference}
    if any(sound.caption_id not in by_id for sound, _ in pairs):
        return None
    return [heard(by_id[sound.caption_id]) for sound, _ in pairs]


def _divergence(theirs: Sequence[Float], mine: Sequence[Float], seed: int) -> Estimate:
    values = [kl_divergence(clip_probabilities(r), clip_probabilities(e)) for r, e in zip(theirs, mine)]
    return mean_interval(values, seed)


def _distances(
    of: str,
    mine: Sequence[Float],
    heard: Heard,
    pairs: Sequence[tuple[Sound, Sound]],
    reference: Path | Sequence[Sound] | None,
    itself: bool,
    seed: int,
) -> Scores:
    """`fd_` where there are embeddings enough, else `pca_fd_` and `kid_` (which statistics in a file do not allow).

    The kernel is made for embeddings of order 1: both sets are divided by the reference's root mean square.
    """
    own = Gaussian.of(np.concatenate(mine))
    if isinstance(reference, Path):
        fixed = reference_gaussian(reference)
        if len(fixed.mean) != len(own.mean):
            raise UserError(f"{reference} is of {len(fixed.mean)} dimensions, {heard.embedder.name} of {len(own.mean)}")
        if not enough(own):
            axes = principal_axes(fixed, components(own.count))
            few, low = fixed.project(axes), [x @ axes for x in mine]
            return {f"pca_fd_{of}": set_interval(lambda i: frechet_distance(few, _gaussian(low, i)), len(mine), seed)}
        return {f"fd_{of}": set_interval(lambda i: frechet_distance(fixed, _gaussian(mine, i)), len(mine), seed)}
    own_pairs = reference is None
    theirs = [heard(other) for _, other in pairs] if reference is None else _all(heard, reference)
    if itself and own_pairs:
        return {f"pca_fd_{of}": None, f"kid_{of}": None}
    every = np.arange(len(theirs))
    whole = Gaussian.of(np.concatenate(theirs))
    if enough(own, whole):
        return {
            f"fd_{of}": set_interval(
                lambda i: frechet_distance(_gaussian(theirs, i if own_pairs else every), _gaussian(mine, i)),
                len(mine),
                seed,
            )
        }
    scale = np.sqrt(np.mean(np.square(np.concatenate(theirs), dtype=np.float64)))
    axes = principal_axes(whole, components(min(own.count, whole.count)))
    low_mine, low_theirs = [x @ axes for x in mine], [x @ axes for x in theirs]
    return {
        f"pca_fd_{of}": set_interval(
            lambda i: frechet_distance(_gaussian(low_theirs, i if own_pairs else every), _gaussian(low_mine, i)),
            len(mine),
            seed,
        ),
        f"kid_{of}": set_interval(
            lambda i: kernel_distance(
                _rows(theirs, i if own_pairs else every) / scale, _rows(mine, i) / scale, own_pairs
            ),
            len(mine),
            seed,
        ),
    }


def components(embeddings: int) -> int:
    """How many principal components so few allow: two embeddings each in every half of the clips, 1 to 32."""
    return max(1, min(COMPONENTS, embeddings // (2 * SAMPLES_A_DIMENSION)))


def _rows(clips: Sequence[NDArray], chosen: NDArray[np.intp]) -> NDArray:
    return np.concatenate([clips[i] for i in chosen.tolist()])


def _gaussian(clips: Sequence[NDArray], chosen: NDArray[np.intp]) -> Gaussian:
    return Gaussian.of(_rows(clips, chosen))


def flat(scores: Mapping[str, Estimate | None]) -> dict[str, float | None]:
    """Numbers by name: `key`, `key_low`, `key_high`, as CSV and JSON have them."""
    found: dict[str, float | None] = {}
    for key, each in scores.items():
        found[key] = None if each is None else each.value
        found[f"{key}_low"] = None if each is None else each.low
        found[f"{key}_high"] = None if each is None else each.high
    return found
