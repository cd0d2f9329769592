"""Archives that hold recordings: bytes in, members out.

Debian packages, SoundFont 2, Qt resources (gcompris), OpenClonk groups and Doom WADs. Each reader knows just
enough of its format to find the sounds.
"""

from __future__ import annotations

import io
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Sound = tuple[NDArray[np.float32], float]
"""float32 samples [samples] or [samples, channels], and their rate in Hz."""


def deb_files(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The files `names` (paths without the leading "./") of a Debian package."""
    wanted = set(names)
    found = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in wanted and (file := archive.extractfile(member)) is not None:
                    found[name] = file.read()
    if missing := wanted - found.keys():
        raise SystemExit(f"{path} has no {', '.join(sorted(missing))}")
    return found


def soundfont_samples(data: bytes) -> dict[str, Sound]:
    """SoundFont 2 bytes -> name: (float32 samples, rate in Hz)."""

    def chunk(tag: bytes) -> bytes:
        at = data.index(tag)
        return data[at + 8 : at + 8 + struct.unpack_from("<I", data, at + 4)[0]]

    pcm = np.frombuffer(chunk(b"smpl"), "<i2")
    samples: dict[str, Sound] = {}
    for header in struct.iter_unpack("<20s5IBbHH", chunk(b"shdr")[:-46]):
        name, start, end, _, _, rate = header[:6]
        label = name.split(b"\0")[0].decode("latin1")
        samples[label] = (pcm[start:end].astype(np.float32) / np.float32(32768), float(rate))
    return samples


def rcc_files(data: bytes) -> dict[str, bytes]:
    """Qt resource bytes -> file name (without folders): content."""
    version, tree, contents, names = struct.unpack_from(">4i", data, 4)
    node_size = 14 if version < 2 else 22
    files = {}

    def walk(node: int) -> None:
        at = tree + node * node_size
        name_at, flags = struct.unpack_from(">iH", data, at)
        if flags & 2:
            count, first = struct.unpack_from(">ii", data, at + 6)
            for child in range(first, first + count):
                walk(child)
            return
        length = struct.unpack_from(">H", data, names + name_at)[0]
        name = data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be")
        start = contents + struct.unpack_from(">i", data, at + 10)[0]
        content = data[start + 4 : start + 4 + struct.unpack_from(">i", data, start)[0]]
        files[name] = zlib.decompress(content[4:]) if flags & 1 else content

    walk(0)
    return files


def clonk_files(data: bytes, folder: str = "") -> Iterator[tuple[str, bytes]]:
    """OpenClonk group bytes -> (path in the group, content) of every file, groups inside it included."""
    if data[:2] in (b"\x1e\x8c", b"\x1f\x8b"):
        data = zlib.decompress(b"\x1f\x8b" + data[2:], 31)
    head = bytearray(byte ^ 237 for byte in data[:204])
    for at in range(0, 202, 3):
        head[at], head[at + 2] = head[at + 2], head[at]
    count = struct.unpack_from("<i", head, 36)[0]
    for index in range(count):
        entry = data[204 + 316 * index : 204 + 316 * (index + 1)]
        name = folder + entry[: entry.index(0)].decode("latin1")
        _, group, size, _, offset = struct.unpack_from("<5i", entry, 260)
        content = data[204 + 316 * count + offset :][:size]
        if group:
            yield from clonk_files(content, name + "/")
        else:
            yield name, content


def wad_sounds(data: bytes) -> dict[str, Sound]:
    """Doom WAD bytes -> lump name: (float32 samples, rate in Hz) of its sound effects."""
    count, directory = struct.unpack_from("<ii", data, 4)
    sounds: dict[str, Sound] = {}
    for index in range(count):
        start, size, padded = struct.unpack_from("<ii8s", data, directory + 16 * index)
        name = padded.split(b"\0")[0].decode("latin1")
        if name.startswith("DS") and size > 8 and data[start : start + 2] == b"\3\0":
            rate, samples = struct.unpack_from("<Hi", data, start + 2)
            pcm = np.frombuffer(data[start + 8 : start + 8 + samples], np.uint8)[16:-16]
            sounds[name] = (pcm.astype(np.float32) / np.float32(128) - np.float32(1), float(rate))
    return sounds


def decode(content: bytes) -> Sound:
    """Bytes of a wav, flac or ogg file -> its sound."""
    import soundfile

    return soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
