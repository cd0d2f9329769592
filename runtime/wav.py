"""Decoded audio becomes a WAV file: trimmed, peak-normalised, 16-bit PCM, written whole or not at all."""

from __future__ import annotations

import uuid
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from ..engines.errors import UserError

FULL_SCALE = 32767  # largest 16-bit sample; -32768 is not used, so that the scale is symmetric


def finish(audio: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """Decoder output as it is to be heard.

    audio float32 [channels, n]; the first `samples` of each channel are kept -> float32 [2 or more, min(n,
    samples)] in -1..1, the largest at 1; mono becomes stereo. Audio that 16 bits would not tell from silence
    stays as quiet as it is. Raises UserError for NaN or infinity among the kept samples.
    """
    kept = _stereo(np.asarray(audio, dtype=np.float32)[:, :samples])
    _require_finite(kept)
    peak = float(np.abs(kept).max(initial=0.0))
    if peak < 0.5 / FULL_SCALE:
        return kept.copy()
    return np.clip(kept / np.float32(peak), -1.0, 1.0)


def pcm16(audio: NDArray[np.floating]) -> NDArray[np.int16]:
    """audio [channels, n], clipped to -1..1 -> samples as files hold them, [n, channels]."""
    return np.rint(np.clip(audio.T, -1.0, 1.0) * FULL_SCALE).astype(np.int16)


def encode(audio: NDArray[np.floating], sample_rate: int, format: str = "wav") -> bytes:
    """`audio` float32 [channels, n], clipped to -1..1 -> a `wav` or `flac` file of 16-bit samples at `sample_rate` Hz.

    Mono becomes stereo. Raises UserError for NaN or infinity.
    """
    audio = _stereo(np.asarray(audio, dtype=np.float32))
    _require_finite(audio)
    file = BytesIO()
    soundfile.write(file, pcm16(audio), sample_rate, format=format.upper(), subtype="PCM_16")
    return file.getvalue()


def write_wav(path: str | Path, audio: NDArray[np.float32], sample_rate: int) -> None:
    """Write `audio` as `encode` has it. Missing parent folders are created.

    The file is written under a temporary name beside `path` and renamed, so an older file is replaced whole
    or left alone. Raises UserError for NaN or infinity, or when `path` cannot be written.
    """
    path = Path(path)
    content = encode(audio, sample_rate)
    temporary = path.parent / f".{uuid.uuid4().hex}.wav.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place with --output") from error
    finally:
        _discard(temporary)


def _discard(path: Path) -> None:
    """Remove `path` if it is there; a parent that is no folder has nothing to remove."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _stereo(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.repeat(audio, 2, axis=0) if audio.shape[0] == 1 else audio


def _require_finite(audio: NDArray[np.float32]) -> None:
    bad = audio.size - int(np.isfinite(audio).sum())
    if bad:
        raise UserError(
            f"{bad} of {audio.size} audio samples are NaN or infinite, so no sound was written: "
            "the engine is broken, see `dit-trt diff`, then build it again"
        )
