"""Captions and bundles in, a folder of WAVs a bundle out, clip by clip: what is finished is never lost or made twice.

FOLDER/evaluation.json  what is generated: captions, settings, seconds; another plan needs another folder
FOLDER/<name>           the clips of a bundle and their index, see batch/clips.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ...engines.errors import UserError
from ...runtime.pipeline import Pipeline, batch_size
from ..batch.clips import Clip, ClipFolder, Plan, held, make_clips
from ..batch.store import LocalStore

PLAN = "evaluation.json"


@contextlib.contextmanager
def evaluation_folder(folder: Path, plan: Plan, bundles: Mapping[str, str]) -> Iterator[None]:
    """Hold `folder` for this plan, see `held`."""
    with held(LocalStore(folder), PLAN, plan.to_dict(), bundles, "an evaluation"):
        yield


def generate_all(
    pipelines: Mapping[str, Callable[[], Pipeline]],
    folder: Path,
    plan: Plan,
    done: Callable[[int], object] = lambda n: None,
    one_by_one: bool = False,
    batch: int = 1,
) -> dict[str, list[Clip]]:
    """Every clip of every bundle, by name: what is there is kept. done(n) counts finished clips, those from before too.

    The bundles take turns batch by batch, so that their times are of the same minutes; with one_by_one they follow each
    other and only one is open, which takes less memory. pipelines open when first needed. batch: clips at once.
    """
    folders = {name: ClipFolder(LocalStore(folder / name), plan) for name in pipelines}
    count = sum(len(each.finished) for each in folders.values())
    done(count)
    opened: dict[str, Pipeline] = {}
    missing = {name: each.missing for name, each in folders.items()}
    sizes = {name: batch_size(len(clips), batch) for name, clips in missing.items()}
    turns = [(begin, name) for name, clips in missing.items() for begin in range(0, len(clips), sizes[name])]
    for begin, name in turns if one_by_one else sorted(turns, key=lambda turn: turn[0]):
        if name not in opened:
            if one_by_one:
                opened.clear()
            opened[name] = pipelines[name]()
        for clip in make_clips(opened[name], plan, missing[name][begin : begin + sizes[name]]):
            folders[name].enter(clip)
            count += 1
            done(count)
    order = [caption.id for caption, _ in plan.clips]
    return {name: [each.finished[i] for i in order] for name, each in folders.items()}


def names_of(folders: Sequence[Path]) -> list[str]:
    """The bundles' names in an evaluation: those of their folders. Raises UserError when two have one name."""
    names = [folder.name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of the bundles are called {name}; copy one to another name")
    return names
