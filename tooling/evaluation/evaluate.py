"""The paper's Table 1 for any bundles: clips of a caption list, their metrics, the table, in one resumable folder."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...calib_data.reader import Caption
from ...engines.base import BACKENDS, choose_backend
from ...engines.bundle import Bundle
from ...engines.errors import UserError
from ...engines.home import write_whole
from ...runtime.pipeline import Pipeline
from ...runtime.settings import Settings
from ..batch.clips import Clip, Plan
from ..fidelity import Trial, measure, record
from ..intervals import Estimate
from ..recipe import Recipe
from ..recipe_text import options_of
from ..workflow import Say, Watch, checkpoint_of, reference_backend, reference_bundle, silent, unwatched
from .clips import evaluation_folder, generate_all, names_of
from .embedders import Embedder
from .scores import KEPT, Heard, Scores, Sound, score, sounds_in, sounds_of, without_silence

FP32, FLOOR = "fp32", "fp32-other-seeds"


@dataclass(frozen=True)
class Row:
    """A bundle's line of the table. clip_seconds, faster: of one clip's sampling, and FP32's time of it over that.

    worst_step_cosine: of the velocity, teacher forced on FP32's trajectories; None for FP32 itself.
    """

    name: str
    label: str
    backend: str
    bundle_bytes: int
    dit_bytes: int
    clip_seconds: float | None
    faster: float | None
    worst_step_cosine: float | None
    mean_cosine: float | None
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """The table's rows, and what it was made of.

    clips: of each row. silent: by row, the ids of its clips of nothing; no row has scores of these.
    """

    model: str
    clips: int
    captions: int
    settings: Settings
    seconds: float
    reference: str
    rows: tuple[Row, ...]
    silent: Mapping[str, list[str]]


def evaluate(
    bundles: Sequence[Bundle],
    captions: Sequence[Caption],
    folder: Path,
    embedders: Sequence[Embedder] = (),
    variations: int = 1,
    seconds: float | None = None,
    chosen: dict | None = None,
    reference: Path | None = None,
    floor: bool = False,
    one_by_one: bool = False,
    batch: int = 1,
    velocity_clips: int = 8,
    device: str | None = None,
    watch: Watch = unwatched,
    say: Say = silent,
) -> Evaluation:
    """Generate what is missing in `folder`, then score everything; a second call with the same arguments only scores.

    chosen: settings that are not the model's own (see `Settings`). reference: real recordings (a folder of files named
    by caption id) or stable-audio-metrics' .npz, for distances and divergences; default: FP32's clips. floor: FP32 with
    other seeds as a row of its own, how far apart two good clips are. batch: clips generated at once. velocity_clips:
    how many captions the velocity is compared on; 0: none. device: of all the bundles' backends. Raises UserError for
    bundles of different models, and as `evaluation_folder` does.
    """
    model = bundles[0].manifest["model"]
    if any(bundle.manifest["model"]["digest"] != model["digest"] for bundle in bundles):
        raise UserError("the bundles were built from different models; evaluate those of one")
    for bundle in bundles:
        choose_backend(bundle.backend, device)
    fp32 = _fp32(bundles, say)
    others = [bundle for bundle in bundles if bundle.folder != fp32.folder]
    names = {FP32: fp32, **dict(zip(names_of([bundle.folder for bundle in others]), others))}
    for bundle in names.values():
        bundle.verify()
    first = Pipeline(fp32, device)
    settings = first.settings(**(chosen or {}))
    plan = Plan(tuple(captions), settings, first.check_seconds(seconds), variations)
    digests = {name: _digest(bundle, device) for name, bundle in names.items()}
    if floor:
        digests[FLOOR] = digests[FP32]
    with evaluation_folder(folder, plan, digests):
        total = len(plan.clips) * len(names)
        makers = {name: partial(Pipeline, bundle, device) for name, bundle in names.items()}
        with watch("generating clips", total) as done:
            clips = generate_all(makers, folder, plan, done, one_by_one, batch)
        if floor:
            other = replace(plan, settings=replace(settings, seed=settings.seed + 1))
            with watch("FP32 with other seeds", len(plan.clips)) as done:
                clips[FLOOR] = generate_all({FLOOR: makers[FP32]}, folder, other, done, batch=batch)[FLOOR]
        sounds = {name: sounds_of(folder / name, each, plan.caption_ids) for name, each in clips.items()}
        sounds, gone = without_silence(sounds)
        for name, ids in gone.items():
            say(f"note: {len(ids)} of {name}'s clips are silent ({', '.join(ids[:4])}): no row is scored on them")
        if not sounds[FP32]:
            raise UserError(f"no clip sounds in all rows, so there is nothing to score; listen to those in {folder}")
        scores = _score(sounds, embedders, reference, folder, watch, say)
        velocities = _velocities(makers, plan, digests, folder, velocity_clips, watch)
    rows = [
        _row(name, names.get(name, fp32), each, clips[FP32], scores[name], velocities.get(name, (None, None)))
        for name, each in clips.items()
    ]
    told = "FP32's clips" if reference is None else str(reference)
    counts = len(sounds[FP32]), len({sound.caption_id for sound in sounds[FP32]})
    return Evaluation(model["name"], *counts, settings, plan.seconds, told, tuple(rows), gone)


def _fp32(bundles: Sequence[Bundle], say: Say) -> Bundle:
    """The float bundle among them, or the reference of their checkpoint."""
    for bundle in bundles:
        if bundle.manifest["recipe"]["method"] == "none" and bundle.manifest.get("trunk", "fp32") == "fp32":
            return bundle
    checkpoint = checkpoint_of(bundles[0], "build the bundles again, or give an FP32 bundle (--method none) too")
    return reference_bundle(checkpoint, reference_backend(bundles[0].backend), say)


def _digest(bundle: Bundle, device: str | None) -> str:
    """Of all that decides what a bundle's clips are: its files, the backend's version, and the device."""
    files = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    facts = [files, bundle.backend, BACKENDS[bundle.backend].load().runtime_version(), device]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _score(
    sounds: dict[str, list[Sound]],
    embedders: Sequence[Embedder],
    reference: Path | None,
    folder: Path,
    watch: Watch,
    say: Say,
) -> dict[str, Scores]:
    heard = [Heard(embedder, folder / KEPT) for embedder in embedders]
    real: Path | list[Sound] | None = reference
    if reference is not None and reference.suffix != ".npz":
        real = sounds_in(reference)
        missing = {sound.caption_id for sound in sounds[FP32]} - {sound.id for sound in real}
        if missing and any(each.kind == "logits" for each in embedders):
            say(
                f"note: {reference} has no recording of {len(missing)} of the captions ({min(missing)}); KL, which "
                "is of pairs, is left out"
            )
    count = 0
    with watch("scoring", sum(map(len, sounds.values())) * (1 + len(heard))) as done:

        def one() -> None:
            nonlocal count
            count += 1
            done(count)

        return {name: score(each, sounds[FP32], heard, real, done=one) for name, each in sounds.items()}


def _velocities(
    pipelines: dict[str, partial[Pipeline]], plan: Plan, digests: dict[str, str], folder: Path, count: int, watch: Watch
) -> dict[str, tuple[float, float]]:
    """Worst step's and mean cosine of each bundle's velocity, on the first captions; kept by the bundles' digests."""
    captions = plan.captions[:count]
    if not captions or len(pipelines) < 2:
        return {}
    trial = Trial(tuple(caption.text for caption in captions), (plan.settings.seed,), plan.settings)
    place = folder / ".velocity" / trial.digest(digests[FP32])
    found = {}
    with watch("FP32's trajectories", trial.calls) as done:
        record(pipelines[FP32](), trial, place, done)
    for name, pipeline in pipelines.items():
        if name == FP32:
            continue
        kept = place / f"{digests[name][:32]}.json"
        if not kept.is_file():
            with watch(f"velocity of {name}", trial.calls) as done:
                summary = measure(pipeline(), trial, place, done).summary()
            write_whole(kept, json.dumps(summary))
        summary = json.loads(kept.read_text("utf-8"))
        found[name] = summary["worst_step_cosine"], summary["mean_cosine"]
    return found


