"""Captions and bundles in, a folder of WAVs a bundle out, clip by clip: what is finished is never lost or made twice.

    FOLDER/evaluation.json          what is generated: captions, settings, seconds; another plan needs another folder
    FOLDER/<name>/<caption id>.wav  16-bit PCM
    FOLDER/<name>/clips.jsonl       a line a finished clip: id, caption, seed, file, sha256, seconds, step_ms

A clip is written under another name, renamed, and then entered in the index. Whatever moment the process is killed at:
a clip with its name is whole, and one without its line gets it on the next run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...calib_data.reader import Caption
from ...engines.errors import UserError
from ...engines.home import flocked, flush, read_json, sha256, sweep, write_whole
from ...runtime.pipeline import Clip as Made
from ...runtime.pipeline import Pipeline, batch_size
from ...runtime.settings import Settings
from ...runtime.wav import write_wav

PLAN, INDEX = "evaluation.json", "clips.jsonl"
FIELDS = {"id": str, "caption": str, "seed": int, "file": str}  # of an index, at least


@dataclass(frozen=True)
class Clip:
    """A finished clip. Its sampling took `seconds`, `step_ms` a step (median); None where its line was lost.

    batch: how many were computed at once; of their time this is each one's share.
    """

    id: str
    caption: str
    seed: int
    file: str
    sha256: str
    seconds: float | None = None
    step_ms: float | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is generated with every bundle: `variations` clips of each caption. seconds: their length."""

    captions: tuple[Caption, ...]
    settings: Settings
    seconds: float
    variations: int = 1

    @property
    def clips(self) -> list[tuple[Caption, int]]:
        """Each clip's id with its text, and its seed: the settings' and a hash of the id, so of no order or number."""
        found = []
        for caption in self.captions:
            for i in range(self.variations):
                name = caption.id if self.variations == 1 else f"{caption.id}-{i + 1}"
                found.append((Caption(name, caption.text), clip_seed(self.settings.seed, name)))
        return found

    @property
    def caption_ids(self) -> dict[str, str]:
        """Each clip's id -> that of its caption."""
        ids = [caption.id for caption in self.captions for _ in range(self.variations)]
        return {clip.id: of for (clip, _), of in zip(self.clips, ids)}

    def to_dict(self) -> dict:
        return {
            "captions": {caption.id: caption.text for caption in self.captions},
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "seconds": self.seconds,
            "variations": self.variations,
        }


def clip_seed(seed: int, name: str) -> int:
    """The seed of a clip: the run's plus 31 bits of the sha256 of its id, modulo 2^31."""
    digest = hashlib.sha256(name.encode()).digest()
    return (seed + int.from_bytes(digest[:4], "little")) % 2**31


