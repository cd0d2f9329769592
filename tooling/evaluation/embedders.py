"""Networks that hear: a clip becomes embeddings or class scores, by whichever of them the user has.

A third party adds one as an entry point of the group `dit_trt.embedders`, its name as in `--metrics`, its value a
function `(weights: Path | None) -> Embedder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import soxr
from numpy.typing import NDArray

from ...engines.errors import UserError

Float = NDArray[np.float32]
Kind = Literal["embedding", "logits", "text-audio"]
GROUP = "dit_trt.embedders"


class Embedder(Protocol):
    """One network. name: what tables call it; version: of all that decides its numbers, for the cache.

    kind: what `embed` gives: embeddings (a Frechet or kernel distance is taken of them), a tagger's logits (a
    divergence), or embeddings in a space shared with captions (a cosine; it then has `embed_text` too).
    notice: what whoever uses it must be shown, its licence most of all.
    """

    name: str
    version: str
    kind: Kind
    notice: str | None

    def embed(self, audio: Float, rate: int) -> Float:
        """audio [channels, samples] in -1..1 -> [windows, d]"""
        ...


@runtime_checkable
class TextEmbedder(Protocol):
    def embed_text(self, captions: Sequence[str]) -> Float:
        """-> [captions, d]"""
        ...


# name -> module of this package, and its function of (weights)
BUILT_IN = {
    "birdnet": ("birdnet", "open_embedder"),
    "birdnet-embedding": ("birdnet", "open_embedding"),
    "aisfx": ("aisfx", "open_embedder"),
    "clap": ("clap", "open_embedder"),
}
# The paper's, whose weights come in no package: what stable-audio-metrics feeds them with.
PUBLISHED: dict[str, dict] = {
    "openl3": {
        **{"name": "OpenL3", "kind": "embedding", "sample_rate": 48_000, "through_rate": 44_100, "peak_db": -1.0},
        **{"channels": "stereo-apart", "window_seconds": 1.0, "hop_seconds": 0.5, "centred": True, "rest": True},
    },
    "passt": {
        **{"name": "PaSST", "kind": "logits", "sample_rate": 32_000, "peak_db": -1.0, "channels": "mono"},
        **{"window_seconds": 10.0, "hop_seconds": 5.0, "rest": True},
    },
}


def open_embedder(name: str, weights: Path | None = None) -> Embedder:
    """The embedder of that name, or `onnx:FILE` (see onnx_embedder). weights: where the user has them, if it needs any.

    Raises UserError for an unknown name, and when a package or weights are missing, with what to do.
    """
    kind, _, rest = name.partition(":")
    if (kind == "onnx" and rest) or name in PUBLISHED:
        from .onnx_embedder import OnnxEmbedder

        if name not in PUBLISHED:
            return OnnxEmbedder(Path(rest))
        if weights is None:
            raise UserError(
                f"{name}'s weights are not ours to ship: export it to ONNX as docs/evaluation.md says, and give "
                f"--weights {name}=FILE.onnx"
            )
        return OnnxEmbedder(weights, PUBLISHED[name])
    if name in BUILT_IN:
        module, function = BUILT_IN[name]
        return getattr(import_module(f".{module}", __package__), function)(weights)
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name in others:
        make: Callable[[Path | None], Embedder] = others[name].load()
        return make(weights)
    known = ", ".join([*BUILT_IN, *PUBLISHED, *sorted(others), "onnx:FILE"])
    raise UserError(f"there is no embedder {name!r}; there are: {known}")


def mono(audio: Float, rate: int, wanted: int) -> Float:
    """audio [channels, samples] -> [samples'] at the rate `wanted`: the channels' mean, resampled by soxr (HQ)."""
    return resampled(audio.mean(axis=0, dtype=np.float32)[None], rate, wanted)[0]


def resampled(audio: Float, rate: int, wanted: int) -> Float:
    """[channels, samples] at `rate` -> the same at `wanted`."""
    return audio if rate == wanted else np.ascontiguousarray(soxr.resample(audio.T, rate, wanted).T, np.float32)


def at_peak(audio: Float, decibels: float) -> Float:
    """The same sound with its largest sample, of all channels, at `decibels` of full scale; silence stays as it is."""
    peak = float(np.abs(audio).max(initial=0.0))
    return audio * np.float32(10 ** (decibels / 20) / peak) if peak else audio


def windows(audio: Float, length: int, hop: int, centred: bool = False, rest: bool = False) -> Float:
    """audio [samples] -> [windows, length]: every whole one; at least one, with silence behind a short clip.

    centred: the first one's middle is the first sample, silence before it. rest: one more, with silence behind it, for
    samples that no whole one holds.
    """
    audio = np.pad(audio, (length // 2 if centred else 0, 0))
    over = max(0, len(audio) - length)
    count = 1 + (-(-over // hop) if rest else over // hop)
    padded = np.pad(audio, (0, max(0, (count - 1) * hop + length - len(audio))))
    return np.lib.stride_tricks.sliding_window_view(padded, length)[::hop][:count].copy()