def _row(
    name: str,
    bundle: Bundle,
    clips: Sequence[Clip],
    fp32: Sequence[Clip],
    scores: Scores,
    velocity: tuple[float | None, float | None],
) -> Row:
    times = [clip.seconds for clip in clips if clip.seconds is not None]
    base = {(clip.id, clip.batch): clip.seconds for clip in fp32}  # of other batches no ratio is taken
    ratios = [a / b.seconds for b in clips if b.seconds is not None and (a := base.get((b.id, b.batch))) is not None]
    steps = [entry["bytes"] for file, entry in bundle.manifest["files"].items() if file.startswith("step")]
    return Row(
        name,
        "FP32, other seeds" if name == FLOOR else label_of(bundle),
        bundle.backend,
        bundle.size_bytes,
        sum(steps),
        statistics.median(times) if times else None,
        None if name == FLOOR or not ratios else statistics.median(ratios),
        velocity[0],
        velocity[1],
        scores,
    )


def label_of(bundle: Bundle) -> str:
    """`SQD W8A8, low rank 32 (residual)`"""
    recipe = Recipe.from_dict(bundle.manifest["recipe"])
    trunk = bundle.manifest.get("trunk", "fp32")
    if recipe.method == "none":
        return {"fp32": "FP32"}.get(trunk, trunk.upper())
    name = recipe.method if recipe.method == "sqt" else recipe.method.upper()
    return ", ".join([f"{name} {recipe.bits.upper()}", *options_of(recipe)])


def numbers(evaluation: Evaluation) -> dict[str, Estimate | None]:
    """All keys that any row has a score for, in order, with the first row's value of each."""
    found: dict[str, Estimate | None] = {}
    for row in evaluation.rows:
        for key, each in row.scores.items():
            found.setdefault(key, each)
    return found
