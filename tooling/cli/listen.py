"""`dit-trt listen`: a blind listening test of several bundles as one page, and the table of what raters said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...engines.errors import UserError
from ...engines.home import expanded
from .common import UsageError, dit_command, megabytes, path_option, progress, say, show_table, tell, usage
from .completion import bundles as bundle_names
from .completion import files, folders
from .grouped import GroupedCommand, GroupedOption

if TYPE_CHECKING:
    from ..listening.answers import Answers
    from ..listening.survey import Key

EPILOG = """\b
Examples:
  dit-trt listen ./fp32 ./sqs-w8a8       bundles, by folder or name
  dit-trt listen BUNDLE BUNDLE --prompts captions.csv --num-prompts 10
  dit-trt listen --clips evaluated/      clips that are there already
  dit-trt listen --results listening-test/answers
"""

make = partial(click.option, cls=GroupedOption, group="Make a survey")
count = partial(click.option, cls=GroupedOption, group="Count the answers")


@click.command(epilog=EPILOG, cls=GroupedCommand)
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...", shell_complete=bundle_names)
@make("--prompts", metavar="FILE", shell_complete=files, help="One prompt a line, or AudioCaps' CSV.")
@make("--num-prompts", type=click.IntRange(1), default=5, show_default=True, help="How many of them, chosen by --seed.")
@make("--clips", metavar="DIR", shell_complete=folders, help="Take <DIR>/<model>/clips.jsonl and its files.")
@make("--seed", default=1000, show_default=True, help="Clip i of every bundle uses seed + i.")
@make("--seconds", type=float, help="Length (default: 10, or the longest).")
@make("--steps", type=int, help="Sampling steps (default: the model's own).")
@make("--title", default="Listening test", show_default=True, help="What raters see above.")
@count("--results", metavar="DIR", shell_complete=folders, help="Score the raters' files in DIR.")
@count("--key", metavar="FILE", shell_complete=files, help="Default: key.json in DIR or above it.")
@click.option("--output", metavar="DIR", shell_complete=folders, help="Default: listening-test; of --results DIR.")
@dit_command
def command(
    bundles: tuple[str, ...],
    prompts: str | None,
    num_prompts: int,
    clips: str | None,
    seed: int,
    seconds: float | None,
    steps: int | None,
    title: str,
    results: str | None,
    key: str | None,
    output: str | None,
) -> dict:
    """Make a blind listening test of bundles, or count what raters answered.

    The survey is one page that opens from a file and needs nothing else: a clip of every bundle for every prompt, in
    an order of each rater's own, equally loud, rated from 1 to 5.
    """
    generation = {"--prompts": prompts, "--seconds": seconds, "--steps": steps}
    given = [name for name, value in generation.items() if value is not None]
    if results is not None:
        if bundles or clips is not None or given:
            raise UsageError("--results counts answers and makes no survey; leave out bundles, --clips and the like")
        return _count(expanded(results), path_option(key), path_option(output))
    if key is not None:
        raise UsageError("--key belongs to --results; give both")
    if clips is not None and given:
        raise UsageError(f"--clips takes clips that are there already; leave out {', '.join(given)}")

    from ..listening.survey import check_new, check_title

    folder = expanded(output or "listening-test")
    check_new(folder)
    if clips is not None:
        from ..listening.clips import models_in

        source = expanded(clips)
        models = models_in(source, bundles)
        with usage():
            check_title(title, models)
    else:
        source = folder / "clips"
        models = _generate(bundles, path_option(prompts), num_prompts, source, title, seed, seconds, steps)
    return _write(source, models, num_prompts, seed, title, folder)


def _generate(
    bundles: Sequence[str],
    prompts: Path | None,
    num_prompts: int,
    target: Path,
    title: str,
    seed: int,
    seconds: float | None,
    steps: int | None,
) -> list[str]:
    """The clips of every bundle into `target`; the bundles' names."""
    if len(bundles) < 2:
        raise UsageError("a listening test compares two bundles or more: name them (dit-trt list), or give --clips")

    from ...calib_data.reader import choose_prompts, heldout_prompts, read_prompts
    from ...runtime.pipeline import Pipeline
    from ...runtime.settings import Settings
    from ..listening.clips import generate_clips
    from ..listening.survey import check_title

    settings: dict[str, Any] = {"seed": seed} if steps is None else {"seed": seed, "steps": steps}
    with usage():
        Settings(**settings)
    texts = heldout_prompts() if prompts is None else read_prompts(prompts)
    texts = choose_prompts(texts, num_prompts, seed)
    pipelines = [Pipeline.open(bundle) for bundle in bundles]
    models = [pipeline.bundle.folder.name for pipeline in pipelines]
    if len(set(models)) < len(models):
        raise UserError(f"two of the bundles have one name ({', '.join(models)}); name others, or rename a folder")
    with usage():
        check_title(title, models)
    total = sum(len(texts) * pipeline.settings(**settings).steps for pipeline in pipelines)
    with progress("sampling", total) as done:
        generate_clips(pipelines, texts, target, settings, seconds, done)
    return models


