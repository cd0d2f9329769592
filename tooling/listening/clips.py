"""Bundles and prompts, or a folder of clips that are already there, become the sounds that a survey asks about.

The folder is `<DIR>/<model>/clips.jsonl`, one object a line (id, caption, seed, file, sha256), and WAV files beside it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import UserError
from ..batch.clips import INDEX, index_entries

if TYPE_CHECKING:
    from ...runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Sound:
    """One clip of one model: audio float32 [channels, n] in -1..1; `id` is that of its caption in every model."""

    model: str
    id: str
    caption: str
    seed: int
    audio: NDArray[np.float32]
    sample_rate: int


def generate_clips(
    pipelines: list[Pipeline],
    prompts: Sequence[str],
    folder: Path,
    settings: dict[str, Any],
    seconds: float | None,
    on_step: Callable[[int], object],
) -> None:
    """Every prompt with every bundle, prompt i with seed + i, written as this module reads it.

    The list is emptied: a pipeline with its engines is let go before the next one's are made. on_step(n) is told how
    many steps of all are done. Raises UserError for bundles that cannot be compared.
    """
    rates = {pipeline.sample_rate for pipeline in pipelines}
    lengths = {pipeline.check_seconds(seconds) for pipeline in pipelines}
    if len(rates) > 1 or len(lengths) > 1:
        raise UserError("the bundles make sounds of different sample rates or lengths; give one length with --seconds")
    done = 0
    while pipelines:
        pipeline = pipelines.pop(0)
        chosen = pipeline.settings(**settings)

        def stepped(clip: int, step: int, before: int = done, steps: int = chosen.steps) -> None:
            on_step(before + clip * steps + step + 1)

        _write_model(folder / pipeline.bundle.folder.name, pipeline.generate(prompts, chosen, seconds, on_step=stepped))
        done += len(prompts) * chosen.steps


def _write_model(folder: Path, clips: Any) -> None:
    from ...runtime.wav import write_wav

    lines = []
    for number, clip in enumerate(clips, 1):
        file = folder / f"{number:03}.wav"
        write_wav(file, clip.audio, clip.sample_rate)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        line = {"id": file.stem, "caption": clip.prompt, "seed": clip.seed, "file": file.name, "sha256": digest}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / INDEX).write_text("".join(lines), "utf-8")


def models_in(folder: Path, names: Sequence[str]) -> list[str]:
    """The models whose clips a folder holds, or those of them that are named. Raises UserError for fewer than two."""
    if not folder.is_dir():
        raise UserError(f"--clips {folder}: no such folder; dit-trt listen BUNDLE BUNDLE makes the clips itself")
    found = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
    for name in names:
        if name not in found:
            raise UserError(f"--clips {folder} has no {name}/{INDEX}; it has: {', '.join(found) or 'none'}")
    if len(names or found) < 2:
        raise UserError(f"--clips {folder}: a listening test compares two models or more, each a folder with {INDEX}")
    return list(names) or found


def captions_of(folder: Path, models: Sequence[str]) -> dict[str, str]:
    """id -> caption, in the order of the first model's list, of the clips that every model has.

    Raises UserError when there is none, or where models disagree about a caption or its seed.
    """
    lists = [{entry["id"]: entry for entry in _entries(folder / model)} for model in models]
    common = [key for key in lists[0] if all(key in entries for entries in lists)]
    if not common:
        raise UserError(f"{folder}: no clip id is in every {INDEX} of {', '.join(models)}")
    for key in common:
        if len({(entries[key]["caption"], entries[key]["seed"]) for entries in lists}) > 1:
            raise UserError(f"{folder}: the clips {key} are of different captions or seeds; make them in one run")
    return {key: lists[0][key]["caption"] for key in common}


def read_clips(folder: Path, models: Sequence[str], ids: Sequence[str]) -> list[Sound]:
    """The sounds of those ids, by id and then by model.

    Raises UserError for what is missing, damaged or not comparable.
    """
    lists = {model: {entry["id"]: entry for entry in _entries(folder / model)} for model in models}
    sounds = [_sound(folder / model, model, lists[model][key]) for key in ids for model in models]
    if len({sound.sample_rate for sound in sounds}) > 1:
        raise UserError(f"{folder}: the clips are of different sample rates, which a rater would hear")
    for key in ids:
        if len({sound.audio.shape for sound in sounds if sound.id == key}) > 1:
            raise UserError(f"{folder}: the clips {key} differ in length or channels, which tells the models apart")
    return sounds


def _entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / INDEX
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    try:
        return index_entries(text)
    except ValueError as error:
        raise UserError(f"{path}, {error}") from None


def _sound(folder: Path, model: str, entry: dict[str, Any]) -> Sound:
    import soundfile

    path = folder / entry["file"]
    try:
        content = path.read_bytes()
        audio, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as sound ({error}); make the clips again") from None
    if "sha256" in entry and hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is not the file that {INDEX} describes (sha256); make the clips again")
    if audio.shape[1] > 2 or not len(audio) or not np.isfinite(audio).all():
        raise UserError(f"{path}: {audio.shape[1]} channels of {len(audio)} samples; one or two of sound are needed")
    return Sound(model, entry["id"], entry["caption"], entry["seed"], np.ascontiguousarray(audio.T), rate)
