"""A folder of clips and its index: what is finished is never lost or made twice, whatever moment its process dies at.

    <caption id>.wav  16-bit PCM
    clips.jsonl       a line a clip: id, caption, seed, file, sha256, seconds, step_ms, batch, backend, error

A clip is written whole (see store.py) and then entered in the index. In a folder one without its line gets it on the
next run; elsewhere, where the index is written anew every few seconds and not appended to, it is made again: the same
bytes. `error` says why there is no clip; the next run tries it again. When a run ends there is one line a caption.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...calib_data.reader import Caption
from ...engines.errors import UserError
from ...runtime.pipeline import Pipeline
from ...runtime.settings import Settings
from ...runtime.wav import encode
from .store import Store

INDEX = "clips.jsonl"
FIELDS = {"id": str, "caption": str, "seed": int, "file": str}  # of an index' clips, at least
FLUSH_SECONDS = 10  # at most so much work is done again where an index cannot be appended to


@dataclass(frozen=True)
class Clip:
    """A finished clip. Its sampling took `seconds`, `step_ms` a step (median); None where its line was lost.

    batch: how many were computed at once; of their time this is each one's share. backend: what computed it.
    """

    id: str
    caption: str
    seed: int
    file: str
    sha256: str
    seconds: float | None = None
    step_ms: float | None = None
    batch: int | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Failed:
    """A clip that could not be made, and why."""

    id: str
    caption: str
    seed: int
    error: str


Made = tuple[Clip, bytes] | Failed  # with its WAV file


@dataclass(frozen=True)
class Plan:
    """What is generated: `variations` clips of each caption. seconds: their length."""

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
def held(store: Store, file: str, plan: Mapping[str, Any], bundles: Mapping[str, str], what: str) -> Iterator[None]:
    """Hold a folder for `plan`, which its `file` keeps, made now or begun before; more bundles may join.

    bundles: name -> digest of what generates its clips. what: an evaluation, a batch. Raises UserError when the folder
    holds another plan, or clips of another bundle of the same name, or something else, or when another process is at
    it.
    """
    with store.held():
        kept = store.read(file)
        store.sweep(file if kept is None else None)
        if kept is None and store.names():
            raise UserError(f"{store.place} holds something else than {what}; give --output another folder")
        known = _object(kept, f"{store.place}/{file}") if kept is not None else {}
        for part, value in plan.items():
            if known and known.get(part) != value:
                raise UserError(f"{store.place} was begun with other {part}; give the same, or --output another folder")
        digests = known.get("bundles", {})
        if not isinstance(digests, dict):
            raise UserError(f"{store.place}/{file} does not hold its bundles as a JSON object")
        for name, digest in bundles.items():
            if digests.get(name, digest) != digest:
                raise UserError(
                    f"{store.place}/{name} holds clips of another build of {name}; delete that folder and its line in "
                    f"{file}, or give --output another folder"
                )
        store.write(file, json.dumps({**plan, "bundles": {**digests, **bundles}}, indent=1).encode())
        yield


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} does not hold a JSON object")
    return value


class ClipFolder:
    """The clips of one plan in a store: those that are finished, those that failed, and where the others go."""

    def __init__(self, store: Store, plan: Plan):
        self._store, self._plan = store, plan
        self.failed: dict[str, Failed] = {}
        self.finished: dict[str, Clip] = {}
        self._read()
        self._flushed = time.monotonic()

    @property
    def missing(self) -> list[tuple[Caption, int]]:
        """Captions and seeds, in the plan's order; those that failed before are tried again."""
        return [clip for clip in self._plan.clips if clip[0].id not in self.finished]

    def _read(self) -> None:
        """What is there; the index is rewritten when its last line was cut off or a clip had none."""
        text = (self._store.read(INDEX) or b"").decode("utf-8", "replace")
        whole_lines = text[: text.rfind("\n") + 1]
        entered, failed = _parsed(whole_lines, f"{self._store.place}/{INDEX}")
        names, appends = self._store.names(), self._store.append is not None
        for caption, seed in self._plan.clips:
            file = f"{caption.id}.wav"
            clip = entered.get(caption.id)
            if file not in names or (clip is None and not appends):
                if caption.id in failed:
                    self.failed[caption.id] = failed[caption.id]
                continue
            if appends:
                digest = self._store.sha256(file)
                if clip is not None and clip.sha256 != digest:
                    raise UserError(
                        f"{self._store.place}/{file} is not what was generated; delete it, and it is made again"
                    )
                clip = clip or Clip(caption.id, caption.text, seed, file, digest)
            assert clip is not None
            self.finished[caption.id] = clip
        self._write(text)

    def enter(self, made: Made) -> None:
        """Write a clip and enter it, or that it failed. Raises UserError when it cannot be written."""
        entry: Clip | Failed
        if isinstance(made, Failed):
            entry = self.failed[made.id] = made
        else:
            entry, content = made
            self._store.write(entry.file, content)
            self.finished[entry.id] = entry
            self.failed.pop(entry.id, None)
        if self._store.append is not None:
            self._store.append(INDEX, _line(entry))
        elif time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Every clip has its line, and only one, in the plan's order."""
        self._write((self._store.read(INDEX) or b"").decode("utf-8", "replace"))
        self._flushed = time.monotonic()

    def _write(self, before: str) -> None:
        ids = [caption.id for caption, _ in self._plan.clips]
        entries = (self.finished.get(i) or self.failed.get(i) for i in ids)
        whole = "".join(_line(entry) for entry in entries if entry is not None)
        if whole != before:
            self._store.write(INDEX, whole.encode())


