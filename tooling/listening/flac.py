"""Sounds become FLAC files of one size, so that no size tells which model a clip is from."""

from __future__ import annotations

import io
from collections.abc import Sequence

from numpy.typing import NDArray

from ...runtime.wav import pcm16

_HEADER, _LAST, _PADDING = 4, 0x80, 1


def flac_files(sounds: Sequence[NDArray], sample_rate: int) -> list[bytes]:
    """[channels, n] in -1..1 each -> 16-bit FLAC files, all as large as the largest.

    Each holds its STREAMINFO, a block of zeros and the frames: nothing that names an encoder, a date or a file.
    """
    import soundfile

    parts = []
    for audio in sounds:
        encoded = io.BytesIO()
        soundfile.write(encoded, pcm16(audio), sample_rate, format="FLAC", subtype="PCM_16")
        parts.append(_parts(encoded.getvalue()))
    largest = max(len(info) + len(frames) for info, frames in parts)
    return [info + _padding(largest - len(info) - len(frames)) + frames for info, frames in parts]


def _parts(content: bytes) -> tuple[bytes, bytes]:
    """The marker with STREAMINFO, said not to be the last block, and the frames."""
    if content[:4] != b"fLaC" or content[4] & ~_LAST:
        raise ValueError("not a FLAC file that begins with STREAMINFO")
    place = 4
    while True:
        last = content[place] & _LAST
        place += _HEADER + int.from_bytes(content[place + 1 : place + _HEADER], "big")
        if last:
            break
    length = int.from_bytes(content[5:8], "big")
    return b"fLaC\x00" + content[5 : 4 + _HEADER + length], content[place:]


def _padding(size: int) -> bytes:
    """The last metadata block: `size` zeros behind its header. Raises OverflowError from 16 MB on."""
    return bytes([_LAST | _PADDING]) + size.to_bytes(3, "big") + bytes(size)