@contextlib.contextmanager
def evaluation_folder(folder: Path, plan: Plan, bundles: Mapping[str, str]) -> Iterator[None]:
    """Hold `folder` for this plan, made now or begun before. bundles: name -> digest of what generates its clips.

    Raises UserError when the folder holds another plan, or clips of another bundle of the same name, or something
    else, or when another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(flocked(folder, wait=False))
        except BlockingIOError:
            raise UserError(f"another process is generating into {folder}; wait for it") from None
        begun = (folder / PLAN).is_file()
        sweep(folder, None if begun else PLAN)
        if not begun and any(folder.iterdir()):
            raise UserError(f"{folder} holds something else than an evaluation; give --output another folder")
        known = read_json(folder / PLAN) if begun else {}
        wanted = plan.to_dict()
        for part, value in wanted.items():
            if known and known.get(part) != value:
                raise UserError(f"{folder} was begun with other {part}; give the same, or --output another folder")
        digests = known.get("bundles", {})
        for name, digest in bundles.items():
            if digests.get(name, digest) != digest:
                raise UserError(
                    f"{folder / name} holds clips of another build of {name}; delete that folder and its line in "
                    f"{PLAN}, or give --output another folder"
                )
        write_whole(folder / PLAN, json.dumps({**wanted, "bundles": {**digests, **bundles}}, indent=1))
        yield


class ClipFolder:
    """The clips of one bundle: those that are finished, and where the others go."""

    def __init__(self, folder: Path, plan: Plan):
        self._folder, self._plan = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.tmp"):
            part.unlink()
        self.finished = self._known()

    def _known(self) -> dict[str, Clip]:
        """By id, in the plan's order; the index is rewritten when its last line was cut off or a clip had none."""
        index = self._folder / INDEX
        text = index.read_text("utf-8") if index.is_file() else ""
        whole_lines = text[: text.rfind("\n") + 1]
        entered = {clip.id: clip for clip in _parsed(whole_lines, index)}
        found = {}
        for caption, seed in self._plan.clips:
            file = f"{caption.id}.wav"
            if not (self._folder / file).is_file():
                continue
            clip = entered.get(caption.id)
            digest = sha256(self._folder / file)
            if clip is not None and clip.sha256 != digest:
                raise UserError(f"{self._folder / file} is not what was generated; delete it, and it is made again")
            found[caption.id] = clip or Clip(caption.id, caption.text, seed, file, digest)
        whole = "".join(json.dumps(asdict(clip)) + "\n" for clip in found.values())
        if whole != text:
            write_whole(index, whole)
        return found

    def generate(self, pipeline: Pipeline, clips: Sequence[tuple[Caption, int]]) -> Iterator[Clip]:
        """Make a batch of clips and enter each. On the CPU backends they equal the single runs of prompt and seed."""
        texts, seeds = [caption.text for caption, _ in clips], [seed for _, seed in clips]
        made = pipeline.generate(texts, self._plan.settings, self._plan.seconds, batch=len(clips), seeds=seeds)
        for (caption, _), clip in zip(clips, made):
            yield self._enter(caption, clip, min(len(clips), pipeline.max_batch or len(clips)))

    def _enter(self, caption: Caption, made: Made, batch: int) -> Clip:
        path = self._folder / f"{caption.id}.wav"
        write_wav(path, made.audio, made.sample_rate)
        flush(path)
        step = made.step_seconds
        clip = Clip(
            caption.id,
            caption.text,
            made.seed,
            path.name,
            sha256(path),
            round(sum(step), 4),
            round(1000 * statistics.median(step), 3),
            batch,
        )
        with (self._folder / INDEX).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(clip)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished[clip.id] = clip
        return clip


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
    folders = {name: ClipFolder(folder / name, plan) for name in pipelines}
    count = sum(len(each.finished) for each in folders.values())
    done(count)
    opened: dict[str, Pipeline] = {}
    missing = {name: [clip for clip in plan.clips if clip[0].id not in each.finished] for name, each in folders.items()}
    sizes = {name: batch_size(len(clips), batch) for name, clips in missing.items()}
    turns = [(begin, name) for name, clips in missing.items() for begin in range(0, len(clips), sizes[name])]
    for begin, name in turns if one_by_one else sorted(turns, key=lambda turn: turn[0]):
        if name not in opened:
            if one_by_one:
                opened.clear()
            opened[name] = pipelines[name]()
        for _ in folders[name].generate(opened[name], missing[name][begin : begin + sizes[name]]):
            count += 1
            done(count)
    order = [caption.id for caption, _ in plan.clips]
    return {name: [each.finished[i] for i in order] for name, each in folders.items()}


def read_clips(folder: Path) -> list[Clip]:
    """The finished clips of one bundle's folder, in its index' order. Raises UserError where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder} has no {INDEX}: give the folder of one bundle in an evaluation's")
    return _parsed(index.read_text("utf-8"), index)


def index_entries(text: str) -> list[dict[str, Any]]:
    """The objects of an index. Raises ValueError, naming the line, for one that is of no clip, or an id twice."""
    entries: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not all(type(entry.get(name)) is kind for name, kind in FIELDS.items()):
            raise ValueError(f"line {number}: not a JSON object with {', '.join(FIELDS)}")
        if entry["id"] in entries:
            raise ValueError(f"line {number}: the id {entry['id']} is there twice")
        entries[entry["id"]] = entry
    return [*entries.values()]


def _parsed(text: str, index: Path) -> list[Clip]:
    try:
        return [Clip(**entry) for entry in index_entries(text)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{index} is damaged ({error}); delete it: clips that are there are entered again") from None


def names_of(folders: Sequence[Path]) -> list[str]:
    """The bundles' names in an evaluation: those of their folders. Raises UserError when two have one name."""
    names = [folder.name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of the bundles are called {name}; copy one to another name")
    return names