def make_clips(pipeline: Pipeline, plan: Plan, clips: Sequence[tuple[Caption, int]]) -> Iterator[tuple[Clip, bytes]]:
    """Clips of captions and seeds, computed at once. On the CPU backends they equal the single runs of both."""
    texts, seeds = [caption.text for caption, _ in clips], [seed for _, seed in clips]
    made = pipeline.generate(texts, plan.settings, plan.seconds, batch=len(clips), seeds=seeds)
    batch = min(len(clips), pipeline.max_batch or len(clips))
    for (caption, _), clip in zip(clips, made):
        content = encode(clip.audio, clip.sample_rate)
        step = clip.step_seconds
        entry = Clip(
            caption.id,
            caption.text,
            clip.seed,
            f"{caption.id}.wav",
            hashlib.sha256(content).hexdigest(),
            round(sum(step), 4),
            round(1000 * statistics.median(step), 3),
            batch,
            pipeline.bundle.backend,
        )
        yield entry, content


def read_clips(folder: Path) -> list[Clip]:
    """The finished clips of one bundle's folder, in its index' order. Raises UserError where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder} has no {INDEX}: give the folder of one bundle in an evaluation's")
    return [*_parsed(index.read_text("utf-8"), str(index))[0].values()]


def index_entries(text: str) -> list[dict[str, Any]]:
    """The objects of an index that are of a clip. Raises ValueError, naming the line, for one of none, or an id twice.

    A line with an `error` is of none that there is.
    """
    return [*_entries(text)[0].values()]


def _entries(text: str) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The objects of clips, and those of errors that no later clip has made good; by id."""
    clips: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        failed = isinstance(entry, dict) and entry.get("error") is not None
        fields = {**FIELDS, "file": type(None), "error": str} if failed else FIELDS
        if not isinstance(entry, dict) or not all(type(entry.get(name)) is kind for name, kind in fields.items()):
            raise ValueError(f"line {number}: not a JSON object with {', '.join(FIELDS)}")
        if entry["id"] in clips:
            raise ValueError(f"line {number}: the id {entry['id']} is there twice")
        errors.pop(entry["id"], None)
        (errors if failed else clips)[entry["id"]] = entry
    return clips, errors


def _line(entry: Clip | Failed) -> str:
    if isinstance(entry, Clip):
        return json.dumps({**asdict(entry), "error": None}) + "\n"
    facts = {"id": entry.id, "caption": entry.caption, "seed": entry.seed}
    return json.dumps({**facts, "file": None, "sha256": None, "error": entry.error}) + "\n"


def _parsed(text: str, where: str) -> tuple[dict[str, Clip], dict[str, Failed]]:
    try:
        clips, errors = _entries(text)
        failed = {i: Failed(i, entry["caption"], entry["seed"], entry["error"]) for i, entry in errors.items()}
        bare = {i: {name: value for name, value in entry.items() if name != "error"} for i, entry in clips.items()}
        return {i: Clip(**entry) for i, entry in bare.items()}, failed
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged ({error}); delete it: clips that are there are entered again") from None