def _write(source: Path, models: Sequence[str], num_prompts: int, seed: int, title: str, folder: Path) -> dict:
    from ...calib_data.reader import choose_prompts
    from ..listening.clips import captions_of, read_clips
    from ..listening.survey import write_survey

    chosen = choose_prompts(list(captions_of(source, models)), num_prompts, seed)
    sounds = read_clips(source, models, chosen)
    for sound in sounds:
        if not sound.audio.any():
            say(f"note: the clip {sound.id} of {sound.model} is silent")
    survey = write_survey(sounds, models, title, folder)
    size = survey.page.stat().st_size
    tell(f"{survey.page}: {survey.questions} questions, {megabytes(size)}; send it to the raters")
    tell(f"{survey.key}: which clip is whose; keep it, and show it to no rater")
    tell(f"then: dit-trt listen --results DIR --key {survey.key}")
    return {
        "survey": survey.id,
        "page": str(survey.page),
        "key": str(survey.key),
        "clips": str(source),
        "models": list(models),
        "questions": survey.questions,
        "loudness_lufs": round(survey.loudness, 2),
        "page_bytes": size,
    }


def _count(folder: Path, key_file: Path | None, output: Path | None) -> dict:
    from ..listening.answers import read_answers
    from ..listening.report import HEAD, rows, write_report
    from ..listening.scores import METHOD, rating_table, scores
    from ..listening.survey import KEY, read_key
    from ..plots import check_matplotlib

    check_matplotlib("--results draws with")
    if key_file is None:
        key_file = next((place for place in (folder / KEY, folder.parent / KEY) if place.is_file()), folder / KEY)
    key = read_key(key_file)
    answers = read_answers(folder, key)
    for file, reason in answers.refused:
        say(f"not counted: {file.name}: {reason}")
    found = scores(key.models, rating_table(key, answers.raters))
    incomplete = answers.incomplete(key)
    counted = _counted(answers, key)
    show_table([HEAD, *rows(found)])
    tell(counted)
    tell(METHOD)
    written = write_report(output or folder, key.title, found, counted)
    tell("written: " + ", ".join(map(str, written)))
    return {
        "survey": key.survey,
        "models": [asdict(score) for score in found],
        "raters": len(answers.raters),
        "incomplete": [rater.name for rater in incomplete],
        "refused": [{"file": str(file), "reason": reason} for file, reason in answers.refused],
        "files": [str(path) for path in written],
    }


def _counted(answers: Answers, key: Key) -> str:
    """Who was counted, in words."""
    names = [rater.name for rater in answers.incomplete(key)]
    left = f", {len(names)} of them incomplete ({', '.join(names)})" if names else ""
    ratings = sum(len(rater.ratings) for rater in answers.raters)
    files = f"; {_some(len(answers.refused), 'file')} not counted" if answers.refused else ""
    return f"{_some(len(answers.raters), 'rater')}{left}, {_some(ratings, 'rating')}{files}"


def _some(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
