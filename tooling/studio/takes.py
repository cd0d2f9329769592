"""A wish becomes a take: one clip, its picture and what it cost; two takes of one seed become a comparison.

Whatever happens is said through `say`: `Progress` every now and then. What `say` raises ends the run.
"""

from __future__ import annotations

import shutil
import statistics
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...engines.bundle import Bundle, find_bundle, list_bundles
from ...engines.errors import UserError
from ...runtime.init_audio import InitAudio
from ...runtime.pipeline import Pipeline
from ...runtime.settings import Settings
from ...runtime.wav import write_wav
from ..clip_names import clip_name
from ..fidelity import compare_velocities
from . import pictures
from .wish import Wish

Float = NDArray[np.float32]
PREVIEWS = 8  # of a run, where they are cheap
FREE_SECONDS, SHARE = 2.0, 0.25  # what previews may cost: so long, or that part of the sampling
PACE = 0.1  # seconds between two reports
KEPT_OPEN = 2_000_000_000  # bytes of bundles whose engines stay open


@dataclass(frozen=True)
class Progress:
    """steps done of one bundle's run, about how many seconds are left of it, and perhaps a PNG of the estimate."""

    bundle: str
    done: int
    steps: int
    seconds_left: float | None = None
    picture: bytes | None = None


@dataclass(frozen=True)
class Take:
    """A finished clip. size_bytes: of its bundle; step_ms: median, sampling_seconds: all; without previews."""

    wish: Wish
    file: Path
    steps: int
    recipe: str
    size_bytes: int
    step_ms: float
    sampling_seconds: float
    picture: bytes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two takes of one wish; relative and cosine [steps]: of the second run's denoised estimates to the first's."""

    takes: tuple[Take, Take]
    relative: NDArray[np.float64]
    cosine: NDArray[np.float64]
    picture: bytes


@dataclass(frozen=True)
class Model:
    """What a bundle's model does when nothing else is said; longest_seconds: of a clip.

    other: the bundle of it to compare with, FP32 if there is one.
    """

    name: str
    backend: str
    settings: Settings
    longest_seconds: float
    other: str | None

    @property
    def seconds(self) -> float:
        """The length that is made when none is asked for."""
        return min(10.0, self.longest_seconds)


def recipe_of(bundle: Bundle) -> str:
    """FP32, or as in SQS W8A8."""
    recipe = bundle.manifest["recipe"]
    return "FP32" if recipe["method"] == "none" else f"{recipe['method']} {recipe['bits']}".upper()


Say = Callable[[Progress], object]


class _Run:
    """What is seen of one run: its estimates, and a report of them now and then."""

    def __init__(self, pipeline: Pipeline, steps: int, say: Say):
        self._pipeline, self._steps, self._say = pipeline, steps, say
        self._bundle = pipeline.bundle.folder.name
        self._begun = self._reported = time.perf_counter()
        self._previewed = 0
        self.estimates: list[Float] = []
        self.looking: list[float] = []  # seconds of each step that were spent here

    @property
    def preview_seconds(self) -> float:
        return sum(self.looking)

    def seen(self, step: int, estimate: Float) -> None:
        self.estimates.append(estimate)
        if step == 0:
            self._begun = time.perf_counter()  # engines were compiled before
        now, done = time.perf_counter(), step + 1
        sampled = now - self._begun - self.preview_seconds
        picture = None
        due = step - self._previewed >= -(-self._steps // PREVIEWS) and done < self._steps
        if due and self.preview_seconds <= max(FREE_SECONDS, SHARE * sampled):
            self._previewed = step
            picture = pictures.spectrogram_png(spectrogram(self._pipeline, estimate))
        if picture is not None or now - self._reported >= PACE or done == self._steps:
            left = sampled / step * (self._steps - done) if step else None
            self._say(Progress(self._bundle, done, self._steps, left, picture))
            self._reported = time.perf_counter()
        self.looking.append(time.perf_counter() - now)


def spectrogram(pipeline: Pipeline, latents: Float) -> NDArray:
    """Of latents [channels, latents], in dB, [bands, frames]. A decoder's search for phases is left out."""
    engine = pipeline.engine("decoder", latents=latents.shape[1])
    if "magnitude" in engine.outputs:
        magnitude = engine.run({"latents": latents[None]})["magnitude"][0]
        return pictures.mel_decibels(magnitude, pipeline.sample_rate)
    return pictures.log_mel(pipeline.decode(latents), pipeline.sample_rate)


class Studio:
    """Open bundles, which make one clip at a time; clips are written into `folder`.

    bundle: the one to begin with (default: the newest). Raises UserError when there is none.
    """

    def __init__(self, folder: Path, bundle: str | None = None, device: str | None = None):
        self.folder = folder
        self.device = device
        self._first = find_bundle(bundle)
        self._open: dict[tuple[Path, str], Pipeline] = {}
        self._busy = threading.Lock()

    def bundles(self) -> dict[str, Bundle]:
        """What can be chosen, by the name `dit-trt run` takes: the one to begin with, then the newest first."""
        home = {bundle.folder.name: bundle for bundle in list_bundles()}
        name = self._first.folder.name
        at_home = name in home and home[name].folder == self._first.folder
        return {name if at_home else str(self._first.folder): self._first} | home

    def titles(self) -> list[tuple[str, str]]:
        """(what a person reads, the name) of each bundle."""
        return [(f"{recipe_of(b)}, {b.size_bytes / 1e6:.1f} MB: {name}", name) for name, b in self.bundles().items()]

    def model(self, name: str) -> Model:
        """Raises UserError for a bundle that is not there or cannot run here."""
        bundle = self.bundle(name)
        pipeline = Pipeline(bundle, self.device)
        manifest = bundle.manifest["model"]
        alike = {n: b for n, b in self.bundles().items() if b.manifest["model"]["digest"] == manifest["digest"]}
        others = sorted(alike.keys() - {name}, key=lambda n: (recipe_of(alike[n]) != "FP32", list(alike).index(n)))
        return Model(
            manifest["name"], bundle.backend, pipeline.settings(), pipeline.longest_seconds, next(iter(others), None)
        )

    def bundle(self, name: str) -> Bundle:
        return self.bundles().get(name) or find_bundle(name)

    def generate(self, wish: Wish, say: Say = lambda progress: None) -> Take:
        """Raises UserError for what the model does not take."""
        with self._busy:
            return self._take(wish, say)[0]

    def compare(self, wish: Wish, other: str, say: Say = lambda progress: None) -> Comparison:
        """The wish through the bundle `other` first, then through its own. Raises UserError as `generate`."""
        if other == wish.bundle:
            raise UserError("a bundle is compared with another one: choose two")
        models = {self.bundle(name).manifest["model"]["digest"] for name in (other, wish.bundle)}
        if len(models) > 1:
            raise UserError("the two bundles are of different models; choose two of one model")
        with self._busy:
            first, before = self._take(replace(wish, bundle=other), say)
            try:
                second, after = self._take(wish, say)
            except BaseException:  # whoever stops it, too
                shutil.rmtree(first.file.parent, ignore_errors=True)
                raise
        cosine, relative = np.array([compare_velocities(a, b) for a, b in zip(before, after, strict=True)]).T
        return Comparison((first, second), relative, cosine, pictures.difference_png(relative, cosine))

    def _take(self, wish: Wish, say: Say) -> tuple[Take, list[Float]]:
        """And the denoised estimate of every step."""
        pipeline = self._pipeline(wish.bundle)
        named = {"steps": wish.steps, "cfg_scale": wish.cfg, "seed": wish.seed}
        settings = pipeline.settings(**{name: value for name, value in named.items() if value is not None})
        seconds = pipeline.check_seconds(wish.seconds)
        start = None
        if wish.init_audio is not None:
            if "encoder_channels" not in pipeline.sizes:
                raise UserError(
                    f"the model {pipeline.bundle.manifest['model']['name']} has no encoder, so it cannot begin from a "
                    "recording; remove the recording, or choose a bundle of another model"
                )
            start = _read(wish.init_audio, wish.init_noise_level)
        notes = _notes(pipeline, wish, settings, start)
        run = _Run(pipeline, settings.steps, say)
        say(Progress(pipeline.bundle.folder.name, 0, settings.steps))
        clips = pipeline.generate(
            [wish.prompt],
            settings,
            seconds,
            wish.negative_prompt,
            init_audio=start,
            on_denoised=lambda clip, step, estimate: run.seen(step, estimate),
        )
        clip = next(iter(clips))
        file = self.folder / uuid.uuid4().hex / clip_name(wish.prompt, clip.seed)
        write_wav(file, clip.audio, clip.sample_rate)
        step_seconds = [taken - looked for taken, looked in zip(clip.step_seconds, run.looking, strict=True)]
        take = Take(
            wish,
            file,
            settings.steps,
            recipe_of(pipeline.bundle),
            pipeline.bundle.size_bytes,
            1000 * statistics.median(step_seconds),
            sum(step_seconds),
            pictures.sound_png(clip.audio, clip.sample_rate),
            notes,
        )
        return take, run.estimates

    def _pipeline(self, name: str) -> Pipeline:
        """Opened, or still open; those used longest ago are closed when all together are too large."""
        bundle = Bundle(self.bundle(name).folder)  # as it is now: it may have been built again
        key = bundle.folder, bundle.manifest["created"]
        pipeline = self._open.pop(key, None)
        if pipeline is None:
            self._open = {k: p for k, p in self._open.items() if k[0] != bundle.folder}
            while self._open and bundle.size_bytes + sum(p.bundle.size_bytes for p in self._open.values()) > KEPT_OPEN:
                self._open.pop(next(iter(self._open)))
            pipeline = Pipeline.open(str(bundle.folder), self.device)
        self._open[key] = pipeline
        return pipeline


def _read(path: Path, noise_level: float | None) -> InitAudio:
    try:
        return InitAudio.read(path, noise_level)
    except UserError as error:  # of the page no path is known
        said = str(error).replace(f"--init-audio {path}", f"the recording {path.name}").replace(str(path), path.name)
        raise UserError(said) from None


def _notes(pipeline: Pipeline, wish: Wish, settings: Settings, start: InitAudio | None) -> tuple[str, ...]:
    """What was asked for and does not count."""
    notes = []
    if wish.negative_prompt is not None and settings.cfg_scale == 1:
        notes.append("Without guidance (1) the negative prompt does not count.")
    if start is not None and start.seconds > pipeline.max_seconds:
        notes.append(f"The first {pipeline.max_seconds:.1f} s of {start.seconds:.1f} s of the recording are used.")
    if cut := pipeline.count_cut_tokens(wish.prompt):
        notes.append(f"The last {cut} tokens of the prompt are not seen by this model.")
    return tuple(notes)
